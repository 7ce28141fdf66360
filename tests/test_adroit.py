"""Binary Adroit against D4RL's environments, and the authors' files against a naive reader."""

import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import cal_ql
import tasks
from cal_ql import Config, load_dataset
from episodes import check_episodes
from helpers import call, call_tool, error_line, killed_at, resumed_like_left_alone
from runs.errors import InputError
from tasks import d4rl_compat
from tools import make_dataset
from tools.recipes import door

HANDS = ["pen", "door", "relocate", "hammer"]
KEYS = "observations", "actions", "next_observations", "rewards"


def move_to_goal(env):
    """Put the object at its goal, or the goal at the object."""
    data, model = env.data, env.model
    if hasattr(env, "door_hinge_did"):
        data.qpos[env.door_hinge_did] = 1.5
    elif hasattr(env, "eps_ball_sid"):
        model.body_quat[env.target_obj_bid] = data.xquat[env.obj_bid]
    elif hasattr(env, "goal_sid"):
        data.qpos[model.jnt_qposadr[model.joint_name2id("nail_dir")]] = 0.09
    else:
        model.site_pos[env.target_obj_sid] = data.body_xpos[env.obj_bid]


@pytest.mark.parametrize("hand", HANDS)
def test_it_pays_and_ends_where_d4rls_environment_sees_the_goal(hand):
    task, d4rl = tasks.make(f"{hand}-binary-v0"), d4rl_compat.make(f"{hand}-cloned-v1")
    np.testing.assert_array_equal(task.reset(5), d4rl_compat.reset(d4rl, 5).astype(np.float32))
    goals = []
    for step, action in enumerate(np.random.default_rng(0).uniform(-1, 1, (3, task.action_dim))):
        if step == 2:
            move_to_goal(task.env.unwrapped)
            move_to_goal(d4rl.unwrapped)
        observation, *rest = task.step(action.astype(np.float32))
        expected, _, _, info = d4rl.step(action.astype(np.float32))
        np.testing.assert_array_equal(observation, expected.astype(np.float32))
        goals.append(bool(info["goal_achieved"]))
        assert rest == [goals[-1] - 1.0, goals[-1], False, goals[-1]]
    assert goals == [False, False, True]
    assert (task.score(-2.0, True), task.score(-2.0, False)) == (100, 0)
    assert (task.failure_reward, task.has_goal, task.is_locomotion) == (-1, True, False)


def test_a_dropped_pen_ends_nothing_but_the_time_limit_does():
    task, d4rl = tasks.make("pen-binary-v0"), d4rl_compat.make("pen-cloned-v1")
    task.reset(0), d4rl_compat.reset(d4rl, 0)
    for step in range(1, task.max_episode_steps + 1):
        for env in (task.env, d4rl):
            env.unwrapped.model.body_pos[env.unwrapped.obj_bid, 2] = -1.0
        assert d4rl.step(np.zeros(24))[2]
        assert task.step(np.zeros(24))[1:] == (-1.0, False, step == 100, False)


def test_the_goal_in_the_last_permitted_step_is_no_truncation():
    task = tasks.make("door-binary-v0")
    task.reset(0)
    for _ in range(199):
        assert task.step(np.zeros(28))[1:] == (-1.0, False, False, False)
    move_to_goal(task.env.unwrapped)
    assert task.step(np.zeros(28))[1:] == (0.0, True, False, True)


DEMONSTRATIONS = os.environ.get("DOOR_DEMONSTRATIONS")


