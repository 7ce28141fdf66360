"""OGBench's tasks against ogbench itself: episodes, rows, local data, runs and bad input."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import cal_ql
import tasks
from episodes import check_episodes
from helpers import ROOT, killed_at, resumed_like_left_alone
from runs.errors import InputError
from tools import make_dataset
from tools.recipes import find_recipe
from tools.recipes.writing import write_npz

CUBE, POINT = "cube-single-noisy-singletask-task4-v0", "pointmaze-medium-navigate-singletask-v0"
SCENE = "scene-play-singletask-v0"
DISCOUNT = 0.9


@pytest.fixture(scope="module")
def made() -> dict[str, tasks.Task]:
    return {name: tasks.make(name) for name in (CUBE, POINT, SCENE)}


def record_scene(task: tasks.Task) -> dict[str, np.ndarray]:
    """Two recordings of 40 rows: all subtasks are complete in one's rows 20 to 22, else a few."""
    task.reset(seed=0)
    scene = task.env.unwrapped
    qpos, buttons = scene._data.qpos.copy(), scene._target_button_states
    goal = qpos.copy()
    goal[14:17] = scene._data.mocap_pos[0]
    goal[14 + 7 + len(buttons) :] = scene._target_drawer_pos, scene._target_window_pos
    is_goal = np.isin(np.arange(80), (20, 21, 22))
    is_pressed = is_goal | (np.arange(80) % 7 == 0)
    return {
        "observations": np.random.normal(size=(80, task.observation_dim)),
        "actions": np.random.uniform(-1, 1, (80, 5)),
        "terminals": np.isin(np.arange(80), (39, 79)),
        "qpos": np.where(is_goal[:, None], goal, qpos),
        "qvel": np.zeros((80, scene.model.nv)),
        "button_states": np.where(is_pressed[:, None], buttons, 1 - buttons),
    }


