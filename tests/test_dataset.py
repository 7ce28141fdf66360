"""Reading D4RL files: transitions against D4RL's own, returns-to-go against brute force."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import tasks
from cal_ql import Batch, Config, Dataset, Scaling, load_dataset, return_to_go
from helpers import QUICKSTART
from runs.errors import InputError
from tasks import episode_ends
from tasks.d4rl import D4RL as Task
from tasks.task import NEEDED

LIMIT, S, A = 5, 3, 2


class SmallTask(Task):
    """The attributes of a task that its data needs."""

    observation_dim, action_dim, max_episode_steps = S, A, LIMIT
    action_scale = np.ones(A, np.float32)
    is_locomotion, failure_reward = False, 0.0

    def __init__(self, **changed):
        vars(self).update(changed)


TASK = SmallTask()


@pytest.fixture(scope="session")
def maze() -> Task:
    return tasks.make("maze2d-umaze-v1")


@pytest.fixture(scope="session")
def d4rl(maze):
    """The real D4RL, which can be imported once a task has been made."""
    import d4rl

    return d4rl


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data") / "data.hdf5"


def record(episodes, columns=("next_observations", "timeouts"), sparse=True, seed=0):
    """Arrays in D4RL's layout of [(length, how it ended), ...], with random states and rewards."""
    random = np.random.default_rng(seed)
    rows = {name: [] for name in ("observations", "next_observations", "terminals", "timeouts")}
    for length, ending in episodes:
        states = random.normal(size=(length + 1, S)).astype(np.float32)
        last = np.arange(length) == length - 1
        rows["observations"].append(states[:-1])
        rows["next_observations"].append(states[1:])
        rows["terminals"].append(last & (ending == "terminal"))
        rows["timeouts"].append(last & (ending == "timeout"))
    raw = {name: np.concatenate(column) for name, column in rows.items()}
    n = len(raw["terminals"])
    raw["actions"] = random.uniform(-1, 1, (n, A)).astype(np.float32)
    rewards = random.random(n) < 0.15 if sparse else random.normal(size=n)
    raw["rewards"] = rewards.astype(np.float32)
    unused = {"next_observations", "timeouts"} - set(columns)
    return {name: column for name, column in raw.items() if name not in unused}


def write(path: Path, raw: dict[str, np.ndarray]) -> str:
    with h5py.File(path, "w") as file:
        for name, column in raw.items():
            file[name] = column
    return str(path)


def load(path: Path, raw: dict[str, np.ndarray], task=TASK, **options) -> Dataset:
    config = Config(**dict(normalize=False) | options)
    return load_dataset(config, task, Path(write(path, raw)), torch.device("cpu"), {})


def transitions(dataset: Dataset) -> Batch:
    """All that can be drawn from this dataset, as numpy arrays."""
    return Batch(*(column[dataset.transitions].numpy() for column in dataset.rows))


ENDINGS = ("terminal", "timeout", "jump")  # jump: into another episode, and no flag says so
COLUMNS = [(), ("timeouts",), ("next_observations",), ("next_observations", "timeouts")]


@st.composite
def recordings(draw, columns=None):
    """Episodes of every ending, some longer than the limit, and the last cut short."""
    lengths = st.integers(1, LIMIT + 2)
    episodes = draw(st.lists(st.tuples(lengths, st.sampled_from(ENDINGS)), max_size=6))
    episodes.append((draw(st.integers(1, LIMIT)), "cut"))
    assume(sum(length for length, _ in episodes) > 1)
    columns = draw(st.sampled_from(COLUMNS)) if columns is None else columns
    return record(episodes, columns, draw(st.booleans()), draw(st.integers(0, 1000)))


# -------------------------------------------------------------- brute force, a row at a time


def brute_ends(raw) -> list[bool]:
    ends, step, n = [], 0, len(raw["rewards"])
    for row in range(n):
        step += 1
        end = row == n - 1 or bool(raw["terminals"][row])
        end = end or (bool(raw["timeouts"][row]) if "timeouts" in raw else step == LIMIT)
        if "next_observations" in raw and row < n - 1:
            end = end or list(raw["next_observations"][row]) != list(raw["observations"][row + 1])
        ends.append(end)
        step = 0 if end else step
    return ends


