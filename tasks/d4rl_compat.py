"""Run the real gym 0.23 and the real D4RL on today's `mujoco` package.

D4RL imports `mujoco_py`, which needs the retired MuJoCo 2.1 binary, and `mjrl`, which is on no
package index. Importing this module makes both names importable: the real packages if they work,
otherwise the small stand-ins below, with the part of the interfaces that gym and D4RL use. Tasks,
rewards, resets and models are D4RL's own.

    from tasks import d4rl_compat
    env = d4rl_compat.make("antmaze-umaze-v2")
    observation = d4rl_compat.reset(env, seed=0)  # the episode only depends on seed and actions
    observation, reward, done, info = env.step(env.action_space.sample())

`PHYSICS` says in one phrase which simulator runs.
"""

from __future__ import annotations

import collections.abc
import contextlib
import difflib
import functools
import importlib.machinery
import importlib.util
import io
import os
import sys
import tempfile
import types
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock
from xml.etree import ElementTree

import numpy as np

if TYPE_CHECKING:
    import gym


def _import_mujoco_py() -> types.ModuleType | None:
    """The real mujoco_py; None if it does not import, without output and leftover modules."""
    text = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(text),
            contextlib.redirect_stderr(text),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            import mujoco_py
        return mujoco_py
    except Exception:  # without the MuJoCo 2.1 binary, it raises a bare Exception
        for name in list(sys.modules):
            if name.split(".")[0] == "mujoco_py":
                del sys.modules[name]  # what it had imported before it failed
        return None


_real_mujoco_py = _import_mujoco_py()
if _real_mujoco_py is None:
    try:
        import mujoco
    except Exception as error:  # each OpenGL library raises its own errors
        if "MUJOCO_GL" not in os.environ:
            raise
        found = f"found {os.environ['MUJOCO_GL']!r}, but that OpenGL does not load ({error})"
        print(f"error: MUJOCO_GL: {found}; install it (libosmesa6) or unset it", file=sys.stderr)
        raise SystemExit(2) from None

# ------------------------------------------------------------------ stand-in for mujoco_py


class MjSimState(NamedTuple):
    """Time in seconds, positions (nq,), velocities (nv,), actuator activations (na,)."""

    time: float
    qpos: np.ndarray
    qvel: np.ndarray
    act: np.ndarray | None = None
    udd_state: dict | None = None


class MjModel:
    """The fields of `mujoco.MjModel`, and look-ups such as `body_name2id(name)`."""

    def __init__(self, raw: Any):
        self.raw = raw

    def __getattr__(self, name: str) -> Any:
        if name == "raw":  # not set yet while being copied or unpickled
            raise AttributeError(name)
        if name.endswith("_name2id"):
            return functools.partial(self._name2id, name.removesuffix("_name2id"))
        return getattr(self.raw, name)

    def _name2id(self, kind: str, name: str) -> int:
        number = mujoco.mj_name2id(self.raw, mujoco.mju_str2Type(kind), name)
        if number < 0:
            raise ValueError(f"the model has no {kind} named {name!r}")
        return number

    @property
    def _camera_name2id(self) -> dict[str, int]:  # for gym's render()
        return {self.raw.camera(number).name: number for number in range(self.raw.ncam)}


class MjData:
    """The fields of `mujoco.MjData`, and mujoco_py's other names for the poses of bodies."""

    def __init__(self, model: MjModel, raw: Any):
        self.model = model
        self.raw = raw

    def __getattr__(self, name: str) -> Any:
        if name == "raw":
            raise AttributeError(name)
        return getattr(self.raw, name.removeprefix("body_"))

    def get_body_xpos(self, name: str) -> np.ndarray:
        return self.raw.xpos[self.model.body_name2id(name)]


class MjSim:
    """A model and its simulation state."""

    def __init__(self, model: MjModel):
        self.model = model
        self.data = MjData(model, mujoco.MjData(model.raw))

    def step(self) -> None:
        mujoco.mj_step(self.model.raw, self.data.raw)

    def forward(self) -> None:
        mujoco.mj_forward(self.model.raw, self.data.raw)

    def reset(self) -> None:
        mujoco.mj_resetData(self.model.raw, self.data.raw)

    def get_state(self) -> MjSimState:
        data = self.data.raw
        return MjSimState(data.time, data.qpos.copy(), data.qvel.copy(), data.act.copy(), {})

    def set_state(self, state: MjSimState) -> None:
        data = self.data.raw
        data.time = state.time
        data.qpos[:] = state.qpos
        data.qvel[:] = state.qvel
        if state.act is not None:
            data.act[:] = state.act


def load_model_from_path(path: str) -> MjModel:
    try:
        return MjModel(mujoco.MjModel.from_xml_path(path))
    except ValueError:
        return load_model_from_xml(_updated_xml(path))


