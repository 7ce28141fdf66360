"""Opening a door: human demonstrations are replayed, and a policy cloned from them is played."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tasks
from runs.errors import InputError, check_regular
from tasks.adroit import unpickle
from tools.recipes.common import Recipe, Row, Rows, stack
from tools.recipes.writing import write_hdf5

CLONE_UPDATES = 4_000
CLONE_NOISE = 0.1  # in standard deviations of the observations
CLONE_ROLLOUTS = 500


class Door(Recipe):
    """Each demonstration, replayed from its first state."""

    layout = "hdf5"
    write = staticmethod(write_hdf5)
    config = "adroit"
    noise = 0.0
    packages = ("d4rl",)
    needs_demonstrations = True

    def __init__(self, task: str, demonstrations: list[dict[str, Any]], seed: int):
        self.demonstrations = demonstrations
        self.task = tasks.make(task)
        self.hand = self.task.env.unwrapped

    def rollout(self, seeds: np.random.SeedSequence) -> Rows | None:
        """The demonstration with this number; None after the last."""
        number = seeds.entropy[-1]
        if number >= len(self.demonstrations):
            return None
        actions = self.demonstrations[number]["actions"]
        self.task.reset(0)  # or the solver would start from the last rollout's forces
        self.hand.set_env_state(self.demonstrations[number]["init_state_dict"])
        return self.play(self.hand.get_obs(), lambda step, _: actions[step], len(actions))

    def play(self, observation: np.ndarray, act: Callable, n_steps: int) -> Rows:
        """At most `n_steps` of `act(step, observation)`, from the simulator's current state."""
        rows = []
        states = []
        for number in range(n_steps):
            states.append(self.hand.get_env_state())
            # clipped as the door's environment does
            action = act(number, observation).clip(-1, 1).astype(np.float32)
            step = self.task.step(action)
            rows.append(Row(observation, action, step.reward, step.terminal, False))
            observation = step.observation
            if step.terminal:
                break
        rows[-1] = rows[-1]._replace(timeout=not rows[-1].terminal)
        infos = {f"infos/{name}": np.array([s[name] for s in states]) for name in states[0]}
        return stack(rows) | infos


class BinaryDoor(Door):
    """The demonstrations up to the goal, then rollouts of a policy cloned from all of them.

    Rollouts that do not reach the goal have no rows.
    """

    config = "adroit_binary"
    packages = ("d4rl", "torch")

    def __init__(self, task: str, demonstrations: list[dict[str, Any]], seed: int):
        super().__init__(task, demonstrations, seed)
        self.policy = clone(demonstrations, seed)

    def rollout(self, seeds: np.random.SeedSequence) -> Rows | None:
        rows = super().rollout(seeds)
        if rows is not None or seeds.entropy[-1] >= len(self.demonstrations) + CLONE_ROLLOUTS:
            return rows
        observation = self.task.reset(int(seeds.generate_state(1)[0]))
        limit = self.task.max_episode_steps
        return self.play(observation, lambda _, observation: self.policy(observation), limit)

    def play(self, observation: np.ndarray, act: Callable, n_steps: int) -> Rows:
        rows = super().play(observation, act, n_steps)
        return rows if rows["terminals"][-1] else {}


STATE = {"qpos": 30, "qvel": 30, "door_body_pos": 3}  # sizes of the simulator's state


def read_demonstrations(path: Path) -> list[dict[str, Any]]:
    """The episodes in hand_dapg's file; raises `InputError` if they are not of the door."""
    check_regular(path)
    demonstrations = unpickle(path)
    try:
        good = len(demonstrations) > 0 and all(map(is_demonstration, demonstrations))
    except (LookupError, TypeError, ValueError, AttributeError):
        good = False
    if not good:
        raise InputError(f"{path} has no demonstrations of opening a door, expected hand_dapg's")
    return demonstrations


def is_demonstration(episode: dict[str, Any]) -> bool:
    """Whether its arrays have the door's sizes and finite numbers; may raise if they do not."""
    state = episode["init_state_dict"]
    n = len(episode["actions"])
    shapes = {"observations": (n, 39), "actions": (n, 28)}
    arrays = [(episode[name], shape) for name, shape in shapes.items()]
    arrays += [(state[name], (size,)) for name, size in STATE.items()]
    fits = all(array.shape == shape and np.isfinite(array).all() for array, shape in arrays)
    return n > 0 and set(state) == set(STATE) and fits


def clone(demonstrations: list[dict[str, Any]], seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """A policy that imitates the demonstrations, by least squares.

    It learns from noisy observations, so that it returns when it strays from their paths.
    """
    import torch  # here, since it takes seconds and other recipes do not need it
    from torch import nn

    observations = np.concatenate([d["observations"] for d in demonstrations])
    actions = np.concatenate([d["actions"] for d in demonstrations]).clip(-1, 1)
    mean = observations.mean(0)
    std = observations.std(0) + 1e-3

    def scaled(observation: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((observation - mean) / std).float()

    torch.manual_seed(seed)
    inputs = scaled(observations)
    outputs = torch.from_numpy(actions).float()
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
