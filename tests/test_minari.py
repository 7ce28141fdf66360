"""Minari: small datasets made here, in the real environments, with the published ones' quirks.

AntMaze continues at the goal, the kitchen after its last subtask, PointMaze from goal to goal.
Minari's and gymnasium's own readers give the expected values.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import cal_ql
import tasks
from episodes import check_episodes
from helpers import (
    ROOT,
    call,
    check_no_goal,
    error_line,
    finish,
    killed_at,
    resumed_like_left_alone,
    start_run,
)
from runs.errors import InputError

gymnasium, minari = pytest.importorskip("gymnasium"), pytest.importorskip("minari")
pytest.importorskip("gymnasium_robotics")

OPEN, DOOR, CHEETAH = "D4RL/pointmaze/open-v2", "D4RL/door/human-v2", "mujoco/halfcheetah/medium-v0"
UMAZE, MEDIUM = "D4RL/antmaze/umaze-v1", "D4RL/antmaze/medium-play-v1"
KITCHEN, SUBTASKS = (
    "D4RL/kitchen/mixed-v2",
    ["microwave", "kettle", "bottom burner", "light switch"],
)
JUMPS = [7, 12 + 7, 24 + 7]  # where `at_goal_for_a_while` takes the ant away
ALL = [OPEN, DOOR, CHEETAH, UMAZE, KITCHEN]


def random_action(env: Any, step: int, observation: Any) -> np.ndarray:
    return np.random.uniform(-1, 1, env.action_space.shape).astype(np.float32)


def to_goal(env: Any, step: int, observation: dict[str, np.ndarray]) -> np.ndarray:
    way = observation["desired_goal"] - observation["achieved_goal"]
    return (10 * way - observation["observation"][2:]).clip(-1, 1).astype(np.float32)


def at_goal_for_a_while(env: Any, step: int, observation: Any) -> np.ndarray:
    """A random action, but in steps 4 to 6 from the goal, and in step 7 from far away."""
    ant = env.unwrapped.ant_env
    if 4 <= step <= 7:
        xy = env.unwrapped.goal + (3.0 if step == 7 else 0.0)
        ant.set_state(np.r_[xy, ant.init_qpos[2:]], ant.init_qvel)
    return random_action(env, step, observation)


def subtask_after_subtask(env: Any, step: int, observation: Any) -> np.ndarray:
    """A random action; every second step completes one more subtask, one of them irrelevant."""
    from gymnasium_robotics.envs.franka_kitchen import kitchen_env

    positions = env.unwrapped.robot_env.data.qpos
    for name in [*SUBTASKS[: step // 2], "slide cabinet"]:
        positions[kitchen_env.OBS_ELEMENT_INDICES[name]] = kitchen_env.OBS_ELEMENT_GOALS[name]
    return random_action(env, step, observation)


class Recording(NamedTuple):
    env: Any
    act: Callable[[Any, int, Any], np.ndarray] = random_action
    metadata: dict[str, Any] = {}


def recordings() -> dict[str, Recording]:
    maze = partial(gymnasium.make, disable_env_checker=True, continuing_task=True)
    walls, free = [1] * 7, [1, 0, 0, 0, 0, 0, 1]
    to_evaluate = {
        OPEN: [walls, free, [1, 0, 0, "g", 0, 0, 1], free, walls],
        UMAZE: [[1] * 5, [1, 0, 0, "r", 1], [1, 0, 1, 1, 1], [1, 0, 0, "g", 1], [1] * 5],
        MEDIUM: [walls, [1, "r", 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, "g", 1], walls],
    }
    point, medium = (
        to_evaluate[OPEN],
        {"eval_env": maze("AntMaze_Medium-v4", maze_map=to_evaluate[MEDIUM])},
    )
    references = {"ref_min_score": -50.0, "ref_max_score": 150.0}
    kitchen = gymnasium.make(
        "FrankaKitchen-v1",
        tasks_to_complete=SUBTASKS,
        remove_task_when_completed=False,
        terminate_on_tasks_completed=False,
    )
    return {
        OPEN: Recording(
            maze("PointMaze_Open-v3", reset_target=True, max_episode_steps=10**6),
            to_goal,
            {"eval_env": maze("PointMaze_Open-v3", maze_map=point, max_episode_steps=60)},
        ),
        DOOR: Recording(gymnasium.make("AdroitHandDoor-v1"), metadata=references),
        CHEETAH: Recording(gymnasium.make("HalfCheetah-v5")),
        UMAZE: Recording(
            maze("AntMaze_UMaze-v4"),
            at_goal_for_a_while,
            {"eval_env": maze("AntMaze_UMaze-v4", maze_map=to_evaluate[UMAZE]), **references},
        ),
        MEDIUM: Recording(maze("AntMaze_Medium-v4"), metadata=medium),
        KITCHEN: Recording(  # what it was recorded in has more subtasks, by its specification
            kitchen,
            subtask_after_subtask,
            {"env": "FrankaKitchen-v1", "observation_space": kitchen.observation_space},
        ),
    }


def stack(observations: list[Any]) -> Any:
    if isinstance(observations[0], dict):
        return {key: stack([o[key] for o in observations]) for key in observations[0]}
    return np.array(observations)


def record(name: str, recording: Recording) -> None:
    """An episode of 12 steps a seed; but PointMaze's go on where the last has found its goal."""
    env, buffers = recording.env, []
    for seed in range(3):
        np.random.seed(seed)
        if seed == 0 or name != OPEN:
            observation, _ = env.reset(seed=seed)
        observations, actions, rewards, done = [observation], [], [], False
        while not done:
            actions.append(recording.act(env, len(actions), observation))
            observation, reward, *_, info = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
            done = info["success"] if name == OPEN else len(actions) == 12
        buffer = minari.data_collector.episode_buffer.EpisodeBuffer(
            observations=stack(observations),
            actions=np.array(actions),
            rewards=rewards,
            terminations=[False] * len(rewards),
            truncations=[False] * (len(rewards) - 1) + [True],
        )
        buffers.append(buffer)
    minari.create_dataset_from_buffers(name, buffers, **{"env": env, **recording.metadata})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Minari's root folder, with all these datasets."""
    folder = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        for name, recording in recordings().items():
            record(name, recording)
    return folder


