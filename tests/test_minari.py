"""Minari's datasets: small ones made here, for the real environments and with the published quirks.

Each recording goes on where Minari's does: in mazes past the goal, in the kitchen past the last
subtask. What is expected is taken from Minari's and gymnasium's own readers.
"""

from __future__ import annotations

import functools
import os
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
from test_cli import ROOT, call, cal_ql, error_line, kill_test, tasks

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
    """A random action, in steps 1 to 9 with as many subtasks complete as the third of the step."""
    from gymnasium_robotics.envs.franka_kitchen import kitchen_env

    step, robot = rest[1], env.unwrapped.robot_env
    for name in SUBTASKS[: (step - 1) // 2]:
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
            assert not truncated
            row += 1


PLAY = """
import hashlib, sys
import numpy as np
import tasks
for name in sys.argv[3:]:
    task, digests = tasks.make(name, sys.argv[1]), {}
    for seed in map(int, sys.argv[2]):
        rng, digest = np.random.default_rng(seed), hashlib.sha256(task.reset(seed).tobytes())
        for _ in range(30):
            observation, *rest = task.step(rng.uniform(-1, 1, task.action_dim).astype(np.float32))
            digest.update(observation.tobytes() + repr(rest).encode())
        digests.setdefault(seed, set()).add(digest.hexdigest())
    print(name, sorted(digests.items()))
"""


def test_an_episode_is_a_function_of_seed_and_actions(root):
    """In any order, and in another process."""
    first, second = (
        subprocess.run(
            [sys.executable, "-c", PLAY, root, order, *ALL],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        for order in ("1232131", "321")
    )
    assert first.stdout.count("{") == 3 * len(ALL) and first.stdout == second.stdout
    assert len(set(first.stdout.split())) == len(first.stdout.split()) - 3 * (len(ALL) - 1)
    assert first.stderr == second.stderr == ""


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
    for step, completed in [(4, 1), (9, 4), (2, 4), (0, 4)]:
        subtask_after_subtask(task.env, None, step, np.random.default_rng(0))
        *_, success = task.step(np.zeros(task.action_dim, np.float32))
        assert task.score(0.0, success) == 25.0 * completed and success == (completed == 4)
    task.reset(0)
    task.step(np.zeros(task.action_dim, np.float32))
    assert task.score(0.0, False) == 0.0


# ---------------------------------------------------------------------------- the command line

TINY = """--checkpoints_path runs --device cpu --hidden_dim 8 --batch_size 16 --cql_n_actions 2
    --n_episodes 2 --log_freq 10""".split()
RUN = f"""--env {OPEN} --offline_iterations 30 --online_iterations 100 --eval_freq 50
    --checkpoint_freq 20""".split() + TINY


def test_kill_and_resume_and_workers_and_another_path_change_nothing(root, tmp_path, monkeypatch):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    copy = shutil.copytree(root, killed / "copy")
    shutil.copytree(root / DOOR, copy / "D4RL/door/human-v3")  # the run's own dataset alone counts
    alone.mkdir()
    monkeypatch.chdir(alone)
    assert call(*RUN, "--dataset_path", root, "--eval_workers", 1).returncode == 0
    monkeypatch.chdir(killed)
    process = kill_test.start(killed, *RUN, "--dataset_path", "copy", "--eval_workers", 2)
    kill_test.wait_until(process, lambda: any(killed.glob("runs/*/checkpoint_60.pt")))
    process.kill()
    kill_test.finish(process)
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


def bad_roots(root: Path, folder: Path) -> dict[str, tuple[list[Any], str]]:
    """Name of a case -> options and what their error says."""
    for name in (DOOR, KITCHEN):
        shutil.copytree(root / OPEN, folder / name)
    (folder / KITCHEN / "data/main_data.hdf5").write_bytes(b"cut short")
    (folder / UMAZE / "data").mkdir(parents=True)
    data, here = ["--dataset_path", folder], str(folder)
    return {
        "of another task": ([*data, "--env", DOOR], f"found {OPEN}, expected {DOOR}"),
        "cut short": ([*data, "--env", CHEETAH], "no folder .*without dataset_path"),
        "misspelt": (["--env", "D4RL/dor/human-v2", *data], "close matches.*: D4RL/door/human-v2"),
        "empty": ([*data, "--env", UMAZE], f"{here}/{UMAZE}: not a whole Minari dataset"),
        "no id": (["--env", "../../tmp-v1"], "expected a Minari id such as"),
        "away": (["--env", DOOR], "cannot download D4RL/door/human-v2 to .*Connect"),
    }
