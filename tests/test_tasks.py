"""Tasks by id, and D4RL's kitchen with the rewards of its data."""

import numpy as np
import pytest
import torch

import tasks
from cal_ql import Actor, Config, load_dataset, play_episode, to_transitions
from helpers import write_dataset
from runs.errors import InputError
from tasks.files import read_npz
from tasks.gymnasium_task import GymnasiumTask
from tasks.task import check_rows

FAILURE_REWARDS = {
    "antmaze-umaze-v2": 0.0,
    "maze2d-umaze-v1": 0.0,
    "maze2d-umaze-dense-v1": None,
    "door-cloned-v1": None,
    "kitchen-mixed-v0": None,
    "halfcheetah-medium-v2": None,
    "hopper-medium-v2": None,
    "walker2d-medium-v2": None,
    "ant-medium-v2": None,
}


@pytest.mark.parametrize("name", FAILURE_REWARDS)
def test_what_a_task_says_of_itself(name):
    task = tasks.make(name)
    observation = task.reset(seed=3)
    assert observation.shape == (task.observation_dim,) and observation.dtype == np.float32
    found = task.step(np.zeros(task.action_dim, np.float32))
    assert [type(value) for value in found] == [np.ndarray, float, bool, bool, bool]
    assert task.failure_reward == FAILURE_REWARDS[name]
    assert task.has_goal == (name.startswith(("antmaze", "maze2d-umaze-v1", "door", "kitchen")))


# sizes of D4RL's observations and actions by the beginning of the id
SIZES = {"antmaze": (29, 8), "maze2d": (4, 2), "kitchen": (60, 9), "ant-": (111, 8)}
SIZES |= {"hopper": (11, 3), "halfcheetah": (17, 6), "walker2d": (17, 6)}
SIZES |= {"pen": (45, 24), "door": (39, 28), "hammer": (46, 26), "relocate": (39, 30)}


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_every_id_of_d4rls_with_data_and_reference_scores_is_a_task():
    """But minigrid's two, whose observations are pictures and whose actions are six directions."""
    tasks.make("hopper-medium-v2")  # which imports D4RL
    import gym

    specs = gym.envs.registry.env_specs
    ids = [name for name, spec in specs.items() if str(spec.entry_point).startswith("d4rl.")]
    known = {"dataset_url", "ref_min_score", "ref_max_score"}
    ids = [name for name in ids if known <= set(specs[name].kwargs)]
    assert len(ids) == 150
    playable = [name for name in ids if not name.startswith("minigrid")]
    assert len(playable) == 148
    for name in playable:
        task = tasks.make(name)
        (sizes,) = (sizes for start, sizes in SIZES.items() if name.startswith(start))
        assert (task.observation_dim, task.action_dim) == sizes, name
        assert task.max_episode_steps == specs[name].max_episode_steps, name
        task.reset(seed=0)
        step = task.step(np.full(task.action_dim, 0.1))
        assert step.observation.shape == sizes[:1] and np.isfinite(step.observation).all(), name
        assert np.isfinite(step.reward) and not (step.terminal or step.truncated), name
        low, high = specs[name].kwargs["ref_min_score"], specs[name].kwargs["ref_max_score"]
        assert task.score(0.0, False) == pytest.approx(-100 * low / (high - low)), name
        assert task.score(low, False) == pytest.approx(0.0), name  # a random policy's return


@pytest.mark.parametrize(
    "name",
    [
        *(f"{body}-random-v2" for body in ("hopper", "halfcheetah", "walker2d", "ant")),
        *(f"{task}-human-v1" for task in ("pen", "door", "hammer", "relocate")),
    ],
)
def test_a_random_policy_scores_about_0(name):
    task = tasks.make(name)
    rng = np.random.default_rng(0)
    scores = []
    for seed in range(3):
        task.reset(seed)
        rewards = []
        ended = False
        while not ended:
            step = task.step(rng.uniform(-1, 1, task.action_dim))
            rewards.append(step.reward)
            ended = step.terminal or step.truncated
        scores.append(task.score(sum(rewards), step.success))
    assert abs(np.mean(scores)) < 10