def brute_returns(rewards, ends, discount, failure_reward=None) -> list[float]:
    returns = []
    for row in range(len(rewards)):
        first, last = row, row
        while first > 0 and not ends[first - 1]:
            first -= 1
        while not ends[last]:
            last += 1
        episode = [float(reward) for reward in rewards[first : last + 1]]
        if failure_reward is not None and max(episode) <= failure_reward:
            returns.append(sum(episode) / len(episode) / (1 - discount))
        else:
            steps = range(last - row + 1)
            returns.append(sum(discount**step * float(rewards[row + step]) for step in steps))
    return returns


# ---------------------------------------------------------------------------- transitions


def check_transitions(found: Dataset, expected: dict[str, np.ndarray], skip: str = "") -> None:
    """Bit for bit."""
    for name in ("observations", "actions", "rewards", "next_observations", "terminals"):
        if name != skip:
            column = getattr(transitions(found), name)
            assert column.dtype == np.float32
            np.testing.assert_array_equal(column, expected[name], err_msg=name)


@given(recordings(columns=("timeouts",)), st.booleans())
def test_transitions_are_those_of_d4rl(path, d4rl, raw, next_recorded):
    """Even if next observations are recorded, D4RL uses the next row's observation."""
    expected = d4rl.qlearning_dataset(SimpleNamespace(_max_episode_steps=LIMIT), raw)
    assume(len(expected["rewards"]))
    if next_recorded:
        raw["next_observations"] = np.roll(raw["observations"], -1, axis=0)
    check_transitions(load(path, raw), expected)


def test_recorded_next_observations_are_taken_where_an_episode_breaks_off(path):
    raw = record([(3, "jump"), (3, "timeout"), (2, "cut")])
    kept = [0, 1, 2, 3, 4, 6]
    found = transitions(load(path, raw)).next_observations
    np.testing.assert_array_equal(found, raw["next_observations"][kept])


@given(
    full=st.integers(0, 3),
    short=st.lists(st.integers(1, LIMIT - 2), max_size=5),
    rest=st.integers(1, LIMIT - 2),
)
def test_transitions_are_those_of_d4rl_without_timeouts(path, d4rl, full, short, rest):
    """Up to D4RL's count of steps, which after a terminal starts at one; so no such episode here
    is as long as the limit.
    """
    episodes = [(LIMIT, "timeout")] * full + [(length, "terminal") for length in short]
    raw = record([*episodes, (rest, "cut")], columns=())
    expected = d4rl.qlearning_dataset(SimpleNamespace(_max_episode_steps=LIMIT), raw)
    assume(len(expected["rewards"]))
    check_transitions(load(path, raw), expected)


def test_the_small_maze_file_is_read_as_d4rl_reads_it(maze, d4rl):
    raw = maze.env.get_dataset(h5path=str(QUICKSTART))
    expected = d4rl.qlearning_dataset(maze.env, raw)
    config = Config(normalize=False)
    check_transitions(load_dataset(config, maze, QUICKSTART, torch.device("cpu"), {}), expected)


def test_actions_are_scaled_into_the_unit_box(path):
    raw = record([(4, "cut")])
    wide = SmallTask(action_scale=np.array([2.0, 4.0], np.float32))
    found = load(path, raw | {"actions": raw["actions"] * wide.action_scale}, wide)
    np.testing.assert_array_equal(transitions(found).actions, raw["actions"][:-1])


def test_columns_of_shape_n_by_1_and_float64_are_read(path):
    raw = record([(3, "timeout"), (3, "cut")], sparse=False)
    expected = transitions(load(path, raw))
    columns = {name: column.astype(np.float64) for name, column in raw.items()}
    found = load(path, columns | {k: columns[k][:, None] for k in ("rewards", "timeouts")})
    for one, other in zip(transitions(found), expected):
        np.testing.assert_array_equal(one, other)


