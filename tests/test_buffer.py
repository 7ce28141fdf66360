"""The replay buffer against a list, and the collector on episodes that a script plays."""

import math
from types import SimpleNamespace

import gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cal_ql
from cal_ql import Batch, Collector, Config, Dataset, ReplayBuffer, Scaling, Task, sample_mixed

S, A = 3, 2
CPU = torch.device("cpu")


def transitions(numbers, returns_to_go=-math.inf) -> Batch:
    """Numbered transitions: every entry tells which one it belongs to."""
    numbers = np.asarray(numbers, np.float32)
    return Batch(
        observations=np.stack([numbers + 0.1 * i for i in range(S)], 1),
        actions=np.stack([-numbers - 0.1 * i for i in range(A)], 1),
        rewards=10 * numbers,
        next_observations=np.stack([numbers + 1 + 0.1 * i for i in range(S)], 1),
        terminals=numbers % 2,
        returns_to_go=np.full(len(numbers), returns_to_go, np.float32),
    )


def full_buffer(numbers) -> ReplayBuffer:
    buffer = ReplayBuffer(len(numbers), S, A, CPU)
    buffer.add(transitions(numbers))
    return buffer


def assert_equal(found: Batch, expected: Batch) -> None:
    for one, other in zip(found, expected):
        np.testing.assert_array_equal(one, other)


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(1, 15), st.booleans()), max_size=8))
def test_ring_of_episodes(capacity, episodes):
    """Some episodes come whole, as when a run resumes; the others a transition at a time."""
    buffer = ReplayBuffer(capacity, S, A, CPU)
    stored: list[tuple[int, float]] = []  # number and return-to-go

    def check() -> None:
        ring = {place % capacity: entry for place, entry in enumerate(stored)}
        assert buffer.size == len(ring)
        entries = [ring[place] for place in range(len(ring))]
        rows = Batch(*(column[: len(ring)] for column in buffer.rows))
        assert_equal(rows, transitions(*zip(*entries)))

    for length, whole in episodes:
        numbers = range(len(stored), len(stored) + length)
        returns = np.array(numbers, np.float32) + 0.5
        if whole:
            buffer.add(transitions(numbers, returns))
        else:
            for number in numbers:
                buffer.add(transitions([number]))
                stored.append((number, -math.inf))
                check()
            buffer.fill_returns(returns)
        stored[numbers.start :] = zip(numbers, returns)
        check()


def test_a_batch_holds_stored_transitions_alone_and_all_alike():
    torch.manual_seed(0)
    buffer = ReplayBuffer(100, S, A, CPU)
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
    offline, online = full_buffer(range(100)), full_buffer(range(1000, 1020))
    batch = sample_mixed(offline, online, config)
    assert [len(column) for column in batch] == [batch_size] * 6
    numbers = batch.observations[:, 0]
    assert (numbers < 100).sum() == n and (numbers >= 1000).sum() == batch_size - n


# ---------------------------------------------------------------------------- the collector


LIMIT = 3
MEAN, STD = np.array([1.0, 2.0], np.float32), np.array([0.5, 4.0], np.float32)


