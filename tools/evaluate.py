"""Play a trained policy: return, normalized score and success rate, and a video on request.

    python tools/evaluate.py runs/RUN --episodes 100 --video episode.gif

RUN is a checkpoint, or a run directory, whose newest checkpoint is used. The policy takes its mean
actions. Intervals are 95 % confidence intervals: of the mean by Student's t, of the success rate by
Wilson's score. The video shows the first episode, rendered offscreen. The GIF of an ant's maze
plays at about twice the ant's speed, in a loop, and has a few hundred kilobytes.
"""

import dataclasses
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import imageio
import numpy as np
import scipy.stats
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cal_ql
import tasks
from runs.directory import checkpoints_in, load_checkpoint
from runs.errors import InputError, RunError, check_regular, run_program
from tasks.task import Step
from tools.command_line import Parser, user_path

SIZE = 480, 360  # of a video, in pixels
MOST_FRAMES = 350  # of a video; the number of steps between two frames follows from it
FRAMES_PER_SECOND = 10


def load_policy(run: Path) -> tuple[cal_ql.Config, cal_ql.Task, cal_ql.Actor, cal_ql.Scaling]:
    """Load the policy of a run directory or a checkpoint onto the CPU; raises `InputError`."""
    found = checkpoints_in(run) if os.path.isdir(run) else [run]
    if not found:
        raise InputError(f"{run} has no checkpoint_<step>.pt; is it a run directory?")
    state = load_checkpoint(found[-1], torch.device("cpu"))
    config = cal_ql.Config(**state["config"])
    task = tasks.make(config.env, config.dataset_path)
    print(f"{found[-1]}, on {task.physics}")
    actor = cal_ql.Actor(task.observation_dim, task.action_dim, config)
    prefix = "actor."
    weights = {
        name.removeprefix(prefix): value
        for name, value in state["agent"].items()
        if name.startswith(prefix)
    }
    actor.load_state_dict(weights)
    scaling = {name: value.numpy() for name, value in state["scaling"].items()}
    return config, task, actor, cal_ql.Scaling(**scaling, reward_scale=1.0, reward_bias=0.0)


def mean_interval(values: list[float]) -> str:
    mean = float(np.mean(values))
    n = len(values)
    if n == 1:
        return f"{mean:.2f}"
    half = scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    spread = f"deviation {np.std(values):.2f} over episodes"
    return f"{mean:.2f} ({mean - half:.2f} to {mean + half:.2f}), {spread}"


def rate_interval(successes: int, n: int) -> str:
    low, high = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    return f"{successes / n:.3f} ({low:.3f} to {high:.3f})"


def make_renderer(model: Any) -> Any:
    """MuJoCo's offscreen renderer; raises `InputError` without OpenGL."""
    try:
        import mujoco  # it reads MUJOCO_GL

        model.vis.global_.offwidth, model.vis.global_.offheight = SIZE
        mujoco.Renderer._gl_context = mujoco.Renderer._mjr_context = None  # its __del__ looks
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GLFW's, beside its exception
            return mujoco.Renderer(model, SIZE[1], SIZE[0])
    except Exception as error:  # each OpenGL library has errors of its own
        raise InputError(
            f"video: no OpenGL to render with ({type(error).__name__}: {error}); try "
            "MUJOCO_GL=egl (a GPU or Mesa) or MUJOCO_GL=osmesa (Debian's libosmesa6)"
        ) from None


def make_camera(model: Any) -> Any:
    """A camera that looks down into a maze."""
    import mujoco

    camera = mujoco.MjvCamera()
    mujoco.mjv_defaultFreeCamera(model, camera)
    camera.distance *= 0.7
    camera.elevation = -70  # degrees
    return camera


def check_writable(path: Path) -> None:
    """Raise `InputError` where no file can be written, now rather than after all episodes."""
    try:
        path.touch()
        check_regular(path)
    except OSError as error:
        raise InputError(f"video: cannot write {path} ({error.strerror})") from None


