"""Minari's datasets and their environments."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional

import numpy as np

from runs.errors import InputError, close_matches
from tasks.adroit import BinaryAdroit
from tasks.files import reading
from tasks.gymnasium_task import GymnasiumTask, import_for, making_environment
from tasks.task import Step, check_rows


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

    def step(self, action: np.ndarray) -> Step:
        observation, reward, terminal, truncated, success = super().step(action)
        terminal |= reward >= self.end_reward
        if self.subtasks:
            self.completed = len(self.env.unwrapped.episode_task_completions)
            success = self.completed == len(self.subtasks)
        return Step(observation, reward, terminal, truncated and not terminal, success)

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
