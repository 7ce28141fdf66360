"""What Cal-QL trains on: each task as a `Task`, with an environment and the rows of its data.

The id says whose it is: `D4RL/door/human-v2` Minari's, `cube-single-play-singletask-v0` OGBench's,
`door-binary-v0` the Cal-QL paper's, else D4RL's.

    task = tasks.make("antmaze-umaze-v2")
    observation = task.reset(seed=0)
    observation, reward, terminal, truncated, success = task.step(action)  # action in [-1, 1]
    rows = task.rows(task.data_file(None))

Nothing here knows of Cal-QL. Whatever a user can get wrong raises `InputError`.
"""

import contextlib
import importlib.metadata
import io
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any, Optional
from unittest import mock

import h5py
import numpy as np
import pooch

import d4rl_compat
from runs import InputError, close_matches

pooch.get_logger().setLevel("WARNING")  # it would tell the hash of every download


def make(name: str, dataset_path: Optional[str] = None) -> "Task":
    """The task of that id; raises `InputError` where there is none such or it cannot run here.

    A Minari task's environment stands in its dataset, so it needs to know where that lies.
    """
    if "/" in name:
        return Minari(name, dataset_path)
    if "singletask" in name:
        return OGBench(name)
    if "-binary-" in name:
        return BinaryAdroit(name)
    return Kitchen(name) if name.startswith("kitchen") else Task(name)


class Task:
    """A D4RL environment: actions in [-1, 1], float32 observations, episodes seeded one by one.

    Attributes:
        observation_dim, action_dim: sizes S and A of the two spaces.
        max_episode_steps: the time limit, in steps.
        action_scale: [A], the environment's largest actions.
        failure_reward: the largest reward of a step without success, if the task is sparse; None
            in tasks with dense rewards.
        has_goal: whether an episode can succeed.
        is_locomotion: whether `normalize_reward` applies.
        physics: the simulator, in a phrase.
    """

    physics = d4rl_compat.PHYSICS

    def __init__(self, name: str):
        self.name = name
        try:
            self.env = d4rl_compat.make(name)
            self.env.get_normalized_score(0.0)
            (self.observation_dim,) = self.env.observation_space.shape
            (self.action_dim,) = self.env.action_space.shape
        except ValueError as error:
            raise InputError(f"env: {error}") from None
        except Exception as error:  # whatever gym's other environments and their parts raise
            problem = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise InputError(
                f"env: found {name!r}, expected a D4RL task such as antmaze-umaze-v2, with scores "
                f"and flat observations and actions ({problem})"
            ) from None
        self.max_episode_steps: int = self.env.spec.max_episode_steps
        self.action_scale: np.ndarray = self.env.action_space.high
        self.is_locomotion = name.startswith(("halfcheetah", "hopper", "walker2d", "ant-"))
        self.has_goal = not self.is_locomotion and "dense" not in name
        is_sparse = name.startswith(("antmaze", "maze2d")) and self.has_goal
        self.failure_reward: Optional[float] = 0.0 if is_sparse else None

    def reset(self, seed: int) -> np.ndarray:
        """Begin the episode of that seed; returns the observation [S]."""
        return d4rl_compat.reset(self.env, seed).astype(np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, bool]:
        """Play an action [A]; returns (observation [S], reward, terminal, truncated, success).

        `terminal` is the task's own end, also on the last permitted step; `truncated` is the time
        limit's. `success` is whether the goal is reached in this step.
        """
        observation, reward, done, info = self.env.step(action * self.action_scale)
        truncated = bool(done and info.get("TimeLimit.truncated", False))
        success = bool(info.get("goal_achieved", reward > 0))
        terminal = bool(done) and not truncated
        return observation.astype(np.float32), float(reward), terminal, truncated, success

    def score(self, episode_return: float, success: bool) -> float:
        """D4RL's score of the episode just played: 0 is a random policy's, 100 an expert's."""
        return 100.0 * float(self.env.get_normalized_score(episode_return))

    def data_file(self, path: Optional[str]) -> Path:
        """The dataset at `path`, or else the published one."""
        if path is not None:
            if not Path(path).is_file():
                raise InputError(
                    f"dataset_path: there is no file {path}; make one with "
                    f"`python tools/make_dataset.py {self.name}`"
                )
            return Path(path)
        return self.published_file()

    def published_file(self) -> Path:
        """D4RL's own dataset, downloaded where it is not here yet."""
        url = self.env.dataset_url
        if not url:
            raise InputError(f"env: D4RL has no data for {self.name}; name a file, --dataset_path")
        directory = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
        file = directory / url.rpartition("/")[2]
        if not file.is_file():
            try:
                downloader = pooch.HTTPDownloader(progressbar=True, timeout=30)
                pooch.retrieve(url, None, file.name, directory, downloader=downloader)
            except BaseException as error:  # a signal, too, comes in the middle of a progress bar
                print(file=sys.stderr)
                if not isinstance(error, (OSError, ValueError)):  # requests' own are OSErrors
                    raise
                raise self.download_error(url, file, error) from None
        return file

    def download_error(self, url: str, file: Path, error: Exception) -> InputError:
        return InputError(
            f"dataset: cannot download {url} to {file} ({error}); fetch it elsewhere and put it "
            f"there, or make data with `python tools/make_dataset.py {self.name}` and name it with "
            "--dataset_path"
        )

    def rows(self, path: Path) -> dict[str, np.ndarray]:
        """The arrays of a file in D4RL's layout, one row per step, checked.

        Returns observations [N, S], actions [N, A] in [-1, 1] and rewards [N] in float32,
        terminals [N] in bool; where the file has them, next_observations [N, S] and timeouts [N],
        or, in Minari's, truncations [N] (see `episode_ends`).
        """
        keys = ["observations", "actions", "rewards", "terminals", "next_observations", "timeouts"]
        with reading(path, "HDF5 file"), h5py.File(path, "r") as file:
            raw = {key: file[key][:] for key in keys if key in file}
        missing = [key for key in keys[:4] if key not in raw]
        if missing:
            raise InputError(f"dataset {path}: it lacks {', '.join(missing)}, expected {keys[:4]}")
        return check_rows(raw, self, path)


class Kitchen(Task):
    """D4RL's kitchen, paid by the rule of its data: the subtasks complete in a state, every step.

    (D4RL's environment pays each subtask once, so that a reward bias would make one state worth
    less online than offline.) An episode ends where all subtasks hold at once. The score is D4RL's:
    the share of subtasks that were ever complete; success is all of them.
    """

    def __init__(self, name: str):
        super().__init__(name)
        self.kitchen = self.env.unwrapped
        self.kitchen.TERMINATE_ON_TASK_COMPLETE = False
        self.n_subtasks = len(self.kitchen.TASK_ELEMENTS)

    def reset(self, seed: int) -> np.ndarray:
        self.completed = 0.0  # subtasks, each counted once
        return super().reset(seed)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, bool]:
        observation, newly_completed, _, truncated, _ = super().step(action)
        self.completed += newly_completed
        remaining = self.kitchen.tasks_to_complete
        self.kitchen.tasks_to_complete = set(self.kitchen.TASK_ELEMENTS)
        reward = self.kitchen._get_reward_n_score(self.kitchen.obs_dict)[0]["bonus"]
        self.kitchen.tasks_to_complete = remaining
        terminal = reward == self.n_subtasks
        success = self.completed == self.n_subtasks
        return observation, reward, terminal, truncated and not terminal, success

    def score(self, episode_return: float, success: bool) -> float:
        return super().score(self.completed, success)

    def rows(self, path: Path) -> dict[str, np.ndarray]:
        rows = super().rows(path)
        rows["terminals"] |= rows["rewards"] == self.n_subtasks
        return rows


class BinaryAdroit(Task):
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

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, bool]:
        observation, _, _, info = self.env.step(action * self.action_scale)
        success = bool(info["goal_achieved"])
        # There in the last permitted step, but False where D4RL ends the episode for a dropped pen.
        truncated = "TimeLimit.truncated" in info and not success
        return observation.astype(np.float32), float(success) - 1.0, success, truncated, success

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


