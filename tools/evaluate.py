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


def load_policy(run: Path) -> tuple[cal_ql.Config, cal_ql.Agent, cal_ql.Scaling, cal_ql.Task]:
    """The agent of a run directory or a checkpoint, on the CPU; raises `cal_ql.InputError`."""
    found = sorted(run.glob("checkpoint_*.pt"), key=cal_ql.step_of) if run.is_dir() else [run]
    if not found:
        raise cal_ql.InputError(f"{run} has no checkpoint_<step>.pt; is it a run directory?")
    device = torch.device("cpu")
    state = cal_ql.load_checkpoint(found[-1], device)
    print(f"{found[-1]}, on {cal_ql.d4rl_compat.PHYSICS}")
    config = cal_ql.Config(**state["config"] | {"compile": False})
    task = cal_ql.Task(config.env)
    agent = cal_ql.Agent(task.observation_dim, task.action_dim, config, device)
    agent.load_state_dict(state["agent"])
    scaling = cal_ql.Scaling(**{name: value.numpy() for name, value in state["scaling"].items()})
    return config, agent, scaling, task


def mean_interval(values: list[float]) -> str:
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return f"{mean:.2f}"
    half = scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return f"{mean:.2f} ({mean - half:.2f} to {mean + half:.2f})"


def rate_interval(successes: int, n: int) -> str:
    low, high = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    return f"{successes / n:.3f} ({low:.3f} to {high:.3f})"


class Video:
    """Frames of a D4RL task's episode, rendered offscreen; raises `InputError` without OpenGL."""

    def __init__(self, task: cal_ql.Task, path: Path):
        base = task.env.unwrapped
        base = getattr(base, "_wrapped_env", base)  # D4RL's wrapper around its ant and cheetah
        model, self.data = (getattr(x, "raw", x) for x in (base.sim.model, base.sim.data))
        try:
            import mujoco

            self.renderer = mujoco.Renderer(model, height=240, width=320)
            self.writer = imageio.get_writer(path, mode="I")
        except (OSError, ValueError) as error:
            raise cal_ql.InputError(f"video: cannot write {path} ({error})") from None
        except Exception as error:  # each OpenGL library has errors of its own
            raise cal_ql.InputError(
                f"video: no OpenGL to render with ({type(error).__name__}: {error}); try "
                "MUJOCO_GL=egl (a GPU) or MUJOCO_GL=osmesa (Debian's libosmesa6)"
            ) from None

    def add_frame(self) -> None:
        self.renderer.update_scene(self.data)
        self.writer.append_data(self.renderer.render())


def record(
    path: Path,
    config: cal_ql.Config,
    agent: cal_ql.Agent,
    scaling: cal_ql.Scaling,
    task: cal_ql.Task,
) -> None:
    """Write a video of the first evaluation episode."""
    video = Video(task, path)
    episode = cal_ql.Episode(task, cal_ql.episode_seed(config.eval_seed, "eval", 0))
    # as many rows as in the evaluation, where rounding would be another for one
    observations = np.zeros((config.n_episodes, task.observation_dim), np.float32)
    while not episode.over:
        video.add_frame()
        observations[0] = scaling.observation(episode.observation)
        episode.step(agent.act(observations, explore=False)[0])
    video.writer.close()


def evaluate(run: Path, n: int, seed: int | None, video: Path | None) -> str:
    """Play `n` episodes and say what they yielded."""
    config, agent, scaling, task = load_policy(run)
    seed = config.eval_seed if seed is None else seed
    config = dataclasses.replace(config, n_episodes=n, eval_seed=seed)
    if video:
        record(video, config, agent, scaling, task)
    episodes = cal_ql.Evaluator(config).evaluate(agent, scaling, between=lambda: None)
    lines = [
        f"{n} episodes of {config.env}, seed {seed}",
        f"return            {mean_interval([episode.episode_return for episode in episodes])}",
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
        print(evaluate(args.run, args.episodes, args.seed, args.video))
    except cal_ql.InputError as error:
        print("evaluate.py: error:", *str(error).split(), file=sys.stderr)  # one line
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
