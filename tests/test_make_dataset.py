"""tools/make_dataset.py against the real D4RL: layout, physics, rewards, repeatability, errors."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from helpers import QUICKSTART, ROOT, call_tool, file_size_limit
from tasks import d4rl_compat
from tools import make_dataset
from tools.recipes import antmaze, maze2d

TOOL = [sys.executable, str(ROOT / "tools" / "make_dataset.py")]
ANT, POINT = "antmaze-umaze-v2", "maze2d-umaze-v1"
SIZES = {ANT: 2_000, POINT: 100_000}

Arrays = dict[str, np.ndarray]
each_family = pytest.mark.parametrize("task", SIZES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess:
    """A file of the ant's, "a b.hdf5", by the real command line in the folder `made.cwd`."""
    folder = tmp_path_factory.mktemp("datasets")
    options = ["--transitions", str(SIZES[ANT]), "--output", "a b.hdf5", "--workers", "2"]
    done = subprocess.run([*TOOL, ANT, *options], cwd=folder, capture_output=True, text=True)
    done.cwd = folder
    return done


@pytest.fixture(scope="module")
def paths(made: subprocess.CompletedProcess) -> dict[str, Path]:
    """One file of each family, made with seed 0."""
    return {ANT: made.cwd / "a b.hdf5", POINT: QUICKSTART}


@pytest.fixture(scope="module")
def envs() -> dict[str, Any]:
    return {task: d4rl_compat.make(task) for task in SIZES}


@pytest.fixture(scope="module")
def datasets(paths: dict[str, Path], envs: dict[str, Any]) -> dict[str, Arrays]:
    """The files as D4RL reads them, after its own checks."""
    return {task: envs[task].get_dataset(h5path=str(path)) for task, path in paths.items()}


def find_ends(dataset: Arrays) -> np.ndarray:
    """Index of the last row of each episode."""
    return np.flatnonzero(dataset["terminals"] | dataset["timeouts"])


def test_the_command_line_saves_and_says_how_to_go_on(made: subprocess.CompletedProcess):
    assert made.returncode == 0, made.stderr
    first, second, third = made.stdout.splitlines()
    assert first.startswith("a b.hdf5: 2,000 transitions, ")
    with h5py.File(made.cwd / "a b.hdf5") as file:
        ends = find_ends({name: file[name][:] for name in ("terminals", "timeouts")})
        reached = file["rewards"][:].sum() / len(ends)
    assert second == (
        f"{len(ends)} episodes, {2_000 / len(ends):.0f} transitions long on average; "
        f"{reached:.1%} of them reach the task's goal"
    )
    assert third == (
        "Train on it: python cal_ql.py --config_path configs/antmaze.yaml "
        "--env antmaze-umaze-v2 --dataset_path 'a b.hdf5'"
    )
    assert [path.name for path in made.cwd.iterdir()] == ["a b.hdf5"]


@pytest.mark.parametrize(("task", "widths"), [(ANT, (29, 8, 15, 14)), (POINT, (4, 2, 2, 2))])
def test_layout(paths: dict[str, Path], datasets: dict[str, Arrays], task: str, widths: tuple):
    columns = dict(zip("observations actions infos/qpos infos/qvel infos/goal".split(), widths))
    expected = {name: ((width,), np.float32) for name, width in columns.items()}
    expected |= {"infos/goal": ((2,), np.float32), "rewards": ((), np.float32)}
    expected |= {"terminals": ((), np.bool_), "timeouts": ((), np.bool_)}
    dataset = datasets[task]
    assert {name: (a.shape[1:], a.dtype) for name, a in dataset.items()} == expected
    assert {len(array) for array in dataset.values()} == {SIZES[task]}
    assert all(np.isfinite(array).all() for array in dataset.values())
    assert np.abs(dataset["actions"]).max() == 1
    with h5py.File(paths[task]) as file:
        attributes = dict(file["metadata"].attrs)
    command = f"tools/make_dataset.py {task} --transitions {SIZES[task]} --seed 0"
    assert attributes["command"] == command
    assert attributes["action_noise"] == {ANT: 0.2, POINT: 0.5}[task]
    assert attributes["physics"] == d4rl_compat.PHYSICS


