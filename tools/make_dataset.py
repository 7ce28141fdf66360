"""Make a dataset for a task of D4RL's, Minari's or OGBench's, by their published recipes.

    python tools/make_dataset.py antmaze-umaze-v2 --transitions 200000 --seed 0
    python tools/make_dataset.py cube-single-play-singletask-v0 --transitions 200000 --seed 0
    python tools/make_dataset.py door-binary-v0 --demonstrations door-v0_demos.pickle

Row i depends on the task, the seed, the demonstrations if any, and i alone, apart from the last
row's end: a short file is the beginning of a longer one, and the number of workers does not matter.

For D4RL's mazes the file has D4RL's HDF5 layout, a row per transition, with the state before the
action:

    observations (N, 29 or 4), actions (N, 8 or 2), rewards (N,)              float32
    terminals (N,), timeouts (N,)                                             bool
    infos/goal (N, 2): x, y of the task's goal, which the reward is for       float32
    infos/qpos (N, 15 or 2), infos/qvel (N, 14 or 2): the simulator's state   float32
    metadata: a group without data, whose attributes say how the file was made

Rewards and terminals are what the environment's `step` returned for the row. An episode ends at a
terminal or a timeout, never at both; the file's last row is one of the two. Actions are clipped to
[-1, 1] after the noise. In infos/goal, D4RL's own files hold the place where the data-collecting
policy was sent, and their maze2d rewards belong to the state before the action.

antmaze: a walking ant (datasets/ant_walker.npz) is led through the maze cell by cell, with action
noise of 0.2, to a destination, and once within 0.5 of it to the next one. (In D4RL's own data it
stays at the first one until the time limit.) An episode ends at the task's goal, which the
environment draws anew at every reset, or at the task's time limit.

    umaze       starts where the task does; half of the episodes go straight to the task's goal,
                the others wander through random cells
    *-diverse   starts in a random cell and wanders through random cells
    *-play      the same with a few hand-picked cells, those that D4RL's maps for data collection
                mark and the goal's; a quarter of the episodes go straight to the task's goal

maze2d: D4RL's `WaypointController`, with action noise of 0.5, leads a point from one random cell to
the next. A timeout is set where a cell has been reached, and at the task's time limit; nothing is
terminal. The point goes on from there, and starts anew every 10,000 transitions.

door: the 25 human demonstrations of github.com/aravindr93/hand_dapg (--demonstrations names its
dapg/demonstrations/door-v0_demos.pickle) are replayed from their first states. infos/qpos,
infos/qvel and infos/door_body_pos, in float64, allow to do so again.

    door-human-v1   has them whole, each up to a timeout, as D4RL's own file
    door-binary-v0  has those that reach the goal, up to there, and, as the Cal-QL paper describes,
                    those that do so of 500 rollouts, without noise, of a policy cloned from all

D4RL/pointmaze: the same controller and noise in Minari's copy of these mazes, from goal to goal.
Where the point is within 0.45 of the goal, it is paid 1, the episode is truncated and the goal
moves on. The point goes on from there, so that an episode's first observation has the goal of the
one before, and starts anew every 10,000 transitions. The reference scores are those of random
actions and of the controller. --output is Minari's root folder (default: datasets/minari), and the
dataset, in Minari's own layout, a folder in it, where there is none such yet.

For OGBench's tasks the file has OGBench's .npz layout: observations, actions, qpos and qvel (the
simulator's state) in float32, and terminals, true in the last row of a recording. It serves all
tasks of its environment, which pay its rows each by their own goal. A recording has 1,001 rows.

pointmaze: OGBench's maze oracle leads the point, with action noise of 0.5, from a random cell to
one turning or dead end after another (navigate), or, in 201 rows, to a cell four steps away
(stitch).

cube: OGBench's cube oracles carry one cube after another to a random place, or on to another cube:
by a plan with smooth noise (play), or by the state, with action noise of up to 0.1 for positions
and every tenth action random (noisy).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from unittest import mock

import h5py
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tasks import d4rl_compat

ROOT = Path(__file__).resolve().parents[1]
WALKER = ROOT / "datasets" / "ant_walker.npz"
ARRIVED = 0.5  # distance from its destination at which the ant turns to the next one
POINT_TRAJECTORY = 10_000  # transitions
CLONE_UPDATES, CLONE_NOISE = 4_000, 0.1  # noise in standard deviations of the observations
CLONE_ROLLOUTS = 500

Cell = tuple[int, int]  # row and column in the maze's map
Rows = dict[str, np.ndarray]  # name in the file -> array with one row per transition


class Step(NamedTuple):
    """One transition, without the observation that follows."""

    observation: np.ndarray
    action: np.ndarray
    reward: float
    terminal: bool
    timeout: bool


def stack(steps: list[Step]) -> Rows:
    observations, actions, rewards, terminals, timeouts = map(np.asarray, zip(*steps, strict=True))
    return {
        "observations": observations.astype(np.float32),
        "actions": actions,
        "rewards": rewards.astype(np.float32),
        "terminals": terminals.astype(bool),
        "timeouts": timeouts.astype(bool),
    }


def to_rows(steps: list[Step], goal: np.ndarray, n_positions: int) -> Rows:
    """Stack `steps`; in these tasks an observation is the simulator's qpos, then its qvel."""
    rows = stack(steps)
    qpos, qvel = np.split(rows["observations"], [n_positions], axis=1)
    goals = np.tile(np.asarray(goal, np.float32), (len(steps), 1))
    return {**rows, "infos/goal": goals, "infos/qpos": qpos, "infos/qvel": qvel}


