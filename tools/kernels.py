"""Where an update's time goes: operators on a CPU, kernels on a GPU."""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import cal_ql
import tasks
from tools.roofline import in_one_piece

KINDS = {
    "matrix products": ("aten::bmm", "aten::baddbmm", "aten::mm", "aten::addmm"),
    "ReLU and its gradient": ("aten::relu_", "aten::clamp_min_", "aten::threshold_backward")
    + ("aten::relu", "aten::clamp_min"),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_"),
    "optimizers": ("aten::_fused_adam_", "aten::_foreach_lerp_", "aten::_foreach_add_"),
}
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events


def shares(update: Callable) -> dict[str, float]:
    """The share of each kind of operator in the CPU time of an update."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        update()
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    spent = {
        kind: sum(event.self_cpu_time_total for event in events if event.key in names) / total
        for kind, names in KINDS.items()
    }
    spent["everything else"] = 1.0 - sum(spent.values())
    return {f"share of the update's time: {kind}": share for kind, share in spent.items()}


class OnGPU(NamedTuple):
    """What a GPU does in one call of a function."""

    kernels: float
    launches: float  # by the CPU; one for a captured graph
    copies: float  # and fills
    seconds: float  # of GPU time for all of these, without the gaps between them


def on_gpu(work: Callable, device: torch.device, count: int = 10) -> OnGPU:
    """Profile `count` calls of `work`; the averages per call."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiled:
        for _ in range(count):
            work()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return summarize(events, count)


def summarize(events: list[dict[str, Any]], count: int) -> OnGPU:
    """The averages per call from the events of a trace of `count` calls."""
    on_device = [event for event in events if event.get("cat") in ON_GPU]
    kernels = sum(event["cat"] == "kernel" for event in on_device)
    runtime = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    launches = sum("Launch" in event["name"] for event in runtime)
    microseconds = sum(event["dur"] for event in on_device)
    copies = len(on_device) - kernels
    return OnGPU(kernels / count, launches / count, copies / count, microseconds / 1e6 / count)


# ---------------------------------------------------------------------------- without a GPU


def is_kernel(name: str) -> bool:
    """Whether a GPU would launch something for this operator: views and allocations are free."""
    if "cpp_fused" in name:  # made by torch.compile
        return True
    free = ("aten::empty", "aten::detach", "aten::_unsafe_view")
    if not name.startswith("aten::") or name.startswith(free):
        return False
    schemas = torch._C._jit_get_schemas_for_operator(name)
    tensors = [r for schema in schemas for r in schema.returns if str(r.type) == "Tensor"]
    return not all(r.alias_info is not None and not r.alias_info.is_write for r in tensors)


def count_kernels(event: torch.autograd.profiler_util.FunctionEvent) -> int:
    if event.name.startswith(("aten::_foreach", "aten::_fused")):
        return 1  # on a GPU
    return sum(map(count_kernels, event.cpu_children)) or int(is_kernel(event.name))


def expected_kernels(config: cal_ql.Config, task: tasks.Task, compiled: bool) -> int:
    """Kernels per update on a GPU: its code path is profiled on the CPU, with small sizes."""
    config = dataclasses.replace(config, compile=compiled, batch_size=8, hidden_dim=32)
    agent = cal_ql.Agent(task.observation_dim, task.action_dim, config, torch.device("cpu"))
    batch = cal_ql.Batch(
        observations=torch.randn(config.batch_size, task.observation_dim),
        actions=torch.rand(config.batch_size, task.action_dim) * 2.0 - 1.0,
        rewards=torch.randn(config.batch_size),
        next_observations=torch.randn(config.batch_size, task.observation_dim),
        terminals=torch.zeros(config.batch_size),
        returns_to_go=torch.randn(config.batch_size),
    )
    torch._inductor.config.cpp.enable_kernel_profile = True
    with in_one_piece():
        for _ in range(2):
            agent.update(batch, online=False)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            agent.update(batch, online=False)
    return sum(count_kernels(event) for event in profiled.events() if event.cpu_parent is None)
