"""What methods other than Cal-QL need: SAC's update, an actor that skips updates, a warm-up."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import cal_ql
from cal_ql import Agent, Batch, Noise, UpdateKind
from helpers import (
    RUN,
    A,
    B,
    N,
    S,
    call,
    differences,
    killed_at,
    make_agent,
    make_batch,
    make_kind,
    make_noise,
    newest,
    parse,
    read_records,
    stopped_at,
    working_in,
)
from runs import machine
from runs.log import MeanMetrics

# ---------------------------------------------------------------------------- SAC's update


def pi(agent: Agent, states: Tensor) -> TransformedDistribution:
    x = states
    for layer in agent.actor.layers[:-1]:
        x = torch.relu(x @ layer.weight.T + layer.bias)
    x = x @ agent.actor.layers[-1].weight.T + agent.actor.layers[-1].bias
    scale, offset = agent.actor.log_std_multiplier, agent.actor.log_std_offset
    normal = Normal(x[:, :A], (scale * x[:, A:] + offset).clamp(-20, 2).exp())
    return TransformedDistribution(Independent(normal, 1), TanhTransform(cache_size=1))


def sample(agent: Agent, states: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    policy = pi(agent, states)
    normal = policy.base_dist.base_dist
    actions = policy.transforms[0](normal.loc + normal.scale * noise)
    return actions, policy.log_prob(actions)


def q(critic: cal_ql.Critic, number: int, states: Tensor, actions: Tensor) -> Tensor:
    x = torch.cat([states, actions], -1)
    for layer, (weight, bias) in enumerate(zip(critic.weights, critic.biases)):
        x = (torch.relu(x) if layer else x) @ weight[number] + bias[number]
    return x[:, 0]


def sac_losses(agent: Agent, batch: Batch, noise: Noise) -> tuple[dict, dict]:
    """Haarnoja et al., 2018, arXiv 1812.05905, as functions of the agent's own parameters."""
    config, n = agent.config, agent.config.n_critics
    alpha = agent.log_alpha.detach().exp()
    actions, log_pi = sample(agent, batch.observations, noise.policy)
    least = torch.stack([q(agent.critic, i, batch.observations, actions) for i in range(n)])
    losses = {"actor": (alpha * log_pi - least.min(0).values).mean()}
    losses["alpha"] = -(agent.log_alpha * (log_pi.detach() - A)).mean()

    next_actions, next_log_pi = sample(agent, batch.next_observations, noise.target[:, 0])
    drawn = noise.target_critics if config.n_target_critics else range(n)
    states = batch.next_observations
    next_qs = torch.stack([q(agent.target_critic, i, states, next_actions) for i in drawn])
    next_value = next_qs.min(0).values - (alpha * next_log_pi if config.backup_entropy else 0.0)
    target = batch.rewards + config.discount * (1 - batch.terminals) * next_value
    qs = [q(agent.critic, i, batch.observations, batch.actions) for i in range(n)]
    errors = [((values - target.detach()) ** 2).mean() for values in qs]
    losses["critic"] = sum(errors)
    metrics = {"policy_loss": losses["actor"], "alpha_loss": losses["alpha"], "alpha": alpha}
    metrics |= {"log_pi": log_pi.mean(), "average_target_q": next_value.mean()}
    for number in range(min(n, 2)):
        metrics[f"qf{number + 1}_loss"] = errors[number]
        metrics[f"average_qf{number + 1}"] = qs[number].mean()
    metrics["average_return_to_go"] = batch.returns_to_go.mean()
    if n > 2:
        metrics["q_spread"] = torch.stack(qs).std(0).mean()
    return losses, metrics


