"""The losses and their gradients against the paper's formulas, on single numbers in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cal_ql import Agent, Batch, Config, Noise, Sample, UpdateKind
from helpers import A, B, N, S, make_agent, make_batch, make_kind, make_noise

COMBINATIONS = [
    (dict(cql_importance_sample=i, cql_lagrange=lagrange, cql_max_target_backup=m), calibrated)
    for i, lagrange, m, calibrated in itertools.product((True, False), repeat=4)
]
# these differ from the defaults as their names say, and calibrate
OPTIONS = {
    "entropy in the target": dict(backup_entropy=True),
    "entropy in the best target": dict(backup_entropy=True, cql_max_target_backup=True),
    "fixed temperature": dict(use_automatic_entropy_tuning=False, alpha_multiplier=0.7),
    "temperature multiplier": dict(alpha_multiplier=0.3, backup_entropy=True),
    "logsumexp temperature": dict(cql_temp=2.5),
    "logsumexp temperature, unweighted": dict(cql_temp=0.4, cql_importance_sample=False),
    "clip from below": dict(cql_clip_diff_min=6.0, cql_lagrange=True),
    "clip from above": dict(cql_clip_diff_max=6.0),
    "normalised critics": dict(critic_layer_norm=True),
    "one critic": dict(n_critics=1, cql_lagrange=True, cql_target_action_gap=0.8),
    "four critics": dict(n_critics=4, cql_lagrange=True, cql_max_target_backup=True),
    "gap and discount": dict(cql_lagrange=True, cql_target_action_gap=0.8, discount=0.5),
    "target entropy": dict(target_entropy=-0.3),
    "normalised actor": dict(actor_layer_norm=True),
    "one target critic": dict(n_target_critics=1, cql_max_target_backup=True),
    "three of four target critics": dict(n_critics=4, n_target_critics=3, backup_entropy=True),
}
NO_REGULARIZER = dict(cql_alpha=0.0)
# in these, other fields of the kind differ too
PHASES = {
    "cloning": ({}, dict(cloning=True)),
    "actor waits": (dict(cql_lagrange=True), dict(trains_actor=False)),
    "no regularizer": ({}, NO_REGULARIZER),
    "no regularizer, with a multiplier": (dict(cql_lagrange=True), NO_REGULARIZER),
    "two of ten target critics": (
        dict(n_critics=10, n_target_critics=2, critic_layer_norm=True),
        NO_REGULARIZER | dict(calibrated=False),
    ),
    "no regularizer, actor waits": ({}, NO_REGULARIZER | dict(trains_actor=False)),
    "behaviour cloning": (dict(bc_weight=0.7), dict(n_cloned=B)),
    "behaviour cloning of offline rows": (
        dict(use_automatic_entropy_tuning=False, alpha_multiplier=0.7, bc_weight=2.0),
        NO_REGULARIZER | dict(n_cloned=B // 2),
    ),
    "behaviour cloning without offline rows": (dict(bc_weight=0.7), dict(n_cloned=0)),
    "behaviour cloning while cloning": (dict(bc_weight=0.7), dict(cloning=True, n_cloned=B)),
}


def named_parameters(agent: Agent) -> dict[str, Tensor]:
    networks = {"actor": agent.actor, "critic": agent.critic, "target": agent.target_critic}
    named = {
        f"{network}.{name}": parameter
        for network, module in networks.items()
        for name, parameter in module.named_parameters()
    }
    return named | {"log_alpha": agent.log_alpha, "log_alpha_prime": agent.log_alpha_prime}


# ------------------------------------------------------------------------------ the formulas


def mlp(x: np.ndarray, layers: list[tuple[np.ndarray, ...]]) -> np.ndarray:
    """Outputs of layers (weight, bias) or, with LayerNorm, (weight, bias, scale, shift)."""
    for number, (weight, bias, *norm) in enumerate(layers):
        x = weight @ (np.maximum(x, 0.0) if number else x) + bias
        if norm:
            x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * norm[0] + norm[1]
    return x


class Formulas:
    """Each loss as a function of the parameters it trains (`own`); all others are `held`."""

    def __init__(self, own, held, batch, noise, config, kind):
        self.own, self.held, self.config, self.kind = own, held, config, kind
        self.batch = Batch(*(column.numpy() for column in batch))
        self.noise = Noise(*(draw.numpy() for draw in noise))
        self.critics = range(config.n_critics)

    def q(self, parameters, network, critic, state, action) -> float:
        count = sum(name.startswith(f"{network}.weights") for name in parameters)
        layers = []
        for i in range(count):
            layer = [parameters[f"{network}.weights.{i}"][critic].T]
            for name in ("biases", "norm_scales", "norm_shifts"):
                if (key := f"{network}.{name}.{i}") in parameters:
                    layer.append(parameters[key][critic, 0])
            layers.append(tuple(layer))
        return float(mlp(np.concatenate([state, action]), layers)[0])

    def gaussian(self, parameters, state) -> tuple[np.ndarray, np.ndarray]:
        count = sum(name.startswith("actor.layers") for name in parameters) // 2
        layers = []
        for i in range(count):
            names = f"layers.{i}.weight", f"layers.{i}.bias", f"norms.{i}.weight", f"norms.{i}.bias"
            found = [parameters[f"actor.{n}"] for n in names if f"actor.{n}" in parameters]
            layers.append(tuple(found))
        outputs = mlp(state, layers)
        scale, offset = parameters["actor.log_std_multiplier"], parameters["actor.log_std_offset"]
        return outputs[:A], np.exp(np.clip(scale * outputs[A:] + offset, -20.0, 2.0))

    def log_density(self, parameters, state, pre_tanh) -> float:
        total = 0.0
        for x, mean, std in zip(pre_tanh, *self.gaussian(parameters, state)):
            total += -((x - mean) ** 2) / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))
            total += 2 * (np.logaddexp(x, -x) - math.log(2.0))  # 1 - tanh^2 = 1 / cosh^2
        return total

    def sample(self, parameters, state, noise) -> tuple[np.ndarray, float]:
        mean, std = self.gaussian(parameters, state)
        pre_tanh = mean + std * noise
        return np.tanh(pre_tanh), self.log_density(parameters, state, pre_tanh)

    def alpha(self) -> float:
        tuned = self.config.use_automatic_entropy_tuning
        return self.config.alpha_multiplier * (math.exp(self.held["log_alpha"]) if tuned else 1.0)

    def alpha_prime(self, parameters) -> float:
        return math.exp(parameters["log_alpha_prime"]) if self.config.cql_lagrange else 1.0

    def target(self, b: int) -> float:
        state, best, bonus = self.batch.next_observations[b], -math.inf, 0.0
        for noise in self.noise.target[b]:
            action, log_density = self.sample(self.held, state, noise)
            drawn = self.noise.target_critics if self.config.n_target_critics else self.critics
            value = min(self.q(self.held, "target", critic, state, action) for critic in drawn)
            if value > best:
                best, bonus = value, -self.alpha() * log_density
        value = best + bonus if self.config.backup_entropy else best
        not_done = 1.0 - self.batch.terminals[b]
        return self.batch.rewards[b] + self.config.discount * not_done * value

    def difference(self, parameters, critic: int, b: int) -> float:
        state, weighted = self.batch.observations[b], self.config.cql_importance_sample
        values = []
        for action in self.noise.random[b]:
            value = self.q(parameters, "critic", critic, state, action)
            values.append(value - A * math.log(0.5) if weighted else value)
        sources = (
            (state, self.noise.current[b]),
            (self.batch.next_observations[b], self.noise.next[b]),
        )
        for source, draws in sources:
            for noise in draws:
                action, log_density = self.sample(self.held, source, noise)
                value = self.q(parameters, "critic", critic, state, action)
                if self.kind.calibrated:
                    value = max(value, self.batch.returns_to_go[b])
                values.append(value - log_density if weighted else value)
        data_value = self.q(parameters, "critic", critic, state, self.batch.actions[b])
        if not weighted:
            values.append(data_value)
        temperature = self.config.cql_temp
        soft_max = temperature * math.log(sum(math.exp(v / temperature) for v in values))
        low, high = self.config.cql_clip_diff_min, self.config.cql_clip_diff_max
        return min(max(soft_max - data_value, low), high)

    def excess(self, parameters) -> list[float]:
        gap = self.config.cql_target_action_gap if self.config.cql_lagrange else 0.0
        return [
            self.kind.cql_alpha
            * (np.mean([self.difference(parameters, critic, b) for b in range(B)]) - gap)
            for critic in self.critics
        ]

    def critic_loss(self) -> float:
        total = 0.0
        if self.kind.cql_alpha:
            total = sum(self.alpha_prime(self.held) * excess for excess in self.excess(self.own))
        for critic, b in itertools.product(self.critics, range(B)):
            state, action = self.batch.observations[b], self.batch.actions[b]
            total += (self.q(self.own, "critic", critic, state, action) - self.target(b)) ** 2 / B
        return total

    def alpha_prime_loss(self) -> float:
        return -self.alpha_prime(self.own) * float(np.mean(self.excess(self.held)))

    def actor_loss(self) -> float:
        total = 0.0
        for state, data_action, noise in zip(
            self.batch.observations, self.batch.actions, self.noise.policy
        ):
            action, log_density = self.sample(self.own, state, noise)
            if self.kind.cloning:
                value = self.data_log_density(state, data_action)
            else:
                qs = [self.q(self.held, "critic", i, state, action) for i in self.critics]
                value = min(qs)
            total += (self.alpha() * log_density - value) / B
        offline = [*zip(self.batch.observations, self.batch.actions)][: self.kind.n_cloned]
        for state, data_action in offline:
            log_density = self.data_log_density(state, data_action)
            total -= self.config.bc_weight * log_density / len(offline)
        return total

    def data_log_density(self, state, action) -> float:
        inside = np.clip(action, -1 + 1e-6, 1 - 1e-6)
        return self.log_density(self.own, state, np.arctanh(inside))

    def alpha_loss(self) -> float:
        pairs = zip(self.batch.observations, self.noise.policy)
        mean = np.mean([self.sample(self.held, state, noise)[1] for state, noise in pairs])
        target = -A if self.config.target_entropy is None else self.config.target_entropy
        return float(-self.own["log_alpha"] * (mean + target))


# ----------------------------------------------------------------------------------- the tests

SCENARIOS = [
    pytest.param(
        options,
        dict(calibrated=calibrated),
        id=" ".join([*filter(options.get, options), f"calibrate={calibrated}"]),
    )
    for options, calibrated in COMBINATIONS
]
SCENARIOS += [pytest.param(options, {}, id=name) for name, options in OPTIONS.items()]
SCENARIOS += [pytest.param(*scenario, id=name) for name, scenario in PHASES.items()]
scenarios = pytest.mark.parametrize("options, changed", SCENARIOS)


def make_update(options: dict, changed: dict) -> tuple[Agent, Batch, Noise, UpdateKind]:
    """An agent with these options, and its losses' arguments; `changed` is of the kind."""
    agent, kind = make_agent(**options), make_kind(**changed)
    return agent, make_batch(), make_noise(agent.config, n=N if kind.cql_alpha else 0), kind