# ---------------------------------------------------------------------------- gymnasium's tasks


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
            "`pip install -r requirements-gymnasium.txt` and "
            "`pip install --no-deps -r requirements-no-deps.txt`"
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

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, bool]:
        played = self.env.step(action * self.action_scale)
        observation, reward, terminal, truncated, info = played
        truncated = bool(truncated and not terminal)
        success = bool(info.get("success", False))
        return observation.astype(np.float32), float(reward), bool(terminal), truncated, success

    def score(self, episode_return: float, success: bool) -> float:
        """100 where the episode just played succeeded, else 0."""
        return 100.0 * success


class Minari(GymnasiumTask):
    """A dataset of Minari, by its id (`D4RL/door/human-v2`), and the environment to evaluate in.

    `root` (--dataset_path) is the root folder of Minari's datasets in which it lies; without it,
    that is $MINARI_DATASETS_PATH, or else Minari's own, and what is not there is downloaded.

    Dicts of observations are flattened: all keys of the dataset's space, in its order. What data
    and environment disagree on goes by one rule for both:

    * AntMaze's episodes end at the goal (in the data they go on there); the score is 100 for it.
      (Minari's reference adds up rewards at the goal. Its evaluation mazes for umaze are mirrored,
      Minari issue 304, so those are played where they were recorded.)
    * Kitchen's steps pay the subtasks complete in their state, and episodes end where that is all
      of the data's subtasks; the score is the share of them that was ever complete.

    Else the score is Minari's, times 100; without reference scores 100 for success; and where the
    environment tells no success, the return.
    """

    def __init__(self, name: str, root: Optional[str]):
        self.name = name
        *_, minari = import_for(name, "gymnasium_robotics", "minari")
        self.folder = minari_folder(name, root)
        with reading(self.folder, "Minari dataset"):
            self.dataset = minari.MinariDataset(self.folder / "data")
        if self.dataset.id != name:
            raise InputError(f"dataset {self.folder}: found {self.dataset.id}, expected {name}")
        try:
            with making_environment():
                self.start()
        except Exception as error:  # whatever other environments and their parts raise
            problem = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise InputError(
                f"env: found {name!r}, expected a Minari dataset with an environment that runs "
                f"here, flat observations, actions in a box and a time limit ({problem})"
            ) from None

    def start(self) -> None:
        """Make the environment, and play a step to see what it tells."""
        metadata = self.dataset.storage.metadata
        is_antmaze = "antmaze" in self.name
        space = self.dataset.observation_space
        self.subtasks = list(space["desired_goal"]) if "kitchen" in self.name else []
        self.end_reward = 1.0 if is_antmaze else float(len(self.subtasks) or np.inf)
        super().__init__(self.name, self.recover(space))
        base = self.env.unwrapped
        if not (
            np.array_equal(base.action_space.low, -self.action_scale) and self.max_episode_steps
        ):
            raise ValueError(f"found {base.action_space}, {self.max_episode_steps} steps at most")
        if hasattr(base, "maze") and base.reward_type == "sparse":
            self.failure_reward = 0.0
        self.reset(0)
        *_, info = self.env.step(np.zeros(self.action_dim, np.float32))
        self.has_goal = bool(self.subtasks) or "success" in info
        self.is_locomotion = not self.has_goal
        low, high = (metadata.get(f"ref_{end}_score") for end in ("min", "max"))
        self.references = None if is_antmaze or None in (low, high) or low == high else (low, high)
        if not (self.references or self.has_goal):
            self.physics += ", scores are returns (the dataset has no reference scores)"

    def recover(self, space: Any) -> Any:
        """The dataset's environment for evaluation, with observations flattened as the data's."""
        from gymnasium import spaces, wrappers

        options: dict[str, Any] = {"eval_env": "antmaze/umaze" not in self.name}
        if self.subtasks:
            options |= {"tasks_to_complete": self.subtasks, "remove_task_when_completed": False}
            options["terminate_on_tasks_completed"] = False
        env = self.dataset.recover_environment(disable_env_checker=True, **options)
        flat = spaces.flatten_space(space)
        return wrappers.TransformObservation(env, lambda values: flatten(space, values), flat)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, bool]:
        observation, reward, terminal, truncated, success = super().step(action)
        terminal |= reward >= self.end_reward
        if self.subtasks:
            self.completed = len(self.env.unwrapped.episode_task_completions)
            success = self.completed == len(self.subtasks)
        return observation, reward, terminal, truncated and not terminal, success

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
        """The steps of all episodes, each with its next observation, and none left out."""
        names = "observations next_observations actions rewards terminals truncations".split()
        with reading(path, "Minari dataset"):
            columns = zip(*(self.columns(episode) for episode in self.dataset))
            raw = {
                name: np.concatenate(of_all) for name, of_all in zip(names, columns, strict=True)
            }
        rows = check_rows(raw, self, path)
        rows["terminals"] |= rows["rewards"] >= self.end_reward
        return rows

    def columns(self, episode: Any) -> tuple[np.ndarray, ...]:
        """What `rows` returns of an episode of T steps and T + 1 observations."""
        values, n = episode.observations, len(episode.rewards)
        if isinstance(values, dict) and isinstance(goals := values.get("desired_goal"), np.ndarray):
            goals[0] = goals[1]  # PointMaze moves its goal on at an episode's end, after observing
        observations = flatten(self.dataset.observation_space, values)
        last = np.arange(n) == n - 1
        ends = episode.rewards, episode.terminations, last
        return observations[:-1], observations[1:], np.asarray(episode.actions), *ends


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
MINARI_DATA |= {f"D4RL/{hand}/{{}}-v2": "human cloned expert" for hand in BinaryAdroit.HANDS}
for body in "ant", "halfcheetah", "hopper", "walker2d":
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
    """Where that dataset lies in `root`, or in Minari's own store, downloaded where it is not.

    Raises `InputError` where it is not to be had, with the ids that are close to `name`.
    """
    published = [form.format(data) for form, names in MINARI_DATA.items() for data in names.split()]
    close = close_matches(name, published)
    hint = "" if name in published else f"; close matches among those published: {close}"
    if not re.fullmatch(r"[-\w]+(/[-\w]+)+-v\d+", name):
        raise InputError(
            f"env: found {name!r}, expected a Minari id such as D4RL/door/human-v2{hint}"
        )
    store = root or os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets"
    folder = Path(store, name).expanduser()
    if (folder / "data").exists():
        return folder
    if root:
        raise InputError(
            f"dataset_path: found no folder {folder}, expected Minari's root folder with {name} in "
            f"it; without dataset_path the dataset is downloaded to $MINARI_DATASETS_PATH{hint}"
        )
    try:
        download_from_minari(name, Path(store).expanduser())
    except OSError as error:
        raise InputError(
            f"env: cannot download {name} to {folder} ({error}); download it elsewhere and put it "
            f"there, or name the root folder that has it by --dataset_path{hint}"
        ) from None
    return folder


