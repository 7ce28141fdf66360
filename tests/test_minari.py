"""Minari's datasets: small ones made here, for the real environments and with the published quirks.

Each recording goes on where Minari's does: in mazes past the goal, in the kitchen past the last
subtask. What is expected is taken from Minari's and gymnasium's own readers.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_cli import ROOT, cal_ql, call, error_line, kill_test, tasks

gymnasium = pytest.importorskip("gymnasium")
minari = pytest.importorskip("minari")
pytest.importorskip("gymnasium_robotics")

OPEN, DOOR, CHEETAH = "D4RL/pointmaze/open-v2", "D4RL/door/human-v2", "mujoco/halfcheetah/medium-v0"
UMAZE, MEDIUM = "D4RL/antmaze/umaze-v1", "D4RL/antmaze/medium-play-v1"
KITCHEN = "D4RL/kitchen/mixed-v2"
SUBTASKS = ["microwave", "kettle", "bottom burner", "light switch"]
ALL = [OPEN, DOOR, CHEETAH, UMAZE, KITCHEN]
EPISODES, STEPS = 3, 12

maze = functools.partial(gymnasium.make, disable_env_checker=True, continuing_task=True)


def random_action(env: Any, observation: Any, step: int, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)


def to_goal(env: Any, observation: dict, step: int, rng: np.random.Generator) -> np.ndarray:
    """Straight to the goal."""
    distance = observation["desired_goal"] - observation["achieved_goal"]
    return (10 * distance - observation["observation"][2:]).clip(-1, 1).astype(np.float32)


def at_goal_for_a_while(env: Any, *rest: Any) -> np.ndarray:
    """A random action, the ant being put to its goal in steps 4 to 6, and elsewhere in step 7."""
    step, ant = rest[1], env.unwrapped.ant_env
    if 4 <= step <= 7:
        position = env.unwrapped.goal + (3.0 if step == 7 else 0.0)
        ant.set_state(np.r_[position, ant.init_qpos[2:]], ant.init_qvel)
    return random_action(env, *rest)


def subtask_after_subtask(env: Any, *rest: Any) -> np.ndarray:
    """A random action, with a subtask more complete in every second step."""
    from gymnasium_robotics.envs.franka_kitchen import kitchen_env

    step, robot = rest[1], env.unwrapped.robot_env
    for name in SUBTASKS[: step // 2]:
        place = kitchen_env.OBS_ELEMENT_INDICES[name]
        robot.data.qpos[place] = kitchen_env.OBS_ELEMENT_GOALS[name]
    return random_action(env, *rest)


class Recording(NamedTuple):
    env: Any
    act: Callable[..., np.ndarray] = random_action
    metadata: dict[str, Any] = {}


def recordings() -> dict[str, Recording]:
    walls, free = [1] * 7, [1, 0, 0, 0, 0, 0, 1]
    goal_map = [walls, free, [1, 0, 0, "g", 0, 0, 1], free, walls]
    medium = [list(row) for row in gymnasium.spec("AntMaze_Medium-v4").kwargs["maze_map"]]
    medium[1][1], medium[6][6] = "r", "g"
    subtasks = {"tasks_to_complete": SUBTASKS, "remove_task_when_completed": False}
    kitchen = gymnasium.make("FrankaKitchen-v1", terminate_on_tasks_completed=False, **subtasks)
    plain_kitchen = {"env": "FrankaKitchen-v1", "observation_space": kitchen.observation_space}
    moving_goal = maze("PointMaze_Open-v3", reset_target=True, max_episode_steps=10**6)
    eval_maze = maze("PointMaze_Open-v3", maze_map=goal_map, max_episode_steps=60)
    mirrored = [[1] * 5, [1, 0, 0, "r", 1], [1, 0, 1, 1, 1], [1, 0, 0, "g", 1], [1] * 5]
    references = {"ref_min_score": -50.0, "ref_max_score": 150.0}
    return {
        OPEN: Recording(moving_goal, to_goal, {"eval_env": eval_maze}),
        DOOR: Recording(gymnasium.make("AdroitHandDoor-v1"), metadata=references),
        CHEETAH: Recording(gymnasium.make("HalfCheetah-v5")),
        UMAZE: Recording(
            maze("AntMaze_UMaze-v4"),
            at_goal_for_a_while,
            {"eval_env": maze("AntMaze_UMaze-v4", maze_map=mirrored), **references},
        ),
        MEDIUM: Recording(
            maze("AntMaze_Medium-v4"),
            metadata={"eval_env": maze("AntMaze_Medium-v4", maze_map=medium)},
        ),
        KITCHEN: Recording(kitchen, subtask_after_subtask, plain_kitchen),
    }


def stack(space: Any, observations: list[Any]) -> Any:
    if isinstance(space, gymnasium.spaces.Dict):
        return {key: stack(part, [o[key] for o in observations]) for key, part in space.items()}
    return np.array(observations)


def record(name: str, recording: Recording) -> None:
    """An episode a seed; but where the goal moves on, the next begins where the last has ended."""
    env, moves_on, buffers = recording.env, name == OPEN, []
    for seed in range(EPISODES):
        rng = np.random.default_rng(seed)
        if not (moves_on and seed):
            observation, _ = env.reset(seed=seed)
        observations, actions, rewards, success = [observation], [], [], False
        while not success if moves_on else len(actions) < STEPS:
            actions.append(recording.act(env, observation, len(actions), rng))
            observation, reward, *_, info = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
            success = info.get("success", False)
        buffer = minari.data_collector.episode_buffer.EpisodeBuffer(
            observations=stack(env.observation_space, observations),
            actions=np.array(actions),
            rewards=rewards,
            terminations=[False] * len(rewards),
            truncations=[False] * (len(rewards) - 1) + [True],
        )
        buffers.append(buffer)
    minari.create_dataset_from_buffers(name, buffers, **{"env": env, **recording.metadata})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Minari's root folder with all these datasets."""
    folder = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        for name, recording in recordings().items():
            record(name, recording)
    return folder


