"""Your own task: gymnasium's Pendulum, and data of random actions in an .npz file.

    python examples/own_task.py --env Pendulum-v1 --dataset_path pendulum.npz --device cpu

It makes the file first. It needs `pip install gymnasium`.
"""

import sys
from pathlib import Path

import gymnasium
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cal_ql
import tasks
from runs.errors import run_program
from tasks.files import read_npz
from tasks.gymnasium_task import GymnasiumTask
from tasks.task import check_rows

DATA = Path("pendulum.npz")


class Pendulum(GymnasiumTask):
    has_goal = False  # the score is the return

    def __init__(self, name: str, dataset_path: str | None = None):
        super().__init__(name, gymnasium.make("Pendulum-v1"))

    def rows(self, path: Path) -> dict[str, np.ndarray]:
        return check_rows(read_npz(path), self, path)


def random_rows(task: Pendulum, n_episodes: int = 10) -> dict[str, np.ndarray]:
    """Episodes of uniformly random actions, a row per step."""
    rng = np.random.default_rng(0)
    rows = {name: [] for name in ("observations", "actions", "rewards", "terminals", "timeouts")}
    for seed in range(n_episodes):
        observation, is_last = task.reset(seed), False
        while not is_last:
            action = rng.uniform(-1.0, 1.0, task.action_dim)
            step = task.step(action)
            is_last = step.terminal or step.truncated
            scaled = action * task.action_scale
            values = observation, scaled, step.reward, step.terminal, step.truncated
            for column, value in zip(rows.values(), values):
                column.append(value)
            observation = step.observation
    return {name: np.array(column) for name, column in rows.items()}


tasks.make = Pendulum

if __name__ == "__main__":
    if not DATA.exists():
        np.savez(DATA, **random_rows(Pendulum("Pendulum-v1")))
    sys.exit(run_program(cal_ql.main, "own_task.py", goes_on=True))