@pytest.mark.skipif(not DEMONSTRATIONS, reason="DOOR_DEMONSTRATIONS names no door-v0_demos.pickle")
def test_each_human_demonstration_succeeds_exactly_where_it_does_in_d4rl():
    task, d4rl = tasks.make("door-binary-v0"), d4rl_compat.make("door-human-v1")
    with open(DEMONSTRATIONS, "rb") as file:
        demonstrations = pickle.load(file)
    at_goal = 0
    for demonstration in demonstrations:
        task.reset(0), d4rl_compat.reset(d4rl, 0)
        for env in (task.env, d4rl):
            env.unwrapped.set_env_state(demonstration["init_state_dict"])
        for action in demonstration["actions"]:
            _, reward, terminal, _, success = task.step(action)
            goal = d4rl.step(action)[3]["goal_achieved"]
            assert (reward, terminal, success) == (goal - 1.0, goal, goal)
            at_goal += goal
    recorded = sum((d["rewards"] > 15).sum() for d in demonstrations)  # beyond all bonuses but one
    assert len(demonstrations) == 25 and abs(at_goal - recorded) <= 10 and recorded == 375


def test_an_episode_follows_from_seed_and_actions_in_any_order_and_process():
    check_episodes([f"{hand}-binary-v0" for hand in HANDS])


# ---------------------------------------------------------------------------- the authors' files


def authors_episode(rng, rewards, demonstrated):
    """As in the authors' files: demonstrations have dicts as observations and an extra reward."""
    n = len(rewards)
    states = rng.normal(size=(n + 1, 39))
    episode = {"actions": rng.uniform(-1.3, 1.3, (n, 28)), "env_infos": [{"time": np.float64(0)}]}
    columns = {"observations": states[:-1], "next_observations": states[1:]}
    episode |= {"terminals": np.zeros(n), "rewards": np.append(rewards, 0.0)}
    if demonstrated:
        columns = {k: [{"state_observation": s} for s in v] for k, v in columns.items()}
    else:
        episode |= {"terminals": np.zeros((n, 1)), "rewards": np.array(rewards, float)[:, None]}
    return {**episode, **columns}


def read_naively(folder):
    """The transitions in the authors' files: a list of (s, a, s', r)."""
    found = []
    for name in ("door2_sparse.npy", "door_bc_sparse4.npy"):
        for episode in np.load(folder / name, allow_pickle=True):
            rewards = [float(np.squeeze(r)) for r in episode["rewards"]]
            rows = zip(*(episode[key] for key in KEYS[:3]), rewards)
            rows = [[s["state_observation"] if isinstance(s, dict) else s for s in r] for r in rows]
            while rows and rows[-1][3] != 0:
                rows.pop()
            found += rows
    return found


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_authors_files_give_the_transitions_of_a_naive_reader(tmp_path, protocol):
    rng = np.random.default_rng(protocol)
    rewards = [[-1] * 260 + [0, 0], [-1, -1, 0, -1, 0, -1], [-1] * 20, [0], [-1, -1, 0]]
    human = [authors_episode(rng, r, True) for r in rewards]
    array = np.empty(len(human), object)
    array[:] = human
    if protocol == 4:
        np.save(tmp_path / "door2_sparse.npy", array, allow_pickle=True)
    else:
        (tmp_path / "door2_sparse.npy").write_bytes(pickle.dumps(array, protocol))
    cloned = [authors_episode(rng, r, False) for r in rewards]
    (tmp_path / "door_bc_sparse4.npy").write_bytes(pickle.dumps(cloned, protocol))

    task = tasks.make("door-binary-v0")
    config = Config(
        env=task.name, normalize=False, reward_scale=10, reward_bias=5, is_sparse_reward=True
    )
    path = task.data_file(str(tmp_path))
    data = load_dataset(config, task, path, torch.device("cpu"), {})
    found = [column[data.transitions].numpy() for column in data.rows]
    expected = [np.array(column) for column in zip(*read_naively(tmp_path))]
    assert len(expected[0]) == 2 * (262 + 5 + 1 + 3)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1].clip(-1, 1), rtol=1e-6)
    np.testing.assert_allclose(found[3], expected[2], rtol=1e-6)
    np.testing.assert_array_equal(found[2], expected[3] * 10 + 5)
    np.testing.assert_array_equal(found[4], expected[3] == 0)
    bounds, bound = [], 0.0
    for reward in expected[3][::-1]:
        bound = reward * 10 + 5 + (0.99 * bound if reward else 0.0)
        bounds.insert(0, bound)
    np.testing.assert_allclose(found[5], bounds, rtol=1e-5)


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