@each_family
def test_d4rl_splits_it_into_transitions_and_episodes(
    datasets: dict[str, Arrays], envs: dict[str, Any], task: str
):
    import d4rl

    dataset, limit = datasets[task], envs[task].spec.max_episode_steps
    transitions = d4rl.qlearning_dataset(envs[task], dataset)
    kept = np.flatnonzero(~dataset["timeouts"][:-1])
    np.testing.assert_array_equal(transitions["observations"], dataset["observations"][kept])
    np.testing.assert_array_equal(transitions["terminals"], dataset["terminals"][kept])
    lengths = [len(e["rewards"]) for e in d4rl.sequence_dataset(envs[task], dataset)]
    ends = find_ends(dataset)
    np.testing.assert_array_equal(lengths, np.diff(ends, prepend=-1))
    assert ends[-1] == SIZES[task] - 1
    assert not (dataset["terminals"] & dataset["timeouts"]).any()
    assert min(lengths) > 1 and max(lengths) <= limit
    if task == ANT:
        assert len({tuple(goal) for goal in dataset["infos/goal"][ends]}) == len(ends)


def test_each_row_of_maze2d_is_a_transition_of_the_environment(
    datasets: dict[str, Arrays], envs: dict[str, Any]
):
    dataset, maze = datasets[POINT], envs[POINT].unwrapped
    for row in range(9_200, 10_200):
        maze.set_state(dataset["infos/qpos"][row], dataset["infos/qvel"][row])
        maze.set_target(dataset["infos/goal"][row])
        observation, reward, done, _ = maze.step(dataset["actions"][row])
        assert (reward, done) == (dataset["rewards"][row], dataset["terminals"][row])
        if (row + 1) % maze2d.TRAJECTORY:  # the point goes on after a timeout
            np.testing.assert_allclose(observation, dataset["observations"][row + 1], atol=1e-5)
        else:
            assert dataset["timeouts"][row]
    assert dataset["rewards"].any() and not dataset["terminals"].any()
    assert (dataset["infos/goal"] == 1).all()  # the cell of D4RL's U-maze marked G


def test_antmaze_episodes_follow_from_their_seeds_and_actions(
    datasets: dict[str, Arrays], envs: dict[str, Any]
):
    dataset, env, row = datasets[ANT], envs[ANT], 0
    for episode in range(len(find_ends(dataset)) - 1):  # the last one is cut short
        seeds = np.random.SeedSequence((0, episode))
        observation, done = d4rl_compat.reset(env, int(seeds.generate_state(1)[0])), False
        while not done:
            start = dataset["observations"][row]
            np.testing.assert_array_equal(observation.astype(np.float32), start)
            observation, reward, done, info = env.step(dataset["actions"][row])
            assert reward == dataset["rewards"][row]
            timeout = info.get("TimeLimit.truncated", False)
            assert (done and not timeout) == dataset["terminals"][row]
            assert timeout == dataset["timeouts"][row]
            row += 1


def test_a_short_file_is_the_beginning_of_a_longer_one_whatever_the_workers(
    datasets: dict[str, Arrays], envs: dict[str, Any], tmp_path: Path
):
    make_dataset.write_dataset(tmp_path / "short", ANT, 900, seed=0, workers=1)
    for name, array in envs[ANT].get_dataset(h5path=str(tmp_path / "short")).items():
        np.testing.assert_array_equal(array[:-1], datasets[ANT][name][:899], err_msg=name)


