"""The command line: options, configs, bad input, downloads, metric names, equal numbers twice."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import inspect
import io
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

import kill_test  # noqa: E402

import cal_ql  # noqa: E402
import tasks  # noqa: E402

SMALL = """--env maze2d-umaze-v1 --dataset_path data.hdf5 --device cpu --hidden_dim 8
    --q_n_hidden_layers 1 --actor_n_hidden_layers 1 --batch_size 16 --cql_n_actions 2
    --offline_iterations 20 --online_iterations 310 --eval_freq 100 --n_episodes 1
    --log_freq 10""".split()


def call(*args: Any) -> subprocess.CompletedProcess:
    """`python cal_ql.py ARGS` within this process, which saves the seconds of its imports."""
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
            code = end.code or 0
        finally:
            for number, handler in handlers:
                signal.signal(number, handler)
    for stream in (out, err):
        stream.seek(0)
    return subprocess.CompletedProcess(args, code, out.read(), err.read())


def run(*args: Any, **settings: Any) -> subprocess.CompletedProcess:
    """`python cal_ql.py ARGS`, for real; `settings` are those of subprocess.run."""
    command = [sys.executable, ROOT / "cal_ql.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **settings)


def error_line(result: subprocess.CompletedProcess, code: int = 2) -> str:
    """The one line on stderr of a process that ended with `code`, the progress bar aside."""
    assert result.returncode == code, result.stderr
    lines = re.split(r"[\r\n]+", result.stderr)
    lines = [line for line in lines if line and not re.search(r" \[\d\d:\d\d", line)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("cal_ql.py: error: ")
    return lines[0]


def parse(*args: Any) -> cal_ql.Config:
    return cal_ql.parse_config(list(map(str, args)))


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


def only_run(path: Path) -> Path:
    """Directory of the one run whose checkpoints_path is `path`."""
    (metrics,) = path.glob("*/metrics.jsonl")
    return metrics.parent


def newest(path: Path) -> Path:
    """Last checkpoint of that run."""
    return max(only_run(path).glob("checkpoint_*.pt"), key=lambda file: int(file.stem[11:]))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a small dataset of maze2d-umaze-v1 in data.hdf5."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data.hdf5")
    return tmp_path


# ---------------------------------------------------------------------------- options

DEFAULTS = {
    "device": "cuda",
    "precision": None,
    "compile": False,
    "env": "halfcheetah-medium-expert-v2",
    "seed": 0,
    "eval_seed": 0,
    "eval_freq": 5000,
    "n_episodes": 10,
    "eval_workers": None,
    "offline_iterations": 1_000_000,
    "online_iterations": 1_000_000,
    "checkpoints_path": None,
    "checkpoint_freq": None,
    "resume": True,
    "load_model": "",
    "buffer_size": 2_000_000,
    "batch_size": 256,
    "discount": 0.99,
    "alpha_multiplier": 1.0,
    "use_automatic_entropy_tuning": True,
    "backup_entropy": False,
    "policy_lr": 3e-5,
    "qf_lr": 3e-4,
    "soft_target_update_rate": 5e-3,
    "bc_steps": 0,
    "target_update_period": 1,
    "cql_alpha": 10.0,
    "cql_alpha_online": 10.0,
    "cql_n_actions": 10,
    "cql_importance_sample": True,
    "cql_lagrange": False,
    "cql_target_action_gap": -1.0,
    "cql_temp": 1.0,
    "cql_max_target_backup": False,
    "cql_clip_diff_min": -math.inf,
    "cql_clip_diff_max": math.inf,
    "calibrate": True,
    "calibrate_online": True,
    "orthogonal_init": True,
    "normalize": True,
    "normalize_reward": False,
    "q_n_hidden_layers": 2,
    "actor_n_hidden_layers": 3,
    "hidden_dim": 256,
    "reward_scale": 1.0,
    "reward_bias": 0.0,
    "is_sparse_reward": False,
    "mixing_ratio": 0.5,
    "online_utd_ratio": 1,
    "dataset_path": None,
    "log_freq": 1000,
    "project": "CORL",
    "group": "Cal-QL-D4RL",
    "name": "Cal-QL",
}

CORL = {  # the values all ten of CORL's files share
    "alpha_multiplier": 1.0,
    "backup_entropy": False,
    "batch_size": 256,
    "bc_steps": 0,
    "buffer_size": 10_000_000,
    "checkpoints_path": None,
    "cql_clip_diff_max": math.inf,
    "cql_clip_diff_min": -200,
    "cql_importance_sample": True,
    "cql_max_target_backup": True,
    "cql_n_actions": 10,
    "cql_target_action_gap": 0.8,
    "cql_temp": 1.0,
    "device": "cuda",
    "discount": 0.99,
    "load_model": "",
    "offline_iterations": 1_000_000,
    "online_iterations": 1_000_000,
    "mixing_ratio": 0.5,
    "name": "CQL",
    "normalize": False,
    "orthogonal_init": True,
    "policy_lr": 1e-4,
    "project": "CORL",
    "qf_lr": 3e-4,
    "seed": 0,
    "soft_target_update_rate": 0.005,
    "target_update_period": 1,
    "use_automatic_entropy_tuning": True,
}
CORL_ANTMAZE = {
    **CORL,
    "cql_alpha": 5.0,
    "cql_alpha_online": 5.0,
    "cql_lagrange": True,
    "eval_freq": 50_000,
    "n_episodes": 100,
    "normalize_reward": True,
    "q_n_hidden_layers": 5,
    "reward_scale": 10.0,
    "reward_bias": -5.0,
    "is_sparse_reward": True,
}
CORL_ADROIT = {
    **CORL,
    "cql_alpha": 1.0,
    "cql_alpha_online": 1.0,
    "cql_lagrange": False,
    "eval_freq": 5000,
    "n_episodes": 10,
    "normalize_reward": False,
    "q_n_hidden_layers": 3,
}
MAZES = "umaze umaze-diverse medium-play medium-diverse large-play large-diverse".split()
CORL_FILES = {
    **{f"antmaze-{maze}-v2": CORL_ANTMAZE for maze in MAZES},
    **{f"{task}-cloned-v1": CORL_ADROIT for task in "pen door hammer relocate".split()},
}

PUBLISHED = {
    "batch_size": 256,
    "discount": 0.99,
    "soft_target_update_rate": 0.005,
    "policy_lr": 1e-4,
    "qf_lr": 3e-4,
    "cql_n_actions": 10,
    "cql_max_target_backup": True,
    "device": "auto",
    "calibrate": True,
    "calibrate_online": True,
    "mixing_ratio": 0.5,
}
OURS = {
    "antmaze": {
        **{key: CORL_ANTMAZE[key] for key in CORL_ANTMAZE.keys() - CORL.keys()},
        "cql_clip_diff_min": -200,
        "cql_target_action_gap": 0.8,
        "actor_n_hidden_layers": 3,
        "hidden_dim": 256,
        "offline_iterations": 1_000_000,
        "online_iterations": 1_000_000,
        "normalize": False,
    },
    "adroit": {
        **{key: CORL_ADROIT[key] for key in CORL_ADROIT.keys() - CORL.keys()},
        "cql_clip_diff_min": -200,
        "actor_n_hidden_layers": 3,
        "hidden_dim": 256,
        "offline_iterations": 1_000_000,
        "online_iterations": 1_000_000,
        "reward_scale": 1,
        "reward_bias": 0,
        "is_sparse_reward": False,
        "normalize": False,
    },
    "kitchen": {
        "cql_alpha": 5,
        "cql_alpha_online": 5,
        "cql_importance_sample": False,
        "cql_lagrange": False,
        "q_n_hidden_layers": 3,
        "actor_n_hidden_layers": 3,
        "hidden_dim": 512,
        "reward_scale": 1,
        "reward_bias": -4,
        "offline_iterations": 250_000,
        "online_iterations": 500_000,
        "eval_freq": 10_000,
        "n_episodes": 20,
    },
}
IRRELEVANT = {"normalize_reward"}  # of locomotion alone; CORL's AntMaze files set it nevertheless


def test_the_defaults_are_those_of_the_design() -> None:
    assert dataclasses.asdict(parse()) == DEFAULTS


def test_help_describes_every_option_and_gives_its_default() -> None:
    result = call("--help")
    assert result.returncode == 0
    assert result.stderr == ""
    entries = re.split(r"\n\s*--", result.stdout)
    texts = {entry.split()[0]: " ".join(entry.split()) for entry in entries[1:]}
    for name, default in DEFAULTS.items():
        assert f"(default: {default})" in texts[name], name
        description = texts[name].partition("(default:")[0].split()
        assert len(description) >= 3, name


@pytest.mark.parametrize("env", CORL_FILES)
def test_corls_files_load_unchanged(env: str, tmp_path: Path) -> None:
    options = {**CORL_FILES[env], "env": env, "group": f"{env}-multiseed-v0"}
    path = tmp_path / "corl.yaml"
    path.write_text(yaml.dump(options))
    assert dataclasses.asdict(parse("--config_path", path)) == {**DEFAULTS, **options}


@pytest.mark.parametrize("name", OURS)
def test_our_files_hold_the_published_hyper_parameters(name: str) -> None:
    config = dataclasses.asdict(parse("--config_path", ROOT / f"configs/{name}.yaml"))
    published = {**PUBLISHED, **OURS[name]}
    assert {key: config[key] for key in published.keys() - IRRELEVANT} == {
        key: published[key] for key in published.keys() - IRRELEVANT
    }


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_names_a_real_task(path: Path) -> None:
    tasks.make(parse("--config_path", path).env)


def test_the_command_line_goes_over_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 3\neval_seed: 4\n")
    config = parse("--config_path", path, "--eval_seed", 5, "--checkpoints_path", "null")
    assert (config.seed, config.eval_seed, config.discount) == (3, 5, 0.99)
    assert config.checkpoints_path is None


# ---------------------------------------------------------------------------- bad input

BAD_OPTIONS = {
    "--sede 1": "--sede",
    "--seed one": "seed",
    "--seed 1.5": "seed",
    "--normalize 2": "normalize",
    "--discount nan": "discount",
    "--discount 1.01": "discount",
    "--precision float16": "precision",
    "--compile maybe": "compile",
    "--eval_workers 0": "eval_workers",
    "--mixing_ratio 1.5": "mixing_ratio",
    "--mixing_ratio -0.1": "mixing_ratio",
    "--mixing_ratio 1": "mixing_ratio",
    "--offline_iterations -1": "offline_iterations",
    "--online_iterations -1": "online_iterations",
    "--batch_size 0": "batch_size",
    "--log_freq 0": "log_freq",
    "--checkpoint_freq 0": "checkpoint_freq",
    "--policy_lr 0": "policy_lr",
    "--cql_temp 0": "cql_temp",
    "--cql_clip_diff_max -300 --cql_clip_diff_min -200": "cql_clip_diff_max",
    "--is_sparse_reward true --discount 1": "discount",
    "--config_path nowhere.yaml": "nowhere.yaml",
    "--config_path .": "config_path",
    "--config_path=": "config_path",
    "--checkpoints_path=": "checkpoints_path",
    "--name ../../x": "name",
    "--cql_clip_diff_max -.inf --cql_clip_diff_min 0": "cql_clip_diff_max",
    "--device mps": "device",
    "--device xpu": "device",
    "--device meta": "device",
}
BAD_FILES = {
    "sed: 1": "sed",
    "seed: [1]": "seed",
    "seed: null": "seed",
    "normalize: 'yes'": "normalize",
    "qf_lr: fast": "qf_lr",
    "env: null": "env",
    "mixing_ratio: 2": "mixing_ratio",
    "1: 2": "1: there is no such option",
    "": "it is empty",
    "seed: 1\nseed: 2": "seed is given twice",
    "name: !!binary aGk=": "name",
    f"seed: {'9' * 400}": "seed",
    f"qf_lr: {'9' * 400}": "qf_lr",
    "- seed": "config_path",
    "seed": "config_path",
    "seed: [": "config_path",
    "seed: 1\n\tname: x": "config_path",
    "seed: \x00": "config_path",
    "seed: \udcff": "config_path",  # a byte that is not UTF-8
}
BAD_DATA = {
    "lacks": {"rewards": None},
    "shape": {"observations": np.zeros((400, 5), np.float32)},
    "rewards has shape": {"rewards": np.zeros((400, 2), np.float32)},
    "NaN": {"rewards": np.full(400, np.nan, np.float32)},
    "actions reach 1.5": {"actions": np.full((400, 2), 1.5, np.float32)},
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_a_bad_option_gives_one_line_that_names_it(options: str) -> None:
    assert BAD_OPTIONS[options] in error_line(call(*options.split()))


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_yaml_file_gives_one_line_that_names_what_is_wrong(text: str, folder: Path) -> None:
    (folder / "bad.yaml").write_bytes(text.encode(errors="surrogateescape"))
    assert BAD_FILES[text] in error_line(call("--config_path", "bad.yaml"))


@pytest.mark.parametrize("problem", BAD_DATA)
def test_a_bad_dataset_gives_one_line_that_names_the_file(problem: str, folder: Path) -> None:
    write_dataset(folder / "data.hdf5", **BAD_DATA[problem])
    line = error_line(call(*SMALL))
    assert problem in line and "data.hdf5" in line


def test_a_truncated_dataset_gives_one_line_that_names_the_file(folder: Path) -> None:
    os.truncate("data.hdf5", 5000)
    assert "data.hdf5" in error_line(call(*SMALL))


def test_a_task_that_does_not_exist_is_named_with_those_alike() -> None:
    line = error_line(call("--env", "antmaze-umase-v2", "--device", "cpu"))
    assert "antmaze-umase-v2" in line and "antmaze-umaze-v2" in line


def test_a_buffer_smaller_than_the_dataset_is_refused(folder: Path) -> None:
    line = error_line(call(*SMALL, "--buffer_size", 389))
    assert "buffer_size" in line and "390" in line
    assert call(*SMALL, "--buffer_size", 390, "--online_iterations", 0).returncode == 0


def test_tf32_on_a_cpu_is_refused(folder: Path) -> None:
    assert "precision: found tf32" in error_line(call(*SMALL, "--precision", "tf32"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_cuda_where_there_is_none_is_refused(device: str, folder: Path) -> None:
    line = error_line(call(*SMALL, "--device", device))
    assert "device" in line and "--device cpu" in line


def test_a_device_of_no_kind_is_refused(folder: Path) -> None:
    assert "device" in error_line(call(*SMALL, "--device", "gpu"))


def test_an_unreadable_checkpoint_is_refused(folder: Path) -> None:
    (folder / "model.pt").write_bytes(b"no checkpoint")
    for name in ("model.pt", "nowhere.pt", "."):
        assert name in error_line(call(*SMALL, "--load_model", name))
    torch.save({"weights": torch.zeros(3)}, "other.pt")
    assert "other.pt" in error_line(call(*SMALL, "--load_model", "other.pt"))


@pytest.mark.parametrize("name", "hidden_dim batch_size cql_n_actions q_n_hidden_layers".split())
def test_sizes_that_do_not_fit_memory_are_refused(name: str, folder: Path) -> None:
    line = error_line(call(*SMALL, f"--{name}", 10**9))
    assert f"{name} {10**9}" in line and "GB" in line


def test_the_source_is_read_once_for_the_help(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = inspect.getsource, []
    monkeypatch.setattr(inspect, "getsource", lambda cls: calls.append(cls) or real(cls))
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit):
        cal_ql.parse_config(["--help"])
    assert calls == [cal_ql.Config]


def test_a_dataset_directory_that_is_a_file_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D4RL_DATASET_DIR", "data.hdf5")
    line = error_line(call(*SMALL, "--dataset_path", "null"))
    assert "data.hdf5/maze2d-umaze-sparse-v1.hdf5" in line


def test_bad_input_at_the_real_command_line(tmp_path: Path) -> None:
    assert "--batchsize" in error_line(run("--batchsize", 3))
    (tmp_path / "bad.yaml").write_text("qf_lr: fast")
    assert "qf_lr" in error_line(run("--config_path", tmp_path / "bad.yaml"))


# ---------------------------------------------------------------------------- downloads


@contextlib.contextmanager
def server(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Address of a server on this machine that answers each GET by `answer`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}/maze2d/maze2d-umaze-sparse-v1.hdf5"
        finally:
            httpd.shutdown()
            thread.join()


@pytest.fixture
def fetch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Runs without a dataset_path, the task's file being at the address given."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(folder / "cache" / "d4rl"))
    make = tasks.Task.__init__

    def run_from(url: str) -> subprocess.CompletedProcess:
        def make_with_url(task: tasks.Task, name: str) -> None:
            make(task, name)
            task.env.unwrapped.dataset_url = task.env.dataset_url and url

        monkeypatch.setattr(tasks.Task, "__init__", make_with_url)
        options = ["--dataset_path", "null", "--online_iterations", 0]
        return call(*SMALL, *options)

    return run_from


def cached() -> list[str]:
    return [path.name for path in Path("cache/d4rl").glob("*")]


def test_a_download_lands_under_its_name_and_is_not_repeated(folder: Path, fetch: Callable) -> None:
    requests = []

    def whole(request: http.server.BaseHTTPRequestHandler) -> None:
        requests.append(request.path)
        data = (folder / "data.hdf5").read_bytes()
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    with server(whole) as url:
        assert fetch(url).returncode == 0
        assert fetch(url).returncode == 0
    assert requests == ["/maze2d/maze2d-umaze-sparse-v1.hdf5"]
    assert cached() == ["maze2d-umaze-sparse-v1.hdf5"]


def cut(request: http.server.BaseHTTPRequestHandler) -> None:
    data = Path("data.hdf5").read_bytes()
    request.send_response(200)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data[: len(data) // 2])


def cut_chunk(request: http.server.BaseHTTPRequestHandler) -> None:
    request.protocol_version = "HTTP/1.1"
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    request.wfile.write(b"1000\r\n" + Path("data.hdf5").read_bytes()[:100])


def no_http(request: http.server.BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"SSH-2.0\r\n")


def absent(request: http.server.BaseHTTPRequestHandler) -> None:
    request.send_error(404)


@pytest.mark.parametrize("answer", [cut, cut_chunk, no_http, absent])
def test_a_failed_download_leaves_no_file_and_gives_one_line(
    answer: Callable, folder: Path, fetch: Callable
) -> None:
    with server(answer) as url:
        assert url in error_line(fetch(url))
    assert cached() == []


def test_a_refused_connection_says_what_to_fetch_and_how_to_do_without(fetch: Callable) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/maze2d/maze2d-umaze-sparse-v1.hdf5"
        line = error_line(fetch(url))
    for part in (url, "cache/d4rl/maze2d-umaze-sparse-v1.hdf5", "tools/make_dataset.py"):
        assert part in line


# ---------------------------------------------------------------------------- runs

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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory of a finished run, made by the real command line."""
    folder = tmp_path_factory.mktemp("finished")
    write_dataset(folder / "data.hdf5")
    result = run(*SMALL, "--checkpoints_path", ".", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_logged_names_are_those_that_the_field_plots(finished: Path) -> None:
    records = kill_test.records(finished)
    offline = [record for record in records if "offline_iter" in record]
    online = [record for record in records if "online_iter" in record]
    for part in (offline, online):
        assert UPDATE_METRICS <= set().union(*part)
        assert set().union(*part) >= EVAL_METRICS
    # each episode is logged at the step at which it was played, before its updates
    episodes = [record for record in records if "train/episode_return" in record]
    assert [record["step"] for record in episodes] == [20, 320]
    assert all(EPISODE_METRICS <= set(record) for record in episodes)
    assert [record["train/episode_length"] for record in episodes] == [300, 300]
    assert all(np.isfinite(list(record.values())).all() for record in records)


def test_steps_count_on_from_phase_to_phase(finished: Path) -> None:
    records = kill_test.records(finished)
    assert [r["step"] for r in records if "qf1_loss" in r] == list(range(10, 331, 10))
    assert [r["step"] for r in records if EVAL_METRICS & set(r)] == [0, 20, 100, 200, 300, 330]
    for record in records:
        assert record["step"] == record.get("offline_iter", 20 + record.get("online_iter", 0))
        assert ("offline_iter" in record) == (record["step"] <= 20)


def test_the_same_command_gives_the_same_numbers_bit_for_bit(finished: Path, folder: Path) -> None:
    assert call(*SMALL, "--checkpoints_path", ".").returncode == 0
    assert kill_test.differences(finished, folder) == []


def test_another_seed_gives_other_numbers(finished: Path, folder: Path) -> None:
    assert call(*SMALL, "--checkpoints_path", ".", "--seed", 1).returncode == 0
    different = kill_test.differences(finished, folder)
    assert {"record 1 qf1_loss", "record 2 policy_loss", "transitions"} <= set(different)


def test_the_runs_directory_holds_the_resolved_config(finished: Path) -> None:
    path = only_run(finished) / "config.yaml"
    assert parse("--config_path", path) == parse(*SMALL, "--checkpoints_path", ".")


def test_a_run_without_checkpoints_path_writes_nothing(folder: Path) -> None:
    assert call(*SMALL, "--online_iterations", 0).returncode == 0
    assert os.listdir() == ["data.hdf5"]


def test_load_model_starts_from_the_checkpoints_weights(finished: Path, folder: Path) -> None:
    one_step = ["--offline_iterations", 0, "--online_iterations", 1, "--policy_lr", 1e-30]
    one_step += ["--qf_lr", 1e-30, "--soft_target_update_rate", 0]  # which changes nothing
    options = ["--load_model", newest(finished), "--checkpoints_path", "."]
    assert call(*SMALL, *one_step, *options).returncode == 0
    loaded, saved = (torch.load(newest(path), weights_only=True) for path in (folder, finished))
    assert (loaded["step"], saved["step"]) == (1, 330)
    assert kill_test.flatten(loaded["agent"], "") == kill_test.flatten(saved["agent"], "")


def test_a_checkpoint_of_another_architecture_is_refused(finished: Path, folder: Path) -> None:
    for other in ("hidden_dim", "q_n_hidden_layers", "actor_n_hidden_layers"):
        line = error_line(call(*SMALL, "--load_model", newest(finished), f"--{other}", 9))
        assert str(newest(finished)) in line and other in line


def test_importing_the_script_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import cal_ql"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "WANDB_MODE": "offline"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == []
