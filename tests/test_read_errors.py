"""If the system refuses a file, the error says so; only damaged data is called damaged."""

from __future__ import annotations

import builtins
import errno
import fcntl
import json
import os
import pickle
import pwd
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import tasks
from helpers import ROOT, make_pendulum_data, write_dataset
from runs.errors import InputError
from tasks import files
from tasks.adroit import unpickle

OPENING = "Unable to synchronously open file ({}, errno = {}, error message = '{}', flags = 0)"
READING = "Can't synchronously read data (file read failed, errno = {1}, error message = '{2}')"


def system_errors() -> Iterator[Any]:
    """Exceptions as h5py, numpy and Python raise them, and what the user must be told."""
    for number, remedy in (
        (errno.EAGAIN, "HDF5_USE_FILE_LOCKING=FALSE"),
        (errno.ENOLCK, "HDF5_USE_FILE_LOCKING=FALSE"),
        (errno.ENOSYS, "HDF5_USE_FILE_LOCKING=FALSE"),
        (errno.EOPNOTSUPP, "HDF5_USE_FILE_LOCKING=FALSE"),
        (errno.EACCES, "check the permissions"),
        (errno.ESTALE, "try again"),
        (errno.EIO, "try again"),
    ):
        words = os.strerror(number)
        what = "unable to lock file" if "LOCK" in remedy else "unable to open file: name = 'x'"
        opening = OPENING.format(what, number, words)
        yield OSError(number, opening), words, remedy
        yield OSError(opening), words, remedy  # older h5py sets no errno
        if "LOCK" not in remedy:
            yield OSError(READING.format(what, number, words)), words, remedy
            yield OSError(number, words, "x"), words, remedy
    yield MemoryError("Unable to allocate 8.00 PiB"), "too little memory", "8.00 PiB"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data.hdf5")


def refusal(action: Callable[[], Any]) -> str:
    """The one line of the error."""
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


ERRORS = list(system_errors())


@pytest.mark.parametrize("number", range(len(ERRORS)), ids=[str(e[0])[-70:] for e in ERRORS])
def test_what_the_system_refuses_is_no_damage(number: int, path: Path) -> None:
    error, words, remedy = ERRORS[number]
    with pytest.raises(InputError) as caught, files.reading(path, "HDF5 file"):
        raise error
    line = str(caught.value)
    assert line.startswith(f"dataset {path}: cannot read it: ") and "\n" not in line
    assert words in line and remedy in line and "delete" not in line and len(line) < 300


