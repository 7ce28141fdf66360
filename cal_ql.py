"""Cal-QL: calibrated offline pre-training, then online fine-tuning, in one file.

Cal-QL (Nakamoto et al., 2023, arXiv 2303.05479) is CQL (Kumar et al., 2020, arXiv 2006.04779)
with one change. For each critic Q the objective is

    TD error of Q
    + alpha * ( logsumexp_a max(Q(s, a), V(s)) - Q(s, a_data) )

where a runs over sampled actions, the max applies to the policy's actions alone, and V(s) is the
return-to-go of the behaviour policy that produced s. CQL pushes Q below the true returns; that max
stops the push at a return that was really achieved, so fine-tuning has nothing to unlearn.

    python cal_ql.py --config_path configs/quickstart.yaml
    python cal_ql.py --config_path configs/antmaze.yaml --env antmaze-large-play-v2 --seed 1
    python cal_ql.py --help

Each section needs only those above it: configuration, returns and buffers, networks, losses and
agent, episodes, logging, training. What it trains on is in tasks.py; what surrounds a run (command
line, directory on disk, signals, W&B), in runs.py.
"""

import os
import signal

if __name__ == "__main__":  # the imports take seconds, and PID 1 ignores what it has no handler for
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os._exit(128 + number))

import copy
import ctypes
import hashlib
import json
import math
import multiprocessing
import pickle
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import tasks
from runs import machine
from runs.directory import RunDirectory, load_checkpoint
from runs.errors import InputError, RunError, run_program
from runs.log import Wandb
from runs.options import ConfigParser, FilePath, Ranges
from runs.signals import Stop, StopSignals, blocked_signals
from tasks import Task

machine.flush_denormals()


class Batch(NamedTuple):
    """Transitions, as torch tensors or numpy arrays. S and A are the sizes of the two spaces."""

    observations: Any  # [B, S]
    actions: Any  # [B, A], in [-1, 1]
    rewards: Any  # [B], scaled and shifted
    next_observations: Any  # [B, S]
    terminals: Any  # [B], 1 where the episode terminated; a time limit's truncation is no terminal
    returns_to_go: Any  # [B], discounted


# ---------------------------------------------------------------------------- configuration


@dataclass
class Config:
    device: str = "cuda"  # Where the networks live: cuda, cuda:N, cpu or auto
    precision: Optional[str] = None  # float32 or tf32; null is tf32 on CUDA, float32 on the CPU
    compile: bool = False  # Compile the losses and their gradients by torch.compile
    env: str = "halfcheetah-medium-expert-v2"  # Task name
    seed: int = 0  # Seed of the networks, batches, exploration and training episodes
    eval_seed: int = 0  # Seed of the evaluation episodes; every evaluation plays the same ones
    eval_freq: int = 5000  # Steps between two evaluations
    n_episodes: int = 10  # Episodes per evaluation
    eval_workers: Optional[int] = None  # Processes that play them; null is one per core, at most 8
    offline_iterations: int = 1_000_000  # Updates in the offline phase
    online_iterations: int = 1_000_000  # Environment steps in the online phase
    checkpoints_path: Optional[FilePath] = None  # Folder of the run's directory; null saves nothing
    checkpoint_freq: Optional[int] = None  # Steps between two checkpoints; null is eval_freq
    resume: bool = True  # Continue the run that checkpoints_path holds; false refuses to touch it
    load_model: FilePath = ""  # Checkpoint whose networks, temperatures and scaling a new run takes

    buffer_size: int = 2_000_000  # Capacity of each replay buffer, at least the dataset's size
    batch_size: int = 256  # Transitions per update
    discount: float = 0.99  # Discount factor
    alpha_multiplier: float = 1.0  # Multiplier of the entropy temperature
    use_automatic_entropy_tuning: bool = True  # Learn the entropy temperature
    backup_entropy: bool = False  # Subtract the entropy term from the TD target
    policy_lr: float = 3e-5  # Learning rate of the actor and of the entropy temperature
    qf_lr: float = 3e-4  # Learning rate of the critics and of the Lagrange multiplier
    soft_target_update_rate: float = 5e-3  # Rate at which the target critics follow the critics
    bc_steps: int = 0  # First updates, in which the actor clones the data's actions
    target_update_period: int = 1  # Updates between two updates of the target critics

    cql_alpha: float = 10.0  # Weight of the CQL regularizer in the offline phase
    cql_alpha_online: float = 10.0  # Weight of the CQL regularizer in the online phase
    cql_n_actions: int = 10  # Actions sampled per state: random, of the policy, of the next policy
    cql_importance_sample: bool = True  # Weigh the sampled actions by their inverse density
    cql_lagrange: bool = False  # Tune the regularizer's weight by a Lagrange multiplier
    cql_target_action_gap: float = -1.0  # CQL difference at which the multiplier rests
    cql_temp: float = 1.0  # Temperature of the logsumexp
    cql_max_target_backup: bool = False  # TD target from the best of cql_n_actions next actions
    cql_clip_diff_min: float = -math.inf  # Lower clip of the CQL difference
    cql_clip_diff_max: float = math.inf  # Upper clip of the CQL difference
    calibrate: bool = True  # Policy actions' Q is at least the return-to-go; false is plain CQL
    calibrate_online: bool = True  # Calibrate in the online phase too; false is what CORL does

    orthogonal_init: bool = True  # Orthogonal initialisation of the networks
    normalize: bool = True  # Standardise observations by the dataset's mean and deviation
    normalize_reward: bool = False  # Divide rewards by the range of returns (locomotion only)
    q_n_hidden_layers: int = 2  # Hidden layers of the critics
    actor_n_hidden_layers: int = 3  # Hidden layers of the actor
    hidden_dim: int = 256  # Units of every hidden layer
    critic_layer_norm: bool = False  # LayerNorm in every hidden layer of the critics
    reward_scale: float = 1.0  # Factor of every reward, offline and online
    reward_bias: float = 0.0  # Added to every scaled reward
    is_sparse_reward: bool = False  # A failed episode is taken to go on failing for ever
    mixing_ratio: float = 0.5  # Share of offline data in the online phase's batches
    online_utd_ratio: int = 1  # Updates per environment step in the online phase
    dataset_path: Optional[FilePath] = None  # The task's data, a file or folder; null: published

    log_freq: int = 1000  # Steps over which metrics are averaged before they are logged
    project: str = "CORL"  # Weights & Biases project
    group: str = "Cal-QL-D4RL"  # Weights & Biases group
    name: str = "Cal-QL"  # First part of the run's name

    @property
    def total_steps(self) -> int:
        return self.offline_iterations + self.online_iterations

    def is_due(self, step: int, freq: Optional[int]) -> bool:
        """Whether what is done every `freq` steps, and at the phases' ends, is done at `step`."""
        phase_ends = self.offline_iterations, self.total_steps
        return step in phase_ends or step % (freq or self.eval_freq) == 0

    @property
    def online_batch_size(self) -> int:
        """Online transitions in a batch of the online phase; the rest are offline ones."""
        return self.batch_size - int(self.batch_size * self.mixing_ratio)


