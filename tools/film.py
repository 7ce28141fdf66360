"""Films an episode with MuJoCo's offscreen renderer, as GIF or MP4."""

import math
import warnings
from pathlib import Path
from typing import Any

import imageio
import numpy as np
from PIL import Image

from runs.errors import InputError, RunError, check_regular
from tasks.task import Step, Task

SIZE = 480, 360  # of a video, in pixels
MOST_FRAMES = 350  # of a video; the number of steps between two frames follows from it
FRAMES_PER_SECOND = 10


class Filmed:
    """A task whose first episode is filmed; raises `InputError` if that is impossible."""

    def __init__(self, task: Task, path: Path):
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
        """Add a frame of the current state; in an ant's maze a disc marks the goal."""
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
        """Write the video; raises `RunError` if the disk is full."""
        try:
            if self.path.suffix == ".mp4":
                imageio.mimsave(self.path, self.frames, fps=FRAMES_PER_SECOND)
            else:
                save_gif(self.path, self.frames)
        except OSError as error:
            raise RunError(f"cannot write {self.path} ({error.strerror or error})") from None


def make_renderer(model: Any) -> Any:
    """MuJoCo's offscreen renderer; raises `InputError` without OpenGL."""
    try:
        import mujoco  # it reads MUJOCO_GL

        model.vis.global_.offwidth, model.vis.global_.offheight = SIZE
        mujoco.Renderer._gl_context = mujoco.Renderer._mjr_context = None  # its __del__ looks
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GLFW's, beside its exception
            return mujoco.Renderer(model, SIZE[1], SIZE[0])
    except Exception as error:  # each OpenGL library raises its own errors
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
    """Raise `InputError` if the file cannot be written, now rather than after all episodes."""
    try:
        path.touch()
        check_regular(path)
    except OSError as error:
        raise InputError(f"video: cannot write {path} ({error.strerror or error})") from None


def save_gif(path: Path, frames: list[np.ndarray]) -> None:
    images = [Image.fromarray(frame) for frame in frames]
    # one palette for all, so that a frame stores only what changed; an octree keeps rare colours
    palette = images[0].quantize(64, Image.Quantize.FASTOCTREE)
    first, *others = [i.quantize(palette=palette, dither=Image.Dither.NONE) for i in images]
    kind = dict(save_all=True, append_images=others, loop=0, optimize=True)
    first.save(path, duration=1000 // FRAMES_PER_SECOND, **kind)  # in milliseconds