CALLS = [Call(os.mkdir, "x"), Call(exec, "import os; os.mkdir('x')"), Call(np.save, "x", [1])]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.call[0].__name__)
@pytest.mark.parametrize("protocol", [0, 4])
def test_a_pickle_that_calls_something_calls_nothing(call, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.npy").write_bytes(pickle.dumps([call], protocol))
    with pytest.raises(InputError, match=r"a.npy: not a valid pickle .* calls \w+\.\w+"):
        tasks.adroit.unpickle(Path("a.npy"))
    assert os.listdir() == ["a.npy"]


def write_hdf5(path, rewards):
    """Random rows for the pen."""
    rng, n = np.random.default_rng(0), len(rewards)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(n, 45)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (n, 24)).astype(np.float32)
        file["rewards"] = np.array(rewards, np.float32)
        file["terminals"] = np.zeros(n, bool)
    return path


RUN = """--env pen-binary-v0 --checkpoints_path . --device cpu
    --offline_iterations 20 --online_iterations 120 --eval_freq 1000 --checkpoint_freq 20
    --log_freq 10 --n_episodes 1 --hidden_dim 8 --batch_size 16 --cql_n_actions 2
    --is_sparse_reward true --reward_scale 10 --reward_bias 5""".split()


def test_a_killed_run_ends_as_one_left_alone(tmp_path):
    data = write_hdf5(tmp_path / "data.hdf5", ([-1] * 30 + [0]) * 3)
    run = [*RUN, "--dataset_path", data, "--eval_workers", 1]
    moment = cal_ql.Agent, "update", 70
    assert resumed_like_left_alone(tmp_path, run, run, *moment, end=killed_at) == []


def test_bad_input_is_named_in_one_line(tmp_path):
    with pytest.raises(InputError, match="'dor-binary-v0'; close matches: door-binary-v0"):
        tasks.make("dor-binary-v0")
    task = tasks.make("pen-binary-v0")
    with pytest.raises(InputError, match="found null, expected a folder with pen2_sparse.npy and"):
        task.data_file(None)
    (tmp_path / "pen2_sparse.npy").write_bytes(pickle.dumps([Call(os.mkdir, "ran")]))
    with pytest.raises(InputError, match="without pen_bc_sparse4.npy, expected"):
        task.data_file(str(tmp_path))
    dense = write_hdf5(tmp_path / "dense.hdf5", [-0.3, 20.0, 0.0])
    with pytest.raises(InputError, match="rewards from -0.3 to 20, expected only -1 and 0"):
        task.rows(dense)
    (tmp_path / "pen_bc_sparse4.npy").write_bytes(pickle.dumps([{"rewards": [0.0]}]))
    options = ["--env", task.name, "--dataset_path", tmp_path, "--device", "cpu"]
    assert "calls posix.mkdir" in error_line(call(*options))
    (tmp_path / "pen2_sparse.npy").write_bytes(pickle.dumps([]))
    with pytest.raises(InputError, match=r"not a valid pair of .* lacks 'observations'"):
        task.rows(tmp_path)


# ---------------------------------------------------------------------------- files that are made


@pytest.fixture(scope="module")
def demonstrations():
    """Like hand_dapg's: ten steps with the door shut, and ten in which it swings to the goal."""
    rng, episodes = np.random.default_rng(0), []
    env = d4rl_compat.make("door-human-v1").unwrapped
    for angle, speed in ((0.0, 0.0), (1.3, 2.0)):
        d4rl_compat.reset(env, 0)
        env.data.qpos[env.door_hinge_did], env.data.qvel[env.door_hinge_did] = angle, speed
        columns = {"observations": rng.normal(size=(10, 39)), "rewards": np.zeros(10)}
        columns |= {"actions": rng.uniform(-1.3, 1.3, (10, 28))}
        episodes.append({**columns, "init_state_dict": env.get_env_state()})
    return episodes


