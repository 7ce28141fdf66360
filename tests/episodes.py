"""Episodes of tasks as hashes, here and in another process, which imports no torch for it."""

import contextlib
import hashlib
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Optional

import numpy as np

import tasks

Hashes = dict[tuple[str, int], set[str]]  # of all episodes played, by name and seed


def hash_episodes(names: list[str], seeds: list[int], root: Optional[Path] = None) -> Hashes:
    """Play 30 random steps of each task and seed, one after the other."""
    found: Hashes = {}
    for name in names:
        task = tasks.make(name, root and str(root))
        for seed in seeds:
            found.setdefault((name, seed), set()).add(hash_episode(task, seed))
    return found


def hash_episode(task: tasks.Task, seed: int) -> str:
    """A hash of everything that an episode returns, and of the simulator's state at its start."""
    digest = hashlib.sha256(task.reset(seed).tobytes())
    data = getattr(task.env.unwrapped, "data", None)
    if data is not None:
        digest.update(data.qacc_warmstart.tobytes())
    actions = np.random.default_rng(seed).uniform(-1, 1, (30, task.action_dim))
    for action in actions.astype(np.float32):
        observation, *rest = task.step(action)
        digest.update(observation.tobytes() + repr(rest).encode())
    return digest.hexdigest()


def hashes_elsewhere(names: list[str], seeds: list[int], root: Optional[Path] = None) -> Hashes:
    """`hash_episodes` in a separate process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(hash_episodes, names, seeds, root).result()


@contextlib.contextmanager
def denormal_numbers() -> Iterator[None]:
    """Keep denormal numbers, which cal_ql.py flushes to 0: that changes the last bits."""
    torch = sys.modules["torch"]
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)


def check_episodes(names: list[str], root: Optional[Path] = None) -> None:
    """An episode only depends on its seed and actions: in any order, and in another process."""
    with denormal_numbers():
        here = hash_episodes(names, [1, 2, 1], root)
    assert all(len(of_one) == 1 for of_one in here.values())
    assert len(set.union(*here.values())) == 2 * len(names)
    assert hashes_elsewhere(names[::-1], [2, 1], root) == here
