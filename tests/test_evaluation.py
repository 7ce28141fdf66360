"""Evaluation: the same episodes whoever plays them, and one line for whatever goes wrong."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

import tasks
from cal_ql import (
    Actor,
    Config,
    EnvironmentFailure,
    Episode,
    Evaluator,
    Scaling,
    episode_seed,
    play_episode,
)

MAZE = "maze2d-umaze-v1"
N = 4
SCALING = Scaling(np.full(4, 0.5, np.float32), np.full(4, 2.0, np.float32), 1.0, 0.0)


@pytest.fixture(scope="module")
def actor() -> Actor:
    torch.manual_seed(0)
    actor = Actor(4, 2, Config(hidden_dim=16))
    actor.layers[-1].weight.data *= 100  # so that it moves
    return actor


def assert_same(found: list[Episode], expected: list[Episode]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one[2:] == other[2:]
        np.testing.assert_array_equal(one.observations, other.observations)
        np.testing.assert_array_equal(one.actions, other.actions)


def test_episodes_are_the_same_in_any_number_of_processes_and_order(actor):
    task = tasks.make(MAZE)
    seeds = [episode_seed(4, "eval", number) for number in range(N)]
    played = {s: play_episode(task, actor, SCALING, s, explore=False) for s in reversed(seeds)}
    expected = [played[seed] for seed in seeds]
    assert len({episode.score for episode in expected}) > 1
    for workers in (1, 2):
        config = Config(env=MAZE, eval_seed=4, n_episodes=N, eval_workers=workers)
        evaluator = Evaluator(config, task)
        for _ in range(2):
            assert_same(evaluator.evaluate(actor, SCALING), expected)
        assert len(multiprocessing.active_children()) == (workers if workers > 1 else 0)
        evaluator.close()
        assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "cores, quota, wanted, n_episodes, workers",
    [
        (2, None, None, 10, 2),
        (64, None, None, 10, 8),
        (64, "150000 100000", None, 10, 2),
        (64, "max 100000", None, 5, 5),
        (2, None, 3, 10, 3),
        (2, None, 3, 1, 1),
    ],
)
def test_the_number_of_workers(cores, quota, wanted, n_episodes, workers, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    read = {"/sys/fs/cgroup/cpu.max": quota}

    def read_text(path, *args):
        if read.get(str(path)) is None:
            raise FileNotFoundError
        return read[str(path)]

    monkeypatch.setattr("pathlib.Path.read_text", read_text)
    config = Config(env=MAZE, n_episodes=n_episodes, eval_workers=wanted)
    assert Evaluator(config, None).n_workers == workers


def test_failures_of_workers_end_an_evaluation_in_one_line(actor):
    evaluator = Evaluator(Config(env=MAZE, n_episodes=2, eval_workers=2), None)
    wrong = Scaling(np.zeros(3, np.float32), np.ones(1, np.float32), 1.0, 0.0)  # sizes disagree
    with pytest.raises(EnvironmentFailure, match="step 0 of the episode with seed"):
        evaluator.evaluate(actor, wrong)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGTERM)  # which they do not hear
    assert len(evaluator.evaluate(actor, SCALING)) == 2
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EnvironmentFailure, match="evaluation episodes has died"):
        evaluator.evaluate(actor, SCALING)
    evaluator.close()
