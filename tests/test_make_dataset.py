"""tools/make_dataset.py against the real D4RL: layout, physics, rewards, repeatability, errors."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

import make_dataset  # noqa: E402

import d4rl_compat  # noqa: E402

TOOL = [sys.executable, str(ROOT / "tools" / "make_dataset.py")]
QUICKSTART = ROOT / "datasets" / "maze2d-umaze-v1-small.hdf5"
ANT, POINT = "antmaze-umaze-v2", "maze2d-umaze-v1"
SIZES = {ANT: 4_000, POINT: 100_000}

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of each family, made with seed 0."""
    path = tmp_path_factory.mktemp("datasets") / "ant.hdf5"
    make_dataset.write_dataset(path, ANT, SIZES[ANT], seed=0, workers=2)
    return {ANT: path, POINT: QUICKSTART}


@pytest.fixture(scope="module")
def envs() -> dict[str, Any]:
    return {task: d4rl_compat.make(task) for task in SIZES}


@pytest.fixture(scope="module")
def datasets(paths: dict[str, Path], envs: dict[str, Any]) -> dict[str, Arrays]:
    """The files as D4RL reads them, after its own checks."""
    return {task: envs[task].get_dataset(h5path=str(path)) for task, path in paths.items()}


def ends_of(dataset: Arrays) -> np.ndarray:
    """Index of the last row of each episode."""
    return np.flatnonzero(dataset["terminals"] | dataset["timeouts"])


def simulation(env: Any) -> Any:
    """D4RL's maze itself, under its wrappers."""
    return getattr(env.unwrapped, "wrapped_env", env.unwrapped)


@pytest.mark.parametrize(("task", "widths"), [(ANT, (29, 8, 15, 14)), (POINT, (4, 2, 2, 2))])
def test_layout(paths: dict[str, Path], datasets: dict[str, Arrays], task: str, widths: tuple):
    observation, action, qpos, qvel = widths
    expected = {
        "observations": ((observation,), np.float32),
        "actions": ((action,), np.float32),
        "rewards": ((), np.float32),
        "terminals": ((), np.bool_),
        "timeouts": ((), np.bool_),
        "infos/goal": ((2,), np.float32),
        "infos/qpos": ((qpos,), np.float32),
        "infos/qvel": ((qvel,), np.float32),
    }
    dataset = datasets[task]
    assert {name: (a.shape[1:], a.dtype) for name, a in dataset.items()} == expected
    assert {len(array) for array in dataset.values()} == {SIZES[task]}
    assert all(np.isfinite(array).all() for array in dataset.values())
    assert np.abs(dataset["actions"]).max() == 1
    with h5py.File(paths[task]) as file:
        attributes = dict(file["metadata"].attrs)
    assert attributes["command"] == (
        f"tools/make_dataset.py {task} --transitions {SIZES[task]} --seed 0"
    )
    assert attributes["action_noise"] == {ANT: 0.2, POINT: 0.5}[task]
    assert attributes["physics"] == d4rl_compat.PHYSICS


@pytest.mark.parametrize("task", SIZES)
def test_d4rl_splits_it_into_transitions_and_episodes(
    datasets: dict[str, Arrays], envs: dict[str, Any], task: str
):
    import d4rl

    dataset = datasets[task]
    transitions = d4rl.qlearning_dataset(envs[task], dataset)
    kept = np.flatnonzero(~dataset["timeouts"][:-1])
    np.testing.assert_array_equal(transitions["observations"], dataset["observations"][kept])
    np.testing.assert_array_equal(transitions["terminals"], dataset["terminals"][kept])
    lengths = [len(e["rewards"]) for e in d4rl.sequence_dataset(envs[task], dataset)]
    np.testing.assert_array_equal(lengths, np.diff(ends_of(dataset), prepend=-1))