def noisy(action: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """`action` plus Gaussian noise, clipped to [-1, 1]; float32, so that the file holds it all."""
    return (action + noise * rng.standard_normal(len(action))).clip(-1, 1).astype(np.float32)


# ------------------------------------------------------------------------------------ antmaze


class Plan(NamedTuple):
    """Where the episodes of an antmaze task start and where they go."""

    starts: list[Cell]  # empty: where the task starts
    destinations: list[Cell]
    straight: float  # share of the episodes that go straight to the task's goal


class AntMaze:
    """The walking ant in the maze of one task."""

    noise = 0.2  # standard deviation, as in D4RL's recipe
    layout, config, packages = "hdf5", "antmaze", "d4rl"

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

    def rollout(self, seeds: np.random.SeedSequence) -> Rows:
        """One episode."""
        rng = np.random.default_rng(seeds)
        observation = d4rl_compat.reset(self.env, int(seeds.generate_state(1)[0]))
        if self.plan.starts:
            observation = self._move_to(self._pick(self.plan.starts, rng))
        goal = np.array(self.maze.target_goal)
        cell = self.cell_of(observation[:2])
        straight = rng.random() < self.plan.straight
        target = goal if straight else self._next_destination(cell, rng)
        steps, done = [], False
        while not done:
            here = self.cell_of(observation[:2])
            cell = here if here in self.centres else cell
            if np.linalg.norm(target - observation[:2]) <= ARRIVED:
                target = self._next_destination(cell, rng)
            direction = self._waypoint(cell, target) - observation[:2]
            action = noisy(self.walk(observation, direction), self.noise, rng)
            next_observation, reward, done, info = self.env.step(action)
            timeout = info.get("TimeLimit.truncated", False)
            steps.append(Step(observation, action, reward, done and not timeout, timeout))
            observation = next_observation
        return to_rows(steps, goal, self.maze.model.nq)

    def walk(self, observation: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """The walker's mean action (8,) to go along `direction` (2,) from `observation` (29,)."""
        w = self.weights
        unit = direction / (np.linalg.norm(direction) + 1e-8)
        x = np.concatenate([observation[2:], unit]).astype(np.float32)
        hidden = np.maximum(x @ w["w0"] + w["b0"], 0)
        hidden = np.maximum(hidden @ w["w1"] + w["b1"], 0)
        return np.tanh(hidden @ w["w2"] + w["b2"])

    def cell_of(self, xy: np.ndarray) -> Cell:
        """The cell around `xy`; D4RL's own `_xy_to_rowcol` floors where it should round."""
        size = self.maze._maze_size_scaling
        return round(xy[1] / size) + 1, round(xy[0] / size) + 1

    def _plan(self, task: str, free: list[Cell]) -> Plan:
        from d4rl.locomotion import maze_env

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
        end = self.cell_of(target)
        following = self.next_cell[cell, end]
        return target if following == end else self.centres[following]


# ------------------------------------------------------------------------------------- maze2d


class PointMaze:
    """D4RL's waypoint controller in the maze of one task."""

    noise = 0.5  # standard deviation, as in D4RL's recipe
    layout, config, packages = "hdf5", "quickstart", "d4rl"

    def __init__(self, task: str):
        self.env = d4rl_compat.make(task)
        self.maze = self.env.unwrapped
        self.q_values: dict[bytes, np.ndarray] = {}  # map with the target marked -> action values

    def rollout(self, seeds: np.random.SeedSequence) -> Rows:
        """POINT_TRAJECTORY transitions, with many episodes on the way."""
        from d4rl.pointmaze.waypoint_controller import WaypointController, q_iteration

        rng = np.random.default_rng(seeds)
        seed = int(seeds.generate_state(1)[0])
        observation = d4rl_compat.reset(self.env, seed)
        np.random.seed(seed)  # the controller's own source of randomness
        controller = WaypointController(self.maze.str_maze_spec)
        search = self._once_per_target(q_iteration.q_iteration)
        target = self._next_target(observation[:2], rng)
        steps, length = [], 0
        with mock.patch.object(q_iteration, "q_iteration", search):
            while len(steps) < POINT_TRAJECTORY:
                action, reached = controller.get_action(observation[:2], observation[2:], target)
                action = noisy(action, self.noise, rng)
                next_observation, reward, _, _ = self.maze.step(action)
                length += 1
                timeout = reached or length == self.env.spec.max_episode_steps
                last = len(steps) == POINT_TRAJECTORY - 1
                steps.append(Step(observation, action, reward, False, timeout or last))
                observation = next_observation
                if timeout:
                    target, length = self._next_target(target, rng), 0
        return to_rows(steps, self.maze.get_target(), self.maze.model.nq)

    def _once_per_target(self, q_iteration: Callable) -> Callable:
        """`q_iteration`, remembering its results: it would take nine tenths of all the time."""

        def search(env: Any, **options: Any) -> np.ndarray:
            key = env.gs.spec.tobytes()
            if key not in self.q_values:
                self.q_values[key] = q_iteration(env, **options)
            return self.q_values[key]

        return search

    def _next_target(self, here: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Another cell: the controller would count the same one as reached after one row."""
        cells = np.array(self.maze.empty_and_goal_locations, float)
        return rng.choice(cells[(cells != np.round(here)).any(axis=1)])


class MinariPoint(PointMaze):
    """The same controller in Minari's copy of a maze; cells are continuous coordinates here."""

    layout, packages = "minari", "d4rl gymnasium-robotics minari"
    goals = {"open": (2, 3), "umaze": (1, 1), "medium": (6, 6), "large": (7, 9)}  # for evaluation

    def __init__(self, task: str):
        from tasks.gymnasium_task import import_for, making_environment

        d4rl_compat.make("maze2d-open-v0")  # which imports D4RL without its messages
        gymnasium, _ = import_for(task, "gymnasium_robotics")
        name = task.split("/")[-1].removesuffix("-v2")
        env = f"PointMaze_{'UMaze' if name == 'umaze' else name.title()}-v3"
        with making_environment():
            options = {"disable_env_checker": True, "continuing_task": True}
            self.env = gymnasium.make(env, reset_target=True, max_episode_steps=10**6, **options)
            self.maze = self.env.unwrapped.maze
            cells = [list(row) for row in self.maze.maze_map]
            row, column = self.goals[name]
            cells[row][column] = "g"
            self.eval_env = gymnasium.make(env, maze_map=cells, **options)
        self.q_values: dict[bytes, np.ndarray] = {}

    def rollout(self, seeds: np.random.SeedSequence) -> Rows:
        """POINT_TRAJECTORY transitions, with many episodes on the way."""
        rng = np.random.default_rng(seeds)
        seed = int(seeds.generate_state(1)[0])
        observation, _ = self.env.reset(seed=seed)
        act, steps = self.policy(seed), []
        while len(steps) < POINT_TRAJECTORY:
            now = observation | {"desired_goal": self.env.unwrapped.goal}
            action = noisy(act(now), self.noise, rng)
            next_observation, reward, _, _, info = self.env.step(action)
            arrays = {f"observations/{key}": value for key, value in observation.items()}
            arrays |= {f"next/{key}": value for key, value in next_observation.items()}
            ends = {"terminals": False, "timeouts": info["success"]}
            steps.append({**arrays, "actions": action, "rewards": reward, **ends})
            observation = next_observation
        steps[-1]["timeouts"] = True
        return {name: np.array([step[name] for step in steps]) for name in steps[0]}

    def policy(self, seed: int) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
        """The controller as a function of Minari's observations."""
        from d4rl.pointmaze.waypoint_controller import WaypointController, q_iteration

        np.random.seed(seed)  # the controller's own source of randomness
        marks = {1: "#", 0: "O"}
        rows = ("".join(marks[cell] for cell in row) for row in self.maze.maze_map)
        controller = WaypointController("\\".join(rows))
        search = self._once_per_target(q_iteration.q_iteration)

        def cell(xy: np.ndarray) -> np.ndarray:
            return np.array([self.maze.y_map_center - xy[1], xy[0] + self.maze.x_map_center]) - 0.5

        def act(observation: dict[str, np.ndarray]) -> np.ndarray:
            here, goal = cell(observation["achieved_goal"]), cell(observation["desired_goal"])
            velocity = observation["observation"][2:]
            with mock.patch.object(q_iteration, "q_iteration", search):
                action, _ = controller.get_action(here, velocity[::-1] * (-1, 1), goal)
            return np.array([action[1], -action[0]], np.float32)

        return act


# ------------------------------------------------------------------------------------ OGBench


class OGBench:
    """One of OGBench's environments, in which its oracles act without an end at the goal."""

    layout, config, packages = "npz", "ogbench", "mujoco ogbench"

    def __init__(self, task: str, length: int, **options: Any):
        from tasks.gymnasium_task import import_for, silence

        family, self.data = task.partition("-singletask")[0].rsplit("-", 1)
        gymnasium, _ = import_for(task, "ogbench")
        options |= {"terminate_at_goal": False, "max_episode_steps": length}
        with silence():
            self.env = gymnasium.make(f"{family}-v0", disable_env_checker=True, **options)
            self.env.reset()
        self.simulation = self.env.unwrapped

    def rollout(self, seeds: np.random.SeedSequence) -> Rows:
        """One recording."""
        seed = int(seeds.generate_state(1)[0])
        np.random.seed(seed)  # the oracles draw from it, and the mazes
        self.simulation.action_space.seed(seed)
        self.rng = np.random.default_rng(seeds)
        observation, info = self.begin(seed)
        steps, done = [], False
        while not done:
            action = self.act(observation, info)
            next_observation, _, _, done, info = self.env.step(action)
            steps.append((observation, action, info["prev_qpos"], info["prev_qvel"]))
            observation = next_observation
        names = "observations", "actions", "qpos", "qvel"
        rows = {name: np.asarray(x, np.float32) for name, x in zip(names, zip(*steps))}
        return rows | {"terminals": np.arange(len(steps)) == len(steps) - 1}


class OGBenchPoint(OGBench):
    """The maze oracle, from cell to cell."""

    noise = 0.5  # standard deviation, as in OGBench's recipe

    def __init__(self, task: str):
        super().__init__(task, length=201 if "stitch" in task else 1001)
        walls = self.simulation.maze_map == 1
        self.cells = [tuple(cell) for cell in np.argwhere(~walls).tolist()]
        self.turnings = [(i, j) for i, j in self.cells if not self._is_hallway(walls, i, j)]

    def begin(self, seed: int) -> tuple[np.ndarray, dict]:
        start, ends = self._pick(self.cells), self.turnings
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
        across, along = walls[[i - 1, i + 1], j], walls[i, [j - 1, j + 1]]
        return across.all() and not along.any() or along.all() and not across.any()


class OGBenchCubes(OGBench):
    """The cube oracles, from one random target to the next."""

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


# --------------------------------------------------------------------------------------- door


class Door:
    """Human demonstrations of opening a door, replayed."""

    noise = 0.0
    layout, config, packages = "hdf5", "adroit", "d4rl"

    def __init__(self, task: str, demonstrations: list[dict[str, Any]], seed: int):
        import tasks  # and torch, seconds that other recipes need not wait for

        self.demonstrations = demonstrations
        self.task = tasks.make(task)
        self.hand = self.task.env.unwrapped

    def rollout(self, seeds: np.random.SeedSequence) -> Rows | None:
        """The demonstration of that number; None after the last."""
        number = seeds.entropy[-1]
        if number >= len(self.demonstrations):
            return None
        actions = self.demonstrations[number]["actions"]
        self.task.reset(0)  # or the solver would start from the last rollout's forces
        self.hand.set_env_state(self.demonstrations[number]["init_state_dict"])
        return self.play(self.hand.get_obs(), lambda step, _: actions[step], len(actions))

    def play(self, observation: np.ndarray, act: Callable, n_steps: int) -> Rows:
        """At most `n_steps` of `act(step, observation)`, from the simulator's present state."""
        steps, states = [], []
        for step in range(n_steps):
            states.append(self.hand.get_env_state())
            action = act(step, observation).clip(-1, 1).astype(np.float32)  # as the door does
            next_observation, reward, terminal, _, _ = self.task.step(action)
            steps.append(Step(observation, action, reward, terminal, False))
            observation = next_observation
            if terminal:
                break
        steps[-1] = steps[-1]._replace(timeout=not terminal)
        infos = {f"infos/{name}": np.array([s[name] for s in states]) for name in states[0]}
        return stack(steps) | infos


class BinaryDoor(Door):
    """The demonstrations up to the goal, then rollouts of a policy cloned from all of them.

    Those that do not reach the goal have no rows.
    """

    config, packages = "adroit_binary", "d4rl torch"

    def __init__(self, task: str, demonstrations: list[dict[str, Any]], seed: int):
        super().__init__(task, demonstrations, seed)
        self.policy = clone(demonstrations, seed)

    def rollout(self, seeds: np.random.SeedSequence) -> Rows | None:
        rows, number = super().rollout(seeds), seeds.entropy[-1]
        if rows is not None or number >= len(self.demonstrations) + CLONE_ROLLOUTS:
            return rows
        observation = self.task.reset(int(seeds.generate_state(1)[0]))
        limit = self.task.max_episode_steps
        return self.play(observation, lambda _, observation: self.policy(observation), limit)

    def play(self, observation: np.ndarray, act: Callable, n_steps: int) -> Rows:
        rows = super().play(observation, act, n_steps)
        return rows if rows["terminals"][-1] else {}


def read_demonstrations(path: Path) -> list[dict[str, Any]]:
    """The episodes in hand_dapg's file; raises ValueError where it is not that of the door."""
    from runs.errors import InputError
    from tasks.adroit import unpickle

    state = frozenset(("qpos", "qvel", "door_body_pos"))
    try:
        demonstrations = unpickle(path)
        kinds = {
            (
                frozenset(one["init_state_dict"]),
                one["observations"].shape[1],
                one["actions"].shape[1],
            )
            for one in demonstrations
        }
    except InputError as error:
        raise ValueError(error) from None
    except (LookupError, TypeError, AttributeError):
        kinds = set()
    if kinds != {(state, 39, 28)}:
        raise ValueError(f"{path} has no demonstrations of opening a door, expected hand_dapg's")
    return demonstrations


def clone(demonstrations: list[dict[str, Any]], seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """A policy that acts as the demonstrations do, by least squares.

    It learns from noisy observations, so that it finds back where it strays from their paths.
    """
    import torch
    from torch import nn

    observations = np.concatenate([d["observations"] for d in demonstrations])
    actions = np.concatenate([d["actions"] for d in demonstrations]).clip(-1, 1)
    mean, std = observations.mean(0), observations.std(0) + 1e-3

    def scaled(observation: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((observation - mean) / std).float()

    torch.manual_seed(seed)
    inputs, outputs = scaled(observations), torch.from_numpy(actions).float()
    layers = [nn.Linear(inputs.shape[1], 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(256, outputs.shape[1]), nn.Tanh())
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, CLONE_UPDATES)
    for _ in range(CLONE_UPDATES):
        rows = torch.randint(len(inputs), (256,))
        noisy_inputs = inputs[rows] + CLONE_NOISE * torch.randn(256, inputs.shape[1])
        optimizer.zero_grad()
        nn.functional.mse_loss(network(noisy_inputs), outputs[rows]).backward()
        optimizer.step()
        decay.step()
    return torch.no_grad()(lambda observation: network(scaled(observation)).numpy())


# ------------------------------------------------------------------------------- all the tasks

ANT_MAZES = "umaze umaze-diverse medium-play medium-diverse large-play large-diverse"
OGBENCH_POINT_MAZES = "medium large giant teleport"
RECIPES = {f"maze2d-{maze}-v1": PointMaze for maze in ("umaze", "medium", "large")}
RECIPES |= {f"antmaze-{maze}-v2": AntMaze for maze in ANT_MAZES.split()}
RECIPES |= {f"D4RL/pointmaze/{maze}-v2": MinariPoint for maze in MinariPoint.goals}
for data in ("navigate", "stitch"):
    names = (f"pointmaze-{maze}-{data}-singletask-v0" for maze in OGBENCH_POINT_MAZES.split())
    RECIPES |= dict.fromkeys(names, OGBenchPoint)
for data in ("play", "noisy"):
    names = (f"cube-{cubes}-{data}-singletask-v0" for cubes in OGBenchCubes.stacking)
    RECIPES |= dict.fromkeys(names, OGBenchCubes)
RECIPES |= {"door-human-v1": Door, "door-binary-v0": BinaryDoor}


def recipe_of(task: str) -> Any:
    """The class in RECIPES for that task; OGBench's task1 to task5 share their data."""
    return RECIPES.get(re.sub("-task[1-5]-", "-", task))


_recipe: Any  # one in each worker process
_stopped = threading.Event()  # set by a signal to the parent process


def _start_worker(task: str, *options: Any) -> None:
    global _recipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers,
    threading.Thread(target=_end_with_parent, daemon=True).start()  # even when it is killed
    _recipe = recipe_of(task)(task, *options)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _rollout(seed: int, index: int) -> Rows | None:
    return _recipe.rollout(np.random.SeedSequence((seed, index)))


def rollouts(
    task: str, seed: int, workers: int, demonstrations: Path | None = None
) -> Iterator[Rows]:
    """Yield the rollouts 0, 1, 2, ... of `task` from `workers` processes.

    There is no end to them, unless they are made from `demonstrations`.
    """
    for library in ("OMP", "OPENBLAS", "MKL"):  # the workers' matrices are too small for threads
        os.environ[f"{library}_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    options = (read_demonstrations(demonstrations), seed) if demonstrations else ()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (task, *options))
    pending = deque()
    try:
        for index in count():
            pending.append(pool.submit(_rollout, seed, index))
            if len(pending) == 2 * workers:
                if (rows := pending.popleft().result()) is None:
                    return
                yield rows
    finally:
        pool.shutdown(cancel_futures=True)


def to_hdf5(path: Path, rows: Rows, about: dict[str, Any]) -> None:
    """Write a file in D4RL's layout, in memory first, because HDF5 crashes on a full disk."""
    rows["timeouts"][-1] = not rows["terminals"][-1]
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        for name, array in rows.items():
            file.create_dataset(name, data=array, compression="gzip", shuffle=True)
        # Attributes, because D4RL's `sequence_dataset` takes every array for one of transitions.
        file.create_group("metadata").attrs.update(about)
    path.write_bytes(image.getbuffer())


def to_npz(path: Path, rows: Rows, about: dict[str, Any]) -> None:
    """Write a file in OGBench's layout, and with `about` as JSON, which OGBench overlooks."""
    rows["terminals"][-1] = True
    image = io.BytesIO()
    np.savez_compressed(image, **rows, metadata=json.dumps(about))
    path.write_bytes(image.getbuffer())


def to_minari(path: Path, rows: Rows, about: dict[str, Any]) -> None:
    """Write the folder of a Minari dataset, with an episode up to each timeout."""
    from tasks.gymnasium_task import import_for, making_environment

    task = about["task"]
    _, minari = import_for(task, "minari")
    recipe, episodes = recipe_of(task)(task), []
    rows["timeouts"][-1] = True
    starts = np.flatnonzero(np.r_[True, rows["timeouts"][:-1]])
    for part in np.split(np.arange(len(rows["timeouts"])), starts[1:]):
        observations = {
            key: np.append(rows[f"observations/{key}"][part], rows[f"next/{key}"][part[-1:]], 0)
            for key in recipe.env.observation_space
        }
        columns = {
            "actions": rows["actions"][part],
            "rewards": rows["rewards"][part],
            "terminations": rows["terminals"][part],
            "truncations": rows["timeouts"][part],
        }
        buffer = minari.data_collector.episode_buffer.EpisodeBuffer
        episodes.append(buffer(observations=observations, **columns))
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".minari-") as root,
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


LAYOUTS = {"hdf5": to_hdf5, "npz": to_npz, "minari": to_minari}


def write_dataset(
    path: Path,
    task: str,
    transitions: int,
    seed: int,
    workers: int,
    demonstrations: Path | None = None,
) -> int:
    """Write a dataset of `task` to `path`, all at once when it is whole.

    Returns how many rollouts were left out. Raises OSError where that fails, and KeyboardInterrupt
    after a signal.
    """
    recipe, parts, missing, left_out = recipe_of(task), [], transitions, 0
    with tqdm(total=None if demonstrations else transitions, mininterval=1, unit="row") as bar:
        for rows in rollouts(task, seed, workers, demonstrations):
            if _stopped.is_set():
                raise KeyboardInterrupt
            if not rows:
                left_out += 1
                continue
            parts.append({name: array[:missing] for name, array in rows.items()})
            size = len(parts[-1]["terminals"])
            missing -= size
            bar.update(size)
            if missing == 0:
                break
    if not parts:
        raise OSError("no rollout reaches the goal")
    source = f" --demonstrations {demonstrations.name}" if demonstrations else ""
    about = dict(
        command=f"tools/make_dataset.py {task} --transitions {transitions} --seed {seed}{source}",
        recipe=__doc__,
        task=task,
        seed=seed,
        action_noise=recipe.noise,
        physics=d4rl_compat.PHYSICS,
        numpy=np.__version__,
    )
    about |= {name: importlib.metadata.version(name) for name in recipe.packages.split()}
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        LAYOUTS[recipe.layout](part, rows, about)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return left_out


def summary(path: Path, name: str) -> str:
    """What the training script finds in the finished file, and the command line that does so."""
    import tasks

    data = path.parents[name.count("/")] if "/" in name else path  # of Minari's, the root folder
    task, recipe = tasks.make(name, data), recipe_of(name)
    rows = task.rows(path)
    ends = rows["truncations"] if recipe.layout == "minari" else rows["timeouts"]
    ends = ends | (rows["terminals"] & (recipe.layout == "hdf5"))
    size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    starts = np.flatnonzero(np.r_[True, ends[:-1]])
    goal = "the rewards are dense"
    if task.failure_reward is not None:
        solved = np.maximum.reduceat(rows["rewards"], starts) > task.failure_reward
        goal = f"{np.mean(solved):.1%} of them reach the task's goal"
    return (
        f"{path}: {len(ends):,} transitions, {size / 1e6:.1f} MB\n"
        f"{len(starts):,} episodes, {len(ends) / len(starts):.0f} transitions long on average; "
        f"{goal}\n"
        f"Train on it: python cal_ql.py --config_path configs/{recipe.config}.yaml --env {name} "
        f"--dataset_path {shlex.quote(str(data))}"
    )


# -------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """Not that of command_line.py, which imports torch, as each worker would once more."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_arguments() -> argparse.Namespace:
    """The command line; bad input ends the program with one line and status 2."""
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("task", help=f"one of {', '.join(RECIPES)}")
    option = parser.add_argument
    option("--transitions", type=int, default=1_000_000, metavar="N", help="default: 1000000")
    option("--seed", type=int, default=0, metavar="S", help="default: 0")
    option("--output", type=Path, metavar="PATH", help="default: datasets/TASK-N-seedS.SUFFIX")
    option("--demonstrations", type=Path, metavar="PATH", help="hand_dapg's door-v0_demos.pickle")
    option("--workers", type=int, default=os.cpu_count() or 1, help="default: one per core")
    args = parser.parse_args()
    if not (recipe := recipe_of(args.task)):
        parser.error(f"no recipe for {args.task!r}; there is one for {', '.join(RECIPES)}")
    for name, least, most in (
        ("transitions", 1, 2**40),
        ("seed", 0, 2**32 - 1),
        ("workers", 1, 999),
    ):
        if not least <= getattr(args, name) <= most:
            parser.error(f"--{name} must be {least} to {most}, not {getattr(args, name)}")
    if args.output is None:
        size = "" if args.demonstrations else f"-{args.transitions}"
        name = f"{args.task}{size}-seed{args.seed}.{recipe.layout}"
        name = "minari" if recipe.layout == "minari" else name
        args.output = Path(os.path.relpath(ROOT / "datasets" / name))
    if not args.output.parent.is_dir():
        parser.error(f"there is no directory {args.output.parent}")
    if not os.access(args.output.parent, os.W_OK):
        parser.error(f"cannot write to {args.output.parent}")
    args.path = args.output / args.task if recipe.layout == "minari" else args.output
    if args.path.exists():
        parser.error(f"{args.path} exists; choose another --output")
    if recipe is AntMaze and not WALKER.is_file():
        parser.error(f"{WALKER}, the ant's walking policy, is missing")
    if issubclass(recipe, Door) != bool(args.demonstrations):
        needed = "needs" if issubclass(recipe, Door) else "takes no"
        parser.error(f"{args.task} {needed} --demonstrations; see --help")
    if args.demonstrations:
        try:
            read_demonstrations(args.demonstrations)
        except ValueError as error:
            parser.error(f"--demonstrations: {error}")
    return args


def main() -> int:
    args = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):  # an exception could be lost in a destructor
        signal.signal(number, lambda *_: _stopped.set())
    try:
        args.path.parent.mkdir(parents=True, exist_ok=True)
        how_much = args.transitions, args.seed, args.workers, args.demonstrations
        left_out = write_dataset(args.path, args.task, *how_much)
    except KeyboardInterrupt:
        print("interrupted; nothing was saved", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"cannot write {args.output}: {error}", file=sys.stderr)
        return 1
    print(summary(args.path, args.task))
    if left_out:
        print(f"Left out: {left_out} rollouts that did not reach the goal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
