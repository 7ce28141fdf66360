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

Each section needs only those above it: configuration, environments, dataset, replay buffer,
networks, losses, agent, episodes, run directory, logging, training.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import difflib
import fcntl
import hashlib
import http.client
import json
import math
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Optional, get_args

import h5py
import numpy as np
import pyrallis
import torch
import torch.nn.functional as F
import wandb
import yaml
from torch import Tensor, nn
from tqdm import tqdm

import d4rl_compat


class Batch(NamedTuple):
    """Transitions, as torch tensors or numpy arrays. S and A are the sizes of the two spaces."""

    observations: Any  # [B, S]
    actions: Any  # [B, A], in [-1, 1]
    rewards: Any  # [B], scaled and shifted
    next_observations: Any  # [B, S]
    terminals: Any  # [B], 1 where the episode terminated; a time limit's truncation is no terminal
    returns_to_go: Any  # [B], discounted; -inf while the episode is still running


class InputError(Exception):
    """A wrong option, file or device: one line for the user, exit code 2."""


class RunError(Exception):
    """Something that ends a run on its way: one line for the user, exit code 1."""


# ---------------------------------------------------------------------------- configuration


@dataclass
class Config:
    device: str = "cuda"  # Where the networks live: cuda, cuda:N, cpu or auto
    precision: Optional[str] = None  # float32 or tf32; null is tf32 on CUDA, float32 on the CPU
    compile: Optional[bool] = None  # Compile the update and the actor; null does so on CUDA alone
    env: str = "halfcheetah-medium-expert-v2"  # D4RL task name
    seed: int = 0  # Seed of the networks, batches, exploration and training episodes
    eval_seed: int = 0  # Seed of the evaluation episodes; every evaluation plays the same ones
    eval_freq: int = 5000  # Steps between two evaluations
    n_episodes: int = 10  # Episodes an evaluation
    eval_workers: Optional[int] = None  # Processes that play them; null is one a core
    offline_iterations: int = 1_000_000  # Updates in the offline phase
    online_iterations: int = 1_000_000  # Environment steps in the online phase
    checkpoints_path: Optional[str] = None  # Where the run gets its directory; null saves nothing
    checkpoint_freq: Optional[int] = None  # Steps between two checkpoints; null is eval_freq
    resume: bool = True  # Continue the run that checkpoints_path holds; false refuses to touch it
    load_model: str = ""  # Checkpoint from which networks, temperatures and optimizers start

    buffer_size: int = 2_000_000  # Capacity of each replay buffer, at least the dataset's size
    batch_size: int = 256  # Transitions an update
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
    cql_n_actions: int = 10  # Actions sampled a state: random, of the policy, of the next policy
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
    reward_scale: float = 1.0  # Factor of every reward, offline and online
    reward_bias: float = 0.0  # Added to every scaled reward
    is_sparse_reward: bool = False  # A failed episode is taken to go on failing for ever
    mixing_ratio: float = 0.5  # Share of offline data in the online phase's batches
    online_utd_ratio: int = 1  # Updates per environment step in the online phase
    dataset_path: Optional[str] = None  # HDF5 file in D4RL's layout; null is D4RL's own

    log_freq: int = 1000  # Steps over which metrics are averaged before they are logged
    project: str = "CORL"  # Weights & Biases project
    group: str = "Cal-QL-D4RL"  # Weights & Biases group
    name: str = "Cal-QL"  # First part of the run's name

    @property
    def total_steps(self) -> int:
        return self.offline_iterations + self.online_iterations

    @property
    def phase_ends(self) -> tuple[int, int]:
        return self.offline_iterations, self.total_steps

    def is_due(self, step: int, freq: Optional[int]) -> bool:
        """Whether what is done every `freq` steps, and at the phases' ends, is done at `step`."""
        return step in self.phase_ends or step > 0 and step % (freq or self.eval_freq) == 0

    @property
    def offline_batch_size(self) -> int:
        """Offline transitions in a batch of the online phase; the rest are online ones."""
        return int(self.batch_size * self.mixing_ratio)

    @property
    def run_name(self) -> str:
        """Name of the run and its directory: equal for equal options, different for different.

        Only what differs from the defaults counts, so that new options leave old runs their names.
        """
        options = differing_options(dataclasses.asdict(Config()), dataclasses.asdict(self))
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{self.env}-seed{self.seed}-{digest[:8]}"


def differing_options(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The options of `other` that make it another experiment than `one`."""
    elsewhere = {"device", "compile", "eval_workers"}  # where and how fast, not what
    elsewhere |= {"checkpoints_path", "resume", "project", "group"}
    return {k: v for k, v in other.items() if k not in elsewhere and one.get(k) != v}


def cast(value: Any, kind: Any) -> Any:
    """A YAML value as an option's type; raises TypeError or ValueError where it does not fit."""
    if value is None and type(None) in get_args(kind):
        return value
    if kind in (bool, Optional[bool]) and isinstance(value, bool):
        return value
    if kind in (str, Optional[str]) and not isinstance(value, (dict, list, type(None))):
        return str(value)
    if kind is float and not isinstance(value, bool):
        return float(value)
    if kind in (int, Optional[int]) and not isinstance(value, bool) and float(value).is_integer():
        return int(float(value))
    raise TypeError


def decode_config(options: dict[str, Any]) -> Config:
    """Check names and types, about which pyrallis itself asks no questions; then the values."""
    kinds = {field.name: field.type for field in dataclasses.fields(Config)}
    expected = {float: "a number", str: "text", Optional[str]: "text"}
    expected |= dict.fromkeys((bool, Optional[bool]), "true or false")
    for name, value in options.items():
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds)
            hint = f"; close matches: {', '.join(close)}" if close else ""
            raise InputError(f"{name}: there is no such option{hint} (--help lists them)")
        try:
            options[name] = cast(value, kinds[name])
        except (TypeError, ValueError):
            wanted = expected.get(kinds[name], "a whole number")
            raise InputError(f"{name}: found {value!r}, expected {wanted}") from None
    config = Config(**options)
    validate(config)
    return config


def validate(config: Config) -> None:
    """Raise `InputError` for the first option with an impossible value."""

    def expect(names: str, holds: Callable[[Any], bool], expected: str) -> None:
        for name in names.split():
            value = getattr(config, name)
            if not holds(value):
                raise InputError(f"{name}: found {value!r}, expected {expected}")

    positive = "eval_freq n_episodes buffer_size batch_size target_update_period cql_n_actions"
    positive += " q_n_hidden_layers actor_n_hidden_layers hidden_dim online_utd_ratio log_freq"
    expect(positive, lambda x: x > 0, "1 or more")
    expect("checkpoint_freq eval_workers", lambda x: x is None or x > 0, "1 or more, or null")
    expect("precision", lambda x: x in (None, "float32", "tf32"), "float32, tf32 or null")
    expect("offline_iterations online_iterations bc_steps", lambda x: x >= 0, "0 or more")
    expect("seed eval_seed", lambda x: 0 <= x < 2**32, "0 to 2**32 - 1")
    weights = "cql_alpha cql_alpha_online alpha_multiplier"
    expect(weights, lambda x: 0 <= x < math.inf, "0 or more")
    expect("policy_lr qf_lr cql_temp", lambda x: 0 < x < math.inf, "a number above 0")
    expect("reward_scale reward_bias cql_target_action_gap", math.isfinite, "a finite number")
    shares = "discount soft_target_update_rate mixing_ratio"
    expect(shares, lambda x: 0 <= x <= 1, "between 0 and 1")
    low = config.cql_clip_diff_min
    expect("cql_clip_diff_max", lambda x: x >= low, f"at least cql_clip_diff_min, {low}")
    if config.is_sparse_reward:
        expect("discount", lambda x: x < 1, "less than 1, for is_sparse_reward divides by 1 - it")
    if config.online_iterations and config.offline_batch_size == config.batch_size:
        problem = f"less: of a batch of {config.batch_size} it leaves no online transition"
        expect("mixing_ratio", lambda x: False, problem)


def parse_config(args: Optional[list[str]] = None) -> Config:
    """Read the command line over the YAML file of `--config_path` over the defaults.

    Raises `InputError` for an unknown option, a wrong type or an impossible value.
    """

    class Parser(pyrallis.argparsing.ArgumentParser):
        def error(self, message: str) -> None:
            raise InputError(f"{message} (--help lists the options)")

    pyrallis.decode.register(Config, decode_config)
    try:
        return Parser(config_class=Config, allow_abbrev=False).parse_args(args)
    except OSError as error:
        raise InputError(f"config_path: cannot read {error.filename}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        problem = " ".join(str(error).split())
        raise InputError(f"config_path: not a YAML file of options ({problem})") from None


def resolve_device(name: str) -> torch.device:
    """The device called `name`; raises `InputError` where this machine has none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: found {name!r}, expected cuda, cuda:N, cpu or auto") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(
            f"device: found {name!r}, but this machine has {count} CUDA devices; "
            "take --device cpu or --device auto"
        )
    return device


def set_precision(precision: Optional[str], device: torch.device) -> None:
    """Choose how matrix products compute; raises `InputError` for tf32 where there is none."""
    if precision == "tf32" and device.type != "cuda":
        raise InputError(f"precision: found tf32, expected float32 on {device}")
    tf32 = (precision or "tf32") == "tf32" and device.type == "cuda"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def keep_freed_memory() -> None:
    """Have glibc reuse what an update frees; to get it anew costs a tenth of a CPU's time."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, in bytes


# ---------------------------------------------------------------------------- environments


LOCOMOTION = ("halfcheetah", "hopper", "walker2d", "ant-")  # D4RL's tasks without a goal


class Task:
    """A D4RL environment: actions in [-1, 1], float32 observations, episodes seeded one by one.

    `step` tells the two ends of an episode apart: `terminal` is the task's own, also on the last
    permitted step; `truncated` is the time limit's. `success` is whether the goal is reached in
    this step. Raises `InputError` for a task that D4RL does not have or that cannot run here.
    """

    def __init__(self, name: str):
        try:
            self.env = d4rl_compat.make(name)
            self.normalized_score(0.0)
        except ValueError as error:
            raise InputError(f"env: {error}") from None
        except AttributeError:
            raise InputError(f"env: found {name!r}, expected one of D4RL's tasks") from None
        self.max_episode_steps: int = self.env.spec.max_episode_steps
        self.observation_dim: int = self.env.observation_space.shape[0]
        self.action_dim: int = self.env.action_space.shape[0]
        self.action_scale: np.ndarray = self.env.action_space.high
        self.is_locomotion = name.startswith(LOCOMOTION)
        self.has_goal = not self.is_locomotion and "dense" not in name
        self.ends_at_goal = name.startswith("kitchen")

    def reset(self, episode_seed: int) -> np.ndarray:
        return d4rl_compat.reset(self.env, episode_seed).astype(np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, bool]:
        """Returns (observation [S], reward, terminal, truncated, success) for action [A]."""
        observation, reward, done, info = self.env.step(action * self.action_scale)
        truncated = done and info.get("TimeLimit.truncated", False)
        terminal = done and not truncated
        success = info.get("goal_achieved", terminal if self.ends_at_goal else reward > 0)
        return observation.astype(np.float32), float(reward), terminal, truncated, bool(success)

    def normalized_score(self, episode_return: float) -> float:
        """D4RL's score of an episode's undiscounted raw return: 0 is random, 100 an expert."""
        return 100.0 * float(self.env.get_normalized_score(episode_return))


def episode_seed(seed: int, purpose: str, number: int) -> int:
    """Seed of one episode: a function of the run's seed and the episode's number alone."""
    entropy = (seed, ("train", "eval").index(purpose), number)
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


# ---------------------------------------------------------------------------- dataset


def dataset_file(config: Config, task: Task) -> Path:
    """Path of the dataset, downloaded where it has to be.

    Raises `InputError` where the file is missing or the server cannot be reached.
    """
    if config.dataset_path is not None:
        path = Path(config.dataset_path)
        if not path.is_file():
            raise InputError(
                f"dataset_path: there is no file {path}; make one with "
                f"`python tools/make_dataset.py {config.env}`"
            )
        return path
    url = task.env.dataset_url
    if not url:
        raise InputError(f"env: D4RL has no data for {config.env}; name a file by --dataset_path")
    directory = os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")
    path = Path(directory).expanduser() / url.rpartition("/")[2]
    if not path.is_file():
        download(url, path, config.env)
    return path


def download(url: str, path: Path, env_name: str) -> None:
    """Fetch `url` to a temporary name beside `path`, renamed when whole."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file:
            size = int(response.headers.get("Content-Length", 0))
            with tqdm(total=size or None, desc=path.name, unit="B", unit_scale=True) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
            if bar.n < size:
                raise OSError(f"the connection ended after {bar.n} of {size} bytes")
        os.replace(part, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        part.unlink(missing_ok=True)
        raise InputError(
            f"dataset: cannot download {url} ({error}); fetch it elsewhere and put it "
            f"at {path}, or make data with `python tools/make_dataset.py {env_name}` "
            "and name it with --dataset_path"
        ) from None


def read_dataset(path: Path, task: Task) -> dict[str, np.ndarray]:
    """Read and check the arrays of a file in D4RL's layout, one row a step.

    Returns observations [N, S], actions [N, A] (scaled into [-1, 1]) and rewards [N] in float32,
    terminals [N] in bool; where the file has them, next_observations [N, S] and timeouts [N].
    Raises `InputError` that names the file and what is wrong with it.
    """

    def expect(holds: bool, problem: str) -> None:
        if not holds:
            raise InputError(f"dataset {path}: {problem}")

    keys = ["observations", "actions", "rewards", "terminals", "next_observations", "timeouts"]
    try:
        with h5py.File(path, "r") as file:
            raw = {key: file[key][:] for key in keys if key in file}
    except Exception as error:  # h5py raises whatever it meets in a broken file
        raise InputError(
            f"dataset {path}: not a whole HDF5 file ({error}); delete it and fetch or make it again"
        ) from None
    missing = [key for key in keys[:4] if key not in raw]
    expect(not missing, f"it lacks {', '.join(missing)}; D4RL's layout has {', '.join(keys[:4])}")
    n = len(raw["rewards"])
    expect(n > 1, f"it has {n} rows, at least 2 are needed")
    shapes = {"observations": (n, task.observation_dim), "actions": (n, task.action_dim)}
    shapes["next_observations"] = shapes["observations"]
    for key, value in raw.items():
        shape = shapes.get(key, (n,))
        if value.shape == (n, 1) and shape == (n,):
            value = value[:, 0]
        expect(value.shape == shape, f"{key} has shape {value.shape}, the task needs {shape}")
        expect(value.dtype.kind in "biuf", f"{key} holds {value.dtype}, expected real numbers")
        expect(np.isfinite(value).all(), f"{key} holds NaN or infinite values")
        raw[key] = value.astype(bool if key in ("terminals", "timeouts") else np.float32)
    raw["actions"] /= task.action_scale
    largest = np.abs(raw["actions"]).max()
    expect(
        largest <= 1 + 1e-6, f"actions reach {largest:.4g}, expected [-1, 1]; scale or clip them"
    )
    return raw


def episode_ends(
    raw: dict[str, np.ndarray], max_episode_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are the last of their episode, and which of them a time limit cut: [N] bool each.

    An episode ends at a terminal, at a timeout, where the next observation is not the following
    row's observation, and with the file. Where the file has no timeouts, the length limit stands
    for them. (Where it has, an episode may hold one row more than the limit, as in D4RL's AntMaze.)
    """
    rows = np.arange(len(raw["rewards"]))
    ends = raw["terminals"].copy()
    if "next_observations" in raw:
        jumps = raw["observations"][1:] - raw["next_observations"][:-1]
        ends[:-1] |= np.linalg.norm(jumps, axis=1) > 1e-6
    starts = np.maximum.accumulate(np.where(np.r_[True, ends[:-1]], rows, 0))
    truncated = raw.get("timeouts", (rows - starts + 1) % max_episode_steps == 0)
    ends |= truncated
    ends[-1] = True
    return ends, truncated


def return_to_go(
    rewards: np.ndarray, ends: np.ndarray, discount: float, failure_reward: Optional[float] = None
) -> np.ndarray:
    """Discounted sum of rewards from each row to the end of its episode: the paper's V(s).

    Args:
        rewards: [N], scaled and shifted.
        ends: [N] bool, the last row of each episode.
        discount: the factor a step.
        failure_reward: in sparse tasks, what a step without success yields. An episode with no
            other reward has failed, and is taken to go on for ever: reward / (1 - discount).

    Returns [N] float32. A dense episode's sum stops where a time limit cut it, so that with
    negative rewards the bound is too high there.
    """
    sums, future = np.empty(len(rewards)), 0.0
    for row in range(len(rewards) - 1, -1, -1):
        future = float(rewards[row]) + (0.0 if ends[row] else discount * future)
        sums[row] = future
    if failure_reward is not None:
        starts = np.flatnonzero(np.r_[True, ends[:-1]])
        failed = np.logical_and.reduceat(rewards == failure_reward, starts)
        failed_rows = np.repeat(failed, np.diff(np.r_[starts, len(rewards)]))
        sums[failed_rows] = failure_reward / (1.0 - discount)
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

    @classmethod
    def of(cls, raw: dict[str, np.ndarray], ends: np.ndarray, config: Config, task: Task):
        """The scaling that `normalize`, `normalize_reward`, `reward_scale` and `_bias` ask for."""
        mean, std = np.zeros(task.observation_dim, np.float32), np.ones(1, np.float32)
        if config.normalize:
            observations = raw["observations"]
            mean, std = observations.mean(0), observations.std(0) + np.float32(1e-3)
        scale = config.reward_scale
        if config.normalize_reward and task.is_locomotion:
            returns = np.add.reduceat(raw["rewards"], np.flatnonzero(np.r_[True, ends[:-1]]))
            scale *= task.max_episode_steps / (float(np.ptp(returns)) or 1.0)
        return cls(mean, std, scale, config.reward_bias)


class Dataset(NamedTuple):
    rows: Batch  # numpy arrays [N, ...]; next_observations is None where the next row has them
    transitions: np.ndarray  # [n] int, the rows that are transitions
    n_episodes: int
    scaling: Scaling
    failure_reward: Optional[float]  # for `return_to_go`; None in dense tasks


def load_dataset(config: Config, task: Task) -> Dataset:
    """The transitions of `d4rl.qlearning_dataset`, scaled, with their returns-to-go.

    The last row of a truncated episode has no next observation, so it is no transition, but its
    reward counts in the return-to-go of the rows before. Raises `InputError` for a bad file or a
    `buffer_size` that cannot hold the data.
    """
    path = dataset_file(config, task)
    raw = read_dataset(path, task)
    ends, truncated = episode_ends(raw, task.max_episode_steps)
    scaling = Scaling.of(raw, ends, config, task)
    rewards = scaling.reward(raw["rewards"])
    failure_reward = float(rewards.min()) if config.is_sparse_reward else None
    returns_to_go = return_to_go(rewards, ends, config.discount, failure_reward)
    transitions = np.flatnonzero(~truncated[:-1])
    n = len(transitions)
    if n == 0:
        raise InputError(f"dataset {path}: it holds no transition, only ends of episodes")
    if config.buffer_size < n:
        raise InputError(
            f"buffer_size: found {config.buffer_size}, expected at least the {n} transitions of "
            f"{path}"
        )
    observations, next_observations = scaling.observation(raw["observations"]), None
    if "next_observations" in raw:
        next_observations = scaling.observation(raw["next_observations"])
    terminals = raw["terminals"].astype(np.float32)
    rows = observations, raw["actions"], rewards, next_observations, terminals, returns_to_go
    return Dataset(Batch(*rows), transitions, int(ends.sum()), scaling, failure_reward)


# ---------------------------------------------------------------------------- replay buffer


class OfflineBuffer:
    """The dataset on the training device, sampled uniformly with replacement."""

    def __init__(self, dataset: Dataset, device: torch.device):
        def move(column: Optional[np.ndarray]) -> Optional[Tensor]:
            return None if column is None else torch.as_tensor(column, device=device)

        self.rows = Batch(*map(move, dataset.rows))
        if self.rows.next_observations is None:  # a view: no observation is stored twice
            self.rows = self.rows._replace(next_observations=self.rows.observations[1:])
        self.transitions = move(dataset.transitions)

    def sample(self, batch_size: int) -> Batch:
        n = len(self.transitions)
        rows = self.transitions[torch.randint(n, (batch_size,), device=self.transitions.device)]
        return Batch(*(column[rows] for column in self.rows))


class ReplayBuffer:
    """A ring of transitions on the training device, sampled uniformly with replacement."""

    def __init__(self, capacity: int, observation_dim: int, action_dim: int, device: torch.device):
        shapes = Batch((observation_dim,), (action_dim,), (), (observation_dim,), (), ())
        self.rows = Batch(*(torch.zeros((capacity, *shape), device=device) for shape in shapes))
        self.capacity = capacity
        self.size = 0  # rows that hold a transition
        self.position = 0  # row of the next transition

    def latest(self, n: int) -> Tensor:
        """Rows of the latest n transitions, or of those of them that are still in the ring."""
        n = min(n, self.capacity)
        device = self.rows.rewards.device
        return torch.arange(self.position - n, self.position, device=device) % self.capacity

    def add(self, transitions: Batch) -> None:
        """Store transitions, numpy arrays [n, ...], over the oldest."""
        n = len(transitions.rewards)
        self.position = (self.position + n) % self.capacity
        self.size = min(self.size + n, self.capacity)
        rows = self.latest(n)
        for column, values in zip(self.rows, transitions):
            column[rows] = torch.as_tensor(values[-self.capacity :], device=column.device)

    def fill_returns(self, returns_to_go: np.ndarray) -> None:
        """Give the latest transitions, an ended episode's [T], their lower bounds."""
        column = self.rows.returns_to_go
        values = torch.as_tensor(returns_to_go[-self.capacity :], device=column.device)
        column[self.latest(len(returns_to_go))] = values

    def sample(self, batch_size: int) -> Batch:
        index = torch.randint(self.size, (batch_size,), device=self.rows.rewards.device)
        return Batch(*(column[index] for column in self.rows))


def sample_mixed(offline: OfflineBuffer, online: ReplayBuffer, config: Config) -> Batch:
    """A batch of the online phase: `mixing_ratio` of it offline data, the rest online."""
    n = config.offline_batch_size
    pairs = zip(offline.sample(n), online.sample(config.batch_size - n))
    return Batch(*(torch.cat(pair) for pair in pairs))


# ---------------------------------------------------------------------------- networks


def make_linear(inputs: int, outputs: int, orthogonal: bool, last: bool) -> nn.Linear:
    """A linear layer with its initial weights; the last of a network starts close to zero."""
    layer = nn.Linear(inputs, outputs)
    if orthogonal:
        nn.init.orthogonal_(layer.weight, gain=0.01 if last else math.sqrt(2.0))
        nn.init.zeros_(layer.bias)
    elif last:
        nn.init.xavier_uniform_(layer.weight, gain=0.01)
        nn.init.zeros_(layer.bias)
    return layer


def make_layers(sizes: list[int], orthogonal: bool) -> list[nn.Linear]:
    last = len(sizes) - 2
    return [make_linear(*sizes[i : i + 2], orthogonal, i == last) for i in range(last + 1)]


CPU_CACHE = 2**18  # values of a layer that a CPU keeps at hand, so larger batches go in pieces


class Critic(nn.Module):
    """The twin Q-functions as one ensemble: every parameter has a leading axis of 2."""

    def __init__(self, observation_dim: int, action_dim: int, config: Config):
        super().__init__()
        hidden = [config.hidden_dim] * config.q_n_hidden_layers
        sizes = [observation_dim + action_dim, *hidden, 1]
        twins = [make_layers(sizes, config.orthogonal_init) for _ in range(2)]
        pairs = list(zip(*twins))
        self.weights = nn.ParameterList(torch.stack([a.weight.T, b.weight.T]) for a, b in pairs)
        self.biases = nn.ParameterList(torch.stack([a.bias, b.bias])[:, None] for a, b in pairs)
        self.observation_dim = observation_dim

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Q-values [2, B, N] of N actions [B, N, A] in each observation [B, S]."""
        batch_size, n_actions, _ = actions.shape
        hidden_dim = self.weights[0].shape[-1]
        n_states = max(1, CPU_CACHE // (n_actions * hidden_dim))
        eager = actions.device.type == "cpu" and not torch.compiler.is_compiling()
        if eager and n_states < batch_size:
            pieces = zip(observations.split(n_states), actions.split(n_states))
            return torch.cat([self.forward(*piece) for piece in pieces], 1)
        # the first layer is linear in (s, a): its share of s is computed once a state
        of_state, of_action = self.weights[0].split(
            [self.observation_dim, actions.shape[-1]], dim=1
        )
        x = torch.matmul(actions.flatten(0, 1), of_action).unflatten(1, (batch_size, n_actions))
        x = x + (torch.matmul(observations, of_state) + self.biases[0]).unsqueeze(2)
        x = x.relu_().flatten(1, 2)  # [2, B * N, hidden]
        for weight, bias in zip(self.weights[1:-1], self.biases[1:-1]):
            x = torch.baddbmm(bias, x, weight).relu_()
        qs = torch.baddbmm(self.biases[-1], x, self.weights[-1])
        return qs.view(2, batch_size, n_actions)


class Actor(nn.Module):
    """The policy: a Gaussian of state-dependent mean and deviation, squashed by tanh."""

    def __init__(self, observation_dim: int, action_dim: int, config: Config):
        super().__init__()
        hidden = [config.hidden_dim] * config.actor_n_hidden_layers
        sizes = [observation_dim, *hidden, 2 * action_dim]
        self.layers = nn.ModuleList(make_layers(sizes, config.orthogonal_init))
        self.log_std_multiplier = nn.Parameter(torch.tensor(1.0))
        self.log_std_offset = nn.Parameter(torch.tensor(-1.0))

    def forward(self, observations: Tensor) -> "Gaussian":
        x = observations
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        mean, log_std = self.layers[-1](x).chunk(2, dim=-1)
        log_std = self.log_std_multiplier * log_std + self.log_std_offset
        return Gaussian(mean, log_std.clamp(-20.0, 2.0))


class Gaussian(NamedTuple):
    """The policy's distributions before the tanh, one per observation."""

    mean: Tensor  # [B, A]
    log_std: Tensor  # [B, A]


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


# ---------------------------------------------------------------------------- losses


def next_value(next_qs: Tensor, entropy_bonus: Optional[Tensor] = None) -> Tensor:
    """max_a min_i Q_i(s', a) [B] of target values [2, B, N] of N next actions.

    N is 1, or with max-target backup cql_n_actions. `entropy_bonus` [B, N], -temperature times the
    log-density of those actions, is added for the action that the max takes.
    """
    value, best = next_qs.amin(0).max(-1)
    if entropy_bonus is not None:
        value = value + entropy_bonus.gather(-1, best.unsqueeze(-1)).squeeze(-1)
    return value


def td_target(rewards: Tensor, terminals: Tensor, next_values: Tensor, discount: float) -> Tensor:
    """r + discount * V(s') [B], not beyond a terminal."""
    return rewards + discount * (1.0 - terminals) * next_values


def calibrate(qs: Tensor, returns_to_go: Tensor) -> Tensor:
    """max(Q(s, a), V(s)) for policy actions' Q-values [2, B, N] and V(s) [B] (paper, eq. 5.1)."""
    return torch.maximum(qs, returns_to_go.unsqueeze(-1))


def cql_difference(
    data_q: Tensor,
    random_q: Tensor,
    policy_q: Tensor,
    random_log_density: float,
    policy_log_density: Tensor,
    config: Config,
) -> Tensor:
    """logsumexp_a Q(s, a) - Q(s, a_data), clipped, averaged over the batch: [2], one a critic.

    Args:
        data_q: [2, B], of the data's actions.
        random_q: [2, B, N], of uniform actions, each of density exp(random_log_density).
        policy_q: [2, B, 2 N], calibrated, of the policy's actions at s and at s'.
        policy_log_density: [B, 2 N], of the policy's actions.
        config: the options `cql_importance_sample`, `cql_temp` and the two clips.

    With importance sampling each value is weighed by the inverse of its action's density (CQL,
    appendix F); without, the data's action joins the sampled ones.
    """
    if config.cql_importance_sample:
        values = [random_q - random_log_density, policy_q - policy_log_density]
    else:
        values = [random_q, policy_q, data_q.unsqueeze(-1)]
    temperature = config.cql_temp
    soft_max = temperature * torch.logsumexp(torch.cat(values, -1) / temperature, -1)
    difference = (soft_max - data_q).clamp(config.cql_clip_diff_min, config.cql_clip_diff_max)
    return difference.mean(-1)


def lagrange_loss(alpha_prime: Tensor, excess: Tensor) -> Tensor:
    """Loss of the multiplier alpha', which grows while the differences exceed the gap, by [2]."""
    return -0.5 * (alpha_prime * excess.detach()).sum()


def actor_loss(log_density: Tensor, merit: Tensor, alpha: Any) -> Tensor:
    """mean(alpha * log pi(a|s) - merit), from [B] each.

    `merit` is min_i Q_i(s, a), or while cloning behaviour the log-density of the data's actions.
    """
    return (alpha * log_density - merit).mean()


def temperature_loss(log_alpha: Tensor, log_density: Tensor, target_entropy: float) -> Tensor:
    """Loss of the entropy temperature, which grows while entropy is below its target."""
    return -(log_alpha * (log_density.detach() + target_entropy)).mean()


# ---------------------------------------------------------------------------- agent


class Noise(NamedTuple):
    """All that is random in an update: standard normal, but for the uniform random actions."""

    policy: Tensor  # [B, A], action of the actor's loss
    current: Tensor  # [B, N, A], policy actions at s in the CQL term
    next: Tensor  # [B, N, A], policy actions at s' in the CQL term
    target: Tensor  # [B, N or 1, A], policy actions at s' in the TD target
    random: Tensor  # [B, N, A], uniform on [-1, 1]


@torch.library.custom_op("cal_ql::adam", mutates_args=("parameters", "means", "squares", "steps"))
def adam(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
) -> None:
    """One step of Adam (Kingma and Ba, 2015) in place, as one fused kernel.

    An operator of its own, since `torch.optim.Adam.step` breaks the graph of a compiled update.
    """
    torch._foreach_add_(steps, 1.0)
    options = {"lr": lr, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    options |= {"amsgrad": False, "maximize": False}
    torch._fused_adam_(parameters, gradients, means, squares, [], steps, **options)


class Adam(nn.Module):
    """Adam and its state, which is a module's so that checkpoints and captured graphs hold it."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float):
        super().__init__()
        self.trained, self.lr = list(parameters), lr

        def zeros(tensors: Iterable[Tensor]) -> nn.ParameterList:
            return nn.ParameterList(
                nn.Parameter(torch.zeros_like(tensor), requires_grad=False) for tensor in tensors
            )

        self.means, self.squares = zeros(self.trained), zeros(self.trained)
        self.steps = zeros(parameter.new_empty(()) for parameter in self.trained)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        state = [list(tensors) for tensors in (self.means, self.squares, self.steps)]
        adam(self.trained, list(gradients), *state, self.lr)


@contextlib.contextmanager
def named_compiler_failure() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        reason = " ".join(str(error).split("\n")[:2])
        raise RunError(f"compile: torch.compile fails ({reason}); take --compile false") from error


class Agent(nn.Module):
    """Actor, twin critics, their targets, temperatures and optimizers, and the update."""

    def __init__(self, observation_dim: int, action_dim: int, config: Config, device: torch.device):
        super().__init__()
        self.config, self.device = config, device
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.actor = Actor(observation_dim, action_dim, config)
        self.critic = Critic(observation_dim, action_dim, config)
        self.target_critic = Critic(observation_dim, action_dim, config)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.tensor(0.0))
        self.log_alpha_prime = nn.Parameter(torch.tensor(1.0))
        self.to(device)
        self.optimizers = nn.ModuleDict(
            {
                "critic": Adam(self.critic.parameters(), config.qf_lr),
                "actor": Adam(self.actor.parameters(), config.policy_lr),
                "alpha": Adam([self.log_alpha], config.policy_lr),
                "alpha_prime": Adam([self.log_alpha_prime], config.qf_lr),
            }
        )
        self.updates = 0
        if device.type == "cuda" if config.compile is None else config.compile:
            torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad, in the graph
            options = {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead"}
            self.step = torch.compile(self.step, **options)
            self.choose = torch.compile(self.choose, **options)

    def draw_noise(self) -> Noise:
        shape = (self.config.batch_size, self.config.cql_n_actions, self.action_dim)
        n_target = self.config.cql_n_actions if self.config.cql_max_target_backup else 1
        return Noise(
            policy=torch.randn((shape[0], shape[2]), device=self.device),
            current=torch.randn(shape, device=self.device),
            next=torch.randn(shape, device=self.device),
            target=torch.randn((shape[0], n_target, shape[2]), device=self.device),
            random=torch.rand(shape, device=self.device) * 2.0 - 1.0,
        )

    def update(self, batch: Batch, online: bool) -> dict[str, Tensor]:
        """One gradient step of all that is learnt, on a batch; returns scalar metrics."""
        cloning = self.updates < self.config.bc_steps
        self.updates += 1
        follow = self.updates % self.config.target_update_period == 0
        with named_compiler_failure():
            return self.step(batch, online, cloning, follow)

    def step(self, batch: Batch, online: bool, cloning: bool, follow: bool) -> dict[str, Tensor]:
        """The update as a function of tensors, which one captured graph can hold.

        Nothing here waits for the device: metrics stay there, and no branch looks at a tensor.
        `cloning` is the actor's loss, `follow` whether the target critics move.
        """
        config = self.config
        cql_alpha = config.cql_alpha_online if online else config.cql_alpha
        calibrated = config.calibrate and (config.calibrate_online or not online)
        losses, metrics = self.losses(batch, self.draw_noise(), cql_alpha, calibrated, cloning)
        # all gradients are taken at the same parameters before any optimizer steps
        gradients = {
            name: torch.autograd.grad(loss, self.optimizers[name].trained)
            for name, loss in losses.items()
        }
        metrics["gradient_norm"] = torch.nn.utils.get_total_norm(sum(gradients.values(), ()))
        for name in losses:
            self.optimizers[name].step(gradients[name])
        if follow:
            with torch.no_grad():
                targets, critics = self.target_critic.parameters(), self.critic.parameters()
                torch._foreach_lerp_(list(targets), list(critics), config.soft_target_update_rate)
        return metrics

    def losses(
        self, batch: Batch, noise: Noise, cql_alpha: float, calibrated: bool, cloning: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The scalar losses, under the name of the optimizer that takes each, and the metrics."""
        alpha = self.config.alpha_multiplier * self.log_alpha.detach().exp()
        policy = self.actor(batch.observations)  # one pass serves all the actions sampled in s
        with torch.no_grad():
            next_policy = self.actor(batch.next_observations)
            at_s = sample_actions(policy, noise.current)
            at_next = sample_actions(next_policy, noise.next)
            sample = Sample(*(torch.cat(pair, 1) for pair in zip(at_s, at_next)))
            next_values = self.next_values(batch, sample_actions(next_policy, noise.target), alpha)
            target_q = td_target(batch.rewards, batch.terminals, next_values, self.config.discount)

        losses, metrics = self.actor_losses(batch, policy, noise, alpha, cloning)
        critic = self.critic_losses(batch, noise, sample, target_q, cql_alpha, calibrated)
        metrics |= {"alpha": alpha, "average_target_q": next_values.mean(), **critic[1]}
        return losses | critic[0], {name: value.detach() for name, value in metrics.items()}

    def next_values(self, batch: Batch, sample: Sample, alpha: Tensor) -> Tensor:
        """Value of the next states [B] to the target critics, for the TD target."""
        qs = self.target_critic(batch.next_observations, sample.actions)
        return next_value(qs, -alpha * sample.log_density if self.config.backup_entropy else None)

    def actor_losses(
        self, batch: Batch, policy: Gaussian, noise: Noise, alpha: Tensor, cloning: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of the actor and of the entropy temperature, and their metrics."""
        actions, log_density = sample_actions(policy, noise.policy)
        if cloning:
            merit = action_log_density(policy, batch.actions)
        else:
            merit = self.critic(batch.observations, actions.unsqueeze(1)).amin(0).squeeze(-1)
        losses = {"actor": actor_loss(log_density, merit, alpha)}
        alpha_loss = torch.zeros_like(alpha)
        if self.config.use_automatic_entropy_tuning:
            alpha_loss = temperature_loss(self.log_alpha, log_density, -self.action_dim)
            losses["alpha"] = alpha_loss
        metrics = {"policy_loss": losses["actor"], "alpha_loss": alpha_loss}
        return losses, {**metrics, "log_pi": log_density.mean()}

    def critic_losses(
        self,
        batch: Batch,
        noise: Noise,
        sample: Sample,
        target_q: Tensor,
        cql_alpha: float,
        calibrated: bool,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of both critics together and of the Lagrange multiplier, and their metrics."""
        config, n = self.config, self.config.cql_n_actions
        # one pass gives the values [2, B, 1 + 3 N] of all the actions of a state
        actions = torch.cat([batch.actions.unsqueeze(1), noise.random, sample.actions], 1)
        qs = self.critic(batch.observations, actions)
        data_q, random_q, policy_q = qs[..., 0], qs[..., 1 : 1 + n], qs[..., 1 + n :]
        below = policy_q.detach() < batch.returns_to_go.unsqueeze(-1)
        if calibrated:
            policy_q = calibrate(policy_q, batch.returns_to_go)

        td_losses = (data_q - target_q).square().mean(-1)
        random_log_density = -self.action_dim * math.log(2.0)  # uniform on [-1, 1]^A
        differences = cql_difference(
            data_q, random_q, policy_q, random_log_density, sample.log_density, config
        )
        regularizers, losses = cql_alpha * differences, {}
        alpha_prime = alpha_prime_loss = torch.zeros_like(target_q[0])
        if config.cql_lagrange:
            excess = cql_alpha * (differences - config.cql_target_action_gap)
            alpha_prime = self.log_alpha_prime.exp().clamp(max=1e6)
            losses["alpha_prime"] = alpha_prime_loss = lagrange_loss(alpha_prime, excess)
            regularizers = alpha_prime.detach() * excess
        losses["critic"] = (td_losses + regularizers).sum()
        metrics = {"alpha_prime": alpha_prime, "alpha_prime_loss": alpha_prime_loss}
        by_critic = {
            "qf{}_loss": td_losses,
            "average_qf{}": data_q.mean(-1),
            "cql_q{}_rand": random_q.mean((1, 2)),
            "cql_q{}_current_actions": policy_q[..., :n].mean((1, 2)),
            "cql_q{}_next_actions": policy_q[..., n:].mean((1, 2)),
            "bound_rate_cql_q{}_current_actions": below[..., :n].float().mean((1, 2)),
            "bound_rate_cql_q{}_next_actions": below[..., n:].float().mean((1, 2)),
            "cql_std_q{}": torch.cat([qs[..., : 1 + n], policy_q], -1).detach().std(-1).mean(-1),
            "cql_qf{}_diff": differences,
            "cql_min_qf{}_loss": regularizers,
        }
        for name, (first, second) in by_critic.items():
            metrics |= {name.format(1): first, name.format(2): second}
        return losses, metrics

    def act(self, observations: np.ndarray, explore: bool) -> np.ndarray:
        """The policy's actions [B, A] at observations [B, S]: samples, or tanh of the mean."""
        with named_compiler_failure():
            actions = self.choose(torch.from_numpy(observations).to(self.device), explore)
        return actions.cpu().numpy()

    @torch.no_grad()
    def choose(self, observations: Tensor, explore: bool) -> Tensor:
        policy = self.actor(observations)
        if explore:
            return sample_actions(policy, torch.randn_like(policy.mean)).actions
        return torch.tanh(policy.mean)

    def get_extra_state(self) -> int:
        return self.updates

    def set_extra_state(self, updates: int) -> None:
        self.updates = updates


# ---------------------------------------------------------------------------- episodes


class EnvironmentFailure(RunError):
    """The environment raised; the run can be saved."""


class Episode:
    """An episode in progress: its seed and its actions so far determine all the rest."""

    def __init__(self, task: Task, seed: int):
        self.task, self.seed = task, seed
        self.actions: list[np.ndarray] = []
        self.rewards: list[float] = []  # the task's own, not scaled
        self.success = self.terminal = self.over = False
        with self.named_failure():
            self.observation = task.reset(seed)  # [S]

    def step(self, action: np.ndarray) -> float:
        """Play one action [A]; returns the reward."""
        with self.named_failure():
            self.observation, reward, self.terminal, truncated, success = self.task.step(action)
        self.actions.append(action)
        self.rewards.append(reward)
        self.success |= success
        self.over = self.terminal or truncated
        return reward

    @contextlib.contextmanager
    def named_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a simulator raises
            where = f"step {len(self.actions)} of the episode with seed {self.seed}"
            reason = f"{type(error).__name__}: {error}"
            raise EnvironmentFailure(f"the environment failed at {where} ({reason})") from error

    @property
    def score(self) -> float:
        return self.task.normalized_score(sum(self.rewards))


class Collector:
    """Plays the online phase's training episodes and stores them in the online buffer.

    `store` is called with the transitions [T, ...] of each episode that ends.
    """

    def __init__(self, task: Task, dataset: Dataset, buffer: ReplayBuffer, config: Config):
        self.task, self.dataset, self.buffer, self.config = task, dataset, buffer, config
        self.store: Callable[[Batch], None] = lambda transitions: None
        self.begun = 0  # episodes
        self.failures = 0  # episodes that ended without success
        self.episode: Optional[Episode] = None
        self.rows: list[Batch] = []  # the running episode's transitions

    def begin_episode(self, number: int) -> Episode:
        return Episode(self.task, episode_seed(self.config.seed, "train", number))

    def step(self, agent: Agent) -> dict[str, float]:
        """Take one environment step; returns the episode's metrics if that ended it."""
        if self.episode is None:
            self.episode = self.begin_episode(self.begun + 1)
            self.begun += 1
        observation = self.dataset.scaling.observation(self.episode.observation)
        return self.play(agent.act(observation[None], explore=True)[0])

    def play(self, action: np.ndarray) -> dict[str, float]:
        episode, scaling = self.episode, self.dataset.scaling
        observation = scaling.observation(episode.observation)
        reward = scaling.reward(episode.step(action))
        next_observation = scaling.observation(episode.observation)
        terminal, unknown = np.float32(episode.terminal), np.float32(-math.inf)
        row = Batch(observation, action, reward, next_observation, terminal, unknown)
        self.rows.append(row)
        self.buffer.add(Batch(*(np.expand_dims(value, 0) for value in row)))
        return self.end_episode() if episode.over else {}

    def end_episode(self) -> dict[str, float]:
        episode, self.episode = self.episode, None
        rows, self.rows = Batch(*(np.stack(column) for column in zip(*self.rows))), []
        ends = np.arange(len(rows.rewards)) == len(rows.rewards) - 1
        returns = return_to_go(
            rows.rewards, ends, self.config.discount, self.dataset.failure_reward
        )
        self.buffer.fill_returns(returns)
        self.store(rows._replace(returns_to_go=returns))
        self.failures += not episode.success
        metrics = {
            "train/episode_return": sum(episode.rewards),
            "train/d4rl_normalized_episode_return": episode.score,
            "train/episode_length": len(episode.rewards),
        }
        if self.task.has_goal:
            metrics["train/is_success"] = float(episode.success)
            metrics["train/regret"] = self.failures / self.begun
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The running episode is what its seed and its actions make of it."""
        actions = torch.tensor(np.array(self.episode.actions)) if self.episode else None
        return {"begun": self.begun, "failures": self.failures, "actions": actions}

    def load_state_dict(self, state: dict[str, Any], stored: Batch) -> None:
        """Restore, from the transitions of all ended episodes, and play the running one again."""
        self.buffer.add(stored)
        self.begun, self.failures = state["begun"], state["failures"]
        if state["actions"] is not None:
            self.episode = self.begin_episode(self.begun)
            for action in state["actions"].cpu().numpy():
                self.play(action)


class Outcome(NamedTuple):
    """What an evaluation episode yielded."""

    episode_return: float  # undiscounted, in the task's own rewards
    score: float
    success: bool
    length: int  # steps


def play_episodes(env_name: str) -> Generator:
    """Play episodes side by side, at most `SIDE_BY_SIDE`, as a coroutine.

    It is sent {number: seed} of the episodes to play, and yields ({number: observation [S]} of
    those that run, {number: Outcome} of those that have just ended); then it is sent
    {number: action [A]} for those that run, until none does and it is sent seeds again.
    """
    idle: list[Task] = []
    seeds = yield
    while True:
        waiting = list(seeds.items())
        idle += (Task(env_name) for _ in range(min(SIDE_BY_SIDE, len(waiting)) - len(idle)))
        running: dict[int, Episode] = {}
        outcomes: dict[int, Outcome] = {}
        while waiting or running:
            while waiting and idle:
                number, seed = waiting.pop(0)
                running[number] = Episode(idle.pop(), seed)
            actions = yield {number: e.observation for number, e in running.items()}, outcomes
            outcomes = {}
            for number, action in actions.items():
                episode = running[number]
                episode.step(action)
                if episode.over:
                    episode_return, length = sum(episode.rewards), len(episode.rewards)
                    result = episode_return, episode.score, episode.success, length
                    outcomes[number] = Outcome(*result)
                    idle.append(running.pop(number).task)
        seeds = yield {}, outcomes


SIDE_BY_SIDE = 8  # episodes a worker plays, so that one actor call serves many of them


class LocalWorker:
    """Plays in this process; it is spoken to like the connection to another."""

    def __init__(self, env_name: str):
        self.episodes = play_episodes(env_name)
        next(self.episodes)

    def send(self, message: dict[int, Any]) -> None:
        self.answer = self.episodes.send(message)

    def recv(self) -> tuple[dict, dict]:
        return self.answer


def work(connection: Connection, env_name: str) -> None:
    """Play for the process at the other end of `connection`, until it is gone."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)  # that process decides when to stop
    worker = LocalWorker(env_name)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            message = connection.recv()
            try:
                worker.send(message)
                connection.send(worker.recv())
            except EnvironmentFailure as failure:
                connection.send(failure)


class Evaluator:
    """Plays evaluation episodes with the policy's mean actions, in `eval_workers` processes.

    An episode depends on its seed and on the policy alone: the actor sees all episodes at once, in
    rows of their own, so that not even rounding depends on the number of workers.
    """

    def __init__(self, config: Config):
        cores = len(os.sched_getaffinity(0))
        self.n_workers = min(config.eval_workers or cores, config.n_episodes)
        self.config = config
        self.workers: list[Any] = []  # started by the first evaluation

    def start_workers(self) -> None:
        if self.n_workers == 1:
            self.workers = [LocalWorker(self.config.env)]
            return
        context = multiprocessing.get_context("forkserver")  # a fork would copy threads and CUDA
        for _ in range(self.n_workers):
            here, there = context.Pipe()
            arguments = there, self.config.env
            context.Process(target=work, args=arguments, daemon=True).start()
            there.close()
            atexit.register(here.close)  # which ends the worker
            self.workers.append(here)

    def evaluate(self, agent: Agent, scaling: Scaling, between: Callable) -> list[Outcome]:
        """Play the `n_episodes` of `eval_seed`, always the same ones.

        `between` is called before each step, and may raise to give up. Raises
        `EnvironmentFailure` where an environment or a worker fails.
        """
        if not self.workers:
            self.start_workers()
        n, seed = self.config.n_episodes, self.config.eval_seed
        seeds = {number: episode_seed(seed, "eval", number) for number in range(n)}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # idle ones would spin on the workers' cores
        try:
            outcomes = self.play(seeds, agent, scaling, between)
        except (EOFError, ConnectionError):
            raise EnvironmentFailure("a process that plays evaluation episodes has died") from None
        finally:
            torch.set_num_threads(threads)
        return [outcomes[number] for number in range(n)]

    def play(
        self, seeds: dict[int, int], agent: Agent, scaling: Scaling, between: Callable
    ) -> dict[int, Outcome]:
        for i, worker in enumerate(self.workers):
            worker.send({n: seed for n, seed in seeds.items() if n % len(self.workers) == i})
        observations = np.zeros((len(seeds), agent.observation_dim), np.float32)
        outcomes: dict[int, Outcome] = {}
        playing = list(self.workers)
        while playing:
            between()
            running = {}
            for worker in playing:
                seen, ended = receive(worker)
                outcomes |= ended
                if seen:
                    running[worker] = list(seen)
                    observations[list(seen)] = scaling.observation(np.stack(list(seen.values())))
            actions = agent.act(observations, explore=False)
            for worker, numbers in running.items():
                worker.send({number: actions[number] for number in numbers})
            playing = list(running)
        return outcomes


def receive(worker: Any) -> tuple[dict[int, np.ndarray], dict[int, Outcome]]:
    """What a worker has to say; raises the `EnvironmentFailure` that it met."""
    answer = worker.recv()
    if isinstance(answer, EnvironmentFailure):
        raise answer
    return answer


# ---------------------------------------------------------------------------- run directory


class RunDirectory:
    """A run on disk: config.yaml, metrics.jsonl, transitions.bin and checkpoint_<step>.pt.

    metrics.jsonl holds one record a line, transitions.bin the transitions of the online episodes
    that have ended, each as a row of float32. Both only grow; a checkpoint knows how much of them
    belongs to it, and resuming drops the rest.
    Raises `InputError` where another process holds the directory.
    """

    def __init__(self, config: Config):
        self.path = Path(config.checkpoints_path) / config.run_name
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / "lock", "w")  # noqa: SIM115  # held as long as it is open
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"checkpoints_path: another process runs in {self.path}") from None
        (self.path / "config.yaml").write_text(pyrallis.dump(config))
        self.metrics = open(self.path / "metrics.jsonl", "ab")  # noqa: SIM115
        self.rows = open(self.path / "transitions.bin", "ab")  # noqa: SIM115

    def add_metrics(self, record: dict[str, Any]) -> None:
        self.metrics.write(json.dumps(record).encode() + b"\n")
        self.metrics.flush()

    def add_transitions(self, transitions: Batch) -> None:
        columns = [column.reshape(len(column), -1) for column in transitions]
        self.rows.write(np.concatenate(columns, 1).astype(np.float32).tobytes())

    def read_transitions(self, observation_dim: int, action_dim: int) -> Batch:
        widths = np.cumsum([observation_dim, action_dim, 1, observation_dim, 1, 1])
        rows = np.fromfile(self.rows.name, np.float32).reshape(-1, widths[-1])
        columns = np.split(rows, widths[:-1], axis=1)
        return Batch(
            *(
                c if field in ("observations", "actions", "next_observations") else c[:, 0]
                for field, c in zip(Batch._fields, columns)
            )
        )

    def checkpoints(self) -> list[Path]:
        """From the oldest to the newest."""
        return sorted(self.path.glob("checkpoint_*.pt"), key=step_of)

    def save(self, state: dict[str, Any], keep: Container[int]) -> None:
        """Write a checkpoint beside its place, sync it, rename it; only then drop older ones.

        The one before stays, and so do those of the steps in `keep`.
        """
        for file in (self.metrics, self.rows):
            file.flush()
            os.fsync(file.fileno())
        sizes = {"metrics": self.metrics.tell(), "rows": self.rows.tell()}
        path = self.path / f"checkpoint_{state['step']}.pt"
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            torch.save({**state, "sizes": sizes}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        for old in self.checkpoints()[:-2]:
            if step_of(old) not in keep:
                old.unlink()

    def load(self, device: torch.device) -> Optional[dict[str, Any]]:
        """The newest whole checkpoint, the growing files cut back to it; None for a new run.

        Broken ones after it are set aside; raises `InputError` where all are broken.
        """
        found, broken = self.checkpoints(), []
        state: dict[str, Any] = {"sizes": {"metrics": 0, "rows": 0}}
        for path in reversed(found):
            try:
                state = load_checkpoint(path, device)
                break
            except InputError as error:
                print(f"{error}: set aside, the run goes on from the checkpoint before")
                broken.append(path)
        if found and len(broken) == len(found):
            raise InputError(f"checkpoints_path: no checkpoint in {self.path} is whole")
        for file, size in ((self.metrics, "metrics"), (self.rows, "rows")):
            if file.tell() < state["sizes"][size]:
                raise InputError(f"checkpoints_path: {file.name} is shorter than its checkpoint")
            file.truncate(state["sizes"][size])
        for path in broken:
            path.rename(path.with_suffix(".broken"))
        return state if found else None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.rpartition("_")[2])


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint; raises `InputError` where it is missing or not whole."""
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"{damaged} is damaged")
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}") from None
    except Exception as error:  # whatever the parts of torch.load raise on a broken file
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} is no whole checkpoint ({reason})") from None


# ---------------------------------------------------------------------------- logging


class MeanMetrics:
    """Mean of each metric since the last fetch; it stays on the device until then."""

    def __init__(self):
        self.names: list[str] = []
        self.count = 0
        self.total: Any = None  # [metrics]
        self.bad_step: Any = None  # [metrics], the first step at which each was not finite, or inf

    def add(self, metrics: dict[str, Tensor], step: int) -> None:
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

    def fetch(self) -> dict[str, float]:
        """The means; empty where nothing was added."""
        self.check()
        means = (self.total / self.count).tolist() if self.count else []
        self.count = 0
        return dict(zip(self.names, means))


class WandbWriter:
    """W&B in a thread of its own: while it is slow, away or broken, training goes on."""

    def __init__(self, config: Config, directory: Optional[Path]):
        self.options: dict[str, Any] = {
            "project": config.project,
            "group": config.group,
            "name": config.run_name,
            "config": dataclasses.asdict(config),
            "dir": directory,
            "settings": wandb.Settings(init_timeout=20, quiet=True),
        }
        if directory:
            name = directory / "wandb_id"
            if not name.exists():
                name.write_text(uuid.uuid4().hex[:8])
            run_id = os.environ.get("WANDB_RUN_ID", name.read_text())  # a sweep's agent sets one
            self.options |= {"id": run_id, "resume": "allow"}
        self.records: queue.SimpleQueue = queue.SimpleQueue()  # None is the last
        self.thread = threading.Thread(target=self.work, name="W&B", daemon=True)
        self.thread.start()

    def work(self) -> None:
        try:
            run = self.start()
            while (record := self.records.get()) is not None:
                if record["step"] >= run.step:  # a resumed run sends nothing twice
                    run.log(record, step=record["step"])
            run.finish()
        except Exception as error:
            print(f"W&B stopped ({error}); training goes on, metrics.jsonl is complete")

    def start(self) -> Any:
        try:
            if "WANDB_MODE" in os.environ or wandb.login(prompt=False):
                return wandb.init(**self.options)
            print("W&B: no API key, so it records offline; `wandb sync` uploads that later")
            self.options["settings"].silent = True
        except wandb.Error as error:
            print("W&B cannot be reached, so it records offline:", *str(error).split())
        return wandb.init(mode="offline", **self.options)

    def close(self, timeout: float) -> None:
        """Send what is left, for at most `timeout` seconds."""
        self.records.put(None)
        self.thread.join(timeout)


class Log:
    """Writes records to metrics.jsonl and W&B, and draws the progress bar."""

    def __init__(self, config: Config, directory: Optional[RunDirectory], step: int):
        self.config, self.directory = config, directory
        self.wandb = WandbWriter(config, directory.path if directory else None)
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
            self.directory.add_metrics(record)
        self.wandb.records.put(record)
        self.bar.set_description("offline" if step <= offline else "online", refresh=False)
        self.bar.set_postfix(self.shown, refresh=False)

    def write_means(self, step: int, metrics: MeanMetrics) -> None:
        """Add the update's metrics, averaged since the last time, and the rate of updates."""
        updates, means = metrics.count, metrics.fetch()  # waits for the device
        rate = updates / (time.perf_counter() - self.interval_start)
        self.interval_start = time.perf_counter()
        self.shown["updates"] = f"{rate:.0f}/s"
        self.write(step, {**means, "updates_per_second": rate})

    def write_scores(self, step: int, scores: dict[str, float]) -> None:
        self.shown["score"] = f"{scores['eval/d4rl_normalized_score']:.1f}"
        self.write(step, scores)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile does not count as time of updates."""
        before = time.perf_counter()
        yield
        self.interval_start += time.perf_counter() - before

    def close(self, timeout: float) -> None:
        self.bar.close()
        self.wandb.close(timeout)


# ---------------------------------------------------------------------------- training


class Stop(Exception):
    """A signal asks the run to save and exit."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopSignals:
    """Turns a first SIGTERM or SIGINT into `Stop` at the next `check`; a second one exits."""

    def __init__(self):
        self.received: Optional[int] = None
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self.receive)

    def receive(self, signum: int, frame: Any) -> None:
        if self.received:
            os._exit(128 + signum)
        self.received = signum

    def check(self) -> None:
        if self.received:
            raise Stop(self.received)


