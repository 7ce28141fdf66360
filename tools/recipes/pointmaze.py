"""Minari's D4RL/pointmaze: D4RL's waypoint controller in gymnasium-robotics' copy of the mazes."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tasks import d4rl_compat
from tasks.gymnasium_task import import_for, making_environment
from tools.recipes import maze2d
from tools.recipes.common import Recipe, Rows, noisy

GOALS = {"open": (2, 3), "umaze": (1, 1), "medium": (6, 6), "large": (7, 9)}  # for evaluation


def write_minari(path: Path, rows: Rows, about: dict[str, Any]) -> None:
    """Write the folder of a Minari dataset, with an episode up to each timeout."""
    task = about["task"]
    _, minari = import_for(task, "minari")
    recipe = PointMaze(task)  # the dataset describes its environment and has reference scores
    episodes = split_episodes(rows, list(recipe.env.observation_space))
    parent = path.parent.resolve()  # Minari doubles a relative one
    with (
        tempfile.TemporaryDirectory(dir=parent, prefix=".minari-") as root,
        making_environment(),
    ):
        with mock.patch.dict(os.environ, MINARI_DATASETS_PATH=root):
            dataset = minari.create_dataset_from_buffers(
                task,
                episodes,
                env=recipe.env,
                eval_env=recipe.eval_env,
                expert_policy=recipe.policy(0),
                algorithm_name="D4RL's WaypointController",
                description=about["recipe"],
            )
        dataset.storage.update_metadata({"made_by": about})
        Path(root, task).replace(path)


def split_episodes(rows: Rows, keys: list[str]) -> list[Any]:
    """Minari's EpisodeBuffer of each episode; `keys` are those of an observation."""
    from minari.data_collector.episode_buffer import EpisodeBuffer

    rows["timeouts"][-1] = True
    starts = np.flatnonzero(np.r_[True, rows["timeouts"][:-1]])
    episodes = []
    for part in np.split(np.arange(len(rows["timeouts"])), starts[1:]):
        observations = {
            key: np.append(rows[f"observations/{key}"][part], rows[f"next/{key}"][part[-1:]], 0)
            for key in keys
        }
        episode = EpisodeBuffer(
            observations=observations,
            actions=rows["actions"][part],
            rewards=rows["rewards"][part],
            terminations=rows["terminals"][part],
            truncations=rows["timeouts"][part],
        )
        episodes.append(episode)
    return episodes


class PointMaze(Recipe):
    """The controller in one of Minari's mazes, from goal to goal."""

    layout = "minari"
    write = staticmethod(write_minari)
    config = "quickstart"
    noise = 0.5  # standard deviation, as in D4RL's recipe
    packages = ("d4rl", "gymnasium-robotics", "minari")

    def __init__(self, task: str):
        d4rl_compat.make("maze2d-open-v0")  # which imports D4RL without its messages
        gymnasium, _ = import_for(task, "gymnasium_robotics")
        name = task.split("/")[-1].removesuffix("-v2")
        env = f"PointMaze_{'UMaze' if name == 'umaze' else name.title()}-v3"
        with making_environment():
            options = {"disable_env_checker": True, "continuing_task": True}
            self.env = gymnasium.make(env, reset_target=True, max_episode_steps=10**6, **options)
            self.maze = self.env.unwrapped.maze
            cells = [list(row) for row in self.maze.maze_map]
            row, column = GOALS[name]
            cells[row][column] = "g"
            self.eval_env = gymnasium.make(env, maze_map=cells, **options)
        self.search = maze2d.WaypointSearch()

    def rollout(self, seeds: np.random.SeedSequence) -> Rows:
        """TRAJECTORY transitions, with many episodes on the way."""
        rng = np.random.default_rng(seeds)
        seed = int(seeds.generate_state(1)[0])
        observation, _ = self.env.reset(seed=seed)
        act = self.policy(seed)
        rows = []
        while len(rows) < maze2d.TRAJECTORY:
            now = observation | {"desired_goal": self.env.unwrapped.goal}
            action = noisy(act(now), self.noise, rng)
            next_observation, reward, _, _, info = self.env.step(action)
            row = {f"observations/{key}": value for key, value in observation.items()}
            row |= {f"next/{key}": value for key, value in next_observation.items()}
            row |= {"actions": action, "rewards": reward}
            row |= {"terminals": False, "timeouts": info["success"]}
            rows.append(row)
            observation = next_observation
        rows[-1]["timeouts"] = True
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def policy(self, seed: int) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
        """The controller as a function of Minari's observations."""
        from d4rl.pointmaze.waypoint_controller import WaypointController

        np.random.seed(seed)  # the controller's own source of randomness
        marks = {1: "#", 0: "O"}
        lines = ("".join(marks[cell] for cell in row) for row in self.maze.maze_map)
        controller = WaypointController("\\".join(lines))

        def cell(xy: np.ndarray) -> np.ndarray:
            """Row and column of a place, not rounded."""
            return np.array([self.maze.y_map_center - xy[1], xy[0] + self.maze.x_map_center]) - 0.5

        def act(observation: dict[str, np.ndarray]) -> np.ndarray:
            here = cell(observation["achieved_goal"])
            goal = cell(observation["desired_goal"])
            velocity = observation["observation"][2:]
            with self.search.patch():
                action, _ = controller.get_action(here, velocity[::-1] * (-1, 1), goal)
            return np.array([action[1], -action[0]], np.float32)

        return act