def download_from_minari(name: str, root: Path) -> None:
    """Put the dataset of that id into `root` when it is whole; raises OSError.

    By a process of its own, since Hugging Face's threads would outlast a signal.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as part:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MINARI_DOWNLOAD, name],
            env=os.environ | {"MINARI_DATASETS_PATH": part, "HF_HUB_VERBOSITY": "error"},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which kills that one
        )
        if done.returncode:
            raise OSError(" ".join(done.stdout.split()) or f"exit code {done.returncode}")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Path(part, name).rename(root / name)


class OGBench(GymnasiumTask):
    """A single task of OGBench, by its dataset's id: `cube-single-play-singletask-task2-v0`.

    A step is paid, and ends the episode, for the state before it, as in the data: in mazes and for
    one cube -1, or 0 at the goal; else minus the number of subtasks that are not complete.
    """

    failure_reward = -1.0

    def __init__(self, name: str):
        gymnasium, self.ogbench = import_for(name, "ogbench")
        names = {}  # id -> the environment's, for those that observe the state
        for env_name in gymnasium.registry:
            family, found, task = env_name.partition("-singletask")
            if found and not family.startswith("visual"):
                is_arm = family.startswith(("cube", "puzzle", "scene"))
                for data in ("play", "noisy") if is_arm else ("navigate", "stitch", "explore"):
                    names[f"{family}-{data}-singletask{task}"] = env_name
        if name not in names:
            close = close_matches(name, names)
            raise InputError(f"env: OGBench has no task {name!r}; close matches: {close}")
        with making_environment():
            env = gymnasium.make(names[name], disable_env_checker=True)
            # an arm's would be another one at each look, and so could not be seeded
            type(env.unwrapped).action_space = env.unwrapped.action_space
            super().__init__(name, env)

    def published_file(self) -> Path:
        default = self.ogbench.utils.DEFAULT_DATASET_DIR
        directory = Path(os.environ.get("OGBENCH_DATASET_DIR", default)).expanduser()
        file = directory / f"{self.name.partition('-singletask')[0]}-v0.npz"
        if file.is_file():
            return file
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # OGBench would wait for ever
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory) as folder:  # gone, whatever happens
                self.ogbench.download_datasets([file.stem], folder)
                for part in sorted(Path(folder).iterdir()):
                    if not zipfile.is_zipfile(part):
                        raise ValueError(f"{part.name} was cut short")
                    part.replace(directory / part.name)
        except (OSError, ValueError, HTTPException) as error:
            raise self.download_error(self.ogbench.utils.DATASET_URL, file, error) from None
        finally:
            socket.setdefaulttimeout(timeout)
        return file

    def rows(self, path: Path) -> dict[str, np.ndarray]:
        """The arrays of a file in OGBench's layout, paid for this task by OGBench's own rule.

        Each goal state is terminal, also where the recording goes on, and each recording's last
        row a timeout. Actions stop short of the bounds, where the policy has no density.
        """
        kind = ".npz file in OGBench's layout"
        with reading(path, kind), silence():
            raw = self.ogbench.load_dataset(path, compact_dataset=True, add_info=True)
        self.check_positions(raw.get("qpos", np.empty(0)), path)
        with reading(path, kind), silence():
            self.ogbench.relabel_utils.relabel_dataset(self.env.spec.id, self.env, raw)
        rows = {key: raw[key] for key in ("observations", "actions", "rewards")}
        rows |= {"terminals": raw["masks"] == 0, "timeouts": raw["valids"] == 0}
        rows = check_rows(rows, self, path)
        rows["actions"] = rows["actions"].clip(-1 + 1e-5, 1 - 1e-5)
        return rows

    def check_positions(self, positions: np.ndarray, path: Path) -> None:
        """Raise `InputError` for positions [N, nq] of another robot, or of another maze."""
        env = self.env.unwrapped
        if positions.shape[1:] != (env.model.nq,):
            found, width = positions.shape, env.model.nq
            raise InputError(f"dataset {path}: qpos has shape {found}, the task needs (N, {width})")
        if hasattr(env, "maze_map"):
            free = set(map(tuple, np.argwhere(env.maze_map == 0).tolist()))
            some = positions[:: 1 + len(positions) // 1000, :2]
            if np.mean([env.xy_to_ij(xy) in free for xy in some]) < 0.99:
                raise InputError(f"dataset {path}: its positions are in walls of {self.name}")


# ---------------------------------------------------------------------------- rows


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever is raised within into `InputError`: a broken file raises what it amounts to."""
    try:
        yield
    except MemoryError as error:
        raise InputError(f"dataset {path}: too little memory to read it ({error})") from None
    except Exception as error:
        raise InputError(
            f"dataset {path}: not a whole {kind} ({error}); delete it and fetch or make it again"
        ) from None


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