def test_next_observations_are_stored_once_where_the_file_allows_it(path):
    raw = record([(3, "timeout"), (3, "cut")], columns=("timeouts",))
    rows = load(path, raw).rows
    storages = [rows.observations.untyped_storage(), rows.next_observations.untyped_storage()]
    assert storages[0].data_ptr() == storages[1].data_ptr()


# ---------------------------------------------------------- episodes and their returns-to-go


@given(recordings())
def test_episodes_end_where_they_should(raw):
    before = {name: column.copy() for name, column in raw.items()}
    ends, _ = episode_ends(raw, LIMIT)
    assert ends.tolist() == brute_ends(raw)
    for name in raw:  # the input is left as it was
        np.testing.assert_array_equal(raw[name], before[name])


@given(recordings(), st.sampled_from([0.0, 0.5, 0.99]), st.booleans())
def test_returns_to_go(raw, discount, sparse):
    ends = np.array(brute_ends(raw))
    failure_reward = float(raw["rewards"].min()) if sparse else None
    found = return_to_go(raw["rewards"], ends, discount, failure_reward)
    expected = brute_returns(raw["rewards"], ends, discount, failure_reward)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@given(recordings(), st.booleans())
def test_loaded_returns_count_the_rewards_of_dropped_rows(path, raw, sparse):
    scale, bias, discount = 10.0, -5.0, 0.9
    dropped = np.array(brute_truncated(raw))
    assume(not dropped.all())
    options = dict(reward_scale=scale, reward_bias=bias, discount=discount)
    found = load(path, raw, **options, is_sparse_reward=sparse)
    rewards = [float(np.float32(reward * scale) + np.float32(bias)) for reward in raw["rewards"]]
    ends, failure = brute_ends(raw), bias if sparse else None  # the task's failures pay 0
    expected = np.array(brute_returns(rewards, ends, discount, failure))[~dropped]
    assert found.failure_reward == failure
    assert found.n_episodes == sum(ends)
    np.testing.assert_allclose(transitions(found).returns_to_go, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(transitions(found).rewards, np.float32(rewards)[~dropped])


def brute_truncated(raw) -> list[bool]:
    """Rows that need a next observation and have none: cut by the time limit, or the file's last.

    A terminal needs none, on the last permitted step and at the file's end either.
    """
    dropped, step, n = [], 0, len(raw["rewards"])
    for row, end in enumerate(brute_ends(raw)):
        step += 1
        flag = bool(raw["timeouts"][row]) if "timeouts" in raw else step == LIMIT
        dropped.append((flag or row == n - 1) and not raw["terminals"][row])
        step = 0 if end else step
    return dropped


def test_a_terminal_on_the_last_permitted_step_is_a_transition(path):
    raw = record([(3, "terminal"), (2, "timeout"), (2, "terminal")])
    raw["timeouts"][2] = True
    found = transitions(load(path, raw))
    np.testing.assert_array_equal(found.actions, raw["actions"][[0, 1, 2, 3, 5, 6]])
    np.testing.assert_array_equal(found.terminals, [0, 0, 1, 0, 0, 1])


def test_data_that_only_ever_succeeds_has_no_failed_episode(path):
    raw = record([(2, "terminal"), (3, "terminal")])
    raw["rewards"][:] = 1.0  # the least in the file, and a success
    found = load(path, raw, is_sparse_reward=True, discount=0.5)
    np.testing.assert_allclose(transitions(found).returns_to_go, [1.5, 1, 1.75, 1.5, 1])


def test_a_dense_task_has_no_failures(path):
    with pytest.raises(InputError, match="is_sparse_reward: found true, expected false"):
        load(path, record([(4, "cut")]), SmallTask(failure_reward=None), is_sparse_reward=True)


@pytest.mark.parametrize(
    "change, options, name",
    [
        ({"rewards": 1e30}, {}, "rewards"),
        ({"observations": 1e30}, {}, "observations"),
        ({}, {"reward_scale": 1e38}, "rewards"),
    ],
)
def test_what_float32_cannot_train_on_is_refused(path, change, options, name):
    raw = record([(4, "cut")], sparse=False)
    for column, factor in change.items():
        raw[column] *= np.float32(factor)
    with pytest.raises(InputError, match=f"data.hdf5: {name} as scaled reach"):
        load(path, raw, **options)


# ---------------------------------------------------------------------------- jumps


class SmallMaze(SmallTask):
    """A maze with cells of size 1; a step moves 0.1 at most."""

    name, cell_size = "a maze", 1.0


def walks(random, lengths) -> list[np.ndarray]:
    """States (x, y, z) of episodes, each of which starts in another cell than the last one ends."""
    place = np.zeros(2)
    found = []
    for length in lengths:
        place = place + random.choice([-1, 1], 2) * random.uniform(1.0, 8.0, 2)
        steps = random.uniform(-0.07, 0.07, (length + 1, 2))
        states = np.hstack([place + np.cumsum(steps, 0), random.normal(size=(length + 1, 1))])
        place = states[-1, :2]
        found.append(states.astype(np.float32))
    return found


def maze_rows(seed, lengths, late, columns=("timeouts",)):
    """Rows of `walks`, whose timeouts are flagged `late` rows too late."""
    random = np.random.default_rng(seed)
    states = walks(random, lengths)
    n = sum(lengths)
    last = np.cumsum(lengths) - 1
    raw = record([(n, "cut")], columns=columns, seed=seed)
    raw["observations"] = np.concatenate([s[:-1] for s in states])
    raw["next_observations"] = np.concatenate([s[1:] for s in states])
    raw["timeouts"] = np.isin(np.arange(n), last[:-1] + late)
    return {key: raw[key] for key in (*columns, *NEEDED)}, last


LENGTHS = st.lists(st.integers(6, 20), min_size=2, max_size=5)


@given(st.integers(0, 1000), LENGTHS, st.integers(1, 4))
def test_jumps_before_late_flags_are_no_transitions(path, seed, lengths, late):
    raw, last = maze_rows(seed, lengths, late)
    found = load(path, raw, SmallMaze(max_episode_steps=1000))
    cut = {*last, *(last[:-1] + late)}  # the jumps, the file's end, and where the flags say so
    assert found.transitions.tolist() == [row for row in range(sum(lengths)) if row not in cut]
    assert found.n_episodes == len(cut)
    batch = transitions(found)
    moves = np.linalg.norm(batch.next_observations[:, :2] - batch.observations[:, :2], axis=1)
    assert moves.max() < 0.11


@given(st.integers(0, 1000), LENGTHS, st.sampled_from(COLUMNS))
def test_good_mazes_have_the_same_transitions_as_before(path, seed, lengths, columns):
    raw, _ = maze_rows(seed, lengths, 0, columns)
    options = dict(max_episode_steps=1000 if "timeouts" in columns else max(lengths))
    if len(set(lengths)) > 1 and not columns:
        lengths = [lengths[0]] * len(lengths)  # else no file without flags would be good
        raw, _ = maze_rows(seed, lengths, 0, columns)
        options["max_episode_steps"] = lengths[0]
    found = load(path, raw, SmallMaze(**options))
    expected = load(path, raw, SmallTask(**options))
    assert "jumps" not in SmallMaze(**options).rows(path)
    for one, other in zip(found.rows, expected.rows):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found.transitions, expected.transitions)
    assert found.n_episodes == expected.n_episodes