class Run:
    """All that a run's future depends on, and the step that moves it on."""

    def __init__(self, config: Config):
        self.config = config
        self.device = resolve_device(config.device)
        set_precision(config.precision, self.device)
        keep_freed_memory()
        torch.manual_seed(config.seed)
        self.task, self.evaluator = Task(config.env), Evaluator(config)
        self.dataset = load_dataset(config, self.task)
        dims = self.task.observation_dim, self.task.action_dim
        self.offline = OfflineBuffer(self.dataset, self.device)
        online_capacity = max(1, min(config.buffer_size, config.online_iterations))
        self.online = ReplayBuffer(online_capacity, *dims, self.device)
        self.agent = Agent(*dims, config, self.device)
        self.collector = Collector(self.task, self.dataset, self.online, config)
        self.metrics = MeanMetrics()
        self.step = 0  # updates in the offline phase, then environment steps
        self.evaluated_at = -1

    def advance(self) -> dict[str, float]:
        """One update offline, or one environment step and its updates online.

        Returns the metrics of the training episode that this step ended, if it did.
        """
        config, online = self.config, self.step >= self.config.offline_iterations
        before = self.random_states()
        try:
            ended = self.collector.step(self.agent) if online else {}
        except EnvironmentFailure:
            self.set_random_states(before)  # as if the step had not been tried
            raise
        self.step += 1
        for _ in range(config.online_utd_ratio if online else 1):
            if not online:
                batch = self.offline.sample(config.batch_size)
            elif self.online.size < config.batch_size - config.offline_batch_size:
                break  # the buffer does not hold its share of a batch yet
            else:
                batch = sample_mixed(self.offline, self.online, config)
            self.metrics.add(self.agent.update(batch, online), self.step)
        return ended

    def evaluate(self, between: Callable) -> dict[str, float]:
        """Mean score and success rate of the policy now."""
        episodes = self.evaluator.evaluate(self.agent, self.dataset.scaling, between)
        self.evaluated_at = self.step
        metrics = {"eval/d4rl_normalized_score": float(np.mean([e.score for e in episodes]))}
        if self.task.has_goal:
            metrics["eval/success_rate"] = float(np.mean([e.success for e in episodes]))
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, but for the online buffer, which transitions.bin holds."""
        return {
            "config": dataclasses.asdict(self.config),
            "scaling": {k: torch.as_tensor(v) for k, v in self.dataset.scaling._asdict().items()},
            "step": self.step,
            "evaluated_at": self.evaluated_at,
            "agent": self.agent.state_dict(),
            "collector": self.collector.state_dict(),
            "metrics": dict(vars(self.metrics)),
            "random_states": self.random_states(),
        }

    def load_state_dict(self, state: dict[str, Any], stored: Batch) -> None:
        """Go on from a checkpoint and the online transitions stored with it."""
        self.step, self.evaluated_at = state["step"], state["evaluated_at"]
        self.agent.load_state_dict(state["agent"])
        self.collector.load_state_dict(state["collector"], stored)
        vars(self.metrics).update(state["metrics"])
        self.set_random_states(state["random_states"])

    def random_states(self) -> list[Tensor]:
        """Of the CPU and, if it is used, the GPU."""
        cuda = self.device.type == "cuda"
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if cuda else [])]

    def set_random_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0].cpu())
        for state in states[1:]:
            torch.cuda.set_rng_state(state.cpu(), self.device)

    def summary(self) -> str:
        n, episodes = len(self.dataset.transitions), self.dataset.n_episodes
        bounds = self.dataset.rows.returns_to_go[self.dataset.transitions]
        return (
            f"{self.config.run_name}: networks on {self.device}, physics by {d4rl_compat.PHYSICS}\n"
            f"{n:,} transitions of {episodes:,} episodes, returns-to-go from {bounds.min():.4g} "
            f"to {bounds.max():.4g}; starting at step {self.step:,} of {self.config.total_steps:,}"
        )


def open_directory(config: Config) -> Optional[RunDirectory]:
    """The run's directory, or None; raises `InputError` where it cannot be used."""
    if config.checkpoints_path is None:
        return None
    try:
        directory = RunDirectory(config)
    except OSError as error:
        raise InputError(f"checkpoints_path: cannot write there ({error})") from None
    if directory.checkpoints() and not config.resume:
        raise InputError(f"resume: {directory.path} holds a run, expected none; take --resume true")
    return directory


