"""D4RL's antmaze: a walking ant is led through the maze cell by cell."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from runs.errors import InputError
from tasks import d4rl_compat
from tools.recipes.common import Cell, Recipe, Row, Rows, noisy, stack_maze
from tools.recipes.writing import write_hdf5

WALKER = Path(__file__).resolve().parents[2] / "datasets" / "ant_walker.npz"
ARRIVED = 0.5  # distance from its destination at which the ant turns to the next one


class Plan(NamedTuple):
    """Where the episodes of an antmaze task start and where they go."""

    starts: list[Cell]  # empty: where the task starts
    destinations: list[Cell]
    straight: float  # share of the episodes that go straight to the task's goal


class AntMaze(Recipe):
    """The walking ant in the maze of one task."""

    layout = "hdf5"
    write = staticmethod(write_hdf5)
    config = "antmaze"
    noise = 0.2  # standard deviation, as in D4RL's recipe
    packages = ("d4rl",)

    def __init__(self, task: str):
        self.env = d4rl_compat.make(task)
        self.maze = self.env.unwrapped.wrapped_env
        rows = self.maze._maze_map
        free = [(i, j) for i, row in enumerate(rows) for j, mark in enumerate(row) if mark != 1]
        self.centres = {cell: np.array(self.maze._rowcol_to_xy(cell)) for cell in free}
        step_towards = self.maze._get_best_next_rowcol  # searches for a path at every call
        self.next_cell = {(cell, end): step_towards(cell, end) for cell in free for end in free}
        self.plan = self._plan(task, free)
        with np.load(WALKER) as weights:
            self.weights = dict(weights)

    @classmethod
    def check(cls) -> None:
        if not WALKER.is_file():
            raise InputError(f"{WALKER}, the ant's walking policy, is missing")

    def rollout(self, seeds: np.random.SeedSequence) -> Rows:
        """One episode."""
        rng = np.random.default_rng(seeds)
        observation = d4rl_compat.reset(self.env, int(seeds.generate_state(1)[0]))
        if self.plan.starts:
            observation = self._move_to(self._pick(self.plan.starts, rng))
        goal = np.array(self.maze.target_goal)
        cell = self.cell_at(observation[:2])
        straight = rng.random() < self.plan.straight
        target = goal if straight else self._next_destination(cell, rng)
        rows = []
        done = False
        while not done:
            here = self.cell_at(observation[:2])
            if here in self.centres:
                cell = here
            if np.linalg.norm(target - observation[:2]) <= ARRIVED:
                target = self._next_destination(cell, rng)
            direction = self._waypoint(cell, target) - observation[:2]
            action = noisy(self.walk(observation, direction), self.noise, rng)
            next_observation, reward, done, info = self.env.step(action)
            timeout = info.get("TimeLimit.truncated", False)
            rows.append(Row(observation, action, reward, done and not timeout, timeout))
            observation = next_observation
        return stack_maze(rows, goal, self.maze.model.nq)

    def walk(self, observation: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """The walker's mean action (8,) to go along `direction` (2,) from `observation` (29,)."""
        w = self.weights
        unit = direction / (np.linalg.norm(direction) + 1e-8)
        x = np.concatenate([observation[2:], unit]).astype(np.float32)
        hidden = np.maximum(x @ w["w0"] + w["b0"], 0)
        hidden = np.maximum(hidden @ w["w1"] + w["b1"], 0)
        return np.tanh(hidden @ w["w2"] + w["b2"])

    def cell_at(self, xy: np.ndarray) -> Cell:
        """The cell around `xy`; D4RL's own `_xy_to_rowcol` floors where it should round."""
        size = self.maze._maze_size_scaling
        return round(xy[1] / size) + 1, round(xy[0] / size) + 1

    def _plan(self, task: str, free: list[Cell]) -> Plan:
        from d4rl.locomotion import maze_env  # after `make`, which silences D4RL's import

        def marked(maze: list, marks: tuple) -> list[Cell]:
            return [cell for cell in free if maze[cell[0]][cell[1]] in marks]

        goal = marked(self.maze._maze_map, (maze_env.GOAL,))
        if "diverse" in task:
            return Plan([cell for cell in free if cell not in goal], free, straight=0)
        if "play" in task:
            maze = maze_env.BIG_MAZE if "medium" in task else maze_env.HARDEST_MAZE
            picked = marked(maze, (maze_env.RESET, maze_env.GOAL))
            starts = [cell for cell in picked if cell not in goal]
            return Plan(starts, starts + goal, straight=0.25)
        return Plan([], free, straight=0.5)

    def _move_to(self, xy: np.ndarray) -> np.ndarray:
        data = self.maze.sim.data
        self.maze.set_state(np.concatenate([xy, data.qpos[2:]]), data.qvel.copy())
        return self.maze._get_obs()

    def _pick(self, cells: list[Cell], rng: np.random.Generator) -> np.ndarray:
        """A place (x, y) in one of `cells`, off its centre as in D4RL's recipe."""
        cell = cells[rng.integers(len(cells))]
        return self.centres[cell] + rng.uniform(0, self.maze._maze_size_scaling / 4, size=2)

    def _next_destination(self, here: Cell, rng: np.random.Generator) -> np.ndarray:
        return self._pick([cell for cell in self.plan.destinations if cell != here], rng)

    def _waypoint(self, cell: Cell, target: np.ndarray) -> np.ndarray:
        """Where to walk next from `cell`: the target, or the centre of a cell on the way."""
        end = self.cell_at(target)
        next_cell = self.next_cell[cell, end]
        return target if next_cell == end else self.centres[next_cell]