def test_the_quickstarts_file_can_be_made_again(
    datasets: dict[str, Arrays], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(maze2d, "TRAJECTORY", 1_500)
    again = maze2d.Maze2D(POINT).rollout(np.random.SeedSequence((0, 0)))
    for name, array in again.items():  # another processor may round differently
        expected = datasets[POINT][name][:1_499]
        np.testing.assert_allclose(array[:-1], expected, atol=1e-4, err_msg=name)


def test_another_seed_other_contents_and_the_time_limit_is_a_timeout(datasets: dict[str, Arrays]):
    ant = antmaze.AntMaze(ANT)
    ant.env._max_episode_steps = 40
    other = ant.rollout(np.random.SeedSequence((1, 0)))
    same = datasets[ANT]["observations"][:40]
    assert not np.isclose(other["observations"], same).all(axis=1).any()
    assert other["timeouts"].tolist() == [False] * 39 + [True] and not other["terminals"].any()


def test_play_has_few_starts_and_diverse_has_all():
    starts = {}
    for kind in ("play", "diverse"):
        ant = antmaze.AntMaze(f"antmaze-medium-{kind}-v2")
        ant.env._max_episode_steps = 1
        rollouts = [ant.rollout(np.random.SeedSequence((0, i))) for i in range(150)]
        starts[kind] = {ant.cell_at(rollout["observations"][0, :2]) for rollout in rollouts}
        assert starts[kind] == set(ant.plan.starts)
        assert set(ant.plan.destinations) == starts[kind] | {(6, 6)}  # the task's goal
    assert starts["play"] == {(1, 1), (2, 6), (5, 1), (6, 5)}  # marked in D4RL's BIG_MAZE
    assert len(starts["diverse"]) == 25  # all free cells but the goal's
    assert antmaze.AntMaze(ANT).plan.starts == []


# ---------------------------------------------------------------------------- what goes wrong


BAD_INPUT = {
    "pen-cloned-v1": "no recipe for 'pen-cloned-v1'; there is one for maze2d-umaze-v1, ",
    f"{ANT} --transitions 0": "transitions: found 0, expected 1 to",
    f"{ANT} --transitions 1e6": "invalid int value: '1e6'",
    f"{ANT} --seed -1": "seed: found -1, expected 0 to",
    f"{ANT} --seed 99999999999999999999999": "9999, expected 0 to",
    f"{ANT} --output missing/a.hdf5": "there is no directory missing",
    f"{ANT} --output saved": "saved exists; choose another --output",
    f"{ANT} --output {5_000 * 'x'}": "File name too long",
    f"{ANT} --output ~/saved": "saved exists",
    f"{POINT} --demonstrations saved": "takes no --demonstrations",
    "door-human-v1": "needs --demonstrations",
    "door-human-v1 --demonstrations missing": "missing",
    "door-human-v1 --demonstrations /dev/zero": "regular file",
    "": "the following arguments are required: task",
    ANT: "nowhere.npz, the ant's walking policy, is missing",
}


@pytest.mark.parametrize("arguments", BAD_INPUT)
def test_bad_input_gives_one_line_and_status_2(
    arguments: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(antmaze, "WALKER", folder / "nowhere.npz")
    monkeypatch.setenv("HOME", str(folder))
    (folder / "saved").write_text("precious")
    done = call_tool(make_dataset, *arguments.split())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("make_dataset.py: error: ")
    assert BAD_INPUT[arguments] in done.stderr
    assert [path.read_text() for path in folder.iterdir()] == ["precious"]


@pytest.mark.parametrize("where, code", [("| head -1", 141), ("> /dev/full", 1), (">&-", 0)])
def test_output_that_nobody_takes_is_no_traceback(where: str, code: int):
    command = f"set -o pipefail; {TOOL[0]} {TOOL[1]} --help {where}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr.count("\n") == (code == 1), done.stderr
    assert done.returncode == code or where == "| head -1" and done.returncode == 0


def test_recipes_need_no_torch_until_they_learn():
    """Every worker process imports them."""
    program = """import sys
from tools import make_dataset, recipes
assert "mujoco" not in sys.modules  # nor need --help wait for it
for task in recipes.RECIPES:
    assert recipes.find_recipe(task).config
print({"torch", "wandb", "cal_ql"} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_what_goes_wrong_in_a_worker_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "packages").mkdir()
    (folder / "packages" / "ogbench.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(folder / "packages")
    options = "--workers", 1, "--output", "a.npz"
    done = call_tool(make_dataset, "pointmaze-medium-stitch-singletask-v0", *options)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("make_dataset.py: error: env: ") and "missing here (not here)" in line


def test_a_full_disk_gives_one_line_and_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    random = np.random.default_rng(0)
    rows = {name: random.random((5_000, 9), np.float32) for name in ("observations", "rewards")}
    rows |= {name: np.zeros(5_000, bool) for name in ("terminals", "timeouts")}
    monkeypatch.setattr(make_dataset, "rollouts", lambda *_: iter([rows]))
    with file_size_limit(50_000):
        done = call_tool(make_dataset, ANT, "--transitions", 5000, "--output", "a.hdf5")
    assert done.returncode == 1
    assert "error: cannot write a.hdf5: " in done.stderr.splitlines()[-1]
    assert not list(folder.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_behind(number: signal.Signals, tmp_path: Path):
    command = [*TOOL, ANT, "--output", "a.hdf5", "--workers", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    process.stderr.read(1)  # of the progress bar
    process.send_signal(number)
    _, error = process.communicate()  # stderr ends when the last worker has ended
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert error.splitlines()[-1].endswith("interrupted; nothing was saved")
        assert "Traceback" not in error
    assert not list(tmp_path.iterdir())
