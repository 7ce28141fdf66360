"""Record hopper and walker2d under MuJoCo 2.3.3, the last with global coordinates.

Plays gym's own classes with gym's original model files, and writes old_mujoco.npz beside this file,
which test_d4rl_compat.py replays under today's MuJoCo. It was made once, by

    python -m venv old && old/bin/pip install mujoco==2.3.3 gym==0.23.1
    old/bin/python tests/record_old_mujoco.py

20 episodes of 50 steps with uniformly random actions for each body; gym's `done` ends none of them.
Of the model files only the feet's places differ: they read "0.13/2" and "0.2/2", which MuJoCo 2.1
let pass and 2.3.3 does not. Nothing of this repository runs here.
"""

import sys
import types
from collections import namedtuple
from pathlib import Path

import mujoco
import numpy as np

EPISODES = 20
STEPS = 50


def load_model(path):
    text = Path(path).read_text()
    return mujoco.MjModel.from_xml_string(text.replace("0.13/2", "0.065").replace("0.2/2", "0.1"))


class Sim:
    def __init__(self, model):
        self.model = model
        self.data = mujoco.MjData(model)

    def step(self):
        mujoco.mj_step(self.model, self.data)

    def forward(self):
        mujoco.mj_forward(self.model, self.data)

    def reset(self):
        mujoco.mj_resetData(self.model, self.data)

    def get_state(self):
        return State(self.data.time, self.data.qpos.copy(), self.data.qvel.copy(), None, None)

    def set_state(self, state):
        self.data.time = state.time
        self.data.qpos[:] = state.qpos
        self.data.qvel[:] = state.qvel


State = namedtuple("State", "time qpos qvel act udd_state")


def record(env, rng):
    """Arrays with [episode, step, ...]; qpos and qvel of the first state, [episode, ...]."""
    columns = {name: [] for name in ("qpos", "qvel", "actions", "observations", "rewards", "dones")}
    for _ in range(EPISODES):
        env.reset()
        columns["qpos"].append(env.sim.data.qpos.copy())
        columns["qvel"].append(env.sim.data.qvel.copy())
        actions = rng.uniform(-1, 1, (STEPS, *env.action_space.shape)).astype(np.float32)
        steps = [env.step(action.astype(float))[:3] for action in actions]
        observations, rewards, dones = zip(*steps)
        columns["actions"].append(actions)
        columns["observations"].append(observations)
        columns["rewards"].append(rewards)
        columns["dones"].append(dones)
    return {name: np.array(values) for name, values in columns.items()}


def main():
    assert mujoco.__version__ == "2.3.3", mujoco.__version__
    mujoco_py = types.ModuleType("mujoco_py")
    mujoco_py.load_model_from_path = load_model
    mujoco_py.MjSim, mujoco_py.MjSimState = Sim, State
    sys.modules["mujoco_py"] = mujoco_py
    from gym.envs.mujoco import HopperEnv, Walker2dEnv
    from gym.utils import seeding

    arrays = {}
    for name, make in (("hopper", HopperEnv), ("walker2d", Walker2dEnv)):
        env = make()
        env.np_random, _ = seeding.np_random(0)
        for key, values in record(env, np.random.default_rng(0)).items():
            arrays[f"{name}/{key}"] = values
    np.savez_compressed(Path(__file__).with_name("old_mujoco.npz"), **arrays)


if __name__ == "__main__":
    main()
