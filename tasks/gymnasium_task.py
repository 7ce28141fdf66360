"""What Minari's and OGBench's tasks share: environments of gymnasium."""

import contextlib
import importlib
import importlib.metadata
import io
import tempfile
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Optional
from unittest import mock

import numpy as np

from runs.errors import InputError
from tasks.task import Step, Task


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep what libraries print and warn of from the user; what they raise gets through."""
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
    """Silence, and no trace of the models that mazes leave in the folder for temporary files."""
    with (
        silence(),
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(tempfile, "tempdir", folder),
    ):
        yield


def import_for(env: str, *packages: str) -> list[ModuleType]:
    """Those packages of requirements-gymnasium.txt, which only such a task as `env` needs.

    Raises `InputError` where one is missing.
    """
    try:
        with silence():
            modules = [importlib.import_module(name) for name in ("gymnasium", *packages)]
    except ImportError as error:
        raise InputError(
            f"env: {env} needs packages that are missing here ({error}); install them by "
            "`pip install -r requirements-gymnasium.txt`"
        ) from None
    modules[0].logger.min_level = modules[0].logger.ERROR  # its warnings at every reset
    return modules


class GymnasiumTask(Task):
    """A gymnasium environment with a flat observation, actions in a box and a time limit."""

    has_goal = True
    is_locomotion = False
    failure_reward: Optional[float] = None

    def __init__(self, name: str, env: Any):
        self.name, self.env = name, env
        self.physics = "mujoco " + importlib.metadata.version("mujoco")
        (self.observation_dim,) = env.observation_space.shape
        (self.action_dim,) = env.action_space.shape
        self.action_scale: np.ndarray = env.action_space.high
        self.max_episode_steps: int = env.spec.max_episode_steps

    def reset(self, seed: int) -> np.ndarray:
        np.random.seed(seed)  # environments draw from three generators: this,
        self.env.unwrapped.action_space.seed(seed)  # their action space's
        observation, _ = self.env.reset(seed=seed)  # and their own
        return observation.astype(np.float32)

    def step(self, action: np.ndarray) -> Step:
        played = self.env.step(action * self.action_scale)
        observation, reward, terminal, truncated, info = played
        truncated = bool(truncated and not terminal)
        success = bool(info.get("success", False))
        return Step(
            observation.astype(np.float32), float(reward), bool(terminal), truncated, success
        )

    def score(self, episode_return: float, success: bool) -> float:
        """100 where the episode just played succeeded, else 0."""
        return 100.0 * success
