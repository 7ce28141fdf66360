"""The programs around the script, against runs written by hand and by the script itself."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import cal_ql
import runs
from tools import benchmark, evaluate

ROOT = Path(__file__).resolve().parents[1]


def run_tool(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def restored_signals():
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, restored_signals) -> Path:
    path = tmp_path_factory.mktemp("runs")
    config = cal_ql.parse_config(
        f"--env maze2d-umaze-v1 --device cpu --checkpoints_path {path} --hidden_dim 8 --seed 3"
        f" --dataset_path {ROOT}/datasets/maze2d-umaze-v1-small.hdf5 --batch_size 16"
        " --offline_iterations 30 --online_iterations 0 --n_episodes 3 --eval_seed 7".split()
    )
    cal_ql.start(config, runs.StopSignals())
    return path / cal_ql.run_name(config)


def test_evaluate_repeats_the_score_that_the_run_recorded(finished_run, tmp_path):
    records = [json.loads(line) for line in (finished_run / "metrics.jsonl").open()]
    scores = [r["eval/d4rl_normalized_score"] for r in records if "eval/success_rate" in r]
    printed = evaluate.evaluate(finished_run, 3, None, None)
    assert "3 episodes of maze2d-umaze-v1, seed 7" in printed
    assert f"normalized score  {scores[-1]:.2f}" in printed
    assert "length            300.00 (300.00 to 300.00), deviation 0.00" in printed


def test_evaluate_records_a_video_or_says_what_is_missing(finished_run, tmp_path, monkeypatch):
    video = tmp_path / "episode.gif"
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    result = run_tool("tools/evaluate.py", finished_run, "--episodes", 1, "--video", video)
    if result.returncode:
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1 and "OpenGL" in result.stderr
    else:
        assert video.read_bytes().startswith(b"GIF8")


@pytest.mark.parametrize("best_of_many", [False, True])
def test_benchmark_counts_the_operations_that_torch_counts(best_of_many):
    sizes = dict(batch_size=8, hidden_dim=24, cql_n_actions=3, actor_n_hidden_layers=2)
    config = cal_ql.Config(**sizes, q_n_hidden_layers=4, cql_max_target_backup=best_of_many)
    agent = cal_ql.Agent(5, 2, config, torch.device("cpu"))
    column, wide = torch.zeros(8), torch.zeros(8, 5)
    batch = cal_ql.Batch(wide, torch.zeros(8, 2), column, wide, column, column)
    with FlopCounterMode(display=False) as counter:
        agent.update(batch, online=False)
    assert benchmark.flops(config, 5, 2) == counter.get_total_flops()


def test_benchmark_counts_kernels_and_not_views():
    x = torch.ones(4, 4)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        torch.relu(x.mT[:2].reshape(4, 2) @ x[:2])  # a copy, a product and a ReLU
        torch._foreach_add_([x, x], 1.0)
    tops = [event for event in profiled.events() if event.cpu_parent is None]
    assert sum(map(benchmark.count_kernels, tops)) == 4


def test_benchmark_reports_a_run(tmp_path, restored_signals):
    config = cal_ql.Config(
        device="cpu",
        env="maze2d-umaze-v1",
        dataset_path=str(ROOT / "datasets/maze2d-umaze-v1-small.hdf5"),
        checkpoints_path=str(tmp_path),
        batch_size=16,
        hidden_dim=8,
        online_iterations=1000,
    )
    found = benchmark.benchmark(config, repeats=1)
    assert found["offline transitions"] == 98_913
    # float32: an observation of 4, an action of 2, three numbers; a next observation online alone
    assert found["bytes per online transition"] == 4 * (4 + 2 + 3 + 4)
    assert found["bytes per offline transition"] == pytest.approx(4 * (4 + 2 + 3) + 8, rel=0.02)
    assert all(value > 0 for value in found.values() if not isinstance(value, str))
    assert sum(found[name] for name in found if name.startswith("share of the")) == pytest.approx(1)


def test_intervals():
    found = evaluate.mean_interval([1.0, 2.0, 3.0])  # t = 4.303, 2 degrees of freedom
    assert found == "2.00 (-0.48 to 4.48), deviation 0.82 over episodes"
    assert evaluate.rate_interval(5, 10) == "0.500 (0.237 to 0.763)"  # Wilson (1927)


@pytest.mark.parametrize(
    "options, named",
    [("nowhere", "nowhere"), (".", "no checkpoint"), ("other.pt", "other.pt")]
    + [("run --episodes 0", "episodes"), ("run --seed -1", "seed")],
)
def test_evaluate_names_what_is_wrong_in_one_line(options, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": torch.zeros(3)}, "other.pt")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *options.split()])
    assert evaluate.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error
