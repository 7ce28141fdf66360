"""A run's directory: what a start reads and changes, records by step, checkpoints' forms."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import ROOT, RUN, file_size_limit
from runs import directory as module
from runs.directory import Maybe, RunDirectory, check_form, load_checkpoint
from runs.errors import DirectoryInUse, InputError, RunError

CPU = torch.device("cpu")
OPTIONS = {"seed": 1, "name": "x"}


@pytest.fixture(autouse=True)
def no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "provenance", lambda: {"commit": "1", "threads": 1})


def begun(path: Path) -> RunDirectory:
    """The directory of a run that has started there, from its newest good checkpoint."""
    directory = RunDirectory(path, resume=True)
    state = directory.load(CPU)
    directory.begin(OPTIONS, state["step"] if state else 0)
    return directory


def close(directory: RunDirectory) -> None:
    for file in (directory.metrics, directory.transitions, directory.lock):
        file.close()


def save(directory: RunDirectory, step: int, **more: Any) -> None:
    directory.save({"step": step, "weights": torch.full((3,), float(step)), **more}, keep=())


def record(directory: RunDirectory, *steps: int, **values: Any) -> None:
    for step in steps:
        directory.add_record({"step": step, **values})


def train(directory: RunDirectory, first: int) -> None:
    """Steps to 40: records as a run makes them, a checkpoint every 10 steps among them."""
    if first == 0:
        record(directory, 0, score=0)
    for step in range(first + 1, 41):
        if step % 10 == 1:
            record(directory, step - 1, episode=step)  # a phase begins, at the step of before
            directory.add_transitions([np.full((2, 3), step)])
        if step % 5 == 0:
            record(directory, step, loss=step)
        if step % 10 == 0:
            record(directory, step, score=step)
            save(directory, step)


def files(path: Path) -> dict[str, Any]:
    return {file.name: file.read_bytes() if file.is_file() else None for file in path.rglob("*")}


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A run of 40 steps, with checkpoints of steps 30 and 40."""
    directory = begun(tmp_path / "run")
    train(directory, 0)
    close(directory)
    return tmp_path / "run"


# ---------------------------------------------------------------------------- what a start leaves


def started_and_failed(path: Path) -> None:
    directory = RunDirectory(path, resume=True)
    try:
        directory.load(CPU)
    finally:
        directory.discard_unless_begun()
        close(directory)


def test_a_start_that_never_begins_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    started_and_failed(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("lost", ["config.yaml", "starts.jsonl", "checkpoints"])
def test_a_start_that_never_begins_takes_nothing_of_an_earlier_one(
    lost: str, finished_run: Path
) -> None:
    gone = finished_run.glob("*.pt") if lost == "checkpoints" else [finished_run / lost]
    for path in gone:
        path.unlink()
    with open(finished_run / "metrics.jsonl", "a") as file:
        file.write('{"step": 99}\nanother line\n')
    before = files(finished_run)
    started_and_failed(finished_run)
    assert files(finished_run) == before


def test_a_start_that_finds_no_good_checkpoint_takes_nothing(finished_run: Path) -> None:
    (finished_run / "config.yaml").unlink()
    for path in finished_run.glob("*.pt"):
        path.write_bytes(b"")
    before = files(finished_run)
    with pytest.raises(InputError, match="^checkpoints_path: there is no valid checkpoint: "):
        started_and_failed(finished_run)
    assert files(finished_run) == before


def test_what_another_has_put_into_a_new_directory_stays(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "new", resume=True)
    (tmp_path / "new" / "notes.txt").write_text("mine")
    directory.discard_unless_begun()
    assert list(files(tmp_path / "new")) == ["notes.txt"]


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "transitions.bin"])
@pytest.mark.parametrize("kind", ["directory", "fifo", "socket"])
def test_what_is_no_file_is_refused_at_once(name: str, kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if kind == "directory":
        (run / name).mkdir()
    elif kind == "fifo":
        os.mkfifo(run / name)
    else:
        with socket.socket(socket.AF_UNIX) as unused:
            unused.bind(str(run / name))
    with pytest.raises(InputError, match=f"^checkpoints_path: cannot write there .*{name}"):
        RunDirectory(run, resume=True)
    assert list(files(run)) == [name]


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800", "a\0b", "file/run"])
def test_a_name_that_no_directory_can_have_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="^checkpoints_path: cannot write there "):
        RunDirectory(tmp_path / name, resume=True)


def test_a_full_disk_at_a_start_is_one_line(finished_run: Path) -> None:
    with file_size_limit(10), pytest.raises(RunError, match="cannot write in .* File too large"):
        begun(finished_run)
    assert begun(finished_run).state["step"] == 40


# ---------------------------------------------------------------------------- locks


def refusing(number: int) -> Callable:
    def flock(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_the_run_goes_on(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    train(begun(tmp_path / "run"), 0)
    (line,) = capsys.readouterr().out.splitlines()
    assert "cannot be locked" in line and os.strerror(number) in line
    assert (tmp_path / "run" / "checkpoint_40.pt").exists()


def test_a_directory_in_use_and_other_errors_of_locking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = RunDirectory(tmp_path / "run", resume=True)
    with pytest.raises(DirectoryInUse, match="another process runs in"):
        RunDirectory(tmp_path / "run", resume=True)
    holder.lock.close()
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EIO))
    with pytest.raises(InputError, match="Input/output error"):
        RunDirectory(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").exists()  # the holder's


# ---------------------------------------------------------------------------- records


def metrics(run: Path) -> list[bytes]:
    return (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)


def resumed(run: Path) -> list[bytes]:
    """The records of the run after it was continued from its newest checkpoint, to step 40."""
    directory = begun(run)
    train(directory, directory.state["step"])
    close(directory)
    return metrics(run)


@pytest.mark.parametrize("last", ["checkpoint", "loss", "score", "half a score"])
def test_records_after_the_checkpoint_are_made_again(last: str, finished_run: Path) -> None:
    whole = metrics(finished_run)
    (finished_run / "checkpoint_40.pt").unlink()
    n = {"checkpoint": 13, "loss": 16, "score": 17, "half a score": 17}[last]
    kept = b"".join(whole[:n])
    (finished_run / "metrics.jsonl").write_bytes(kept[:-5] if last == "half a score" else kept)
    assert resumed(finished_run) == whole
    assert not (finished_run / "metrics.jsonl.foreign").exists()


FOREIGN = [b"hello", b"[1]", b'{"note": 1}', b'{"step": "1"}', b'{"step": 1e24}', b"\xff\0", b"7"]


@pytest.mark.parametrize("at", [0, 1, 9, 13, 17])
@pytest.mark.parametrize("is_newest", [False, True])
def test_a_line_that_does_not_belong_moves_no_record(
    at: int, is_newest: bool, finished_run: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = metrics(finished_run)
    if not is_newest:
        (finished_run / "checkpoint_40.pt").unlink()
    lines = [line + b"\n" for line in FOREIGN]
    (finished_run / "metrics.jsonl").write_bytes(b"".join(whole[:at] + lines + whole[at:]))
    assert resumed(finished_run) == whole
    assert (finished_run / "metrics.jsonl.foreign").read_bytes().splitlines() == FOREIGN
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{len(FOREIGN)} lines are not records" in line and "metrics.jsonl.foreign" in line
    assert resumed(finished_run) == whole and not capsys.readouterr().out


def test_a_last_line_without_its_end_is_kept(finished_run: Path) -> None:
    whole = metrics(finished_run)
    (finished_run / "metrics.jsonl").write_bytes(b"".join(whole)[:-1])
    assert resumed(finished_run) == whole


def test_records_that_are_lost_are_said_to_be(
    finished_run: Path, capsys: pytest.CaptureFixture
) -> None:
    (finished_run / "metrics.jsonl").write_bytes(b"".join(metrics(finished_run)[1:]))
    assert len(resumed(finished_run)) == 16
    assert "lacks records" in capsys.readouterr().out


def old_sizes(path: Path, n_bytes: int) -> None:
    """The checkpoint as older code has written it."""
    state = torch.load(path, weights_only=True)
    state["sizes"] = {"metrics": n_bytes, "rows": state["sizes"]["rows"]}
    torch.save(state, path)


@pytest.mark.parametrize("is_foreign", [False, True])
def test_checkpoints_of_older_code_resume_alike(is_foreign: bool, finished_run: Path) -> None:
    whole = metrics(finished_run)
    (finished_run / "checkpoint_40.pt").unlink()
    old_sizes(finished_run / "checkpoint_30.pt", len(b"".join(whole[:13])))
    if is_foreign:
        with open(finished_run / "metrics.jsonl", "a") as file:
            file.write("hello\n")
    assert resumed(finished_run) == whole


def test_only_the_checkpoints_transitions_are_read_and_kept(finished_run: Path) -> None:
    transitions = (finished_run / "transitions.bin").read_bytes()
    (finished_run / "checkpoint_40.pt").unlink()
    directory = RunDirectory(finished_run, resume=True)
    directory.load(CPU)
    single, pair = directory.read_transitions([(), (2,)])
    assert single.tolist() == [1, 1, 11, 11, 21, 21] and pair.shape == (6, 2)
    with pytest.raises(InputError, match="does not hold transitions"):
        directory.read_transitions([(5,)])
    close(directory)
    resumed(finished_run)
    assert (finished_run / "transitions.bin").read_bytes() == transitions


@pytest.mark.parametrize("text", [b"\xff\xfe", b"[]", b"{}", b"7", b"", b'{"commit": "0"'])
def test_starts_that_are_no_text_do_not_block_a_start(text: bytes, finished_run: Path) -> None:
    (finished_run / "starts.jsonl").write_bytes(text)
    close(begun(finished_run))
    last = (finished_run / "starts.jsonl").read_bytes().splitlines()[-1]
    assert last.endswith(b'"threads": 1}')


# ---------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO, errno.EMFILE, None])
def test_a_checkpoint_that_the_system_does_not_let_read_is_not_called_broken(
    number: int | None, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.open_regular
    failure = OSError(number, os.strerror(number)) if number else MemoryError()

    def failing(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "checkpoint_40.pt":
            raise failure
        return real(path, *args, **options)

    before = files(finished_run)
    with monkeypatch.context() as patch:
        patch.setattr(module, "open_regular", failing)
        with pytest.raises(RunError, match="cannot read .*checkpoint_40.pt"):
            started_and_failed(finished_run)
    assert files(finished_run) == before
    assert begun(finished_run).state["step"] == 40


def test_torch_without_memory_is_no_broken_checkpoint(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RunError, match="too little memory"):
        started_and_failed(finished_run)


@pytest.mark.parametrize("taken", [[], ["file"], ["directory"], ["directory", "file"]])
def test_a_broken_checkpoint_is_set_aside_under_a_free_name(
    taken: list[str], finished_run: Path
) -> None:
    for i, kind in enumerate(taken):
        place = finished_run / f"checkpoint_40.broken{'_' * i}"
        place.mkdir() if kind == "directory" else place.write_text("earlier")
    (finished_run / "checkpoint_40.pt").write_bytes(b"damaged")
    before = files(finished_run)
    close(begun(finished_run))
    after = files(finished_run)
    assert after.pop(f"checkpoint_40.broken{'_' * len(taken)}") == b"damaged"
    assert {name: before[name] for name in before if "broken" in name} == {
        name: after[name] for name in after if "broken" in name
    }


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_a_checkpoint_that_is_no_file_is_not_waited_for(kind: str, finished_run: Path) -> None:
    path = finished_run / "checkpoint_40.pt"
    path.unlink()
    path.mkdir() if kind == "directory" else os.mkfifo(path)
    directory = begun(finished_run)
    assert directory.state["step"] == 30


FORM = {"weights": torch.zeros(3), "extra": Maybe(str)}


@pytest.mark.parametrize(
    "change",
    [
        {"weights": torch.zeros(4)},
        {"weights": None},
        {"more": 1},
        {"sizes": {"metrics": 0}},
        {"sizes": None},
        {"step": "40"},
    ],
)
def test_a_whole_checkpoint_of_another_form_falls_back_to_the_one_before(
    change: dict[str, Any], finished_run: Path
) -> None:
    path = finished_run / "checkpoint_40.pt"
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    directory = RunDirectory(finished_run, resume=True)
    assert directory.load(CPU, FORM)["step"] == 30
    ((broken, problem),) = directory.broken
    assert broken == path and next(iter(change)) in problem


NESTED = {
    "identity": dict,
    "counts": {"step": int, "rate": float},
    "names": [str, str],
    "agent": {"w": torch.zeros(2, 3), "n": Maybe(int)},
    "device": lambda value: value in ("cpu", "cuda"),
}
GOOD = {
    "identity": {"seed": 1},
    "counts": {"step": 1, "rate": 0.5},
    "names": ["a", "b"],
    "agent": {"w": torch.ones(2, 3)},
    "device": "cpu",
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"identity": [1]}, "identity: found a list of 1, expected dict"),
        ({"counts": 3}, "counts: found 3, expected a dict"),
        ({"counts": {"step": 1}}, "counts rate: found nothing, expected float"),
        ({"counts": {"step": True, "rate": 0.5}}, "counts step: found True, expected int"),
        ({"names": ["a"]}, "names: found a list of 1, expected a list of 2"),
        ({"names": ["a", 1]}, "names 1: found 1, expected str"),
        ({"agent": {"w": 1}}, "agent w: found 1, expected float32 [2, 3]"),
        ({"agent": {"w": torch.ones(3, 2)}}, "found float32 [3, 2], expected float32 [2, 3]"),
        ({"agent": {"w": torch.ones(2, 3).int()}}, "found int32 [2, 3], expected float32"),
        ({"agent": {"w": torch.ones(2, 3), "n": "x"}}, "agent n: found 'x', expected int"),
        ({"agent": {"w": torch.ones(2, 3), "v": 1}}, "agent: found keys ['v'], expected none"),
        ({"device": "tpu"}, "device: found 'tpu', expected "),
    ],
)
def test_a_form_names_the_place_what_is_there_and_what_should_be(
    change: dict[str, Any], problem: str
) -> None:
    check_form(GOOD, NESTED, Path("x.pt"))
    with pytest.raises(InputError) as error:
        check_form(GOOD | change, NESTED, Path("x.pt"), "load_model")
    assert str(error.value).startswith("load_model: x.pt is not a checkpoint for this run (")
    assert problem in str(error.value)


def test_a_whole_number_is_no_float() -> None:
    with pytest.raises(InputError, match="counts step: found 1.0, expected int"):
        check_form(GOOD | {"counts": {"step": 1.0, "rate": 0.0}}, NESTED, Path())


def test_what_is_no_checkpoint_is_named_with_its_option(tmp_path: Path) -> None:
    for content in (b"", b"text", b"PK\x05\x06" + bytes(18)):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(InputError, match="^load_model: .*x.pt is not a valid checkpoint"):
            load_checkpoint(tmp_path / "x.pt", CPU, option="load_model")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("data.pkl", json.dumps([1]))
    with pytest.raises(InputError, match="is not a valid checkpoint"):
        load_checkpoint(tmp_path / "x.pt", CPU)
    with pytest.raises(InputError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "nowhere.pt", CPU)


def test_another_run_in_a_renamed_directory_is_named(finished_run: Path) -> None:
    path = finished_run / "checkpoint_40.pt"
    theirs = {"discount": 0.9, "seed": 1, "data": ["x", 3]}
    torch.save({**torch.load(path, weights_only=True), "identity": theirs}, path)
    assert RunDirectory(finished_run, resume=True).load(CPU, identity=dict(theirs))["step"] == 40
    with pytest.raises(InputError) as error:
        RunDirectory(finished_run, resume=True).load(
            CPU, identity={"seed": 2, "data": ["x", 3], "b": 1}
        )
    assert str(error.value).endswith("another run, with discount 0.9, seed 1, b (its default)")


def test_the_line_at_the_end_names_the_score_and_a_command_that_runs(folder: Path) -> None:
    directory = begun(Path("my run"))
    record(directory, 0)
    assert directory.closing_line().startswith("my run: finished; to draw its curves: ")
    config = dict(zip(RUN[::2], RUN[1::2]))
    lines = [f"{name.strip('-')}: {value}\n" for name, value in config.items()]
    (directory.path / "config.yaml").write_text("".join([*lines, "seed: 0\nname: x\n"]))
    for step, score in ((60, 10.0), (380, 51.26)):
        record(directory, step, **{module.SCORE: score, "eval/success_rate": 0.5})
    start, _, command = directory.closing_line().partition("; to draw its curves: ")
    assert start == "my run: finished, last score 51.3"
    assert shlex.split(command)[0] == sys.executable
    subprocess.run(command, shell=True, check=True)
    assert (directory.path / "curves.png").stat().st_size > 10_000
    close(directory)


def test_a_path_is_short_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert module.from_here(ROOT / "tools" / "report.py") == "tools/report.py"
    assert module.from_here(ROOT.parent / "x") == str(ROOT.parent / "x")