@pytest.fixture(scope="module")
def files(made: dict[str, tasks.Task], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data of each task, some of it at its goal, also in the last row."""
    folder = tmp_path_factory.mktemp("data")
    seeds = np.random.SeedSequence((0, 0))
    rows = {name: find_recipe(name)(name).rollout(seeds) for name in (CUBE, POINT)}
    rows[SCENE] = record_scene(made[SCENE])
    for name, recorded in rows.items():
        for suffix in (".npz", "-val.npz"):  # OGBench's reader wants both
            write_npz(folder / (name + suffix), recorded, {})
    return {name: folder / f"{name}.npz" for name in rows}


# ---------------------------------------------------------------------------- episodes


def test_an_episode_follows_from_its_seed_and_actions() -> None:
    check_episodes(["pointmaze-teleport-navigate-singletask-v0", CUBE])


@pytest.mark.parametrize("name", [CUBE, POINT])
def test_recorded_actions_are_paid_and_end_as_the_rows_say(
    name: str, made: dict[str, tasks.Task], files: dict[str, Path]
) -> None:
    task, simulation = made[name], made[name].env.unwrapped
    rows, raw = task.rows(files[name]), np.load(files[name])
    task.reset(seed=0)
    assert 0 < rows["terminals"].sum() < 100
    for row in np.flatnonzero(rows["terminals"] | (np.arange(1001) % 10 == 0))[:-1]:
        simulation.set_state(*(raw[key][row].astype(float) for key in ("qpos", "qvel")))
        if name == CUBE:
            simulation.post_step()  # looks whether the cube is there
        observation, reward, terminal, _, success = task.step(raw["actions"][row])
        assert reward == rows["rewards"][row]
        assert terminal == success == rows["terminals"][row]
        if name == POINT:
            np.testing.assert_allclose(observation, rows["observations"][row + 1], atol=1e-5)
    assert task.score(-3.0, True) == 100.0 and task.score(0.0, False) == 0.0


# ---------------------------------------------------------------------------- rows


@pytest.mark.parametrize("name", [CUBE, POINT, SCENE])
def test_transitions_are_those_of_ogbench_itself(name: str, files: dict[str, Path]) -> None:
    import ogbench

    task = tasks.make(name)
    config = cal_ql.Config(normalize=False, is_sparse_reward=True, discount=DISCOUNT)
    data = cal_ql.load_dataset(config, task, files[name], torch.device("cpu"), {})
    found = cal_ql.Batch(*(column[data.transitions].numpy() for column in data.rows))
    _, theirs, _ = ogbench.make_env_and_datasets(name, dataset_path=str(files[name]))
    valid = ~np.load(files[name])["terminals"][data.transitions]  # else terminal: they drop those
    assert found.terminals[~valid].all()
    for ours, other in {
        "observations": theirs["observations"],
        "actions": theirs["actions"].clip(-1 + 1e-5, 1 - 1e-5),
        "rewards": theirs["rewards"],
        "terminals": 1 - theirs["masks"],
        "next_observations": theirs["next_observations"],
    }.items():
        np.testing.assert_array_equal(getattr(found, ours)[valid], other, err_msg=ours)
    assert found.terminals.any() and (found.rewards.min() < -1) == (name == SCENE)


def test_a_failed_recording_goes_on_as_it_was_on_average(
    made: dict[str, tasks.Task], files: dict[str, Path]
) -> None:
    config = cal_ql.Config(is_sparse_reward=True, discount=DISCOUNT, reward_scale=2, reward_bias=1)
    data = cal_ql.load_dataset(config, made[SCENE], files[SCENE], torch.device("cpu"), {})
    rewards = 2 * made[SCENE].rows(files[SCENE])["rewards"] + 1
    found = data.rows.returns_to_go.numpy()
    assert rewards[40:].min() < rewards[40:].max() < 1
    np.testing.assert_allclose(found[40:79], rewards[40:].mean() / (1 - DISCOUNT), rtol=1e-5)
    expected = sum(DISCOUNT**i * reward for i, reward in enumerate(rewards[10:21]))
    np.testing.assert_allclose(found[10], expected, rtol=1e-5)


# ---------------------------------------------------------------------------- local data


def test_a_longer_file_begins_as_a_shorter_one(files: dict[str, Path], tmp_path: Path) -> None:
    make_dataset.write_dataset(tmp_path / "made.npz", POINT, 1200, seed=0, workers=1)
    made, first = np.load(tmp_path / "made.npz"), np.load(files[POINT])
    for name in ("observations", "actions", "qpos", "qvel", "terminals"):
        np.testing.assert_array_equal(made[name][:1001], first[name])
        assert len(made[name]) == 1200
    assert np.flatnonzero(made["terminals"]).tolist() == [1000, 1199]


# ---------------------------------------------------------------------------- the command line

RUN = """--device cpu --is_sparse_reward true
    --offline_iterations 60 --online_iterations 100 --eval_freq 1000 --checkpoint_freq 20
    --log_freq 10 --n_episodes 1 --hidden_dim 8 --batch_size 16 --cql_n_actions 2
    --checkpoints_path .""".split()


def test_a_kill_leaves_no_trace(files: dict[str, Path], tmp_path: Path) -> None:
    run = [*RUN, "--env", POINT, "--dataset_path", files[POINT], "--eval_workers", 1]
    moment = cal_ql.Agent, "update", 100
    assert resumed_like_left_alone(tmp_path, run, run, *moment, end=killed_at) == []


CODE = """
import sys, tasks
task = tasks.make({name!r})
task.reset(0), task.step(task.action_scale)
print([name for name in ("gymnasium", "ogbench", "minari") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("name", "imported"), [("maze2d-umaze-v1", []), (CUBE, ["gymnasium", "ogbench"])]
)
def test_imports_are_silent_and_only_what_a_task_needs(name: str, imported: list[str]) -> None:
    command = [sys.executable, "-W", "default", "-c", CODE.format(name=name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{imported}\n", "")


# ---------------------------------------------------------------------------- bad input


def test_a_missing_package_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(InputError, match="pip install -r requirements-gymnasium.txt"):
        tasks.make(CUBE)


@pytest.mark.parametrize(
    "name",
    [
        "cube-sinlge-play-singletask-v0",
        "visual-cube-single-play-singletask-v0",
        "cube-single-play-singletask-task6-v0",
        "cube-single-singletask-v0",
    ],
)
def test_an_unknown_id_gives_close_matches(name: str) -> None:
    with pytest.raises(InputError, match=r"^env: .*matches: .*cube-single-play-singletask-[^\n]*$"):
        tasks.make(name)


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        (POINT.replace("medium", "large"), POINT, "its positions are in walls"),
        (POINT, CUBE, r"qpos has shape \(1001, 21\), the task needs \(N, 2\)"),
        (CUBE, POINT, r"qpos has shape \(1001, 2\), the task needs \(N, 21\)"),
        (CUBE, "cut short", "not a valid .npz file"),
        (CUBE, "no qpos", r"qpos has shape \(0,\), the task needs \(N, 21\)"),
        (
            SCENE,
            "no buttons",
            "not a valid .npz file .* .it lacks 'button_states'.",
        ),
        (CUBE, "an array", "not a valid .npz file"),
    ],
)
def test_bad_files_give_one_line(
    name: str, data: str, complaint: str, files: dict[str, Path], tmp_path: Path
) -> None:
    path, raw = tmp_path / "data.npz", dict(np.load(files[name if name in files else CUBE]))
    if data in files:
        path = files[data]
    elif data == "cut short":
        path.write_bytes(files[CUBE].read_bytes()[:-1000])
    elif data.startswith("no "):
        del raw[{"no qpos": "qpos", "no buttons": "button_states"}[data]]
        np.savez(path, **raw)
    else:
        with path.open("wb") as file:
            np.save(file, raw["actions"])
    with pytest.raises(InputError, match=f"^dataset {path}: {complaint}") as caught:
        tasks.make(name).rows(path)
    assert "\n" not in str(caught.value)


def test_only_a_whole_download_is_kept(
    made: dict[str, tasks.Task],
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, sent = files[CUBE].read_bytes(), [1000, 1000, None, None]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[: sent.pop(0)])

    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path / "ogbench"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(sys.modules["ogbench.utils"], "DATASET_URL", url)
        with pytest.raises(InputError, match="dataset: cannot download .* was cut short"):
            made[CUBE].data_file(None)
        assert list((tmp_path / "ogbench").iterdir()) == []
        path = made[CUBE].data_file(None)
        server.shutdown()
    assert (path.name, path.read_bytes()) == ("cube-single-noisy-v0.npz", whole)


def test_our_sweep_starts_runs_of_our_config() -> None:
    sweep = yaml.safe_load((ROOT / "configs" / "sweeps" / "ogbench.yaml").read_text())
    values = sweep["parameters"]
    path = str(ROOT / values["config_path"]["value"])
    for name in values["env"]["values"]:
        config = cal_ql.parse_config(["--config_path", path, "--env", name])
        assert tasks.make(config.env).failure_reward == -1.0
