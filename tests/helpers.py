"""A small run and ways to start it: within this process, forked from it, or for real."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import h5py
import kill_test
import numpy as np
import pytest
import torch._dynamo  # noqa: F401  # once here, not in each fork: an optimizer imports it
import tqdm

import cal_ql
import runs

tqdm.tqdm.monitor_interval = 0  # a thread of its might hold a lock in the moment of a fork

# 50 steps offline, an episode that ends at step 350, then 50 of the next one
SMALL = """--env maze2d-umaze-v1 --dataset_path data.hdf5 --checkpoints_path . --device cpu
    --offline_iterations 50 --online_iterations 350 --eval_freq 100 --checkpoint_freq 20
    --log_freq 10 --n_episodes 1 --hidden_dim 8 --q_n_hidden_layers 1 --actor_n_hidden_layers 1
    --batch_size 16 --cql_n_actions 2""".split()


def call(*args: Any) -> subprocess.CompletedProcess:
    """`python cal_ql.py ARGS` within this process."""
    out, err = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    with (
        mock.patch.object(sys, "argv", ["cal_ql.py", *map(str, args)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = cal_ql.main()
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in handlers:
                signal.signal(number, handler)
            gc.collect()  # whatever would hold the run's directory
    for stream in (out, err):
        stream.seek(0)
    return subprocess.CompletedProcess(args, code, out.read(), err.read())


class Fork:
    """`python cal_ql.py ARGS` in `folder`, forked from here, which saves the imports' seconds.

    It has a process group of its own, and does `before` first. To be used like subprocess.Popen.
    """

    def __init__(self, folder: Path, *args: Any, before: Callable[[], Any] = lambda: None):
        self.args, self.folder, self.returncode = list(map(str, args)), folder, None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = self.run(before)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)

    def run(self, before: Callable[[], Any]) -> int:
        os.setsid()
        os.chdir(self.folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
        sys.argv = ["cal_ql.py", *self.args]
        before()
        return cal_ql.main()

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def poll(self, flags: int = os.WNOHANG) -> Optional[int]:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, flags)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def communicate(self) -> tuple[str, ...]:
        self.poll(flags=0)
        return tuple((self.folder / name).read_text() for name in ("stdout", "stderr"))


def error_line(result: subprocess.CompletedProcess, code: int = 2, kind: str = "error") -> str:
    """The one line on stderr of a process that ended with `code`, progress bars aside."""
    assert result.returncode == code, result.stderr
    lines = re.split(r"[\r\n]+", result.stderr)
    lines = [line for line in lines if line and not re.search(r"\[\d\d:\d\d", line)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"cal_ql.py: {kind}: ")
    return lines[0]


def write_dataset(
    path: Path, observation_dim: int = 4, action_dim: int = 2, n: int = 400, **changed: Any
) -> Path:
    """Random rows in D4RL's layout, episodes of 40 steps; arrays in `changed` replace theirs."""
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(n, observation_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, action_dim)).astype(np.float32),
        "rewards": (rng.random(n) < 0.1).astype(np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.arange(1, n + 1) % 40 == 0,
        **changed,
    }
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            if array is not None:
                file[key] = array
    return path


def only_run(folder: Path) -> Path:
    """The one run directory in `folder`."""
    (metrics,) = folder.glob("*/metrics.jsonl")
    return metrics.parent


def newest(folder: Path) -> Path:
    """Last checkpoint of that run."""
    return max(only_run(folder).glob("checkpoint_*.pt"), key=runs.step_of)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@contextlib.contextmanager
def at_call(owner: Any, name: str, number: int, act: Callable[[], Any]) -> Iterator[None]:
    """Within, the call of that number of the function or method `owner.name` does `act` first."""
    function, calls = getattr(owner, name), itertools.count(1)

    def counting(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            act()
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counting)
        yield


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def step_reached(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: any(record["step"] >= step for record in kill_test.records(folder))