SAC = {
    "two critics": {},
    "entropy in the target": dict(backup_entropy=True),
    "ten critics": dict(n_critics=10),
    "two of ten in the target": dict(n_critics=10, n_target_critics=2, backup_entropy=True),
    "no multiplier": dict(cql_lagrange=True),
}


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("options", SAC.values(), ids=SAC)
def test_without_a_regularizer_updates_are_sacs(options, online):
    """In the phase whose weight is 0; the other phase has the regularizer."""
    weights = dict(cql_alpha=5.0, cql_alpha_online=0.0) if online else dict(cql_alpha=0.0)
    agent, batch = make_agent(**weights | options), make_batch()
    noise = make_noise(agent.config, n=0)
    kind = agent.kind(online)
    found, found_metrics = agent.gradients(batch, noise, kind)
    losses, metrics = sac_losses(agent, batch, noise)
    assert found.keys() == losses.keys()
    for name, loss in losses.items():
        expected = torch.autograd.grad(loss, agent.learned[name])
        norm = torch.cat([gradient.flatten() for gradient in expected]).norm()
        for pair in zip(found[name], expected):
            torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-12)
        if name != "alpha":
            metrics[f"{name}_gradient_norm"] = norm
    if not agent.config.cql_lagrange:  # as CORL logs them
        metrics |= {name: torch.tensor(0.0) for name in ("alpha_prime", "alpha_prime_loss")}
    assert found_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        assert found_metrics[name].item() == pytest.approx(value.item(), rel=1e-9), name
    other_metrics = agent.losses(batch, make_noise(agent.config), make_kind())[1]
    gone = other_metrics.keys() - metrics.keys()
    of_regularizer = "cql_", "bound_rate_", *(["alpha_prime"] if agent.config.cql_lagrange else [])
    assert gone == {name for name in other_metrics if name.startswith(of_regularizer)}


def test_a_multiplier_without_a_regularizer_stays_where_it_is():
    agent = make_agent(cql_lagrange=True, cql_alpha_online=0.0, offline_iterations=1)
    moves = []
    for online in (False, True, True):
        before = agent.log_alpha_prime.item()
        draw_in_float64(agent)
        agent.update(make_batch(), online)
        moves.append(agent.log_alpha_prime.item() != before)
    assert moves == [True, False, False]
    assert agent.optimizer.state[agent.log_alpha_prime]["step"] == 1