def expected_losses(agent: Agent, kind: UpdateKind) -> set[str]:
    names = {"critic"}
    if kind.trains_actor:
        names |= {"actor", "alpha"} if agent.config.use_automatic_entropy_tuning else {"actor"}
    if agent.config.cql_lagrange and kind.cql_alpha:
        names.add("alpha_prime")
    return names


def trained_parameters(agent: Agent, loss: str) -> dict[str, Tensor]:
    named = named_parameters(agent)
    if loss in ("actor", "critic"):
        return {name: value for name, value in named.items() if name.startswith(f"{loss}.")}
    return {f"log_{loss}": named[f"log_{loss}"]}


@scenarios
def test_losses_equal_the_formulas(options, changed):
    agent, batch, noise, kind = make_update(options, changed)
    losses, _ = agent.losses(batch, noise, kind)
    assert losses.keys() == expected_losses(agent, kind)
    values = {name: value.detach().numpy() for name, value in named_parameters(agent).items()}
    formulas = Formulas(values, values, batch, noise, agent.config, kind)
    for name in losses:
        expected = getattr(formulas, f"{name}_loss")()
        assert losses[name].item() == pytest.approx(expected, rel=1e-9, abs=1e-9), name


@scenarios
def test_gradients_equal_finite_differences(options, changed):
    agent, batch, noise, kind = make_update(options, changed)
    random = np.random.default_rng(0)
    losses, _ = agent.losses(batch, noise, kind)
    held = {name: value.detach().numpy() for name, value in named_parameters(agent).items()}
    for loss in losses:
        trained = trained_parameters(agent, loss)
        gradients = torch.autograd.grad(losses[loss], list(trained.values()))
        for name, gradient in zip(trained, gradients):
            # the entry with the largest gradient, and a random one
            for entry in (int(gradient.abs().argmax()), int(random.integers(gradient.numel()))):
                shifted = []
                for step in (1e-6, -1e-6):
                    own = held | {name: held[name].copy()}
                    own[name].flat[entry] += step
                    formulas = Formulas(own, held, batch, noise, agent.config, kind)
                    shifted.append(getattr(formulas, f"{loss}_loss")())
                expected = (shifted[0] - shifted[1]) / 2e-6
                found = gradient.flatten()[entry].item()
                assert found == pytest.approx(expected, rel=1e-6, abs=1e-6), (loss, name, entry)


