"""Play a trained policy: return, normalized score and success rate, and a video where asked.

    python tools/evaluate.py output/RUN --episodes 100 --video episode.gif

RUN is a run directory, of which the newest checkpoint is taken, or a checkpoint in it. The policy
takes its mean actions. Intervals are 95 % confidence intervals: of the mean by Student's t, of the
success rate by Wilson's score. The video shows the first episode, rendered offscreen; a GIF of an
ant's maze plays it at about twice its speed, in a loop, and is a few hundred kilobytes large.
"""

import dataclasses
import math
import sys
import warnings
from pathlib import Path

import imageio
import numpy as np
import scipy.stats
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cal_ql
import runs
import tasks
from tools.command_line import Parser, one_line_errors

SIZE = 480, 360  # of a video, in pixels
MOST_FRAMES = 350  # steps between two frames are as many as that takes
FRAMES_PER_SECOND = 10


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
    """A task whose first episode is filmed; raises `InputError` without OpenGL."""

    def __init__(self, task: cal_ql.Task, path: Path):
        if path.suffix not in (".gif", ".mp4"):
            raise runs.InputError(f"video: found {path}, expected a .gif or .mp4 file")
        self.task, self.score, self.path, self.frames = task, task.score, path, []
        self.steps_per_frame = math.ceil(task.max_episode_steps / MOST_FRAMES)
        base = task.env.unwrapped
        self.base = base = getattr(base, "_wrapped_env", base)  # D4RL wraps its ant and cheetah
        sim = getattr(base, "sim", base)  # gymnasium's environments have model and data themselves
        model, self.data = (getattr(x, "raw", x) for x in (sim.model, sim.data))
        try:
            import mujoco

            model.vis.global_.offwidth, model.vis.global_.offheight = SIZE
            mujoco.Renderer._gl_context = mujoco.Renderer._mjr_context = None  # its __del__ looks
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # GLFW's, beside its exception
                self.renderer = mujoco.Renderer(model, SIZE[1], SIZE[0])
            self.camera = mujoco.MjvCamera()
            mujoco.mjv_defaultFreeCamera(model, self.camera)
            self.camera.distance *= 0.7
            self.camera.elevation = -70  # degrees: down into a maze
            path.touch()  # known now rather than after all episodes
        except OSError as error:
            raise runs.InputError(f"video: cannot write {path} ({error.strerror})") from None
        except Exception as error:  # each OpenGL library has errors of its own
            raise runs.InputError(
                f"video: no OpenGL to render with ({type(error).__name__}: {error}); try "
                "MUJOCO_GL=egl (a GPU or Mesa) or MUJOCO_GL=osmesa (Debian's libosmesa6)"
            ) from None

    def reset(self, seed: int) -> np.ndarray:
        self.n_steps, self.is_first = 0, not self.frames
        return self.task.reset(seed)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, bool]:
        result, self.n_steps = self.task.step(action), self.n_steps + 1
        ended = result[2] or result[3]
        if self.is_first and (ended or self.n_steps % self.steps_per_frame == 0):
            self.film()
        return result

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
        if self.path.suffix == ".mp4":
            imageio.mimsave(self.path, self.frames, fps=FRAMES_PER_SECOND)
            return
        images = [Image.fromarray(frame) for frame in self.frames]
        # the same colours in all, so that a frame is what has changed; an octree keeps rare ones
        palette = images[0].quantize(64, Image.Quantize.FASTOCTREE)
        first, *others = [i.quantize(palette=palette, dither=Image.Dither.NONE) for i in images]
        how = dict(duration=1000 // FRAMES_PER_SECOND, loop=0, optimize=True)
        first.save(self.path, save_all=True, append_images=others, **how)


def evaluate(run: Path, n: int, seed: int | None, video: Path | None) -> str:
    """Play `n` episodes and say what they yielded."""
    config, task, actor, scaling = load_policy(run)
    seed = config.eval_seed if seed is None else seed
    workers = 1 if video else None  # other processes could not film
    config = dataclasses.replace(config, n_episodes=n, eval_seed=seed, eval_workers=workers)
    film = Filmed(task, video) if video else None
    evaluator = cal_ql.Evaluator(config, film or task)
    episodes = evaluator.evaluate(actor, scaling)
    evaluator.close()
    if film:
        film.save()
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


@one_line_errors
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="run directory or checkpoint")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, help="of the episodes; default: the run's eval_seed")
    parser.add_argument("--video", type=Path, help="GIF or MP4 file of the first episode")
    args = parser.parse_args()
    if args.episodes < 1:
        raise runs.InputError(f"episodes: found {args.episodes}, expected 1 or more")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise runs.InputError(f"seed: found {args.seed}, expected 0 to 2**32 - 1")
    print(evaluate(args.run, args.episodes, args.seed, args.video))


if __name__ == "__main__":
    sys.exit(main())
