"""evaluate.py and benchmark.py, on a run of the script itself."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import cal_ql
import tasks
from helpers import ROOT, RUN, call, call_tool, kept_signals, only_run, read_records, working_in
from runs import machine
from runs.errors import RunError
from tools import benchmark, corl, evaluate, film, kernels, roofline


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    options = [*RUN, "--online_iterations", 0, "--n_episodes", 3, "--eval_seed", 7]
    with working_in(tmp_path_factory.mktemp("runs")):
        assert call(*options, "--eval_workers", 1).returncode == 0
        return only_run(Path().absolute())


@pytest.fixture
def run_evaluate(monkeypatch):
    """`python tools/evaluate.py ARGS` within this process: exit code, output and errors."""

    def run(*args) -> tuple[int, str, str]:
        done = call_tool(evaluate, *args)
        return done.returncode, done.stdout, done.stderr

    monkeypatch.setattr(machine, "available_cores", lambda: 1)
    return run


def test_evaluate_repeats_the_score_that_the_run_recorded(finished_run, run_evaluate):
    record = read_records(finished_run.parent)[-1]
    shutil.copy(finished_run / "checkpoint_60.pt", finished_run / "checkpoint_best.pt")
    code, printed, _ = run_evaluate(finished_run, "--episodes", 3)
    assert code == 0 and "3 episodes of maze2d-umaze-v1, seed 7" in printed
    assert f"normalized score  {record['eval/d4rl_normalized_score']:.2f} (" in printed
    assert f"return            {record['eval/episode_return']:.2f} (" in printed
    assert "length            300.00 (300.00 to 300.00), deviation 0.00" in printed


@pytest.mark.parametrize(
    "options, named",
    [
        ("nowhere", "nowhere"),
        (".", "no checkpoint"),
        ("other.pt", "other.pt is not a valid checkpoint"),
    ]
    + [("run", "checkpoint_60.pt is not a valid checkpoint")]
    + [("run --episodes 0", "episodes"), ("run --seed -1", "seed")],
)
def test_evaluate_names_what_is_wrong_in_one_line(
    options, named, tmp_path, run_evaluate, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    for name in ("other.pt", "run/checkpoint_60.pt"):
        torch.save({"weights": torch.zeros(3)}, name)
    code, _, error = run_evaluate(*options.split())
    assert code == 2 and error.count("\n") == 1 and named in error


CONTENTS = {  # the keys of the changed part of a checkpoint, and its new value
    "no options": ("config", None),
    "a list for an option": ("config batch_size", [1]),
    "text for a number": ("config hidden_dim", "many"),
    "an option of other code": ("config no_such", 1),
    "no networks": ("agent", {}),
    "networks of another size": ("agent actor.trunk.0.weight", torch.zeros(3, 3)),
    "no scaling": ("scaling", 5),
    "a scaling of another size": ("scaling observation_mean", torch.zeros(7)),
}


@pytest.mark.parametrize("keys, value", CONTENTS.values(), ids=CONTENTS)
def test_a_checkpoint_with_wrong_contents_is_one_line(
    keys, value, finished_run, tmp_path, run_evaluate
):
    state = torch.load(finished_run / "checkpoint_60.pt", weights_only=True)
    *above, last = keys.split()
    part = state
    for key in above:
        part = part[key]
    part[last] = value
    torch.save(state, tmp_path / "x.pt")
    code, _, error = run_evaluate(tmp_path / "x.pt")
    assert code == 2 and error.count("\n") == 1
    assert error.startswith(f"evaluate.py: error: {tmp_path / 'x.pt'} is not a ")


def test_ctrl_c_is_one_line_and_ends_the_workers(finished_run):
    options = "--episodes", "500"
    command = [sys.executable, "-u", "tools/evaluate.py", str(finished_run), *options]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    assert "checkpoint_60.pt, on" in process.stdout.readline()
    time.sleep(0.5)  # the workers start
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=60)  # returns when the last worker has ended
    assert process.returncode == 130
    assert error == "evaluate.py: stopped: by SIGINT\n"


def test_published_policies_can_be_evaluated_and_fine_tuned(run_evaluate, monkeypatch):
    for policy in (ROOT / "results").glob("*-end.pt"):
        assert run_evaluate(policy, "--episodes", 1)[0] == 0
    monkeypatch.chdir(ROOT)
    options = ["--config_path", "configs/quickstart.yaml", "--checkpoints_path", "null"]
    options += ["--load_model", "results/quickstart-switch.pt", "--offline_iterations", 0]
    options += ["--compile", False]
    assert call(*options, "--online_iterations", 1, "--n_episodes", 1).returncode == 0


def test_evaluate_records_a_video_or_says_what_is_missing(finished_run, tmp_path):
    video = tmp_path / "episode.gif"
    program = """import sys