@pytest.mark.parametrize("kind", ["hdf5", "npz", "pickle"])
def test_no_reader_takes_a_refusal_for_damage(kind: str, path: Path, monkeypatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    module, name = {
        "hdf5": (h5py, "File"),
        "npz": (np, "load"),
        "pickle": (builtins, "open"),
    }[kind]
    read = {"hdf5": lambda: files.read_hdf5(path, []), "npz": lambda: files.read_npz(path)}
    with monkeypatch.context() as patch:
        patch.setattr(module, name, refuse)
        line = refusal(read.get(kind, lambda: unpickle(path)))
    assert "cannot read it" in line and "Permission denied" in line


def test_a_locked_file_is_no_damaged_one(path: Path) -> None:
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        line = refusal(lambda: files.read_hdf5(path, ["rewards"]))
    assert "HDF5_USE_FILE_LOCKING=FALSE" in line and "delete" not in line
    assert files.read_hdf5(path, ["rewards"])["rewards"].shape == (400,)


def test_damage_is_called_damage(path: Path) -> None:
    """Even if it makes the reader seek to an impossible position, which gives EINVAL."""
    for error in (OSError(errno.EINVAL, "Invalid argument"), ValueError("x"), AssertionError()):
        with pytest.raises(InputError, match="not a valid .* delete it"), files.reading(path, "x"):
            raise error


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder"])
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.mkdir()
    task = tasks.make("maze2d-umaze-v1")
    reads = [lambda: task.data_file(str(path)), lambda: task.rows(path)]
    reads += [lambda: files.read_npz(path), lambda: unpickle(path)]
    if kind != "folder":
        reads.append(lambda: tasks.make("door-binary-v0").data_file(str(path)))
    for read in reads:
        line = refusal(read)
        assert str(path) in line and "delete" not in line and "expected a" in line


def test_a_path_that_the_system_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.make("maze2d-umaze-v1")
    for path in ("x" * 5000, "a\0b", "/dev/null/data.hdf5"):
        assert "cannot open it" in refusal(lambda path=path: task.data_file(path))

    def refuse(path: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "stat", refuse)
    assert "Permission denied" in refusal(lambda: task.data_file("secret/data.hdf5"))
    monkeypatch.setenv("D4RL_DATASET_DIR", "secret")
    assert "Permission denied" in refusal(lambda: task.data_file(None))


def test_too_little_memory_after_reading_is_one_line(path: Path, monkeypatch) -> None:
    def refuse(*args: Any) -> None:
        raise MemoryError("Unable to allocate 8.00 PiB")

    for function in ("cast_rows", "find_jumps"):
        with monkeypatch.context() as patch:
            patch.setattr(f"tasks.task.{function}", refuse)
            line = refusal(lambda: tasks.make("maze2d-umaze-v1").rows(path))
        assert "too little memory" in line and "8.00 PiB" in line and "delete" not in line


# ---------------------------------------------------------------------------- home directories


def test_a_tilde_in_a_variable_is_the_home_directory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "data"
    folder.mkdir(parents=True)
    for variable in ("D4RL_DATASET_DIR", "OGBENCH_DATASET_DIR", "MINARI_DATASETS_PATH"):
        monkeypatch.setenv(variable, "~/data")
        assert files.data_directory(variable, "elsewhere") == folder
    task = tasks.make("maze2d-umaze-v1")
    file = write_dataset(folder / task.env.dataset_url.rpartition("/")[2])
    assert task.data_file(None) == file
    assert os.listdir() == ["home"]


def test_a_user_without_a_home_directory_gets_one_line(tmp_path: Path, monkeypatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for variable in ("D4RL_DATASET_DIR", "OGBENCH_DATASET_DIR", "MINARI_DATASETS_PATH"):
        monkeypatch.delenv(variable, raising=False)
        assert variable in refusal(lambda name=variable: files.data_directory(name, "~/data"))
    assert os.listdir() == []


def test_importing_d4rl_makes_no_folder(tmp_path: Path) -> None:
    """It would make a folder that is called `~`."""
    environment = {**os.environ, "D4RL_DATASET_DIR": "~/data", "PYTHONPATH": str(ROOT)}
    code = "import tasks; tasks.make('maze2d-umaze-v1')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert os.listdir(tmp_path) == []


def test_importing_tasks_is_light() -> None:
    code = "import sys, tasks; print({'torch', 'wandb', 'mujoco', 'gym', 'pooch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


# ---------------------------------------------------------------------------- damaged contents


def test_text_among_the_numbers_of_a_pickle_is_named(tmp_path: Path) -> None:
    task = tasks.make("pen-binary-v0")
    episode = {"rewards": [0.0], "observations": np.zeros((1, 45)), "actions": [["a"] * 24]}
    episode["next_observations"] = np.zeros((1, 45))
    for file in task.files:
        (tmp_path / file).write_bytes(pickle.dumps([episode]))
    assert "not a valid pair of the authors' files" in refusal(lambda: task.rows(tmp_path))


OGBENCH = "pointmaze-medium-navigate-singletask-v0"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda raw: raw["qpos"].__setitem__((3, 0), np.nan), "qpos holds NaN"),
        (lambda raw: raw.update({key: raw[key][:0] for key in raw}), "qpos has shape \\(0, 2\\)"),
        (lambda raw: raw.update(qpos=np.full((4001, 2), "a")), "qpos holds .* no numbers"),
        (lambda raw: raw.update(actions=np.full((4001, 2), "a")), "not a valid .npz file"),
    ],
)
def test_ogbench_files_without_good_states_are_refused(
    change: Callable, problem: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """With 4,001 rows, row 3 is not among the 801 that are looked up in the maze."""
    pytest.importorskip("ogbench")
    task = tasks.make(OGBENCH)
    task.reset(0)
    position = task.env.unwrapped.get_xy()
    raw = {key: np.tile(position, (4001, 1)) for key in ("observations", "qpos", "qvel")}
    raw |= {"actions": np.zeros((4001, 2)), "terminals": np.arange(4001) == 4000}
    np.savez(tmp_path / "data.npz", **raw)
    assert len(task.rows(tmp_path / "data.npz")["rewards"]) == 4001
    change(raw)
    np.savez(tmp_path / "data.npz", **raw)
    assert re.search(problem, refusal(lambda: task.rows(tmp_path / "data.npz")))
    assert not recwarn.list


def test_a_minari_reference_score_is_a_number(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("minari")
    pytest.importorskip("gymnasium_robotics")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    name = "toys/pendulum-v0"
    path = make_pendulum_data(name, tmp_path)
    metadata = json.loads(path.read_text())
    for score in ("many", [1.0], float("nan")):
        path.write_text(json.dumps({**metadata, "ref_min_score": score, "ref_max_score": 1.0}))
        line = refusal(lambda: tasks.make(name))
        assert f"ref_min_score: found {score!r}, expected a number" in line
    path.write_text(json.dumps({**metadata, "ref_min_score": 0, "ref_max_score": 50}))
    assert tasks.make(name).score(25.0, False) == 50.0
    os.mkfifo(path.parent / "fifo")
    assert "cannot open it" in refusal(lambda: tasks.make(name))