def start_or_resume(run: Run, directory: Optional[RunDirectory]) -> None:
    """Put `run` where the last checkpoint of `directory` stands, else where `load_model` says."""
    state = directory.load(run.device) if directory else None
    load_model = run.config.load_model
    if state:
        others = differing_options(dataclasses.asdict(run.config), state["config"])
        if others:
            raise InputError(f"checkpoints_path: {directory.path} holds a run with {others}")
        shape = run.task.observation_dim, run.task.action_dim
        run.load_state_dict(state, directory.read_transitions(*shape))
    elif load_model:
        state = load_checkpoint(Path(load_model), run.device)
        try:
            run.agent.load_state_dict(state["agent"])
        except (KeyError, ValueError, RuntimeError):
            saved = differing_options(dataclasses.asdict(run.config), state.get("config", {}))
            raise InputError(
                f"load_model: {load_model} is of other networks; its run differs in {saved}"
            ) from None
    if directory:
        run.collector.store = directory.add_transitions


def train(config: Config) -> None:
    """Pre-train offline, then fine-tune online, in a run that survives what may befall it.

    Raises `InputError` for wrong input, `RunError` for what ends the run later, and `Stop`, all
    with everything saved that can be.
    """
    signals = StopSignals()
    run = Run(config)  # first, so that wrong input leaves nothing behind
    directory = open_directory(config)
    start_or_resume(run, directory)
    print(run.summary())
    log = Log(config, directory, run.step)
    patience = 1.0  # seconds for W&B's last records, when there is a hurry
    try:
        try:
            train_loop(run, log, directory, signals)
            patience = 60.0
        except (Stop, EnvironmentFailure):
            save(run, directory)
            raise
    except (RunError, OSError) as error:
        saved = directory.checkpoints() if directory else []
        last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint"
        raise RunError(f"{error}; {last}") from error
    finally:
        log.close(patience)


