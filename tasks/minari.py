"""Minari's datasets and their environments."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

import h5py
import numpy as np

from runs.errors import InputError, close_matches
from tasks.files import check_file, check_self_contained, data_directory, is_folder, reading
from tasks.gymnasium_task import GymnasiumTask, flat_size, import_for, making_environment
from tasks.task import Step, check_rows


class Minari(GymnasiumTask):
    """A dataset of Minari, by its id (`D4RL/door/human-v2`), and its environment for evaluation.

    `root` (--dataset_path) is the root folder of Minari's datasets. By default it is
    $MINARI_DATASETS_PATH or Minari's own; a dataset that is not there is downloaded.

    Dicts of observations are flattened: all keys of the dataset's space, in its order. If data and
    environment disagree, one rule holds for both:

    * AntMaze's episodes end at the goal, although the recordings continue there; the score is 100
      for reaching it. (Minari's reference adds up rewards at the goal. Its evaluation mazes for
      umaze are mirrored, Minari issue 304, so those are played in the mazes of the recordings.)
    * A Kitchen step's reward is the number of subtasks complete in its state. Episodes end when all
      of the data's subtasks are complete at once; the score is the share of them that was ever
      complete.

    In all other tasks the score is Minari's, times 100. Without reference scores it is 100 for
    success, and the return if the environment reports no success.
    """

    def __init__(self, name: str, root: Optional[str]):
        self.name = name
        *_, minari = import_for(name, "gymnasium_robotics", "minari")
        self.folder = minari_folder(name, root)
        self.dataset = open_dataset(minari, self.folder, name)
        try:
            with making_environment():
                self.start()
        except InputError:
            raise
        except Exception as error:  # other environments can raise any exception
            problem = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise InputError(
                f"env: found {name!r}, expected a Minari dataset with an environment that runs "
                f"here, flat observations, actions in a box and a time limit ({problem})"
            ) from None

    def start(self) -> None:
        """Make the environment, and play a step to see what it reports."""
        is_antmaze = self.name.startswith("D4RL/antmaze/")
        space = self.dataset.observation_space
        is_kitchen = self.name.startswith("D4RL/kitchen/")
        self.subtasks = list(space["desired_goal"]) if is_kitchen else []
        self.end_reward = 1.0 if is_antmaze else float(len(self.subtasks) or np.inf)
        simulator = "mujoco" if self.name.startswith(("D4RL/", "mujoco/")) else "gymnasium"
        super().__init__(self.name, self.recover(space), simulator)
        base = self.env.unwrapped
        if hasattr(base, "maze"):
            self.failure_reward = 0.0 if base.reward_type == "sparse" else None
            if next(iter(space)) == "achieved_goal":  # x and y
                self.cell_size = float(base.maze.maze_size_scaling)
        self.reset(0)
        *_, info = self.env.step(np.zeros(self.action_dim, np.float32))
        self.has_goal = bool(self.subtasks) or "success" in info
        self.is_locomotion = not self.has_goal
        self.references = None if is_antmaze else self.reference_scores()
        if not (self.references or self.has_goal):
            self.physics += ", scores are returns (the dataset has no reference scores)"

    def reference_scores(self) -> Optional[tuple[float, float]]:
        """The returns that score 0 and 1, if the dataset has both and they differ."""
        metadata = self.dataset.storage.metadata
        scores = []
        for name in ("ref_min_score", "ref_max_score"):
            score = metadata.get(name)
            if score is None:
                return None
            if not (isinstance(score, (int, float)) and np.isfinite(score)):
                raise InputError(
                    f"dataset {self.folder}: {name}: found {score!r}, expected a number"
                )
            scores.append(float(score))
        low, high = scores
        return None if low == high else (low, high)

    def recover(self, space: Any) -> Any:
        """The dataset's environment for evaluation, with observations flattened as the data's."""
        from gymnasium import spaces, wrappers

        check_space(self.name, space)
        options: dict[str, Any] = {"eval_env": "antmaze/umaze" not in self.name}
        if self.subtasks:
            options["tasks_to_complete"] = self.subtasks
            options["remove_task_when_completed"] = False
            options["terminate_on_tasks_completed"] = False
        env = self.dataset.recover_environment(disable_env_checker=True, **options)
        flat = spaces.flatten_space(space)
        return wrappers.TransformObservation(env, lambda values: flatten(space, values), flat)

    def step(self, action: np.ndarray) -> Step:
        step = super().step(action)
        terminal = step.terminal or step.reward >= self.end_reward
        success = step.success
        if self.subtasks:
            self.completed = len(self.env.unwrapped.episode_task_completions)
            success = self.completed == len(self.subtasks)
        truncated = step.truncated and not terminal
        return step._replace(terminal=terminal, truncated=truncated, success=success)

    def score(self, episode_return: float, success: bool) -> float:
        if self.subtasks:
            return 100.0 * self.completed / len(self.subtasks)
        if self.references:
            low, high = self.references
            return 100.0 * (episode_return - low) / (high - low)
        return 100.0 * success if self.has_goal else episode_return

    def data_file(self, path: Optional[str]) -> Path:
        return self.folder

    def rows(self, path: Path) -> dict[str, np.ndarray]:
        """The steps of all episodes, each with its next observation; none is left out."""
        parts: dict[str, list[np.ndarray]] = {}
        with reading(path, "Minari dataset"):
            for episode in self.dataset:
                for key, values in self.episode_rows(episode).items():
                    parts.setdefault(key, []).append(values)
            raw = {key: np.concatenate(values) for key, values in parts.items()}
        rows = check_rows(raw, self, path)
        rows["terminals"] |= rows["rewards"] >= self.end_reward
        return rows

    def episode_rows(self, episode: Any) -> dict[str, np.ndarray]:
        """The part of `rows` that an episode of T steps and T + 1 observations gives."""
        values = episode.observations
        if isinstance(values, dict) and isinstance(goals := values.get("desired_goal"), np.ndarray):
            goals[0] = goals[1]  # a PointMaze episode begins with the previous episode's goal
        observations = flatten(self.dataset.observation_space, values)
        n = len(episode.rewards)
        return {
            "observations": observations[:-1],
            "next_observations": observations[1:],
            "actions": np.asarray(episode.actions),
            "rewards": episode.rewards,
            "terminals": episode.terminations,
            "truncations": np.arange(n) == n - 1,
        }


def open_dataset(minari: ModuleType, folder: Path, name: str) -> Any:
    """The dataset in `folder`, checked before any code that it names runs.

    Raises `InputError` if it is not a dataset with this id, or needs packages that are missing.
    """
    data = folder / "data"
    with reading(folder, "Minari dataset"):
        check_files(data, folder)
        dataset = minari.MinariDataset(data)
    for spec in (dataset.env_spec, dataset._eval_env_spec):
        if spec is not None:
            check_environment(spec, folder)
    if dataset.id != name:
        raise InputError(f"dataset {folder}: found {dataset.id}, expected {name}")
    return dataset


def check_files(data: Path, folder: Path) -> None:
    """Raise `InputError` if opening the dataset would hang, need another package or run code.

    `check_environment` checks what making its environment would run.
    """
    for path in data.rglob("*"):
        if not path.is_dir():
            check_file(path)
    check_file(data / "metadata.json")
    metadata = json.loads((data / "metadata.json").read_bytes())
    missing = {"observation_space", "action_space"} - set(metadata)
    if missing:  # to find them, Minari would make the environment
        raise InputError(f"dataset {folder}: its metadata lacks {' and '.join(sorted(missing))}")
    if metadata["data_format"] in ("arrow", "parquet"):
        check_pyarrow(metadata["data_format"], folder)
    if metadata["data_format"] == "hdf5":
        check_file(data / "main_data.hdf5")
        with h5py.File(data / "main_data.hdf5", "r") as file:
            check_self_contained(file, folder)


def check_environment(spec: Any, folder: Path) -> None:
    """Raise `InputError` unless gymnasium knows the environment, entry point and wrappers.

    gymnasium imports and calls everything that a specification names. The arguments may differ.
    """
    import gymnasium

    registered = gymnasium.registry.get(spec.id)
    if registered is None:
        raise InputError(
            f"dataset {folder}: its environment {spec.id!r} is not registered with gymnasium here, "
            "and a dataset must run no code; docs/own_data.md says how to register yours"
        )
    found = entry_points(spec)
    expected = entry_points(registered)
    if found != expected:
        raise InputError(
            f"dataset {folder}: {spec.id} is made by {found}, expected {expected} as registered "
            "with gymnasium: a dataset must run no code"
        )


def entry_points(spec: Any) -> list[Any]:
    """What gymnasium calls to make the environment: its own entry point and its wrappers'."""
    return [spec.entry_point, *(wrapper.entry_point for wrapper in spec.additional_wrappers)]


