"""Whole updates against the equations of CORL's Cal-QL, stated anew for two separate critics.

The two intended differences: calibration continues in the online phase unless `calibrate_online` is
false, and behaviour cloning scores the data's actions.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from cal_ql import Agent, Batch, Noise
from helpers import A, make_agent, make_batch, make_noise

UPDATES = 4
ONLINE_FROM = 2  # the last two updates are those of the online phase
SCENARIOS = {
    "defaults": {},
    "antmaze": dict(
        cql_lagrange=True,
        cql_target_action_gap=0.8,
        cql_max_target_backup=True,
        cql_clip_diff_min=-200.0,
    ),
    "lagrange, no weights": dict(cql_lagrange=True, cql_importance_sample=False, cql_temp=2.0),
    "kitchen": dict(cql_importance_sample=False, cql_max_target_backup=True),
    "slow targets": dict(target_update_period=2, soft_target_update_rate=0.3),
    "soft critic": dict(backup_entropy=True, cql_max_target_backup=True, alpha_multiplier=0.5),
    "soft critic, one action": dict(backup_entropy=True, discount=0.9),
    "fixed temperature": dict(use_automatic_entropy_tuning=False, alpha_multiplier=0.4),
    "cloning at first": dict(bc_steps=3),
    "clipped": dict(cql_clip_diff_min=4.0, cql_clip_diff_max=7.0),
    "as CORL when online": dict(calibrate_online=False),
    "CQL": dict(calibrate=False),
}


class Reference:
    """Learner state as plain lists of tensors, and one update written as CORL's equations."""

    def __init__(self, agent: Agent):
        self.config = agent.config

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_()

        def twin(critic, number: int) -> list[Tensor]:
            pairs = zip(critic.weights, critic.biases)
            return [leaf(part) for w, b in pairs for part in (w[number], b[number, 0])]

        self.critics = [twin(agent.critic, number) for number in (0, 1)]
        self.targets = [twin(agent.target_critic, number) for number in (0, 1)]
        self.policy = [leaf(p) for layer in agent.actor.layers for p in (layer.weight, layer.bias)]
        self.multiplier = leaf(agent.actor.log_std_multiplier)
        self.offset = leaf(agent.actor.log_std_offset)
        self.log_alpha, self.log_alpha_prime = leaf(agent.log_alpha), leaf(agent.log_alpha_prime)

        slow, fast = self.config.policy_lr, self.config.qf_lr
        self.actor_adam = torch.optim.Adam([*self.policy, self.multiplier, self.offset], lr=slow)
        self.alpha_adam = torch.optim.Adam([self.log_alpha], lr=slow)
        self.critic_adams = [torch.optim.Adam(critic, lr=fast) for critic in self.critics]
        self.alpha_prime_adam = torch.optim.Adam([self.log_alpha_prime], lr=fast)
        self.count = 0

    def q(self, critic: list[Tensor], states: Tensor, actions: Tensor) -> Tensor:
        """Q [B] of actions [B, A], or [B, N] of actions [B, N, A]."""
        if actions.ndim == 3:
            states = states[:, None].repeat(1, actions.shape[1], 1)
        x = torch.cat([states, actions], -1)
        for weight, bias in zip(critic[0:-2:2], critic[1:-2:2]):
            x = torch.relu(x @ weight + bias)
        return (x @ critic[-2] + critic[-1])[..., 0]

    def pi(self, states: Tensor) -> TransformedDistribution:
        x = states
        for weight, bias in zip(self.policy[0:-2:2], self.policy[1:-2:2]):
            x = torch.relu(x @ weight.T + bias)
        x = x @ self.policy[-2].T + self.policy[-1]
        std = (self.multiplier * x[..., A:] + self.offset).clamp(-20, 2).exp()
        return TransformedDistribution(
            Independent(Normal(x[..., :A], std), 1), TanhTransform(cache_size=1)
        )

    def sample(self, states: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        if noise.ndim == 3:
            states = states[:, None].repeat(1, noise.shape[1], 1)
        pi = self.pi(states)
        normal = pi.base_dist.base_dist
        actions = pi.transforms[0](normal.loc + normal.scale * noise)
        return actions, pi.log_prob(actions)

    def alpha(self) -> Tensor:
        if not self.config.use_automatic_entropy_tuning:
            return torch.tensor(self.config.alpha_multiplier, dtype=torch.float64)
        return self.config.alpha_multiplier * self.log_alpha.detach().exp()

    def target(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
        """TD target [B] and the mean over the batch of the next states' value."""
        actions, log_pi = self.sample(batch.next_observations, noise)
        first, second = (
            self.q(critic, batch.next_observations, actions) for critic in self.targets
        )
        values = torch.min(first, second)
        rows = torch.arange(len(values))
        best = values.argmax(1)
        value = values[rows, best]
        if self.config.backup_entropy:
            value = value - self.alpha() * log_pi[rows, best]
        target = batch.rewards + self.config.discount * (1 - batch.terminals) * value
        return target.detach(), value.mean()

    def policy_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
        actions, log_pi = self.sample(batch.observations, noise.policy)
        if self.count < self.config.bc_steps:
            inside = batch.actions.clamp(-1 + 1e-6, 1 - 1e-6)
            gain = self.pi(batch.observations).log_prob(inside)
        else:
            gain = torch.min(
                *(self.q(critic, batch.observations, actions) for critic in self.critics)
            )
        return (self.alpha() * log_pi - gain).mean(), log_pi.detach()

    def conservative_term(
        self, number: int, batch: Batch, noise: Noise, calibrated: bool, metrics: dict
    ) -> Tensor:
        """Mean clipped difference of critic 1 or 2; its metrics go to `metrics`."""
        config, critic = self.config, self.critics[number - 1]
        current, current_log_pi = self.sample(batch.observations, noise.current)
        next_actions, next_log_pi = self.sample(batch.next_observations, noise.next)
        data = self.q(critic, batch.observations, batch.actions)
        rand = self.q(critic, batch.observations, noise.random)
        values = {}
        for name, actions in {"current": current, "next": next_actions}.items():
            value = self.q(critic, batch.observations, actions.detach())
            bound = batch.returns_to_go[:, None].expand_as(value)
            below = (value < bound).double().mean()
            metrics[f"bound_rate_cql_q{number}_{name}_actions"] = below
            values[name] = torch.max(value, bound) if calibrated else value
            metrics[f"cql_q{number}_{name}_actions"] = values[name].mean()
        unweighted = torch.cat([rand, data[:, None], values["next"], values["current"]], 1)
        weighted = [
            rand - math.log(0.5**A),
            values["next"] - next_log_pi.detach(),
            values["current"] - current_log_pi.detach(),
        ]
        terms = torch.cat(weighted, 1) if config.cql_importance_sample else unweighted
        soft_max = config.cql_temp * torch.logsumexp(terms / config.cql_temp, 1)
        difference = torch.clamp(
            soft_max - data, min=config.cql_clip_diff_min, max=config.cql_clip_diff_max
        ).mean()
        metrics[f"average_qf{number}"] = data.mean()
        metrics[f"cql_q{number}_rand"] = rand.mean()
        metrics[f"cql_std_q{number}"] = unweighted.std(1).mean()
        metrics[f"cql_qf{number}_diff"] = difference
        return difference

    def update(self, batch: Batch, noise: Noise, online: bool) -> dict[str, float]:
        config = self.config
        cql_alpha = config.cql_alpha_online if online else config.cql_alpha
        calibrated = config.calibrate_online if online else True
        calibrated = calibrated and config.calibrate

        policy_loss, log_pi = self.policy_loss(batch, noise)
        alpha_loss = torch.zeros(())
        if config.use_automatic_entropy_tuning:
            alpha_loss = -(self.log_alpha * (log_pi - A)).mean()
        target, next_value = self.target(batch, noise.target)
        metrics = {
            "policy_loss": policy_loss,
            "log_pi": log_pi.mean(),
            "alpha": self.alpha(),
            "alpha_loss": alpha_loss,
            "average_target_q": next_value,
        }
        qf_losses, penalties = [], []
        for number in (1, 2):
            difference = self.conservative_term(number, batch, noise, calibrated, metrics)
            data = self.q(self.critics[number - 1], batch.observations, batch.actions)
            qf_losses.append(((data - target) ** 2).mean())
            penalty = cql_alpha * difference
            if config.cql_lagrange:
                alpha_prime = self.log_alpha_prime.exp().clamp(0, 1e6)
                penalty = alpha_prime * cql_alpha * (difference - config.cql_target_action_gap)
                metrics["alpha_prime"] = alpha_prime
            penalties.append(penalty)
            metrics[f"qf{number}_loss"] = qf_losses[-1]
            metrics[f"cql_min_qf{number}_loss"] = penalty
        alpha_prime_loss = -(penalties[0] + penalties[1]) / 2

        steps = [(policy_loss, self.actor_adam)]
        if config.use_automatic_entropy_tuning:
            steps.append((alpha_loss, self.alpha_adam))
        if config.cql_lagrange:
            metrics["alpha_prime_loss"] = alpha_prime_loss
            steps.append((alpha_prime_loss, self.alpha_prime_adam))
        critic_loss = sum(qf_losses) + sum(penalties)
        steps += [(critic_loss, adam) for adam in self.critic_adams]
        for loss, adam in steps:
            parameters = adam.param_groups[0]["params"]
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
        for name, adams in {"actor": [self.actor_adam], "critic": self.critic_adams}.items():
            gradients = [p.grad for adam in adams for p in adam.param_groups[0]["params"]]
            squares = torch.stack([gradient.square().sum() for gradient in gradients])
            metrics[f"{name}_gradient_norm"] = squares.sum().sqrt()
        metrics = {name: value.item() for name, value in metrics.items()}
        for _, adam in steps:
            adam.step()

        self.count += 1
        if self.count % config.target_update_period == 0:
            tau = config.soft_target_update_rate
            with torch.no_grad():
                for target_net, net in zip(self.targets, self.critics):
                    for old, new in zip(target_net, net):
                        old.copy_(tau * new + (1 - tau) * old)
        return metrics

    def state(self) -> dict[str, list[Tensor]]:
        return {
            "actor": [*self.policy, self.multiplier, self.offset],
            "critics": [*self.critics[0], *self.critics[1]],
            "targets": [*self.targets[0], *self.targets[1]],
            "temperatures": [self.log_alpha, self.log_alpha_prime],
        }


@pytest.mark.parametrize("options", SCENARIOS.values(), ids=SCENARIOS)
def test_updates_equal_corls(options, monkeypatch):
    rates = dict(policy_lr=2e-3, qf_lr=5e-3, cql_alpha=5.0, cql_alpha_online=3.0)
    agent = make_agent(**rates | options)
    reference = Reference(agent)
    for number in range(UPDATES):
        batch, noise = make_batch(seed=number), make_noise(agent.config, seed=number)
        online = number >= ONLINE_FROM
        monkeypatch.setattr(agent, "draw_noise", lambda kind, noise=noise: noise)
        metrics = agent.update(batch, online)
        expected = reference.update(batch, noise, online)
        # to 1e-6, for the bound rates are means of float32 zeros and ones
        found = {name: metrics[name].item() for name in expected}
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
        for name, tensors in Reference(agent).state().items():
            for ours, expected in zip(tensors, reference.state()[name]):
                torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9, msg=name)