def draw_in_float64(agent: Agent) -> None:
    """Let the agent draw noise in float64, the type of its networks."""
    real = Agent.draw_noise
    agent.draw_noise = lambda kind: Noise(
        *(draw.double() if draw.is_floating_point() else draw for draw in real(agent, kind))
    )


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of Q-values in each forward pass of an ensemble."""
    counts = []
    real = cal_ql.Critic.q_values

    def q_values(*args: Any) -> Tensor:
        qs = real(*args)
        counts.append(qs.numel())
        return qs

    monkeypatch.setattr(cal_ql.Critic, "q_values", q_values)
    return counts


@pytest.mark.parametrize(
    ("options", "changed", "expected"),
    [  # per state: for the data's and the sampled actions, the actor's action, the targets
        ({}, dict(cql_alpha=5.0), 2 * (1 + 3 * N) + 2 + 2),
        ({}, {}, 2 + 2 + 2),
        (dict(cql_max_target_backup=True), {}, 2 + 2 + 2 * N),
        (dict(n_critics=10), {}, 10 + 10 + 10),
        (dict(n_critics=10, n_target_critics=2), {}, 10 + 10 + 2),
        (dict(n_critics=10, n_target_critics=1), dict(trains_actor=False), 10 + 1),
        (dict(bc_weight=1.0), dict(cloning=True, n_cloned=B), 2 + 2),
    ],
)
def test_no_more_q_values_are_computed_than_an_update_needs(options, changed, expected, evaluated):
    agent, kind = make_agent(**options), make_kind(**dict(cql_alpha=0.0) | changed)
    noise = make_noise(agent.config, n=N if kind.cql_alpha else 0)
    agent.losses(make_batch(), noise, kind)
    assert sum(evaluated) == expected * B


# ---------------------------------------------------------------------------- kinds of updates


def test_a_phase_follows_from_the_options():
    options = dict(cql_alpha=5.0, cql_alpha_online=0.0, calibrate_online=False, bc_steps=1)
    agent = make_agent(**options, bc_weight=0.7, mixing_ratio=0.4, offline_iterations=0)
    assert agent.kind(online=False) == UpdateKind(5.0, True, True, True, B)
    assert agent.kind(online=True) == UpdateKind(0.0, False, True, True, int(B * 0.4))
    agent.updates = 1
    assert agent.kind(online=False) == UpdateKind(5.0, True, False, True, B)


def test_an_online_batch_without_offline_rows_clones_nothing():
    agent = make_agent(bc_weight=0.7, mixing_ratio=0.0, offline_iterations=0)
    batch, noise = make_batch(), make_noise(agent.config)
    losses, metrics = agent.losses(batch, noise, agent.kind(online=True))
    plain = make_agent(offline_iterations=0)
    expected, expected_metrics = plain.losses(batch, noise, plain.kind(online=True))
    assert metrics.keys() == expected_metrics.keys()
    for name in losses:
        assert losses[name].item() == expected[name].item(), name


def test_the_cloned_rows_are_the_datas_own(monkeypatch: pytest.MonkeyPatch):
    """Their mean log-density is logged; the online rows of a batch do not count."""
    agent, batch = make_agent(bc_weight=0.3), make_batch()
    policy = pi(agent, batch.observations)
    expected = -policy.log_prob(batch.actions.clamp(-1 + 1e-6, 1 - 1e-6))
    noise = make_noise(agent.config)
    _, metrics = agent.losses(batch, noise, agent.kind(online=False))
    assert metrics["bc_loss"].item() == pytest.approx(expected.mean().item())
    _, metrics = agent.losses(batch, noise, agent.kind(online=True))
    assert metrics["bc_loss"].item() == pytest.approx(expected[: B // 2].mean().item())


def test_the_first_rows_of_an_online_batch_are_the_offline_ones(folder: Path):
    options = [*RUN, "--mixing_ratio", 0.3, "--bc_weight", 1, "--checkpoints_path", "null"]
    config = parse(*options)
    run = cal_ql.make_run(config, cal_ql.tasks.make(config.env, config.dataset_path), None)
    online = Batch(*(np.zeros((5, *column.shape[1:]), np.float32) for column in run.online.rows))
    run.online.add(online)
    batch, n = run.sample(online=True), run.agent.kind(online=True).n_cloned
    assert n == int(0.3 * config.batch_size)
    assert batch.observations[:n].any(1).all() and not batch.observations[n:].any()


# ---------------------------------------------------------------------------- skipped updates


def copy_parameters(agent: Agent) -> dict[str, dict[str, Tensor]]:
    parts = {"actor": agent.actor, "critic": agent.critic, "target": agent.target_critic}
    found = {name: dict(module.named_parameters()) for name, module in parts.items()}
    return copy.deepcopy(found | {"alpha": {"": agent.log_alpha}})


@pytest.mark.parametrize("period", [1, 3, 4])
@pytest.mark.parametrize("offline", [0, 5])
def test_actor_and_temperature_move_at_the_end_of_each_period_online(period, offline):
    """Periods count from the switch. Offline, and in everything else, every update counts."""
    agent = make_agent(actor_update_period=period, offline_iterations=offline)
    draw_in_float64(agent)
    for number in range(offline + 9):
        before, online = copy_parameters(agent), number >= offline
        waits = online and (number - offline + 1) % period != 0
        assert agent.kind(online).trains_actor == (not waits)
        metrics = agent.update(make_batch(number), online)
        moved = {}
        for part, parameters in copy_parameters(agent).items():
            changed = [not torch.equal(x, before[part][name]) for name, x in parameters.items()]
            assert len(set(changed)) == 1, (number, part)
            moved[part] = changed[0]
        assert moved == dict(actor=not waits, critic=True, target=True, alpha=not waits), number
        theirs = {"policy_loss", "log_pi", "alpha_loss", "actor_gradient_norm"}
        assert theirs & metrics.keys() == (set() if waits else theirs)
        assert {"qf1_loss", "critic_gradient_norm", "alpha"} <= metrics.keys()


def test_each_metric_is_averaged_over_the_updates_that_had_it():
    means, resumed = MeanMetrics(), MeanMetrics()
    updates = [dict(a=1.0, b=2.0), dict(a=3.0), dict(a=5.0, c=-4.0), dict(c=-6.0), dict(a=8.0)]
    for number, update in enumerate(updates):
        means.add({name: torch.tensor(value) for name, value in update.items()}, step=number)
        vars(resumed).update(copy.deepcopy(vars(means)))  # as a checkpoint does
        assert resumed.means() == means.means()
    assert means.means() == dict(a=17 / 4, b=2.0, c=-5.0)
    means.reset()
    means.add(dict(c=torch.tensor(7.0)), step=9)
    assert means.means() == dict(c=7.0)


def test_a_metric_that_some_updates_lack_is_named_if_it_is_not_finite():
    means = MeanMetrics()
    for step in range(1, 7):
        update = dict(qf1_loss=torch.tensor(1.0))
        if step % 2 == 0:
            update["policy_loss"] = torch.tensor(math.nan if step >= 4 else 1.0)
        means.add(update, step)
    with pytest.raises(cal_ql.RunError, match="policy_loss is not finite at step 4"):
        means.check()


# ---------------------------------------------------------------------------- whole runs

# offline to step 60, warm-up to 210 (an episode of 150 steps), then 20 steps with 3 updates each
WSRL = [*RUN, *"--env maze2d-open-v0 --online_iterations 170 --log_freq 25 --eval_freq 50".split()]
WSRL += """--n_critics 4 --n_target_critics 2 --critic_layer_norm true --actor_layer_norm true
    --cql_alpha_online 0 --mixing_ratio 0.25 --bc_weight 0.5 --target_entropy -1
    --online_utd_ratio 3 --actor_update_period 2 --warmup_steps 40""".split()


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list, dict]:
    """The folder of an uninterrupted run; each update's step and metrics; its evaluations.

    By each evaluation's step: the number of updates so far, and the sum of each parameter.
    """
    folder = tmp_path_factory.mktemp("left_alone")
    updates, evaluations = [], {}
    real_add, real_evaluate = MeanMetrics.add, cal_ql.Run.evaluate

    def add(means: MeanMetrics, metrics: dict, step: int) -> None:
        updates.append((step, {name: value.item() for name, value in metrics.items()}))
        real_add(means, metrics, step)

    def evaluate(run: cal_ql.Run) -> dict[str, float]:
        weights = [p.detach().double().sum().item() for p in run.agent.parameters()]
        evaluations[run.progress.step] = run.agent.updates, weights
        return real_evaluate(run)

    with working_in(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeanMetrics, "add", add)
        patch.setattr(cal_ql.Run, "evaluate", evaluate)
        assert call(*WSRL).returncode == 0
    return folder, updates, evaluations


def test_a_warm_up_plays_and_changes_nothing(left_alone):
    folder, updates, evaluations = left_alone
    steps = [step for step, _ in updates]
    assert steps == [*range(1, 61), *(step for step in range(211, 231) for _ in range(3))]
    assert list(evaluations) == [0, 50, 60, 100, 150, 200, 230]
    assert len({repr(evaluations[step]) for step in (60, 100, 150, 200)}) == 1
    assert evaluations[60][0] == 60 and evaluations[230][0] == 120
    records = read_records(folder)
    played = {r["step"]: r for r in records if "train/episode_return" in r}
    assert list(played) == [60, 210]
    failed = np.cumsum([1 - record["train/is_success"] for record in played.values()])
    regret = [record["train/regret"] for record in played.values()]
    assert regret == pytest.approx(failed / [1, 2])
    scored = [r["step"] for r in records if "eval/d4rl_normalized_score" in r]
    assert scored == list(evaluations)
    assert {r["step"] for r in records if "eval/regret" in r} == {100, 150, 200}


def test_logged_means_are_over_the_updates_that_had_a_metric(left_alone):
    """Also when the regularizer's metrics end, and when the actor skips updates."""
    folder, updates, _ = left_alone
    known = {name for _, metrics in updates for name in metrics}
    found, since = {}, 0
    for record in read_records(folder):
        step, names = record["step"], known & record.keys()
        if not names:
            continue
        found[step] = names
        values: dict[str, list[float]] = {}
        for _, metrics in [(s, m) for s, m in updates if since < s <= step]:
            for name, value in metrics.items():
                values.setdefault(name, []).append(value)
        assert names == values.keys()
        for name in names:
            assert record[name] == pytest.approx(np.mean(values[name]), rel=1e-5), (step, name)
        since = step
    assert {25, 50, 75, 225, 230} == set(found)
    assert {"cql_qf1_diff", "bound_rate_cql_q1_next_actions"} <= found[75]  # up to 60
    assert not {name for name in found[225] if name.startswith(("cql_", "bound_rate_"))}
    assert {"policy_loss", "alpha_loss", "log_pi", "actor_gradient_norm"} <= found[225]
    assert "bc_loss" in found[25] & found[225]


