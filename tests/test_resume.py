"""What a run logs and saves, and that runs resume after a kill, a signal or a fault.

A resumed run must be bit-identical to an uninterrupted one: metrics, checkpoints, transitions.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cal_ql
from helpers import (
    QUICKSTART,
    RUN,
    SMALL,
    at_call,
    call,
    differences,
    error_line,
    file_size_limit,
    flatten,
    killed_at,
    newest,
    only_run,
    parse,
    read_records,
    resumed_like_left_alone,
    start_run,
    step_reached,
    stopped_at,
    wait_until,
    working_in,
    write_dataset,
)
from runs import directory
from runs.directory import RunDirectory
from runs.log import Wandb
from tasks.d4rl import D4RL

# 60 steps offline, then episodes of 150 steps at 60 and at 210; evaluates at 0, 60, 150 and 230
RUN = [*RUN, *"--env maze2d-open-v0 --online_iterations 170".split()]
SHORT = [*RUN, "--online_iterations", 80]  # to step 140


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("left_alone")
    with working_in(folder):
        assert call(*RUN).returncode == 0
    return folder


@pytest.fixture
def copied(left_alone: Path, folder: Path) -> Path:
    """A copy of that folder, in which the run is finished, as working directory."""
    shutil.copytree(left_alone, folder, dirs_exist_ok=True)
    return folder


def ended_by(process: subprocess.Popen, signum: int) -> int:
    """Its exit code after a signal."""
    process.send_signal(signum)
    process.communicate()
    return process.returncode


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a run except starts.jsonl, to which every start appends."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "starts.jsonl"}


# ---------------------------------------------------------------------------- what it logs

UPDATE_METRICS = {
    *"policy_loss alpha_loss alpha alpha_prime alpha_prime_loss log_pi".split(),
    *"qf1_loss qf2_loss average_qf1 average_qf2 average_target_q".split(),
    *"cql_q1_rand cql_q2_rand cql_q1_current_actions cql_q2_current_actions".split(),
    *"cql_q1_next_actions cql_q2_next_actions cql_qf1_diff cql_qf2_diff".split(),
    *"cql_min_qf1_loss cql_min_qf2_loss cql_std_q1 cql_std_q2".split(),
    *"bound_rate_cql_q1_current_actions bound_rate_cql_q2_current_actions".split(),
    *"bound_rate_cql_q1_next_actions bound_rate_cql_q2_next_actions".split(),
    *"critic_gradient_norm actor_gradient_norm average_return_to_go updates_per_second".split(),
}
EPISODE_METRICS = {
    *"train/episode_return train/d4rl_normalized_episode_return train/episode_length".split(),
    *"train/is_success train/regret".split(),
}
EVAL_METRICS = {
    *"eval/d4rl_normalized_score eval/episode_return eval/episode_length".split(),
    *"eval/d4rl_normalized_score_std eval/episode_return_std eval/episode_length_std".split(),
    "eval/success_rate",
}


def test_the_logged_names_are_those_that_the_field_plots_at_their_steps(left_alone: Path) -> None:
    records = read_records(left_alone)
    steps: dict[frozenset, list[int]] = {}
    for record in records:
        assert record["step"] == record.get("offline_iter", 60 + record.get("online_iter", 0))
        assert ("offline_iter" in record) == (record["step"] <= 60)
        names = frozenset(record.keys() - {"step", "offline_iter", "online_iter"})
        steps.setdefault(names, []).append(record["step"])
    assert steps == {
        frozenset(UPDATE_METRICS): [*range(10, 231, 10)],
        # each episode is logged at the step at which it was played, before its updates
        frozenset(EPISODE_METRICS): [60, 210],
        frozenset(EVAL_METRICS): [0, 60, 230],
        frozenset(EVAL_METRICS | {"eval/regret"}): [150],  # online, at a multiple of eval_freq
    }
    assert {r["train/episode_length"] for r in records if "train/is_success" in r} == {150}
    assert all(np.isfinite(list(record.values())).all() for record in records)


def test_the_regret_of_evaluations_is_that_of_the_online_phase_also_after_a_kill(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of 1 - success; after an older checkpoint, which lacks the sums, it starts again."""
    options = [*RUN, "--eval_freq", 25, "--online_iterations", 105]  # evaluates at 165, too
    real = cal_ql.Run.evaluate

    def evaluate(run: cal_ql.Run) -> dict[str, float]:
        return real(run) | {"eval/success_rate": run.progress.step / 200}

    monkeypatch.setattr(cal_ql.Run, "evaluate", evaluate)
    killed_at(cal_ql.Agent, "update", 130, *options)
    assert call(*options).returncode == 0
    found = {r["step"]: r["eval/regret"] for r in read_records(folder) if "eval/regret" in r}
    expected = {step: 1 - np.mean(range(75, step + 1, 25)) / 200 for step in (75, 100, 125, 150)}
    assert found == pytest.approx(expected)

    path = newest(folder)
    saved = torch.load(path, weights_only=True)
    for name in ("evaluations", "successes"):
        del saved["counts"][name]
    torch.save(saved, path)
    assert call(*options, "--online_iterations", 115).returncode == 0
    assert read_records(folder)[-1]["eval/regret"] == 1 - 175 / 200


