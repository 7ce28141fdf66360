"""The losses and their gradients against the paper's formulas, on single numbers in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cal_ql import Agent, Batch, Config, Noise, Sample
from helpers import A, B, N, S, make_agent, make_batch, make_noise

CQL_ALPHA = 5.0

COMBINATIONS = [
    (dict(cql_importance_sample=i, cql_lagrange=lagrange, cql_max_target_backup=m), calibrated)
    for i, lagrange, m, calibrated in itertools.product((True, False), repeat=4)
]
# each of these differs from the defaults in what its name says, and calibrates
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
    """Of layers (weight, bias) or, with LayerNorm, (weight, bias, scale, shift)."""
    for number, (weight, bias, *norm) in enumerate(layers):
        x = weight @ (np.maximum(x, 0.0) if number else x) + bias
        if norm:
            x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * norm[0] + norm[1]
    return x


class Formulas:
    """Each loss as a function of the parameters it trains (`own`); all others are `held`."""

    def __init__(self, own, held, batch, noise, config, calibrated, cloning):
        self.own, self.held, self.config = own, held, config
        self.batch = Batch(*(column.numpy() for column in batch))
        self.noise = Noise(*(draw.numpy() for draw in noise))
        self.calibrated, self.cloning = calibrated, cloning

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
        names = [f"actor.layers.{i}" for i in range(count)]
        outputs = mlp(state, [(parameters[f"{n}.weight"], parameters[f"{n}.bias"]) for n in names])
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
            value = min(
                self.q(self.held, "target", critic, state, action)
                for critic in range(self.config.n_critics)
            )
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
                if self.calibrated:
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
            CQL_ALPHA * (np.mean([self.difference(parameters, critic, b) for b in range(B)]) - gap)
            for critic in range(self.config.n_critics)
        ]

    def critic_loss(self) -> float:
        total = sum(self.alpha_prime(self.held) * excess for excess in self.excess(self.own))
        for critic, b in itertools.product(range(self.config.n_critics), range(B)):
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
            if self.cloning:
                inside = np.clip(data_action, -1 + 1e-6, 1 - 1e-6)
                value = self.log_density(self.own, state, np.arctanh(inside))
            else:
                value = min(
                    self.q(self.held, "critic", critic, state, action)
                    for critic in range(self.config.n_critics)
                )
            total += (self.alpha() * log_density - value) / B
        return total

    def alpha_loss(self) -> float:
        pairs = zip(self.batch.observations, self.noise.policy)
        mean = np.mean([self.sample(self.held, state, noise)[1] for state, noise in pairs])
        return float(-self.own["log_alpha"] * (mean - A))


# ----------------------------------------------------------------------------------- the tests

SCENARIOS = [
    pytest.param(
        options,
        calibrated,
        False,
        id=" ".join([*filter(options.get, options), f"calibrate={calibrated}"]),
    )
    for options, calibrated in COMBINATIONS
]
SCENARIOS += [pytest.param(options, True, False, id=name) for name, options in OPTIONS.items()]
SCENARIOS.append(pytest.param({}, True, True, id="cloning"))
scenarios = pytest.mark.parametrize("options, calibrated, cloning", SCENARIOS)


def trained_by(agent: Agent, loss: str) -> dict[str, Tensor]:
    named = named_parameters(agent)
    if loss in ("actor", "critic"):
        return {name: value for name, value in named.items() if name.startswith(f"{loss}.")}
    return {f"log_{loss}": named[f"log_{loss}"]}


@scenarios
def test_losses_equal_the_formulas(options, calibrated, cloning):
    agent, batch = make_agent(**options), make_batch()
    noise = make_noise(agent.config)
    losses, _ = agent.losses(batch, noise, CQL_ALPHA, calibrated, cloning)
    values = {name: value.detach().numpy() for name, value in named_parameters(agent).items()}
    formulas = Formulas(values, values, batch, noise, agent.config, calibrated, cloning)
    for name in losses:
        expected = getattr(formulas, f"{name}_loss")()
        assert losses[name].item() == pytest.approx(expected, rel=1e-9, abs=1e-9), name


@scenarios
def test_gradients_equal_finite_differences(options, calibrated, cloning):
    agent, batch = make_agent(**options), make_batch()
    noise, random = make_noise(agent.config), np.random.default_rng(0)
    losses, _ = agent.losses(batch, noise, CQL_ALPHA, calibrated, cloning)
    held = {name: value.detach().numpy() for name, value in named_parameters(agent).items()}
    for loss in losses:
        trained = trained_by(agent, loss)
        gradients = torch.autograd.grad(losses[loss], list(trained.values()))
        for name, gradient in zip(trained, gradients):
            # the entry that matters most, and any other
            for entry in (int(gradient.abs().argmax()), int(random.integers(gradient.numel()))):
                shifted = []
                for step in (1e-6, -1e-6):
                    own = held | {name: held[name].copy()}
                    own[name].flat[entry] += step
                    formulas = Formulas(own, held, batch, noise, agent.config, calibrated, cloning)
                    shifted.append(getattr(formulas, f"{loss}_loss")())
                expected = (shifted[0] - shifted[1]) / 2e-6
                found = gradient.flatten()[entry].item()
                assert found == pytest.approx(expected, rel=1e-6, abs=1e-6), (loss, name, entry)


@pytest.mark.parametrize("cloning", [False, True])
def test_no_loss_reaches_what_it_does_not_train(cloning):
    """The policy's loss reaches the critics, on which it is built, but no optimizer takes that."""
    agent, batch = make_agent(cql_lagrange=True, backup_entropy=True), make_batch()
    losses, _ = agent.losses(batch, make_noise(agent.config), CQL_ALPHA, True, cloning)
    for loss in losses:
        trained = trained_by(agent, loss)
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
    agent, batch = make_agent(), make_batch()
    _, metrics = agent.losses(batch, make_noise(agent.config), CQL_ALPHA, True, False)
    rates = [value.item() for name, value in metrics.items() if name.startswith("bound_rate")]
    assert len(rates) == 4 and all(0.1 < rate < 0.9 for rate in rates)


