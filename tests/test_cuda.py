"""Tests of a GPU: updates equal a CPU's and never wait for it, runs resume and change devices.

They are skipped without a GPU. `CUDA_TESTS_ON=cpu` runs them on a CPU, to test this file itself.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import yaml
from torch import Tensor

import cal_ql
import tasks
from cal_ql import Agent, Batch, Config, Noise, Run
from helpers import (
    RUN,
    SMALL,
    call,
    error_line,
    flatten,
    kept_signals,
    newest,
    parse,
    resumed_like_left_alone,
    stopped_at,
    working_in,
    write_dataset,
)
from runs import machine
from runs.signals import StopSignals
from runs.workers import Workers

DEVICE = torch.device(os.environ.get("CUDA_TESTS_ON", "cuda"))
CPU = torch.device("cpu")
ON_CUDA = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(
    ON_CUDA and not torch.cuda.is_available(), reason="there is no CUDA device"
)

S, A, B = 29, 8, 64
SHORT = ["--offline_iterations", 40, "--online_iterations", 0, "--eval_freq", 1000]
# updates like WSRL's: no regularizer online, many critics, an actor that skips updates
OTHER = """--n_critics 10 --n_target_critics 2 --critic_layer_norm true --actor_layer_norm true
    --cql_alpha_online 0 --actor_update_period 2 --bc_weight 0.5""".split()
# learning rates that change no weight
STILL = ["--policy_lr", 1e-30, "--qf_lr", 1e-30, "--soft_target_update_rate", 0]


def set_precision(precision: str) -> None:
    machine.resolve_device(str(DEVICE), precision if ON_CUDA else None)


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference to `expected`, relative to the norm of `expected`."""
    expected = expected.detach().cpu()
    return float((found.detach().cpu() - expected).norm() / expected.norm())


def move_weights(agent: Agent) -> None:
    """Move weights away from 0, where no relative difference would be small."""
    generator = torch.Generator().manual_seed(1)
    for parameter in agent.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(DEVICE)


# ------------------------------------------------------------------------- the same as on a CPU


def make_agent(device: torch.device, **options: Any) -> Agent:
    torch.manual_seed(0)
    sizes = dict(batch_size=B, cql_n_actions=4, hidden_dim=64, q_n_hidden_layers=3)
    rates = dict(policy_lr=3e-4, qf_lr=3e-4, cql_alpha=5.0, compile=False)
    agent = Agent(S, A, Config(**sizes, **rates, **options), CPU)
    generator = torch.Generator().manual_seed(1)
    for parameter in agent.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    moved = Agent(S, A, agent.config, device)
    moved.load_state_dict(agent.state_dict())
    return moved