def test_another_seed_gives_other_numbers(left_alone: Path, folder: Path) -> None:
    assert call(*RUN, "--seed", 1, "--online_iterations", 1).returncode == 0
    different = differences(left_alone, folder)
    assert {"record 1 qf1_loss", "record 2 policy_loss", "transitions"} <= set(different)


def test_the_runs_directory_holds_the_resolved_config(left_alone: Path) -> None:
    assert parse("--config_path", only_run(left_alone) / "config.yaml") == parse(*RUN)


def test_a_run_without_checkpoints_path_writes_nothing(folder: Path) -> None:
    write_dataset(folder / "data.hdf5")
    assert call(*SMALL, "--online_iterations", 0).returncode == 0
    assert os.listdir() == ["data.hdf5"]


@pytest.mark.parametrize("optimizer", [True, False])
def test_load_model_takes_weights_and_scaling(
    optimizer: bool, left_alone: Path, folder: Path
) -> None:
    model = torch.load(newest(left_alone), weights_only=True)
    model["scaling"]["observation_std"] += 1  # as of other data
    if not optimizer:
        del model["optimizer"]
    torch.save(model, "model.pt")
    one_step = ["--offline_iterations", 0, "--online_iterations", 1, "--policy_lr", 1e-30]
    one_step += ["--qf_lr", 1e-30, "--soft_target_update_rate", 0]  # which changes nothing
    one_step += ["--compile", False]
    assert call(*RUN, *one_step, "--load_model", "model.pt").returncode == 0
    loaded = torch.load(newest(folder), weights_only=True)
    assert (loaded["step"], model["step"]) == (1, 230)
    for part in ("agent", "scaling"):
        assert flatten(loaded[part], "") == flatten(model[part], "")
    steps = {state["step"].item() for state in loaded["optimizer"]["state"].values()}
    assert steps <= ({1, 231} if optimizer else {1})  # the multiplier is not trained here


def test_a_checkpoint_of_another_architecture_is_refused(left_alone: Path, folder: Path) -> None:
    others = dict.fromkeys(("hidden_dim", "q_n_hidden_layers", "actor_n_hidden_layers"), 9)
    others |= dict.fromkeys(("critic_layer_norm", "actor_layer_norm"), True)
    for other, value in others.items():
        line = error_line(call(*RUN, "--load_model", newest(left_alone), f"--{other}", value))
        assert f"load_model: {newest(left_alone)} has networks for {other}" in line
        assert f"expected {other} {value}" in line


# ---------------------------------------------------------------------------- kills and signals


def test_a_process_killed_or_stopped_at_any_moment_leaves_no_trace(
    left_alone: Path, folder: Path
) -> None:
    moments = [
        (lambda: any(folder.glob("*/*.part")), signal.SIGKILL, -9),  # writing a checkpoint
        (step_reached(folder, 100), signal.SIGTERM, 143),
    ]
    for holds, signum, code in moments:
        process = start_run(folder, *RUN)
        wait_until(process, holds)
        assert ended_by(process, signum) == code
    # two at once, and nobody reads its output: what the first one asks for is not waited for
    reader, closed = os.pipe()
    os.close(reader)
    process = start_run(folder, *RUN, stdout=closed, stderr=closed)
    os.close(closed)
    wait_until(process, step_reached(folder, 170))
    process.send_signal(signal.SIGSTOP)
    saved = newest(folder)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert ended_by(process, signal.SIGCONT) in (143, 130)
    assert newest(folder) == saved

    assert call(*RUN).returncode == 0
    assert differences(left_alone, folder) == []


