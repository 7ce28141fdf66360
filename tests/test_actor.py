"""The policy at the limits of float32, against torch.distributions; initial weights."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from cal_ql import (
    Actor,
    Agent,
    Config,
    Critic,
    Gaussian,
    action_log_density,
    sample_actions,
)

B, N, S, A = 50, 4, 5, 3
CPU = torch.device("cpu")
DOUBLE = torch.float64


def random_policy(dtype: torch.dtype = DOUBLE) -> Gaussian:
    torch.manual_seed(0)
    return Gaussian(2 * torch.randn(B, A, dtype=dtype), torch.rand(B, A, dtype=dtype) * 4 - 3)


def distribution(policy: Gaussian) -> TransformedDistribution:
    """The same policy, which remembers from where tanh took an action."""
    normal = Normal(policy.mean, policy.log_std.exp())
    return TransformedDistribution(Independent(normal, 1), TanhTransform(cache_size=1))


@pytest.mark.parametrize("sampled", [True, False])
def test_densities_and_gradients_on_the_edge_are_finite_in_float32(sampled):
    """If tanh rounds to 1, the density of a sample cannot be computed from the action."""
    policy = Gaussian(*(x.requires_grad_() for x in random_policy(torch.float32)))
    exact = Gaussian(*(x.detach().double() for x in policy))
    noise, expected = 40 * torch.randn(B, A), distribution(exact)
    if sampled:
        found = sample_actions(policy, noise).log_density
        actions = expected.transforms[0](exact.mean + exact.log_std.exp() * noise.double())
        assert (actions.float().abs() == 1).any()
    else:
        found = action_log_density(policy, noise.sign())
        actions = noise.sign().clamp(-1 + 1e-6, 1 - 1e-6).double()
    expected_density = expected.log_prob(actions)
    torch.testing.assert_close(found.double(), expected_density, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(found.sum(), policy)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("offset, bound", [(-100.0, -20.0), (100.0, 2.0)])
def test_log_std_stays_within_its_bounds(offset, bound):
    actor = Actor(S, A, Config())
    actor.log_std_offset.data.fill_(offset)
    assert torch.all(actor(torch.randn(B, S)).log_std == bound)


def get_layers(network: Actor | Critic) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight [outputs, inputs], bias) of every layer, both twins' for a critic."""
    if isinstance(network, Actor):
        return [(layer.weight, layer.bias) for layer in network.layers]
    pairs = list(zip(network.weights, network.biases))
    return [(weight[twin].T, bias[twin, 0]) for twin in range(2) for weight, bias in pairs]


@pytest.mark.parametrize("kind", [Actor, Critic])
def test_orthogonal_initialisation(kind):
    """Gain sqrt 2 in hidden layers, 0.01 in the last, and no biases."""
    config = Config(hidden_dim=32, q_n_hidden_layers=3, actor_n_hidden_layers=3)
    layers = get_layers(kind(S, A, config))
    assert len(layers) == (4 if kind is Actor else 8)
    for number, (weight, bias) in enumerate(layers):
        gain = 0.01 if number % 4 == 3 else math.sqrt(2)
        values = torch.linalg.svdvals(weight)
        torch.testing.assert_close(values, torch.full_like(values, gain), rtol=1e-4, atol=0)
        assert not bias.any()


@pytest.mark.parametrize("orthogonal", [True, False])
def test_networks_start_near_zero_and_the_twins_apart(orthogonal):
    torch.manual_seed(0)
    agent = Agent(S, A, Config(orthogonal_init=orthogonal), CPU)
    observations, actions = torch.randn(B, S), torch.rand(B, N, A) * 2 - 1
    qs = agent.critic(observations, actions)
    assert qs.shape == (2, B, N)
    assert 0 < qs.abs().max() < 0.2
    assert (qs[0] - qs[1]).abs().min() > 0
    assert torch.equal(agent.target_critic(observations, actions), qs)
    assert agent.actor(observations).mean.abs().max() < 0.2
    targets = {parameter.data_ptr() for parameter in agent.target_critic.parameters()}
    assert targets.isdisjoint(parameter.data_ptr() for parameter in agent.critic.parameters())