def load_model_from_xml(xml: str) -> MjModel:
    return MjModel(mujoco.MjModel.from_xml_string(xml))


def _updated_xml(path: str) -> str:
    """The model file at `path` as one XML string, adapted to newer MuJoCo."""
    folder = os.path.dirname(os.path.abspath(path))
    root = ElementTree.parse(path).getroot()
    while (include := root.find(".//include")) is not None:
        parent = root.find(".//include/..")
        index = list(parent).index(include)
        file = os.path.join(folder, include.attrib["file"])  # relative to the main file, always
        parent[index : index + 1] = ElementTree.parse(file).getroot()
    for compiler in root.iter("compiler"):
        for key in ("meshdir", "texturedir", "assetdir"):
            if key in compiler.attrib:
                compiler.set(key, os.path.join(folder, compiler.attrib[key]))
    for option in root.iter("option"):
        option.attrib.pop("apirate", None)
    if any(compiler.get("coordinate") == "global" for compiler in root.iter("compiler")):
        _make_coordinates_local(root)
    # A class name on a top-level default used to rename the class "main", which it extends.
    renamed = {default.attrib.pop("class", "main") for default in root.findall("default")}
    for element in root.iter():
        for key in ("class", "childclass"):
            if element.get(key) in renamed:
                element.set(key, "main")
    return ElementTree.tostring(root, encoding="unicode")


def _make_coordinates_local(root: ElementTree.Element) -> None:
    """Put the frame of every body at the world's origin, where global and local are the same.

    gym's hopper and walker2d need it, since MuJoCo dropped global coordinates after 2.3.3. Their
    bodies have no orientation and get mass and inertia from geoms, so the frames do not matter.
    """
    for compiler in root.iter("compiler"):
        compiler.attrib.pop("coordinate", None)
    for body in root.iter("body"):
        body.attrib.pop("pos", None)


# ---------------------------------------------------------------------- stand-in for mjrl


class MujocoEnv:
    """Base class of D4RL's Adroit tasks: loads a model, steps it and defines the spaces."""

    def __init__(self, model_path: str, frame_skip: int):
        import mujoco_py
        from gym import spaces

        self.frame_skip = frame_skip
        self.model = mujoco_py.load_model_from_path(model_path)
        self.sim = mujoco_py.MjSim(self.model)
        self.data = self.sim.data
        self.metadata = {"render_modes": [], "render_fps": round(1.0 / self.dt)}
        self.init_qpos = self.data.qpos.ravel().copy()
        self.init_qvel = self.data.qvel.ravel().copy()
        observation = self.step(np.zeros(self.model.nu))[0]
        low, high = self.model.actuator_ctrlrange.astype(np.float32).T
        self.action_space = spaces.Box(low, high, dtype=np.float32)
        self.observation_space = spaces.Box(-np.inf, np.inf, observation.shape, np.float32)

    @property
    def dt(self) -> float:
        """Seconds per environment step."""
        return self.model.opt.timestep * self.frame_skip

    def reset(self) -> np.ndarray:
        self.sim.reset()
        self.sim.forward()
        return self.reset_model()

    def set_state(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        self.sim.set_state(self.sim.get_state()._replace(qpos=qpos, qvel=qvel))
        self.sim.forward()

    def do_simulation(self, ctrl: np.ndarray, n_frames: int) -> None:
        self.data.ctrl[:] = ctrl
        for _ in range(n_frames):
            self.sim.step()

    def render(self, mode: str = "human", **_: Any) -> None:
        _no_rendering()


# ------------------------------------------------------------------------------- installing


def _install() -> str:
    """Make `mujoco_py` and `mjrl` importable; return the phrase for PHYSICS."""
    if _real_mujoco_py is not None:
        physics = f"mujoco_py {_real_mujoco_py.__version__} (MuJoCo 2.1)"
    else:
        mujoco_py = _add_module("mujoco_py")
        for item in (MjSim, MjSimState, load_model_from_path, load_model_from_xml):
            setattr(mujoco_py, item.__name__, item)
        mujoco_py.get_version = lambda: "2.1.2.14"  # the interface imitated here
        mujoco_py.MjViewer = mujoco_py.MjRenderContextOffscreen = _no_rendering
        physics = f"mujoco {mujoco.__version__} (through d4rl_compat)"
    try:
        import mjrl.envs.mujoco_env  # noqa: F401
    except ImportError:
        _add_module("mjrl").envs = _add_module("mjrl.envs")
        sys.modules["mjrl.envs"].mujoco_env = _add_module("mjrl.envs.mujoco_env")
        sys.modules["mjrl.envs.mujoco_env"].MujocoEnv = MujocoEnv
    return physics


def _add_module(name: str) -> types.ModuleType:
    # With a spec, so that importlib.util.find_spec(name) answers.
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, loader=None))
    return sys.modules.setdefault(name, module)


