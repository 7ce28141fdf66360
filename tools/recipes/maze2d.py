"""D4RL's maze2d: D4RL's waypoint controller leads a point from one random cell to the next."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from tasks import d4rl_compat
from tools.recipes.common import Recipe, Row, Rows, noisy, stack_maze
from tools.recipes.writing import write_hdf5

TRAJECTORY = 10_000  # transitions until the point is reset


class WaypointSearch:
    """D4RL's search for waypoints, with cached results.

    D4RL's controller searches by value iteration for every target, which would take 90 % of the
    time.
    """

    def __init__(self):
        self.q_values: dict[bytes, np.ndarray] = {}  # map with the target marked -> action values

    def patch(self) -> Any:
        """A context in which D4RL's controller searches here."""
        from d4rl.pointmaze.waypoint_controller import q_iteration

        search = self._remember(q_iteration.q_iteration)
        return mock.patch.object(q_iteration, "q_iteration", search)

    def _remember(self, q_iteration: Callable) -> Callable:
        def search(env: Any, **options: Any) -> np.ndarray:
            key = env.gs.spec.tobytes()
            if key not in self.q_values:
                self.q_values[key] = q_iteration(env, **options)
            return self.q_values[key]

        return search


class Maze2D(Recipe):
    """The controller in the maze of one task."""

    layout = "hdf5"
    write = staticmethod(write_hdf5)
    config = "quickstart"
    noise = 0.5  # standard deviation, as in D4RL's recipe
    packages = ("d4rl",)

    def __init__(self, task: str):
        self.env = d4rl_compat.make(task)
        self.maze = self.env.unwrapped
        self.search = WaypointSearch()

    def rollout(self, seeds: np.random.SeedSequence) -> Rows:
        """TRAJECTORY transitions, with many episodes on the way."""
        from d4rl.pointmaze.waypoint_controller import WaypointController

        rng = np.random.default_rng(seeds)
        seed = int(seeds.generate_state(1)[0])
        observation = d4rl_compat.reset(self.env, seed)
        np.random.seed(seed)  # the controller's own source of randomness
        controller = WaypointController(self.maze.str_maze_spec)
        target = self._next_target(observation[:2], rng)
        rows = []
        length = 0
        with self.search.patch():
            while len(rows) < TRAJECTORY:
                action, reached = controller.get_action(observation[:2], observation[2:], target)
                action = noisy(action, self.noise, rng)
                next_observation, reward, _, _ = self.maze.step(action)
                length += 1
                timeout = reached or length == self.env.spec.max_episode_steps
                last = len(rows) == TRAJECTORY - 1
                rows.append(Row(observation, action, reward, False, timeout or last))
                observation = next_observation
                if timeout:
                    target = self._next_target(target, rng)
                    length = 0
        return stack_maze(rows, self.maze.get_target(), self.maze.model.nq)

    def _next_target(self, here: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Another cell: the controller would count the current one as reached after one row."""
        cells = np.array(self.maze.empty_and_goal_locations, float)
        return rng.choice(cells[(cells != np.round(here)).any(axis=1)])