def check_pyarrow(data_format: str, folder: Path) -> None:
    """Raise `InputError` if pyarrow is missing, or so old that its files can run code."""
    from packaging.version import Version

    try:
        import pyarrow
    except ImportError:
        raise InputError(
            f"dataset {folder}: it is in {data_format} format, which needs pyarrow; install it by "
            "`pip install pyarrow`"
        ) from None
    if Version(pyarrow.__version__) < Version("14.0.1"):
        raise InputError(
            f"dataset {folder}: found pyarrow {pyarrow.__version__}, whose files can run code "
            "(CVE-2023-47248), expected 14.0.1 or newer; `pip install -U pyarrow`"
        )


def check_space(name: str, space: Any) -> None:
    """Raise `InputError` unless `flatten` makes vectors of the space's observations."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        for part in space.values():
            check_space(name, part)
    elif isinstance(space, spaces.Box):
        flat_size(name, space)
    else:
        raise InputError(f"env: {name} has observations in {space}, expected a Box of vectors")


def flatten(space: Any, values: Any) -> np.ndarray:
    """An observation, or an array of them, of gymnasium's `space`, as [..., S] in float32."""
    if hasattr(space, "spaces"):
        return np.concatenate([flatten(part, values[key]) for key, part in space.items()], -1)
    return np.asarray(values, np.float32)


