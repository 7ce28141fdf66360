"""The command line: options, configs, bad input, downloads."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import inspect
import io
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import cal_ql
import tasks
from helpers import (
    ROOT,
    SMALL,
    call,
    error_line,
    finish,
    only_run,
    parse,
    start_run,
    write_dataset,
)
from tasks.d4rl import D4RL


@pytest.fixture
def folder(folder: Path) -> Path:
    """The working directory, with a small dataset of maze2d-umaze-v1 in data.hdf5."""
    write_dataset(folder / "data.hdf5")
    return folder


# ---------------------------------------------------------------------------- options

DEFAULTS = yaml.safe_load("""{
    device: cuda, precision: null, compile: null, env: halfcheetah-medium-expert-v2, seed: 0,
    eval_seed: 0, eval_freq: 5000, n_episodes: 10, eval_workers: null,
    offline_iterations: 1000000, online_iterations: 1000000,
    checkpoints_path: null, checkpoint_freq: null, resume: true, load_model: "",
    buffer_size: 2000000, batch_size: 256, discount: 0.99,
    alpha_multiplier: 1.0, use_automatic_entropy_tuning: true, backup_entropy: false,
    policy_lr: 3.0e-5, qf_lr: 3.0e-4, soft_target_update_rate: 5.0e-3,
    bc_steps: 0, target_update_period: 1,
    cql_alpha: 10.0, cql_alpha_online: 10.0, cql_n_actions: 10, cql_importance_sample: true,
    cql_lagrange: false, cql_target_action_gap: -1.0, cql_temp: 1.0,
    cql_max_target_backup: false, cql_clip_diff_min: -.inf, cql_clip_diff_max: .inf,
    calibrate: true, calibrate_online: true, orthogonal_init: true,
    normalize: true, normalize_reward: false,
    q_n_hidden_layers: 2, actor_n_hidden_layers: 3, hidden_dim: 256,
    critic_layer_norm: false, reward_scale: 1.0, reward_bias: 0.0, is_sparse_reward: false,
    mixing_ratio: 0.5, online_utd_ratio: 1, dataset_path: null, n_critics: 2,
    n_target_critics: null, actor_update_period: 1, warmup_steps: 0, target_entropy: null,
    actor_layer_norm: false, bc_weight: 0.0,
    log_freq: 1000, project: CORL, group: Cal-QL-D4RL, name: Cal-QL}""")

CORL = yaml.safe_load("""{
    alpha_multiplier: 1.0, backup_entropy: false, batch_size: 256, bc_steps: 0,
    buffer_size: 10000000, checkpoints_path: null, cql_clip_diff_max: .inf,
    cql_clip_diff_min: -200, cql_importance_sample: true, cql_max_target_backup: true,
    cql_n_actions: 10, cql_target_action_gap: 0.8, cql_temp: 1.0, device: cuda, discount: 0.99,
    load_model: "", offline_iterations: 1000000, online_iterations: 1000000, mixing_ratio: 0.5,
    name: CQL, normalize: false, orthogonal_init: true, policy_lr: 1.0e-4, project: CORL,
    qf_lr: 3.0e-4, seed: 0, soft_target_update_rate: 0.005, target_update_period: 1,
    use_automatic_entropy_tuning: true}""")
CORL_ANTMAZE = yaml.safe_load("""{
    cql_alpha: 5.0, cql_alpha_online: 5.0, cql_lagrange: true, eval_freq: 50000, n_episodes: 100,
    normalize_reward: true, q_n_hidden_layers: 5, reward_scale: 10.0, reward_bias: -5.0,
    is_sparse_reward: true}""")
CORL_ADROIT = yaml.safe_load("""{
    cql_alpha: 1.0, cql_alpha_online: 1.0, cql_lagrange: false, eval_freq: 5000, n_episodes: 10,
    normalize_reward: false, q_n_hidden_layers: 3}""")
MAZES = "umaze umaze-diverse medium-play medium-diverse large-play large-diverse".split()
CORL_FILES = {
    **{f"antmaze-{maze}-v2": CORL | CORL_ANTMAZE for maze in MAZES},
    **{f"{task}-cloned-v1": CORL | CORL_ADROIT for task in "pen door hammer relocate".split()},
}

# what the two papers' settings have in common beyond those of CORL's files
NOT_PUBLISHED = {"buffer_size", "name", "project", "device", "normalize_reward"}
PUBLISHED = {
    "antmaze": {**CORL, **CORL_ANTMAZE, "actor_n_hidden_layers": 3, "hidden_dim": 256},
    "antmaze_authors": {
        **{**CORL, **CORL_ANTMAZE, "actor_n_hidden_layers": 2, "q_n_hidden_layers": 4},
        **{"cql_clip_diff_min": -math.inf, "n_episodes": 20, "hidden_dim": 256},
    },
    "adroit": {**CORL, **CORL_ADROIT, "cql_target_action_gap": -1.0, "reward_bias": 0.0},
    "kitchen": CORL
    | yaml.safe_load("""{
        cql_alpha: 5, cql_alpha_online: 5, cql_importance_sample: false, cql_lagrange: false,
        q_n_hidden_layers: 3, actor_n_hidden_layers: 3, hidden_dim: 512, reward_scale: 1,
        reward_bias: -4, offline_iterations: 250000, online_iterations: 500000,
        eval_freq: 10000, n_episodes: 20,
        cql_clip_diff_min: -.inf, cql_target_action_gap: -1.0}"""),
    "locomotion": CORL
    | yaml.safe_load("""{
        cql_alpha: 5, cql_alpha_online: 5, cql_lagrange: false,
        q_n_hidden_layers: 2, actor_n_hidden_layers: 2, hidden_dim: 256, reward_scale: 1,
        reward_bias: 0, offline_iterations: 250000, online_iterations: 500000,
        eval_freq: 20000, n_episodes: 20,
        cql_clip_diff_min: -.inf, cql_target_action_gap: -1.0}"""),
}


def test_help_describes_every_option_and_gives_its_default() -> None:
    assert dataclasses.asdict(parse()) == DEFAULTS
    result = call("--checkpoints_path", "/data/runs", "--help")  # as in the container
    assert (result.returncode, result.stderr) == (0, "")
    entries = re.split(r"\n\s*--", result.stdout)
    texts = {entry.split()[0]: " ".join(entry.split()) for entry in entries[1:]}
    for name, default in DEFAULTS.items():
        assert f"(default: {default})" in texts[name], name
        description = texts[name].partition("(default:")[0].split()
        assert len(description) >= 3, name


def test_the_source_is_read_once_for_the_help(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = inspect.getsource, []
    monkeypatch.setattr(inspect, "getsource", lambda cls: calls.append(cls) or real(cls))
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit):
        cal_ql.parse_config(["--help"])
    assert calls == [cal_ql.Config]


@pytest.mark.parametrize("env", CORL_FILES)
def test_corls_files_load_unchanged(env: str, tmp_path: Path) -> None:
    options = {**CORL_FILES[env], "env": env, "group": f"{env}-multiseed-v0"}
    path = tmp_path / "corl.yaml"
    path.write_text(yaml.dump(options))
    assert dataclasses.asdict(parse("--config_path", path)) == {**DEFAULTS, **options}


@pytest.mark.parametrize("name", PUBLISHED)
def test_our_files_hold_the_published_hyper_parameters(name: str) -> None:
    config = dataclasses.asdict(parse("--config_path", ROOT / f"configs/{name}.yaml"))
    published = {k: v for k, v in PUBLISHED[name].items() if k not in NOT_PUBLISHED}
    assert {key: config[key] for key in published} == published
    assert (config["device"], config["calibrate"], config["calibrate_online"]) == ("auto", 1, 1)


ENSEMBLE = {"n_critics": 10, "n_target_critics": 2}
ENSEMBLE |= {"critic_layer_norm": True, "actor_layer_norm": True}
WARM_START = {"warmup_steps": 5000, "online_utd_ratio": 4, "actor_update_period": 4}
METHODS = {
    "cql": {"name": "CQL", "calibrate": False},
    "wsrl": {**ENSEMBLE, **WARM_START, "cql_alpha_online": 0.0, "mixing_ratio": 0.0}
    | {"name": "WSRL"},
    "rlpd": {**ENSEMBLE, **WARM_START, "cql_alpha_online": 0.0, "mixing_ratio": 0.5}
    | {"name": "RLPD", "offline_iterations": 0, "cql_alpha": 0.0},
}


@pytest.mark.parametrize("task", [path.stem for path in (ROOT / "configs").glob("*.yaml")])
def test_a_methods_file_goes_over_every_tasks_config(task: str) -> None:
    files = {path.stem: path for path in (ROOT / "configs" / "methods").glob("*.yaml")}
    assert set(files) == set(METHODS)
    options = "--config_path", ROOT / "configs" / f"{task}.yaml", "--config_path"
    of_the_task = dataclasses.asdict(parse(*options[:2]))
    for method, path in files.items():
        assert set(yaml.safe_load(path.read_text())) == set(METHODS[method])
        assert dataclasses.asdict(parse(*options, path)) == of_the_task | METHODS[method]


def test_the_commands_that_explain_the_methods_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    pages = [Path("docs/methods.md"), *Path("configs/methods").iterdir()]
    text = "\n".join(page.read_text() for page in pages).replace("\\\n", " ")
    commands = re.findall(r"python cal_ql\.py (--config_path .*)", text)
    assert len(commands) == 8
    for command in commands:
        parse(*shlex.split(command, comments=True))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_names_a_real_task(path: Path) -> None:
    tasks.make(parse("--config_path", path).env)


def test_the_command_line_goes_over_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 3\neval_seed: 4\n")
    options = ["--eval_seed", 5, "--checkpoints_path", "null", "--cql_clip_diff_min", "-.inf"]
    config = parse("--config_path", path, *options)
    assert (config.seed, config.eval_seed, config.discount) == (3, 5, 0.99)
    assert config.checkpoints_path is None and config.cql_clip_diff_min == -math.inf


def test_a_later_config_file_goes_over_an_earlier_one(folder: Path) -> None:
    """On the real command line; the run stores the combined options."""
    (folder / "task.yaml").write_text("batch_size: 12\ncql_alpha: 7.0\n")
    (folder / "method.yaml").write_text("cql_alpha: 3.0\ncalibrate: false\nqf_lr: 1e-3\n")
    files = [*SMALL, "--config_path", "task.yaml", "--config_path", "method.yaml"]
    files = [word for word in files if word not in ("--batch_size", "16")]
    options = [*files, "--qf_lr", 2e-3, "--online_iterations", 0, "--checkpoints_path", "runs"]
    result = finish(start_run(folder, *options))
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load((only_run(folder / "runs") / "config.yaml").read_text())
    found = [config[name] for name in ("batch_size", "cql_alpha", "calibrate", "qf_lr")]
    assert found == [12, 3.0, False, 2e-3]
    (folder / "method.yaml").write_text("cql_alfa: 3.0\n")
    line = error_line(finish(start_run(folder, *files)))
    assert "cql_alfa: there is no such option; close matches: cql_alpha" in line
    assert "(in 'method.yaml')" in line


# ---------------------------------------------------------------------------- bad input

BAD_OPTIONS = {
    "--seed one": "seed",
    "--seed 1.5": "seed",
    "--normalize 2": "normalize",
    "--discount nan": "discount",
    "--discount 1.01": "discount",
    "--precision float16": "precision",
    "--precision tf32": "precision: found tf32, expected float32 on cpu",
    "--precision fp16": "precision: found 'fp16', expected float32, tf32, bf16 or null",
    "--compile maybe": "compile",
    "--eval_workers 0": "eval_workers",
    "--mixing_ratio -0.1": "mixing_ratio",
    "--mixing_ratio 1": "mixing_ratio",
    "--online_iterations -1": "online_iterations",
    "--batch_size 0": "batch_size",
    "--checkpoint_freq 0": "checkpoint_freq",
    "--policy_lr 0": "policy_lr",
    "--cql_clip_diff_max -300 --cql_clip_diff_min -200": "cql_clip_diff_max",
    "--is_sparse_reward true --discount 1": "discount",
    "--n_target_critics 0": "n_target_critics: found",
    "--n_critics 4 --n_target_critics 5": "n_target_critics: found",
    "--actor_update_period 0": "actor_update_period: found",
    "--warmup_steps -1": "warmup_steps: found",
    "--target_entropy .inf": "target_entropy: found",
    "--bc_weight -1": "bc_weight: found",
    "--config_path nowhere.yaml": "nowhere.yaml",
    "--config_path .": "config_path",
    "--config_path=": "config_path",
    "--checkpoints_path=": "checkpoints_path",
    "--checkpoints_path /proc/runs": "/proc/runs",
    f"--checkpoints_path {'x' * 5000}": "checkpoints_path: cannot write there",
    f"--load_model {'x' * 5000}": "load_model: there is no checkpoint",
    f"--config_path {'x' * 5000}": "config_path: ",
    "--load_model /dev/zero": "load_model: /dev/zero is not a valid checkpoint",
    "--seed 0x10": "seed: found '0x10', expected a whole number",
    "--normalize yes": "normalize: found 'yes', expected true or false",
    "--checkpoints_path data.hdf5/runs": "data.hdf5/runs",
    "--dataset_path nowhere.hdf5": "dataset_path: there is no file nowhere.hdf5",
    "--dataset_path text": "dataset text: not a valid HDF5 file",
    "--env antmaze-umase-v2": "close matches: antmaze-umaze-v2",
    "--name ../../x": "name",
    "--device mps": "device",
    "--device cuda:01": "device",
    "--device xpu": "device",
    "--device meta": "device",
    "--load_model text": "text is not a valid checkpoint",
    "--load_model nowhere.pt": "there is no checkpoint nowhere.pt",
    "--load_model .": ". is not a valid checkpoint",
    "--load_model other.pt": "other.pt is not a valid checkpoint (it was not written by this",
    f"--hidden_dim {10**9}": f"hidden_dim {10**9}",
    f"--batch_size {10**9}": f"batch_size {10**9}",
    f"--cql_n_actions {10**9}": f"cql_n_actions {10**9}",
    f"--q_n_hidden_layers {10**9}": f"q_n_hidden_layers {10**9}",
}
BAD_FILES = {
    "sed: 1": "sed: there is no such option; close matches: seed",
    "seed: [1]": "seed",
    "seed: null": "seed",
    "normalize: 'yes'": "normalize",
    "env: null": "env",
    "1: 2": "1: there is no such option",
    "": "it is empty",
    "seed: 1\nseed: 2": "seed is given twice",
    "name: !!binary aGk=": "name",
    f"seed: {'9' * 400}": "seed",
    f"qf_lr: {'9' * 400}": "qf_lr",
    "- seed": "config_path",
    "seed": "config_path",
    "seed: [": "config_path",
    "seed: \x00": "config_path",
    "seed: \udcff": "config_path",  # a byte that is not UTF-8
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_a_bad_option_gives_one_line_that_names_it(options: str, folder: Path) -> None:
    (folder / "text").write_text("<html>404</html>")
    torch.save({"weights": torch.zeros(3)}, "other.pt")
    before = set(os.listdir())
    line = error_line(call(*SMALL, *options.split()))
    assert BAD_OPTIONS[options] in line and len(line) < 1000
    assert set(os.listdir()) == before


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_yaml_file_gives_one_line_that_names_what_is_wrong(text: str, folder: Path) -> None:
    (folder / "bad.yaml").write_bytes(text.encode(errors="surrogateescape"))
    assert BAD_FILES[text] in error_line(call("--config_path", "bad.yaml"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_cuda_where_there_is_none_is_refused(device: str, folder: Path) -> None:
    line = error_line(call(*SMALL, "--device", device))
    assert "device" in line and "--device cpu" in line


def test_a_dataset_directory_that_is_a_file_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D4RL_DATASET_DIR", "data.hdf5")
    line = error_line(call(*SMALL, "--dataset_path", "null"))
    assert "data.hdf5/maze2d-umaze-sparse-v1.hdf5" in line


def test_bad_input_at_the_real_command_line(tmp_path: Path) -> None:
    """For a user without a home directory, where D4RL's import makes a folder, on a full disk."""
    (tmp_path / "sitecustomize.py").write_text("import pwd; pwd.getpwuid = lambda uid: {}[uid]")
    env = {**os.environ, "HOME": "", "TMPDIR": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    with open("/dev/full", "w") as full:
        options = [*SMALL, "--dataset_path", "nowhere.hdf5"]
        result = finish(start_run(tmp_path, *options, env=env, stdout=full))
    home, error = result.stderr.splitlines()
    assert home == f"this user has no home directory; HOME is {tmp_path}/home-{os.getuid()}"
    assert error.startswith("cal_ql.py: error: dataset_path: there is no file nowhere.hdf5")
    assert not (tmp_path / "~").exists()


def test_importing_the_script_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import cal_ql"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "WANDB_MODE": "offline"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------- downloads

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextlib.contextmanager
def server(answer: Answer) -> Iterator[str]:
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
    """Runs without a dataset_path; the task's file is at the given address."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(folder / "cache" / "d4rl"))
    make = D4RL.__init__

    def run_from(url: str) -> subprocess.CompletedProcess:
        def make_with_url(task: D4RL, name: str) -> None:
            make(task, name)
            task.env.unwrapped.dataset_url = task.env.dataset_url and url

        monkeypatch.setattr(D4RL, "__init__", make_with_url)
        return call(*SMALL, "--dataset_path", "null", "--online_iterations", 0)

    return run_from


def cached() -> list[str]:
    return [path.name for path in Path("cache/d4rl").glob("*")]


def begin(request: http.server.BaseHTTPRequestHandler, name: str, value: Any) -> None:
    request.send_response(200)
    request.send_header(name, str(value))
    request.end_headers()


def test_a_download_lands_under_its_name_and_is_not_repeated(folder: Path, fetch: Callable) -> None:
    requests = []

    def whole(request: http.server.BaseHTTPRequestHandler) -> None:
        requests.append(request.path)
        data = (folder / "data.hdf5").read_bytes()
        begin(request, "Content-Length", len(data))
        request.wfile.write(data)

    with server(whole) as url:
        assert fetch(url).returncode == 0
        assert fetch(url).returncode == 0
    assert requests == ["/maze2d/maze2d-umaze-sparse-v1.hdf5"]
    assert cached() == ["maze2d-umaze-sparse-v1.hdf5"]


def cut(request: http.server.BaseHTTPRequestHandler) -> None:
    begin(request, "Content-Length", 10_000)
    request.wfile.write(bytes(5_000))


def cut_chunk(request: http.server.BaseHTTPRequestHandler) -> None:
    request.protocol_version = "HTTP/1.1"
    begin(request, "Transfer-Encoding", "chunked")
    request.wfile.write(b"1000\r\n" + bytes(100))


def no_http(request: http.server.BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"SSH-2.0\r\n")


def absent(request: http.server.BaseHTTPRequestHandler) -> None:
    request.send_error(404)


@pytest.mark.parametrize("answer", [cut, cut_chunk, no_http, absent])
def test_a_failed_download_leaves_no_file_and_gives_one_line(
    answer: Answer, folder: Path, fetch: Callable
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


def test_sigterm_ends_a_download_at_once_and_leaves_no_file(fetch: Callable) -> None:
    to_the_end = []

    def trickle(request: http.server.BaseHTTPRequestHandler) -> None:
        begin(request, "Content-Length", 10**6)
        request.wfile.write(bytes(10_000))
        os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(ConnectionError):
            for _ in range(300):
                time.sleep(0.1)
                request.wfile.write(bytes(1_000))
            to_the_end.append(True)

    with server(trickle) as url:
        assert "SIGTERM" in error_line(fetch(url), code=143, kind="stopped")
    assert not to_the_end and cached() == []