@pytest.mark.parametrize("task", SIZES)
def test_each_row_is_a_transition_of_the_environment(
    datasets: dict[str, Arrays], envs: dict[str, Any], task: str
):
    dataset, maze = datasets[task], simulation(envs[task])
    rows = range(9_000 if task == POINT else 0, 12_000 if task == POINT else SIZES[ANT] - 1)
    followed = ~(dataset["terminals"] | dataset["timeouts"])
    if task == POINT:  # the point goes on after a timeout
        followed = np.arange(1, SIZES[POINT] + 1) % make_dataset.POINT_TRAJECTORY != 0
        assert dataset["timeouts"][~followed].all()
    deviations = []
    for row in rows:
        qpos, qvel, goal = (dataset[f"infos/{name}"][row] for name in ("qpos", "qvel", "goal"))
        maze.set_state(qpos.astype(float), qvel.astype(float))
        maze.set_target(goal)
        observation, reward, done, _ = envs[task].unwrapped.step(dataset["actions"][row])
        assert reward == dataset["rewards"][row]
        assert done == dataset["terminals"][row]
        if followed[row]:
            expected = dataset["observations"][row + 1]
            # positions reach 36, so that float32 resolves 4e-6
            if not np.allclose(observation, expected, atol=1e-5, rtol=1e-6):
                deviations.append(np.abs(observation - expected).max())
    # where a foot just touches the ground, that rounding decides about the contact
    assert len(deviations) <= (0.01 * len(rows) if task == ANT else 0)
    assert max(deviations, default=0.0) < 0.5


def test_an_antmaze_episode_follows_from_its_seed_and_actions(
    datasets: dict[str, Arrays], envs: dict[str, Any]
):
    dataset, env, row = datasets[ANT], envs[ANT], 0
    for episode in range(3):
        seeds = np.random.SeedSequence((0, episode))
        observation, done = d4rl_compat.reset(env, int(seeds.generate_state(1)[0])), False
        while not done:
            np.testing.assert_array_equal(
                observation.astype(np.float32), dataset["observations"][row]
            )
            observation, reward, done, info = env.step(dataset["actions"][row])
            assert reward == dataset["rewards"][row]
            timeout = info.get("TimeLimit.truncated", False)
            assert (done and not timeout) == dataset["terminals"][row]
            assert timeout == dataset["timeouts"][row]
            row += 1


@pytest.mark.parametrize("task", SIZES)
def test_rewards_follow_from_observations_and_goal(datasets: dict[str, Arrays], task: str):
    dataset = datasets[task]
    distance = np.linalg.norm(dataset["observations"][1:, :2] - dataset["infos/goal"][:-1], axis=1)
    inside = ~(dataset["terminals"] | dataset["timeouts"])[:-1] & (np.abs(distance - 0.5) > 1e-5)
    np.testing.assert_array_equal(dataset["rewards"][:-1][inside], (distance <= 0.5)[inside])
    assert dataset["rewards"].any()
    if task == ANT:
        np.testing.assert_array_equal(dataset["rewards"] == 1, dataset["terminals"])
    else:
        assert not dataset["terminals"].any()
        assert (dataset["infos/goal"] == 1).all()  # the cell of D4RL's U-maze marked G


@pytest.mark.parametrize("task", SIZES)
def test_episodes_end_once_and_within_the_time_limit(
    datasets: dict[str, Arrays], envs: dict[str, Any], task: str
):
    dataset, limit = datasets[task], envs[task].spec.max_episode_steps
    ends = ends_of(dataset)
    lengths = np.diff(ends, prepend=-1)
    assert ends[-1] == SIZES[task] - 1
    assert not (dataset["terminals"] & dataset["timeouts"]).any()
    assert lengths.min() > 1 and lengths.max() <= limit
    if task == ANT:
        timeouts = dataset["timeouts"][ends]
        assert (lengths[:-1][timeouts[:-1]] == limit).all()
        assert timeouts.any() and not timeouts.all()  # some wander, some reach the goal
        starts = np.r_[0, ends[:-1] + 1]
        assert np.abs(dataset["observations"][starts, :2]).max() <= 0.1
        goals = np.split(dataset["infos/goal"], ends[:-1] + 1)
        assert all((goal == goal[0]).all() for goal in goals)
        assert len({tuple(goal[0]) for goal in goals}) == len(goals)


def test_same_seed_same_file_whatever_the_workers(paths: dict[str, Path], tmp_path: Path):
    make_dataset.write_dataset(tmp_path / "one", ANT, SIZES[ANT], seed=0, workers=1)
    assert (tmp_path / "one").read_bytes() == paths[ANT].read_bytes()


def test_another_seed_other_contents(datasets: dict[str, Arrays]):
    other = make_dataset.AntMaze(ANT).rollout(np.random.SeedSequence((1, 0)))["observations"]
    same = datasets[ANT]["observations"][: len(other)]
    assert not np.isclose(other, same).all(axis=1).any()


