"""Play a trained policy: return, normalized score and success rate, and a video where asked.

    python tools/evaluate.py runs/RUN --episodes 100 --video episode.gif

RUN is a run directory, of which the newest checkpoint is taken, or a checkpoint in it. The policy
takes its mean actions. Intervals are 95 % confidence intervals: of the mean by Student's t, of the
success rate by Wilson's score. The video shows the first episode, rendered offscreen.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import imageio
import numpy as np
import scipy.stats
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cal_ql
import runs
import tasks


def load_policy(run: Path) -> tuple[cal_ql.Config, cal_ql.Task, cal_ql.Actor, cal_ql.Scaling]:
    """The policy of a run directory or a checkpoint, on the CPU; raises `InputError`."""
    found = runs.checkpoints_in(run) if run.is_dir() else [run]
    if not found:
        raise runs.InputError(f"{run} has no checkpoint_<step>.pt; is it a run directory?")
    state = runs.load_checkpoint(found[-1], torch.device("cpu"))
    config = cal_ql.Config(**state["config"])
    task = tasks.make(config.env, config.dataset_path)
    print(f"{found[-1]}, on {task.physics}")
    actor = cal_ql.Actor(task.observation_dim, task.action_dim, config)
    prefix = "actor."
    weights = {k.removeprefix(prefix): v for k, v in state["agent"].items() if k.startswith(prefix)}
    actor.load_state_dict(weights)
    scaling = {name: value.numpy() for name, value in state["scaling"].items()}
    return config, task, actor, cal_ql.Scaling(**scaling, reward_scale=1.0, reward_bias=0.0)


def mean_interval(values: list[float]) -> str:
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return f"{mean:.2f}"
    half = scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    spread = f"deviation {np.std(values):.2f} over episodes"
    return f"{mean:.2f} ({mean - half:.2f} to {mean + half:.2f}), {spread}"


def rate_interval(successes: int, n: int) -> str:
    low, high = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    return f"{successes / n:.3f} ({low:.3f} to {high:.3f})"


class Filmed:
    """A task that adds a frame to a video before each step; raises `InputError` without OpenGL."""

    def __init__(self, task: cal_ql.Task, path: Path):
        self.task, self.reset, self.score = task, task.reset, task.score
        base = task.env.unwrapped
        base = getattr(base, "_wrapped_env", base)  # D4RL's wrapper around its ant and cheetah
        model, self.data = (getattr(x, "raw", x) for x in (base.sim.model, base.sim.data))
        try:
            import mujoco

            self.renderer = mujoco.Renderer(model, height=240, width=320)
            self.writer = imageio.get_writer(path, mode="I")
        except (OSError, ValueError) as error:
            raise runs.InputError(f"video: cannot write {path} ({error})") from None
        except Exception as error:  # each OpenGL library has errors of its own
            raise runs.InputError(
                f"video: no OpenGL to render with ({type(error).__name__}: {error}); try "
                "MUJOCO_GL=egl (a GPU) or MUJOCO_GL=osmesa (Debian's libosmesa6)"
            ) from None

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, bool]:
        self.renderer.update_scene(self.data)
        self.writer.append_data(self.renderer.render())
        return self.task.step(action)


def evaluate(run: Path, n: int, seed: int | None, video: Path | None) -> str:
    """Play `n` episodes and say what they yielded."""
    config, task, actor, scaling = load_policy(run)
    seed = config.eval_seed if seed is None else seed
    config = dataclasses.replace(config, n_episodes=n, eval_seed=seed, eval_workers=None)
    if video:
        film, first = Filmed(task, video), cal_ql.episode_seed(seed, "eval", 0)
        cal_ql.play_episode(film, actor, scaling, first, explore=False)
        film.writer.close()
    evaluator = cal_ql.Evaluator(config, task)
    episodes = evaluator.evaluate(actor, scaling)
    evaluator.close()
    lines = [
        f"{n} episodes of {config.env}, seed {seed}",
        f"return            {mean_interval([sum(episode.rewards) for episode in episodes])}",
        f"length            {mean_interval([len(episode.rewards) for episode in episodes])}",
        f"normalized score  {mean_interval([episode.score for episode in episodes])}",
    ]
    if task.has_goal:
        successes = sum(episode.success for episode in episodes)
        lines.append(f"success rate      {rate_interval(successes, n)}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="run directory or checkpoint")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, help="of the episodes; default: the run's eval_seed")
    parser.add_argument("--video", type=Path, help="GIF or MP4 file of the first episode")
    args = parser.parse_args()
    try:
        if args.episodes < 1:
            raise runs.InputError(f"episodes: found {args.episodes}, expected 1 or more")
        if args.seed is not None and not 0 <= args.seed < 2**32:
            raise runs.InputError(f"seed: found {args.seed}, expected 0 to 2**32 - 1")
        print(evaluate(args.run, args.episodes, args.seed, args.video))
    except (runs.InputError, runs.RunError) as error:
        print("evaluate.py: error:", *str(error).split(), file=sys.stderr)  # one line
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
