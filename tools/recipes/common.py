"""What recipes share: their interface, noisy actions, and columns made of single steps."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DESCRIPTION = (Path(__file__).parent / "description.txt").read_text(encoding="utf-8")

Cell = tuple[int, int]  # row and column in a maze's map
Rows = dict[str, np.ndarray]  # name in the file -> array with one row per transition


class Recipe:
    """Makes data for one task; each worker process has one of these and asks it for rollouts.

    Attributes:
        layout: "hdf5" (D4RL's), "npz" (OGBench's) or "minari".
        write: writes rows and metadata to a new path in that layout; see writing.py.
        config: the file in configs/ to train with.
        noise: the actions' noise, stored in the file; None if no policy chooses the actions.
        description: a text on the data, which every file contains.
        packages: the packages whose versions the file stores.
        needs_demonstrations: whether `__init__` also takes episodes of demonstrations and a seed.
    """

    layout: str
    write: Callable[[Path, Rows, dict[str, Any]], None]
    config: str
    noise: float | None = None
    description: str = DESCRIPTION
    packages: tuple[str, ...]
    needs_demonstrations = False

    def __init__(self, task: str):
        raise NotImplementedError

    @classmethod
    def check(cls) -> None:
        """Raise `InputError` if something that the recipe needs is missing."""

    def rollout(self, seeds: np.random.SeedSequence) -> Rows | None:
        """The rows of one rollout, which only depends on `seeds`.

        Without rows the rollout is left out; None means that there are no more.
        """
        raise NotImplementedError

    @classmethod
    def metadata(cls, task: str, seed: int, command: str) -> dict[str, Any]:
        """How the file was made, to be stored in it."""
        from tasks import d4rl_compat  # here, so that --help does not wait for the simulator

        about = {
            "command": command,
            "recipe": cls.description,
            "task": task,
            "seed": seed,
            "action_noise": cls.noise,
            "physics": d4rl_compat.PHYSICS,
            "numpy": np.__version__,
        }
        if cls.noise is None:
            del about["action_noise"]
        return about | {name: importlib.metadata.version(name) for name in cls.packages}


class Row(NamedTuple):
    """One transition without its next observation."""

    observation: np.ndarray
    action: np.ndarray
    reward: float
    terminal: bool
    timeout: bool


def stack(rows: list[Row]) -> Rows:
    """The columns of D4RL's layout."""
    observations, actions, rewards, terminals, timeouts = map(np.asarray, zip(*rows, strict=True))
    return {
        "observations": observations.astype(np.float32),
        "actions": actions,
        "rewards": rewards.astype(np.float32),
        "terminals": terminals.astype(bool),
        "timeouts": timeouts.astype(bool),
    }


def stack_maze(rows: list[Row], goal: np.ndarray, n_positions: int) -> Rows:
    """`stack` for D4RL's mazes, whose observations are the simulator's qpos, then its qvel."""
    columns = stack(rows)
    qpos, qvel = np.split(columns["observations"], [n_positions], axis=1)
    goals = np.tile(np.asarray(goal, np.float32), (len(rows), 1))
    return {**columns, "infos/goal": goals, "infos/qpos": qpos, "infos/qvel": qvel}


def noisy(action: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """`action` plus Gaussian noise, clipped to [-1, 1]; float32, so the file holds it exactly."""
    return (action + noise * rng.standard_normal(len(action))).clip(-1, 1).astype(np.float32)