MINARI_DATA = {
    "D4RL/antmaze/{}-v1": "umaze umaze-diverse medium-play medium-diverse large-play large-diverse",
    "D4RL/pointmaze/{}-v2": "open umaze medium large",
    "D4RL/pointmaze/{}-dense-v2": "open umaze medium large",
    "D4RL/kitchen/{}-v2": "complete mixed partial",
}
for hand in ("door", "hammer", "pen", "relocate"):
    MINARI_DATA[f"D4RL/{hand}/{{}}-v2"] = "human cloned expert"
for body in ("ant", "halfcheetah", "hopper", "walker2d"):
    MINARI_DATA[f"mujoco/{body}/{{}}-v0"] = "simple medium expert"

MINARI_DOWNLOAD = """
import contextlib, sys
try:
    with contextlib.redirect_stdout(sys.stderr):
        import minari
        minari.download_dataset(sys.argv[1])
except Exception as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(1)
"""


def minari_folder(name: str, root: Optional[str]) -> Path:
    """The dataset's folder in `root`; without a root in Minari's store, downloaded if missing.

    Raises `InputError`, with the ids that are close to `name`, if it cannot be downloaded.
    """
    published = [form.format(data) for form, names in MINARI_DATA.items() for data in names.split()]
    close = close_matches(name, published)
    hint = "" if name in published else f"; close matches among those published: {close}"
    if not re.fullmatch(r"[-\w]+(/[-\w]+)+-v\d+", name):
        raise InputError(
            f"env: found {name!r}, expected a Minari id such as D4RL/door/human-v2{hint}"
        )
    store = Path(root) if root else data_directory("MINARI_DATASETS_PATH", "~/.minari/datasets")
    folder = store / name
    if is_folder(folder / "data"):
        return folder
    if root:
        raise InputError(
            f"dataset_path: found no folder {folder}, expected Minari's root folder with {name} in "
            f"it; without dataset_path the dataset is downloaded to $MINARI_DATASETS_PATH{hint}"
        )
    try:
        download_from_minari(name, store)
    except OSError as error:
        raise InputError(
            f"env: cannot download {name} to {folder} ({error}); download it elsewhere and put it "
            f"there, or pass the root folder that has it with --dataset_path{hint}"
        ) from None
    return folder


def download_from_minari(name: str, root: Path) -> None:
    """Download the dataset, and move it into `root` once it is complete; raises OSError.

    A separate process does it, since Hugging Face's threads would survive a signal.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as part:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MINARI_DOWNLOAD, name],
            env=os.environ | {"MINARI_DATASETS_PATH": part, "HF_HUB_VERBOSITY": "error"},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so Ctrl-C only reaches this process, which kills that one
        )
        if done.returncode:
            raise OSError(" ".join(done.stdout.split()) or f"exit code {done.returncode}")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Path(part, name).rename(root / name)