# Options, what must hold for a value (in a config), and the same in words.
RANGES: Ranges = [
    ("eval_freq n_episodes log_freq online_utd_ratio", lambda x, _: x >= 1, "1 or more"),
    ("buffer_size batch_size target_update_period", lambda x, _: x >= 1, "1 or more"),
    ("cql_n_actions hidden_dim", lambda x, _: x >= 1, "1 or more"),
    ("q_n_hidden_layers actor_n_hidden_layers", lambda x, _: x >= 1, "1 or more"),
    ("checkpoint_freq eval_workers", lambda x, _: x is None or x >= 1, "1 or more, or null"),
    ("offline_iterations online_iterations bc_steps", lambda x, _: x >= 0, "0 or more"),
    ("seed eval_seed", lambda x, _: 0 <= x < 2**32, "0 to 2**32 - 1"),
    ("cql_alpha cql_alpha_online alpha_multiplier", lambda x, _: 0 <= x < math.inf, "0 or more"),
    ("policy_lr qf_lr cql_temp", lambda x, _: 0 < x < math.inf, "a number above 0"),
    ("reward_scale reward_bias", lambda x, _: math.isfinite(x), "a finite number"),
    ("cql_target_action_gap", lambda x, _: math.isfinite(x), "a finite number"),
    ("discount soft_target_update_rate mixing_ratio", lambda x, _: 0 <= x <= 1, "0 to 1"),
    ("discount", lambda x, c: x < 1 or not c.is_sparse_reward, "below 1 for is_sparse_reward"),
    ("mixing_ratio", lambda _, c: c.online_batch_size or not c.online_iterations, "less"),
    ("cql_clip_diff_min", lambda x, _: not math.isnan(x), "a number"),
    ("cql_clip_diff_max", lambda x, c: x >= c.cql_clip_diff_min, "cql_clip_diff_min or more"),
    ("device", lambda x, _: re.fullmatch(r"auto|cpu|cuda(:\d+)?", x), "cuda, cuda:N, cpu or auto"),
    ("precision", lambda x, _: x in (None, "float32", "tf32"), "float32, tf32 or null"),
    ("name", lambda x, _: x and "/" not in x, "a name without /, as it begins a directory's"),
    ("checkpoints_path dataset_path", lambda x, _: x != "", "a path or null"),
]


# ---------------------------------------------------------------------------- returns and buffers


def return_to_go(
    rewards: np.ndarray, ends: np.ndarray, discount: float, failure_reward: Optional[float] = None
) -> np.ndarray:
    """Discounted sum of rewards from each row to the end of its episode: the paper's V(s).

    Args:
        rewards: [N], scaled and shifted.
        ends: [N] bool, the last row of each episode.
        discount: the factor per step.
        failure_reward: in sparse tasks, the most that a step without success yields. An episode
            with no larger reward has failed, and is taken to go on for ever as it was on average:
            mean reward / (1 - discount).

    Returns [N] float32. A dense episode's sum stops where a time limit cut it, so that with
    negative rewards the bound is too high there.
    """
    sums, future = np.empty(len(rewards)), 0.0
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


class Scaling(NamedTuple):
    """From the task's observations and rewards to those that the networks see, in both phases."""

    observation_mean: np.ndarray  # [S]
    observation_std: np.ndarray  # [S]
    reward_scale: float
    reward_bias: float

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return (observation - self.observation_mean) / self.observation_std

    def reward(self, reward: Any) -> Any:
        """In float32 throughout, so that equal rewards stay equal."""
        return np.float32(reward) * np.float32(self.reward_scale) + np.float32(self.reward_bias)


def scaling_of(
    rows: dict[str, np.ndarray], ends: np.ndarray, config: Config, task: Task
) -> Scaling:
    """What `normalize`, `normalize_reward`, `reward_scale` and `reward_bias` make of the data."""
    mean, std, scale = np.zeros(1, np.float32), np.ones(1, np.float32), config.reward_scale
    if config.normalize:
        mean, std = (f(rows["observations"], 0, np.float64) for f in (np.mean, np.std))
        mean, std = mean.astype(np.float32), (std + 1e-3).astype(np.float32)
    if config.normalize_reward and task.is_locomotion:
        returns = np.add.reduceat(rows["rewards"], np.flatnonzero(np.r_[True, ends[:-1]]))
        scale *= task.max_episode_steps / (float(np.ptp(returns)) or 1.0)
    return Scaling(mean, std, scale, config.reward_bias)


class Dataset(NamedTuple):
    """The offline data on the training device, sampled uniformly with replacement."""

    rows: Batch  # tensors [N, ...], of which the last rows of cut episodes are no transitions
    transitions: Tensor  # [n] int, the rows that are
    n_episodes: int
    scaling: Scaling
    failure_reward: Optional[float]  # for `return_to_go`, scaled; None in dense tasks

    def sample(self, batch_size: int) -> Batch:
        n = len(self.transitions)
        rows = self.transitions[torch.randint(n, (batch_size,), device=self.transitions.device)]
        return Batch(*(column[rows] for column in self.rows))


def load_dataset(
    config: Config, task: Task, path: Path, device: torch.device, trained: dict[str, Any]
) -> Dataset:
    """The transitions of the file at `path`, scaled, with their returns-to-go.

    The last row of a truncated episode has no next observation, so it is no transition, but its
    reward counts in the return-to-go of the rows before. `trained` holds the mean and deviation
    of observations where networks are trained with such already. Raises `InputError` for a bad
    file, for options that do not suit it, and for values too large to train on.
    """
    if config.is_sparse_reward and task.failure_reward is None:
        raise InputError(f"is_sparse_reward: found true, expected false: {config.env} is dense")
    rows = task.rows(path)
    ends, cut = tasks.episode_ends(rows, task.max_episode_steps)
    if config.buffer_size < (n := np.count_nonzero(~cut)):
        found = f"buffer_size: found {config.buffer_size}, expected at least"
        raise InputError(f"{found} the {n} transitions of {path}")
    if n == 0:
        raise InputError(f"dataset {path}: it holds no transition, only ends of episodes")
    with np.errstate(all="ignore"):  # the check below names what overflows
        scaling = scaling_of(rows, ends, config, task)._replace(**trained)
        rows["rewards"] = rewards = scaling.reward(rows["rewards"])
        failure = float(scaling.reward(task.failure_reward)) if config.is_sparse_reward else None
        rows["returns_to_go"] = return_to_go(rewards, ends, config.discount, failure)
        # one observation more, so that the next ones are a view: none is stored twice
        padded = np.append(rows["observations"], rows["observations"][-1:], 0)
        rows["observations"] = scaling.observation(padded)
        if "next_observations" in rows:
            rows["next_observations"] = scaling.observation(rows["next_observations"])
    for name in Batch._fields:
        if name in rows and not (largest := np.abs(rows[name]).max()) < 1e18:
            raise InputError(
                f"dataset {path}: {name} as scaled reach {largest:.3g}, expected less than 1e18, "
                "whose square float32 can hold; check the file, reward_scale and normalize"
            )
    columns = {k: torch.as_tensor(v, device=device) for k, v in rows.items() if k in Batch._fields}
    columns.setdefault("next_observations", columns["observations"][1:])
    columns["observations"] = columns["observations"][:-1]
    columns["terminals"] = columns["terminals"].float()
    transitions = torch.as_tensor(np.flatnonzero(~cut), device=device)
    return Dataset(Batch(**columns), transitions, int(ends.sum()), scaling, failure)


