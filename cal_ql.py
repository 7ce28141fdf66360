"""Cal-QL: calibrated offline pre-training, then online fine-tuning, in one file.

Cal-QL (Nakamoto et al., 2023, arXiv 2303.05479) is CQL (Kumar et al., 2020, arXiv 2006.04779)
with one change. For each critic Q the objective is

    TD error of Q
    + alpha * ( logsumexp_a max(Q(s, a), V(s)) - Q(s, a_data) )

where a runs over sampled actions, the max applies to the policy's actions only, and V(s) is the
return-to-go of the behaviour policy that produced s. CQL can push Q below the true returns. The
max stops it at a return that was actually achieved, so Q keeps the scale of the returns.

    python cal_ql.py --config_path configs/quickstart.yaml
    python cal_ql.py --config_path configs/antmaze.yaml --config_path configs/methods/wsrl.yaml
    python cal_ql.py --help

`tasks` holds environments and data, `runs` everything around a run: options, files, logs, signals.
"""

import copy
import functools
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tasks
from runs import machine
from runs.directory import RunDirectory, load_model, open_directory, run_form, saved_on_failure
from runs.errors import InputError, RunError, run_program
from runs.log import Log, MeanMetrics, name_per_critic
from runs.options import ConfigParser, FilePath, Ranges, identify, may_change, name_run, option
from runs.signals import StopSignals
from runs.workers import Workers
from tasks import Task

machine.flush_denormals()

Array = np.ndarray
Scalars = dict[str, Tensor]
Gradients = dict[str, tuple[Tensor, ...]]  # by loss, of the parameters it trains


# ---------------------------------------------------------------------------- options
@dataclass
class Config:
    device: str = may_change("cuda", "device")  # Of the networks: cuda, cuda:N, cpu or auto
    precision: Optional[str] = option(None, "precision")  # float32, tf32, bf16; null: tf32 on CUDA
    # torch.compile; null: if there is a C++ compiler, except with 1 to 4,999 offline updates
    compile: Optional[bool] = may_change(None)
    env: str = "halfcheetah-medium-expert-v2"  # Task name
    seed: int = option(0, "seed")  # Seed of networks, batches and training episodes
    eval_seed: int = option(0, "seed")  # Seed of the evaluation episodes, the same each time
    eval_freq: int = may_change(5000, ">= 1")  # Steps between two evaluations
    n_episodes: int = may_change(10, ">= 1")  # Episodes per evaluation
    eval_workers: Optional[int] = may_change(None, ">= 1")  # Evaluation workers; null: cores, to 8
    offline_iterations: int = option(1_000_000, ">= 0")  # Updates in the offline phase
    online_iterations: int = may_change(1_000_000, ">= 0")  # Environment steps in the online phase
    checkpoints_path: Optional[FilePath] = may_change(None, "path")  # Parent of run folders
    checkpoint_freq: Optional[int] = may_change(None, ">= 1")  # Steps per save; null: eval_freq
    resume: bool = may_change(True)  # Continue the run in checkpoints_path; false refuses to
    load_model: FilePath = ""  # Checkpoint whose networks, optimizer and scaling a new run takes

    buffer_size: int = option(2_000_000, ">= 1")  # Transitions that each replay buffer can hold
    batch_size: int = option(256, ">= 1")  # Transitions per update
    discount: float = option(0.99, "0 to 1")  # Discount factor
    alpha_multiplier: float = option(1.0, ">= 0")  # Multiplier of the entropy temperature
    use_automatic_entropy_tuning: bool = True  # Learn the entropy temperature
    backup_entropy: bool = False  # Subtract the entropy term from the TD target
    policy_lr: float = option(3e-5, "> 0")  # Learning rate of the actor and the temperature
    qf_lr: float = option(3e-4, "> 0")  # Learning rate of critics and Lagrange multiplier
    soft_target_update_rate: float = option(5e-3, "0 to 1")  # Rate of the target update, tau
    bc_steps: int = option(0, ">= 0")  # First updates in which the actor clones data
    bc_weight: float = option(0.0, ">= 0")  # Weight of cloning offline data, in the actor's loss
    target_entropy: Optional[float] = option(None, "finite")  # Of the policy; null: -action size
    target_update_period: int = option(1, ">= 1")  # Updates between target updates
    actor_update_period: int = option(1, ">= 1")  # Online updates for each of actor and alpha

    cql_alpha: float = option(10.0, ">= 0")  # Weight of the CQL regularizer in the offline phase
    cql_alpha_online: float = option(10.0, ">= 0")  # Its weight in the online phase
    cql_n_actions: int = option(10, ">= 1")  # Actions per state and kind: random, pi(s), pi(s')
    cql_importance_sample: bool = True  # Weight the sampled actions by their inverse density
    cql_lagrange: bool = False  # Tune the regularizer's weight by a Lagrange multiplier
    cql_target_action_gap: float = option(-1.0, "finite")  # CQL difference it aims at
    cql_temp: float = option(1.0, "> 0")  # Temperature of the logsumexp
    cql_max_target_backup: bool = False  # TD target from the best of cql_n_actions next actions
    cql_clip_diff_min: float = option(-math.inf, "< inf")  # Lower clip of the CQL difference
    cql_clip_diff_max: float = math.inf  # Upper clip of the CQL difference
    calibrate: bool = True  # Bound policy actions' Q by the return-to-go; false: plain CQL
    calibrate_online: bool = True  # Calibrate in the online phase too; false is what CORL does

    orthogonal_init: bool = True  # Orthogonal initialisation of the networks
    normalize: bool = True  # Standardise observations by the dataset's mean and deviation
    normalize_reward: bool = False  # Divide rewards by the range of returns (locomotion only)
    n_critics: int = option(2, ">= 1")  # Critics in the ensemble
    n_target_critics: Optional[int] = option(None, ">= 1")  # Drawn for a TD target; null: all
    q_n_hidden_layers: int = option(2, ">= 1")  # Hidden layers of the critics
    actor_n_hidden_layers: int = option(3, ">= 1")  # Hidden layers of the actor
    hidden_dim: int = option(256, ">= 1")  # Units of every hidden layer
    critic_layer_norm: bool = False  # LayerNorm in every hidden layer of the critics
    actor_layer_norm: bool = False  # LayerNorm in every hidden layer of the actor
    reward_scale: float = option(1.0, "finite")  # Factor of every reward, offline and online
    reward_bias: float = option(0.0, "finite")  # Added to every scaled reward
    is_sparse_reward: bool = False  # Treat a failed episode as failing forever
    mixing_ratio: float = option(0.5, "0 to 1")  # Share of offline data in online batches
    warmup_steps: int = option(0, ">= 0")  # First online steps, in whole episodes: no updates
    online_utd_ratio: int = option(1, ">= 1")  # Updates per environment step in the online phase
    dataset_path: Optional[FilePath] = option(None, "path")  # The task's data; null: the published

    log_freq: int = may_change(1000, ">= 1")  # Steps over which logged metrics are averaged
    project: str = may_change("CORL")  # Weights & Biases project
    group: str = may_change("Cal-QL-D4RL")  # Weights & Biases group
    name: str = option("Cal-QL", "name")  # First part of the run's name

    @property
    def total_steps(self) -> int:
        return self.offline_iterations + self.online_iterations

    def n_offline(self, online: bool) -> int:
        """Transitions of a batch that are offline data; they come first."""
        return int(self.batch_size * self.mixing_ratio) if online else self.batch_size


