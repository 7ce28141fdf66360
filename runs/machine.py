"""What this machine has: cores, memory, processor."""

import contextlib
import ctypes
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from runs.errors import InputError

CONTROL_GROUPS = Path("/sys/fs/cgroup")


def control_group_folders(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """The folders of this process's control group and of those around it, of versions 2 and 1.

    In a container a path may be the host's, and not exist.
    """
    with contextlib.suppress(OSError, ValueError):  # there are no groups
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            names = [controllers, controller] if controllers else ["", "unified"]
            if controllers and controller not in controllers.split(","):
                continue
            for name in names:
                folder = root / name / path.lstrip("/")
                while folder.is_relative_to(root / name):
                    yield folder
                    folder = folder.parent


def numbers_in(path: Path) -> list[float]:
    """The numbers in a control group's file; [] without one. "max" and -1 are infinite."""
    try:
        words = path.read_text().split()
        return [math.inf if word in ("max", "-1") else float(word) for word in words]
    except (OSError, ValueError):
        return []


def core_limit(root: Path = CONTROL_GROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """The smallest quota of the control groups that this process is in, in cores."""
    limits = [math.inf]
    for folder in control_group_folders("cpu", root, own):
        quota = numbers_in(folder / "cpu.cfs_quota_us")
        for numbers in (
            numbers_in(folder / "cpu.max"),
            quota + numbers_in(folder / "cpu.cfs_period_us"),
        ):
            if len(numbers) == 2:
                limits.append(numbers[0] / numbers[1])
    return min(limits)


def memory_limit(root: Path = CONTROL_GROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """The smallest limit of the control groups that this process is in, in bytes."""
    limits = [math.inf]
    for folder in control_group_folders("memory", root, own):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limits += numbers_in(folder / name)
    return min(limits)


def available_cores() -> int:
    """The cores that this process may use, by its affinity and its control groups' quotas."""
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), core_limit())))


def resolve_device(name: str, precision: Optional[str]) -> torch.device:
    """The device of that name, set to the precision; raises `InputError` if it is not here."""
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(
            f"device: found {name!r}, but this machine has {count} CUDA devices; "
            "take --device cpu or --device auto"
        )
    set_precision(precision or ("tf32" if device.type == "cuda" else "float32"), device)
    return device


TORCH_PRECISIONS = {"float32": "highest", "tf32": "high", "bf16": "medium"}


def set_precision(precision: str, device: torch.device) -> None:
    """Set the rounding of matrix products' factors; raises `InputError` if the device lacks it."""
    on_cuda = device.type == "cuda"
    if precision == "tf32" and not on_cuda:
        raise InputError(f"precision: found tf32, expected float32 on {device}")
    if precision == "bf16" and on_cuda:
        raise InputError(f"precision: found bf16, expected float32 or tf32 on {device}")
    if precision == "bf16" and not rounds_to_bfloat16():
        raise InputError(
            "precision: found bf16, expected float32 on this processor, which rounds no products "
            "to bfloat16 (as AMX does), so it would not be faster; take --precision float32"
        )
    torch.set_float32_matmul_precision(TORCH_PRECISIONS[precision])


@contextlib.contextmanager
def cpu_products(precision: str) -> Iterator[None]:
    """Within, the CPU's matrix products round their factors ("bf16", if it can) or not ("ieee")."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cpu_products("bf16")
def rounds_to_bfloat16() -> bool:
    """Whether products of a hidden layer's size are rounded here: a test, since no flag says so."""
    factor = torch.full((2, 256, 256), 1.001)  # in bfloat16 that is 1
    return bool((factor @ factor == 256.0).all())


def memory_needed(config: Any, observation_dim: int, action_dim: int) -> float:
    """A lower bound of the bytes that a run with these options needs."""
    hidden = config.hidden_dim
    inputs = observation_dim + action_dim
    critics = config.n_critics * hidden * (inputs + hidden * (config.q_n_hidden_layers - 1))
    actor = hidden * (inputs + hidden * (config.actor_n_hidden_layers - 1))
    offline = config.cql_alpha and config.offline_iterations
    online = config.cql_alpha_online and config.online_iterations
    rows = config.batch_size * (1 + (3 * config.cql_n_actions if offline or online else 0))
    activations = config.n_critics * rows * hidden * config.q_n_hidden_layers  # for the gradient
    stored = min(config.buffer_size, config.online_iterations) * (2 * inputs - action_dim + 3)
    return 4.0 * (5 * critics + 4 * actor + activations + stored)  # gradients, Adam, targets too