def test_the_multiplier_stops_at_a_million():
    agent, batch = make_agent(cql_lagrange=True), make_batch()
    agent.log_alpha_prime.data.fill_(20.0)
    losses, metrics = agent.losses(batch, make_noise(agent.config), CQL_ALPHA, True, False)
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
    _, metrics = agent.critic_loss(batch, torch.zeros(B, N, A), sample, next_sample, 1.0, False)
    if weighted:
        values = np.concatenate([uniform + A * math.log(2), policy - log_density], -1)
    else:
        values = np.concatenate([uniform, policy, data], -1)
    # one level for all may leave logsumexp and difference alike
    expected = np.log(np.exp(values - level).sum(-1)) - (data[..., 0] - level)
    np.testing.assert_allclose(metrics["cql_qf_diff"].numpy(), expected.mean(-1), rtol=1e-4)


@pytest.mark.parametrize("best", [True, False])
def test_drawn_noise_has_the_shapes_and_the_distributions(best):
    torch.manual_seed(0)
    config = Config(batch_size=1000, cql_n_actions=5, cql_max_target_backup=best, hidden_dim=2)
    noise = Agent(S, A, config, torch.device("cpu")).draw_noise()
    shapes = [(1000, A), (1000, 5, A), (1000, 5, A), (1000, 5 if best else 1, A), (1000, 5, A)]
    assert [tuple(draw.shape) for draw in noise] == shapes
    for draw in noise[:4]:
        assert abs(draw.mean().item()) < 0.1
        assert abs(draw.std().item() - 1) < 0.1
        assert draw.abs().max() > 2.5
    assert noise.random.min() >= -1 and noise.random.max() <= 1
    counts = torch.histc(noise.random, bins=10, min=-1, max=1)
    assert torch.all((counts - 1000).abs() < 200)
    assert len({draw.flatten()[0].item() for draw in noise}) == 5


@pytest.mark.parametrize("n", [1, 2, 4])
def test_metrics_have_corls_names_for_two_critics_and_the_spread_of_more(n):
    agent, batch = make_agent(n_critics=n), make_batch()
    _, metrics = agent.losses(batch, make_noise(agent.config), CQL_ALPHA, True, False)
    assert all(value.shape == () for value in metrics.values())
    assert ("cql_q2_rand" in metrics) == (n > 1) and "qf3_loss" not in metrics
    qs = agent.critic(batch.observations, batch.actions[:, None]).detach().numpy()[..., 0]
    for number in range(1, min(n, 2) + 1):
        assert metrics[f"average_qf{number}"].item() == pytest.approx(qs[number - 1].mean())
    assert ("q_spread" in metrics) == (n > 2)
    if n > 2:
        assert metrics["q_spread"].item() == pytest.approx(qs.std(0, ddof=1).mean())
