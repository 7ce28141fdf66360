"""Play a trained policy: return, normalized score and success rate, and a video on request.

    python tools/evaluate.py output/RUN --episodes 100 --video episode.gif

RUN is a checkpoint, or a run directory, whose newest checkpoint is used. The policy plays its mean
actions. Intervals are 95 % confidence intervals: of the mean by Student's t, of the success
rate by Wilson's score. The video shows the first episode, rendered offscreen. For an ant's maze the
GIF loops, plays at about twice the ant's speed and has a few hundred kilobytes.
"""

import functools
import math
import os
import sys
from pathlib import Path

import numpy as np
import scipy.stats
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cal_ql
import tasks
from runs.directory import check_form, checkpoints_in, load_checkpoint, model_form, run_form
from runs.errors import InputError, run_program
from runs.options import saved_config
from runs.workers import Workers
from tools.command_line import Parser
from tools.film import Filmed


def load_policy(run: Path) -> tuple[cal_ql.Config, cal_ql.Task, cal_ql.Actor, cal_ql.Scaling]:
    """Load the policy of a checkpoint, or of a run's newest one; raises `InputError`."""
    found = checkpoints_in(run) if os.path.isdir(run) else [run]
    if not found:
        raise InputError(f"{run} has no checkpoint_<step>.pt; is it a run directory?")
    cpu = torch.device("cpu")
    saved = load_checkpoint(found[-1], cpu)
    config = saved_config(cal_ql.Config, cal_ql.RANGES, saved.get("config"), found[-1])
    config.compile = False
    task = tasks.make(config.env, config.dataset_path)
    print(f"{found[-1]}, on {task.physics}")
    agent = cal_ql.Agent(task.observation_dim, task.action_dim, config, cpu)
    counts = vars(cal_ql.Progress())
    form = run_form(agent.state_dict(), agent.optimizer, task.observation_dim, counts)
    check_form(saved, model_form(form), found[-1])
    agent.load_networks(saved)
    scaling = {name: value.numpy() for name, value in saved["scaling"].items()}
    return config, task, agent.actor, cal_ql.Scaling(**scaling, reward_scale=1.0, reward_bias=0.0)


def mean_interval(values: list[float]) -> str:
    """The mean; for several values also its interval by Student's t, and their deviation."""
    mean = float(np.mean(values))
    n = len(values)
    if n == 1:
        return f"{mean:.2f}"
    half = scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    spread = f"deviation {np.std(values):.2f} over episodes"
    return f"{mean:.2f} ({mean - half:.2f} to {mean + half:.2f}), {spread}"


def rate_interval(successes: int, n: int) -> str:
    """The share of successes and its interval by Wilson's score."""
    low, high = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    return f"{successes / n:.3f} ({low:.3f} to {high:.3f})"


def report(task: cal_ql.Task, episodes: list[cal_ql.Episode]) -> str:
    """The results of the episodes, a line per quantity."""
    lines = [
        f"return            {mean_interval([sum(episode.rewards) for episode in episodes])}",
        f"length            {mean_interval([len(episode.rewards) for episode in episodes])}",
        f"normalized score  {mean_interval([episode.score for episode in episodes])}",
    ]
    if task.has_goal:
        successes = sum(episode.success for episode in episodes)
        lines.append(f"success rate      {rate_interval(successes, len(episodes))}")
    return "\n".join(lines)


def evaluate(run: Path, n: int, seed: int | None, video: Path | None) -> None:
    """Play `n` episodes, print their results and save the video."""
    config, task, actor, scaling = load_policy(run)
    seed = config.eval_seed if seed is None else seed
    workers = 1 if video else None  # episodes in other processes could not be filmed
    film = Filmed(task, video) if video else None
    make_task = functools.partial(tasks.make, config.env, config.dataset_path)
    pool = Workers(workers, n, film or task, make_task)
    play = functools.partial(cal_ql.play_episode, actor=actor, scaling=scaling, explore=False)
    try:
        episodes = pool.map(play, [cal_ql.episode_seed(seed, "eval", i) for i in range(n)])
    finally:  # otherwise Python would wait until the workers have played all episodes
        pool.close()
    print(f"{n} episodes of {config.env}, seed {seed}")
    print(report(task, episodes))
    if film:
        film.save()


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="run directory or checkpoint")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, help="of the episodes; default: the run's eval_seed")
    parser.add_argument("--video", type=Path, help="GIF or MP4 file of the first episode")
    args = parser.parse_args()
    if args.episodes < 1:
        raise InputError(f"episodes: found {args.episodes}, expected 1 or more")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise InputError(f"seed: found {args.seed}, expected 0 to 2**32 - 1")
    evaluate(args.run, args.episodes, args.seed, args.video)


if __name__ == "__main__":
    sys.exit(run_program(main, "evaluate.py"))