def check_memory(
    config: Any, observation_dim: int, action_dim: int, device: torch.device, names: str
) -> None:
    """Raise `InputError` if the device has fewer bytes than `memory_needed`.

    The message has the options `names` and those of batches and buffers.
    """
    needed = memory_needed(config, observation_dim, action_dim)
    left = available_memory(device)
    names += " batch_size cql_n_actions buffer_size online_iterations"
    found = ", ".join(f"{name} {getattr(config, name)}" for name in names.split())
    if needed > left:
        raise InputError(
            f"{found}: found {left / 1e9:,.1f} GB of memory left on {device}, expected at least "
            f"{needed / 1e9:,.1f} GB for these; take smaller ones"
        )


def available_memory(device: torch.device) -> float:
    """Bytes that the device's memory can still give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    (kilobytes,) = re.findall(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
    return min(1024.0 * int(kilobytes), memory_limit())


def flush_denormals() -> None:
    """Have the CPU treat numbers below 1e-38 as 0: it is many times slower with them."""
    for kind in (np.float32, np.float64):
        np.finfo(kind)  # numpy measures the smallest number once; afterwards it would warn
    torch.set_flush_denormal(True)


def keep_freed_memory() -> None:
    """Have glibc reuse the memory that an update frees; new memory costs a tenth of CPU time."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, in bytes


def provenance() -> dict[str, Any]:
    """The code and the machine of a run, which decide the last bits of its numbers."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[1]), "describe", "--always", "--dirty"]
    commit, processor = "unknown", "unknown"
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        found = subprocess.run(git, capture_output=True, text=True, timeout=5)
        commit = found.stdout.strip() or commit
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    elif models := re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
        processor = models[0]
    threads = torch.get_num_threads()
    return dict(commit=commit, torch=torch.__version__, processor=processor, threads=threads)


def random_states() -> list[torch.Tensor]:
    """The states of torch's generators: the CPU's and, if CUDA is in use, its devices'."""
    on_cuda = torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if on_cuda else [])]


def set_random_states(states: list[torch.Tensor]) -> None:
    """Set the generators back to the states from `random_states`."""
    torch.set_rng_state(states[0].cpu())
    for number, state in zip(range(torch.cuda.device_count()), states[1:]):
        torch.cuda.set_rng_state(state.cpu(), number)


@contextlib.contextmanager
def kept_random_states() -> Iterator[None]:
    """Random numbers drawn within do not change those drawn afterwards."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


WORTH_COMPILING = 5_000  # updates of the offline phase


def should_compile(option: Optional[bool], offline_updates: int) -> bool:
    """Whether to compile: as the option says or, for None, if it pays and there is a C++ compiler.

    It pays from `WORTH_COMPILING` offline updates on, and in runs without an offline phase. The
    length of the online phase does not count, so an extended run continues as it began.
    """
    if option is not None:
        return option
    has_compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    return has_compiler and (offline_updates == 0 or offline_updates >= WORTH_COMPILING)


class Compiled:
    """A function of tensors (nested in tuples) and, last, of plain values, compiled into one graph.

    On CUDA the graph is captured. If compiling fails, the original function is called.
    """

    def __init__(self, function: Callable):
        torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad, in the graph
        how = {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead"}
        self.function = function
        self.compiled: Optional[Callable] = torch.compile(function, **how)
        self.ready: set[tuple] = set()  # plain values that it has been called with

    def is_ready(self, values: tuple) -> bool:
        """Whether a call with these plain values starts without compiling."""
        return self.compiled is None or values in self.ready

    def __call__(self, *args: Any) -> Any:
        if self.compiled:
            try:
                torch.compiler.cudagraph_mark_step_begin()
                result = self.compiled(*args)
                self.ready.add(args[-1])
                return result
            except Exception as error:  # a compiler can raise any exception
                reason = " ".join(str(error).split()[:40])
                print(f"compile: torch.compile fails, so the run continues eagerly ({reason})")
                self.compiled = None
        return self.function(*args)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