def test_jumps_are_counted_in_one_line(path, capsys):
    raw, _ = maze_rows(0, [10, 12, 9], 3)
    load(path, raw, SmallMaze(max_episode_steps=1000))
    line = f"dataset {path}: 2 of 31 rows jump farther than a step of a maze can reach"
    assert capsys.readouterr().out.startswith(line)
    raw, _ = maze_rows(0, [10, 12, 9], 0)
    load(path, raw, SmallMaze(max_episode_steps=1000))
    assert capsys.readouterr().out == ""


def test_a_recorded_jump_is_no_transition(path):
    """The next observation is in the file, but of the next episode."""
    raw, last = maze_rows(0, [10, 12, 9], 3, ("next_observations", "timeouts"))
    raw["next_observations"][:-1] = raw["observations"][1:]
    found = load(path, raw, SmallMaze(max_episode_steps=1000))
    assert not {*last[:-1]} & {*found.transitions.tolist()}
    raw["terminals"][last[0]] = True  # which needs no next observation
    assert last[0] in load(path, raw, SmallMaze(max_episode_steps=1000)).transitions


def test_positions_that_are_none_do_not_jump(path):
    """Random numbers instead of positions, as in benchmarks."""
    raw = record([(4000, "cut")])
    assert "jumps" not in load_rows(path, raw)