class OnlineBuffer:
    """A ring of the transitions of ended episodes, sampled uniformly with replacement.

    It wraps at `buffer_size` alone, and has room for no more than the run can fill.
    """

    def __init__(self, config: Config, task: Task, device: torch.device):
        self.capacity = min(config.buffer_size, config.online_iterations + task.max_episode_steps)
        s, a = (task.observation_dim,), (task.action_dim,)
        shapes = Batch(s, a, (), s, (), ())
        self.rows = Batch(*(torch.zeros(self.capacity, *shape, device=device) for shape in shapes))
        self.n_added = 0  # transitions

    def add(self, transitions: Batch) -> None:
        """Store transitions, numpy arrays [n, ...], over the oldest."""
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


def sample_mixed(offline: Dataset, online: OnlineBuffer, config: Config) -> Batch:
    """A batch of the online phase: `mixing_ratio` of it offline data, the rest online."""
    n = config.online_batch_size
    pairs = zip(offline.sample(config.batch_size - n), online.sample(n))
    return Batch(*(torch.cat(pair) for pair in pairs))


# ---------------------------------------------------------------------------- networks


def make_layers(sizes: list[int], orthogonal: bool) -> list[nn.Linear]:
    """Linear layers with their initial weights; the last one's outputs start close to zero."""
    layers = [nn.Linear(*pair) for pair in zip(sizes, sizes[1:])]
    for layer in layers:
        gain = 0.01 if layer is layers[-1] else math.sqrt(2.0)
        if orthogonal:
            nn.init.orthogonal_(layer.weight, gain)
        elif layer is layers[-1]:
            nn.init.xavier_uniform_(layer.weight, gain)
        if orthogonal or layer is layers[-1]:
            nn.init.zeros_(layer.bias)
    return layers


CPU_CACHE = 2**18  # values of a layer that a CPU keeps at hand, so larger batches go in pieces


class Critic(nn.Module):
    """The twin Q-functions as one ensemble: every parameter has a leading axis of 2."""

    def __init__(self, observation_dim: int, action_dim: int, config: Config):
        super().__init__()
        hidden = [config.hidden_dim] * config.q_n_hidden_layers
        sizes = [observation_dim + action_dim, *hidden, 1]
        pairs = list(zip(*(make_layers(sizes, config.orthogonal_init) for _ in range(2))))
        self.weights = nn.ParameterList(torch.stack([a.weight.T, b.weight.T]) for a, b in pairs)
        self.biases = nn.ParameterList(torch.stack([a.bias, b.bias])[:, None] for a, b in pairs)
        normalized = [x for x in self.biases[:-1] if config.critic_layer_norm]
        self.norm_scales = nn.ParameterList(torch.ones_like(x) for x in normalized)
        self.norm_shifts = nn.ParameterList(torch.zeros_like(x) for x in normalized)
        self.observation_dim = observation_dim

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Q-values [2, B, N] of N actions [B, N, A] in each observation [B, S]."""
        batch_size, n_actions, action_dim = actions.shape
        n_states = max(1, CPU_CACHE // (n_actions * self.weights[0].shape[-1]))
        eager = actions.device.type == "cpu" and not torch.compiler.is_compiling()
        if eager and n_states < batch_size:
            pieces = zip(observations.split(n_states), actions.split(n_states))
            return torch.cat([self.forward(*piece) for piece in pieces], 1)
        # the first layer is linear in (s, a): its share of s is computed once per state
        of_state, of_action = self.weights[0].split([self.observation_dim, action_dim], dim=1)
        x = torch.matmul(actions.flatten(0, 1), of_action).unflatten(1, (batch_size, n_actions))
        x = x + (torch.matmul(observations, of_state) + self.biases[0]).unsqueeze(2)
        x = self.activation(x, 0).flatten(1, -2)  # [2, B * N, hidden]
        for layer in range(1, len(self.weights) - 1):
            x = self.activation(torch.baddbmm(self.biases[layer], x, self.weights[layer]), layer)
        qs = torch.baddbmm(self.biases[-1], x, self.weights[-1])
        return qs.view(2, batch_size, n_actions)

    def activation(self, x: Tensor, layer: int) -> Tensor:
        """ReLU of a hidden layer's values [2, ..., hidden], normalised where that is wanted."""
        if self.norm_scales:
            x = F.layer_norm(x.flatten(1, -2), x.shape[-1:])
            x = torch.addcmul(self.norm_shifts[layer], x, self.norm_scales[layer])
        return x.relu_()


class Gaussian(NamedTuple):
    """The policy's distributions before the tanh, one per observation."""

    mean: Tensor  # [B, A]
    log_std: Tensor  # [B, A]


class Actor(nn.Module):
    """The policy: a Gaussian of state-dependent mean and deviation, squashed by tanh."""

    def __init__(self, observation_dim: int, action_dim: int, config: Config):
        super().__init__()
        hidden = [config.hidden_dim] * config.actor_n_hidden_layers
        sizes = [observation_dim, *hidden, 2 * action_dim]
        self.layers = nn.ModuleList(make_layers(sizes, config.orthogonal_init))
        self.log_std_multiplier = nn.Parameter(torch.tensor(1.0))
        self.log_std_offset = nn.Parameter(torch.tensor(-1.0))

    def forward(self, observations: Tensor) -> Gaussian:
        x = observations
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        mean, log_std = self.layers[-1](x).chunk(2, dim=-1)
        log_std = self.log_std_multiplier * log_std + self.log_std_offset
        return Gaussian(mean, log_std.clamp(-20.0, 2.0))


class Sample(NamedTuple):
    """Actions of the policy, N per observation (or one: then without that axis)."""

    actions: Tensor  # [B, N, A]
    log_density: Tensor  # [B, N]


