"""The interface of a task, and the checks that apply to every dataset."""

from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from runs.errors import InputError
from tasks.files import enough_memory, is_file


class Step(NamedTuple):
    """The result of playing one action."""

    observation: np.ndarray  # [S], float32
    reward: float
    terminal: bool  # the task itself ended, even if on the last permitted step
    truncated: bool  # cut off by the time limit
    success: bool  # whether this step reaches the goal


class Task:
    """An environment with actions in [-1, 1], and the rows of its data.

    Episodes are seeded one by one: the same seed and actions give the same episode, in any process,
    independent of what ran before.

    To add a benchmark:

    1. Write `tasks/<family>.py` with a subclass. If the environment is gymnasium's, start from
       `tasks.gymnasium_task.GymnasiumTask`, which leaves only `rows` to write:

           class Pusher(GymnasiumTask):
               has_goal = False  # its steps report no success, so the score is the return

               def __init__(self, name):
                   super().__init__(name, gymnasium.make("Pusher-v5"))

               def rows(self, path):
                   return check_rows(read_npz(path), self, path)

    2. Otherwise set the attributes below in `__init__`, and write `reset`, `step`, `score`, `rows`.
    3. End `rows` with `check_rows`: it casts, scales and checks the arrays. `tasks.files` reads
       files, so that a damaged one gives one line. Do not unpickle: a dataset must run no code.
    4. If the data can be downloaded, write `published_file` too.
    5. Name the family in `tasks.make`, by the form of its ids.
    6. Raise `InputError` for wrong input, in one line: what was found and what was expected.

    Attributes:
        name: the id.
        observation_dim, action_dim: sizes S and A of the two spaces.
        max_episode_steps: the time limit, in steps.
        action_scale: [A], the environment's largest actions.
        failure_reward: the largest reward of a step without success, if the task is sparse; None
            in tasks with dense rewards.
        has_goal: whether an episode can succeed.
        is_locomotion: whether `normalize_reward` applies.
        cell_size: in mazes whose observations begin with x and y, the side of a cell; see
            `find_jumps`. None elsewhere.
        physics: the simulator and its version, as text.
    """

    name: str
    observation_dim: int
    action_dim: int
    max_episode_steps: int
    action_scale: np.ndarray
    failure_reward: Optional[float] = None
    has_goal: bool = True
    is_locomotion: bool = False
    cell_size: Optional[float] = None
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
        terminals [N] in bool. If the data has them, also next_observations [N, S], timeouts [N]
        (Minari's data: truncations [N]) and jumps [N]. `episode_ends` says what they mean.
        """
        raise NotImplementedError

    def data_file(self, path: Optional[str]) -> Path:
        """The dataset at `path`; without a path, the published one."""
        if path is None:
            return self.published_file()
        if not is_file(Path(path)):
            raise InputError(
                f"dataset_path: there is no file {path}; make one with "
                f"`python tools/make_dataset.py {self.name}`"
            )
        return Path(path)

    def published_file(self) -> Path:
        """The published dataset, downloaded if it is not here yet."""
        raise InputError(f"env: no data is published for {self.name}; pass a --dataset_path")


NEEDED = ["observations", "actions", "rewards", "terminals"]
COLUMNS = [*NEEDED, "next_observations", "timeouts", "truncations"]
ENDS = "terminals", "timeouts", "truncations"


def check_rows(raw: dict[str, np.ndarray], task: Task, path: Path) -> dict[str, np.ndarray]:
    """Cast, scale and check the arrays of a dataset; returns what `Task.rows` must return.

    Needs observations, actions, rewards and terminals; drops arrays with other names. Prints a line
    if rows jump (see `find_jumps`). Raises `InputError` of one line for the first error.
    """
    with enough_memory(path):
        rows = cast_rows(raw, task, path)
        rows["actions"] /= task.action_scale
        largest = np.abs(rows["actions"]).max()
        if largest > 1 + 1e-6:
            raise InputError(
                f"dataset {path}: actions reach {digits_beyond_1(largest)}, expected [-1, 1]; "
                "scale or clip them"
            )
        jumps = find_jumps(rows, task)
    if jumps.any():
        print(
            f"dataset {path}: {jumps.sum():,} of {len(jumps):,} rows jump farther than a step of "
            f"{task.name} can reach (ends of episodes without a flag); they are no transitions"
        )
        rows["jumps"] = jumps
    return rows


def cast_rows(raw: dict[str, np.ndarray], task: Task, path: Path) -> dict[str, np.ndarray]:
    """The arrays in the expected types and shapes, for `check_rows`."""

    def expect(holds: bool, problem: str) -> None:
        if not holds:
            raise InputError(f"dataset {path}: {problem}")

    missing = [key for key in NEEDED if key not in raw]
    expect(not missing, f"it lacks {', '.join(missing)}, expected {NEEDED}")
    n = len(raw["rewards"]) if raw["rewards"].ndim else 0
    expect(n > 1, f"it has {n} rows, expected at least 2")
    shapes = {"observations": (n, task.observation_dim), "actions": (n, task.action_dim)}
    shapes["next_observations"] = shapes["observations"]
    rows = {}
    for key in COLUMNS:
        if key not in raw:
            continue
        values = raw[key]
        shape = shapes.get(key, (n,))
        if values.shape == (n, 1) and shape == (n,):
            values = values[:, 0]
        expect(values.shape == shape, f"{key} has shape {values.shape}, the task needs {shape}")
        expect(values.dtype.kind in "biuf", f"{key} holds {values.dtype}, expected real numbers")
        with np.errstate(over="ignore"):
            rows[key] = values.astype(bool if key in ENDS else np.float32)
        finite = np.isfinite(values).all() and np.isfinite(rows[key]).all()
        expect(finite, f"{key} holds NaN, infinite values or values too large for float32")
    return rows


def digits_beyond_1(value: float) -> str:
    """The number, with enough digits to show that it exceeds 1."""
    for digits in range(4, 10):
        text = f"{value:.{digits}g}"
        if float(text) > 1:
            break
    return text


def find_jumps(rows: dict[str, np.ndarray], task: Task) -> np.ndarray:
    """Which rows lead into another episode although no flag says so, [N] bool; only in mazes.

    D4RL's AntMaze v0 sets its time-limit flags a few rows late, so the rows between limit and flag
    lead from one episode into the next, through walls. A jump moves x and y by more than half a
    cell and by more than ten times the median move. Measured steps are far shorter: at most 0.35
    for D4RL's walking ant, whose cells are 4 wide, and 0.074 for its point, whose cells are 1 wide.
    """
    if task.cell_size is None:
        return np.zeros(len(rows["rewards"]), bool)
    places = rows["observations"][:, :2]
    if "next_observations" in rows:
        next_places = rows["next_observations"][:, :2]
    else:
        next_places = np.append(places[1:], places[-1:], 0)
    with np.errstate(over="ignore"):
        moves = np.linalg.norm(next_places - places, axis=1)
    ends, cut = episode_ends(rows, task.max_episode_steps)
    has_no_next = cut | rows["terminals"] if "next_observations" in rows else ends
    return (moves > max(task.cell_size / 2, 10 * np.median(moves))) & ~has_no_next


def episode_ends(
    rows: dict[str, np.ndarray], max_episode_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are the last of their episode, and which of those are cut: [N] bool each.

    A cut row is no transition: its next observation is not in the data.

    An episode ends at a terminal, at a timeout, where the next observation differs from the next
    row's observation, at a jump, and with the file. If the file has no timeouts, the length limit
    replaces them. (With timeouts, an episode may hold one row more than the limit, as in D4RL's
    AntMaze.) Timeouts, jumps and the file's last row are cut, unless they are terminal. Rows with
    `truncations` also have the next observations of those ends, so only jumps are cut.
    """
    n = len(rows["rewards"])
    jumps = rows.get("jumps", np.zeros(n, bool))
    ends = rows["terminals"] | jumps
    if "truncations" in rows:
        return ends | rows["truncations"], jumps & ~rows["terminals"]
    if "next_observations" in rows:
        changes = rows["observations"][1:] - rows["next_observations"][:-1]
        with np.errstate(over="ignore"):
            ends[:-1] |= np.linalg.norm(changes, axis=1) > 1e-6
    number = np.arange(n)
    starts = np.maximum.accumulate(np.where(np.r_[True, ends[:-1]], number, 0))
    truncated = rows.get("timeouts", (number - starts + 1) % max_episode_steps == 0)
    ends |= truncated
    ends[-1] = True
    cut = truncated | jumps
    cut[-1] = True
    return ends, cut & ~rows["terminals"]


def check_sizes(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Raise `InputError` for scaled values whose square overflows float32."""
    for name, values in arrays.items():
        largest = np.abs(values).max()
        if not largest < 1e18:
            raise InputError(
                f"dataset {path}: {name} as scaled reach {largest:.3g}, expected less than 1e18, "
                "whose square float32 can hold; check the file, reward_scale and normalize"
            )