class Script(gym.Env):
    """Plays episodes of (reward, done, info); an observation counts episodes and steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-2.0, 2.0, (A,))

    spec = SimpleNamespace(max_episode_steps=LIMIT)

    def __init__(self, episodes):
        self.episodes, self.number, self.seeds, self.actions = episodes, -1, [], []

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


class Explorer:
    """In place of the agent: numbered actions."""

    def __init__(self):
        self.observations = []

    def act(self, observations, explore):
        assert explore and len(observations) == 1
        self.observations.extend(observations)
        return np.full((1, A), 0.01 * len(self.observations), np.float32)


@pytest.fixture
def play(monkeypatch):
    """A function that plays a script to its end, at most LIMIT steps an episode."""

    def play(episodes, capacity=100, failure_reward=None, name="maze2d-test-v0"):
        script = Script(episodes)
        env = gym.wrappers.TimeLimit(script, LIMIT)

        def reset(env, seed):
            script.seeds.append(seed)
            return env.reset()

        monkeypatch.setattr(cal_ql.d4rl_compat, "make", lambda name: env)
        monkeypatch.setattr(cal_ql.d4rl_compat, "reset", reset)
        task = Task(name)
        scaling = Scaling(MEAN, STD, reward_scale=2.0, reward_bias=-1.0)
        dataset = Dataset(None, None, 0, scaling, failure_reward)
        buffer, stored = ReplayBuffer(capacity, 2, A, CPU), []
        collector = Collector(task, dataset, buffer, Config(discount=0.5, seed=3))
        collector.store = stored.append
        explorer = Explorer()
        records = [collector.step(explorer) for episode in episodes for _ in episode]
        return SimpleNamespace(
            script=script, explorer=explorer, buffer=buffer, stored=stored, records=records
        )

    return play


STEP, GOAL = (0.0, False, {}), (1.0, False, {})
END, GOAL_END = (0.0, True, {}), (1.0, True, {})
EPISODES = [[STEP, STEP, STEP], [STEP, GOAL_END], [GOAL, STEP, END], [STEP]]  # the last goes on


def test_stored_transitions(play):
    run = play(EPISODES)
    rows, n = run.buffer.rows, run.buffer.size
    assert n == 9
    states = [(e, t) for e, episode in enumerate(EPISODES) for t in range(len(episode))]
    following = [(e, t + 1) for e, t in states]
    np.testing.assert_allclose(rows.observations[:n], (np.array(states) - MEAN) / STD)
    np.testing.assert_allclose(rows.next_observations[:n], (np.array(following) - MEAN) / STD)
    numbers = 0.01 * np.arange(1, n + 1, dtype=np.float32)
    np.testing.assert_allclose(rows.actions[:n], np.stack([numbers, numbers], 1))
    assert rows.rewards[:n].tolist() == [-1, -1, -1, -1, 1, 1, -1, -1, -1]


def test_the_agent_sees_scaled_observations_and_the_simulator_scaled_actions(play):
    run = play(EPISODES)
    np.testing.assert_array_equal(run.explorer.observations, run.buffer.rows.observations[:9])
    assert all(observation.dtype == np.float32 for observation in run.explorer.observations)
    np.testing.assert_allclose(run.script.actions, 2 * run.buffer.rows.actions[:9])


def test_a_time_limit_is_no_terminal_and_an_end_on_the_last_step_is(play):
    assert len(EPISODES[0]) == len(EPISODES[2]) == LIMIT
    terminals = play(EPISODES).buffer.rows.terminals[:9]
    assert terminals.tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("sparse", [False, True])
def test_returns_are_filled_in_as_episodes_end(play, sparse):
    run = play(EPISODES, failure_reward=-1.0 if sparse else None)
    failed = [-2.0] * 3 if sparse else [-1.75, -1.5, -1.0]
    expected = [*failed, -0.5, 1, 0.25, -1.5, -1, -math.inf]
    assert run.buffer.rows.returns_to_go[:9].tolist() == expected


def test_returns_in_a_ring_smaller_than_an_episode(play):
    run = play(EPISODES[:3], capacity=2)
    assert run.buffer.size == 2
    # rows of the transitions numbered 6 and 7, the last two
    assert run.buffer.rows.returns_to_go.tolist() == [-1.5, -1]
    np.testing.assert_allclose(
        run.buffer.rows.observations, (np.array([[2, 1], [2, 2]]) - MEAN) / STD
    )


def test_ended_episodes_are_handed_on_whole(play):
    run = play(EPISODES)
    assert [len(rows.rewards) for rows in run.stored] == [3, 2, 3]
    for handed, kept in zip(zip(*run.stored), run.buffer.rows):
        column = np.concatenate(handed)
        assert column.dtype == np.float32
        np.testing.assert_array_equal(column, kept[:8])


def test_metrics_come_with_the_end_of_an_episode(play):
    records = play(EPISODES).records
    ended = {2: (0.0, 3, 0.0, 1.0), 4: (1.0, 2, 1.0, 1 / 2), 7: (1.0, 3, 1.0, 1 / 3)}
    for number, record in enumerate(records):
        if number not in ended:
            assert record == {}
            continue
        episode_return, length, success, regret = ended[number]
        assert record == pytest.approx(
            {
                "train/episode_return": episode_return,
                "train/d4rl_normalized_episode_return": 100 * episode_return / 50,
                "train/episode_length": length,
                "train/is_success": success,
                "train/regret": regret,
            }
        )


def test_success_is_what_the_task_reports_where_it_does(play):
    missed = [(5.0, False, {"goal_achieved": False})] * LIMIT
    reached = [(-1.0, False, {"goal_achieved": True}), *missed[1:]]
    records = [record for record in play([missed, reached]).records if record]
    assert [record["train/is_success"] for record in records] == [0.0, 1.0]


def test_kitchen_succeeds_where_it_ends_and_locomotion_has_no_success(play):
    episodes = [[GOAL] * LIMIT, [STEP, END]]
    kitchen = [record for record in play(episodes, name="kitchen-test-v0").records if record]
    assert [record["train/is_success"] for record in kitchen] == [0.0, 1.0]
    running = [record for record in play(episodes, name="halfcheetah-test-v0").records if record]
    assert len(running) == 2
    assert not {"train/is_success", "train/regret"} & running[0].keys()


def test_every_episode_has_a_seed_of_its_own(play):
    first, second = play(EPISODES).script.seeds, play(EPISODES).script.seeds
    assert first == second
    assert len(set(first)) == len(first) == len(EPISODES)