@pytest.mark.parametrize(
    ("end", "moment", "saved"),
    [
        pytest.param(stopped_at, (cal_ql.Run, "evaluate", 5), 150, id="evaluating in the warm-up"),
        pytest.param(killed_at, (cal_ql.Run, "evaluate", 6), 180, id="killed in the warm-up"),
        pytest.param(stopped_at, (Agent, "update", 60 + 20), 217, id="in mid-period"),
    ],
)
def test_a_run_that_ends_anywhere_and_is_resumed_is_the_same(
    end: Callable, moment: tuple, saved: int, left_alone, folder: Path
):
    end(*moment, *WSRL)
    assert newest(folder).name == f"checkpoint_{saved}.pt"
    assert call(*WSRL).returncode == 0
    assert differences(left_alone[0], folder) == []


@pytest.mark.parametrize(
    ("warmup", "first"),
    [(1, 151), (150, 151), (151, 301)],
)
def test_the_first_update_comes_with_the_first_episode_after_the_warm_up(
    warmup: int, first: int, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    steps = []
    real = MeanMetrics.add
    monkeypatch.setattr(MeanMetrics, "add", lambda *args: steps.append(args[2]) or real(*args))
    options = [*RUN, "--env", "maze2d-open-v0", "--warmup_steps", warmup, "--offline_iterations", 7]
    options += ["--online_iterations", first + 2, "--checkpoints_path", "null"]
    assert call(*options, "--eval_freq", 1000).returncode == 0
    assert steps == [*range(1, 8), *range(7 + first, 7 + first + 3)]


def test_a_signal_ends_the_run_at_once_while_it_compiles_any_kind_of_update(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Compiling takes half a minute. The updates of one step may be of two kinds."""
    stops, moments = [], []
    real = machine.Compiled.__call__

    class Recorded(cal_ql.StopSignals):
        def __init__(self):
            super().__init__()
            stops.append(self)

    def call_it(compiled: machine.Compiled, *args: Any) -> Any:
        if not compiled.is_ready(args[-1]):
            moments.append(stops[-1].raising)
        return real(compiled, *args)

    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    monkeypatch.setattr(cal_ql, "StopSignals", Recorded)
    monkeypatch.setattr(machine.Compiled, "__call__", call_it)
    options = [*RUN, *"--compile true --checkpoints_path null --env maze2d-open-v0".split()]
    options += "--offline_iterations 2 --online_iterations 2 --actor_update_period 2".split()
    assert call(*options, "--online_utd_ratio", 2, "--cql_alpha_online", 1).returncode == 0
    assert moments == [True] * 3  # offline; online without the actor, and with it


def test_a_run_may_end_in_its_warm_up_and_be_extended(left_alone, folder: Path):
    shorter = [*WSRL, "--online_iterations", 90]
    assert call(*shorter).returncode == 0
    assert newest(folder).name == "checkpoint_150.pt"
    assert call(*WSRL).returncode == 0
    assert differences(left_alone[0], folder, ignored_step=150) == []


# ---------------------------------------------------------------------------- networks, memory


def test_the_actors_layer_norm_is_numpys():
    agent = make_agent(actor_layer_norm=True, actor_n_hidden_layers=3)
    layers = [(layer.weight, layer.bias) for layer in agent.actor.layers]
    layers = [[x.detach().numpy() for x in layer] for layer in layers]
    norms = [(norm.weight, norm.bias) for norm in agent.actor.norms]
    states = make_batch().observations
    x = states.numpy()
    for (weight, bias), (scale, shift) in zip(layers[:-1], norms):
        x = x @ weight.T + bias
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        x = np.maximum(x * scale.detach().numpy() + shift.detach().numpy(), 0.0)
    x = x @ layers[-1][0].T + layers[-1][1]
    policy = agent.actor(states)
    np.testing.assert_allclose(policy.mean.detach().numpy(), x[:, :A], rtol=1e-9)
    multiplier, offset = agent.actor.log_std_multiplier, agent.actor.log_std_offset
    log_std = np.clip(multiplier.item() * x[:, A:] + offset.item(), -20.0, 2.0)
    np.testing.assert_allclose(policy.log_std.detach().numpy(), log_std, rtol=1e-9)
    (policy.mean.sum() + policy.log_std.square().sum()).backward()
    assert len(norms) == 3
    for parameter in (parameter for norm in norms for parameter in norm):
        assert parameter.grad.any() and any(parameter is p for p in agent.learned["actor"])


def test_an_actors_layer_norm_begins_as_the_identity_after_the_scaling():
    config = cal_ql.Config(actor_layer_norm=True)
    actor = cal_ql.Actor(S, A, config)
    assert all((norm.weight == 1).all() and not norm.bias.any() for norm in actor.norms)
    plain = cal_ql.Actor(S, A, cal_ql.Config())
    torch.manual_seed(0)
    actor.__init__(S, A, config)
    torch.manual_seed(0)
    plain.__init__(S, A, cal_ql.Config())
    own = dict(actor.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in plain.named_parameters())


def needed(**options: Any) -> float:
    """The bytes that a run with these options requires."""
    sizes = dict(hidden_dim=32, batch_size=64, n_critics=10, online_iterations=10)
    config = dataclasses.replace(parse(*RUN), **sizes | options)
    task = cal_ql.tasks.make(config.env, config.dataset_path)
    return machine.memory_needed(config, task.observation_dim, task.action_dim)


def test_only_a_regularizer_needs_memory_for_sampled_actions():
    neither = dict(cql_alpha=0.0, cql_alpha_online=0.0)
    offline, online = dict(cql_alpha=5.0), dict(cql_alpha_online=5.0)
    everywhere = needed(**offline | online, cql_n_actions=10)
    assert needed(**neither | offline, cql_n_actions=10) == everywhere
    assert needed(**neither | online, cql_n_actions=10) == everywhere
    least = needed(**neither, cql_n_actions=10)
    assert least == needed(**neither, cql_n_actions=1000) < everywhere / 2
    # phases without steps do not count
    no_offline = dict(offline_iterations=0, online_iterations=10)
    assert needed(**neither | offline | no_offline) == least
    no_online = dict(online_iterations=0, offline_iterations=10)
    assert needed(**neither | online | no_online) <= least


def test_the_required_memory_is_less_than_a_run_uses():
    """A lower bound: it counts the activations kept for the gradient, without LayerNorm's."""
    saved = {}
    sizes = dict(cql_alpha=0.0, cql_alpha_online=0.0, n_critics=10, batch_size=512, hidden_dim=32)
    sizes |= dict(critic_layer_norm=True, actor_layer_norm=True, bc_weight=1.0, n_target_critics=2)
    sizes |= dict(q_n_hidden_layers=2, actor_n_hidden_layers=2, online_iterations=0, compile=False)
    config = dataclasses.replace(parse(*RUN), **sizes)
    agent = Agent(4, 2, config, torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    shapes = (512, 4), (512, 2), (512,), (512, 4), (512,), (512,)
    batch = Batch(*(torch.rand(shape, generator=random) for shape in shapes))

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        agent.losses(batch, agent.draw_noise(agent.kind(False)), agent.kind(False))
    learned = [p for parameters in agent.learned.values() for p in parameters]
    parameter_bytes = sum(p.nbytes for p in learned)
    target_bytes = sum(p.nbytes for p in agent.target_critic.parameters())
    assert needed(**sizes) < sum(saved.values()) + 4 * parameter_bytes + target_bytes