def test_sigterm_saves_this_very_step_and_leaves_no_trace(left_alone: Path, folder: Path) -> None:
    update, play = (cal_ql.Agent, "update"), (D4RL, "step")  # an episode has 150 steps
    moments = {
        "evaluating at the start": (play, 75, 0),
        "offline": (update, 40, 40),
        "evaluating between the phases": (play, 75, 60),
        "in mid-episode": (play, 225, 60),
        "online": (update, 40, 100),
        "evaluating": (play, 75, 150),
        "in the last evaluation": (play, 2 * 150 + 75, 230),
    }
    for moment, (method, number, step) in moments.items():
        stopped_at(*method, number, *RUN)
        assert newest(folder).name == f"checkpoint_{step}.pt", moment
        assert torch.load(newest(folder), weights_only=True)["step"] == step
    assert call(*RUN).returncode == 0
    assert differences(left_alone, folder) == []


def test_a_stop_ends_the_wait_for_wandb(left_alone: Path, folder: Path) -> None:
    stopped_at(Wandb, "close", 1, *RUN)
    assert differences(left_alone, folder) == []


def test_a_resumed_run_that_stops_before_it_logs_resumes_again(
    left_alone: Path, folder: Path
) -> None:
    killed_at(cal_ql.Agent, "update", 90, *RUN)
    for _ in range(2):
        stopped_at(cal_ql.Agent, "update", 1, *RUN)
    assert call(*RUN).returncode == 0
    assert differences(left_alone, folder) == []


def test_an_extended_run_equals_one_that_was_longer(left_alone: Path, folder: Path) -> None:
    shorter = [*RUN, "--online_iterations", 105]  # to step 165
    stopped_at(cal_ql.Agent, "update", 110, *shorter)
    assert call(*shorter).returncode == 0
    less = error_line(call(*RUN, "--online_iterations", 50))
    assert "online_iterations: found 50, expected 105 or more" in less
    assert call(*RUN).returncode == 0
    assert differences(left_alone, folder, ignored_step=165) == []


def test_a_wrapping_buffer_resumes_exactly(folder: Path) -> None:
    data = write_dataset(folder / "data.hdf5", n=60)
    options = [*SMALL, "--dataset_path", data, "--checkpoints_path", ".", "--eval_freq", 1000]
    options += ["--online_iterations", 40, "--buffer_size", 60]  # less than an episode
    assert resumed_like_left_alone(folder, options, options, cal_ql.Agent, "update", 50) == []