def sample_actions(policy: Gaussian, noise: Tensor) -> Sample:
    """Actions tanh(mean + std * noise) for standard normal noise [B, A] or [B, N, A]."""
    if noise.ndim == 3:
        policy = Gaussian(policy.mean.unsqueeze(1), policy.log_std.unsqueeze(1))
    pre_tanh = policy.mean + policy.log_std.exp() * noise
    return Sample(torch.tanh(pre_tanh), squashed_log_density(pre_tanh, noise, policy.log_std))


def action_log_density(policy: Gaussian, actions: Tensor) -> Tensor:
    """Log-density [B] of given actions [B, A], kept off the edge, where it is infinite."""
    pre_tanh = torch.atanh(actions.clamp(-1.0 + 1e-6, 1.0 - 1e-6))
    noise = (pre_tanh - policy.mean) * torch.exp(-policy.log_std)
    return squashed_log_density(pre_tanh, noise, policy.log_std)


def squashed_log_density(pre_tanh: Tensor, noise: Tensor, log_std: Tensor) -> Tensor:
    """log N(noise; 0, 1) - log std - log(1 - tanh(pre_tanh)^2), summed over action dimensions."""
    gaussian = -0.5 * noise.square() - 0.5 * math.log(2.0 * math.pi) - log_std
    log_jacobian = 2.0 * (math.log(2.0) - pre_tanh - F.softplus(-2.0 * pre_tanh))
    return (gaussian - log_jacobian).sum(-1)


class Noise(NamedTuple):
    """All that is random in an update: standard normal, but for the uniform random actions."""

    policy: Tensor  # [B, A], action of the actor's loss
    current: Tensor  # [B, N, A], policy actions at s in the CQL term
    next: Tensor  # [B, N, A], policy actions at s' in the CQL term
    target: Tensor  # [B, N or 1, A], policy actions at s' in the TD target
    random: Tensor  # [B, N, A], uniform on [-1, 1]


# ---------------------------------------------------------------------------- losses and agent

Scalars = dict[str, Tensor]


