"""The interface of a task, and what holds for the rows of every dataset."""

from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from runs.errors import InputError


class Step(NamedTuple):
    """What playing one action yields."""

    observation: np.ndarray  # [S], float32
    reward: float
    terminal: bool  # the task's own end, also on the last permitted step
    truncated: bool  # cut off by the time limit
    success: bool  # whether this step reaches the goal


class Task:
    """An environment with actions in [-1, 1], and the rows of its data. D4RL's is one kind of it.

    Episodes are seeded one by one: the same seed and actions give the same episode, in any process
    and whatever ran before. To add a benchmark:

    1. Write `tasks/<family>.py` with a subclass. Set the attributes below in `__init__`. An
       environment of gymnasium can start from `tasks.gymnasium_task.GymnasiumTask`.
    2. Write `reset`, `step`, `score` and `rows`; `rows` ends with `check_rows`, which casts, scales
       and checks the arrays. Data that is downloaded needs `published_file` too.
    3. Name the family in `tasks.make`, by the form of its ids.
    4. Raise `InputError` for wrong input, in one line: what was found and what was expected.

    Attributes:
        name: the id.
        observation_dim, action_dim: sizes S and A of the two spaces.
        max_episode_steps: the time limit, in steps.
        action_scale: [A], the environment's largest actions.
        failure_reward: the largest reward of a step without success, if the task is sparse; None
            in tasks with dense rewards.
        has_goal: whether an episode can succeed.
        is_locomotion: whether `normalize_reward` applies.
        physics: the simulator, in a phrase.
    """

    name: str
    observation_dim: int
    action_dim: int
    max_episode_steps: int
    action_scale: np.ndarray
    failure_reward: Optional[float] = None
    has_goal: bool = True
    is_locomotion: bool = False
    physics: str

    def reset(self, seed: int) -> np.ndarray:
        """Begin the episode of that seed; returns the observation [S] in float32."""
        raise NotImplementedError

    def step(self, action: np.ndarray) -> Step:
        """Play an action [A] in [-1, 1]."""
        raise NotImplementedError

    def score(self, episode_return: float, success: bool) -> float:
        """The normalized score of the episode just played."""
        raise NotImplementedError

    def rows(self, path: Path) -> dict[str, np.ndarray]:
        """The arrays of the dataset at `path`, one row per step, checked.

        Returns observations [N, S], actions [N, A] in [-1, 1] and rewards [N] in float32,
        terminals [N] in bool; where the data has them, next_observations [N, S] and timeouts [N],
        or, in Minari's, truncations [N] (see `episode_ends`).
        """
        raise NotImplementedError

    def data_file(self, path: Optional[str]) -> Path:
        """The dataset at `path`, or else the published one."""
        if path is None:
            return self.published_file()
        if not Path(path).is_file():
            raise InputError(
                f"dataset_path: there is no file {path}; make one with "
                f"`python tools/make_dataset.py {self.name}`"
            )
        return Path(path)

    def published_file(self) -> Path:
        """The published dataset, downloaded if it is not here yet."""
        raise InputError(f"env: no data is published for {self.name}; name a file, --dataset_path")


ENDS = "terminals", "timeouts", "truncations"


def check_rows(raw: dict[str, np.ndarray], task: Task, path: Path) -> dict[str, np.ndarray]:
    """The arrays in their types and shapes, actions scaled into [-1, 1], for `Task.rows`."""

    def expect(holds: bool, problem: str) -> None:
        if not holds:
            raise InputError(f"dataset {path}: {problem}")

    n = len(raw["rewards"]) if raw["rewards"].ndim else 0
    expect(n > 1, f"it has {n} rows, expected at least 2")
    shapes = {"observations": (n, task.observation_dim), "actions": (n, task.action_dim)}
    shapes["next_observations"] = shapes["observations"]
    rows = {}
    for key, values in raw.items():
        shape = shapes.get(key, (n,))
        if values.shape == (n, 1) and shape == (n,):
            values = values[:, 0]
        expect(values.shape == shape, f"{key} has shape {values.shape}, the task needs {shape}")
        expect(values.dtype.kind in "biuf", f"{key} holds {values.dtype}, expected real numbers")
        with np.errstate(over="ignore"):
            rows[key] = values.astype(bool if key in ENDS else np.float32)
        finite = np.isfinite(values).all() and np.isfinite(rows[key]).all()
        expect(finite, f"{key} holds NaN, infinite values or such as float32 cannot hold")
    rows["actions"] /= task.action_scale
    largest = np.abs(rows["actions"]).max()
    expect(largest <= 1 + 1e-6, f"actions reach {largest:.4g}, expected [-1, 1]; scale or clip it")
    return rows


def episode_ends(
    rows: dict[str, np.ndarray], max_episode_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are the last of their episode, and which of them are cut: [N] bool each.

    A cut row is no transition, since a time limit, or the file's end, keeps what came next from it.

    An episode ends at a terminal, at a timeout, where the next observation is not the following
    row's observation, and with the file. Where the file has no timeouts, the length limit stands
    for them. (Where it has, an episode may hold one row more than the limit, as in D4RL's AntMaze.)
    A row that is terminal and timeout is terminal. Rows with `truncations` instead have the next
    observations of those ends too, so that none is cut.
    """
    number = np.arange(len(rows["rewards"]))
    ends = rows["terminals"].copy()
    if "truncations" in rows:
        return ends | rows["truncations"], np.zeros(len(ends), bool)
    if "next_observations" in rows:
        jumps = rows["observations"][1:] - rows["next_observations"][:-1]
        with np.errstate(over="ignore"):
            ends[:-1] |= np.linalg.norm(jumps, axis=1) > 1e-6
    starts = np.maximum.accumulate(np.where(np.r_[True, ends[:-1]], number, 0))
    truncated = rows.get("timeouts", (number - starts + 1) % max_episode_steps == 0)
    ends |= truncated
    ends[-1] = True
    cut = truncated.copy()
    cut[-1] = True
    return ends, cut & ~rows["terminals"]


def check_sizes(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Raise `InputError` for scaled values whose square float32 cannot hold."""
    for name, values in arrays.items():
        largest = np.abs(values).max()
        if not largest < 1e18:
            raise InputError(
                f"dataset {path}: {name} as scaled reach {largest:.3g}, expected less than 1e18, "
                "whose square float32 can hold; check the file, reward_scale and normalize"
            )