def load_rows(path, raw):
    write(path, raw)
    return SmallMaze(max_episode_steps=1000).rows(path)


@pytest.mark.parametrize(
    ("name", "cell"),
    [("antmaze-umaze-v2", 4.0), ("antmaze-large-diverse-v0", 4.0), ("maze2d-umaze-dense-v1", 1.0)],
)
def test_steps_of_d4rls_mazes_are_far_shorter_than_what_counts_as_a_jump(name, cell):
    """The ant's motors push with full force, and the point moves at full speed."""
    task = tasks.make(name)
    assert task.cell_size == cell
    place = task.reset(0)[:2]
    moves = []
    for step in range(300):
        action = np.sign(np.sin(0.9 * step + np.arange(task.action_dim)))
        observation = task.step(action.astype(np.float32)).observation
        moves.append(np.linalg.norm(observation[:2] - place))
        place = observation[:2]
    assert 0.01 < max(moves) < cell / 10


def test_no_row_of_the_shipped_file_jumps(maze):
    assert "jumps" not in maze.rows(QUICKSTART)


# ---------------------------------------------------------------------------- scaling


def test_observations_are_normalised_by_the_files_statistics(path):
    raw = record([(4, "timeout"), (3, "terminal"), (4, "cut")])
    raw["observations"] *= [1.0, 100.0, 0.0]  # the last never varies
    raw["next_observations"] *= [1.0, 100.0, 0.0]
    found = load(path, raw, normalize=True)
    observations = raw["observations"].astype(np.float64)
    mean, std = observations.mean(0), observations.std(0) + 1e-3
    kept = ~raw["timeouts"] & (np.arange(11) < 10)
    for name in ("observations", "next_observations"):
        expected = (raw[name][kept] - mean) / std
        np.testing.assert_allclose(
            getattr(transitions(found), name), expected, rtol=1e-5, atol=1e-5
        )
    online = found.scaling.observation(raw["observations"][0])
    assert online.dtype == np.float32
    np.testing.assert_array_equal(online, transitions(found).observations[0])


def test_locomotion_rewards_are_divided_by_the_range_of_returns(path):
    raw = record([(4, "timeout"), (3, "terminal"), (4, "cut")], sparse=False)
    returns = [raw["rewards"][rows].sum() for rows in (slice(0, 4), slice(4, 7), slice(7, 11))]
    factor = 2.0 * LIMIT / (max(returns) - min(returns))
    kept = ~raw["timeouts"] & (np.arange(11) < 10)
    options = dict(normalize_reward=True, reward_scale=2.0, reward_bias=1.0)
    running = SmallTask(is_locomotion=True)
    found = transitions(load(path, raw, running, **options)).rewards
    np.testing.assert_allclose(found, raw["rewards"][kept] * factor + 1, rtol=1e-5)
    with_goal = transitions(load(path, raw, **options)).rewards
    np.testing.assert_allclose(with_goal, raw["rewards"][kept] * 2 + 1, rtol=1e-5)
    single = record([(4, "cut")], sparse=False)  # the returns of one episode have no range
    found = transitions(load(path, single, running, normalize_reward=True)).rewards
    np.testing.assert_array_equal(found, single["rewards"][:3] * LIMIT)


floats = st.floats(-100, 100, allow_subnormal=False)  # which cal_ql.py takes for zero