@pytest.fixture(scope="module")
def make(root: Path) -> Callable[[str], tasks.minari.Minari]:
    return cache(lambda name: tasks.make(name, str(root)))


def take_row(values: Any, row: int) -> Any:
    if isinstance(values, dict):
        return {key: take_row(part, row) for key, part in values.items()}
    return values[row]


# ---------------------------------------------------------------------------- rows and episodes


@pytest.mark.parametrize("name", ALL)
def test_every_step_is_a_transition_as_minari_reads_it(name, root, make):
    config = cal_ql.Config(env=name, normalize=False, discount=0.9)
    path = make(name).data_file(None)
    dataset = cal_ql.load_dataset(config, make(name), path, torch.device("cpu"), {})
    recorded = minari.MinariDataset(root / name / "data")
    left_out = JUMPS if name == UMAZE else []
    assert dataset.transitions.tolist() == [
        row for row in range(recorded.total_steps) if row not in left_out
    ]
    found, row, ends = [column.numpy() for column in dataset.rows], 0, {UMAZE: 1.0, KITCHEN: 4.0}
    for number, episode in enumerate(recorded):
        if name == OPEN:  # the last episode's goal is not what the first step is paid for
            goals = episode.observations["desired_goal"]
            assert number == 0 or (goals[0] != goals[1]).all()
            goals[0] = goals[1]
        flat = [
            gymnasium.spaces.flatten(
                recorded.observation_space, take_row(episode.observations, step)
            )
            for step in range(len(episode.rewards) + 1)
        ]
        part, row = slice(row, row + len(episode.rewards)), row + len(episode.rewards)
        terminals = episode.rewards == ends.get(name)
        assert name not in ends or 0 < terminals.sum() < 12  # the recording has gone on
        value, values = 0.0, []
        for reward, terminal in zip(episode.rewards[::-1], terminals[::-1]):
            value = reward + 0.9 * value * (not terminal)
            values.insert(0, value)
        expected = flat[:-1], episode.actions, episode.rewards, flat[1:], terminals
        for column, recorded_values in zip(found, expected):
            np.testing.assert_array_equal(column[part], np.array(recorded_values, np.float32))
        np.testing.assert_allclose(found[-1][part], values, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_recorded_actions_give_recorded_rewards_and_ends(name, root, make):
    """From the episode's seed or, in PointMaze, which continues without a seed, from its states."""
    task, rows, act, row = make(name), make(name).rows(root / name), recordings()[name].act, 0
    for seed, episode in enumerate(minari.MinariDataset(root / name / "data")):
        observation = task.reset(seed)
        if name == OPEN:
            positions, velocities = np.split(episode.observations["observation"][0], 2)
            task.env.unwrapped.goal = episode.observations["desired_goal"][1]
            task.env.unwrapped.point_env.set_state(positions, velocities)
        else:
            np.testing.assert_array_equal(observation, rows["observations"][row])
        for step, action in enumerate(episode.actions):
            if name in (UMAZE, KITCHEN):  # it is this that puts things in place
                act(task.env, step, None)
            observation, reward, terminal, truncated, _ = task.step(action)
            np.testing.assert_allclose(observation, rows["next_observations"][row], atol=1e-5)
            assert reward == pytest.approx(rows["rewards"][row], rel=1e-6)
            assert terminal == rows["terminals"][row]
            assert truncated == (step + 1 >= task.max_episode_steps)
            row += 1


def test_an_episode_is_a_function_of_seed_and_actions(root):
    check_episodes(ALL, root)


def test_environments_are_those_to_evaluate_in(make):
    maps = {name: make(name).env.spec.kwargs["maze_map"] for name in (OPEN, UMAZE, MEDIUM)}
    assert "g" in maps[OPEN][2] and make(OPEN).max_episode_steps == 60
    assert maps[UMAZE][2] == [1, 1, 1, 0, 1] and maps[MEDIUM][1][1] == "r"
    assert not make(KITCHEN).env.unwrapped.terminate_on_tasks_completed  # all at once do that
    says = [(make(name).has_goal, make(name).failure_reward) for name in ALL]
    assert says == [(True, 0.0), (True, None), (False, None), (True, 0.0), (True, None)]
    assert [make(name).is_locomotion for name in ALL] == [name == CHEETAH for name in ALL]


def test_scores(root, make):
    expected = minari.get_normalized_score(minari.MinariDataset(root / DOOR / "data"), 123.0)
    assert make(DOOR).score(123.0, True) == pytest.approx(100 * expected)
    for name in (UMAZE, OPEN):  # whose reference adds up rewards at the goal; which has none
        assert [make(name).score(7.0, success) for success in (False, True)] == [0.0, 100.0]
    assert make(CHEETAH).score(123.0, False) == 123.0 and "returns" in make(CHEETAH).physics
    task = make(KITCHEN)
    for plan, score in [([2, 8, 2, 0], 100.0), ([2, 0], 25.0), ([0], 0.0)]:
        task.reset(0)
        for step in plan:
            subtask_after_subtask(task.env, step, None)
            *_, success = task.step(np.zeros(task.action_dim, np.float32))
        assert (task.score(0.0, success), success) == (score, score == 100.0)


@pytest.mark.parametrize("body", ["Ant", "HalfCheetah", "Hopper", "Walker2d"])
def test_every_body_is_one_without_a_goal(body, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    name = f"mujoco/{body.lower()}/expert-v0"
    record(name, Recording(gymnasium.make(f"{body}-v5")))
    task = tasks.make(name)
    assert (task.has_goal, task.failure_reward, task.is_locomotion) == (False, None, True)
    rows = task.rows(tmp_path / name)
    assert rows["observations"].shape == (36, task.observation_dim)


def test_a_made_pointmaze_is_what_its_environment_paid(tmp_path, monkeypatch):
    from tools.recipes import maze2d, pointmaze

    monkeypatch.setattr(maze2d, "TRAJECTORY", 400)
    few = partial(minari.create_dataset_from_buffers, num_episodes_average_score=1)
    monkeypatch.setattr(minari, "create_dataset_from_buffers", few)
    name, seeds = "D4RL/pointmaze/medium-v2", np.random.SeedSequence((3, 1))
    recipe = pointmaze.PointMaze(name)
    made, again = recipe.rollout(seeds), recipe.rollout(seeds)
    for column in made:
        np.testing.assert_array_equal(made[column], again[column])
    (tmp_path / name).parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    pointmaze.write_minari(Path(name), made, {"task": name, "recipe": ""})
    rows = tasks.make(name, str(tmp_path)).rows(tmp_path / name)
    np.testing.assert_array_equal(rows["actions"], made["actions"])
    place, goal = rows["next_observations"][:, :2], rows["observations"][:, 2:4]
    there = np.linalg.norm(place - goal, axis=1) <= 0.45
    assert there.sum() >= 2
    np.testing.assert_array_equal(rows["rewards"] == 1, there)
    np.testing.assert_array_equal(rows["truncations"], there | (np.arange(400) == 399))


# ---------------------------------------------------------------------------- the command line

TINY = """--checkpoints_path runs --device cpu --hidden_dim 8 --batch_size 16 --cql_n_actions 2
    --n_episodes 2 --log_freq 10 --offline_iterations 30""".split()
RUN = f"""--env {OPEN} --online_iterations 100 --eval_freq 50 --checkpoint_freq 20
    --checkpoints_path ."""
RUN = [*TINY, *RUN.split()]


def test_a_kill_workers_and_another_path_change_nothing(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    shutil.copytree(root / DOOR, copy / "D4RL/door/human-v3")  # only the run's own data counts
    alone = [*RUN, "--dataset_path", root, "--eval_workers", 1]
    killed = [*RUN, "--dataset_path", copy, "--eval_workers", 2]
    moment = cal_ql.Agent, "update", 70
    assert resumed_like_left_alone(tmp_path, alone, killed, *moment, end=killed_at) == []


def test_antmaze_needs_no_config_of_its_own(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*TINY, "--config_path", ROOT / "configs/antmaze.yaml", "--online_iterations", 0]
    result = call(*options, "--n_episodes", 1, "--env", UMAZE, "--dataset_path", root)
    assert result.returncode == 0, result.stderr
    (run,) = tmp_path.glob("runs/*")  # not a folder for each part of the id
    assert run.name.startswith("Cal-QL-D4RL-antmaze-umaze-v1-seed0-")


def test_locomotion_has_neither_success_nor_regret_nor_failures(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*TINY, "--config_path", ROOT / "configs/locomotion.yaml", "--online_iterations", 40]
    result = call(*options, "--n_episodes", 1, "--env", CHEETAH, "--dataset_path", root)
    assert result.returncode == 0, result.stderr
    check_no_goal(tmp_path / "runs")


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (DOOR, f"found {OPEN}, expected {DOOR}"),
        (KITCHEN, f"{KITCHEN}: not a valid Minari dataset"),
        (UMAZE, f"{UMAZE}/data/main_data.hdf5: there is no such file"),
        (CHEETAH, f"dataset_path: found no folder .*{CHEETAH}, expected Minari's root folder"),
        ("toys/cartpole-v0", "has the space Discrete.2., expected a Box of vectors"),
        ("D4RL/dor/human-v2", f"close matches.*: {DOOR}"),
        ("../x-v0", "expected a Minari id such as D4RL/door/human-v2"),
    ],
)
def test_bad_data_is_named_in_one_line(env, says, root, tmp_path, monkeypatch):
    """Data of another task, cut short, incomplete, missing, or with actions that are no numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    for name in {DOOR, KITCHEN, UMAZE} & {env}:
        shutil.copytree(root / (OPEN if name == DOOR else name), tmp_path / name)
    if env == KITCHEN:
        os.truncate(tmp_path / KITCHEN / "data/main_data.hdf5", 5000)
    elif env == UMAZE:
        (tmp_path / UMAZE / "data/main_data.hdf5").unlink()
    elif "toys" in env:
        record(env, Recording(gymnasium.make("CartPole-v1"), lambda *_: 0))
    line = error_line(call(*TINY, "--env", env, "--dataset_path", tmp_path))
    assert re.search(says, line) and not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ("Box(0, 255, (8, 8, 3), np.uint8)", "has the space Box.*, expected a Box of vectors"),
        ("Discrete(5)", "has observations in Discrete.5., expected a Box of vectors"),
        ("Dict(a=Box(-1, 1, (3,)), b=Dict(c=Discrete(3)))", "has observations in Discrete.3."),
        ("Tuple([Box(-1, 1, (3,))])", "has observations in Tuple"),
    ],
)
def test_observations_are_vectors(space, says):
    space = eval(space, {"np": np, **vars(gymnasium.spaces)})
    with pytest.raises(InputError, match=f"^env: mine/x-v0 {says}"):
        tasks.minari.check_space("mine/x-v0", space)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-np.inf, np.inf), (0, 0), (-1, 2)])
def test_actions_are_in_a_symmetric_finite_box(low, high):
    env = gymnasium.make("Pendulum-v1")
    env.action_space = gymnasium.spaces.Box(low, high, (2,))
    with pytest.raises(InputError, match="expected .-a, a. with a finite a"):
        tasks.gymnasium_task.GymnasiumTask("mine/x-v0", env)


@pytest.mark.parametrize("name", ["mine/kitchen-v0", "mine/antmaze-v0"])
def test_rules_of_d4rls_tasks_are_theirs_alone(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    record(name, Recording(gymnasium.make("Pendulum-v1")))
    task = tasks.make(name, str(tmp_path))
    assert (task.end_reward, task.subtasks, task.has_goal) == (np.inf, [], False)
    assert task.physics.startswith("gymnasium ") and task.score(-123.0, False) == -123.0


def test_a_download_ends_whole_or_leaves_nothing(root, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as if the server were away, but without waiting
    line = error_line(call(*TINY, "--env", "D4RL/door/humn-v2"))
    assert re.search(f"cannot download D4RL/door/humn-v2 to .*reach.*close matches.*: {DOOR}", line)
    assert not list(tmp_path.iterdir())
    copy = f"""
import os, shutil, sys
target = os.path.join(os.environ["MINARI_DATASETS_PATH"], sys.argv[1])
shutil.copytree(os.path.join({str(root)!r}, sys.argv[1]), target)
"""
    monkeypatch.setattr(tasks.minari, "MINARI_DOWNLOAD", copy + "sys.exit(1)")
    assert "exit code 1" in error_line(call(*TINY, "--env", DOOR))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tasks.minari, "MINARI_DOWNLOAD", copy)
    assert tasks.make(DOOR).data_file(None) == tmp_path / DOOR
    assert [path.name for path in tmp_path.iterdir()] == ["D4RL"]


def test_a_signal_stops_a_download_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes requests, and never answers
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "NO_PROXY": "*"}
        env |= {"MINARI_DATASETS_PATH": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        process = start_run(tmp_path, *TINY, "--env", DOOR, env=os.environ | env)
        connection, _ = server.accept()
        connection.settimeout(60)
        assert connection.recv(10_000).startswith(b"GET /api/")
        process.send_signal(signal.SIGTERM)
        assert finish(process).returncode == 143
        assert connection.recv(1) == b""  # the process that downloads has gone too
    assert not list(tmp_path.iterdir())
