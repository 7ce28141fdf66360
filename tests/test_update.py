"""Why updates are fast, tested without a GPU: they never wait for it, and each is one graph."""

import contextlib
import functools
import os
import shutil
import signal
from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config

from cal_ql import Agent, Batch, Config
from helpers import RUN, finish, make_kind, start_run, wait_until
from runs import machine

S, A = 5, 2
CPU, META = torch.device("cpu"), torch.device("meta")


def make_agent(device: torch.device = CPU, **options) -> Agent:
    torch.manual_seed(0)
    sizes = dict(batch_size=8, cql_n_actions=3, hidden_dim=16, actor_n_hidden_layers=1)
    everything = dict(cql_lagrange=True, cql_max_target_backup=True, backup_entropy=True)
    everything |= dict(critic_layer_norm=True, compile=False)
    return Agent(S, A, Config(**sizes | everything | options), device)


def make_batch(seed: int, device: torch.device = CPU) -> Batch:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(device)

    terminals = torch.zeros(8, device=device)
    return Batch(draw(8, S), draw(8, A).tanh(), draw(8), draw(8, S), terminals, draw(8))


# updates like WSRL's: no regularizer online, many critics, an actor that skips updates
OTHER = dict(n_critics=4, n_target_critics=2, actor_layer_norm=True, cql_alpha_online=0.0)
OTHER |= dict(bc_weight=0.5, actor_update_period=2, target_entropy=-1.0)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Reset dynamo: it counts all agents' updates as one function, and compiles that 8 times."""
    yield
    torch._dynamo.reset()


# --------------------------------------------------------------------------- on the CPU


def test_denormals_count_as_zero():
    assert (torch.full((100,), 1e-30) * 1e-10 == 0).all()


# --------------------------------------------------------------------- no waiting for the device


@pytest.mark.parametrize(
    "changed",
    [
        {},
        dict(cloning=True),
        dict(cql_alpha=0.0, n_cloned=4),
        dict(cql_alpha=0.0, trains_actor=False),
    ],
)
def test_losses_and_gradients_run_where_there_are_no_values(changed, monkeypatch):
    """Tensors on the meta device have shapes but no values: code that reads a value raises."""
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, **options: None)  # refuses meta
    kind = make_kind(**changed)
    agent, batch = make_agent(META, **{} if kind.cql_alpha else OTHER), make_batch(0, META)
    gradients, metrics = agent.gradients(batch, agent.draw_noise(kind), kind)
    assert all(value.device == META and value.shape == () for value in metrics.values())
    for name, values in gradients.items():
        assert [value.shape for value in values] == [p.shape for p in agent.learned[name]]


# ---------------------------------------------------------------------------------- one graph


def assert_same_updates(eager: Agent, compiled: Agent, numbers: range, online_from: int) -> None:
    for number in numbers:
        metrics = []
        for agent in (eager, compiled):
            batch, online = make_batch(number), number >= online_from
            for name, gradients in agent.compute_gradients(batch, agent.kind(online))[0].items():
                for parameter, gradient in zip(agent.learned[name], gradients):
                    assert gradient.stride() == parameter.stride()  # else fused Adam errs
            assert agent.kind(online) not in agent.kinds_to_compile(online)
            torch.manual_seed(number)
            metrics.append(agent.update(batch, online))
        torch.testing.assert_close(*metrics)
    torch.testing.assert_close(dict(eager.named_parameters()), dict(compiled.named_parameters()))
    assert compiled.graph.compiled  # compiling has not failed


@pytest.mark.parametrize(
    ("options", "online_from"),
    [
        (dict(bc_steps=1, target_update_period=2, cql_alpha_online=3.0), 2),
        (OTHER | dict(offline_iterations=0, q_n_hidden_layers=1), 0),
    ],
)
def test_every_kind_of_update_is_one_graph_and_computes_the_same(options, online_from, monkeypatch):
    """Traced with `fullgraph`, so that a graph break raises; executed without a compiler."""
    eager = make_agent(**options)
    compiler = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compiler(f, **options))
    assert_same_updates(eager, make_agent(compile=True, **options), range(3), online_from)


SMALL = dict(q_n_hidden_layers=1, cql_lagrange=False, backup_entropy=False)  # compiles faster


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
@pytest.mark.parametrize(
    ("options", "online_from"),
    [({}, 2), (OTHER | dict(offline_iterations=0, actor_update_period=1), 0)],
)
def test_compiled_by_inductor(options, online_from):
    agents = make_agent(**SMALL | options), make_agent(compile=True, **SMALL | options)
    assert_same_updates(*agents, range(2), online_from)


@torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
def test_without_a_compiler_updates_are_eager_and_one_line_says_so(capsys):
    torch._dynamo.reset()  # discards what was compiled before
    agents = make_agent(compile=True, **SMALL), make_agent(**SMALL)
    for agent in agents:
        torch.manual_seed(0)
        agent.update(make_batch(0), online=False)
    torch.testing.assert_close(*(dict(agent.named_parameters()) for agent in agents))
    (line,) = capsys.readouterr().out.splitlines()
    assert "compile: torch.compile fails" in line and "no-such-compiler" in line


def test_a_signal_ends_a_run_while_it_compiles(tmp_path):
    """The compiler takes an hour; the run saves the state before the first update."""
    called = tmp_path / "called"
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\ntouch {called}\nexec sleep 3600\n")
    compiler.chmod(0o755)
    env = os.environ | {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = start_run(tmp_path, *RUN, "--compile", "true", env=env, start_new_session=True)
    wait_until(process, called.exists)
    process.terminate()
    done = finish(process)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the compiler
    assert done.returncode == 143 and "compiling" in done.stderr
    assert "stopped: by SIGTERM" in done.stderr and "Traceback" not in done.stderr
    (checkpoint,) = tmp_path.glob("*/checkpoint_*.pt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["step"] == saved["updates"] == 0


def test_numbers_drawn_within_kept_random_states_do_not_count():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with machine.kept_random_states():
        torch.rand(7)
    assert torch.equal(torch.rand(3), expected)