@scenarios
def test_gradients_have_their_parameters_strides(options, changed):
    """Otherwise torch's fused Adam on a CPU silently takes a wrong step."""
    agent, batch, noise, kind = make_update(options, changed)
    gradients, _ = agent.gradients(batch, noise, kind)
    for loss, values in gradients.items():
        strides = [value.stride() for value in values]
        assert strides == [parameter.stride() for parameter in agent.learned[loss]], loss


@pytest.mark.parametrize("changed", [{}, dict(cloning=True), dict(n_cloned=B)])
def test_no_loss_reaches_what_it_does_not_train(changed):
    """The actor's loss also has gradients for the critics, but no optimizer uses them."""
    agent, *arguments = make_update(
        dict(cql_lagrange=True, backup_entropy=True, bc_weight=0.7), changed
    )
    losses, _ = agent.losses(*arguments)
    for loss in losses:
        trained = trained_parameters(agent, loss)
        others = {
            name: value
            for name, value in named_parameters(agent).items()
            if name not in trained and not (loss == "actor" and name.startswith("critic."))
        }
        gradients = torch.autograd.grad(
            losses[loss], list(others.values()), retain_graph=True, allow_unused=True
        )
        assert {n for n, g in zip(others, gradients) if g is not None} == set(), loss


def test_the_batch_has_values_on_both_sides_of_the_bound():
    agent, *arguments = make_update({}, {})
    _, metrics = agent.losses(*arguments)
    rates = [value.item() for name, value in metrics.items() if name.startswith("bound_rate")]
    assert len(rates) == 4 and all(0.1 < rate < 0.9 for rate in rates)


