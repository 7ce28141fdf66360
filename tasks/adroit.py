"""Binary Adroit, as in the Cal-QL paper, and the restricted unpickler for its published data."""

import pickle
from pathlib import Path
from typing import Any, Optional

import numpy as np

from runs.errors import InputError, close_matches
from tasks.d4rl import D4RL
from tasks.files import reading
from tasks.task import Step, check_rows


class BinaryAdroit(D4RL):
    """The paper's Adroit: D4RL's environments at -1 a step and 0 at the goal, where episodes end.

    A dropped pen ends none. Time limits are those of D4RL, and of mj_envs, which these tasks come
    from: 100 steps for the pen, 200 for the rest. The score is 100 for the goal, else 0.

    The data is an HDF5 file, or a folder with the two files that the paper's authors have
    published: episodes of demonstrators and of a policy cloned from them, with the same rewards.
    """

    HANDS = "pen", "door", "relocate", "hammer"

    def __init__(self, name: str):
        names = [f"{hand}-binary-v0" for hand in self.HANDS]
        if name not in names:
            close = close_matches(name, names)
            raise InputError(f"env: there is no binary task {name!r}; close matches: {close}")
        hand = name.removesuffix("-binary-v0")
        super().__init__(f"{hand}-human-v1")
        self.name, self.failure_reward = name, -1.0
        self.files = f"{hand}2_sparse.npy", f"{hand}_bc_sparse4.npy"

    def step(self, action: np.ndarray) -> Step:
        observation, _, _, info = self.env.step(action * self.action_scale)
        success = bool(info["goal_achieved"])
        # There in the last permitted step, but False where D4RL ends the episode for a dropped pen.
        truncated = "TimeLimit.truncated" in info and not success
        reward = float(success) - 1.0
        return Step(observation.astype(np.float32), reward, success, truncated, success)

    def score(self, episode_return: float, success: bool) -> float:
        return 100.0 * success

    def data_file(self, path: Optional[str]) -> Path:
        """The HDF5 file or the folder at `path`; nothing is downloaded."""
        if path is not None and Path(path).is_file():
            return Path(path)
        absent = [file for file in self.files if not (Path(path or "") / file).is_file()]
        if path is None or absent:
            found = "null" if path is None else f"{path}, without {' and '.join(absent)}"
            raise InputError(
                f"dataset_path: found {found}, expected a folder with {' and '.join(self.files)} "
                "(github.com/nakamotoo/Cal-QL links them) or an HDF5 file (tools/make_dataset.py "
                "makes one for door-binary-v0)"
            )
        return Path(path)

    def rows(self, path: Path) -> dict[str, np.ndarray]:
        """Every row with a reward of 0 is terminal, as in the authors' code."""
        rows = self.published_rows(path) if path.is_dir() else super().rows(path)
        if not np.isin(rows["rewards"], (-1, 0)).all():
            low, high = rows["rewards"].min(), rows["rewards"].max()
            raise InputError(
                f"dataset {path}: rewards from {low:.4g} to {high:.4g}, expected -1 and 0 alone; "
                "data with dense rewards is another task's"
            )
        rows["terminals"] |= rows["rewards"] == 0
        return rows

    def published_rows(self, folder: Path) -> dict[str, np.ndarray]:
        """The episodes of the authors' files that reach the goal."""
        try:
            episodes = [up_to_goal(e) for file in self.files for e in unpickle(folder / file)]
            raw = {key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]}
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"dataset {folder}: {' and '.join(self.files)} are not the authors' episodes "
                f"({error!r}); fetch them again"
            ) from None
        raw["actions"] = raw["actions"].clip(-1, 1)  # as the environment does
        # No timeouts: the time limit does not cut demonstrations, which are longer.
        raw["terminals"] = raw["timeouts"] = np.zeros(len(raw["rewards"]), bool)
        return check_rows(raw, self, folder)


def up_to_goal(episode: dict[str, Any]) -> dict[str, np.ndarray]:
    """The rows of one of the authors' episodes up to its last reward of 0: none, where it has none.

    As for their own code, observations may be dicts, and a list of rewards one too long.
    """
    rewards = np.ravel(episode["rewards"])[: len(episode["observations"])]
    end = np.flatnonzero(rewards == 0).max(initial=-1) + 1
    rows = {"rewards": rewards[:end]}
    for key in ("observations", "actions", "next_observations"):
        states = [s["state_observation"] if isinstance(s, dict) else s for s in episode[key]]
        rows[key] = np.array(states)[:end]
    return rows


ARRAY_PARTS = {("numpy", "ndarray"), ("numpy", "dtype")}  # what numpy's arrays are pickled by
for core in ("numpy.core", "numpy._core"):
    ARRAY_PARTS |= {(f"{core}.multiarray", "_reconstruct"), (f"{core}.multiarray", "scalar")}
    ARRAY_PARTS |= {(f"{core}.numeric", "_frombuffer")}


class ArrayUnpickler(pickle.Unpickler):
    """Reads lists, dicts, numbers, text and numpy's arrays; nothing in a file can run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # older pickles write an array's bytes as text
            return str.encode
        if (module, name) not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which no numpy array does")
        return super().find_class(module, name)


def unpickle(path: Path) -> Any:
    """What a pickle, or an .npy file of objects, holds; raises `InputError` for all but arrays."""
    with reading(path, "pickle of numpy arrays"), open(path, "rb") as file:
        if file.read(6) != b"\x93NUMPY":
            file.seek(0)
        elif file.read(2) == b"\1\0":  # the version of a header that a pickle follows
            np.lib.format.read_array_header_1_0(file)
        else:
            np.lib.format.read_array_header_2_0(file)
        return ArrayUnpickler(file).load()