from tools import evaluate, film
film.MOST_FRAMES = 9  # rendering without a GPU takes long
sys.exit(evaluate.run_program(evaluate.main, "evaluate.py"))"""
    command = [sys.executable, "-c", program, finished_run, "--episodes", "1"]
    env = {**os.environ, "MUJOCO_GL": "egl"}  # read when mujoco is imported
    result = subprocess.run([*command, "--video", video], cwd=ROOT, env=env, capture_output=True)
    if result.returncode:
        assert result.returncode == 2
        assert result.stderr.count(b"\n") == 1 and b"OpenGL" in result.stderr
    else:
        assert video.read_bytes().startswith(b"GIF8")


@pytest.mark.parametrize("library", ["osmesa", "glfw"])
def test_other_libraries_render_or_say_what_is_missing(library):
    program = """from tasks import d4rl_compat  # which imports mujoco
import mujoco, runs.errors, tools.film
model = mujoco.MjModel.from_xml_string("<mujoco/>")
runs.errors.run_program(lambda: print(tools.film.make_renderer(model).render().shape), "film")"""
    env = {**os.environ, "MUJOCO_GL": library}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if result.stdout != "(360, 480, 3)\n":
        assert "OpenGL" in result.stderr and result.stderr.count("\n") == 1


class Still:
    """A stand-in for a renderer, which needs OpenGL."""

    def update_scene(self, data, camera):
        self.scene = None

    def render(self):
        return np.full((*film.SIZE, 3), 200, np.uint8)


@pytest.fixture
def still(monkeypatch):
    monkeypatch.setattr(film, "make_renderer", lambda model: Still())
    monkeypatch.setattr(film, "MOST_FRAMES", 30)


def test_a_film_ends_with_its_episode_and_shows_no_other(still, tmp_path):
    task = tasks.make("maze2d-umaze-v1")
    filmed = film.Filmed(task, tmp_path / "x.gif")
    for _ in range(2):
        filmed.reset(0)
        step = filmed.step(np.zeros(2, np.float32))
        while not (step.terminal or step.truncated):
            step = filmed.step(np.zeros(2, np.float32))
    assert len(filmed.frames) == task.max_episode_steps / filmed.steps_per_frame
    filmed.save()
    assert (tmp_path / "x.gif").read_bytes().startswith(b"GIF8")
    filmed.path = tmp_path / "full.gif"
    filmed.path.symlink_to("/dev/full")
    with pytest.raises(RunError, match="cannot write .*full.gif .No space left"):
        filmed.save()


def test_a_video_that_cannot_be_written_is_refused_at_once(
    still, finished_run, tmp_path, run_evaluate
):
    os.mkfifo(tmp_path / "x.gif")
    for path, problem in (
        (tmp_path / "no" / "x.gif", "No such file"),
        (tmp_path / "x.gif", "regular file"),
        (5_000 * "x" + ".gif", "File name too long"),
        (tmp_path / "x.png", "expected a .gif or .mp4 file"),
    ):
        code, _, error = run_evaluate(finished_run, "--video", path)
        assert code == 2 and error.count("\n") == 1 and problem in error


def test_intervals():
    found = evaluate.mean_interval([1.0, 2.0, 3.0])  # t = 4.303, 2 degrees of freedom
    assert found == "2.00 (-0.48 to 4.48), deviation 0.82 over episodes"
    assert evaluate.rate_interval(5, 10) == "0.500 (0.237 to 0.763)"  # Wilson (1927)


SIZES = dict(batch_size=8, hidden_dim=24, cql_n_actions=3, actor_n_hidden_layers=2, compile=False)
SAC = dict(cql_alpha_online=0.0, n_critics=10, critic_layer_norm=True, actor_layer_norm=True)


def make_update(**options) -> tuple[cal_ql.Agent, cal_ql.Batch]:
    """An agent of small networks, and a batch for it."""
    agent = cal_ql.Agent(5, 2, cal_ql.Config(**SIZES | options), torch.device("cpu"))
    column, wide = torch.zeros(8), torch.zeros(8, 5)
    return agent, cal_ql.Batch(wide, torch.zeros(8, 2), column, wide, column, column)


@pytest.mark.parametrize(
    ("options", "online"),
    [
        ({}, False),
        (dict(cql_max_target_backup=True), False),
        (dict(bc_steps=1), False),
        (dict(bc_weight=1.0, n_critics=4, n_target_critics=3), False),
        (SAC, True),
        (SAC | dict(n_target_critics=2, cql_max_target_backup=True, bc_weight=1.0), True),
        # the first of each period of updates, and its last
        (SAC | dict(actor_update_period=4, offline_iterations=0), True),
        (SAC | dict(actor_update_period=4, offline_iterations=-3), True),
        (dict(actor_update_period=4, offline_iterations=0), True),
    ],
)
def test_benchmark_counts_the_operations_that_torch_counts(options, online):
    agent, batch = make_update(q_n_hidden_layers=4, **options)
    kind = agent.kind(online)
    with FlopCounterMode(display=False) as counter:
        agent.update(batch, online)
    assert roofline.flops(agent.config, kind, 5, 2) == counter.get_total_flops()


def test_benchmark_counts_kernels_and_not_views():
    x = torch.ones(4, 4)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        torch.relu(x.mT[:2].reshape(4, 2) @ x[:2])  # a copy, a product and a ReLU
        torch._foreach_add_([x, x], 1.0)
    tops = [event for event in profiled.events() if event.cpu_parent is None]
    assert sum(map(kernels.count_kernels, tops)) == 4


def test_benchmark_counts_the_bytes_of_products_and_optimizers():
    x, weight, bias = torch.zeros(2, 6, 4), torch.zeros(2, 4, 3), torch.zeros(2, 1, 3)
    with roofline.ProductBytes() as counted:
        torch.baddbmm(bias, x, weight).relu_()
    assert counted.total == 4 * (bias.numel() + x.numel() + weight.numel() + 2 * 6 * 3)

    agent, batch = make_update(actor_update_period=2, offline_iterations=0)
    kinds = [agent.kind(online=False), agent.kind(online=False)._replace(cql_alpha=0.0)]
    kinds.append(kinds[1]._replace(trains_actor=False))
    critics = sum(parameter.numel() for parameter in agent.critic.parameters())
    found = []
    for kind in kinds:
        rows = 8 * (10 if kind.cql_alpha else 1)
        hidden = 2 * rows * 24  # values of a hidden layer of both critics, read and written thrice
        found.append(roofline.bytes_moved(agent, batch, kind))
        assert found[-1] > 4 * (10 * critics + 6 * hidden)
        assert found[-1] < 4 * (30 * critics + 40 * hidden)
    actor = sum(parameter.numel() for parameter in agent.actor.parameters())
    assert found[0] > found[1] > found[2] + 4 * 7 * actor


def test_benchmark_reads_a_trace_of_a_gpu():
    events = [{"cat": "kernel", "name": f"bmm {i}", "dur": 250.0} for i in range(6)]
    events += [{"cat": "gpu_memcpy", "name": "Memcpy DtoD", "dur": 500.0}] * 2
    events += [{"cat": "cuda_runtime", "name": "cudaGraphLaunch", "dur": 9.0}] * 2
    events += [{"cat": "cuda_runtime", "name": "cudaEventRecord", "dur": 9.0}]
    events += [{"cat": "gpu_user_annotation", "name": "Optimizer.step", "dur": 99.0}]
    events += [{"name": "process_name", "ph": "M"}]
    assert kernels.summarize(events, 2) == (3.0, 1.0, 1.0, pytest.approx(1.25e-3))


CORLS = """
import wandb, pyrallis, d4rl, gym
class FullyConnectedQFunction: pass
TanhGaussianPolicy = FullyConnectedQFunction
"""


def test_benchmark_refuses_what_is_not_corls_script(tmp_path):
    (tmp_path / "cal_ql.py").write_text(CORLS)
    for path in (tmp_path / "cal_ql.py", tmp_path / "none.py"):
        done = call_tool(benchmark, "--against", path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"against: {path} is not CORL's cal_ql.py" in done.stderr
    done = call_tool(benchmark, "--parts", "update,all")
    assert "parts: found 'all', expected some of memory,update" in done.stderr
    (tmp_path / "cal_ql.py").write_text(CORLS + "CalQL = FullyConnectedQFunction")
    assert corl.load_module(tmp_path / "cal_ql.py")


def test_benchmark_reports_a_run(tmp_path, monkeypatch):
    real = benchmark.seconds
    monkeypatch.setattr(machine, "available_cores", lambda: 1)
    # as on a slow machine, so that it makes few calls
    monkeypatch.setattr(benchmark, "seconds", lambda work, *args: 100 * real(work, *args))
    compiler = functools.partial(torch.compile, backend="aot_eager")  # in seconds
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compiler(f, **options))
    options = [*RUN, "--online_iterations", 1000, "--checkpoints_path", tmp_path]
    config = cal_ql.parse_config(list(map(str, options)))
    shown = []
    with kept_signals():
        subject = benchmark.make_subject(config, 1, 0, against=None)
        found = benchmark.benchmark(subject, benchmark.PARTS, shown.append)
    assert {name: value for part in shown for name, value in part.items()} == found
    assert len(shown) == 1 + len(benchmark.PARTS)
    assert found["offline transitions"] == 98_913
    # float32: an observation of 4, an action of 2, three numbers; online also a next observation
    assert found["bytes per online transition"] == 4 * (4 + 2 + 3 + 4)
    assert found["bytes per offline transition"] == pytest.approx(4 * (4 + 2 + 3) + 8, rel=0.02)
    assert all(value > 0 for value in found.values() if not isinstance(value, str))
    assert sum(found[name] for name in found if name.startswith("share of the")) == pytest.approx(1)