@pytest.mark.parametrize(("task", "size"), [(ANT, 900), (POINT, 11_000)])
def test_a_short_file_is_the_beginning_of_a_longer_one(
    datasets: dict[str, Arrays], envs: dict[str, Any], tmp_path: Path, task: str, size: int
):
    """For maze2d the longer one is the quickstart's, as it is in the repository."""
    make_dataset.write_dataset(tmp_path / "short", task, size, seed=0, workers=2)
    for name, array in envs[task].get_dataset(h5path=str(tmp_path / "short")).items():
        assert len(array) == size  # another processor may round differently
        np.testing.assert_allclose(array[:-1], datasets[task][name][: size - 1], atol=1e-4)


def test_play_has_few_starts_and_diverse_has_all():
    starts = {}
    for kind in ("play", "diverse"):
        ant = make_dataset.AntMaze(f"antmaze-medium-{kind}-v2")
        ant.env._max_episode_steps = 1
        rollouts = [ant.rollout(np.random.SeedSequence((0, i))) for i in range(150)]
        starts[kind] = {ant.cell_of(rollout["observations"][0, :2]) for rollout in rollouts}
        assert starts[kind] == set(ant.plan.starts)
        assert set(ant.plan.destinations) == starts[kind] | {(6, 6)}  # the task's goal
    assert starts["play"] == {(1, 1), (2, 6), (5, 1), (6, 5)}  # marked in D4RL's BIG_MAZE
    assert len(starts["diverse"]) == 25  # all free cells but the goal's
    assert make_dataset.AntMaze(ANT).plan.starts == []


@pytest.mark.parametrize("task", ["antmaze-medium-play-v2", "antmaze-large-play-v2"])
def test_the_ant_is_led_through_free_neighbouring_cells(task: str):
    ant = make_dataset.AntMaze(task)
    for (cell, end), following in ant.next_cell.items():
        assert following in ant.centres
        assert np.abs(np.subtract(following, cell)).sum() == (cell != end)
        assert ant.cell_of(ant.centres[cell] + 1.99) == cell
        assert ant.cell_of(ant.centres[cell] - 1.99) == cell


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["pen-cloned-v1"], "no recipe for 'pen-cloned-v1'; there is one for maze2d-umaze-v1, "),
        (["antmaze-umaze-v2", "--transitions", "0"], "--transitions must be 1 to"),
        (["antmaze-umaze-v2", "--transitions", "1e6"], "invalid int value: '1e6'"),
        (["antmaze-umaze-v2", "--seed", "-1"], "--seed must be 0 to"),
        (["antmaze-umaze-v2", "--output", "missing/a.hdf5"], "there is no directory missing"),
        (["antmaze-umaze-v2", "--output", "saved"], "saved exists; choose another --output"),
        ([], "the following arguments are required: task"),
    ],
)
def test_bad_input_gives_one_line_and_status_2(
    arguments: list[str], complaint: str, tmp_path: Path
):
    (tmp_path / "saved").write_text("precious")
    done = subprocess.run([*TOOL, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("make_dataset.py: error: ") and done.stderr.count("\n") == 1
    assert complaint in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert (tmp_path / "saved").read_text() == "precious"


def test_a_missing_walker_gives_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
):
    monkeypatch.setattr(make_dataset, "WALKER", tmp_path / "ant_walker.npz")
    monkeypatch.setattr(sys, "argv", ["make_dataset.py", ANT, "--output", str(tmp_path / "a")])
    with pytest.raises(SystemExit) as stop:
        make_dataset.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"make_dataset.py: error: {tmp_path / 'ant_walker.npz'}, the ant's walking policy, "
        "is missing\n"
    )


def test_the_command_line_saves_and_says_how_to_go_on(tmp_path: Path):
    command = [*TOOL, ANT, "--transitions", "100", "--output", "a b.hdf5", "--workers", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first == "a b.hdf5: 100 transitions, 0.1 MB"
    assert second.startswith("1 episodes, 100 transitions long on average; 0.0% of them")
    assert third == (
        "Train on it: python cal_ql.py --config_path configs/antmaze.yaml "
        "--env antmaze-umaze-v2 --dataset_path 'a b.hdf5'"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a b.hdf5"]


def test_a_full_disk_gives_one_line_and_leaves_nothing_behind(tmp_path: Path):
    command = [*TOOL, ANT, "--transitions", "1500", "--output", "a.hdf5", "--workers", "1"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("cannot write a.hdf5: ")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_behind(number: signal.Signals, tmp_path: Path):
    process = subprocess.Popen(
        [*TOOL, ANT, "--output", "a.hdf5"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    process.stderr.read(1)  # of the progress bar
    time.sleep(2)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)  # stderr ends when the last worker has ended
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert error.splitlines()[-1] == "interrupted; nothing was saved"
        assert "Traceback" not in error
    assert not list(tmp_path.iterdir())