@given(st.lists(floats, min_size=1, max_size=20), floats, floats)
@example([1 / 3, 0.1, -5.3], 10.1, -0.7)
def test_equal_rewards_stay_equal_offline_and_online(rewards, scale, bias):
    """The dataset scales one array of float32, the collector one float of the simulator's."""
    scaling = Scaling(np.zeros(S, np.float32), np.ones(1, np.float32), scale, bias)
    offline = scaling.reward(np.array(rewards, np.float32))
    online = [scaling.reward(reward) for reward in rewards]
    assert offline.dtype == np.float32 and all(x.dtype == np.float32 for x in online)
    np.testing.assert_array_equal(offline, online)
    np.testing.assert_allclose(
        offline, np.array(rewards) * scale + bias, rtol=1e-5, atol=1e-5 * (1 + abs(bias))
    )


# ---------------------------------------------------------------------------- bad files


def good() -> dict[str, np.ndarray]:
    return record([(3, "terminal"), (3, "timeout"), (4, "cut")])


def with_entry(name: str, value: float) -> dict[str, np.ndarray]:
    """The good file's column of that name in float64, with one entry changed."""
    column = good()[name].astype(np.float64)
    column.flat[1] = value
    return {name: column}


BAD_FILES = {  # columns instead of the good file's; None leaves one out
    "lacks actions, expected": {"actions": None},
    "lacks observations, rewards, terminals, expected": dict.fromkeys(
        ("observations", "rewards", "terminals")
    ),
    "it has 0 rows, expected at least 2": {k: v[:0] for k, v in good().items()},
    "it has 1 rows, expected at least 2": {k: v[:1] for k, v in good().items()},
    "observations has shape (10, 4), the task needs (10, 3)": {"observations": np.zeros((10, 4))},
    "actions has shape (10,), the task needs (10, 2)": {"actions": np.zeros(10)},
    "next_observations has shape (10, 4)": {"next_observations": np.zeros((10, 4))},
    "terminals has shape (9,), the task needs (10,)": {"terminals": np.zeros(9)},
    "observations holds NaN": with_entry("observations", math.nan),
    "actions holds NaN": with_entry("actions", math.nan),
    "rewards holds NaN, infinite": with_entry("rewards", math.inf),
    "rewards holds NaN, infinite values or values too large for": with_entry("rewards", 1e39),
    "next_observations holds NaN": with_entry("next_observations", math.nan),
    "actions reach 1.25, expected [-1, 1]": with_entry("actions", 1.25),
    "actions reach 1.0001, expected [-1, 1]": with_entry("actions", 1.0001),
    "actions reach 1.00001, expected [-1, 1]": with_entry("actions", -1.00001),
    "actions reach 1.01, expected [-1, 1]": with_entry("actions", -1.01),
    "not a valid HDF5 file": {"rewards": np.float64(1.0)},
}


def check_refusal(path: Path, problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)) as caught:
        TASK.rows(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("problem", BAD_FILES)
def test_bad_files_are_refused(path, problem):
    columns = good() | BAD_FILES[problem]
    write(path, {name: column for name, column in columns.items() if column is not None})
    check_refusal(path, problem)


def test_the_good_file_is_good(path):
    raw = good()
    write(path, raw)
    found = TASK.rows(path)
    assert set(found) == set(raw)
    for name in raw:
        np.testing.assert_array_equal(found[name], raw[name])


def test_too_little_memory_is_no_broken_file(path, monkeypatch):
    write(path, good())
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda *_: np.empty(2**50))
    check_refusal(path, "too little memory")


@given(st.floats(0, 1, exclude_max=True, allow_subnormal=False), st.sampled_from([None, "gzip"]))
@example(0.0, None)
def test_a_file_cut_short_is_refused(path, share, compression):
    with h5py.File(path, "w") as file:
        for name, column in good().items():
            file.create_dataset(name, data=column, compression=compression)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    check_refusal(path, "not a valid HDF5 file")


def test_the_buffer_must_hold_the_dataset(path):
    raw = good()  # ten rows, of which a timeout and the last are no transitions
    assert len(transitions(load(path, raw, buffer_size=8)).rewards) == 8
    with pytest.raises(InputError, match=r"buffer_size: found 7, expected at least the 8 .*hdf5"):
        load(path, raw, buffer_size=7)