def make_batch(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    terminals = (torch.arange(B) % 16 == 0).float()
    return Batch(normal(B, S), normal(B, A).tanh(), normal(B), normal(B, S), terminals, normal(B))


def make_noise(agent: Agent, number: int, online: bool) -> Noise:
    torch.manual_seed(number)
    device, agent.device = agent.device, CPU
    noise = agent.draw_noise(agent.kind(online))
    agent.device = device
    return noise


def updates(agent: Agent, count: int, online: bool) -> list[dict[str, Tensor]]:
    """The gradients of `count` updates, then the parameters after them, by their names."""
    results = []
    for number in range(count):
        batch = Batch(*(column.to(agent.device) for column in make_batch(number)))
        noise = Noise(*(draw.to(agent.device) for draw in make_noise(agent, number, online)))
        agent.draw_noise = lambda kind, noise=noise: noise
        gradients, _ = agent.compute_gradients(batch, agent.kind(online))
        results.append({k: v.clone() for k, v in flatten_gradients(gradients).items()})
        agent.update(batch, online)
        del agent.draw_noise
    return [*results, dict(agent.named_parameters())]


def flatten_gradients(gradients: cal_ql.Gradients) -> dict[str, Tensor]:
    return {
        f"gradient {number} of {name}": gradient
        for name, values in gradients.items()
        for number, gradient in enumerate(values)
    }


# Rounding may change which critic is the minimum, or switch a ReLU off. One switch changes a
# gradient of these small batches by up to 4 %; on a CPU, weights that differ by 1e-6 do the same.
GRADIENT_FACTOR = 50  # on the tolerance


precisions = pytest.mark.parametrize("precision, tolerance", [("float32", 1e-3), ("tf32", 1e-2)])


@pytest.mark.parametrize("lagrange", [False, True])
@pytest.mark.parametrize("importance", [False, True])
@precisions
def test_five_updates_equal_those_on_a_cpu(precision, tolerance, importance, lagrange):
    options = dict(cql_importance_sample=importance, cql_lagrange=lagrange)
    options |= dict(cql_max_target_backup=True, backup_entropy=True)
    compare_with_a_cpu(precision, tolerance, options, online=False)


@precisions
def test_five_updates_of_other_methods_equal_those_on_a_cpu(precision, tolerance):
    names = [word.removeprefix("--") for word in OTHER[::2]]
    options = dict(zip(names, map(yaml.safe_load, OTHER[1::2])))
    compare_with_a_cpu(precision, tolerance, options, online=True)


def compare_with_a_cpu(precision: str, tolerance: float, options: dict, online: bool) -> None:
    set_precision(precision)
    pairs = zip(*(updates(make_agent(device, **options), 5, online) for device in (DEVICE, CPU)))
    far = {
        (number, name): difference
        for number, (found, expected) in enumerate(pairs)
        for name, value in expected.items()
        if not (difference := relative(found[name], value))
        <= tolerance * (GRADIENT_FACTOR if name.startswith("gradient") else 1)
    }
    assert far == {}


# ------------------------------------------------------------------- no waiting, and one graph


@contextlib.contextmanager
def waiting_raises() -> Iterator[None]:
    """Within, anything that makes the CPU wait for the GPU raises RuntimeError."""
    if not ON_CUDA:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_run(*options: Any) -> Run:
    """A run on random data, with an online episode."""
    config = parse(*SMALL, "--cql_lagrange", True, "--device", DEVICE, *options)
    run = cal_ql.make_run(config, tasks.make(config.env, config.dataset_path), None)
    move_weights(run.agent)
    with kept_signals():
        run.play(StopSignals())
    run.progress.warmup_end = 0  # an episode before the online phase counts as a warm-up
    return run


def train_steps(run: Run, numbers: range, online: bool) -> None:
    for number in numbers:
        torch.manual_seed(number)
        cal_ql.train_step(run, online)


@pytest.mark.skipif(not ON_CUDA, reason="a CPU has nothing to wait for")
def test_waiting_raises():
    with waiting_raises(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.zeros(1, device=DEVICE).item()


@pytest.mark.parametrize(
    "options, phases",
    [([], (False, True)), (OTHER, (True,))],
    ids=["both phases", "other methods' online phase"],
)
def test_compiled_and_eager_updates_are_equal_and_neither_waits(options, phases, folder):
    write_dataset(Path("data.hdf5"))
    options = [*options, "--precision", "float32"]
    eager = make_run(*options, "--compile", False)
    compiled = make_run(*options, "--compile", True)
    for online in phases:
        for run in (eager, compiled):
            train_steps(run, range(6), online)  # each graph is compiled, captured and replayed
            with waiting_raises():
                train_steps(run, range(6, 10), online)
    assert eager.agent.updates == compiled.agent.updates == 10 * len(phases)
    assert compiled.agent.graph.compiled  # compiling has not failed
    if ON_CUDA:
        assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    expected = eager.metrics.means()
    assert compiled.metrics.means() == pytest.approx(expected, rel=1e-3, abs=1e-3)
    found = dict(compiled.agent.named_parameters())
    for name, parameter in eager.agent.named_parameters():
        assert relative(found[name], parameter) < 1e-4, name


# ------------------------------------------------------------------------------------ whole runs


def test_a_resumed_run_ends_like_an_uninterrupted_one(folder):
    """Bit for bit on one GPU: no kernel of an eager update sums in a random order."""
    options = [*RUN, "--device", DEVICE]
    assert resumed_like_left_alone(folder, options, options, Agent, "update", 90) == []


def test_a_run_resumes_on_the_other_device(folder):
    options = [*RUN, *SHORT, "--checkpoint_freq", 10]
    stopped_at(Agent, "update", 15, *options, "--device", DEVICE)
    assert call(*options, "--device", CPU).returncode == 0
    assert newest(folder).stem == "checkpoint_40"


@pytest.mark.parametrize("source, target", [(CPU, DEVICE), (DEVICE, CPU)])
def test_load_model_takes_the_networks_of_the_other_device(source, target, folder):
    for name in ("source", "target"):
        Path(name).mkdir()
    with working_in(Path("source")):
        assert call(*RUN, *SHORT, "--device", source).returncode == 0
    model = newest(Path("source").absolute())
    with working_in(Path("target")):
        options = [*RUN, *SHORT, *STILL, "--device", target, "--load_model", model]
        assert call(*options).returncode == 0
    loaded = newest(Path("target"))
    paths = model, loaded
    expected, found = (torch.load(p, map_location=CPU, weights_only=True) for p in paths)
    for part in ("agent", "scaling"):
        assert flatten(found[part], "") == flatten(expected[part], "")


@contextlib.contextmanager
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, only 200 MB more of the GPU's memory are available; on a CPU an error pretends it."""
    if not ON_CUDA:
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        with monkeypatch.context() as patch:
            patch.setattr(Agent, "gradients", lambda *args: (_ for _ in ()).throw(error))
            yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    allowed = torch.cuda.memory_reserved() + 200e6
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()


def test_out_of_memory_is_one_line(folder, monkeypatch):
    options = [*RUN, *SHORT, "--device", DEVICE]
    large = ["--batch_size", 8192, "--hidden_dim", 512, "--q_n_hidden_layers", 2]
    with little_memory(monkeypatch):
        line = error_line(call(*options, *large), code=1)
    assert "CUDA out of memory" in line
    assert call(*options).returncode == 0  # a smaller run then works in the same process
    line = error_line(call(*options, "--hidden_dim", 10**6, "--q_n_hidden_layers", 2))
    assert f"GB of memory left on {DEVICE}" in line


def uses_cuda(task: tasks.Task, seed: int) -> bool:
    return torch.cuda.is_initialized()


def test_evaluation_workers_play_on_the_cpu(folder):
    config = parse(*RUN, "--device", DEVICE, "--n_episodes", 3, "--eval_workers", 2)
    run = cal_ql.make_run(config, tasks.make(config.env), None)
    try:
        found = run.evaluate()
        assert run.workers.map(uses_cuda, [0, 1]) == [False, False]
    finally:
        run.workers.close()
    run.workers = Workers(1, 3, run.task, lambda: run.task)
    assert run.evaluate() == found