@pytest.fixture(scope="module")
def make(root: Path) -> Callable[[str], tasks.Minari]:
    return functools.cache(lambda name: tasks.make(name, str(root)))


def episodes(root: Path, name: str) -> tuple[Any, list[Any]]:
    """The space of the dataset's observations and its episodes, as Minari reads them."""
    dataset = minari.MinariDataset(root / name / "data")
    return dataset.observation_space, list(dataset.iterate_episodes())


def observation_at(space: Any, values: Any, row: int) -> np.ndarray:
    """That row of recorded observations, by gymnasium's own flattening."""

    def pick(part: Any) -> Any:
        return {k: pick(v) for k, v in part.items()} if isinstance(part, dict) else part[row]

    return gymnasium.spaces.flatten(space, pick(values)).astype(np.float32)


# ---------------------------------------------------------------------------- rows


@pytest.mark.parametrize("name", ALL)
def test_every_step_is_a_transition_as_minari_reads_it(name, root, make):
    task, (space, recorded) = make(name), episodes(root, name)
    config = cal_ql.Config(env=name, normalize=False, discount=0.9)
    dataset = cal_ql.load_dataset(config, task, task.data_file(None), torch.device("cpu"), {})
    assert dataset.transitions.tolist() == list(range(sum(len(e.rewards) for e in recorded)))
    found = [column.numpy() for column in dataset.rows]
    row = 0
    for episode in recorded:
        if name == OPEN:  # the goal of the previous episode is not what this one is paid for
            goals = episode.observations["desired_goal"]
            assert row == 0 or (goals[0] != goals[1]).any()
            goals[0] = goals[1]
        value = 0.0
        for step in range(len(episode.rewards) - 1, -1, -1):
            observations, actions, rewards, next_observations, terminals, returns = (
                column[row + step] for column in found
            )
            before = observation_at(space, episode.observations, step)
            np.testing.assert_array_equal(observations, before)
            after = observation_at(space, episode.observations, step + 1)
            np.testing.assert_array_equal(next_observations, after)
            np.testing.assert_array_equal(actions, episode.actions[step])
            assert rewards == np.float32(episode.rewards[step])
            assert terminals == ((name, rewards) in [(UMAZE, 1), (KITCHEN, 4)])
            value = rewards + 0.9 * value * (1 - terminals)
            assert returns == pytest.approx(value, rel=1e-5)
        row += len(episode.rewards)


def test_the_recordings_have_the_quirks(root):
    """Else the test above and the next ones hold for no reason."""
    rewards = {name: np.concatenate([e.rewards for e in episodes(root, name)[1]]) for name in ALL}
    assert rewards[OPEN].sum() == EPISODES and rewards[UMAZE].sum() >= 3 * EPISODES
    assert set(rewards[KITCHEN]) == {0, 1, 2, 3, 4}


# ---------------------------------------------------------------------------- episodes


