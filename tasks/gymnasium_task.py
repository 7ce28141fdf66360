"""Tasks with gymnasium environments: what Minari's, OGBench's and your own tasks share."""

import contextlib
import importlib
import importlib.metadata
import io
import tempfile
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

from runs.errors import InputError
from tasks.task import Step, Task


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Hide what libraries print, and their warnings. Exceptions pass."""
    text = io.StringIO()
    with (
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(text),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def making_environment() -> Iterator[None]:
    """Silence libraries, and delete the model files that mazes leave in the temporary folder."""
    with (
        silence(),
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(tempfile, "tempdir", folder),
    ):
        yield


def import_for(env: str, *packages: str) -> list[ModuleType]:
    """Import gymnasium and these packages, which only tasks like `env` need.

    Raises `InputError` if one is missing.
    """
    try:
        with silence():
            modules = [importlib.import_module(name) for name in ("gymnasium", *packages)]
    except ImportError as error:
        raise InputError(
            f"env: {env} needs packages that are missing here ({error}); install them by "
            "`pip install -r requirements-gymnasium.txt` and "
            "`pip install --no-deps -r requirements-no-deps.txt`"
        ) from None
    modules[0].logger.min_level = modules[0].logger.ERROR  # its warnings at every reset
    return modules


class GymnasiumTask(Task):
    """A gymnasium environment with flat observations, actions in a symmetric box and a time limit.

    Subclasses write `rows`. Raises `InputError` for an environment of another kind. If steps report
    success as `info["success"]`, the score is 100 for success. If they do not, set `has_goal` to
    False; then the score is the return.
    """

    def __init__(self, name: str, env: Any, simulator: str = "gymnasium"):
        """`simulator` is the package that `physics` names with its version."""
        self.name = name
        self.env = env
        self.physics = f"{simulator} {importlib.metadata.version(simulator)}"
        self.observation_dim = flat_size(name, env.observation_space)
        self.action_dim = flat_size(name, env.action_space)
        self.action_scale: np.ndarray = env.action_space.high
        is_finite = np.isfinite(self.action_scale).all() and (self.action_scale > 0).all()
        if not (is_finite and np.array_equal(env.action_space.low, -self.action_scale)):
            raise InputError(
                f"env: {name} has actions in {env.action_space}, expected [-a, a] with a finite a"
            )
        if env.spec is None or not env.spec.max_episode_steps:
            raise InputError(f"env: {name} has no time limit, expected max_episode_steps")
        self.max_episode_steps: int = env.spec.max_episode_steps

    def reset(self, seed: int) -> np.ndarray:
        # Environments draw from three generators: numpy's, their action space's and their own.
        np.random.seed(seed)
        self.env.unwrapped.action_space.seed(seed)
        observation, _ = self.env.reset(seed=seed)
        return observation.astype(np.float32)

    def step(self, action: np.ndarray) -> Step:
        played = self.env.step(action * self.action_scale)
        observation, reward, terminal, truncated, info = played
        return Step(
            observation=observation.astype(np.float32),
            reward=float(reward),
            terminal=bool(terminal),
            truncated=bool(truncated and not terminal),
            success=bool(info.get("success", False)),
        )

    def score(self, episode_return: float, success: bool) -> float:
        """100 if the episode just played succeeded, else 0; without a goal, its return."""
        return 100.0 * success if self.has_goal else episode_return


def flat_size(name: str, space: Any) -> int:
    """The length of the vectors in gymnasium's `space`; raises `InputError` for other spaces."""
    shape = getattr(space, "shape", None)
    if shape is None or len(shape) != 1:
        raise InputError(f"env: {name} has the space {space}, expected a Box of vectors")
    return shape[0]
