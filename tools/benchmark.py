"""How close to the machine's limit a configuration trains, in one run on this machine.

    python tools/benchmark.py --config_path configs/antmaze.yaml --env antmaze-umaze-v2

Takes the options of cal_ql.py, and --json, --repeats and --transitions. The data is random,
of the task's sizes, unless --dataset_path names some: speed does not depend on its values.
Every figure is the median of interleaved repeats, since machines are noisy.

The bound is the rate at which this machine could do an update that consisted of nothing but its
matrix products: their floating-point operations, counted by formula, over the measured peak of the
products of a hidden layer of the critics (forward, gradient of the input, gradient of the weight;
written to memory that is there already; whole or in pieces, whichever is faster).
"""

import copy
import dataclasses
import functools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cal_ql
import tasks
from runs import machine
from runs.directory import open_directory
from runs.errors import InputError, run_program
from runs.signals import StopSignals
from runs.workers import Workers
from tools.command_line import Parser


def seconds(work: Callable, device: torch.device, count: int = 1) -> float:
    """Of one call, averaged over `count`."""
    start = time.perf_counter()
    for _ in range(count):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count


def write_random_data(path: Path, task: tasks.Task, n: int) -> None:
    """A file in D4RL's layout."""
    random = np.random.default_rng(0)
    rows = np.arange(n)
    with h5py.File(path, "w") as file:
        file["observations"] = random.normal(size=(n, task.observation_dim)).astype(np.float32)
        actions = random.uniform(-1.0, 1.0, (n, task.action_dim)) * task.action_scale
        file["actions"] = actions.astype(np.float32)
        file["rewards"] = (rows % 3000 == 2999).astype(np.float32)
        file["terminals"] = np.zeros(n, bool)
        file["timeouts"] = (rows + 1) % task.max_episode_steps == 0


# ---------------------------------------------------------------------------- the bound


def flops(config: cal_ql.Config, observation_dim: int, action_dim: int) -> float:
    """Floating-point operations of the matrix products that one update cannot do without."""
    batch, n, hidden = config.batch_size, config.cql_n_actions, config.hidden_dim

    def critics(n_actions: int) -> tuple[int, int]:
        """Multiply-adds forward (a weight's gradient takes as many), and of the input gradients."""
        rows = batch * n_actions
        inner = rows * hidden * (hidden * (config.q_n_hidden_layers - 1) + 1)
        first = hidden * (batch * observation_dim + rows * action_dim)
        return config.n_critics * (first + inner), config.n_critics * inner

    regularized, regularized_inputs = critics(1 + 3 * n)
    target, _ = critics(n if config.cql_max_target_backup else 1)
    judged, judged_inputs = critics(1)  # the actor's loss; its input gradient reaches the actions
    inner = batch * hidden * (hidden * (config.actor_n_hidden_layers - 1) + 2 * action_dim)
    actor = batch * hidden * observation_dim + inner
    total = 2 * regularized + regularized_inputs + target
    total += judged + judged_inputs + config.n_critics * batch * hidden * action_dim
    total += 3 * actor + inner  # at s and s' forward, and backward at s
    return 2.0 * total


def hidden_products(config: cal_ql.Config, device: torch.device) -> Callable[[int], None]:
    """The three products of a hidden layer of the critics, as a function of the rows at a time."""
    rows, hidden = config.batch_size * (1 + 3 * config.cql_n_actions), config.hidden_dim
    n = config.n_critics
    x, y, out = (torch.randn(n, rows, hidden, device=device) for _ in range(3))
    weight, weight_out = (torch.randn(n, hidden, hidden, device=device) for _ in range(2))

    def multiply(size: int) -> None:
        for a, b, c in zip(x.split(size, 1), y.split(size, 1), out.split(size, 1)):
            torch.bmm(a, weight, out=c)
            torch.bmm(b, weight.mT, out=c)
            torch.bmm(a.mT, b, out=weight_out)

    return multiply


# ---------------------------------------------------------------------------- where time goes


KINDS = {
    "matrix products": ("aten::bmm", "aten::baddbmm", "aten::mm", "aten::addmm"),
    "ReLU and its gradient": ("aten::relu_", "aten::clamp_min_", "aten::threshold_backward")
    + ("aten::relu", "aten::clamp_min"),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_"),
    "optimizers": ("aten::_fused_adam_", "aten::_foreach_lerp_", "aten::_foreach_add_"),
}