# ---------------------------------------------------------------------------- networks
class Batch(NamedTuple):
    """Transitions: torch tensors or numpy arrays, of S observation and A action dimensions."""

    observations: Any  # [B, S]
    actions: Any  # [B, A], in [-1, 1]
    rewards: Any  # [B], scaled and shifted
    next_observations: Any  # [B, S]
    terminals: Any  # [B], 1 if the episode terminated; a truncation by a time limit is not terminal
    returns_to_go: Any  # [B], discounted


def make_layers(sizes: list[int], orthogonal: bool) -> list[nn.Linear]:
    """Linear layers with their initial weights; the last one's outputs start close to zero."""
    layers = [nn.Linear(*pair) for pair in zip(sizes, sizes[1:])]
    for layer in layers:
        is_last = layer is layers[-1]
        gain = 0.01 if is_last else math.sqrt(2.0)
        if orthogonal:
            nn.init.orthogonal_(layer.weight, gain)
        elif is_last:
            nn.init.xavier_uniform_(layer.weight, gain)
        if orthogonal or is_last:
            nn.init.zeros_(layer.bias)
    return layers


CPU_CACHE = 2**18  # activations of a layer that fit in a CPU's cache; larger batches are split


class Critic(nn.Module):
    """The Q-functions as one ensemble: every parameter has a leading axis of n_critics (C)."""

    def __init__(self, observation_dim: int, action_dim: int, config: Config):
        super().__init__()
        self.observation_dim = observation_dim
        hidden = [config.hidden_dim] * config.q_n_hidden_layers
        sizes = [observation_dim + action_dim, *hidden, 1]
        critics = [make_layers(sizes, config.orthogonal_init) for _ in range(config.n_critics)]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for layers in zip(*critics):
            self.weights.append(torch.stack([layer.weight.T for layer in layers]))
            self.biases.append(torch.stack([layer.bias for layer in layers])[:, None])
        normalized = self.biases[:-1] if config.critic_layer_norm else []
        self.norm_scales = nn.ParameterList(torch.ones_like(bias) for bias in normalized)
        self.norm_shifts = nn.ParameterList(torch.zeros_like(bias) for bias in normalized)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Q-values [C, B, N] of N actions [B, N, A] in each observation [B, S]."""
        batch_size, n_actions, _ = actions.shape
        n_states = max(1, CPU_CACHE // (n_actions * self.weights[0].shape[-1]))
        is_eager_cpu = actions.device.type == "cpu" and not torch.compiler.is_compiling()
        if not is_eager_cpu or n_states >= batch_size:
            return self.q_values(observations, actions)
        pieces = zip(observations.split(n_states), actions.split(n_states))
        return torch.cat([self.q_values(*piece) for piece in pieces], 1)

    def q_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        batch_size, n_actions, action_dim = actions.shape
        # the first layer is linear in (s, a), so its s part is computed once per state
        state_weight, action_weight = self.weights[0].split([self.observation_dim, action_dim], 1)
        x = torch.matmul(actions.flatten(0, 1), action_weight)
        x = x.unflatten(1, (batch_size, n_actions))  # [C, B, N, hidden]
        x = x + (torch.matmul(observations, state_weight) + self.biases[0]).unsqueeze(2)
        x = self.hidden_values(x, 0).flatten(1, -2)  # [C, B * N, hidden]
        for layer in range(1, len(self.weights) - 1):
            x = torch.baddbmm(self.biases[layer], x, self.weights[layer])
            x = self.hidden_values(x, layer)
        qs = torch.baddbmm(self.biases[-1], x, self.weights[-1])  # [C, B * N, 1]
        return qs.view(-1, batch_size, n_actions)

    def hidden_values(self, x: Tensor, layer: int) -> Tensor:
        """Activation of a layer's values [C, ..., hidden], after LayerNorm if that is on."""
        if self.norm_scales:
            x = F.layer_norm(x.flatten(1, -2), x.shape[-1:])
            x = torch.addcmul(self.norm_shifts[layer], x, self.norm_scales[layer])
        return self.activation(x, layer)

    def activation(self, x: Tensor, layer: int) -> Tensor:
        return x.relu_()


class Gaussian(NamedTuple):
    """The policy's Gaussian before the tanh, for each observation."""

    mean: Tensor  # [B, A]
    log_std: Tensor  # [B, A]


class Actor(nn.Module):
    """The policy: a Gaussian of state-dependent mean and deviation, squashed by tanh."""

    def __init__(self, observation_dim: int, action_dim: int, config: Config):
        super().__init__()
        hidden = [config.hidden_dim] * config.actor_n_hidden_layers
        sizes = [observation_dim, *hidden, 2 * action_dim]
        self.layers = nn.ModuleList(make_layers(sizes, config.orthogonal_init))
        normalized = hidden if config.actor_layer_norm else []
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in normalized)
        self.log_std_multiplier = nn.Parameter(torch.tensor(1.0))
        self.log_std_offset = nn.Parameter(torch.tensor(-1.0))

    def forward(self, observations: Tensor) -> Gaussian:
        x = observations
        for number, layer in enumerate(self.layers[:-1]):
            x = layer(x)
            x = F.relu(self.norms[number](x) if self.norms else x)
        mean, log_std = self.layers[-1](x).chunk(2, dim=-1)
        log_std = self.log_std_multiplier * log_std + self.log_std_offset
        return Gaussian(mean, log_std.clamp(-20.0, 2.0))


