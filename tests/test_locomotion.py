"""D4RL's locomotion: data made at random against the real D4RL, and a run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import tasks
from helpers import ROOT, call, call_tool, check_no_goal, only_run
from tasks import d4rl_compat
from tools import evaluate, make_dataset
from tools.recipes import find_recipe, locomotion
from tools.recipes.common import Rows

HOPPER, CHEETAH, ANT = "hopper-random-v2", "halfcheetah-random-v2", "ant-random-v2"
TASKS = [HOPPER, "walker2d-random-v2", CHEETAH, ANT]
ROWS = 400


def rollouts(task: str, numbers: range) -> list[Rows]:
    recipe = locomotion.Random(task)
    recipe.env._max_episode_steps = 120
    return [recipe.rollout(np.random.SeedSequence((0, number))) for number in numbers]


@pytest.fixture(scope="module")
def folder_of_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each task, TASK.hdf5, with some episodes of at most 120 steps."""
    folder = tmp_path_factory.mktemp("random")
    for task in TASKS:
        parts = rollouts(task, range(4))
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        recipe = find_recipe(task)
        recipe.write(folder / f"{task}.hdf5", rows, recipe.metadata(task, 0, "a test"))
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_the_file_is_one_of_d4rls(task: str, folder_of_data: Path):
    env = d4rl_compat.make(task)
    path = folder_of_data / f"{task}.hdf5"
    dataset = env.get_dataset(h5path=str(path))  # after D4RL's own checks
    data = env.unwrapped.sim.data
    columns = {"observations": env.observation_space.shape, "actions": env.action_space.shape}
    columns |= {"next_observations": columns["observations"], "infos/action_log_probs": ()}
    columns |= {"infos/qpos": data.qpos.shape, "infos/qvel": data.qvel.shape, "rewards": ()}
    expected = {name: (shape, np.float32) for name, shape in columns.items()}
    expected |= {"terminals": ((), np.bool_), "timeouts": ((), np.bool_)}
    assert {name: (a.shape[1:], a.dtype) for name, a in dataset.items()} == expected
    log_probability = np.float32(-np.log(2) * env.action_space.shape[0])
    assert (dataset["infos/action_log_probs"] == log_probability).all()
    with h5py.File(path) as file:
        about = dict(file["metadata"].attrs)
    assert about["recipe"].startswith("Make a dataset for D4RL's locomotion tasks by ")
    assert about["task"] == task and "action_noise" not in about


@pytest.mark.parametrize("task", TASKS)
def test_episodes_follow_from_their_seeds_and_actions(task: str, folder_of_data: Path):
    env = d4rl_compat.make(task)
    env._max_episode_steps = 120
    rows = env.get_dataset(h5path=str(folder_of_data / f"{task}.hdf5"))
    data = env.unwrapped.sim.data
    row = 0
    for number in range(4):
        seeds = np.random.SeedSequence((0, number))
        observation = d4rl_compat.reset(env, int(seeds.generate_state(1)[0]))
        done = False
        while not done:
            np.testing.assert_array_equal(observation.astype(np.float32), rows["observations"][row])
            np.testing.assert_array_equal(data.qpos.astype(np.float32), rows["infos/qpos"][row])
            np.testing.assert_array_equal(data.qvel.astype(np.float32), rows["infos/qvel"][row])
            observation, reward, done, info = env.step(rows["actions"][row])
            following = rows["next_observations"][row]
            np.testing.assert_array_equal(observation.astype(np.float32), following)
            assert np.float32(reward) == rows["rewards"][row]
            timeout = info.get("TimeLimit.truncated", False)
            assert rows["timeouts"][row] == timeout
            assert rows["terminals"][row] == (done and not timeout)
            row += 1
    assert row == len(rows["rewards"])
    assert rows["timeouts"].any() == (task in (CHEETAH, ANT))  # others fall before
    assert not (rows["terminals"].any() and task == CHEETAH)  # which cannot fall


def test_actions_are_uniform_and_those_of_no_other_episode(folder_of_data: Path):
    with h5py.File(folder_of_data / f"{CHEETAH}.hdf5") as file:
        actions = file["actions"][:]
    assert np.abs(actions).max() <= 1
    shares = np.histogram(actions, bins=4, range=(-1, 1))[0] / actions.size
    np.testing.assert_allclose(shares, 0.25, atol=0.03)
    assert len(np.unique(actions)) > 0.99 * actions.size


def test_a_short_file_is_the_beginning_of_a_longer_one_whatever_the_workers(tmp_path: Path):
    """Files made by two workers equal the rollouts of this process, made in a different order."""
    recipe = locomotion.Random(HOPPER)
    expected: list[Any] = [None] * 40
    for number in np.random.default_rng(0).permutation(40):
        expected[number] = recipe.rollout(np.random.SeedSequence((7, int(number))))
    env = d4rl_compat.make(HOPPER)
    for size, workers in ((ROWS, 2), (150, 1)):
        path = tmp_path / f"{size}"
        make_dataset.write_dataset(path, HOPPER, size, seed=7, workers=workers)
        for name, array in env.get_dataset(h5path=str(path)).items():
            rows = np.concatenate([part[name] for part in expected])
            assert len(rows) >= size == len(array)
            np.testing.assert_array_equal(array[:-1], rows[: size - 1], err_msg=name)
        with h5py.File(path) as file:
            assert file["terminals"][-1] or file["timeouts"][-1]


def test_the_other_recipes_files_keep_their_description():
    text = (ROOT / "tools" / "recipes" / "description.txt").read_text()
    about = find_recipe("maze2d-umaze-v1").metadata("maze2d-umaze-v1", 0, "")
    assert (about["recipe"], about["action_noise"]) == (text, 0.5)


# ---------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("task", [HOPPER, CHEETAH])
def test_a_run_has_neither_success_nor_regret_nor_failures(
    task: str, folder_of_data: Path, folder: Path
):
    options = """--device cpu --hidden_dim 8 --batch_size 16 --cql_n_actions 2 --n_episodes 1
        --log_freq 10 --offline_iterations 30 --online_iterations 40 --checkpoints_path runs"""
    options = [*options.split(), "--config_path", ROOT / "configs" / "locomotion.yaml"]
    done = call(*options, "--env", task, "--dataset_path", folder_of_data / f"{task}.hdf5")
    assert done.returncode == 0, done.stderr
    check_no_goal(folder / "runs")
    played = call_tool(evaluate, only_run(folder / "runs"), "--episodes", 1)
    assert played.returncode == 0, played.stderr
    assert "normalized score" in played.stdout and "success rate" not in played.stdout


@pytest.mark.parametrize("task", TASKS)
def test_every_body_is_one_without_a_goal(task: str):
    made = tasks.make(task)
    assert (made.has_goal, made.failure_reward, made.is_locomotion) == (False, None, True)