def test_the_multiplier_stops_at_a_million():
    agent, *arguments = make_update(dict(cql_lagrange=True), {})
    agent.log_alpha_prime.data.fill_(20.0)
    losses, metrics = agent.losses(*arguments)
    assert metrics["alpha_prime"] == 1e6
    (gradient,) = torch.autograd.grad(losses["alpha_prime"], agent.log_alpha_prime)
    assert gradient == 0


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("level", [-500.0, 500.0])
def test_large_values_stay_finite_in_float32(weighted, level, monkeypatch):
    """Far beyond the range of exp, where the naive logsumexp is -inf or inf."""
    random = np.random.default_rng(0)
    data, uniform, policy = (level + random.normal(size=(2, B, n)) for n in (1, N, 2 * N))
    log_density = random.normal(size=(B, 2 * N))
    batch = Batch(*(column.float() for column in make_batch()))
    agent = make_agent(cql_importance_sample=weighted).float()
    qs = torch.tensor(np.concatenate([data, uniform, policy], -1), dtype=torch.float32)
    monkeypatch.setattr(agent.critic, "forward", lambda *_: qs)
    sample = Sample(torch.zeros(B, 2 * N, A), torch.tensor(log_density, dtype=torch.float32))
    next_sample = Sample(torch.zeros(B, 1, A), torch.zeros(B, 1))
    kind = make_kind(cql_alpha=1.0, calibrated=False)
    all_critics = torch.zeros(0, dtype=torch.int64)
    random_actions = torch.zeros(B, N, A)
    _, metrics = agent.critic_loss(batch, random_actions, sample, next_sample, all_critics, kind)
    if weighted:
        values = np.concatenate([uniform + A * math.log(2), policy - log_density], -1)
    else:
        values = np.concatenate([uniform, policy, data], -1)
    # subtracting the level from all values does not change the difference
    expected = np.log(np.exp(values - level).sum(-1)) - (data[..., 0] - level)
    np.testing.assert_allclose(metrics["cql_qf_diff"].numpy(), expected.mean(-1), rtol=1e-4)


