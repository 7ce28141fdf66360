"""What this machine has: cores, memory, processor."""

import contextlib
import ctypes
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch


def control_group_limit(name: str) -> float:
    """A limit of this process's control group: cpu.max in cores, memory.max in bytes; or inf."""
    try:
        value, period = [*Path("/sys/fs/cgroup", name).read_text().split(), "1"][:2]
        return float(value) / float(period)
    except (OSError, ValueError):  # there is no group, or it says "max"
        return math.inf


def available_cores() -> int:
    """Those that this process may use, by its affinity and its control group's quota."""
    return math.ceil(min(len(os.sched_getaffinity(0)), control_group_limit("cpu.max")))


def available_memory(device: torch.device) -> float:
    """Bytes that the device's memory can still give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    (kilobytes,) = re.findall(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
    return min(1024.0 * int(kilobytes), control_group_limit("memory.max"))


def flush_denormals() -> None:
    """Have the CPU take numbers below 1e-38 for 0: it is many times slower with them."""
    for kind in (np.float32, np.float64):
        np.finfo(kind)  # numpy measures the smallest number once; afterwards it would warn
    torch.set_flush_denormal(True)


def keep_freed_memory() -> None:
    """Have glibc reuse what an update frees; to get it anew costs a tenth of a CPU's time."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, in bytes


def provenance() -> dict[str, Any]:
    """By what code and where a run is made: what decides the last bits of its numbers."""
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
