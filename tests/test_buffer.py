"""The online buffer against a list, and the transitions of episodes that a script plays."""

from types import SimpleNamespace

import gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tasks
from cal_ql import (
    Actor,
    Batch,
    Config,
    Dataset,
    OnlineBuffer,
    Run,
    Scaling,
    play_episode,
    to_transitions,
)
from runs.errors import RunError
from tasks import d4rl_compat

S, A = 3, 2
CPU = torch.device("cpu")


def transitions(numbers) -> Batch:
    """Numbered transitions: every entry is the transition's number."""
    numbers = np.asarray(numbers, np.float32)
    return Batch(
        observations=np.stack([numbers + 0.1 * i for i in range(S)], 1),
        actions=np.stack([-numbers - 0.1 * i for i in range(A)], 1),
        rewards=10 * numbers,
        next_observations=np.stack([numbers + 1 + 0.1 * i for i in range(S)], 1),
        terminals=numbers % 2,
        returns_to_go=numbers + 0.5,
    )


def empty_buffer(buffer_size: int, online_iterations: int = 10**6, limit: int = 50):
    task = SimpleNamespace(observation_dim=S, action_dim=A, max_episode_steps=limit)
    config = Config(buffer_size=buffer_size, online_iterations=online_iterations)
    return OnlineBuffer(config, task, CPU)


def assert_equal(found: Batch, expected: Batch) -> None:
    for one, other in zip(found, expected):
        np.testing.assert_array_equal(one, other)


@given(st.integers(1, 12), st.lists(st.integers(1, 15), min_size=1, max_size=8))
def test_ring_of_episodes(capacity, lengths):
    buffer, n = empty_buffer(capacity), 0
    ring: dict[int, int] = {}  # place: number
    for length in lengths:
        buffer.add(transitions(range(n, n + length)))
        ring |= {number % capacity: number for number in range(n, n + length)}
        n += length
        found = Batch(*(column[: len(ring)] for column in buffer.rows))
        assert_equal(found, transitions([ring[place] for place in range(len(ring))]))
    resumed = empty_buffer(capacity)
    resumed.add(transitions(range(n)))  # all at once
    assert_equal(resumed.rows, buffer.rows)
    drawn = buffer.sample(200).observations[:, 0].int().tolist()
    assert set(drawn) <= set(ring.values())


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 30), st.integers(1, 9))
def test_an_extended_run_has_the_ring_of_one_that_was_longer(size, steps, more, limit):
    """The first one only wraps at `buffer_size`."""
    short, long = (empty_buffer(size, n, limit) for n in (steps, steps + more))
    assert short.capacity == min(size, steps + limit)
    n_added = 0
    while n_added < steps:  # whole episodes, until the steps are played
        for buffer in (short, long):
            buffer.add(transitions(range(n_added, n_added + limit)))
        n_added += limit
    kept = min(n_added, size)
    for one, other in zip(short.rows, long.rows):
        np.testing.assert_array_equal(one[:kept], other[:kept])


def test_a_batch_holds_stored_transitions_alone_and_all_alike():
    torch.manual_seed(0)
    buffer = empty_buffer(100)
    buffer.add(transitions(range(1, 11)))
    batch = buffer.sample(20_000)
    numbers = batch.observations[:, 0].int()
    assert_equal(batch, transitions(numbers))
    counts = torch.bincount(numbers, minlength=11)
    assert counts[0] == 0 and len(counts) == 11
    assert torch.all((counts[1:] - 2000).abs() < 250)  # six standard deviations
    assert (numbers[1:] == numbers[:-1]).float().mean() < 0.15  # drawn one by one


@pytest.mark.parametrize(
    "batch_size, ratio, n", [(10, 0.5, 5), (7, 0.5, 3), (256, 0.25, 64), (9, 0.0, 0), (10, 0.99, 9)]
)
def test_a_mixed_batch_has_its_share_of_offline_data(batch_size, ratio, n):
    config = Config(batch_size=batch_size, mixing_ratio=ratio)
    rows = Batch(*(torch.as_tensor(column) for column in transitions(range(100))))
    offline = Dataset(rows, torch.arange(50), 1, None, None)
    online = empty_buffer(20)
    online.add(transitions(range(1000, 1020)))
    batch = Run.sample(SimpleNamespace(dataset=offline, online=online, config=config), online=True)
    assert [len(column) for column in batch] == [batch_size] * 6
    numbers = batch.observations[:, 0]
    assert (numbers < 50).sum() == n and (numbers >= 1000).sum() == batch_size - n


# ---------------------------------------------------------------------------- episodes


LIMIT = 3
MEAN, STD = np.array([1.0, 2.0], np.float32), np.array([0.5, 4.0], np.float32)
SCALING = Scaling(MEAN, STD, reward_scale=2.0, reward_bias=-1.0)


