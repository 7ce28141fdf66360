"""What several test files share: runs, their files, ways to interrupt them, small agents.

It does not import pytest, so that kill_test.py needs nothing that a run does not need.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import h5py
import numpy as np
import torch
from torch import Tensor

import cal_ql
from cal_ql import Agent, Batch, Config, Noise, UpdateKind
from runs.errors import run_program

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "datasets" / "maze2d-umaze-v1-small.hdf5"

# 60 steps offline, then episodes of 300 steps at 60 and at 360
RUN = """--env maze2d-umaze-v1 --device cpu --offline_iterations 60 --online_iterations 320
    --eval_freq 150 --checkpoint_freq 20 --log_freq 10 --n_episodes 1 --hidden_dim 8
    --q_n_hidden_layers 1 --actor_n_hidden_layers 1 --batch_size 16 --cql_n_actions 2
    --checkpoints_path .""".split()
RUN += ["--dataset_path", str(QUICKSTART)]

# on the data that `write_dataset` writes
SMALL = """--env maze2d-umaze-v1 --dataset_path data.hdf5 --device cpu --hidden_dim 8
    --q_n_hidden_layers 1 --actor_n_hidden_layers 1 --batch_size 16 --cql_n_actions 2
    --offline_iterations 20 --online_iterations 310 --eval_freq 100 --n_episodes 1
    --log_freq 10""".split()


# ---------------------------------------------------------------------------------------- processes


def start_run(directory: Path, *options: Any, **settings: Any) -> subprocess.Popen:
    """`python cal_ql.py OPTIONS` in `directory`; `settings` are those of Popen."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **settings}
    settings.setdefault("env", {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **os.environ})
    command = [sys.executable, str(ROOT / "cal_ql.py"), *map(str, options)]
    return subprocess.Popen(command, cwd=directory, **settings)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait until the process ends; return its exit code and output."""
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_until(process: subprocess.Popen, holds: Callable[[], bool]) -> None:
    """Return as soon as `holds()`; raise RuntimeError if the process ends before that."""
    while not holds():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended too early: {finish(process)}")
        time.sleep(0.0005)


def step_reached(folder: Path, step: int) -> Callable[[], bool]:
    """A function that returns whether the run below `folder` has logged this step."""
    return lambda: any(record["step"] >= step for record in read_records(folder))


# ------------------------------------------------------------------------------ within this process


@contextlib.contextmanager
def kept_signals() -> Iterator[None]:
    """Afterwards, restore the handlers of SIGINT and SIGTERM."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def call(*args: Any) -> subprocess.CompletedProcess:
    """`python cal_ql.py ARGS` within this process, which saves the time of its imports."""
    program = functools.partial(run_program, cal_ql.main, "cal_ql.py", goes_on=True)
    return call_program("cal_ql.py", program, *args)


def call_tool(tool: ModuleType, *args: Any) -> subprocess.CompletedProcess:
    """`python tools/TOOL.py ARGS` within this process."""
    name = tool.__name__.rpartition(".")[2] + ".py"
    return call_program(name, functools.partial(run_program, tool.main, name), *args)


