"""Evaluation: the same episodes whoever plays them, and one line for whatever goes wrong."""

import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest
import torch

import cal_ql
from cal_ql import Agent, Config, Episode, Evaluator, Outcome, Scaling, Task, episode_seed

MAZE = "maze2d-umaze-v1"
N = 5


@pytest.fixture(scope="module")
def agent() -> Agent:
    torch.manual_seed(0)
    agent = Agent(4, 2, Config(hidden_dim=16), torch.device("cpu"))
    agent.actor.layers[-1].weight.data *= 100  # so that it moves
    return agent


@pytest.fixture
def scaling() -> Scaling:
    return Scaling(np.full(4, 0.5, np.float32), np.full(4, 2.0, np.float32), 1.0, 0.0)


def evaluate(agent: Agent, scaling: Scaling, workers: int, **options) -> list[Outcome]:
    config = Config(env=MAZE, eval_seed=4, **dict(n_episodes=N) | options, eval_workers=workers)
    evaluator = Evaluator(config)
    outcomes = evaluator.evaluate(agent, scaling, between=lambda: None)
    assert len(evaluator.workers) == min(workers, N)
    assert evaluator.evaluate(agent, scaling, between=lambda: None) == outcomes
    return outcomes


def test_episodes_played_one_by_one_are_those_played_side_by_side(agent, scaling, monkeypatch):
    task, expected = Task(MAZE), []
    observations = np.zeros((N, 4), np.float32)
    for number in range(N):
        episode = Episode(task, episode_seed(4, "eval", number))
        while not episode.over:
            observations[number] = (episode.observation - 0.5) / 2
            episode.step(agent.act(observations, explore=False)[number])
        result = sum(episode.rewards), episode.score, episode.success, len(episode.rewards)
        expected.append(Outcome(*result))
    assert len({outcome.score for outcome in expected}) > 1
    assert evaluate(agent, scaling, workers=1) == expected
    assert evaluate(agent, scaling, workers=3) == expected
    monkeypatch.setattr(cal_ql, "SIDE_BY_SIDE", 2)
    assert evaluate(agent, scaling, workers=1) == expected


def test_a_dead_worker_ends_the_run_in_one_line(agent, scaling):
    evaluator = Evaluator(Config(env=MAZE, n_episodes=2, eval_workers=2))
    others, calls = multiprocessing.active_children(), []

    def kill_one() -> None:
        calls.append(None)
        if len(calls) == 5:
            victim = next(p for p in multiprocessing.active_children() if p not in others)
            os.kill(victim.pid, signal.SIGKILL)

    with pytest.raises(cal_ql.RunError, match="evaluation episodes has died"):
        evaluator.evaluate(agent, scaling, kill_one)


def test_a_worker_hands_its_simulators_failure_on(monkeypatch):
    def fail(self, action):
        raise ValueError("the ant\nflew away")

    monkeypatch.setattr(Task, "step", fail)
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # a thread may not set one
    here, there = multiprocessing.Pipe()
    threading.Thread(target=cal_ql.work, args=(there, MAZE), daemon=True).start()
    here.send({0: 1})
    cal_ql.receive(here)
    here.send({0: np.zeros(2, np.float32)})
    with pytest.raises(cal_ql.EnvironmentFailure, match="step 0 of the episode with seed 1"):
        cal_ql.receive(here)