def _no_rendering(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("d4rl_compat does not render yet")


PHYSICS = _install()


# ---------------------------------------------------------------------- making environments


def make(name: str) -> gym.Env:
    """Return `gym.make(name)`: gym's and D4RL's own classes, loaded and built without messages.

    Raises ValueError, in one line, if the name is not registered or D4RL is not installed.
    """
    try:
        gym, maze_env = _import_d4rl()
    except ModuleNotFoundError as error:
        install = "install it by `pip install --no-deps -r requirements-no-deps.txt`"
        raise ValueError(f"D4RL does not import here ({error}); {install}") from None
    specs = gym.envs.registry.env_specs
    if name not in specs:
        tasks = [task for task, spec in specs.items() if str(spec.entry_point).startswith("d4rl.")]
        close = ", ".join(difflib.get_close_matches(name, tasks, n=3))
        raise ValueError(f"D4RL has no task {name!r}; close matches: {close or 'none'}")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # D4RL writes each ant maze to a temporary file, which it neither closes nor deletes.
        namer = types.SimpleNamespace(mkstemp=lambda text, suffix: (None, f"{folder}/maze{suffix}"))
        with mock.patch.object(maze_env, "tempfile", namer):
            return gym.make(name)


def reset(env: gym.Env, seed: int) -> np.ndarray:
    """Reset an environment from `make` and return the first observation, (observation_dim,).

    The same seed and actions give the same episode, bit for bit, in any process, independent of
    what ran before. NumPy's global generator is left as it was. Raises ValueError for a seed
    outside [0, 2**32).
    """
    from gym.utils import seeding

    task = env.unwrapped
    while hasattr(task, "_wrapped_env"):  # D4RL's own wrapper, which `unwrapped` does not open
        task = task._wrapped_env
    global_state = np.random.get_state()
    try:
        # Twice, because of mujoco_py: Adroit moves its objects after forces were first computed,
        # and MuJoCo 2 starts its solver from these. In the second reset they have already moved.
        for _ in range(2):
            np.random.seed(seed)  # ant mazes draw their goal from the global generator
            task.np_random, _ = seeding.np_random(int(seed))
            observation = env.reset()
    finally:
        np.random.set_state(global_state)
    return observation


@functools.cache
def _import_d4rl() -> tuple[types.ModuleType, types.ModuleType]:
    """Import gym and D4RL without their messages; return gym and D4RL's module of ant mazes."""
    os.environ.setdefault("D4RL_SUPPRESS_IMPORT_ERROR", "1")
    with contextlib.suppress(ImportError):
        import gym_notices.notices

        gym_notices.notices.notices.clear()  # "Gym has been unmaintained ..."
    # Skip PyBullet: it prints from C while it is imported, and its tasks do not use MuJoCo.
    skipped = {"d4rl.gym_bullet", "d4rl.pointmaze_bullet"} - set(sys.modules)
    sys.modules.update(dict.fromkeys(skipped))
    try:
        # D4RL makes its folder for data, a literal "~" if there is no home directory.
        with warnings.catch_warnings(), mock.patch.object(os, "makedirs", _do_nothing):
            warnings.simplefilter("ignore")
            import d4rl
            import gym

            if "d4rl.kitchen" in sys.modules:
                _update_kitchen()
    finally:
        for name in skipped:
            del sys.modules[name]
    gym.logger.set_level(gym.logger.ERROR)  # else deprecation warnings at every reset
    d4rl.offline_env.tqdm = lambda items, **_: items  # "load datafile"
    d4rl.locomotion.maze_env.print = _do_nothing  # "Target Goal" at every reset
    return gym, d4rl.locomotion.maze_env


def _update_kitchen() -> None:
    """Let D4RL's kitchen run on today's Python, NumPy and MuJoCo, without its messages."""
    from d4rl.kitchen.adept_envs import mujoco_env
    from d4rl.kitchen.adept_envs.franka.robot import franka_robot
    from d4rl.kitchen.adept_envs.simulation import module
    from d4rl.kitchen.adept_envs.utils import config
    from dm_control import mujoco as dm_mujoco

    def read_config_from_node(*args: Any) -> Any:
        value = config.read_config_from_node(*args)
        return value[0] if value.size == 1 else value  # NumPy 2.4 does not convert it to a number

    class Physics(dm_mujoco.Physics):
        @classmethod
        def from_xml_path(cls, path: str) -> Physics:
            return cls.from_xml_string(_updated_xml(path))

    mujoco_env.collections = collections.abc  # collections.Mapping is gone since Python 3.10
    franka_robot.read_config_from_node = read_config_from_node
    franka_robot.print = franka_robot.cprint = _do_nothing
    module._DM_MUJOCO_MODULE = types.SimpleNamespace(**{**vars(dm_mujoco), "Physics": Physics})


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass
