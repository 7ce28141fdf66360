"""The real W&B client: its records, and what a run does while W&B is away, hangs or dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from helpers import (
    ROOT,
    RUN,
    call,
    differences,
    finish,
    only_run,
    read_records,
    start_run,
    wait_until,
    working_in,
)
from runs.directory import RunDirectory
from runs.log import Wandb
from wandb_server import KEY

SHORT = [
    *RUN,
    *"--env maze2d-open-v0 --online_iterations 100".split(),
]  # evaluates at 0, 60, 150 and 160


def environment(folder: Path, **env: str) -> dict[str, str]:
    """No W&B settings but those of `env`, and no home to find any in."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return {**clean, "HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), **env}


def start(folder: Path, **env: str) -> subprocess.Popen:
    env = environment(folder, **env)
    return start_run(folder, *SHORT, env=env, stdin=subprocess.DEVNULL)


SIGNALLED = """
import itertools, os, cal_ql
from runs.errors import run_program
from tasks.d4rl import D4RL
step, calls = D4RL.step, itertools.count(1)

def step_or_signal(*args):
    if next(calls) == {}:
        os.kill(os.getpid(), {})
    return step(*args)

D4RL.step = step_or_signal
os._exit(run_program(cal_ql.main, "cal_ql.py", goes_on=True))
"""


def signalled(folder: Path, number: int, signum: int) -> int:
    """The exit code of a run that gets a signal at that call of Task.step."""
    command = [sys.executable, "-c", SIGNALLED.format(number, int(signum)), *SHORT]
    return subprocess.run(command, cwd=folder, env=environment(folder)).returncode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run without W&B."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with working_in(folder):
        assert call(*SHORT).returncode == 0
    return folder


@pytest.fixture(scope="module", autouse=True)
def unreachable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Folders and processes of runs whose server refuses or hangs; other tests run meanwhile."""
    with socket.socket() as refusing, socket.socket() as hanging:
        processes = {}
        for name, server in (("refuses", refusing), ("hangs", hanging), ("hangs, stop", hanging)):
            if name != "hangs, stop":
                server.bind(("127.0.0.1", 0))
            folder = tmp_path_factory.mktemp("unreachable")
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            processes[name] = folder, start(folder, WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
        hanging.listen(100)  # the kernel accepts, nobody answers
        yield processes
        for _, process in processes.values():
            process.kill()


def records(file: Path) -> Iterator[Record]:
    """The records of a .wandb file: LevelDB's log format after a header of its own."""
    data, position, parts = file.read_bytes(), 7, []
    while position + 7 <= len(data):
        if (rest := 32768 - position % 32768) < 7:  # too little for a chunk: the block is padded
            position += rest
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        parts.append(data[position + 7 : position + 7 + size])
        position += 7 + size
        if kind in (1, 4):  # the whole record, or the last of its chunks
            yield Record.FromString(b"".join(parts))
            parts = []


def wandb_files(folder: Path) -> list[Path]:
    """Of the run below `folder`: one for each start, the newest last."""
    return sorted(only_run(folder).glob("wandb/offline-run-*/*.wandb"))


def history(file: Path) -> dict[int, dict[str, Any]]:
    """What a .wandb file holds, by step."""
    steps = {}
    for record in records(file):
        items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        if items:
            row = {k: json.loads(value) for k, value in items.items() if not k.startswith("_")}
            steps[row["step"]] = steps.get(row["step"], {}) | row
    return steps


def by_step(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
        steps[line["step"]] = steps.get(line["step"], {}) | line
    return steps


def test_sigterm_ends_a_run_that_waits_for_the_server(unreachable: dict[str, Any]) -> None:
    folder, process = unreachable["hangs, stop"]
    wait_until(process, lambda: any(folder.glob("*/starts.jsonl")))
    process.terminate()
    result = finish(process)
    assert result.returncode == 143 and "W&B" not in result.stdout  # it gives up by itself later


def test_the_last_records_are_waited_for_with_little_patience() -> None:
    client, never = object.__new__(Wandb), threading.Event()
    client.run = SimpleNamespace(finish=never.wait)
    client.close(patience=0.01)  # or this test never ends
    never.set()


@pytest.mark.filterwarnings("error")  # of an exception in a thread
def test_the_last_records_may_be_lost_without_a_word() -> None:
    client = object.__new__(Wandb)
    client.run = SimpleNamespace(finish=lambda: 1 / 0)
    client.close(patience=10.0)


def test_a_wandb_other_than_the_pinned_one_is_named_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert f"wandb=={wandb.__version__}\n" in (ROOT / "requirements.txt").read_text()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", lambda: True)  # as before it knew `prompt`
    run = Wandb(None, project="CORL")
    run.send({"step": 1})
    (line,) = capsys.readouterr().out.splitlines()
    assert run.run is None and line.startswith("W&B fails; metrics.jsonl") and "'prompt'" in line


def test_wandbs_folder_may_be_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = SimpleNamespace(id="x", define_metric=lambda *args, **options: None)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **options: seen.update(options) or started)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", "~/wandb files")
    Wandb(RunDirectory(tmp_path / "run", resume=True))
    assert seen["dir"] == f"{tmp_path}/wandb files"
    assert (tmp_path / "run" / "wandb_id").read_text() == "x"


def test_every_record_arrives_although_the_run_is_killed_and_stopped_while_evaluating(
    undisturbed: Path, tmp_path: Path
) -> None:
    assert signalled(tmp_path, 225, signal.SIGKILL) == -9  # at 60, where it evaluates again
    assert signalled(tmp_path, 375, signal.SIGTERM) == 143  # at 150, after an episode
    result = finish(start(tmp_path))
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in (result.stdout + result.stderr).splitlines() if "W&B" in line]
    assert "no API key" in line and "offline" in line
    assert differences(undisturbed, tmp_path) == []

    first, second, last = wandb_files(tmp_path)
    assert history(last) == by_step(read_records(tmp_path))
    assert "eval/d4rl_normalized_score" not in history(second)[150]
    assert "eval/d4rl_normalized_score" in history(last)[150]
    wandb_id = (only_run(tmp_path) / "wandb_id").read_text()
    assert {file.stem for file in (first, second, last)} == {f"run-{wandb_id}"}


def test_the_death_of_wandbs_service_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    def services() -> Iterator[int]:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            pid, name, _, parent, *_ = stat.read_text().split()
            if int(parent) == process.pid and "wandb" in name:
                yield int(pid)

    process = start(tmp_path, WANDB_MODE="offline")
    wait_until(process, lambda: any(tmp_path.glob("*/wandb/offline-run-*/*.wandb")))
    (service,) = services()
    os.kill(service, signal.SIGKILL)
    assert finish(process).returncode == 0
    assert differences(undisturbed, tmp_path) == []


@pytest.mark.parametrize("name", ["refuses", "hangs"])
def test_a_server_that_cannot_be_used_changes_nothing(
    name: str, unreachable: dict[str, Any], undisturbed: Path
) -> None:
    folder, process = unreachable[name]
    result = finish(process)
    assert result.returncode == 0, result.stderr
    assert differences(undisturbed, folder) == []
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("W&B")]
    assert "cannot be reached" in line and "offline" in line
    (file,) = wandb_files(folder)
    assert history(file) == by_step(read_records(folder))
