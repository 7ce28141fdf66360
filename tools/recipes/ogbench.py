"""OGBench's point mazes and cubes: its own oracles act, and no recording ends at a goal."""

from typing import Any

import numpy as np

from tasks.gymnasium_task import import_for, silence
from tools.recipes.common import Cell, Recipe, Rows, noisy
from tools.recipes.writing import write_npz


class OGBench(Recipe):
    """One of OGBench's environments, and the oracle that acts in it."""

    layout = "npz"
    write = staticmethod(write_npz)
    config = "ogbench"
    packages = ("mujoco", "ogbench")

    def __init__(self, task: str, length: int, **options: Any):
        family, self.data = task.partition("-singletask")[0].rsplit("-", 1)
        gymnasium, _ = import_for(task, "ogbench")
        options |= {"terminate_at_goal": False, "max_episode_steps": length}
        with silence():
            self.env = gymnasium.make(f"{family}-v0", disable_env_checker=True, **options)
            self.env.reset()
        self.simulation = self.env.unwrapped

    def begin(self, seed: int) -> tuple[np.ndarray, dict]:
        """Start a recording; returns the environment's observation and info."""
        raise NotImplementedError

    def act(self, observation: np.ndarray, info: dict) -> np.ndarray:
        """The next action, in [-1, 1]."""
        raise NotImplementedError

    def rollout(self, seeds: np.random.SeedSequence) -> Rows:
        """One recording."""
        seed = int(seeds.generate_state(1)[0])
        np.random.seed(seed)  # the oracles draw from it, and the mazes
        self.simulation.action_space.seed(seed)
        self.rng = np.random.default_rng(seeds)
        observation, info = self.begin(seed)
        rows = []
        done = False
        while not done:
            action = self.act(observation, info)
            next_observation, _, _, done, info = self.env.step(action)
            rows.append((observation, action, info["prev_qpos"], info["prev_qvel"]))
            observation = next_observation
        names = "observations", "actions", "qpos", "qvel"
        columns = {name: np.asarray(x, np.float32) for name, x in zip(names, zip(*rows))}
        return columns | {"terminals": np.arange(len(rows)) == len(rows) - 1}


class Point(OGBench):
    """The maze oracle leads the point from cell to cell."""

    noise = 0.5  # standard deviation, as in OGBench's recipe

    def __init__(self, task: str):
        super().__init__(task, length=201 if "stitch" in task else 1001)
        walls = self.simulation.maze_map == 1
        self.cells = [tuple(cell) for cell in np.argwhere(~walls).tolist()]
        self.turnings = [(i, j) for i, j in self.cells if not self._is_hallway(walls, i, j)]

    def begin(self, seed: int) -> tuple[np.ndarray, dict]:
        start = self._pick(self.cells)
        ends = self.turnings
        if self.data == "stitch":
            xy = self.simulation.ij_to_xy(start)
            _, distances = self.simulation.get_oracle_subgoal(xy, xy)
            ends = [cell for cell in self.cells if distances[cell] == 4] or [start]
        task = {"init_ij": start, "goal_ij": self._pick(ends)}
        return self.env.reset(seed=seed, options={"task_info": task})

    def act(self, observation: np.ndarray, info: dict) -> np.ndarray:
        maze = self.simulation
        if self.data == "navigate" and info.get("success"):
            maze.set_goal(self._pick(self.turnings))
        subgoal, _ = maze.get_oracle_subgoal(maze.get_xy(), maze.cur_goal_xy)
        direction = subgoal - maze.get_xy()
        return noisy(direction / (np.linalg.norm(direction) + 1e-6), self.noise, self.rng)

    def _pick(self, cells: list[Cell]) -> Cell:
        return cells[self.rng.integers(len(cells))]

    @staticmethod
    def _is_hallway(walls: np.ndarray, i: int, j: int) -> bool:
        """Whether the only way through the cell is straight."""
        across = walls[[i - 1, i + 1], j]
        along = walls[i, [j - 1, j + 1]]
        return across.all() and not along.any() or along.all() and not across.any()


class Cubes(OGBench):
    """The cube oracles carry one cube after another to a random target."""

    noise = 0.1  # of the plan's positions, and the largest of the actions; as in OGBench's recipe
    stacking = {  # range of an episode's probability that a target is on another cube
        "single": (0.0, 0.0),
        "double": (0.0, 0.25),
        "triple": (0.05, 0.35),
        "quadruple": (0.1, 0.5),
        "octuple": (0.0, 0.35),
    }

    def __init__(self, task: str):
        super().__init__(task, length=1001, mode="data_collection")
        if self.data == "play":
            from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle as Oracle
        else:
            from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle as Oracle
        self.oracle = Oracle(env=self.env)
        self.p_stack_range = self.stacking[task.split("-")[1]]

    def begin(self, seed: int) -> tuple[np.ndarray, dict]:
        self.p_stack = self.rng.uniform(*self.p_stack_range)
        self.deviation = self.rng.uniform(0, self.noise) * np.array([1, 1, 1, 3, 10])
        start = self.env.reset(seed=seed)
        self.oracle.reset(*start)
        return start

    def act(self, observation: np.ndarray, info: dict) -> np.ndarray:
        if self.oracle.done:
            observation, info = self.simulation.set_new_target(p_stack=self.p_stack)
            self.oracle.reset(observation, info)
        if self.data == "play":
            return noisy(self.oracle.select_action(observation, info), 0.0, self.rng)
        if self.rng.random() < 0.1:
            return self.rng.uniform(-1, 1, 5).astype(np.float32)
        return noisy(self.oracle.select_action(observation, info), self.deviation, self.rng)
