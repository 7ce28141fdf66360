"""D4RL's tasks: mazes, Adroit, locomotion and kitchen."""

from pathlib import Path

import numpy as np

from runs.errors import InputError
from tasks import d4rl_compat
from tasks.files import data_directory, download, download_error, is_file, read_hdf5
from tasks.task import Step, Task, check_rows

KEYS = ["observations", "actions", "rewards", "terminals", "next_observations", "timeouts"]
CELL_SIZES = {"antmaze": 4.0, "maze2d": 1.0}


class D4RL(Task):
    """A D4RL environment, by its id."""

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
        except Exception as error:  # gym's other environments can raise any exception
            problem = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise InputError(
                f"env: found {name!r}, expected a D4RL task such as antmaze-umaze-v2, with scores "
                f"and flat observations and actions ({problem})"
            ) from None
        self.max_episode_steps = self.env.spec.max_episode_steps
        self.action_scale = self.env.action_space.high
        self.is_locomotion = name.startswith(("halfcheetah", "hopper", "walker2d", "ant-"))
        self.has_goal = not self.is_locomotion and "dense" not in name
        is_sparse = name.startswith(("antmaze", "maze2d")) and self.has_goal
        self.failure_reward = 0.0 if is_sparse else None
        self.cell_size = CELL_SIZES.get(name.partition("-")[0])

    def reset(self, seed: int) -> np.ndarray:
        return d4rl_compat.reset(self.env, seed).astype(np.float32)

    def step(self, action: np.ndarray) -> Step:
        observation, reward, done, info = self.env.step(action * self.action_scale)
        truncated = bool(done and info.get("TimeLimit.truncated", False))
        success = bool(info.get("goal_achieved", reward > 0))
        terminal = bool(done) and not truncated
        return Step(observation.astype(np.float32), float(reward), terminal, truncated, success)

    def score(self, episode_return: float, success: bool) -> float:
        """D4RL's score of the episode just played: 0 for a random policy, 100 for an expert."""
        return 100.0 * float(self.env.get_normalized_score(episode_return))

    def published_file(self) -> Path:
        """D4RL's own dataset, downloaded if it is not here yet."""
        url = self.env.dataset_url
        if not url:
            raise InputError(f"env: D4RL has no data for {self.name}; pass a --dataset_path")
        file = data_directory("D4RL_DATASET_DIR", "~/.d4rl/datasets") / url.rpartition("/")[2]
        if is_file(file):
            return file
        try:
            download(url, file)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            raise download_error(self.name, url, file, error) from None
        return file

    def rows(self, path: Path) -> dict[str, np.ndarray]:
        """The arrays of a file in D4RL's layout."""
        return check_rows(read_hdf5(path, KEYS), self, path)


class Kitchen(D4RL):
    """D4RL's kitchen with the data's rewards: the number of subtasks complete in the step's state.

    D4RL's environment rewards each subtask once, so a reward bias would make the same state worth
    less online than offline. An episode ends when all subtasks are complete at once. The score is
    D4RL's: the share of subtasks that were ever complete. Success means all of them.
    """

    def __init__(self, name: str):
        super().__init__(name)
        self.kitchen = self.env.unwrapped
        self.kitchen.TERMINATE_ON_TASK_COMPLETE = False
        self.n_subtasks = len(self.kitchen.TASK_ELEMENTS)

    def reset(self, seed: int) -> np.ndarray:
        self.completed = 0.0  # subtasks, each counted once
        return super().reset(seed)

    def step(self, action: np.ndarray) -> Step:
        step = super().step(action)
        self.completed += step.reward  # subtasks complete for the first time
        remaining = self.kitchen.tasks_to_complete
        self.kitchen.tasks_to_complete = set(self.kitchen.TASK_ELEMENTS)
        reward = self.kitchen._get_reward_n_score(self.kitchen.obs_dict)[0]["bonus"]
        self.kitchen.tasks_to_complete = remaining
        terminal = reward == self.n_subtasks
        success = self.completed == self.n_subtasks
        return Step(step.observation, reward, terminal, step.truncated and not terminal, success)

    def score(self, episode_return: float, success: bool) -> float:
        return super().score(self.completed, success)

    def rows(self, path: Path) -> dict[str, np.ndarray]:
        rows = super().rows(path)
        rows["terminals"] |= rows["rewards"] == self.n_subtasks
        return rows
