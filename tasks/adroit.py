"""Binary Adroit, as in the Cal-QL paper, and a restricted unpickler for its published data."""

import pickle
from pathlib import Path
from typing import Any, BinaryIO, Optional

import numpy as np

from runs.errors import InputError, close_matches
from tasks.d4rl import D4RL
from tasks.files import check_file, is_file, is_folder, reading
from tasks.task import Step, check_rows


class BinaryAdroit(D4RL):
    """The paper's Adroit: D4RL's environments with a reward of -1, or 0 at the goal.

    The goal ends an episode; dropping the pen does not. Time limits are D4RL's, as in mj_envs,
    where these tasks come from: 100 steps for the pen, 200 for the rest. Success scores 100.

    The data is an HDF5 file, or a folder with the two files that the paper's authors published:
    episodes of demonstrators and of a policy cloned from them, with the same rewards.
    """

    HANDS = "pen", "door", "relocate", "hammer"

    def __init__(self, name: str):
        names = [f"{hand}-binary-v0" for hand in self.HANDS]
        if name not in names:
            close = close_matches(name, names)
            raise InputError(f"env: there is no binary task {name!r}; close matches: {close}")
        hand = name.removesuffix("-binary-v0")
        super().__init__(f"{hand}-human-v1")
        self.name = name
        self.failure_reward = -1.0
        self.files = f"{hand}2_sparse.npy", f"{hand}_bc_sparse4.npy"

    def step(self, action: np.ndarray) -> Step:
        observation, _, _, info = self.env.step(action * self.action_scale)
        success = bool(info["goal_achieved"])
        # gym sets the key in the last permitted step, to False if the pen is dropped in that step
        truncated = "TimeLimit.truncated" in info and not success
        reward = float(success) - 1.0
        return Step(observation.astype(np.float32), reward, success, truncated, success)

    def score(self, episode_return: float, success: bool) -> float:
        return 100.0 * success

    def data_file(self, path: Optional[str]) -> Path:
        """The HDF5 file or the folder at `path`. Nothing can be downloaded."""
        if path is None:
            raise InputError(f"dataset_path: found null, expected {self.expected_data()}")
        folder = Path(path)
        if not is_folder(folder) and is_file(folder):
            return folder
        absent = [file for file in self.files if not is_file(folder / file)]
        if absent:
            found = f"{path}, without {' and '.join(absent)}"
            raise InputError(f"dataset_path: found {found}, expected {self.expected_data()}")
        return folder

    def expected_data(self) -> str:
        return (
            f"a folder with {' and '.join(self.files)} (github.com/nakamotoo/Cal-QL links them) or "
            "an HDF5 file (tools/make_dataset.py makes one for door-binary-v0)"
        )

    def rows(self, path: Path) -> dict[str, np.ndarray]:
        """Every row with a reward of 0 is terminal, as in the authors' code."""
        rows = self.published_rows(path) if path.is_dir() else super().rows(path)
        if not np.isin(rows["rewards"], (-1, 0)).all():
            low = rows["rewards"].min()
            high = rows["rewards"].max()
            raise InputError(
                f"dataset {path}: rewards from {low:.4g} to {high:.4g}, expected only -1 and 0; "
                "data with dense rewards belongs to another task"
            )
        rows["terminals"] |= rows["rewards"] == 0
        return rows

    def published_rows(self, folder: Path) -> dict[str, np.ndarray]:
        """The episodes of the authors' files that reach the goal."""
        with reading(folder, f"pair of the authors' files, {' and '.join(self.files)}"):
            episodes: list[dict[str, np.ndarray]] = []
            for file in self.files:
                episodes += map(up_to_goal, unpickle(folder / file))
            raw = {}
            for key in episodes[0]:
                raw[key] = np.concatenate([episode[key] for episode in episodes])
            raw["actions"] = raw["actions"].clip(-1, 1)  # as the environment does
            # No timeouts: the time limit does not cut demonstrations, which are longer.
            raw["terminals"] = np.zeros(len(raw["rewards"]), bool)
            raw["timeouts"] = raw["terminals"]
        return check_rows(raw, self, folder)


def up_to_goal(episode: dict[str, Any]) -> dict[str, np.ndarray]:
    """The rows of one of the authors' episodes up to its last reward of 0; none without one.

    Like the authors' code, it accepts observations in dicts and drops a last reward without a row.
    """
    rewards = np.ravel(episode["rewards"])[: len(episode["observations"])]
    end = np.flatnonzero(rewards == 0).max(initial=-1) + 1
    rows = {"rewards": rewards[:end]}
    for key in ("observations", "actions", "next_observations"):
        values = []
        for value in episode[key]:
            values.append(value["state_observation"] if isinstance(value, dict) else value)
        rows[key] = np.array(values)[:end]
    return rows


ARRAY_PARTS = {("numpy", "ndarray"), ("numpy", "dtype")}  # what numpy's arrays are pickled by
for core in ("numpy.core", "numpy._core"):
    ARRAY_PARTS.add((f"{core}.multiarray", "_reconstruct"))
    ARRAY_PARTS.add((f"{core}.multiarray", "scalar"))
    ARRAY_PARTS.add((f"{core}.numeric", "_frombuffer"))


class ArrayUnpickler(pickle.Unpickler):
    """Reads lists, dicts, numbers, text and numpy arrays; calls nothing else that a file names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # older pickles write an array's bytes as text
            return str.encode
        if (module, name) not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which no numpy array does")
        return super().find_class(module, name)


def unpickle(path: Path) -> Any:
    """The content of a pickle or .npy file of objects; `InputError` unless it is plain arrays."""
    check_file(path)
    with reading(path, "pickle of numpy arrays"), open(path, "rb") as file:
        skip_npy_header(file)
        return ArrayUnpickler(file).load()


def skip_npy_header(file: BinaryIO) -> None:
    """Move to the pickle in an .npy file of objects; stay at the beginning of a plain pickle."""
    if file.read(6) != b"\x93NUMPY":
        file.seek(0)
    elif file.read(2) == b"\1\0":  # the header's version
        np.lib.format.read_array_header_1_0(file)
    else:
        np.lib.format.read_array_header_2_0(file)
