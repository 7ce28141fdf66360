"""D4RL's `-random-` locomotion data: uniformly random actions."""

from pathlib import Path

import numpy as np

from tasks import d4rl_compat
from tools.recipes.common import Recipe, Row, Rows, stack
from tools.recipes.writing import write_hdf5


class Random(Recipe):
    """A body that acts at random."""

    layout = "hdf5"
    write = staticmethod(write_hdf5)
    config = "locomotion"
    packages = ("d4rl",)
    description = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")

    def __init__(self, task: str):
        self.env = d4rl_compat.make(task)
        self.data = self.env.unwrapped.sim.data

    def rollout(self, seeds: np.random.SeedSequence) -> Rows:
        """One episode."""
        rng = np.random.default_rng(seeds)
        space = self.env.action_space
        log_probability = -np.log(space.high - space.low).sum()
        observation = d4rl_compat.reset(self.env, int(seeds.generate_state(1)[0]))
        rows = []
        places = []
        velocities = []
        done = False
        while not done:
            places.append(self.data.qpos.copy())
            velocities.append(self.data.qvel.copy())
            action = rng.uniform(space.low, space.high).astype(np.float32)
            next_observation, reward, done, info = self.env.step(action)
            timeout = info.get("TimeLimit.truncated", False)
            rows.append(Row(observation, action, reward, done and not timeout, timeout))
            observation = next_observation
        columns = stack(rows)
        next_observations = [*columns["observations"][1:], observation]
        return {
            **columns,
            "next_observations": np.array(next_observations, np.float32),
            "infos/action_log_probs": np.full(len(rows), log_probability, np.float32),
            "infos/qpos": np.array(places, np.float32),
            "infos/qvel": np.array(velocities, np.float32),
        }
