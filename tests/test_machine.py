"""What the machine gives: limits of nested control groups, of both versions, and precisions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from runs import machine
from runs.errors import InputError
from runs.machine import available_cores, core_limit, memory_limit, should_compile

GB = 2**30
NONE_IN_V1 = 9223372036854771712  # what version 1 writes for no limit

# What /proc/self/cgroup says, the files, and the limits in cores and bytes
TREES = {
    "no groups": (None, {}, math.inf, math.inf),
    "a container": (
        "0::/",
        {"cpu.max": "150000 100000", "memory.max": f"{2 * GB}"},
        1.5,
        2 * GB,
    ),
    "no limit": ("0::/", {"cpu.max": "max 100000", "memory.max": "max"}, math.inf, math.inf),
    "slurm's job around its task": (
        "0::/slurm/job_1/step_0/user/task_0",
        {
            "slurm/job_1/cpu.max": "400000 100000",
            "slurm/job_1/step_0/cpu.max": "max 100000",
            "slurm/job_1/memory.max": f"{8 * GB}",
            "slurm/job_1/step_0/user/task_0/memory.max": "max",
            "slurm/memory.max": f"{64 * GB}",
            "slurm/job_2/memory.max": "1",
        },
        4,
        8 * GB,
    ),
    "a path of the host's": (
        "0::/docker/0123",
        {"cpu.max": "200000 100000", "memory.max": f"{GB}"},
        2,
        GB,
    ),
    "version 1": (
        "12:pids:/a\n5:cpu,cpuacct:/slurm/uid_1/job_2/step_0\n3:memory:/slurm/uid_1/job_2\n0::/x",
        {
            "cpu,cpuacct/slurm/uid_1/job_2/cpu.cfs_quota_us": "300000",
            "cpu,cpuacct/slurm/uid_1/job_2/cpu.cfs_period_us": "100000",
            "cpu,cpuacct/slurm/uid_1/job_2/step_0/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/slurm/uid_1/job_2/step_0/cpu.cfs_period_us": "100000",
            "memory/slurm/uid_1/memory.limit_in_bytes": f"{4 * GB}",
            "memory/slurm/uid_1/job_2/memory.limit_in_bytes": f"{NONE_IN_V1}",
            "pids/a/memory.limit_in_bytes": "1",
        },
        3,
        4 * GB,
    ),
    "version 1, mounted under another name": (
        "5:cpuacct,cpu:/job",
        {"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "100000"},
        0.5,
        math.inf,
    ),
    "version 2 beside version 1": (
        "3:memory:/\n0::/job",
        {
            "unified/job/cpu.max": "100000 100000",
            "memory/memory.limit_in_bytes": f"{3 * GB}",
        },
        1,
        3 * GB,
    ),
    "not as expected": ("text\n0::/a", {"cpu.max": "", "memory.max": "?"}, math.inf, math.inf),
    "a path that leads out": ("0::/../../job", {"memory.max": f"{GB}"}, math.inf, GB),
}


@pytest.mark.parametrize("name", TREES)
def test_limits_of_the_control_groups_that_a_process_is_in(name: str, tmp_path: Path) -> None:
    own, files, cores, memory = TREES[name]
    if own is not None:
        (tmp_path / "own").write_text(own)
    for place, text in files.items():
        path = tmp_path / "root" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert core_limit(tmp_path / "root", tmp_path / "own") == cores
    assert memory_limit(tmp_path / "root", tmp_path / "own") == memory


def test_less_than_a_core_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runs.machine.core_limit", lambda: 0.3)
    assert available_cores() == 1


@pytest.mark.parametrize(
    ("option", "compiler", "updates", "expected"),
    [
        (None, "sh", 5_000, True),
        (None, "sh", 4_999, False),
        (None, "sh", 1, False),
        (None, "sh", 0, True),  # without an offline phase
        (None, "no-such-compiler", 5_000, False),
        (None, "no-such-compiler", 0, False),
        (True, "no-such-compiler", 1, True),
        (False, "sh", 5_000, False),
        (False, "sh", 0, False),
    ],
)
def test_runs_are_compiled_unless_the_offline_phase_is_short(
    option, compiler, updates, expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert should_compile(option, updates) == expected


# ---------------------------------------------------------------------------- precision


def error_of_a_product() -> float:
    """The largest in a product of the size that a hidden layer's have."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2, 256, 256, generator=generator) for _ in range(2))
    return float((left @ right - left.double() @ right.double()).abs().max())


def test_bf16_is_accepted_where_products_are_then_rounded() -> None:
    try:
        machine.resolve_device("cpu", "bf16")
    except InputError as error:
        with machine.cpu_products("bf16"):
            assert error_of_a_product() < 1e-3
        assert str(error).startswith("precision: found bf16, expected float32 on this processor")
    else:
        assert error_of_a_product() > 1e-2


@pytest.mark.parametrize("next_precision", [None, "float32"])
def test_a_run_in_float32_may_follow_one_in_bf16(next_precision, monkeypatch) -> None:
    exact = error_of_a_product()
    monkeypatch.setattr(machine, "rounds_to_bfloat16", lambda: True)
    machine.resolve_device("cpu", "bf16")
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    machine.resolve_device("cpu", next_precision)
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert error_of_a_product() == exact < 1e-3


def test_bf16_is_no_precision_of_cuda() -> None:
    with pytest.raises(InputError, match="found bf16, expected float32 or tf32 on cuda:1"):
        machine.set_precision("bf16", torch.device("cuda:1"))


@pytest.mark.parametrize("precision, is_tf32", [("float32", False), ("tf32", True)])
def test_precisions_of_cuda(precision, is_tf32) -> None:
    machine.set_precision(precision, torch.device("cuda"))
    assert torch.backends.cuda.matmul.allow_tf32 == is_tf32


@pytest.mark.parametrize("rounding", [1.0, 1.001])
def test_bf16_is_found_by_trying(rounding: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies ones where it is given 1.001 rounds, since bfloat16 does."""
    assert torch.tensor(1.001).bfloat16() == 1.0
    monkeypatch.setattr(torch, "full", lambda shape, value: rounding * torch.ones(shape))
    with machine.cpu_products("ieee"):
        assert machine.rounds_to_bfloat16.__wrapped__() == (rounding == 1.0)
