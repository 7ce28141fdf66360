r"""Your own data: gymnasium's Pendulum, swung up by a noisy controller, as a Minari dataset.

    python examples/own_data.py datasets/minari
    python cal_ql.py --config_path configs/quickstart.yaml --env pendulum/swing-up-v0 \
        --dataset_path datasets/minari --reward_scale 0.1 --reward_bias 1.6 \
        --offline_iterations 3000 --online_iterations 4000

The first line makes the dataset, the second trains on it; docs/own_data.md explains both.
"""

import os
import sys
from pathlib import Path

import gymnasium
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

NAME = "pendulum/swing-up-v0"


def controller(observation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Push until the energy suffices to stand upright, then hold it, with much noise."""
    cosine, sine, speed = observation
    energy = speed**2 / 6.0 + 5.0 * cosine
    swing = 2.0 * np.sign(speed * (5.0 - energy))
    torque = -8.0 * sine - 2.0 * speed if cosine > 0.9 else swing
    return np.clip([torque + rng.normal(0.0, 3.0)], -2.0, 2.0).astype(np.float32)


def record(env: gymnasium.Env, seed: int) -> dict[str, list]:
    """One episode, of T actions and T + 1 observations."""
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    columns = {"observations": [observation]}
    columns |= {name: [] for name in ("actions", "rewards", "terminations", "truncations")}
    ended = False
    while not ended:
        action = controller(observation, rng)
        observation, reward, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
        columns["observations"].append(observation)
        for name, value in zip(list(columns)[1:], (action, reward, terminated, truncated)):
            columns[name].append(value)
    return columns


def main(root: str, n_episodes: int = 100) -> None:
    folder = Path(root).resolve()  # Minari needs an absolute path
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    env = gymnasium.make("Pendulum-v1")  # the dataset stores its id, arguments and time limit
    episodes = []
    for seed in range(n_episodes):
        columns = record(env, seed)
        columns = {name: np.array(values) for name, values in columns.items()}
        episodes.append(EpisodeBuffer(id=seed, seed=seed, **columns))
    returns = [episode.rewards.sum() for episode in episodes]
    print(f"{n_episodes} episodes, returns {np.mean(returns):.0f} +- {np.std(returns):.0f}")
    # these returns score 0 and 100; without them, the score is the return
    scores = dict(ref_min_score=-1200.0, ref_max_score=-150.0)
    minari.create_dataset_from_buffers(NAME, episodes, env=env, **scores)


if __name__ == "__main__":
    main(*sys.argv[1:2])