class Script(gym.Env):
    """Plays episodes of (reward, done, info); an observation counts episodes and steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-2.0, 2.0, (A,))
    spec = SimpleNamespace(max_episode_steps=LIMIT)

    def __init__(self, episodes):
        self.episodes, self.number, self.actions = episodes, -1, []

    def observe(self) -> np.ndarray:
        return np.array([self.number, self.count], np.float64)

    def reset(self):
        self.number, self.count = self.number + 1, 0
        return self.observe()

    def step(self, action):
        self.actions.append(action)
        reward, done, info = self.episodes[self.number][self.count]
        self.count += 1
        return self.observe(), reward, done, dict(info)

    def get_normalized_score(self, episode_return):
        return episode_return / 50


@pytest.fixture
def play(monkeypatch):
    """A function that plays all the episodes of a script, of at most LIMIT steps each."""

    def play(episodes, name="maze2d-test-v0", explore=True):
        script = Script(episodes)
        env = gym.wrappers.TimeLimit(script, LIMIT)
        monkeypatch.setattr(d4rl_compat, "make", lambda name: env)
        monkeypatch.setattr(d4rl_compat, "reset", lambda env, seed: env.reset())
        task, actor = tasks.make(name), Actor(2, A, Config(hidden_dim=8))
        played = [play_episode(task, n, actor, SCALING, explore) for n in range(len(episodes))]
        return script, played

    return play


STEP, GOAL = (0.0, False, {}), (1.0, False, {})
END, GOAL_END = (0.0, True, {}), (1.0, True, {})
EPISODES = [[STEP, STEP, STEP], [STEP, GOAL_END], [GOAL, STEP, END]]


@pytest.mark.parametrize("sparse", [False, True])
def test_transitions_of_episodes(play, sparse):
    script, played = play(EPISODES)
    dataset = Dataset(None, None, 0, SCALING, -1.0 if sparse else None)
    columns = zip(*(to_transitions(episode, dataset, 0.5) for episode in played))
    rows = Batch(*(np.concatenate(column) for column in columns))
    assert all(column.dtype == np.float32 for column in rows)
    states = [(e, t) for e, episode in enumerate(EPISODES) for t in range(len(episode))]
    next_states = [(e, t + 1) for e, t in states]
    np.testing.assert_allclose(rows.observations, (np.array(states) - MEAN) / STD)
    np.testing.assert_allclose(rows.next_observations, (np.array(next_states) - MEAN) / STD)
    np.testing.assert_allclose(script.actions, 2 * rows.actions)
    assert rows.rewards.tolist() == [-1, -1, -1, -1, 1, 1, -1, -1]
    # a time limit is no terminal, and an end on the last permitted step is one
    assert rows.terminals.tolist() == [0, 0, 0, 0, 1, 0, 0, 1]
    failed = [-2.0] * 3 if sparse else [-1.75, -1.5, -1.0]
    assert rows.returns_to_go.tolist() == [*failed, -0.5, 1, 0.25, -1.5, -1]
    assert [episode.success for episode in played] == [False, True, True]
    assert [episode.score for episode in played] == [0.0, 2.0, 2.0]
    assert [sum(episode.rewards) for episode in played] == [0.0, 1.0, 1.0]


def test_success_is_what_the_task_reports_where_it_does(play):
    missed = [(5.0, False, {"goal_achieved": False})] * LIMIT
    reached = [(-1.0, False, {"goal_achieved": True}), *missed[1:]]
    _, played = play([missed, reached])
    assert [episode.success for episode in played] == [False, True]


@pytest.mark.parametrize("reward", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_the_environments_failure(play, reward):
    with pytest.raises(RunError, match="at step 1 of the episode with seed 0"):
        play([[STEP, (reward, False, {})]])


def test_exploration_follows_the_episodes_seed_and_the_policys_deviation(play):
    torch.manual_seed(1)
    _, played = play([[STEP] * LIMIT] * 300)
    torch.manual_seed(1)  # of the networks' weights
    _, means = play([[STEP] * LIMIT] * 300, explore=False)
    torch.manual_seed(1)
    actor = Actor(2, A, Config(hidden_dim=8))
    standardised = []
    for explored, mean in zip(played, means):
        policy = actor(torch.from_numpy(explored.observations[:-1]))
        torch.testing.assert_close(torch.from_numpy(mean.actions), policy.mean.tanh())
        pre_tanh = torch.from_numpy(explored.actions).double().atanh()
        standardised.append((pre_tanh - policy.mean) / policy.log_std.exp())
    noise = torch.cat(standardised).detach()
    near = noise.abs().amax(1) < 4  # elsewhere tanh was rounded to 1
    assert near.float().mean() > 0.9
    assert noise[near].mean(0).abs().max() < 0.15
    assert (noise[near].std(0) - 1).abs().max() < 0.1
    assert len(set(noise[::LIMIT, 0].tolist())) > 290  # another seed, another noise
