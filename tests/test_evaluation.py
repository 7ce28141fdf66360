"""Evaluation: the same episodes for any number of processes, and one line for every error."""

import _multiprocessing
import errno
import functools
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import tasks
from cal_ql import (
    Actor,
    Config,
    Episode,
    Scaling,
    episode_seed,
    play_episode,
)
from helpers import RUN, start_run, wait_until
from runs.errors import RunError
from runs.workers import Workers

MAZE = "maze2d-umaze-v1"
N = 4
make_maze = functools.partial(tasks.make, MAZE)
SCALING = Scaling(np.full(4, 0.5, np.float32), np.full(4, 2.0, np.float32), 1.0, 0.0)


@pytest.fixture(scope="module")
def actor() -> Actor:
    torch.manual_seed(0)
    actor = Actor(4, 2, Config(hidden_dim=16))
    actor.layers[-1].weight.data *= 100  # so that it moves
    return actor


def played_by(actor: Actor, scaling: Scaling = SCALING) -> functools.partial:
    return functools.partial(play_episode, actor=actor, scaling=scaling, explore=False)


def assert_same(found: list[Episode], expected: list[Episode]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one[2:] == other[2:]
        np.testing.assert_array_equal(one.observations, other.observations)
        np.testing.assert_array_equal(one.actions, other.actions)


def test_policies_play_in_float32_whatever_the_precision_of_updates():
    task = tasks.make(MAZE)
    actor = Actor(4, 2, Config())  # layers of the size at which products are rounded
    expected = play_episode(task, 0, actor, SCALING, explore=True)
    products = torch.backends.mkldnn.matmul
    seen = set()
    actor.register_forward_hook(lambda *args: seen.add(products.fp32_precision))
    torch.set_float32_matmul_precision("medium")  # as bf16 does
    assert_same([play_episode(task, 0, actor, SCALING, explore=True)], [expected])
    assert seen == {"ieee"} and products.fp32_precision == "bf16"


def test_episodes_are_the_same_in_any_number_of_processes_and_order(actor):
    task = tasks.make(MAZE)
    seeds = [episode_seed(4, "eval", number) for number in range(N)]
    played = {s: play_episode(task, s, actor, SCALING, explore=False) for s in reversed(seeds)}
    expected = [played[seed] for seed in seeds]
    assert len({episode.score for episode in expected}) > 1
    for workers in (1, 2):
        pool = Workers(workers, N, task, make_maze)
        for _ in range(2):
            assert_same(pool.map(played_by(actor), seeds), expected)
        assert len(multiprocessing.active_children()) == (workers if workers > 1 else 0)
        pool.close()
        assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "cores, quota, option, n_episodes, workers",
    [
        (2, None, None, 10, 2),
        (64, None, None, 10, 8),
        (64, 1.5, None, 10, 2),
        (64, None, None, 5, 5),
        (2, None, 3, 10, 3),
        (2, None, 3, 1, 1),
    ],
)
def test_the_number_of_workers(cores, quota, option, n_episodes, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("runs.machine.core_limit", lambda: quota or math.inf)
    assert Workers(option, n_episodes, None, make_maze).count == workers


def test_failures_of_workers_end_an_evaluation_in_one_line(actor):
    workers, seeds = Workers(2, 2, None, make_maze), [0, 1]
    wrong = Scaling(np.zeros(3, np.float32), np.ones(1, np.float32), 1.0, 0.0)  # sizes disagree
    with pytest.raises(RunError, match="step 0 of the episode with seed"):
        workers.map(played_by(actor, wrong), seeds)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGTERM)  # which workers ignore
    assert len(workers.map(played_by(actor), seeds)) == 2
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RunError, match="evaluation episodes has died"):
        workers.map(played_by(actor), seeds)
    workers.close()


def test_a_task_that_a_worker_cannot_make_is_named_as_it_is(actor, capfd):
    workers = Workers(2, 2, None, functools.partial(tasks.make, "maze2d-umase-v1"))
    with pytest.raises(RunError, match="cannot start: env: D4RL has no task 'maze2d-umase-v1'"):
        workers.map(played_by(actor), [0, 1])
    workers.close()
    assert "Traceback" not in capfd.readouterr().err


def test_without_shared_memory_one_process_plays(actor, monkeypatch, capsys):
    def refuse(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system", "/dev/shm")

    monkeypatch.setattr(_multiprocessing, "SemLock", refuse)
    workers = Workers(2, 2, tasks.make(MAZE), make_maze)
    assert len(workers.map(played_by(actor), [0, 1])) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("eval_workers: ") and "/dev/shm" in line


def group_members(leader: int) -> list[str]:
    """Command lines of the live processes in the group of that leader."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state != "Z":
                found.append((stat.parent / "cmdline").read_text())
        except OSError:  # it has just ended
            continue
    return found


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)],
    ids=["SIGTERM to the group", "SIGINT to the group", "SIGKILL to the parent"],
)
def test_a_signal_while_workers_start_leaves_none_behind(signum, code, tmp_path):
    options = [*RUN, "--eval_workers", 2, "--n_episodes", 2]
    process = start_run(tmp_path, *options, start_new_session=True)
    wait_until(
        process, lambda: sum("spawn_main" in line for line in group_members(process.pid)) == 2
    )
    (os.kill if signum == signal.SIGKILL else os.killpg)(process.pid, signum)
    assert process.wait() == code
    until = time.monotonic() + 600
    while left := group_members(process.pid):
        if time.monotonic() > until:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(left)
        time.sleep(0.05)
    _, error = process.communicate()
    if signum != signal.SIGKILL:
        assert "Traceback" not in error
        (line,) = [line for line in error.splitlines() if line.startswith("cal_ql.py: ")]
        assert line.startswith(f"cal_ql.py: stopped: by {signal.Signals(signum).name}")
        assert list(tmp_path.glob("*/checkpoint_0.pt"))