def test_antmaze_resumes_exactly_with_its_start_and_goal(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_dataset(folder / "data.hdf5", observation_dim=29, action_dim=8)
    options = [*SMALL, "--env", "antmaze-umaze-v2", "--dataset_path", data]
    options += ["--checkpoints_path", ".", "--offline_iterations", 0, "--online_iterations", 20]
    options += ["--compile", False]
    real, episodes = D4RL.reset, []

    def reset(task: D4RL, seed: int) -> np.ndarray:
        start = real(task, seed)
        episodes.append((seed, tuple(start), tuple(task.env.unwrapped.target_goal)))
        return start

    monkeypatch.setattr(D4RL, "reset", reset)
    in_training = D4RL, "step", 700 + 40
    assert resumed_like_left_alone(folder, options, options, *in_training) == []
    # evaluation, training, evaluation; the same up to the signal; training again, evaluation
    first, training, last = episodes[:3]
    assert episodes[3:] == [first, training, training, last]
    assert first == last != training


def test_a_run_without_an_online_phase_resumes(folder: Path) -> None:
    options = [*RUN, "--online_iterations", 0]
    stopped_at(cal_ql.Agent, "update", 40, *options)
    assert call(*options).returncode == 0
    assert [r["step"] for r in read_records(folder)] == [0, *range(10, 61, 10), 60]


# ---------------------------------------------------------------------------- run directories


def test_a_run_that_another_process_holds_is_refused_for_now(copied: Path) -> None:
    holder = RunDirectory(only_run(copied), resume=True)
    assert str(only_run(Path())) in error_line(call(*RUN), code=75)
    holder.lock.close()


def test_a_finished_run_started_again_changes_nothing(copied: Path) -> None:
    before = contents(only_run(copied))
    assert call(*RUN).returncode == 0
    assert contents(only_run(copied)) == before


def test_an_existing_run_is_left_alone_where_resume_is_false(copied: Path) -> None:
    before = contents(only_run(copied))
    assert "resume" in error_line(call(*RUN, "--resume", "false"))
    assert contents(only_run(copied)) == before


def test_what_is_learned_names_a_run_and_nothing_else_does(folder: Path) -> None:
    data = write_dataset(folder / "data.hdf5")
    (folder / "elsewhere").mkdir()
    shutil.copy(data, folder / "elsewhere")
    write_dataset(folder / "elsewhere" / "other.hdf5")
    others = """--seed 1, --env antmaze-umaze-v2, --calibrate false, --reward_bias 1, --name x,
        --eval_seed 1, --precision float32, --dataset_path elsewhere/other.hdf5""".split(",")
    alike = """--device auto, --compile true, --eval_workers 3, --checkpoints_path runs,
        --resume false, --project x, --group x, --log_freq 3, --checkpoint_freq 3, --eval_freq 3,
        --n_episodes 3, --online_iterations 3, --dataset_path elsewhere/data.hdf5""".split(",")
    name = cal_ql.run_name(parse(*SMALL))
    names = [cal_ql.run_name(parse(*SMALL, *options.split())) for options in others]
    assert len({name, *names}) == 1 + len(others)
    assert {cal_ql.run_name(parse(*SMALL, *options.split())) for options in alike} == {name}


def test_a_checkpoint_of_other_options_is_refused_and_they_are_named(copied: Path) -> None:
    stranger = cal_ql.run_name(parse(*RUN, "--discount", "0.5"))
    only_run(copied).rename(copied / stranger)
    before = contents(copied / stranger)
    assert "with discount (its default)" in error_line(call(*RUN, "--discount", "0.5"))
    assert contents(copied / stranger) == before


def test_resuming_elsewhere_says_in_one_line_that_numbers_may_differ(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = directory.provenance()
    assert here.keys() == {"commit", "torch", "processor", "threads"}
    monkeypatch.setattr(directory, "provenance", lambda: here)  # whoever edits the code meanwhile
    starts = only_run(copied) / "starts.jsonl"
    starts.write_text(json.dumps({"step": 0, **here}) + "\n")
    assert "may differ" not in call(*RUN).stdout
    starts.write_text(json.dumps({"step": 0, **here, "processor": "Z80", "threads": 64}))
    (line,) = [line for line in call(*RUN).stdout.splitlines() if "may differ" in line]
    assert f"processor Z80 -> {here['processor']}, threads 64 -> 1" in line
    starts.write_text("")  # the disk was full, or the power went
    assert call(*RUN).returncode == 0


@pytest.mark.parametrize("broken", ["directory", "no text"])
def test_a_wandb_id_that_cannot_be_read_is_named_and_the_run_goes_on(
    broken: str, copied: Path
) -> None:
    newest(copied).unlink()  # so that there is something left to do
    place = only_run(copied) / "wandb_id"
    place.unlink()
    place.mkdir() if broken == "directory" else place.write_bytes(b"\xff\xfe\x00")
    result = call(*RUN)
    assert result.returncode == 0 and newest(copied).name == "checkpoint_230.pt"
    (line,) = [line for line in result.stdout.splitlines() if "W&B" in line]
    assert "wandb_id, so the run gets a new id" in line


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


def write_something_else(path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, write_something_else])
def test_a_broken_newest_checkpoint_costs_a_few_steps_and_no_more(
    damage: Callable, left_alone: Path, copied: Path
) -> None:
    broken = newest(copied)
    damage(broken)
    result = call(*RUN)
    assert result.returncode == 0
    (line,) = [x for x in (result.stdout + result.stderr).splitlines() if broken.name in x]
    assert "set aside" in line and broken.with_suffix(".broken").exists()
    assert differences(left_alone, copied) == []


def test_where_all_checkpoints_are_broken_nothing_is_lost(copied: Path) -> None:
    for path in only_run(copied).glob("checkpoint_*.pt"):
        truncate(path)
    before = contents(only_run(copied))
    for _ in range(2):  # the second time too: `docker run --restart` asks no questions
        result = call(*RUN)
        assert str(only_run(Path())) in error_line(result)
        assert "set aside" not in result.stdout + result.stderr
    assert contents(only_run(copied)) == before


def test_rows_that_are_not_there_cost_the_checkpoints_that_need_them(
    left_alone: Path, copied: Path
) -> None:
    rows = only_run(copied) / "transitions.bin"
    shutil.copy(only_run(copied) / "checkpoint_60.pt", "checkpoint_60.pt")  # needs none
    truncate(rows)  # the first of two episodes
    assert call(*RUN).returncode == 0
    assert differences(left_alone, copied) == []
    (only_run(copied) / "checkpoint_60.pt").unlink()
    empty(rows)
    for _ in range(2):
        assert "transitions.bin" in error_line(call(*RUN))


def test_shortened_metrics_do_not_end_a_run(copied: Path) -> None:
    truncate(only_run(copied) / "metrics.jsonl")
    for _ in range(2):
        result = call(*RUN)
        assert result.returncode == 0 and "lacks records" in result.stdout


def test_a_copied_checkpoint_is_none_of_the_runs(left_alone: Path, folder: Path) -> None:
    stopped_at(cal_ql.Agent, "update", 70, *RUN)
    shutil.copy(newest(folder), only_run(folder) / "checkpoint_best.pt")
    assert call(*RUN).returncode == 0
    (only_run(folder) / "checkpoint_best.pt").unlink()
    assert differences(left_alone, folder) == []


# ---------------------------------------------------------------------------- faults


@pytest.mark.parametrize("full_at", ["checkpoint", "metrics"])
def test_a_full_disk_ends_the_run_and_loses_no_checkpoint(full_at: str, folder: Path) -> None:
    options = [*SHORT, "--log_freq", 1000]
    if full_at == "metrics":
        options += ["--log_freq", 10, "--checkpoint_freq", 1000]
    stopped_at(cal_ql.Agent, "update", 35, *options)
    sizes = {"checkpoint": newest(folder).stat().st_size - 1}
    sizes["metrics"] = (only_run(folder) / "metrics.jsonl").stat().st_size + 10
    with file_size_limit(sizes[full_at]):
        assert str(newest(Path())) in error_line(call(*options), code=1)
    assert newest(folder).name == "checkpoint_35.pt" and not list(folder.glob("*/*.part"))
    assert call(*options).returncode == 0
    assert newest(folder).name == "checkpoint_140.pt"


def test_a_loss_that_is_not_a_number_ends_the_run_before_it_is_saved(folder: Path) -> None:
    options = [*SHORT, "--log_freq", 90]  # checkpoints come due between two looks at the metrics
    real = cal_ql.Agent.compute_gradients

    def broken(agent: cal_ql.Agent, *args: Any) -> tuple:
        gradients, metrics = real(agent, *args)
        return gradients, {**metrics, "qf2_loss": torch.tensor(math.nan)}

    with pytest.MonkeyPatch.context() as patch:
        breaking = functools.partial(patch.setattr, cal_ql.Agent, "compute_gradients", broken)
        with at_call(cal_ql.Agent, "update", 105, breaking):
            line = error_line(call(*options), code=1)
    assert "qf2_loss is not finite at step 105" in line
    assert str(newest(Path())) in line and newest(Path()).name == "checkpoint_100.pt"
    assert call(*options).returncode == 0
    assert newest(folder).name == "checkpoint_140.pt"


def test_data_that_is_away_while_a_run_saves_is_still_its_own(folder: Path) -> None:
    data = Path("data.hdf5")
    data.symlink_to(QUICKSTART)
    options = [*SHORT, "--env", "maze2d-umaze-v1", "--dataset_path", data]
    with at_call(cal_ql.Agent, "update", 20, data.unlink):
        stopped_at(cal_ql.Agent, "update", 35, *options)
    data.symlink_to(QUICKSTART)
    assert call(*options).returncode == 0


def fail() -> None:
    raise ValueError("the simulation is unstable")


@pytest.mark.parametrize(
    ("method", "number", "skipped"),
    [
        pytest.param("step", 375, 1, id="in mid-episode"),
        pytest.param("step", 225, 0, id="evaluating"),
        pytest.param("reset", 3, 1, id="beginning an episode"),
    ],
)
def test_an_environment_that_fails_is_named_and_the_run_saved(
    method: str, number: int, skipped: int, folder: Path
) -> None:
    with at_call(D4RL, method, number, fail):
        line = error_line(call(*SHORT), code=1)
    purpose = "train" if skipped else "eval"
    seed, step = cal_ql.episode_seed(0, purpose, 0), 74 if method == "step" else 0
    assert f"at step {step} of the episode with seed {seed} (ValueError: the simulation" in line
    assert newest(folder).name == "checkpoint_60.pt"
    counts = torch.load(newest(folder), weights_only=True)["counts"]
    assert counts["episodes"] == skipped  # so that it is not retried forever
    assert call(*SHORT).returncode == 0
    updates = [r["step"] for r in read_records(folder) if "updates_per_second" in r]
    assert updates == [*range(10, 141, 10)]
