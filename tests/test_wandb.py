"""The real W&B client: its records, and what befalls a run while W&B is away, hangs or dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli import SMALL, call, kill_test, only_run, write_dataset
from wandb.proto.wandb_internal_pb2 import Record

LONG = [*SMALL, "--checkpoints_path", ".", "--offline_iterations", "1000"]  # W&B starts meanwhile
KEY = "0123456789" * 4


def start(folder: Path, **env: str) -> subprocess.Popen:
    """A run in `folder`, with no W&B settings but those of `env`, and no home to find any in."""
    write_dataset(folder / "data.hdf5")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    clean |= {"HOME": str(folder / "home"), **env}
    return kill_test.start(folder, *kill_test.RUN, *LONG, env=clean, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run without W&B."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_dataset(folder / "data.hdf5")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*kill_test.RUN, *LONG).returncode == 0
    return folder


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """Folder and outcome of a run that has no key, no terminal and no WANDB_MODE."""
    folder = tmp_path_factory.mktemp("offline")
    return folder, kill_test.finish(start(folder))


@pytest.fixture(scope="module", autouse=True)
def unreachable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Folders and processes of runs whose server refuses or hangs; they wait while others work."""
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


def history(folder: Path) -> dict[int, dict[str, Any]]:
    """What W&B's file of the run below `folder` holds, by step."""
    (file,) = only_run(folder).glob("wandb/offline-run-*/*.wandb")
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


def test_sigterm_ends_a_run_in_time_while_the_server_hangs(unreachable: dict[str, Any]) -> None:
    folder, process = unreachable["hangs, stop"]
    kill_test.wait_until(process, lambda: len(kill_test.records(folder)) > 20)
    begin = time.monotonic()
    process.terminate()
    assert kill_test.finish(process).returncode == 143
    assert time.monotonic() - begin < 5


def test_without_a_key_and_a_terminal_it_records_offline_and_says_so_in_one_line(
    offline: tuple[Path, subprocess.CompletedProcess],
) -> None:
    _, result = offline
    assert result.returncode == 0
    text = result.stdout + result.stderr
    (line,) = [line for line in text.splitlines() if "W&B" in line]
    assert "no API key" in line and "offline" in line


def test_wandbs_file_holds_what_the_json_lines_hold(
    offline: tuple[Path, subprocess.CompletedProcess], undisturbed: Path
) -> None:
    folder, _ = offline
    assert kill_test.differences(undisturbed, folder) == []
    assert history(folder) == by_step(kill_test.records(folder))


def test_the_death_of_wandbs_service_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    def services() -> Iterator[int]:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            pid, name, _, parent, *_ = stat.read_text().split()
            if int(parent) == process.pid and "wandb" in name:
                yield int(pid)

    process = start(tmp_path, WANDB_MODE="offline")
    kill_test.wait_until(process, lambda: any(tmp_path.glob("*/wandb/offline-run-*/*.wandb")))
    (service,) = services()
    os.kill(service, signal.SIGKILL)
    assert kill_test.finish(process).returncode == 0
    assert kill_test.differences(undisturbed, tmp_path) == []


@pytest.mark.parametrize("name", ["refuses", "hangs"])
def test_a_server_that_cannot_be_used_changes_nothing(
    name: str, unreachable: dict[str, Any], undisturbed: Path
) -> None:
    folder, process = unreachable[name]
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert kill_test.differences(undisturbed, folder) == []
    (line,) = [line for line in out.splitlines() if line.startswith("W&B")]
    assert "cannot be reached" in line and "offline" in line
    assert history(folder) == by_step(kill_test.records(folder))