class Sample(NamedTuple):
    """Actions of the policy, N per observation; without that axis if there is one."""

    actions: Tensor  # [B, N, A]
    log_density: Tensor  # [B, N]


def sample_actions(policy: Gaussian, noise: Tensor) -> Sample:
    """Actions tanh(mean + std * noise) for standard normal noise [B, A] or [B, N, A]."""
    if noise.ndim == 3:
        policy = Gaussian(policy.mean.unsqueeze(1), policy.log_std.unsqueeze(1))
    pre_tanh = policy.mean + policy.log_std.exp() * noise
    return Sample(torch.tanh(pre_tanh), squashed_log_density(pre_tanh, noise, policy.log_std))


def action_log_density(policy: Gaussian, actions: Tensor) -> Tensor:
    """Log-density [B] of given actions [B, A], clipped inside (-1, 1), where it is finite."""
    pre_tanh = torch.atanh(actions.clamp(-1.0 + 1e-6, 1.0 - 1e-6))
    noise = (pre_tanh - policy.mean) * torch.exp(-policy.log_std)
    return squashed_log_density(pre_tanh, noise, policy.log_std)


def squashed_log_density(pre_tanh: Tensor, noise: Tensor, log_std: Tensor) -> Tensor:
    """log N(noise; 0, 1) - log std - log(1 - tanh(pre_tanh)^2), summed over action dimensions."""
    gaussian = -0.5 * noise.square() - 0.5 * math.log(2.0 * math.pi) - log_std
    log_jacobian = 2.0 * (math.log(2.0) - pre_tanh - F.softplus(-2.0 * pre_tanh))
    return (gaussian - log_jacobian).sum(-1)


# ---------------------------------------------------------------------------- losses and agent
class Noise(NamedTuple):
    """All random numbers of an update: standard normal, except the last two."""

    policy: Tensor  # [B, A], action of the actor's loss
    current: Tensor  # [B, N, A], policy actions at s in the CQL term
    next: Tensor  # [B, N, A], policy actions at s' in the CQL term
    target: Tensor  # [B, N or 1, A], policy actions at s' in the TD target
    random: Tensor  # [B, N, A], uniform on [-1, 1]
    target_critics: Tensor  # [n_target_critics] int, uniform; [0] where all are used


class UpdateKind(NamedTuple):
    """What the losses of an update depend on besides data and noise."""

    cql_alpha: float  # weight of the regularizer; at 0 its actions are not even sampled: N = 0
    calibrated: bool
    cloning: bool  # the actor clones the data instead of maximising Q
    trains_actor: bool  # and the temperature
    n_cloned: int  # rows that bc_weight applies to: the batch's first ones, its offline data


class Agent(nn.Module):
    """Actor, critics, target critics and temperatures; their losses and their update.

    A loss method returns the loss and metrics: scalars, or [C] with a value for each critic.
    """

    def __init__(self, observation_dim: int, action_dim: int, config: Config, device: torch.device):
        super().__init__()
        self.config = config
        self.device = device
        self.action_dim = action_dim
        entropy = config.target_entropy
        self.target_entropy = -action_dim if entropy is None else entropy
        self.actor = Actor(observation_dim, action_dim, config)
        self.critic = Critic(observation_dim, action_dim, config)
        self.target_critic = copy.deepcopy(self.critic)
        self.log_alpha = nn.Parameter(torch.tensor(0.0))  # entropy temperature
        self.log_alpha_prime = nn.Parameter(torch.tensor(1.0))  # Lagrange multiplier
        self.to(device)
        self.updates = 0
        self.learned = {  # parameters, by the name of the loss that trains them
            "critic": list(self.critic.parameters()),
            "actor": list(self.actor.parameters()),
            "alpha": [self.log_alpha],
            "alpha_prime": [self.log_alpha_prime],
        }
        rates = [config.qf_lr, config.policy_lr, config.policy_lr, config.qf_lr]
        groups = [{"params": p, "lr": lr} for p, lr in zip(self.learned.values(), rates)]
        on_cuda = device.type == "cuda"  # then the optimizer keeps its step count on the device
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=on_cuda)
        is_compiled = machine.should_compile(config.compile, config.offline_iterations)
        self.graph = machine.Compiled(self.gradients) if is_compiled else None

    def critic_loss(
        self,
        batch: Batch,
        random_actions: Tensor,  # [B, N, A]
        sample: Sample,  # 2 N actions per state: of the policy at s, of the policy at s'
        next_sample: Sample,  # actions of the policy at s' for the TD target, 1 or N
        target_critics: Tensor,  # [n_target_critics] int
        kind: UpdateKind,
    ) -> tuple[Tensor, Scalars]:
        """TD error + cql_alpha * (logsumexp_a max(Q(s, a), V(s)) - Q(s, a_data)), over critics."""
        target_q, next_q = self.td_target(batch, next_sample, target_critics)
        actions = torch.cat([batch.actions[:, None], random_actions, sample.actions], 1)
        qs = self.critic(batch.observations, actions)  # [C, B, 1 + 3 N], in one pass
        data_q = qs[..., 0]
        td_error = (data_q - target_q).square().mean(-1)  # [C]
        metrics = {
            "qf_loss": td_error,
            "average_qf": data_q.mean(-1),
            "average_target_q": next_q.mean(),  # by CORL's name; without reward and discount
        }
        if len(qs) > 2:
            metrics["q_spread"] = data_q.std(0).mean()  # over critics
        if kind.cql_alpha == 0:  # without a regularizer, as in SAC
            return td_error.sum(), metrics
        regularizer, info = self.regularizer(qs, batch.returns_to_go, sample.log_density, kind)
        return (td_error + regularizer).sum(), metrics | info

    def regularizer(
        self, qs: Tensor, returns_to_go: Tensor, log_density: Tensor, kind: UpdateKind
    ) -> tuple[Tensor, Scalars]:
        """cql_alpha * (logsumexp_a max(Q(s, a), V(s)) - Q(s, a_data)) [C].

        `qs` [C, B, 1 + 3 N]: the data's action, N random ones, 2 N of the policy, which have a
        `log_density` [B, 2 N]. With importance sampling each value is weighted by the inverse of
        its action's density (CQL, appendix F); without, the data's action joins the sampled ones.
        """
        config = self.config
        n = config.cql_n_actions
        data_q, random_q, policy_q = qs[..., 0], qs[..., 1 : 1 + n], qs[..., 1 + n :]
        if kind.calibrated:
            policy_q = torch.maximum(policy_q, returns_to_go[:, None])  # Cal-QL, eq. 5.1
        if config.cql_importance_sample:
            log_uniform = -self.action_dim * math.log(2.0)  # on [-1, 1]^A
            values = [random_q - log_uniform, policy_q - log_density]
        else:
            values = [random_q, policy_q, data_q[..., None]]
        soft_max = config.cql_temp * torch.logsumexp(torch.cat(values, -1) / config.cql_temp, -1)
        difference = (soft_max - data_q).clamp(config.cql_clip_diff_min, config.cql_clip_diff_max)
        difference = difference.mean(-1)  # [C]

        if config.cql_lagrange:
            gap = config.cql_target_action_gap
            regularizer = self.alpha_prime.detach() * (kind.cql_alpha * (difference - gap))
        else:
            regularizer = kind.cql_alpha * difference
        metrics = {"cql_qf_diff": difference, "cql_min_qf_loss": regularizer}
        return regularizer, metrics | q_metrics(qs, policy_q, returns_to_go)

    @torch.no_grad()
    def td_target(
        self, batch: Batch, next_sample: Sample, target_critics: Tensor
    ) -> tuple[Tensor, Tensor]:
        """TD targets [B], and the values [B] of the best next actions, from which they bootstrap.

        A value is the least of all target critics, or of some drawn with repeats (as in WSRL).
        """
        critic, drawn = self.target_critic, {}
        if self.config.n_target_critics:  # the others are not even computed
            drawn = {name: p[target_critics] for name, p in critic.named_parameters()}
        inputs = batch.next_observations, next_sample.actions
        next_qs = torch.func.functional_call(critic, drawn, inputs)  # [C, B, N]
        next_q, best = next_qs.amin(0).max(-1)  # [B]
        if self.config.backup_entropy:
            log_density = next_sample.log_density.gather(-1, best[:, None])[:, 0]
            next_q = next_q - self.alpha * log_density
        target_q = batch.rewards + self.config.discount * (1.0 - batch.terminals) * next_q
        return target_q, next_q

    @property
    def alpha(self) -> Tensor:
        """The entropy temperature, without a gradient."""
        return self.config.alpha_multiplier * self.log_alpha.detach().exp()

    @property
    def alpha_prime(self) -> Tensor:
        """The Lagrange multiplier of the CQL regularizer."""
        return self.log_alpha_prime.exp().clamp(max=1e6)

    def alpha_prime_loss(self, difference: Tensor, cql_alpha: float) -> tuple[Tensor, Scalars]:
        """Loss of the multiplier, which grows while differences [C] exceed the gap (CQL, 4)."""
        excess = cql_alpha * (difference.detach() - self.config.cql_target_action_gap)
        alpha_prime = self.alpha_prime
        loss = -(alpha_prime * excess).mean()
        return loss, {"alpha_prime": alpha_prime, "alpha_prime_loss": loss}

    def actor_loss(
        self, batch: Batch, policy: Gaussian, sample: Sample, kind: UpdateKind
    ) -> tuple[Tensor, Scalars]:
        """mean(alpha * log pi(a|s) - min_i Q_i(s, a)) for one action a of the policy per state.

        While cloning, the log-density of the data's actions replaces Q. bc_weight adds
        bc_weight * mean(-log pi(a_data|s)) over the offline rows.
        """
        if kind.cloning:
            value = action_log_density(policy, batch.actions)  # [B]
        else:
            qs = self.critic(batch.observations, sample.actions[:, None])  # [C, B, 1]
            value = qs.amin(0)[:, 0]  # [B]
        loss = (self.alpha * sample.log_density - value).mean()
        metrics = {"log_pi": sample.log_density.mean()}
        if kind.n_cloned:
            offline = Gaussian(*(part[: kind.n_cloned] for part in policy))
            bc_loss = -action_log_density(offline, batch.actions[: kind.n_cloned]).mean()
            loss = loss + self.config.bc_weight * bc_loss
            metrics["bc_loss"] = bc_loss
        return loss, {"policy_loss": loss, **metrics}

    def alpha_loss(self, log_density: Tensor) -> tuple[Tensor, Scalars]:
        """Loss of the temperature, which grows while the entropy is below its target."""
        excess = log_density.detach() + self.target_entropy  # target entropy - entropy
        loss = -(self.log_alpha * excess).mean()
        return loss, {"alpha_loss": loss}

    def losses(self, batch: Batch, noise: Noise, kind: UpdateKind) -> tuple[Scalars, Scalars]:
        """All losses, by the name of what each trains, and all metrics of an update."""
        policy = self.actor(batch.observations)  # one pass for all actions sampled in s
        sample = sample_actions(policy, noise.policy)
        with torch.no_grad():
            next_policy = self.actor(batch.next_observations)
            current_sample = sample_actions(policy, noise.current)
            next_sample = sample_actions(next_policy, noise.next)
            cql_sample = Sample(*(torch.cat(pair, 1) for pair in zip(current_sample, next_sample)))
            target_sample = sample_actions(next_policy, noise.target)

        losses = {}
        zero = torch.zeros_like(self.log_alpha)
        metrics = {"alpha": self.alpha, "average_return_to_go": batch.returns_to_go.mean()}
        if not self.config.cql_lagrange:
            metrics |= {"alpha_prime": zero, "alpha_prime_loss": zero}  # as CORL logs them
        if kind.trains_actor:
            losses["actor"], info = self.actor_loss(batch, policy, sample, kind)
            metrics |= {"alpha_loss": zero, **info}
            if self.config.use_automatic_entropy_tuning:
                losses["alpha"], info = self.alpha_loss(sample.log_density)
                metrics |= info
        losses["critic"], info = self.critic_loss(
            batch, noise.random, cql_sample, target_sample, noise.target_critics, kind
        )
        metrics |= info
        if self.config.cql_lagrange and kind.cql_alpha:
            difference = metrics["cql_qf_diff"]
            losses["alpha_prime"], info = self.alpha_prime_loss(difference, kind.cql_alpha)
            metrics |= info
        return losses, name_per_critic(metrics)

    def gradients(self, *args: Any) -> tuple[Gradients, Scalars]:
        """For the arguments of `losses`, the gradients of what each loss trains, and the metrics.

        A function of tensors that fits in one captured graph: nothing waits for the device,
        metrics stay there, and no branch depends on a tensor's value.
        """
        losses, metrics = self.losses(*args)
        gradients = {
            name: torch.autograd.grad(loss, self.learned[name]) for name, loss in losses.items()
        }
        for name in [name for name in ("critic", "actor") if name in gradients]:
            metrics[f"{name}_gradient_norm"] = torch.nn.utils.get_total_norm(gradients[name])
        return gradients, {name: value.detach() for name, value in metrics.items()}

    def draw_noise(self, kind: UpdateKind) -> Noise:
        config = self.config
        b, n, a, c = config.batch_size, config.cql_n_actions, self.action_dim, config.n_critics
        n_cql = n if kind.cql_alpha else 0
        normal = functools.partial(torch.randn, device=self.device)
        return Noise(
            policy=normal(b, a),
            current=normal(b, n_cql, a),
            next=normal(b, n_cql, a),
            target=normal(b, n if config.cql_max_target_backup else 1, a),
            random=torch.rand(b, n_cql, a, device=self.device) * 2.0 - 1.0,
            target_critics=torch.randint(c, (config.n_target_critics or 0,), device=self.device),
        )

    def kind(self, online: bool, ahead: int = 0) -> UpdateKind:
        """The kind of the next update, or of one further ahead."""
        config = self.config
        number = self.updates + ahead + 1
        online_number = number - config.offline_iterations
        return UpdateKind(
            cql_alpha=config.cql_alpha_online if online else config.cql_alpha,
            calibrated=config.calibrate and (config.calibrate_online or not online),
            cloning=number <= config.bc_steps,
            trains_actor=not online or online_number % config.actor_update_period == 0,
            n_cloned=config.n_offline(online) if config.bc_weight else 0,
        )

    def compute_gradients(self, batch: Batch, kind: UpdateKind) -> tuple[Gradients, Scalars]:
        """`gradients` of a batch with new noise, compiled if that is enabled."""
        return (self.graph or self.gradients)(batch, self.draw_noise(kind), kind)

    def update(self, batch: Batch, online: bool) -> Scalars:
        """One gradient step: all gradients at the same parameters, then these are all updated."""
        gradients, metrics = self.compute_gradients(batch, self.kind(online))
        for name, values in gradients.items():
            for parameter, gradient in zip(self.learned[name], values):
                parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()  # a captured graph reuses the memory of gradients
        self.updates += 1
        if self.updates % self.config.target_update_period == 0:
            targets = list(self.target_critic.parameters())
            rate = self.config.soft_target_update_rate
            with torch.no_grad():
                torch._foreach_lerp_(targets, self.learned["critic"], rate)
        return metrics

    def kinds_to_compile(self, online: bool) -> set[UpdateKind]:
        """Those of the next step's updates that are not compiled yet, which takes half a minute."""
        n_updates = self.config.online_utd_ratio if online else 1
        kinds = {self.kind(online, ahead) for ahead in range(n_updates)}
        return {kind for kind in kinds if self.graph and not self.graph.is_ready(kind)}

    def load_networks(self, checkpoint: dict[str, Any]) -> None:
        """Load networks, temperatures and, if the checkpoint has it, the optimizer's state."""
        self.load_state_dict(checkpoint["agent"])
        if "optimizer" in checkpoint:
            own = self.optimizer.state_dict()  # keep this run's learning rates
            self.optimizer.load_state_dict({**own, "state": checkpoint["optimizer"]["state"]})


@torch.no_grad()
def q_metrics(qs: Tensor, policy_q: Tensor, returns_to_go: Tensor) -> Scalars:
    """Metrics of values [C, B, 1 + 3 N] and of the policy's [C, B, 2 N], bounded if that is on."""
    n = policy_q.shape[-1] // 2
    below = (qs[..., 1 + n :] < returns_to_go[:, None]).float()
    return {  # [C] each
        "cql_q_rand": qs[..., 1 : 1 + n].mean((1, 2)),
        "cql_q_current_actions": policy_q[..., :n].mean((1, 2)),
        "cql_q_next_actions": policy_q[..., n:].mean((1, 2)),
        "bound_rate_cql_q_current_actions": below[..., :n].mean((1, 2)),
        "bound_rate_cql_q_next_actions": below[..., n:].mean((1, 2)),
        "cql_std_q": torch.cat([qs[..., : 1 + n], policy_q], -1).std(-1).mean(-1),
    }


# ---------------------------------------------------------------------------- returns-to-go
def return_to_go(
    rewards: Array, ends: Array, discount: float, failure_reward: Optional[float] = None
) -> Array:
    """Discounted sum of rewards from each row to the end of its episode: the paper's V(s).

    `rewards` [N] are scaled and shifted; `ends` [N] is true in the last row of each episode. In
    sparse tasks, `failure_reward` is the largest reward of a step without success. An episode with
    no larger reward has failed and is treated as failing forever: mean reward / (1 - discount).

    Returns [N] float32. If a time limit cut a dense episode, a negative sum is too high a bound.
    """
    sums = np.empty(len(rewards))
    future = 0.0
    for row in range(len(rewards) - 1, -1, -1):
        future = float(rewards[row]) + (0.0 if ends[row] else discount * future)
        sums[row] = future
    if failure_reward is not None:
        starts = np.flatnonzero(np.r_[True, ends[:-1]])
        lengths = np.diff(np.r_[starts, len(rewards)])
        failed = np.repeat(np.maximum.reduceat(rewards, starts) <= failure_reward, lengths)
        means = np.repeat(np.add.reduceat(rewards, starts, dtype=np.float64) / lengths, lengths)
        sums[failed] = means[failed] / (1.0 - discount)
    return sums.astype(np.float32)


# ---------------------------------------------------------------------------- data
class Scaling(NamedTuple):
    """Scales the task's observations and rewards for the networks, in both phases."""

    observation_mean: Array  # [S]
    observation_std: Array  # [S]
    reward_scale: float
    reward_bias: float

    def observation(self, observation: Array) -> Array:
        return (observation - self.observation_mean) / self.observation_std

    def reward(self, reward: Any) -> Any:
        """In float32, so that equal rewards stay equal."""
        return np.float32(reward) * np.float32(self.reward_scale) + np.float32(self.reward_bias)


def make_scaling(rows: dict[str, Array], ends: Array, config: Config, task: Task) -> Scaling:
    """The scaling that `normalize`, `normalize_reward`, `reward_scale`, `reward_bias` ask for."""
    mean = np.zeros(1, np.float32)
    std = np.ones(1, np.float32)
    scale = config.reward_scale
    if config.normalize:
        mean = np.mean(rows["observations"], 0, np.float64).astype(np.float32)
        std = (np.std(rows["observations"], 0, np.float64) + 1e-3).astype(np.float32)
    if config.normalize_reward and task.is_locomotion:
        returns = np.add.reduceat(rows["rewards"], np.flatnonzero(np.r_[True, ends[:-1]]))
        scale *= task.max_episode_steps / (float(np.ptp(returns)) or 1.0)
    return Scaling(mean, std, scale, config.reward_bias)


class Dataset(NamedTuple):
    """The offline data on the training device, sampled uniformly with replacement."""

    rows: Batch  # tensors [N, ...], also the last rows of cut episodes, which are not transitions
    transitions: Tensor  # [n] int, indices of the rows that are
    n_episodes: int
    scaling: Scaling
    failure_reward: Optional[float]  # for `return_to_go`, scaled; None in dense tasks

    def sample(self, batch_size: int) -> Batch:
        n = len(self.transitions)
        rows = self.transitions[torch.randint(n, (batch_size,), device=self.transitions.device)]
        return Batch(*(column[rows] for column in self.rows))


def load_dataset(
    config: Config, task: Task, path: Path, device: torch.device, known_scaling: dict[str, Any]
) -> Dataset:
    """The transitions of the file at `path`, scaled, with their returns-to-go.

    The last row of a truncated episode has no next observation, so it is not a transition. Its
    reward still counts in the return-to-go of the rows before. `known_scaling` holds a checkpoint's
    mean and deviation of observations. Raises `InputError` for bad files, options and large values.
    """
    if config.is_sparse_reward and task.failure_reward is None:
        raise InputError(f"is_sparse_reward: found true, expected false: {config.env} is dense")
    rows = task.rows(path)
    ends, cut = tasks.episode_ends(rows, task.max_episode_steps)
    n_transitions = np.count_nonzero(~cut)
    if config.buffer_size < n_transitions:
        found = f"buffer_size: found {config.buffer_size}, expected at least"
        raise InputError(f"{found} the {n_transitions} transitions of {path}")
    if n_transitions == 0:
        raise InputError(f"dataset {path}: it holds no transition, only ends of episodes")

    with np.errstate(all="ignore"):  # check_sizes names what overflows
        scaling = make_scaling(rows, ends, config, task)._replace(**known_scaling)
        failure = float(scaling.reward(task.failure_reward)) if config.is_sparse_reward else None
        rows["rewards"] = scaling.reward(rows["rewards"])
        rows["returns_to_go"] = return_to_go(rows["rewards"], ends, config.discount, failure)
        # one more observation, so that the next ones are a view and not stored twice
        padded = np.append(rows["observations"], rows["observations"][-1:], 0)
        rows["observations"] = scaling.observation(padded)
        if "next_observations" in rows:
            rows["next_observations"] = scaling.observation(rows["next_observations"])
    tasks.check_sizes({k: v for k, v in rows.items() if k in Batch._fields}, path)

    columns = {k: torch.as_tensor(v, device=device) for k, v in rows.items() if k in Batch._fields}
    columns.setdefault("next_observations", columns["observations"][1:])
    columns["observations"] = columns["observations"][:-1]
    columns["terminals"] = columns["terminals"].float()
    transitions = torch.as_tensor(np.flatnonzero(~cut), device=device)
    return Dataset(Batch(**columns), transitions, int(ends.sum()), scaling, failure)


class OnlineBuffer:
    """A ring buffer of the transitions of ended episodes, no larger than the run can fill."""

    def __init__(self, config: Config, task: Task, device: torch.device):
        self.capacity = min(config.buffer_size, config.online_iterations + task.max_episode_steps)
        observation = (task.observation_dim,)
        shapes = Batch(observation, (task.action_dim,), (), observation, (), ())
        self.rows = Batch(*(torch.zeros(self.capacity, *shape, device=device) for shape in shapes))
        self.n_added = 0  # transitions

    def add(self, transitions: Batch) -> None:
        """Store transitions, numpy arrays [n, ...]; a full buffer overwrites the oldest."""
        kept = min(len(transitions.rewards), self.capacity)
        self.n_added += len(transitions.rewards)
        device = self.rows.rewards.device
        rows = torch.arange(self.n_added - kept, self.n_added, device=device) % self.capacity
        for column, values in zip(self.rows, transitions):
            column[rows] = torch.as_tensor(values[len(values) - kept :], device=device)

    def sample(self, batch_size: int) -> Batch:
        n = min(self.n_added, self.capacity)
        rows = torch.randint(n, (batch_size,), device=self.rows.rewards.device)
        return Batch(*(column[rows] for column in self.rows))


# ---------------------------------------------------------------------------- episodes
class Episode(NamedTuple):
    """An ended episode of T steps."""

    observations: Array  # [T + 1, S], scaled
    actions: Array  # [T, A], in [-1, 1]
    rewards: list[float]  # [T], the task's own, not scaled
    terminal: bool  # ended by the task; else by the time limit
    success: bool
    score: float


def episode_seed(seed: int, purpose: str, number: int) -> int:
    """Seed of one episode: a function of the run's seed and the episode's number only."""
    entropy = (seed, ("train", "eval").index(purpose), number)
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


@torch.no_grad()
@machine.one_thread()  # more would not be faster, and spin on other workers' cores
@machine.cpu_products("ieee")  # `precision` is for updates
def play_episode(task: Task, seed: int, actor: Actor, scaling: Scaling, explore: bool) -> Episode:
    """Play the episode of this seed on the CPU, with sampled actions or with the mean actions.

    Depends on its arguments only. Raises `RunError` if the simulator fails or is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    observations = []
    actions = []
    rewards = []
    success = False
    step = None
    try:
        observations.append(scaling.observation(task.reset(seed)))
        while not (step and (step.terminal or step.truncated)):
            policy = actor(torch.from_numpy(observations[-1]))
            pre_tanh = policy.mean  # [A]
            if explore:
                noise = torch.randn(pre_tanh.shape, generator=generator)
                pre_tanh = pre_tanh + policy.log_std.exp() * noise
            actions.append(torch.tanh(pre_tanh).numpy())
            step = task.step(actions[-1])
            if not (math.isfinite(step.reward) and np.isfinite(step.observation).all()):
                raise ValueError(f"found reward {step.reward}, observation {step.observation}")
            observations.append(scaling.observation(step.observation))
            rewards.append(step.reward)
            success |= step.success
        score = task.score(sum(rewards), success)
    except Exception as error:  # a simulator can raise any exception
        where = f"step {len(rewards)} of the episode with seed {seed}"
        reason = f"{type(error).__name__}: {error}"
        raise RunError(f"the environment failed at {where} ({reason})") from error
    return Episode(
        np.stack(observations), np.stack(actions), rewards, step.terminal, success, score
    )


def to_transitions(episode: Episode, dataset: Dataset, discount: float) -> Batch:
    """Its T transitions, numpy arrays in float32, with their true returns-to-go."""
    rewards = dataset.scaling.reward(episode.rewards)
    ends = np.arange(len(rewards)) == len(rewards) - 1
    return Batch(
        observations=episode.observations[:-1],
        actions=episode.actions,
        rewards=rewards,
        next_observations=episode.observations[1:],
        terminals=(ends & episode.terminal).astype(np.float32),
        returns_to_go=return_to_go(rewards, ends, discount, dataset.failure_reward),
    )


# ---------------------------------------------------------------------------- training
@dataclass
class Progress:
    """How far a run has come; each checkpoint stores it."""

    step: int = 0  # updates in the offline phase, then environment steps
    steps_owed: int = 0  # steps of the last online episode still without updates
    episodes: int = 0  # online episodes
    failures: int = 0  # those of them without success
    evaluated_at: int = -1  # step of the last evaluation
    evaluations: int = 0  # of the online phase, at multiples of eval_freq
    successes: float = 0.0  # sum of their success rates
    warmup_end: int = 0  # step after which updates are made


@dataclass
class Run:
    """Everything that determines how a run continues."""

    config: Config
    task: Task
    directory: Optional[RunDirectory]
    agent: Agent
    dataset: Dataset
    online: OnlineBuffer
    workers: Workers  # they play evaluation episodes
    metrics: MeanMetrics = field(default_factory=MeanMetrics)
    progress: Progress = field(default_factory=Progress)
    saved_at: Progress = field(default_factory=Progress)  # progress at the newest checkpoint

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from the checkpoint, whose networks the agent has already loaded."""
        self.progress = Progress(**saved["counts"])
        self.saved_at = replace(self.progress)
        done = self.progress.step - self.config.offline_iterations
        if done > self.config.online_iterations:
            found = f"found {self.config.online_iterations}, expected {done} or more"
            raise InputError(f"online_iterations: {found}: the run has played so many steps")
        self.agent.updates = saved["updates"]
        vars(self.metrics).update(saved["metrics"])
        shapes = [column.shape[1:] for column in self.online.rows]
        self.online.add(Batch(*self.directory.read_transitions(shapes)))
        machine.set_random_states(saved["random_states"])

    def save(self) -> None:
        """Write a checkpoint, unless a metric is not finite."""
        self.metrics.check()
        if not self.directory:
            return
        scaling = {k: v for k, v in self.dataset.scaling._asdict().items() if "observation" in k}
        state = {
            "identity": self.directory.identity,
            "config": vars(self.config),
            "scaling": {name: torch.as_tensor(value) for name, value in scaling.items()},
            "step": self.progress.step,
            "counts": vars(self.progress),
            "updates": self.agent.updates,
            "agent": self.agent.state_dict(),
            "optimizer": self.agent.optimizer.state_dict(),
            "metrics": vars(self.metrics),
            "random_states": machine.random_states(),
        }
        self.directory.save(state, keep=(self.config.offline_iterations, self.config.total_steps))
        self.saved_at = replace(self.progress)

    def evaluate(self) -> dict[str, float]:
        """Mean and spread over the evaluation episodes, played by the policy's mean actions."""
        policy = {"actor": copy.deepcopy(self.agent.actor).cpu(), "scaling": self.dataset.scaling}
        play = functools.partial(play_episode, **policy, explore=False)
        seed, n = self.config.eval_seed, self.config.n_episodes
        episodes = self.workers.map(play, [episode_seed(seed, "eval", i) for i in range(n)])
        columns = {
            "d4rl_normalized_score": [episode.score for episode in episodes],
            "episode_return": [sum(episode.rewards) for episode in episodes],
            "episode_length": [len(episode.rewards) for episode in episodes],
        }
        metrics = {f"eval/{name}": float(np.mean(values)) for name, values in columns.items()}
        metrics |= {f"eval/{name}_std": float(np.std(values)) for name, values in columns.items()}
        if self.task.has_goal:
            metrics["eval/success_rate"] = float(np.mean([e.success for e in episodes]))
        return metrics

    def play(self, stop: StopSignals) -> dict[str, float]:
        """Play the next online episode and store it; returns its metrics.

        A crashed episode counts as played and failed, so that it is not retried forever.
        """
        progress = self.progress
        seed = episode_seed(self.config.seed, "train", progress.episodes)
        actor = copy.deepcopy(self.agent.actor).cpu()
        try:
            with stop.at_once():
                episode = play_episode(self.task, seed, actor, self.dataset.scaling, explore=True)
        except RunError:
            progress.episodes += 1
            progress.failures += 1
            raise
        progress.episodes += 1
        progress.failures += not episode.success
        progress.steps_owed = len(episode.rewards)
        if progress.step - self.config.offline_iterations < self.config.warmup_steps:
            progress.warmup_end = progress.step + len(episode.rewards)
        transitions = to_transitions(episode, self.dataset, self.config.discount)
        self.online.add(transitions)
        if self.directory:
            self.directory.add_transitions(transitions)
        metrics = {
            "train/episode_return": float(sum(episode.rewards)),
            "train/d4rl_normalized_episode_return": episode.score,
            "train/episode_length": len(episode.rewards),
        }
        if self.task.has_goal:
            metrics["train/is_success"] = float(episode.success)
            metrics["train/regret"] = progress.failures / progress.episodes
        return metrics

    def sample(self, online: bool) -> Batch:
        """A batch of offline data; in the online phase `mixing_ratio` of it, the rest online."""
        n_offline = self.config.n_offline(online)
        if not online:
            return self.dataset.sample(n_offline)
        n_online = self.config.batch_size - n_offline
        batches = self.dataset.sample(n_offline), self.online.sample(n_online)
        return Batch(*(torch.cat(columns) for columns in zip(*batches)))

    def summary(self) -> str:
        bounds = self.dataset.rows.returns_to_go[self.dataset.transitions]
        return (
            f"networks on {self.agent.device}, physics by {self.task.physics}\n{len(bounds):,} "
            f"transitions of {self.dataset.n_episodes:,} episodes, returns-to-go from "
            f"{bounds.min():.4g} to {bounds.max():.4g}; starting at step {self.progress.step:,} "
            f"of {self.config.total_steps:,}"
        )


def make_run(config: Config, task: Task, directory: Optional[RunDirectory]) -> Run:
    """A new run, or the directory's run from its last valid checkpoint.

    A new run may start from the checkpoint `load_model`. Raises `InputError` for wrong input.
    """
    device = machine.resolve_device(config.device, config.precision)
    machine.check_memory(config, task.observation_dim, task.action_dim, device, NETWORKS)
    data = task.data_file(config.dataset_path)
    torch.manual_seed(config.seed)
    agent = Agent(task.observation_dim, task.action_dim, config, device)
    form = run_form(agent.state_dict(), agent.optimizer, task.observation_dim, vars(Progress()))
    saved = directory.load(device, form, identify(config)) if directory else None
    model = saved
    if config.load_model and not saved:
        model = load_model(Path(config.load_model), device, form, vars(config), NETWORKS)
    if model:
        agent.load_networks(model)
    scaling = {k: v.cpu().numpy() for k, v in model["scaling"].items()} if model else {}
    dataset = load_dataset(config, task, data, device, scaling)
    online = OnlineBuffer(config, task, device)
    make_task = functools.partial(tasks.make, config.env, config.dataset_path)
    workers = Workers(config.eval_workers, config.n_episodes, task, make_task)
    run = Run(config, task, directory, agent, dataset, online, workers)
    if saved:
        run.restore(saved)
    if directory:
        directory.begin(vars(config), run.progress.step)
    return run


def train_step(run: Run, online: bool) -> None:
    """One step: an update offline, `online_utd_ratio` updates for an environment step online."""
    run.progress.step += 1
    run.progress.steps_owed -= online
    if run.progress.step <= run.progress.warmup_end:
        return
    for _ in range(run.config.online_utd_ratio if online else 1):
        run.metrics.add(run.agent.update(run.sample(online), online), run.progress.step)


def evaluate_and_save(run: Run, log: Log, stop: StopSignals) -> None:
    """Evaluate and save if that is due at this step and not yet done."""
    config = run.config
    step = run.progress.step
    phase_ended = step in (config.offline_iterations, config.total_steps)
    is_due = phase_ended or step % config.eval_freq == 0
    if is_due and run.progress.evaluated_at != step:
        with stop.at_once():
            scores = run.evaluate()
        run.progress.evaluated_at = step
        if step > config.offline_iterations and step % config.eval_freq == 0 and run.task.has_goal:
            run.progress.evaluations += 1
            run.progress.successes += scores["eval/success_rate"]
            scores["eval/regret"] = 1.0 - run.progress.successes / run.progress.evaluations
        log.write(step, scores)
    is_due = phase_ended or step % (config.checkpoint_freq or config.eval_freq) == 0
    if is_due and step > 0 and run.saved_at != run.progress:
        run.save()


def train(run: Run, log: Log, stop: StopSignals) -> None:
    """Pre-train on the dataset; then, in turn, play an episode and learn from it (algorithm 1)."""
    config = run.config
    progress = run.progress
    while True:
        with log.paused():
            evaluate_and_save(run, log, stop)
        if progress.step == config.total_steps:
            return
        stop.check()

        online = progress.step >= config.offline_iterations
        if online and progress.steps_owed == 0:
            log.write(progress.step, run.play(stop))
        for kind in run.agent.kinds_to_compile(online):  # on a batch that is not learned from
            with log.paused("compiling"), stop.at_once(), machine.kept_random_states():
                run.agent.compute_gradients(run.sample(online), kind)
        train_step(run, online)
        log.advance()
        if progress.step % config.log_freq == 0 or progress.step == config.total_steps:
            log.write_means(progress.step, run.metrics)
        if progress.step % config.log_freq == 0:  # kept at the end, in case the run is extended
            run.metrics.reset()


# ---------------------------------------------------------------------------- command line
NETWORKS = """env hidden_dim n_critics q_n_hidden_layers actor_n_hidden_layers
    critic_layer_norm actor_layer_norm"""
# Conditions between options, and the same in words.
RANGES: Ranges = [
    ("discount", lambda x, c: x < 1 or not c.is_sparse_reward, "below 1 for is_sparse_reward"),
    ("n_target_critics", lambda x, c: x is None or x <= c.n_critics, "n_critics or fewer"),
    ("mixing_ratio", lambda x, c: x < 1 or not c.online_iterations, "below 1 to train online"),
    ("cql_clip_diff_max", lambda x, c: x >= c.cql_clip_diff_min, "cql_clip_diff_min or more"),
]


def parse_config(args: Optional[list[str]] = None) -> Config:
    """The options of a command line; raises `InputError` for the first that is wrong."""
    return ConfigParser(Config, RANGES).parse_args(args)


def run_name(config: Config) -> str:
    """Name of the run and its directory; the same options give the same name."""
    return name_run(f"{config.name}-{config.env}-seed{config.seed}", identify(config))


def main() -> None:
    """Start or resume the run of the command line's options.

    Raises `InputError` for wrong input, before anything is written; later `RunError` or `Stop`.
    """
    stop = StopSignals()
    with stop.at_once():
        config = parse_config()
        name = run_name(config)
        task = tasks.make(config.env, config.dataset_path)
        with open_directory(config.checkpoints_path, name, config.resume) as directory:
            run = make_run(config, task, directory)
        machine.keep_freed_memory()
        print(f"{name}: {run.summary()}")
        log = Log(directory, name, vars(config), run.progress.step)
    try:
        with saved_on_failure(directory, run.save):
            train(run, log, stop)
            with stop.at_once():
                log.close(patience=60.0)
        if directory:
            print(directory.closing_line())
    finally:
        run.workers.close()
        log.close(patience=1.0)  # when stopping there is no time to wait


if __name__ == "__main__":
    os._exit(run_program(main, "cal_ql.py", goes_on=True))  # else W&B's threads are waited for