@pytest.mark.parametrize("best", [True, False])
def test_drawn_noise_has_the_shapes_and_the_distributions(best):
    torch.manual_seed(0)
    config = Config(batch_size=1000, cql_n_actions=5, cql_max_target_backup=best, hidden_dim=2)
    noise = Agent(S, A, config, torch.device("cpu")).draw_noise(make_kind())
    shapes = [(1000, A), (1000, 5, A), (1000, 5, A), (1000, 5 if best else 1, A), (1000, 5, A)]
    assert [tuple(draw.shape) for draw in noise] == [*shapes, (0,)]
    for draw in noise[:4]:
        assert abs(draw.mean().item()) < 0.1
        assert abs(draw.std().item() - 1) < 0.1
        assert draw.abs().max() > 2.5
    assert noise.random.min() >= -1 and noise.random.max() <= 1
    counts = torch.histc(noise.random, bins=10, min=-1, max=1)
    assert torch.all((counts - 1000).abs() < 200)
    assert len({draw.flatten()[0].item() for draw in noise[:5]}) == 5


@pytest.mark.parametrize("drawn", [[2], [3, 3], [0, 2, 0], [3, 1, 0, 2, 1]])
def test_a_critic_that_is_drawn_twice_counts_once_for_the_target(drawn):
    agent, batch = make_agent(n_critics=4, n_target_critics=len(drawn)), make_batch()
    random = np.random.default_rng(1)
    actions, log_density = random.uniform(-1, 1, (B, N, A)), random.normal(size=(B, N))
    next_sample = Sample(torch.tensor(actions), torch.tensor(log_density))
    found, _ = agent.td_target(batch, next_sample, torch.tensor(drawn))
    qs = agent.target_critic(batch.next_observations, next_sample.actions).detach().numpy()
    value = np.stack([qs[number] for number in set(drawn)]).min(0).max(1)
    not_done = 1 - batch.terminals.numpy()
    expected = batch.rewards.numpy() + 0.99 * not_done * value
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def small_agent(**options) -> Agent:
    sizes = dict(batch_size=2, cql_n_actions=1, hidden_dim=2, compile=False)
    return Agent(S, A, Config(**sizes | options), torch.device("cpu"))


@pytest.mark.parametrize("cql_alpha", [5.0, 0.0])
def test_target_critics_are_drawn_uniformly_with_replacement(cql_alpha):
    torch.manual_seed(0)
    agent, kind = small_agent(n_critics=4, n_target_critics=2), make_kind(cql_alpha=cql_alpha)
    pairs = torch.stack([agent.draw_noise(kind).target_critics for _ in range(1600)])
    assert pairs.dtype == torch.int64
    counts = torch.bincount(4 * pairs[:, 0] + pairs[:, 1])
    assert len(counts) == 16 and torch.all((counts - 100).abs() < 50)


@pytest.mark.parametrize("n", [0, 2])
def test_noise_is_drawn_in_a_fixed_order_and_only_if_it_is_used(n):
    """None for the actions of a regularizer that is off, or for critics if the target uses all.

    So a run with the defaults draws the same noise as before these options existed.
    """
    agent = small_agent(batch_size=8, cql_n_actions=2)
    torch.manual_seed(0)
    noise = agent.draw_noise(make_kind(cql_alpha=float(n)))
    after = torch.get_rng_state()
    torch.manual_seed(0)
    shapes = [(8, A)] + ([(8, 2, A)] * 2 if n else []) + [(8, 1, A)]
    expected = [torch.randn(shape) for shape in shapes]
    if n:
        expected.append(torch.rand(8, 2, A) * 2 - 1)
    assert torch.equal(torch.get_rng_state(), after)
    drawn = [draw for draw in noise if draw.numel()]
    assert all(torch.equal(*pair) for pair in zip(drawn, expected)) and len(drawn) == len(expected)
    if not n:
        assert {draw.shape for draw in (noise.current, noise.next, noise.random)} == {(8, 0, A)}


@pytest.mark.parametrize("n", [1, 2, 4])
def test_metrics_have_corls_names_for_two_critics_and_the_spread_of_more(n):
    agent, batch, noise, kind = make_update(dict(n_critics=n), {})
    _, metrics = agent.losses(batch, noise, kind)
    assert all(value.shape == () for value in metrics.values())
    assert ("cql_q2_rand" in metrics) == (n > 1) and "qf3_loss" not in metrics
    qs = agent.critic(batch.observations, batch.actions[:, None]).detach().numpy()[..., 0]
    for number in range(1, min(n, 2) + 1):
        assert metrics[f"average_qf{number}"].item() == pytest.approx(qs[number - 1].mean())
    assert ("q_spread" in metrics) == (n > 2)
    if n > 2:
        assert metrics["q_spread"].item() == pytest.approx(qs.std(0, ddof=1).mean())