def shares(update: Callable) -> dict[str, float]:
    """Of the CPU's time in an update, by kind of operator."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        update()
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    spent = {
        kind: sum(event.self_cpu_time_total for event in events if event.key in names) / total
        for kind, names in KINDS.items()
    }
    spent["all else"] = 1.0 - sum(spent.values())
    return {f"share of the update's time: {kind}": share for kind, share in spent.items()}


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


def kernels(config: cal_ql.Config, task: tasks.Task, compiled: bool) -> int:
    """Kernels an update, counted by profiling the path of a GPU on the CPU, in small sizes."""
    config = dataclasses.replace(config, compile=compiled, batch_size=8, hidden_dim=32)
    device = torch.device("cpu")
    agent = cal_ql.Agent(task.observation_dim, task.action_dim, config, device)
    batch = cal_ql.Batch(
        observations=torch.randn(config.batch_size, task.observation_dim),
        actions=torch.rand(config.batch_size, task.action_dim) * 2.0 - 1.0,
        rewards=torch.randn(config.batch_size),
        next_observations=torch.randn(config.batch_size, task.observation_dim),
        terminals=torch.zeros(config.batch_size),
        returns_to_go=torch.randn(config.batch_size),
    )
    cache, cal_ql.CPU_CACHE = cal_ql.CPU_CACHE, sys.maxsize  # a GPU's batch is in one piece
    torch._inductor.config.cpp.enable_kernel_profile = True
    for _ in range(2):
        agent.update(batch, online=False)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        agent.update(batch, online=False)
    cal_ql.CPU_CACHE = cache
    return sum(count_kernels(event) for event in profiled.events() if event.cpu_parent is None)


# ---------------------------------------------------------------------------- the loops


def train_steps(run: cal_ql.Run, log: cal_ql.Log, stop: StopSignals, n: int, online: bool) -> None:
    """n steps of the real loop, between two evaluations and two episodes."""
    for _ in range(n):
        stop.check()
        cal_ql.train_step(run, online)
        log.advance()
        if run.progress.step % run.config.log_freq == 0:
            log.write_means(run.progress.step, run.metrics)
            run.metrics.count = 0


def measure_loops(run: cal_ql.Run, log: cal_ql.Log, repeats: int, n: int) -> dict[str, float]:
    """Seconds of an update, of the products of a hidden layer and of the loops and their parts."""
    config, device, stop = run.config, run.agent.device, StopSignals()
    batch = run.dataset.sample(config.batch_size)
    multiply = hidden_products(config, device)
    actor, lengths = copy.deepcopy(run.agent.actor).cpu(), []

    def play() -> None:
        scaling = run.dataset.scaling
        episode = cal_ql.play_episode(run.task, len(lengths), actor, scaling, explore=True)
        lengths.append(len(episode.rewards))

    run.play(stop)  # something online to learn from
    parts: dict[str, Callable] = {
        "products whole": lambda: multiply(sys.maxsize),
        "products in pieces": lambda: multiply(1024),
        "update": lambda: run.agent.update(batch, online=False),
        "sample": lambda: run.dataset.sample(config.batch_size),
    }
    times: dict[str, list[float]] = {name: [] for name in (*parts, "offline", "online", "play")}
    for _ in range(repeats + 1):
        for name, work in parts.items():
            times[name].append(seconds(work, device, n))
        for name in ("offline", "online"):
            loop = functools.partial(train_steps, run, log, stop, n, name == "online")
            times[name].append(seconds(loop, device) / n)
        times["play"].append(seconds(play, device) / lengths[-1])
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def evaluation_rates(run: cal_ql.Run, repeats: int) -> dict[int, float]:
    """Environment steps a second of an evaluation, by the number of processes, once started."""
    rates = {1: [], machine.available_cores(): []}
    pools = {}
    how = {"actor": copy.deepcopy(run.agent.actor).cpu(), "scaling": run.dataset.scaling}
    play = functools.partial(cal_ql.play_episode, **how, explore=False)
    for workers in rates:
        make_task = functools.partial(tasks.make, run.config.env, run.config.dataset_path)
        pools[workers] = Workers(workers, 16, run.task, make_task)
    for _ in range(repeats + 1):
        for workers, pool in pools.items():
            start = time.perf_counter()
            episodes = pool.map(play, range(16))
            steps = sum(len(episode.rewards) for episode in episodes)
            rates[workers].append(steps / (time.perf_counter() - start))
    pools.popitem()[1].close()
    return {workers: statistics.median(values[1:]) for workers, values in rates.items()}


# ---------------------------------------------------------------------------- the report


def buffer_bytes(rows: cal_ql.Batch) -> int:
    storages = {c.untyped_storage().data_ptr(): c.untyped_storage().nbytes() for c in rows}
    return sum(storages.values())


def benchmark(
    config: cal_ql.Config, repeats: int, transitions: int = 0, count_kernels: bool = False
) -> dict[str, object]:
    """All figures by name. Without a `dataset_path` it trains on random `transitions`."""
    task = tasks.make(config.env, config.dataset_path)
    if config.dataset_path is None:
        path = Path(config.checkpoints_path) / "random.hdf5"
        write_random_data(path, task, transitions)
        config = dataclasses.replace(config, dataset_path=str(path))
    start = time.perf_counter()
    with open_directory(config.checkpoints_path, "benchmark", resume=True) as directory:
        run = cal_ql.make_run(config, task, directory)
    device = run.agent.device

    def update() -> None:
        run.agent.update(run.dataset.sample(config.batch_size), online=False)

    update()
    first_update = time.perf_counter() - start
    n = max(2, round(1.0 / seconds(update, device, 3)))  # calls a second
    os.environ["WANDB_MODE"] = "offline"
    log = cal_ql.Log(directory, "benchmark", vars(config), step=0)
    log.bar.disable = True
    needed = flops(config, task.observation_dim, task.action_dim)
    times = measure_loops(run, log, repeats, n)
    log.close(10.0)
    rows = config.batch_size * (1 + 3 * config.cql_n_actions)
    products = 3 * 2 * config.n_critics * rows * config.hidden_dim**2
    peak = products / min(times["products whole"], times["products in pieces"])
    offline = buffer_bytes(run.dataset.rows) + buffer_bytes([run.dataset.transitions])
    rows = len(run.dataset.transitions)
    rates = evaluation_rates(run, repeats)
    cuda = device.type == "cuda"
    compiled = {"eager": False, "compiled": True} if count_kernels else {}
    return {
        "processor": machine.provenance()["processor"],
        "threads": torch.get_num_threads(),
        "peak of the matrix products, GFLOP/s": peak / 1e9,
        "an update, GFLOP": needed / 1e9,
        "bound, updates/s": peak / needed,
        "update alone, updates/s": 1 / times["update"],
        "update alone, share of the bound": needed / peak / times["update"],
        "offline loop, updates/s": 1 / times["offline"],
        "offline loop, share of the update alone": times["update"] / times["offline"],
        "online loop with its episodes, steps/s": 1 / (times["online"] + times["play"]),
        **shares(update),
        "sampling a batch, ms": 1e3 * times["sample"],
        "playing, ms per environment step": 1e3 * times["play"],
        **{f"evaluation, steps/s, processes: {k}": rate for k, rate in rates.items()},
        "evaluation, all cores to one": max(rates.items())[1] / rates[1],
        "offline transitions": rows,
        "loading them, and everything up to the first update, s": first_update,
        "bytes per offline transition": offline / rows,
        "bytes per online transition": buffer_bytes(run.online.rows) / run.online.capacity,
        "both buffers, GB": (offline + buffer_bytes(run.online.rows)) / 1e9,
        "peak memory of the process, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        **({"peak memory of the GPU, GB": torch.cuda.max_memory_allocated() / 1e9} if cuda else {}),
        **{f"kernels an update, {k}": kernels(config, task, v) for k, v in compiled.items()},
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, for machines")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--transitions", type=int, default=1_000_000, help="of random data")
    args, options = parser.parse_known_args()
    for name, least in (("repeats", 1), ("transitions", 2)):
        if (found := getattr(args, name)) < least:
            raise InputError(f"{name}: found {found}, expected {least} or more")
    config = cal_ql.parse_config(options)
    with tempfile.TemporaryDirectory() as directory:
        config = dataclasses.replace(config, checkpoints_path=directory, log_freq=10)
        figures = benchmark(config, args.repeats, args.transitions, count_kernels=True)
    if args.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"| {name} | {value if isinstance(value, str) else f'{value:,.4g}'} |")


if __name__ == "__main__":
    sys.exit(run_program(main, "benchmark.py"))
