"""What makes the update fast on a GPU, shown without one: no waiting for the device, one graph."""

import functools

import numpy as np
import pytest
import torch
import torch._inductor.config

from cal_ql import Adam, Agent, Batch, Config, RunError

S, A = 5, 2
CPU, META = torch.device("cpu"), torch.device("meta")


def make_agent(device: torch.device = CPU, **options) -> Agent:
    torch.manual_seed(0)
    sizes = dict(batch_size=8, cql_n_actions=3, hidden_dim=16, actor_n_hidden_layers=1)
    everything = dict(cql_lagrange=True, cql_max_target_backup=True, backup_entropy=True)
    return Agent(S, A, Config(**sizes | everything | options), device)


def make_batch(seed: int, device: torch.device = CPU) -> Batch:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(device)

    terminals = torch.zeros(8, device=device)
    return Batch(draw(8, S), draw(8, A).tanh(), draw(8), draw(8, S), terminals, draw(8))


# --------------------------------------------------------------------- no waiting for the device


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("bc_steps", [0, 1])
def test_the_update_runs_where_there_are_no_values(online, bc_steps):
    """Tensors on the meta device have a shape and no values, so nothing can look at one."""
    agent = make_agent(META, bc_steps=bc_steps)
    metrics = agent.update(make_batch(0, META), online)
    assert all(value.device == META and value.shape == () for value in metrics.values())


LOOKS = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: 1 if x.sum() > 0 else 0,
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_look_at_a_value_would_fail_there(look, monkeypatch):
    """The test above can fail: each of these in the update does it."""
    agent = make_agent(META)
    losses = agent.losses

    def losses_and_a_look(batch, *args):
        look(batch.rewards)
        return losses(batch, *args)

    monkeypatch.setattr(agent, "losses", losses_and_a_look)
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        agent.update(make_batch(0, META), online=False)


# ---------------------------------------------------------------------------------- one graph


def assert_same_updates(eager: Agent, compiled: Agent, numbers: range, online_from: int) -> None:
    for number in numbers:
        metrics = []
        for agent in (eager, compiled):
            torch.manual_seed(number)
            metrics.append(agent.update(make_batch(number), online=number >= online_from))
        torch.testing.assert_close(*metrics)
    torch.testing.assert_close(dict(eager.named_parameters()), dict(compiled.named_parameters()))


def test_every_kind_of_update_is_one_graph_and_computes_the_same(monkeypatch):
    """Traced with `fullgraph`, so that whatever breaks the graph raises; run without a compiler."""
    options = dict(bc_steps=1, target_update_period=2, cql_alpha_online=3.0)
    eager = make_agent(**options)
    compiler = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compiler(f, **options))
    assert_same_updates(eager, make_agent(compile=True, **options), range(6), online_from=3)


@torch._inductor.config.patch(fallback_random=True)  # eager's numbers
def test_compiled_by_inductor():
    eager, compiled = make_agent(), make_agent(compile=True)
    assert_same_updates(eager, compiled, range(3), online_from=3)
    observations = np.ones((4, S), np.float32)
    actions = [agent.act(observations, explore=False) for agent in (eager, compiled)]
    np.testing.assert_allclose(*actions, rtol=1e-5, atol=1e-7)


def test_a_graph_that_breaks_is_refused(monkeypatch):
    """The tests above can fail."""
    agent = make_agent(compile=True)
    losses = agent.losses

    def losses_and_a_branch(*args):
        found = losses(*args)
        if found[0]["actor"] > 0:
            found[0]["actor"] *= 2
        return found

    monkeypatch.setattr(agent, "losses", losses_and_a_branch)
    with pytest.raises(RunError, match="compile: .*; take --compile false"):
        agent.update(make_batch(0), online=False)


@torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
def test_a_missing_compiler_is_named():
    with pytest.raises(RunError, match="compile: .*no-such-compiler.*; take --compile false"):
        make_agent(compile=True).act(np.ones((1, S), np.float32), explore=False)


# ---------------------------------------------------------------------------------------- Adam


def test_adam_is_torchs():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (4,), ())]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizer, reference = Adam(ours, lr=0.01), torch.optim.Adam(theirs, lr=0.01)
    for _ in range(10):
        gradients = [torch.randn_like(parameter) for parameter in ours]
        optimizer.step(gradients)
        for parameter, gradient in zip(theirs, gradients):
            parameter.grad = gradient
        reference.step()
        torch.testing.assert_close(ours, theirs)


def test_a_restored_agent_trains_on_alike():
    agent, other = make_agent(), make_agent(qf_lr=3e-4)
    for number in range(3):
        agent.update(make_batch(number), online=False)
    other.load_state_dict(agent.state_dict())
    assert other.updates == 3
    for one in (agent, other):
        torch.manual_seed(0)
        one.update(make_batch(3), online=False)
    for one, two in zip(agent.state_dict().values(), other.state_dict().values()):
        assert one == two if isinstance(one, int) else torch.equal(one, two)