@pytest.mark.parametrize("name", ALL)
def test_recorded_actions_give_recorded_rewards_and_ends(name, root, make):
    """From the episode's seed, or, since they go on without one, from PointMaze's states."""
    task, rows, row = make(name), make(name).rows(root / name), 0
    act = recordings()[name].act
    for seed, episode in enumerate(episodes(root, name)[1]):
        observation = task.reset(seed)
        if name == OPEN:
            state = episode.observations["observation"][0]
            task.env.unwrapped.goal = episode.observations["desired_goal"][1]
            task.env.unwrapped.point_env.set_state(state[:2], state[2:])
        else:
            np.testing.assert_array_equal(observation, rows["observations"][row])
        for step, action in enumerate(episode.actions):
            if name in (UMAZE, KITCHEN):  # what puts things in place
                act(task.env, None, step, np.random.default_rng(0))
            observation, reward, terminal, truncated, _ = task.step(action)
            np.testing.assert_allclose(observation, rows["next_observations"][row], atol=1e-5)
            assert (reward, terminal) == (rows["rewards"][row], rows["terminals"][row])
            assert truncated == (step + 1 >= task.max_episode_steps)
            row += 1


def digests(root: Path, names: list[str], seeds: list[int]) -> dict[tuple[str, int], set[str]]:
    """Of the episodes of these tasks and seeds, played one after the other."""
    found: dict[tuple[str, int], set[str]] = {}
    for name in names:
        task = tasks.make(name, str(root))
        for seed in seeds:
            rng, digest = np.random.default_rng(seed), hashlib.sha256(task.reset(seed).tobytes())
            for _ in range(30):
                action = rng.uniform(-1, 1, task.action_dim).astype(np.float32)
                observation, *rest = task.step(action)
                digest.update(observation.tobytes() + repr(rest).encode())
            found.setdefault((name, seed), set()).add(digest.hexdigest())
    return found


def test_an_episode_is_a_function_of_seed_and_actions(root):
    """In any order, and in another process."""
    found = digests(root, ALL, [1, 2, 1, 3, 2])
    assert all(len(of_one) == 1 for of_one in found.values())
    assert len(set.union(*found.values())) == 3 * len(ALL)
    code = f"import test_minari as t; print(t.digests({str(root)!r}, t.ALL, [3, 2, 1]))"
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    assert eval(other.stdout) == found


def test_environments_are_those_to_evaluate_in(make):
    spec = {name: make(name).env.spec for name in [*ALL, MEDIUM]}
    assert make(OPEN).max_episode_steps == 60 and "g" in spec[OPEN].kwargs["maze_map"][2]
    assert "maze_map" in spec[UMAZE].kwargs and spec[UMAZE].kwargs["maze_map"][2] == [1, 1, 1, 0, 1]
    assert spec[MEDIUM].kwargs["maze_map"][1][1] == "r"
    says = {name: (make(name).has_goal, make(name).failure_reward) for name in ALL}
    assert says[OPEN] == says[UMAZE] == (True, 0.0)
    assert says[DOOR] == says[KITCHEN] == (True, None) and says[CHEETAH] == (False, None)
    assert make(CHEETAH).is_locomotion and not make(DOOR).is_locomotion


def test_scores(root, make):
    dataset = minari.MinariDataset(root / DOOR / "data")
    for episode_return in (-50.0, 0.0, 1234.5):
        expected = 100 * minari.get_normalized_score(dataset, episode_return)
        assert make(DOOR).score(episode_return, False) == pytest.approx(expected)
    # its reference is an accumulated return; there is none; and neither that nor success
    assert [make(UMAZE).score(1.0, success) for success in (False, True)] == [0.0, 100.0]
    assert [make(OPEN).score(7.0, success) for success in (False, True)] == [0.0, 100.0]
    assert make(CHEETAH).score(123.0, False) == 123.0 and "returns" in make(CHEETAH).physics


def test_kitchen_scores_the_subtasks_that_were_ever_complete(make):
    task = make(KITCHEN)
    task.reset(0)
    for step, completed in [(2, 1), (8, 4), (2, 4), (0, 4)]:
        subtask_after_subtask(task.env, None, step, np.random.default_rng(0))
        *_, success = task.step(np.zeros(task.action_dim, np.float32))
        assert task.score(0.0, success) == 25.0 * completed and success == (completed == 4)
    task.reset(0)
    task.step(np.zeros(task.action_dim, np.float32))
    assert task.score(0.0, False) == 0.0


# ---------------------------------------------------------------------------- the command line

TINY = """--checkpoints_path runs --device cpu --hidden_dim 8 --batch_size 16 --cql_n_actions 2
    --n_episodes 2 --log_freq 10""".split()
RUN = (
    f"""--env {OPEN} --offline_iterations 30 --online_iterations 100 --eval_freq 50
    --checkpoint_freq 20""".split()
    + TINY
)


