"""The real W&B client: its records, and what befalls a run while W&B is away, hangs or dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli import SMALL, call, kill_test, only_run, write_dataset
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

LONG = [*SMALL, "--checkpoints_path", ".", "--offline_iterations", "1000"]  # W&B starts meanwhile
KEY = "0123456789" * 4


def start(folder: Path, **env: str) -> subprocess.Popen:
    """A run in `folder`, with no W&B settings but those of `env`, and no home to find any in."""
    write_dataset(folder / "data.hdf5")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    clean |= {"HOME": str(folder / "home"), **env}
    return kill_test.start(folder, *LONG, env=clean, stdin=subprocess.DEVNULL)


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


def history(folder: Path) -> dict[int, dict[str, Any]]:
    """What the W&B file of the run below `folder` holds, by step."""
    (file,) = only_run(folder).glob("wandb/offline-run-*/*.wandb")
    store, steps = DataStore(), {}
    store.open_for_scan(str(file))
    while data := store.scan_data():
        record = Record.FromString(data)
        items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        if items:
            row = {key: json.loads(value) for key, value in items.items()}
            steps[row["_step"]] = {key: row[key] for key in row if not key.startswith("_")}
    return steps


def test_without_a_key_and_a_terminal_it_records_offline_and_says_so_in_one_line(
    offline: tuple[Path, subprocess.CompletedProcess],
) -> None:
    folder, result = offline
    assert result.returncode == 0
    text = result.stdout + result.stderr
    lines = [line for line in text.splitlines() if "W&B" in line or "wandb" in line]
    assert len(lines) == 1 and "offline" in lines[0], text


def test_the_wandb_file_holds_what_the_json_lines_hold(
    offline: tuple[Path, subprocess.CompletedProcess], undisturbed: Path
) -> None:
    folder, _ = offline
    assert kill_test.differences(undisturbed, folder) == []
    expected: dict[int, dict[str, Any]] = {}
    for record in kill_test.records(folder):
        expected[record["step"]] = expected.get(record["step"], {}) | record
    assert history(folder) == expected


def test_a_server_that_refuses_or_hangs_changes_nothing(
    undisturbed: Path, tmp_path: Path
) -> None:
    processes = {}
    with socket.socket() as refusing, socket.socket() as hanging:
        for name, sock in (("refusing", refusing), ("hanging", hanging)):
            sock.bind(("127.0.0.1", 0))
            folder = tmp_path / name
            folder.mkdir()
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            processes[folder] = start(folder, WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
        hanging.listen(100)  # accepted by the kernel, answered by nobody
        begin = time.monotonic()
        for folder, process in processes.items():
            result = kill_test.finish(process)
            print(folder, time.monotonic() - begin, result)
            assert result.returncode == 0
            assert kill_test.differences(undisturbed, folder) == []
            assert time.monotonic() - begin < 120


def test_sigterm_ends_a_run_in_time_while_the_server_hangs(tmp_path: Path) -> None:
    with socket.socket() as hanging:
        hanging.bind(("127.0.0.1", 0))
        hanging.listen(100)
        url = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        process = start(tmp_path, WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
        kill_test.wait_until(process, lambda: len(kill_test.records(tmp_path)) > 20)
        begin = time.monotonic()
        process.terminate()
        result = kill_test.finish(process)
        print(result, time.monotonic() - begin)
        assert result.returncode == 143
        assert time.monotonic() - begin < 5


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
    result = kill_test.finish(process)
    assert result.returncode == 0
    print(result)
    assert kill_test.differences(undisturbed, tmp_path) == []