def call_program(name: str, program: Callable[[], int], *args: Any) -> subprocess.CompletedProcess:
    out, err = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    with (
        mock.patch.object(sys, "argv", [name, *map(str, args)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        kept_signals(),
    ):
        code = program()
    gc.collect()  # frees what an error's frames hold, for example a run directory's lock
    for stream in (out, err):
        stream.seek(0)
    return subprocess.CompletedProcess(args, code, out.read(), err.read())


def error_line(result: subprocess.CompletedProcess, code: int = 2, kind: str = "error") -> str:
    """The only line on stderr, besides the progress bar, of a process that ended with `code`."""
    assert result.returncode == code, result.stderr
    lines = re.split(r"[\r\n]+", result.stderr)
    lines = [line for line in lines if line and not re.search(r" \[\d\d:\d\d", line)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"cal_ql.py: {kind}: ")
    return lines[0]


def parse(*args: Any) -> Config:
    """The configuration of `python cal_ql.py ARGS`."""
    return cal_ql.parse_config(list(map(str, args)))


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Within, `folder` is the working directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Within, no file can exceed this number of bytes: OSError, as from a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ----------------------------------------------------------------------- what runs read and write


def write_dataset(
    path: Path, observation_dim: int = 4, action_dim: int = 2, n: int = 400, **changed: Any
) -> Path:
    """Write random rows in D4RL's layout, episodes of 40 steps; `changed` replaces arrays."""
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
            file[key] = array
    return path


def make_pendulum_data(name: str, root: Path) -> Path:
    """Make a Minari dataset of two steps in MINARI_DATASETS_PATH, `root`; return metadata.json."""
    import gymnasium
    import minari

    buffer = minari.data_collector.episode_buffer.EpisodeBuffer(
        observations=np.zeros((3, 3), np.float32),
        actions=np.zeros((2, 1), np.float32),
        rewards=[0.0, 1.0],
        terminations=[False] * 2,
        truncations=[False, True],
    )
    env = gymnasium.make("Pendulum-v1")
    options = dict(env=env, eval_env=env, algorithm_name="none", description="two steps")
    minari.create_dataset_from_buffers(name, [buffer], **options)
    return root / name / "data" / "metadata.json"


def only_run(path: Path) -> Path:
    """Directory of the one run whose checkpoints_path is `path`."""
    (metrics,) = path.glob("*/metrics.jsonl")
    return metrics.parent


def newest(path: Path) -> Path:
    """The newest checkpoint of the one run in `path`."""
    return max(only_run(path).glob("checkpoint_*.pt"), key=lambda file: int(file.stem[11:]))


def read_records(directory: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl so far, of the one run below `directory`."""
    text = "".join(path.read_text() for path in directory.glob("*/metrics.jsonl"))
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def check_no_goal(directory: Path) -> None:
    """Check that the run below `directory` logs scores and returns, but nothing about success."""
    keys = {key for record in read_records(directory) for key in record}
    assert {"train/episode_return", "eval/d4rl_normalized_score", "offline_iter"} <= keys
    assert not [key for key in keys if re.search("success|regret|fail", key)]


def flatten(value: Any, name: str) -> dict[str, Any]:
    """The leaves of nested dicts and lists by their path, tensors as bytes."""
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in pairs for k, v in flatten(part, f"{name} {key}").items()}
    return {name: value.numpy().tobytes() if torch.is_tensor(value) else value}


def outcome(directory: Path, ignored_step: int | None = None) -> dict[str, Any]:
    """All files of the run below `directory`, without its speed and records at `ignored_step`."""
    final = newest(directory)
    transitions = only_run(directory) / "transitions.bin"
    metrics = [{**record, "updates_per_second": None} for record in read_records(directory)]
    metrics = [record for record in metrics if record["step"] != ignored_step]
    # "config" may differ in options that may change between starts, "sizes" by the length of rates
    checkpoint = {
        **torch.load(final, map_location="cpu", weights_only=True),
        "config": None,
        "sizes": None,
    }
    leaves = flatten(metrics, "record") | flatten(checkpoint, "checkpoint")
    return {"file": final.name, "transitions": transitions.read_bytes(), **leaves}


def differences(first: Path, second: Path, ignored_step: int | None = None) -> list[str]:
    """The names of all differences between the outcomes of the runs below two directories."""
    a, b = outcome(first, ignored_step), outcome(second, ignored_step)
    return [name for name in {**a, **b} if a.get(name, "none") != b.get(name, "none")]


# ------------------------------------------------------------------------------- interrupting runs


@contextlib.contextmanager
def at_call(owner: type, name: str, number: int, act: Callable[[], Any]) -> Iterator[None]:
    """Within, call number `number` of the method `owner.name` first calls `act`."""
    method, calls = getattr(owner, name), iter(range(1, 10**9))

    def counting(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            act()
        return method(*args, **kwargs)

    with mock.patch.object(owner, name, counting):
        yield


def stopped_at(owner: type, name: str, number: int, *options: Any) -> None:
    """Start a run with these options; a SIGTERM stops it at that call, see `at_call`."""
    with at_call(owner, name, number, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert "by SIGTERM" in error_line(call(*options), code=143, kind="stopped")


class Killed(BaseException):
    """Acts like kill -9: nothing catches it, and nothing is saved."""


def killed_at(owner: type, name: str, number: int, *options: Any) -> None:
    """Start a run with these options; it ends at that call as if by kill -9, see `at_call`."""

    def die() -> None:
        raise Killed

    with at_call(owner, name, number, die):
        try:
            call(*options)
        except Killed:
            pass
        else:
            raise AssertionError("the run ended before that call")
    assert list(Path().glob("*/checkpoint_*.pt"))  # to resume from
    gc.collect()  # the exception's frames hold the run's lock


def resumed_like_left_alone(
    folder: Path,
    left_alone: list[Any],
    ended: list[Any],
    *moment: Any,
    end: Callable[..., None] = stopped_at,
) -> list[str]:
    """Differences between an uninterrupted run and one that ends at a call and is resumed.

    `left_alone` and `ended` are their options; `end` interrupts the second one at `moment`.
    """
    folders = folder / "left_alone", folder / "ended"
    for directory in folders:
        directory.mkdir()
    with working_in(folders[0]):
        assert call(*left_alone).returncode == 0
    with working_in(folders[1]):
        end(*moment, *ended)
        assert call(*ended).returncode == 0
    return differences(*folders)


# ------------------------------------------------------------------------------------------- agents


S, A, B, N = 3, 2, 6, 3  # sizes of an observation, an action, a batch; actions sampled per state


def make_agent(**options) -> Agent:
    """An agent in float64, its parameters far from zero and from each other."""
    torch.manual_seed(2)  # with it, values lie on both sides of the bound
    sizes = dict(batch_size=B, cql_n_actions=N, hidden_dim=7, actor_n_hidden_layers=2)
    sizes |= dict(compile=False)
    agent = Agent(S, A, Config(**sizes | options), torch.device("cpu")).double()
    for network, scale in ((agent.actor, 0.5), (agent.critic, 1.0), (agent.target_critic, 1.0)):
        for parameter in network.parameters():
            parameter.data = scale * torch.randn_like(parameter)
    for temperature, start in ((agent.log_alpha, 0.3), (agent.log_alpha_prime, -0.4)):
        if temperature is agent.log_alpha_prime or agent.config.use_automatic_entropy_tuning:
            temperature.data.fill_(start)
    return agent


def make_batch(seed: int = 0) -> Batch:
    """Float64 transitions, with a terminal and actions on the edge."""
    random = np.random.default_rng(seed)
    actions = random.uniform(-1, 1, (B, A))
    actions[1] = [1.0, -1.0]
    returns = random.normal(0.0, 6.0, B)
    columns = (
        random.normal(size=(B, S)),
        actions,
        random.normal(size=B),
        random.normal(size=(B, S)),
        np.arange(B) == 2,
        returns,
    )
    return Batch(*(torch.tensor(column, dtype=torch.float64) for column in columns))


def make_kind(**changed: Any) -> UpdateKind:
    """The kind of an offline update that trains everything; `changed` replaces its fields."""
    kind = dict(cql_alpha=5.0, calibrated=True, cloning=False, trains_actor=True)
    return UpdateKind(**kind | dict(n_cloned=0) | changed)


def make_noise(config: Config, seed: int = 0, n: int = N) -> Noise:
    """All noise of an update on `make_batch`, in float64; n is 0 without a regularizer."""
    generator = torch.Generator().manual_seed(seed)
    n_target = N if config.cql_max_target_backup else 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    uniform = torch.rand((B, n, A), generator=generator, dtype=torch.float64) * 2 - 1
    normals = normal(B, A), normal(B, n, A), normal(B, n, A), normal(B, n_target, A)
    drawn = torch.randint(config.n_critics, (config.n_target_critics or 0,), generator=generator)
    return Noise(*normals, uniform, drawn)