def replay(demonstration):
    """Observations, rewards and goals of D4RL's environment, as arrays."""
    env, found = d4rl_compat.make("door-human-v1").unwrapped, []
    d4rl_compat.reset(env, 0)
    env.set_env_state(demonstration["init_state_dict"])
    for action in demonstration["actions"].clip(-1, 1).astype(np.float32):
        observation = env.get_obs().astype(np.float32)
        _, reward, _, info = env.step(action)
        found.append((observation, np.float32(reward), info["goal_achieved"]))
    return map(np.array, zip(*found))


def rollouts(recipe):
    """The recipe's rollouts 0 to 3, made in a different order."""
    made = {i: recipe.rollout(np.random.SeedSequence((0, i))) for i in (2, 1, 3, 0)}
    return [made[i] for i in range(4)]


def test_made_files_hold_what_d4rls_environment_makes_of_demonstrations(
    demonstrations, monkeypatch
):
    monkeypatch.setattr(door, "CLONE_UPDATES", 3)
    monkeypatch.setattr(door, "CLONE_ROLLOUTS", 1)
    *human, end, _ = rollouts(door.Door("door-human-v1", demonstrations, 0))
    assert end is None and len(human) == 2
    for rows, demonstration in zip(human, demonstrations):
        observations, rewards, goals = replay(demonstration)
        np.testing.assert_array_equal(rows["observations"], observations)
        np.testing.assert_array_equal(rows["rewards"], rewards)
        assert rows["timeouts"].tolist() == [False] * 9 + [True] and not rows["terminals"].any()
    failed, rows, cloned, end = rollouts(door.BinaryDoor("door-binary-v0", demonstrations, 0))
    length = np.flatnonzero(goals)[0] + 1
    assert 1 < length < 10 and failed == cloned == {} and end is None
    assert rows["rewards"].tolist() == [-1] * (length - 1) + [0]
    np.testing.assert_array_equal(rows["observations"], observations[:length])
    np.testing.assert_array_equal(rows["terminals"], goals[:length])
    for row in range(length):  # from each state that it holds
        state = {name: rows[f"infos/{name}"][row] for name in ("qpos", "qvel", "door_body_pos")}
        one = {"init_state_dict": state, "actions": rows["actions"][row : row + 1]}
        assert list(replay(one))[2].tolist() == [rows["rewards"][row] == 0]


def test_the_clone_acts_as_the_demonstrations_and_by_the_seed(demonstrations, monkeypatch):
    monkeypatch.setattr(door, "CLONE_UPDATES", 150)
    one, same, other = (door.clone(demonstrations, seed) for seed in (0, 0, 1))
    states = demonstrations[0]["observations"]
    np.testing.assert_array_equal(one(states[0]), same(states[0]))
    assert (one(states[0]) != other(states[0])).any()
    error = one(states) - demonstrations[0]["actions"].clip(-1, 1)
    assert np.abs(error).mean() < 0.2  # 0.6 without learning


def test_make_dataset_runs_nothing_and_takes_no_other_demonstrations(folder, demonstrations):
    path = folder / "door-v0_demos.pickle"
    for contents, complaint in (
        ([Call(os.mkdir, "ran")], "calls posix.mkdir"),
        ([{"init_state_dict": {"board_pos": np.zeros(3)}}], "no demonstrations of opening a door"),
        ([], "no demonstrations of opening a door"),
        ([demonstrations[0] | {"actions": np.full((10, 28), np.nan)}], "no demonstrations"),
        ([demonstrations[0] | {"actions": np.full((10, 28), "text")}], "no demonstrations"),
        ([demonstrations[0] | {"observations": np.zeros((9, 39))}], "no demonstrations"),
    ):
        path.write_bytes(pickle.dumps(contents))
        options = "--demonstrations", path.name, "--output", "a"
        done = call_tool(make_dataset, "door-binary-v0", *options)
        assert done.returncode == 2 and complaint in done.stderr
        assert done.stderr.count("\n") == 1 and os.listdir() == [path.name]