def train_loop(run: Run, log: Log, directory: Optional[RunDirectory], signals: StopSignals) -> None:
    config = run.config
    saved = run.step, run.evaluated_at
    while True:
        with log.paused():
            if config.is_due(run.step, config.eval_freq) and run.evaluated_at != run.step:
                log.write_scores(run.step, run.evaluate(signals.check))
            now = run.step, run.evaluated_at
            if config.is_due(run.step, config.checkpoint_freq) and saved != now:
                save(run, directory)
                saved = now
        if run.step == config.total_steps:
            return
        signals.check()
        take_step(run, log)


def take_step(run: Run, log: Log) -> None:
    if ended := run.advance():
        log.write(run.step, ended)
    log.bar.update()
    if run.step % run.config.log_freq == 0 or run.step == run.config.total_steps:
        log.write_means(run.step, run.metrics)


def save(run: Run, directory: Optional[RunDirectory]) -> None:
    run.metrics.check()  # a broken run leaves the good checkpoints alone
    if directory:
        directory.save(run.state_dict(), keep=run.config.phase_ends)


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # in a log file or a pipe too
    code, message = 0, None
    try:
        train(parse_config())
    except Stop as stop:
        code, message = 128 + stop.signum, f"{stop}; the same command goes on from here"
    except (InputError, RunError) as error:
        code, message = 2 if isinstance(error, InputError) else 1, f"error: {error}"
    if message:
        print("cal_ql.py:", *message.split(), file=sys.stderr)  # one line, always
    if any(thread.name == "W&B" for thread in threading.enumerate()):
        sys.stderr.flush()
        os._exit(code)  # it hangs, and its exit handlers would wait for it
    sys.exit(code)


if __name__ == "__main__":
    main()
