"""Runs that are killed, stopped or hit by a fault go on as if nothing had happened, or say why not.

A run left alone is the measure: its metrics, checkpoints and stored transitions, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import (
    SMALL,
    cal_ql,
    call,
    error_line,
    kill_test,
    newest,
    only_run,
    parse,
    tasks,
    write_dataset,
)

RUN = kill_test.RUN  # 110 steps offline, then episodes of 300 steps at 110 and at 410


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("left_alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*RUN).returncode == 0
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copied(left_alone: Path, folder: Path) -> Path:
    """A copy of that folder, in which the run is finished, as working directory."""
    shutil.copytree(left_alone, folder, dirs_exist_ok=True)
    return folder


@contextlib.contextmanager
def at_call(owner: type, name: str, number: int, act: Callable[[], Any]) -> Iterator[None]:
    """Within, the call of that number of the method `owner.name` does `act` first."""
    method, calls = getattr(owner, name), iter(range(1, 10**9))

    def counting(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            act()
        return method(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counting)
        yield


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def step_reached(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: any(record["step"] >= step for record in kill_test.records(folder))


def stopped_by(process: subprocess.Popen, signum: int) -> tuple[int, float]:
    """Exit code after a signal, and the seconds that took."""
    begin = time.monotonic()
    process.send_signal(signum)
    process.communicate(timeout=60)
    return process.returncode, time.monotonic() - begin


# ---------------------------------------------------------------------------- kill -9


def test_kills_at_any_moment_leave_no_trace(left_alone: Path, folder: Path) -> None:
    moments = {
        "evaluating, for that follows the means": step_reached(folder, 100),
        "writing a checkpoint": lambda: any(folder.glob("*/*.part")),
        "in mid-episode": step_reached(folder, 250),
        "between an episode's end and a checkpoint": step_reached(folder, 410),
    }
    for holds in moments.values():
        process = kill_test.start(folder, *RUN)
        kill_test.wait_until(process, holds)
        assert stopped_by(process, signal.SIGKILL)[0] == -signal.SIGKILL
    assert kill_test.finish(kill_test.start(folder, *RUN)).returncode == 0
    assert kill_test.differences(left_alone, folder) == []


# ---------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("method", "number", "step"),
    [
        pytest.param((cal_ql.Agent, "update"), 70, 70, id="offline"),
        pytest.param((tasks.Task, "step"), 150, 0, id="evaluating at the start"),
        pytest.param((tasks.Task, "step"), 450, 100, id="evaluating"),
        pytest.param((tasks.Task, "step"), 750, 110, id="evaluating between the phases"),
        pytest.param((tasks.Task, "step"), 1000, 110, id="in mid-episode"),
        pytest.param((cal_ql.Agent, "update"), 150, 150, id="online"),
        pytest.param((tasks.Task, "step"), 2550, 500, id="in the last evaluation"),
    ],
)
def test_sigterm_saves_this_very_step_and_leaves_no_trace(
    method: tuple[type, str], number: int, step: int, left_alone: Path, folder: Path
) -> None:
    with at_call(*method, number, send(signal.SIGTERM)):
        assert call(*RUN).returncode == 143
    assert newest(folder).name == f"checkpoint_{step}.pt"
    assert torch.load(newest(folder), weights_only=True)["step"] == step
    assert call(*RUN).returncode == 0
    assert kill_test.differences(left_alone, folder) == []


def test_signals_end_a_process_in_time_and_leave_no_trace(left_alone: Path, folder: Path) -> None:
    for signum, step, code in ((signal.SIGTERM, 30, 143), (signal.SIGINT, 150, 130)):
        process = kill_test.start(folder, *RUN)
        kill_test.wait_until(process, step_reached(folder, step))
        stopped, seconds = stopped_by(process, signum)
        assert (stopped, seconds < 60) == (code, True)
    # two at once: what the first one asks for is not waited for
    process = kill_test.start(folder, *RUN)
    kill_test.wait_until(process, step_reached(folder, 250))
    process.send_signal(signal.SIGSTOP)
    saved = newest(folder)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert stopped_by(process, signal.SIGCONT)[0] in (143, 130)
    assert newest(folder) == saved

    assert kill_test.finish(kill_test.start(folder, *RUN)).returncode == 0
    assert kill_test.differences(left_alone, folder) == []


# ---------------------------------------------------------------------------- run directories


def test_a_second_process_on_a_run_is_refused(folder: Path) -> None:
    process = kill_test.start(folder, *RUN)
    try:
        kill_test.wait_until(process, step_reached(folder, 10))
        assert str(only_run(Path())) in error_line(call(*RUN), code=75)
    finally:
        process.kill()
        process.communicate()


def test_a_finished_run_started_again_changes_nothing(copied: Path) -> None:
    def contents() -> dict[str, bytes]:
        files = only_run(copied).iterdir()
        return {path.name: path.read_bytes() for path in files if path.name != "starts.jsonl"}

    before = contents()
    assert call(*RUN).returncode == 0
    assert contents() == before


def test_runs_of_other_options_have_other_directories() -> None:
    others = ["--seed 1", "--env antmaze-umaze-v2", "--calibrate false", "--reward_bias 1"]
    names = [cal_ql.run_name(parse(*RUN, *options.split())) for options in ["", *others]]
    assert len(set(names)) == len(names)
    assert cal_ql.run_name(parse(*reversed_pairs(RUN))) == names[0]


def reversed_pairs(options: list[str]) -> list[str]:
    pairs = list(zip(options[::2], options[1::2]))
    return [part for pair in reversed(pairs) for part in pair]


def test_an_existing_run_is_left_alone_where_resume_is_false(copied: Path) -> None:
    before = (only_run(copied) / "metrics.jsonl").read_bytes()
    assert "resume" in error_line(call(*RUN, "--resume", "false"))
    assert (only_run(copied) / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("place", ["/sys/runs", f"{__file__}/runs"])
def test_a_directory_that_cannot_be_written_gives_one_line(place: str, folder: Path) -> None:
    assert place in error_line(call(*RUN, "--checkpoints_path", place))


def test_a_run_without_an_online_phase_resumes(folder: Path) -> None:
    options = [*RUN, "--online_iterations", 0]
    with at_call(cal_ql.Agent, "update", 70, send(signal.SIGTERM)):
        assert call(*options).returncode == 143
    assert call(*options).returncode == 0
    assert [r["step"] for r in kill_test.records(folder)] == sorted(
        [0, *range(10, 111, 10), 100, 110]
    )


# ---------------------------------------------------------------------------- broken files


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    """In the weights: torch.load itself does not notice."""
    saved = torch.load(path, weights_only=True)["agent"]
    data = bytearray(path.read_bytes())
    data[data.index(saved["critic.weights.1"].numpy().tobytes())] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit])
def test_a_broken_newest_checkpoint_costs_a_few_steps_and_no_more(
    damage: Callable, left_alone: Path, copied: Path
) -> None:
    broken = newest(copied)
    damage(broken)
    result = call(*RUN)
    assert result.returncode == 0
    assert [broken.name in line for line in (result.stdout + result.stderr).splitlines()].count(
        True
    ) == 1
    assert kill_test.differences(left_alone, copied) == []


def test_where_all_checkpoints_are_broken_nothing_is_lost(copied: Path) -> None:
    for path in only_run(copied).glob("checkpoint_*.pt"):
        truncate(path)
    before = {path.name: path.read_bytes() for path in only_run(copied).iterdir()}
    for _ in range(2):  # the second time too: `docker run --restart` asks no questions
        assert str(only_run(Path())) in error_line(call(*RUN))
    assert {path.name: path.read_bytes() for path in only_run(copied).iterdir()} == before


def test_transitions_shorter_than_every_checkpoint_says_are_refused(copied: Path) -> None:
    (only_run(copied) / "checkpoint_110.pt").unlink()  # which needs none
    empty(only_run(copied) / "transitions.bin")
    for _ in range(2):
        assert "transitions.bin" in error_line(call(*RUN))


def test_where_sizes_and_files_disagree_the_checkpoint_before_is_tried(
    left_alone: Path, copied: Path
) -> None:
    rows = only_run(copied) / "transitions.bin"
    os.truncate(rows, rows.stat().st_size // 2)  # the first of two episodes
    assert call(*RUN).returncode == 0
    assert kill_test.differences(left_alone, copied) == []


def test_shortened_metrics_do_not_end_a_run(copied: Path) -> None:
    truncate(only_run(copied) / "metrics.jsonl")
    for _ in range(2):
        result = call(*RUN)
        assert result.returncode == 0 and "lacks records" in result.stdout


def test_a_copied_checkpoint_is_none_of_the_runs(left_alone: Path, folder: Path) -> None:
    with at_call(cal_ql.Agent, "update", 70, send(signal.SIGTERM)):
        assert call(*RUN).returncode == 143
    shutil.copy(newest(folder), only_run(folder) / "checkpoint_best.pt")
    assert call(*RUN).returncode == 0
    (only_run(folder) / "checkpoint_best.pt").unlink()
    assert kill_test.differences(left_alone, folder) == []


def test_a_resumed_run_that_stops_before_it_logs_resumes_again(
    left_alone: Path, folder: Path
) -> None:
    process = kill_test.start(folder, *RUN)
    kill_test.wait_until(process, step_reached(folder, 190))
    assert stopped_by(process, signal.SIGKILL)[0] == -signal.SIGKILL
    for _ in range(2):
        with at_call(cal_ql.Agent, "update", 1, send(signal.SIGTERM)):
            assert call(*RUN).returncode == 143
    assert call(*RUN).returncode == 0
    assert kill_test.differences(left_alone, folder) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_extended_run_equals_one_that_was_longer(
    workers: int, left_alone: Path, folder: Path
) -> None:
    short = [*RUN, "--online_iterations", 155, "--eval_workers", workers]  # to step 265
    with at_call(cal_ql.Agent, "update", 170, send(signal.SIGTERM)):
        assert call(*short).returncode == 143
    assert call(*short).returncode == 0
    assert call(*RUN, "--online_iterations", 50).returncode == 0  # less is simply the end
    assert call(*RUN).returncode == 0
    assert kill_test.differences(left_alone, folder, aside=265) == []


# ---------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("limit", "options"),
    [
        pytest.param(20_000, ["--log_freq", "1000"], id="checkpoint"),
        pytest.param(5_000, ["--eval_freq", "1000", "--checkpoint_freq", "1000"], id="metrics"),
    ],
)
def test_a_full_disk_ends_the_run_and_loses_no_checkpoint(
    limit: int, options: list[str], folder: Path
) -> None:
    with at_call(cal_ql.Agent, "update", 35, send(signal.SIGTERM)):
        assert call(*RUN, *options).returncode == 143

    def fill_disk() -> None:  # no file may grow beyond the limit
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = kill_test.finish(kill_test.start(folder, *RUN, *options, preexec_fn=fill_disk))
    assert str(newest(Path())) in error_line(result, code=1)
    assert newest(folder).name == "checkpoint_35.pt"
    assert call(*RUN, *options).returncode == 0
    assert newest(folder).name == "checkpoint_500.pt"


def test_a_loss_that_is_not_a_number_ends_the_run_before_it_is_saved(folder: Path) -> None:
    options = [*RUN, "--log_freq", 90]  # checkpoints come due between two looks at the metrics
    real = cal_ql.Agent.compute

    def broken(agent: cal_ql.Agent, *args: Any) -> tuple:
        gradients, metrics = real(agent, *args)
        return gradients, {**metrics, "qf2_loss": torch.tensor(math.nan)}

    with pytest.MonkeyPatch.context() as patch:
        breaking = functools.partial(patch.setattr, cal_ql.Agent, "compute", broken)
        with at_call(cal_ql.Agent, "update", 150, breaking):
            line = error_line(call(*options), code=1)
    assert "qf2_loss is not finite at step 150" in line
    assert str(newest(Path())) in line and newest(Path()).name == "checkpoint_140.pt"
    assert call(*options).returncode == 0
    assert newest(folder).name == "checkpoint_500.pt"


def fail() -> None:
    raise ValueError("the simulation is unstable")


@pytest.mark.parametrize(
    ("method", "number", "step"),
    [
        pytest.param("step", 1000, 110, id="in mid-episode"),
        pytest.param("step", 450, 100, id="evaluating"),
        pytest.param("reset", 4, 110, id="beginning an episode"),
    ],
)
def test_an_environment_that_fails_is_named_and_the_run_saved(
    method: str, number: int, step: int, folder: Path
) -> None:
    seeds, reset = [], tasks.Task.reset

    def noting(task: tasks.Task, seed: int) -> np.ndarray:
        seeds.append(seed)
        return reset(task, seed)

    with pytest.MonkeyPatch.context() as patch:
        if method == "step":
            patch.setattr(tasks.Task, "reset", noting)
        with at_call(tasks.Task, method, number, fail):
            line = error_line(call(*RUN), code=1)
    assert "the simulation is unstable" in line
    assert not seeds or f"seed {seeds[-1]}" in line
    assert newest(folder).name == f"checkpoint_{step}.pt"
    counts = torch.load(newest(folder), weights_only=True)["counts"]
    assert counts["episodes"] == (step == 110)  # it is skipped, and that is saved
    assert call(*RUN).returncode == 0
    updates = [r["step"] for r in kill_test.records(folder) if "updates_per_second" in r]
    assert updates == [*range(10, 501, 10)]


# ---------------------------------------------------------------------------- other runs


def resumed_like_left_alone(folder: Path, options: list[Any], step_calls: int) -> list[str]:
    """Differences between a run and the same with a SIGTERM at a call of Task.step."""
    outcomes = folder / "left_alone", folder / "stopped"
    for outcome in outcomes:
        outcome.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(outcomes[0])
        assert call(*options).returncode == 0
        patch.chdir(outcomes[1])
        with at_call(tasks.Task, "step", step_calls, send(signal.SIGTERM)):
            assert call(*options).returncode == 143
        assert call(*options).returncode == 0
    return kill_test.differences(*outcomes)


@pytest.mark.parametrize(
    ("buffer_size", "steps"),
    [pytest.param(60, 320, id="in an episode"), pytest.param(320, 620, id="between episodes")],
)
def test_a_wrapping_buffer_resumes_exactly(buffer_size: int, steps: int, folder: Path) -> None:
    data = write_dataset(folder / "data.hdf5", n=60)
    options = [*SMALL, "--dataset_path", data, "--checkpoints_path", ".", "--eval_freq", 1000]
    options += ["--online_iterations", steps, "--buffer_size", buffer_size]
    assert resumed_like_left_alone(folder, options, step_calls=300 + steps - 10) == []


def test_antmaze_resumes_exactly_with_its_start_and_goal(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_dataset(folder / "data.hdf5", observation_dim=29, action_dim=8)
    options = [*SMALL, "--env", "antmaze-umaze-v2", "--dataset_path", data]
    options += ["--checkpoints_path", ".", "--online_iterations", 60, "--eval_freq", 1000]
    real, episodes = tasks.Task.reset, []

    def reset(task: tasks.Task, seed: int) -> np.ndarray:
        start = real(task, seed)
        episodes.append((seed, tuple(start), tuple(task.env.unwrapped.target_goal)))
        return start

    monkeypatch.setattr(tasks.Task, "reset", reset)
    assert resumed_like_left_alone(folder, options, step_calls=2 * 700 + 40) == []
    # two evaluations, training, evaluation; the same up to the signal; training again, evaluation
    first, second, training, last = episodes[:4]
    assert episodes[4:] == [first, second, training, training, last]
    assert first == second == last != training


def test_a_checkpoint_of_other_options_is_refused_and_they_are_named(copied: Path) -> None:
    stranger = cal_ql.run_name(parse(*RUN, "--discount", "0.5"))
    only_run(copied).rename(copied / stranger)
    before = newest(copied).read_bytes()
    assert "'discount': 0.99" in error_line(call(*RUN, "--discount", "0.5"))
    assert newest(copied).read_bytes() == before