class Agent(nn.Module):
    """Actor, twin critics, their targets and temperatures; their losses and their update.

    A loss method returns losses, by the name of what each trains, and metrics.
    """

    def __init__(self, observation_dim: int, action_dim: int, config: Config, device: torch.device):
        super().__init__()
        self.config, self.device, self.action_dim = config, device, action_dim
        self.actor = Actor(observation_dim, action_dim, config)
        self.critic = Critic(observation_dim, action_dim, config)
        self.target_critic = copy.deepcopy(self.critic)
        self.log_alpha = nn.Parameter(torch.tensor(0.0))  # entropy temperature
        self.log_alpha_prime = nn.Parameter(torch.tensor(1.0))  # Lagrange multiplier
        self.to(device)
        self.updates = 0
        groups = {  # what each loss trains, and its learning rate
            "critic": (self.critic.parameters(), config.qf_lr),
            "actor": (self.actor.parameters(), config.policy_lr),
            "alpha": ([self.log_alpha], config.policy_lr),
            "alpha_prime": ([self.log_alpha_prime], config.qf_lr),
        }
        self.trained = {name: list(parameters) for name, (parameters, _) in groups.items()}
        options = {"fused": True, "capturable": device.type == "cuda"}  # its steps counted there
        self.optimizer = torch.optim.Adam(
            [{"params": self.trained[name], "lr": lr} for name, (_, lr) in groups.items()],
            **options,
        )
        self.compiled: Optional[Callable] = None
        if config.compile:
            torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad, in the graph
            options = {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead"}
            self.compiled = torch.compile(self.losses_and_gradients, **options)

    @property
    def alpha(self) -> Tensor:
        """The entropy temperature, a constant to the losses that it weighs in."""
        return self.config.alpha_multiplier * self.log_alpha.detach().exp()

    def critic_loss(
        self,
        batch: Batch,
        random: Tensor,  # [B, N, A], uniform actions
        sample: Sample,  # 2 N actions per state: of the policy at s, of the policy at s'
        next_sample: Sample,  # actions of the policy at s' for the TD target, 1 or N
        cql_alpha: float,
        calibrated: bool,
    ) -> tuple[Scalars, Scalars]:
        """TD error + cql_alpha * (logsumexp_a max(Q(s, a), V(s)) - Q(s, a_data)), of both critics.

        With importance sampling each value is weighed by the inverse of its action's density (CQL,
        appendix F); without, the data's action joins the sampled ones.
        """
        config, n = self.config, self.config.cql_n_actions
        with torch.no_grad():  # the TD target, by the best of the next actions
            next_qs = self.target_critic(batch.next_observations, next_sample.actions)
            next_q, best = next_qs.amin(0).max(-1)  # [B]
            if config.backup_entropy:
                log_density = next_sample.log_density.gather(-1, best[:, None])[:, 0]
                next_q = next_q - self.alpha * log_density
            target_q = batch.rewards + config.discount * (1.0 - batch.terminals) * next_q

        actions = torch.cat([batch.actions[:, None], random, sample.actions], 1)
        qs = self.critic(batch.observations, actions)  # [2, B, 1 + 3 N], in one pass
        data_q, random_q, policy_q = qs[..., 0], qs[..., 1 : 1 + n], qs[..., 1 + n :]
        td_error = (data_q - target_q).square().mean(-1)  # [2]

        if calibrated:
            policy_q = torch.maximum(policy_q, batch.returns_to_go[:, None])  # Cal-QL, eq. 5.1
        if config.cql_importance_sample:
            log_uniform = -self.action_dim * math.log(2.0)  # on [-1, 1]^A
            values = [random_q - log_uniform, policy_q - sample.log_density]
        else:
            values = [random_q, policy_q, data_q[..., None]]
        soft_max = config.cql_temp * torch.logsumexp(torch.cat(values, -1) / config.cql_temp, -1)
        difference = (soft_max - data_q).clamp(config.cql_clip_diff_min, config.cql_clip_diff_max)
        difference = difference.mean(-1)  # [2]
        regularizer, losses, metrics = self.weigh(difference, cql_alpha)
        losses["critic"] = (td_error + regularizer).sum()

        pairs = {"qf{}_loss": td_error, "cql_qf{}_diff": difference}
        pairs |= {"cql_min_qf{}_loss": regularizer, **q_metrics(qs, policy_q, batch.returns_to_go)}
        for name, (first, second) in pairs.items():
            metrics |= {name.format(1): first, name.format(2): second}
        return losses, metrics | {"average_target_q": next_q.mean()}

    def weigh(self, difference: Tensor, cql_alpha: float) -> tuple[Tensor, Scalars, Scalars]:
        """The critics' regularizers from their CQL differences, [2] both.

        Under `cql_lagrange` the multiplier alpha' is trained here: it grows while the differences
        exceed the gap (CQL, section 4).
        """
        alpha_prime = alpha_prime_loss = difference.new_zeros(())
        regularizer, losses = cql_alpha * difference, {}
        if self.config.cql_lagrange:
            excess = cql_alpha * (difference - self.config.cql_target_action_gap)
            alpha_prime = self.log_alpha_prime.exp().clamp(max=1e6)
            losses["alpha_prime"] = alpha_prime_loss = -0.5 * (alpha_prime * excess.detach()).sum()
            regularizer = alpha_prime.detach() * excess
        metrics = {"alpha_prime": alpha_prime, "alpha_prime_loss": alpha_prime_loss}
        return regularizer, losses, metrics

    def actor_loss(
        self, batch: Batch, policy: Gaussian, noise: Tensor, cloning: bool
    ) -> tuple[Scalars, Scalars]:
        """mean(alpha * log pi(a|s) - min_i Q_i(s, a)), and the loss of the temperature alpha.

        While cloning, the log-density of the data's actions stands for Q. The temperature grows
        while the entropy is below its target, -A.
        """
        actions, log_density = sample_actions(policy, noise)
        if cloning:
            value = action_log_density(policy, batch.actions)  # [B]
        else:
            value = self.critic(batch.observations, actions[:, None]).amin(0)[:, 0]  # [B]
        losses = {"actor": (self.alpha * log_density - value).mean()}
        alpha_loss = torch.zeros_like(self.alpha)
        if self.config.use_automatic_entropy_tuning:
            excess = log_density.detach() - self.action_dim  # of the target over the entropy
            losses["alpha"] = alpha_loss = -(self.log_alpha * excess).mean()
        metrics = {"policy_loss": losses["actor"], "alpha_loss": alpha_loss, "alpha": self.alpha}
        return losses, metrics | {"log_pi": log_density.mean()}

    def losses(
        self, batch: Batch, noise: Noise, cql_alpha: float, calibrated: bool, cloning: bool
    ) -> tuple[Scalars, Scalars]:
        """All losses and metrics of an update."""
        policy = self.actor(batch.observations)  # one pass serves all the actions sampled in s
        with torch.no_grad():
            next_policy = self.actor(batch.next_observations)
            current, following = (policy, noise.current), (next_policy, noise.next)
            samples = sample_actions(*current), sample_actions(*following)
            sample = Sample(*(torch.cat(pair, 1) for pair in zip(*samples)))
            next_sample = sample_actions(next_policy, noise.target)
        losses, metrics = self.actor_loss(batch, policy, noise.policy, cloning)
        of_critic = self.critic_loss(
            batch, noise.random, sample, next_sample, cql_alpha, calibrated
        )
        metrics |= {"average_return_to_go": batch.returns_to_go.mean(), **of_critic[1]}
        return losses | of_critic[0], metrics

    def losses_and_gradients(self, *args: Any) -> tuple[dict[str, tuple[Tensor, ...]], Scalars]:
        """For the arguments of `losses`, the gradients of what each loss trains, and the metrics.

        A function of tensors, which one captured graph can hold: nothing here waits for the
        device, metrics stay there, and no branch looks at a tensor.
        """
        losses, metrics = self.losses(*args)
        gradients = {k: torch.autograd.grad(loss, self.trained[k]) for k, loss in losses.items()}
        for name in ("critic", "actor"):
            norm = torch.nn.utils.get_total_norm(gradients[name])
            metrics[f"{name}_gradient_norm"] = norm
        return gradients, {name: value.detach() for name, value in metrics.items()}

    def compute(self, *args: Any) -> tuple[dict[str, tuple[Tensor, ...]], Scalars]:
        """`losses_and_gradients`, compiled where that is wanted and works."""
        if self.compiled:
            try:
                torch.compiler.cudagraph_mark_step_begin()
                return self.compiled(*args)
            except Exception as error:  # whatever a compiler raises
                reason = " ".join(str(error).split()[:40])
                print(f"compile: torch.compile fails, so the run goes on eagerly ({reason})")
                self.compiled = None
        return self.losses_and_gradients(*args)

    def draw_noise(self) -> Noise:
        b, n, a = self.config.batch_size, self.config.cql_n_actions, self.action_dim
        normal, n_target = torch.randn, n if self.config.cql_max_target_backup else 1
        return Noise(
            policy=normal(b, a, device=self.device),
            current=normal(b, n, a, device=self.device),
            next=normal(b, n, a, device=self.device),
            target=normal(b, n_target, a, device=self.device),
            random=torch.rand(b, n, a, device=self.device) * 2.0 - 1.0,
        )

    def update(self, batch: Batch, online: bool) -> Scalars:
        """One gradient step of all that is learned, on a batch; returns the metrics."""
        config = self.config
        cql_alpha = config.cql_alpha_online if online else config.cql_alpha
        calibrated = config.calibrate and (config.calibrate_online or not online)
        cloning = self.updates < config.bc_steps
        noise = self.draw_noise()
        gradients, metrics = self.compute(batch, noise, cql_alpha, calibrated, cloning)
        for name, values in gradients.items():
            for parameter, gradient in zip(self.trained[name], values):
                parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()  # where the update is a captured graph, it owns that memory
        self.updates += 1
        if self.updates % config.target_update_period == 0:
            targets, critics = self.target_critic.parameters(), self.critic.parameters()
            with torch.no_grad():
                torch._foreach_lerp_(list(targets), list(critics), config.soft_target_update_rate)
        return metrics

    def actor_on_cpu(self) -> Actor:
        return copy.deepcopy(self.actor).cpu()


@torch.no_grad()
def q_metrics(qs: Tensor, policy_q: Tensor, returns_to_go: Tensor) -> Scalars:
    """Metrics [2], one per critic, of values [2, B, 1 + 3 N]: data's, random and policy actions.

    `policy_q` [2, B, 2 N] are the policy actions' values as calibrated, where that is on.
    """
    n = policy_q.shape[-1] // 2
    below = (qs[..., 1 + n :] < returns_to_go[:, None]).float()
    return {
        "average_qf{}": qs[..., 0].mean(-1),
        "cql_q{}_rand": qs[..., 1 : 1 + n].mean((1, 2)),
        "cql_q{}_current_actions": policy_q[..., :n].mean((1, 2)),
        "cql_q{}_next_actions": policy_q[..., n:].mean((1, 2)),
        "bound_rate_cql_q{}_current_actions": below[..., :n].mean((1, 2)),
        "bound_rate_cql_q{}_next_actions": below[..., n:].mean((1, 2)),
        "cql_std_q{}": torch.cat([qs[..., : 1 + n], policy_q], -1).std(-1).mean(-1),
    }


# ---------------------------------------------------------------------------- episodes


class EnvironmentFailure(RunError):
    """The environment failed; the run can be saved."""


class Episode(NamedTuple):
    """An ended episode of T steps."""

    observations: np.ndarray  # [T + 1, S], scaled
    actions: np.ndarray  # [T, A], in [-1, 1]
    rewards: list[float]  # [T], the task's own, not scaled
    terminal: bool  # ended by the task; else by the time limit
    success: bool
    score: float


def episode_seed(seed: int, purpose: str, number: int) -> int:
    """Seed of one episode: a function of the run's seed and the episode's number alone."""
    entropy = (seed, ("train", "eval").index(purpose), number)
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


@torch.no_grad()
def play_episode(task: Task, actor: Actor, scaling: Scaling, seed: int, explore: bool) -> Episode:
    """Play the episode of `seed` by samples of a policy on the CPU, or else by its means.

    The outcome is a function of the arguments alone. Raises `EnvironmentFailure` for whatever the
    simulator raises, and where it yields numbers that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    observations, actions, rewards, success, terminal, truncated = [], [], [], False, False, False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more gain nothing here, and would spin on other workers' cores
    try:
        observations.append(scaling.observation(task.reset(seed)))
        while not (terminal or truncated):
            policy = actor(torch.from_numpy(observations[-1]))
            pre_tanh = policy.mean  # [A]
            if explore:
                noise = torch.randn(pre_tanh.shape, generator=generator)
                pre_tanh = pre_tanh + policy.log_std.exp() * noise
            actions.append(torch.tanh(pre_tanh).numpy())
            observation, reward, terminal, truncated, reached = task.step(actions[-1])
            if not (math.isfinite(reward) and np.isfinite(observation).all()):
                raise ValueError(f"found reward {reward} and observation {observation}")
            observations.append(scaling.observation(observation))
            rewards.append(reward)
            success |= reached
        score = task.score(sum(rewards), success)
    except Exception as error:  # whatever a simulator raises
        where = f"step {len(rewards)} of the episode with seed {seed}"
        reason = f"{type(error).__name__}: {error}"
        raise EnvironmentFailure(f"the environment failed at {where} ({reason})") from error
    finally:
        torch.set_num_threads(threads)
    return Episode(np.stack(observations), np.stack(actions), rewards, terminal, success, score)


def start_worker(*task: Optional[str]) -> None:
    """Begin a process that plays evaluation episodes: it ends with its parent alone."""
    global worker_task
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if not multiprocessing.parent_process().is_alive():  # it was killed before that
        os._exit(1)
    worker_task = tasks.make(*task)


def play_in_worker(actor: bytes, scaling: Scaling, seed: int) -> Episode:
    return play_episode(worker_task, pickle.loads(actor), scaling, seed, explore=False)


class Evaluator:
    """Plays evaluation episodes with the policy's mean actions, in `eval_workers` processes.

    Each episode is played alone, so that its outcome does not depend on the number of processes.
    """

    def __init__(self, config: Config, task: Task):
        self.config, self.task = config, task
        wanted = config.eval_workers or min(machine.available_cores(), 8)
        self.n_workers = min(wanted, config.n_episodes)
        self.pool: Optional[ProcessPoolExecutor] = None  # started by the first evaluation

    def evaluate(self, actor: Actor, scaling: Scaling) -> list[Episode]:
        """The `n_episodes` of `eval_seed`, always the same ones.

        Raises `EnvironmentFailure` where an environment or a worker fails.
        """
        numbers, eval_seed = range(self.config.n_episodes), self.config.eval_seed
        seeds = [episode_seed(eval_seed, "eval", number) for number in numbers]
        if self.n_workers == 1:
            return [play_episode(self.task, actor, scaling, seed, explore=False) for seed in seeds]
        if self.pool is None:
            context = multiprocessing.get_context("spawn")  # a fork would copy threads and CUDA
            start = start_worker, (self.config.env, self.config.dataset_path)
            self.pool = ProcessPoolExecutor(self.n_workers, context, *start)
        packed = pickle.dumps(actor)  # as bytes: tensors would go through shared memory
        try:
            with blocked_signals():
                played = [self.pool.submit(play_in_worker, packed, scaling, s) for s in seeds]
            return [episode.result() for episode in played]
        except BrokenProcessPool:
            raise EnvironmentFailure("a process that plays evaluation episodes has died") from None

    def close(self) -> None:
        """End the workers, and drop what Python would otherwise report as left behind."""
        for process in multiprocessing.active_children():
            process.kill()
        if self.pool:
            self.pool.shutdown()
            self.pool = None


def transitions_of(episode: Episode, dataset: Dataset, discount: float) -> Batch:
    """Its T transitions, numpy arrays in float32, with their true returns-to-go."""
    rewards = dataset.scaling.reward(episode.rewards)
    ends = np.arange(len(rewards)) == len(rewards) - 1
    returns_to_go = return_to_go(rewards, ends, discount, dataset.failure_reward)
    terminals = (ends & episode.terminal).astype(np.float32)
    observations, next_observations = episode.observations[:-1], episode.observations[1:]
    return Batch(
        observations, episode.actions, rewards, next_observations, terminals, returns_to_go
    )


# ---------------------------------------------------------------------------- logging


class MeanMetrics:
    """Mean of each metric since the last reset; it stays on the device until it is fetched."""

    def __init__(self):
        self.names: list[str] = []
        self.count = 0
        self.total: Any = None  # [metrics]
        self.bad_step: Any = None  # [metrics], the first step at which each was not finite, or inf

    def add(self, metrics: Scalars, step: int) -> None:
        values = torch.stack(list(metrics.values()))
        bad_step = torch.where(values.isfinite(), math.inf, float(step))
        if self.count:
            values, bad_step = self.total + values, torch.minimum(self.bad_step, bad_step)
        self.names, self.total, self.bad_step = list(metrics), values, bad_step
        self.count += 1

    def check(self) -> None:
        """Wait for the device; raise `RunError` where a metric was not finite."""
        if self.count and not self.total.isfinite().all():
            step, index = self.bad_step.min(0)
            raise RunError(f"{self.names[index]} is not finite at step {step:.0f}")

    def means(self) -> dict[str, float]:
        self.check()
        return dict(zip(self.names, (self.total / self.count).tolist())) if self.count else {}


class Log:
    """Writes records to metrics.jsonl and W&B, and draws the progress bar."""

    def __init__(self, config: Config, directory: Optional[RunDirectory], step: int):
        self.config, self.directory = config, directory
        options = {"project": config.project, "group": config.group, "config": vars(config)}
        self.wandb = Wandb(directory, name=run_name(config), **options)
        interval = 0.5 if sys.stderr.isatty() else 30.0  # seconds; log files want few lines
        self.bar = tqdm(total=config.total_steps, initial=step, unit="step", mininterval=interval)
        self.shown: dict[str, str] = {}
        self.interval_start = time.perf_counter()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add one record, at a step counted from the start of the offline phase."""
        offline = self.config.offline_iterations
        phase = {"offline_iter": step} if step <= offline else {"online_iter": step - offline}
        record = {"step": step, **phase, **metrics}
        if self.directory:
            self.directory.add_record(record)
        self.wandb.send(record)
        if "eval/d4rl_normalized_score" in metrics:
            self.shown["score"] = f"{metrics['eval/d4rl_normalized_score']:.1f}"
        self.bar.set_description("offline" if step <= offline else "online", refresh=False)
        self.bar.set_postfix(self.shown, refresh=False)

    def write_means(self, step: int, metrics: MeanMetrics) -> None:
        """Add the update's metrics, averaged since their reset, and the rate of updates."""
        means = metrics.means()  # waits for the device
        rate = metrics.count / (time.perf_counter() - self.interval_start)
        self.interval_start = time.perf_counter()
        self.shown["updates"] = f"{rate:.0f}/s"
        self.write(step, {**means, "updates_per_second": rate})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile does not count as time of updates."""
        before = time.perf_counter()
        yield
        self.interval_start += time.perf_counter() - before

    def close(self, patience: float) -> None:
        """Give W&B at most `patience` seconds for what it has still to send."""
        self.bar.close()
        self.wandb.close(patience)


# ---------------------------------------------------------------------------- training


def parse_config(args: Optional[list[str]] = None) -> Config:
    """The options of a command line; raises `InputError` for the first that is wrong."""
    return ConfigParser(Config, RANGES).parse_args(args)


WHERE_AND_HOW_FAST = """device compile eval_workers checkpoints_path resume project group log_freq
    checkpoint_freq eval_freq n_episodes online_iterations""".split()


def identity(config: Config) -> dict[str, Any]:
    """What makes two commands the same run: the options that change what is learned.

    Only what differs from the defaults counts, so that new options leave old runs their names.
    The dataset counts by its file's or folder's name and size, wherever it lies; of
    Minari's root folder, the dataset of `env` alone.
    """
    options, default = dict(vars(config)), vars(Config())
    if config.dataset_path is not None:
        path = Path(config.dataset_path, config.env if "/" in config.env else "")
        files = [file for file in (path, *path.rglob("*")) if file.is_file()]
        options["dataset_path"] = [path.name, sum(file.stat().st_size for file in files)]
    free = WHERE_AND_HOW_FAST
    return {k: v for k, v in options.items() if k not in free and v != default[k]}


def run_name(config: Config) -> str:
    """Name of the run and its directory: equal for the same run, different for another."""
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()
    return f"{config.name}-{config.env}-seed{config.seed}-{digest[:8]}".replace("/", "-")


def resolve_device(config: Config) -> torch.device:
    """The device, set to the precision; raises `InputError` where this machine has none such."""
    count, name = torch.cuda.device_count(), config.device
    device = torch.device(name if name != "auto" else "cuda" if count else "cpu")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(
            f"device: found {name!r}, but this machine has {count} CUDA devices; "
            "take --device cpu or --device auto"
        )
    if config.precision == "tf32" and device.type != "cuda":
        raise InputError(f"precision: found tf32, expected float32 on {device}")
    torch.backends.cuda.matmul.allow_tf32 = config.precision != "float32"
    return device


def check_memory(config: Config, task: Task, device: torch.device) -> None:
    """Raise `InputError` where the networks and an update cannot fit into memory.

    By a lower bound, before anything is allocated: the kernel would kill the process later.
    """
    hidden, inputs = config.hidden_dim, task.observation_dim + task.action_dim
    critics = 2 * hidden * (inputs + hidden * (config.q_n_hidden_layers - 1))
    actor = hidden * (inputs + hidden * (config.actor_n_hidden_layers - 1))
    rows = config.batch_size * (1 + 3 * config.cql_n_actions)
    values = 2 * rows * hidden * config.q_n_hidden_layers  # kept for the gradient
    stored = min(config.buffer_size, config.online_iterations) * (2 * inputs - task.action_dim + 3)
    needed = 4 * (5 * critics + 4 * actor + values + stored)  # with gradients, Adam and targets
    if needed > (left := machine.available_memory(device)):
        names = "hidden_dim q_n_hidden_layers actor_n_hidden_layers batch_size cql_n_actions"
        names += " buffer_size online_iterations"
        sizes = ", ".join(f"{name} {getattr(config, name)}" for name in names.split())
        raise InputError(
            f"{sizes}: found {left / 1e9:,.1f} GB of memory left on {device}, expected at least "
            f"{needed / 1e9:,.1f} GB for these; take smaller ones"
        )


class Run:
    """All that a run's future depends on, from where its last checkpoint stands.

    A new run starts with what `load_model` names. Raises `InputError` for wrong options and data.
    """

    def __init__(self, config: Config, device: torch.device, task: Task, data: Path):
        self.config, self.device, self.task = config, device, task
        self.directory: Optional[RunDirectory] = None
        if config.checkpoints_path:
            path = Path(config.checkpoints_path) / run_name(config)
            self.directory = RunDirectory(path, config.resume)
        try:
            self.prepare(data)
        finally:  # wrong input leaves nothing behind
            if self.directory:
                self.directory.discard_unless_begun()

    def prepare(self, data: Path) -> None:
        config, task, directory = self.config, self.task, self.directory
        check_memory(config, task, self.device)
        model = saved = directory.load(self.device) if directory else None
        if saved and saved["identity"] != (mine := identity(config)):
            theirs = {**{name: getattr(Config(), name) for name in mine}, **saved["identity"]}
            other = {name: value for name, value in theirs.items() if mine.get(name) != value}
            raise InputError(f"checkpoints_path: {directory.path} holds a run with {other}")
        if not saved and config.load_model:
            model = load_checkpoint(Path(config.load_model), self.device, option="load_model")
        scaling = {k: v.cpu().numpy() for k, v in model["scaling"].items()} if model else {}
        self.dataset = load_dataset(config, task, data, self.device, scaling)
        machine.keep_freed_memory()
        torch.manual_seed(config.seed)
        self.online = OnlineBuffer(config, task, self.device)
        self.agent = Agent(task.observation_dim, task.action_dim, config, self.device)
        self.evaluator, self.metrics = Evaluator(config, task), MeanMetrics()
        self.step = 0  # updates in the offline phase, then environment steps
        self.updates_owed = 0  # steps of the last online episode that are not learned from yet
        self.episodes = self.failures = 0  # online episodes, and those without success
        self.evaluated_at = -1  # step
        if model:
            self.load_agent(model)
        if saved:
            self.load_rest(saved)
        self.saved = self.step, self.evaluated_at  # as of the newest checkpoint
        print(self.summary())
        if directory:
            directory.begin(vars(config), self.step)

    def load_agent(self, model: dict[str, Any]) -> None:
        """Take networks, temperatures and, where the checkpoint has it, the optimizer's state."""
        optimizer = self.agent.optimizer
        rates = [group["lr"] for group in optimizer.param_groups]
        try:
            self.agent.load_state_dict(model["agent"])
            if "optimizer" in model:
                optimizer.load_state_dict(model["optimizer"])
        except (ValueError, RuntimeError):
            names = "env hidden_dim q_n_hidden_layers actor_n_hidden_layers critic_layer_norm"
            theirs = {name: model["config"].get(name) for name in names.split()}
            raise InputError(
                f"load_model: {self.config.load_model} has networks for {theirs}, not this run's"
            ) from None
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate  # it is this run's options that count

    def load_rest(self, saved: dict[str, Any]) -> None:
        """Go on where the checkpoint stands."""
        vars(self).update(saved["counts"])
        self.agent.updates = saved["updates"]
        vars(self.metrics).update(saved["metrics"])
        widths = np.cumsum([column[0].numel() for column in self.online.rows])
        columns = np.split(self.directory.read_rows(widths[-1]), widths[:-1], axis=1)
        shapes = (column.shape[1:] for column in self.online.rows)
        self.online.add(Batch(*(c.reshape(-1, *shape) for c, shape in zip(columns, shapes))))
        torch.set_rng_state(saved["random_states"][0].cpu())
        for state in saved["random_states"][1:]:
            torch.cuda.set_rng_state(state.cpu(), self.device)

    def save(self) -> None:
        """Write a checkpoint, but never of a broken run."""
        self.metrics.check()
        if not self.directory:
            return
        counts = "step updates_owed episodes failures evaluated_at".split()
        scaling = {k: v for k, v in self.dataset.scaling._asdict().items() if "observation" in k}
        random_states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            random_states.append(torch.cuda.get_rng_state(self.device))
        state = {
            "identity": identity(self.config),
            "config": vars(self.config),
            "scaling": {name: torch.as_tensor(value) for name, value in scaling.items()},
            "step": self.step,
            "counts": {name: getattr(self, name) for name in counts},
            "updates": self.agent.updates,
            "agent": self.agent.state_dict(),
            "optimizer": self.agent.optimizer.state_dict(),
            "metrics": dict(vars(self.metrics)),
            "random_states": random_states,
        }
        self.directory.save(state, keep=(self.config.offline_iterations, self.config.total_steps))
        self.saved = self.step, self.evaluated_at

    def evaluate(self) -> dict[str, float]:
        """Mean and spread over evaluation episodes of the policy as it is."""
        episodes = self.evaluator.evaluate(self.agent.actor_on_cpu(), self.dataset.scaling)
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

        One that the environment breaks off counts as played, so that it is not tried for ever.
        """
        seed, scaling = episode_seed(self.config.seed, "train", self.episodes), self.dataset.scaling
        actor = self.agent.actor_on_cpu()
        try:
            with stop.at_once():
                episode = play_episode(self.task, actor, scaling, seed, explore=True)
        except EnvironmentFailure:
            self.episodes, self.failures = self.episodes + 1, self.failures + 1
            raise
        self.episodes, self.failures = self.episodes + 1, self.failures + (not episode.success)
        self.updates_owed = len(episode.rewards)
        transitions = transitions_of(episode, self.dataset, self.config.discount)
        self.online.add(transitions)
        if self.directory:
            columns = [column.reshape(len(column), -1) for column in transitions]
            self.directory.add_rows(np.concatenate(columns, 1))
        metrics = {
            "train/episode_return": float(sum(episode.rewards)),
            "train/d4rl_normalized_episode_return": episode.score,
            "train/episode_length": len(episode.rewards),
        }
        if self.task.has_goal:
            metrics["train/is_success"] = float(episode.success)
            metrics["train/regret"] = self.failures / self.episodes
        return metrics

    def summary(self) -> str:
        n, episodes = len(self.dataset.transitions), self.dataset.n_episodes
        bounds = self.dataset.rows.returns_to_go[self.dataset.transitions]
        return (
            f"{run_name(self.config)}: networks on {self.device}, physics by {self.task.physics}\n"
            f"{n:,} transitions of {episodes:,} episodes, returns-to-go from {bounds.min():.4g} "
            f"to {bounds.max():.4g}; starting at step {self.step:,} of {self.config.total_steps:,}"
        )


def train(run: Run, log: Log, stop: StopSignals) -> None:
    """Pre-train on the dataset; then, in turn, play an episode and learn from it (algorithm 1).

    Offline a step is an update; online an environment step and its `online_utd_ratio` updates.
    """
    config = run.config
    while run.step <= config.total_steps:
        with log.paused():
            if config.is_due(run.step, config.eval_freq) and run.evaluated_at != run.step:
                with stop.at_once():
                    scores = run.evaluate()
                run.evaluated_at = run.step
                log.write(run.step, scores)
            unsaved = run.step > 0 and run.saved != (run.step, run.evaluated_at)
            if config.is_due(run.step, config.checkpoint_freq) and unsaved:
                run.save()
        if run.step == config.total_steps:
            return
        stop.check()

        online = run.step >= config.offline_iterations
        if online and run.updates_owed == 0:
            log.write(run.step, run.play(stop))
        run.step += 1
        run.updates_owed -= online
        for _ in range(config.online_utd_ratio if online else 1):
            if online:
                batch = sample_mixed(run.dataset, run.online, config)
            else:
                batch = run.dataset.sample(config.batch_size)
            run.metrics.add(run.agent.update(batch, online), run.step)
        log.bar.update()
        if run.step % config.log_freq == 0 or run.step == config.total_steps:
            log.write_means(run.step, run.metrics)
        if run.step % config.log_freq == 0:  # at the end alone they go on, if the run is extended
            run.metrics.count = 0


def start(config: Config, stop: StopSignals) -> None:
    """Start or resume the run of these options, and see it through whatever may befall it.

    Raises `InputError` for wrong input, `RunError` for what ends the run later, and `Stop`, all
    with everything saved that can be.
    """
    with stop.at_once():
        device, task = resolve_device(config), tasks.make(config.env, config.dataset_path)
        run = Run(config, device, task, task.data_file(config.dataset_path))
        log = Log(config, run.directory, run.step)
    try:
        try:
            train(run, log, stop)
            with stop.at_once():
                log.close(patience=60.0)
        except (Stop, EnvironmentFailure):
            run.save()
            raise
    except (RunError, OSError, torch.OutOfMemoryError) as error:
        saved = run.directory.checkpoints() if run.directory else []
        last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint"
        raise RunError(f"{error}; {last}") from error
    finally:
        run.evaluator.close()
        log.close(patience=1.0)  # there is a hurry, or it is closed already


def run_command_line() -> None:
    stop = StopSignals()
    with stop.at_once():
        config = parse_config()
    start(config, stop)


def main() -> int:
    """Run the command line; returns its exit code."""
    return run_program(run_command_line, "cal_ql.py", goes_on=True)


if __name__ == "__main__":
    os._exit(main())  # at once: whatever of W&B hangs would be waited for