NAMES = ["CartPole-v1", "Pendulum-v1", "../x", "", "minigrid-fourrooms-v0", "antmaze-umase-v2"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_task_is_named_in_one_line(name):
    with pytest.raises(InputError, match="env: ") as caught:
        tasks.make(name)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------- kitchen


@pytest.fixture(scope="module")
def kitchen() -> tasks.Task:
    return tasks.make("kitchen-mixed-v0")


def complete(task: tasks.Task, subtasks: list[str]) -> None:
    """Reset, with the objects of these subtasks at their goals."""
    from d4rl.kitchen import kitchen_envs

    env = task.env.unwrapped
    env.sim.data.qpos[:], env.sim.data.qvel[:] = env.init_qpos, 0.0
    for name in subtasks:
        place = kitchen_envs.OBS_ELEMENT_INDICES[name]
        env.sim.data.qpos[place] = kitchen_envs.OBS_ELEMENT_GOALS[name]
    env.sim.forward()


DONE = [["microwave"], ["microwave", "kettle"], ["kettle"], ["kettle", "light switch"]]


def play(task: tasks.Task, plan: list[list[str]]) -> list[tuple]:
    task.reset(seed=0)
    played = []
    for subtasks in plan:
        complete(task, subtasks)
        played.append(task.step(np.zeros(task.action_dim, np.float32)))
    return played


def test_every_step_pays_the_subtasks_complete_in_its_state(kitchen):
    played = play(kitchen, DONE)
    assert [reward for _, reward, *_ in played] == [len(subtasks) for subtasks in DONE]
    assert not any(terminal or truncated or success for *_, terminal, truncated, success in played)
    # D4RL's score: three of four distinct subtasks were complete at some time
    assert kitchen.score(sum(reward for _, reward, *_ in played), False) == 75.0


def test_an_episode_ends_where_all_subtasks_hold_at_once(kitchen):
    everything = list(kitchen.env.unwrapped.TASK_ELEMENTS)
    halves = [everything[:2], everything[2:], everything]
    ends = [(terminal, success) for *_, terminal, _, success in play(kitchen, halves)]
    assert ends == [(False, False), (False, True), (True, True)]
    assert kitchen.score(0.0, True) == 100.0
    assert play(kitchen, [[]])[0][1] == 0  # a reset forgets


def test_a_state_is_worth_the_same_offline_and_online(kitchen, monkeypatch, tmp_path):
    """Two subtasks done: D4RL's files pay 2 at every step of it, its environment once."""
    reset = kitchen.reset

    def reset_with_two_done(seed):
        reset(seed)
        complete(kitchen, ["microwave", "kettle"])
        return np.zeros(60, np.float32)

    monkeypatch.setattr(kitchen, "reset", reset_with_two_done)
    monkeypatch.setattr(kitchen.env, "_max_episode_steps", 3)
    path = write_dataset(tmp_path / "kitchen.hdf5", 60, 9, n=4, rewards=np.array([2, 2, 4, 2]))
    config = Config(reward_bias=-4.0, normalize=False)
    dataset = load_dataset(config, kitchen, path, torch.device("cpu"), {})
    assert dataset.rows.rewards.tolist() == [-2, -2, 0, -2]
    assert dataset.rows.terminals.tolist() == [0, 0, 1, 0]
    actor = Actor(60, 9, Config(hidden_dim=8))
    episode = play_episode(kitchen, 0, actor, dataset.scaling, explore=False)
    assert to_transitions(episode, dataset, 0.99).rewards.tolist() == [-2, -2, -2]
    assert episode.score == 50.0 and not episode.terminal


# ---------------------------------------------------------------------------- a task of one's own


def test_a_gymnasium_environment_and_an_npz_file_are_a_task(tmp_path):
    gymnasium = pytest.importorskip("gymnasium")

    class Pendulum(GymnasiumTask):
        has_goal = False

        def __init__(self):
            super().__init__("pendulum", gymnasium.make("Pendulum-v1"))

        def rows(self, path):
            return check_rows(read_npz(path), self, path)

    task = Pendulum()
    rng = np.random.default_rng(0)
    raw = {"observations": rng.normal(size=(50, 3)), "actions": rng.uniform(-2, 2, (50, 1))}
    raw |= {"rewards": rng.normal(size=50), "terminals": np.zeros(50), "timeouts": np.ones(50)}
    raw["timeouts"][::2] = 0
    np.savez(tmp_path / "data.npz", **raw, seeds=np.arange(3))
    path = task.data_file(str(tmp_path / "data.npz"))
    config = Config(normalize=False)
    dataset = load_dataset(config, task, path, torch.device("cpu"), {})
    np.testing.assert_allclose(dataset.rows.actions[:, 0], raw["actions"][:, 0] / 2, rtol=1e-6)
    assert dataset.transitions.tolist() == list(range(0, 50, 2))
    actor = Actor(3, 1, Config(hidden_dim=8))
    episode = play_episode(task, 0, actor, dataset.scaling, explore=False)
    assert len(episode.rewards) == task.max_episode_steps == 200 and not episode.terminal
    assert episode.score == pytest.approx(sum(episode.rewards), rel=1e-5)
    with pytest.raises(InputError, match="there is no file"):
        task.data_file("nowhere.npz")
    with pytest.raises(InputError, match="no data is published"):
        task.data_file(None)


@pytest.mark.parametrize("name", ["CartPole-v1", "MountainCar-v0"])
def test_an_environment_of_another_kind_is_named_in_one_line(name):
    gymnasium = pytest.importorskip("gymnasium")
    with pytest.raises(InputError, match="has the space Discrete.*expected a Box"):
        GymnasiumTask(name, gymnasium.make(name))
    endless = gymnasium.make("Pendulum-v1", max_episode_steps=-1)
    with pytest.raises(InputError, match="has no time limit"):
        GymnasiumTask(name, endless)