class Filmed:
    """A task whose first episode is filmed; raises `InputError` where that is impossible."""

    def __init__(self, task: cal_ql.Task, path: Path):
        if path.suffix not in (".gif", ".mp4"):
            raise InputError(f"video: found {path}, expected a .gif or .mp4 file")
        self.task = task
        self.score = task.score
        self.path = path
        self.frames: list[np.ndarray] = []
        self.steps_per_frame = math.ceil(task.max_episode_steps / MOST_FRAMES)
        base = task.env.unwrapped
        self.base = getattr(base, "_wrapped_env", base)  # D4RL wraps its ant and cheetah
        sim = getattr(self.base, "sim", self.base)  # gymnasium's have model and data themselves
        model = getattr(sim.model, "raw", sim.model)
        self.data = getattr(sim.data, "raw", sim.data)
        self.renderer = make_renderer(model)
        self.camera = make_camera(model)
        check_writable(path)

    def reset(self, seed: int) -> np.ndarray:
        self.n_steps = 0
        self.is_first = not self.frames
        return self.task.reset(seed)

    def step(self, action: np.ndarray) -> Step:
        step = self.task.step(action)
        self.n_steps += 1
        ended = step.terminal or step.truncated
        if self.is_first and (ended or self.n_steps % self.steps_per_frame == 0):
            self.film()
        return step

    def film(self) -> None:
        """Add a frame of the state as it is, with the goal of an ant's maze as a disc."""
        import mujoco

        self.renderer.update_scene(self.data, self.camera)
        scene = self.renderer.scene
        if (goal := getattr(self.base, "target_goal", None)) is not None:
            mujoco.mjv_initGeom(
                scene.geoms[scene.ngeom],
                type=mujoco.mjtGeom.mjGEOM_CYLINDER,
                size=np.array([0.5, 0.05, 0.0]),  # the radius within which the goal is reached
                pos=np.array([*goal, 0.05]),
                mat=np.eye(3).ravel(),
                rgba=np.array([0.9, 0.1, 0.1, 1.0], np.float32),
            )
            scene.ngeom += 1
        self.frames.append(self.renderer.render())

    def save(self) -> None:
        """Write the video; raises `RunError` where the disk is full."""
        try:
            if self.path.suffix == ".mp4":
                imageio.mimsave(self.path, self.frames, fps=FRAMES_PER_SECOND)
            else:
                save_gif(self.path, self.frames)
        except OSError as error:
            raise RunError(f"cannot write {self.path} ({error.strerror or error})") from None


def save_gif(path: Path, frames: list[np.ndarray]) -> None:
    images = [Image.fromarray(frame) for frame in frames]
    # one palette for all, so that a frame stores only what changed; an octree keeps rare colours
    palette = images[0].quantize(64, Image.Quantize.FASTOCTREE)
    first, *others = [i.quantize(palette=palette, dither=Image.Dither.NONE) for i in images]
    kind = dict(save_all=True, append_images=others, loop=0, optimize=True)
    first.save(path, duration=1000 // FRAMES_PER_SECOND, **kind)  # in milliseconds


def report(task: cal_ql.Task, episodes: list[cal_ql.Episode]) -> str:
    """What the episodes yielded, a line per quantity."""
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
    """Play `n` episodes, print what they yielded and save the video."""
    config, task, actor, scaling = load_policy(run)
    seed = config.eval_seed if seed is None else seed
    workers = 1 if video else None  # other processes could not film
    config = dataclasses.replace(config, n_episodes=n, eval_seed=seed, eval_workers=workers)
    film = Filmed(task, video) if video else None
    evaluator = cal_ql.Evaluator(config, film or task)
    episodes = evaluator.evaluate(actor, scaling)
    evaluator.close()
    print(f"{n} episodes of {config.env}, seed {seed}")
    print(report(task, episodes))
    if film:
        film.save()


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=user_path, help="run directory or checkpoint")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, help="of the episodes; default: the run's eval_seed")
    parser.add_argument("--video", type=user_path, help="GIF or MP4 file of the first episode")
    args = parser.parse_args()
    if args.episodes < 1:
        raise InputError(f"episodes: found {args.episodes}, expected 1 or more")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise InputError(f"seed: found {args.seed}, expected 0 to 2**32 - 1")
    evaluate(args.run, args.episodes, args.seed, args.video)


if __name__ == "__main__":
    sys.exit(run_program(main, "evaluate.py"))