def test_kill_and_resume_and_workers_and_another_path_change_nothing(root, tmp_path, monkeypatch):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    copy = shutil.copytree(root, killed / "copy")
    shutil.copytree(root / DOOR, copy / "D4RL/door/human-v3")  # the run's own dataset alone counts
    alone.mkdir()
    monkeypatch.chdir(alone)
    assert call(*RUN, "--dataset_path", root, "--eval_workers", 1).returncode == 0
    monkeypatch.chdir(killed)
    process = kill_test.start(killed, *RUN, "--dataset_path", "copy", "--eval_workers", 1)
    kill_test.wait_until(process, lambda: any(killed.glob("runs/*/checkpoint_60.pt")))
    process.kill()
    assert "gymnasium" not in kill_test.finish(process).stderr  # it says things when imported
    result = call(*RUN, "--dataset_path", "copy", "--eval_workers", 2)
    assert result.returncode == 0 and "starting at step 0 " not in result.stdout
    assert kill_test.differences(alone / "runs", killed / "runs") == []


def test_antmaze_needs_no_config_of_its_own(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--offline_iterations", 2, "--online_iterations", 0, "--n_episodes", 1]
    options = [*TINY, *options, "--config_path", ROOT / "configs/antmaze.yaml", "--env", UMAZE]
    result = call(*options, "--dataset_path", root)
    assert result.returncode == 0, result.stderr
    (run,) = tmp_path.glob("runs/*")  # no folder for each part of the id
    assert run.name.startswith("Cal-QL-D4RL-antmaze-umaze-v1-seed0-")


# ---------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def bad(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root folder with another task's data, a file cut short, and metadata alone."""
    folder = tmp_path_factory.mktemp("bad")
    for name in (DOOR, KITCHEN, UMAZE):
        shutil.copytree(root / (OPEN if name == DOOR else name), folder / name)
    os.truncate(folder / KITCHEN / "data/main_data.hdf5", 5000)
    (folder / UMAZE / "data/main_data.hdf5").unlink()
    return folder


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (DOOR, f"found {OPEN}, expected {DOOR}"),
        (KITCHEN, f"{KITCHEN}: not a whole Minari dataset"),
        (UMAZE, f"{UMAZE}: not a whole Minari dataset"),
        (CHEETAH, f"dataset_path: found no folder .*{CHEETAH}, expected Minari's root folder"),
        ("D4RL/dor/human-v2", f"close matches.*: {DOOR}"),
        ("../x-v0", "expected a Minari id such as D4RL/door/human-v2"),
    ],
)
def test_bad_data_is_named_in_one_line(env, says, bad, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = error_line(call(*TINY, "--env", env, "--dataset_path", bad, "--online_iterations", 0))
    assert re.search(says, line) and not list(tmp_path.glob("runs/*"))


def test_environments_that_do_not_suit_are_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    record("toys/cartpole-v0", Recording(gymnasium.make("CartPole-v1"), lambda *_: 0))
    line = error_line(call(*TINY, "--env", "toys/cartpole-v0"))
    assert "found 'toys/cartpole-v0', expected" in line


# ---------------------------------------------------------------------------- download


def test_what_is_not_here_is_downloaded_whole_or_not_at_all(root, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as with the server away, but at once
    line = error_line(call(*TINY, "--env", "D4RL/door/humn-v2"))
    assert re.search(f"cannot download D4RL/door/humn-v2 to .*reach.*close matches.*: {DOOR}", line)
    assert not list(tmp_path.iterdir())
    copy = f"""
import os, shutil, sys
folder = os.environ["MINARI_DATASETS_PATH"]
shutil.copytree({str(root)!r} + "/" + sys.argv[1], folder + "/" + sys.argv[1])
"""
    monkeypatch.setattr(tasks, "MINARI_DOWNLOAD", copy + "sys.exit(1)")
    assert "exit code 1" in error_line(call(*TINY, "--env", DOOR))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tasks, "MINARI_DOWNLOAD", copy)
    assert tasks.make(DOOR).data_file(None) == tmp_path / DOOR
    assert [path.name for path in tmp_path.iterdir()] == ["D4RL"]


def test_a_signal_stops_a_download_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes requests, and never answers
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}"}
        env |= {"MINARI_DATASETS_PATH": str(tmp_path), "NO_PROXY": "*", "HF_HUB_OFFLINE": "0"}
        process = kill_test.start(tmp_path, *TINY, "--env", DOOR, env=os.environ | env)
        connection, _ = server.accept()
        connection.settimeout(60)
        assert b"GET /api/" in connection.recv(10_000)
        process.send_signal(signal.SIGTERM)
        assert kill_test.finish(process).returncode == 143
        assert connection.recv(1) == b""  # the downloading process has gone too
    assert not list(tmp_path.iterdir())
