"""What makes the update fast on a GPU, shown without one: no waiting for the device, one graph."""

import functools

import pytest
import torch
import torch._inductor.config

from cal_ql import Agent, Batch, Config

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


@pytest.fixture
def on_meta(monkeypatch) -> Agent:
    """Tensors on the meta device have a shape and no values, so nothing can look at one."""
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, **options: None)  # refuses such
    return make_agent(META)


def losses_and_gradients(agent: Agent, cloning: bool = False):
    batch, noise = make_batch(0, META), agent.draw_noise()
    return agent.losses_and_gradients(batch, noise, 5.0, True, cloning)


@pytest.mark.parametrize("cloning", [False, True])
def test_losses_and_gradients_run_where_there_are_no_values(cloning, on_meta):
    gradients, metrics = losses_and_gradients(on_meta, cloning)
    assert all(value.device == META and value.shape == () for value in metrics.values())
    for name, values in gradients.items():
        assert [value.shape for value in values] == [p.shape for p in on_meta.trained[name]]


LOOKS = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: 1 if x.sum() > 0 else 0,
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_look_at_a_value_would_fail_there(look, on_meta, monkeypatch):
    """The test above can fail: each of these in the losses does it."""
    losses = on_meta.losses

    def losses_and_a_look(batch, *args):
        look(batch.rewards)
        return losses(batch, *args)

    monkeypatch.setattr(on_meta, "losses", losses_and_a_look)
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        losses_and_gradients(on_meta)


# ---------------------------------------------------------------------------------- one graph


def assert_same_updates(eager: Agent, compiled: Agent, numbers: range, online_from: int) -> None:
    for number in numbers:
        metrics = []
        for agent in (eager, compiled):
            torch.manual_seed(number)
            metrics.append(agent.update(make_batch(number), online=number >= online_from))
        torch.testing.assert_close(*metrics)
    torch.testing.assert_close(dict(eager.named_parameters()), dict(compiled.named_parameters()))
    assert compiled.compiled  # and not given up


def test_every_kind_of_update_is_one_graph_and_computes_the_same(monkeypatch):
    """Traced with `fullgraph`, so that whatever breaks the graph raises; run without a compiler."""
    options = dict(bc_steps=1, target_update_period=2, cql_alpha_online=3.0)
    eager = make_agent(**options)
    compiler = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compiler(f, **options))
    assert_same_updates(eager, make_agent(compile=True, **options), range(3), online_from=2)


def test_compiled_by_inductor():
    small = dict(q_n_hidden_layers=1, cql_lagrange=False, backup_entropy=False)
    assert_same_updates(make_agent(**small), make_agent(compile=True, **small), range(2), 2)


def test_a_graph_that_breaks_is_left_for_eager_updates_in_one_line(monkeypatch, capsys):
    eager, agent = make_agent(), make_agent(compile=True)
    for one in (eager, agent):
        losses = one.losses

        def losses_and_a_branch(*args, losses=losses):
            found = losses(*args)
            if found[0]["actor"] > -1e9:
                found[0]["actor"] *= 2
            return found

        monkeypatch.setattr(one, "losses", losses_and_a_branch)
        torch.manual_seed(0)
        one.update(make_batch(0), online=False)
    torch.testing.assert_close(dict(eager.named_parameters()), dict(agent.named_parameters()))
    assert capsys.readouterr().out.count("\n") == 1


@torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
def test_a_missing_compiler_is_named(capsys):
    torch._dynamo.reset()  # what was compiled before
    make_agent(compile=True).update(make_batch(0), online=False)
    (line,) = capsys.readouterr().out.splitlines()
    assert "compile: torch.compile fails" in line and "no-such-compiler" in line


def test_one_adam_has_a_group_for_each_learning_rate():
    agent = make_agent(policy_lr=1e-4, qf_lr=3e-4)
    assert type(agent.optimizer) is torch.optim.Adam
    rates = {id(p): group["lr"] for group in agent.optimizer.param_groups for p in group["params"]}
    slow = [*agent.actor.parameters(), agent.log_alpha]
    fast = [*agent.critic.parameters(), agent.log_alpha_prime]
    assert rates == {id(p): 1e-4 for p in slow} | {id(p): 3e-4 for p in fast}
