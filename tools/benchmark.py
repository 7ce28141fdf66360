"""Measure how fast a configuration trains, and how close this is to the machine's limit.

    python tools/benchmark.py --config_path configs/antmaze.yaml --env antmaze-umaze-v2

Takes the options of cal_ql.py and those below; docs/benchmark.md explains the figures. The data is
random, with the task's sizes, unless --dataset_path is given: speed does not depend on values.
Every figure is the median of interleaved repeats, since machines are noisy.

The bound is the rate at which this machine could do an update that consists only of its matrix
products. It is the lower of two rates: computing them, at the measured peak of the products of a
hidden layer of the critics, and moving their factors and results, at the measured speed of a copy.
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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import h5py
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cal_ql
import tasks
from runs import machine
from runs.directory import open_directory
from runs.errors import InputError, run_program
from runs.signals import StopSignals
from runs.workers import Workers
from tools import corl, kernels, roofline
from tools.command_line import Parser

Figures = dict[str, Any]  # by name


class Subject(NamedTuple):
    """What is measured, and how thoroughly."""

    config: cal_ql.Config
    run: cal_ql.Run
    log: cal_ql.Log
    stop: StopSignals
    repeats: int
    against: Optional[Path]  # CORL's cal_ql.py
    first_update: float  # seconds until it was done, from before the data was read

    def update(self) -> None:
        self.run.agent.update(self.run.dataset.sample(self.config.batch_size), online=False)


def seconds(work: Callable, device: torch.device, count: int = 1) -> float:
    """Time of a call of `work`, averaged over `count` calls; on CUDA measured by CUDA events."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count
    begin = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - begin) / count


def calls_per_round(work: Callable, device: torch.device) -> int:
    """How many calls take a second (0.3 s on a GPU); at least 2. The first calls are a warm-up."""
    seconds(work, device, 3)
    duration = 0.3 if device.type == "cuda" else 1.0
    return max(2, round(duration / seconds(work, device, 3)))


def write_random_data(path: Path, task: tasks.Task, n: int) -> None:
    """Write n random rows in D4RL's layout."""
    random = np.random.default_rng(0)
    rows = np.arange(n)
    with h5py.File(path, "w") as file:
        file["observations"] = random.normal(size=(n, task.observation_dim)).astype(np.float32)
        actions = random.uniform(-1.0, 1.0, (n, task.action_dim)) * task.action_scale
        file["actions"] = actions.astype(np.float32)
        file["rewards"] = (rows % 3000 == 2999).astype(np.float32)
        file["terminals"] = np.zeros(n, bool)
        file["timeouts"] = (rows + 1) % task.max_episode_steps == 0


# ---------------------------------------------------------------------------- the update


class Variant(NamedTuple):
    """One implementation of the update."""

    name: str
    precision: str
    update: Callable[[], Any]
    first: float  # seconds of its first update, compiling included


def precisions(config: cal_ql.Config, device: torch.device) -> list[str]:
    """The configuration's own; without one, both on CUDA."""
    if config.precision:
        return [config.precision]
    return ["tf32", "float32"] if device.type == "cuda" else ["float32"]


def new_agents(subject: Subject) -> dict[str, cal_ql.Agent]:
    """An eager agent, and one that is compiled at its first update."""
    task, device = subject.run.task, subject.run.agent.device
    return {
        name: cal_ql.Agent(
            task.observation_dim,
            task.action_dim,
            dataclasses.replace(subject.config, compile=name == "compiled"),
            device,
        )
        for name in ("eager", "compiled")
    }


def is_compiled(agent: cal_ql.Agent) -> bool:
    """Whether its updates are, or will be, compiled; false after compiling has failed."""
    return agent.graph is not None and agent.graph.compiled is not None


def make_variants(subject: Subject, batch: cal_ql.Batch, precision: str) -> Iterable[Variant]:
    """Our update, eager and compiled (if that works), and CORL's, on the same batch."""
    config, device = subject.config, subject.run.agent.device
    machine.set_precision(precision, device)
    agents = new_agents(subject)
    updates: dict[str, Callable] = {
        name: functools.partial(agent.update, batch, online=False) for name, agent in agents.items()
    }
    if subject.against:
        updates["CORL's"] = corl.make_update(subject.against, config, batch, device)
    for name, update in updates.items():
        first = seconds(update, device)
        if name == "compiled" and not is_compiled(agents[name]):
            continue
        rate = 1.0 / seconds(update, device, 3)  # on CUDA the second call records a graph
        warm = f"{name}, {precision}: {rate:.3g} updates/s, after {first:.3g} s for the first"
        print(warm, file=sys.stderr, flush=True)  # even if something later hangs
        yield Variant(f"{name}, {precision}", precision, update, first)


def measure_update(subject: Subject) -> Figures:
    """The bounds at each precision, and how close to them each variant comes."""
    config, device = subject.config, subject.run.agent.device
    batch = subject.run.dataset.sample(config.batch_size)
    found = precisions(config, device)
    variants = [v for p in found for v in make_variants(subject, batch, p)]
    works = {v.name: (v.precision, v.update) for v in variants}
    kind = subject.run.agent.kind(online=False)
    multiply = roofline.hidden_products(config, kind, device)
    copying, copied = roofline.hidden_copy(config, kind, device)
    for precision in found:
        works[f"whole, {precision}"] = precision, lambda: multiply(sys.maxsize)
        works[f"pieces, {precision}"] = precision, lambda: multiply(1024)
    works["copying"] = found[0], copying
    times = interleaved(works, device, subject.repeats)

    moved = roofline.bytes_moved(subject.run.agent, batch, kind)
    bounds, figures = find_bounds(subject, moved, copied / times["copying"], times)
    return figures | compare_variants(config, variants, times, bounds)


def find_bounds(
    subject: Subject, moved: float, copying: float, times: dict[str, float]
) -> tuple[dict[str, float], Figures]:
    """The bound at each precision, in updates/s, and the figures behind it."""
    config, task = subject.config, subject.run.task
    kind = subject.run.agent.kind(online=False)
    needed = roofline.flops(config, kind, task.observation_dim, task.action_dim)
    figures: Figures = {
        "GFLOP per update": needed / 1e9,
        "MB moved per update, at least": moved / 1e6,
        "copying, GB/s": copying / 1e9,
        "bound by moving, updates/s": copying / moved,
    }
    bounds = {}
    for precision in precisions(config, subject.run.agent.device):
        product = min(times[f"whole, {precision}"], times[f"pieces, {precision}"])
        peak = roofline.hidden_flops(config, kind) / product
        bounds[precision] = min(peak / needed, copying / moved)
        figures[f"peak of the matrix products, {precision}, GFLOP/s"] = peak / 1e9
        figures[f"bound by products, {precision}, updates/s"] = peak / needed
    return bounds, figures


def interleaved(
    works: dict[str, tuple[str, Callable]], device: torch.device, repeats: int
) -> dict[str, float]:
    """Seconds of each work at its precision: the median of all rounds but the first."""
    times: dict[str, list[float]] = {name: [] for name in works}
    counts: dict[str, int] = {}
    for number in range(repeats + 1):
        for name, (precision, work) in works.items():
            machine.set_precision(precision, device)
            if number == 0:
                counts[name] = calls_per_round(work, device)
            else:
                times[name].append(seconds(work, device, counts[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def compare_variants(
    config: cal_ql.Config,
    variants: list[Variant],
    times: dict[str, float],
    bounds: dict[str, float],
) -> Figures:
    figures: Figures = {}
    for name, precision, _, first in variants:
        is_corls = name.startswith("CORL's")
        rate = 1.0 / times[name]
        figures[f"update, {name}, updates/s"] = rate
        if not is_corls:
            figures[f"update, {name}, share of the bound"] = rate / bounds[precision]
            figures[f"update, {name}, s of the first one"] = first
            beside = f"CORL's, {precision}"
            if beside in times and corl.has_its_sizes(config):
                figures[f"update, {name}, times CORL's"] = times[beside] / times[name]
        elif not corl.has_its_sizes(config):
            figures[f"update, {name}, units of a layer"] = corl.HIDDEN_DIM
    return figures


# ---------------------------------------------------------------------------- the loops


def train_steps(subject: Subject, n: int, online: bool) -> None:
    """n steps of the real loop, between two evaluations and two episodes."""
    run, log = subject.run, subject.log
    for _ in range(n):
        subject.stop.check()
        cal_ql.train_step(run, online)
        log.advance()
        if run.progress.step % run.config.log_freq == 0:
            log.write_means(run.progress.step, run.metrics)
            run.metrics.reset()


def measure_loops(subject: Subject) -> Figures:
    """The speed of both training loops, and the parts of an online step."""
    times = loop_times(subject)
    device = subject.run.agent.device
    step = times["online"] + times["play"]
    figures: Figures = {
        "update in the loops": "compiled" if is_compiled(subject.run.agent) else "eager",
        "offline loop, updates/s": 1 / times["offline"],
        "offline loop, share of the update": times["update"] / times["offline"],
        "online loop with its episodes, steps/s": 1 / step,
        "online loop, share of updating": times["online"] / step,
        "online loop, share of playing": times["play"] / step,
        "cores": machine.available_cores(),
        "sampling a batch, ms": 1e3 * times["sample"],
        "playing, ms per environment step": 1e3 * times["play"],
    }
    if device.type == "cuda":
        busy = kernels.on_gpu(lambda: train_steps(subject, 1, False), device).seconds
        figures["offline loop, share in which the GPU computes"] = busy / times["offline"]
    return figures


def loop_times(subject: Subject) -> dict[str, float]:
    """Seconds of an update, of sampling a batch, of a step of each loop, of playing a step."""
    run, config, device = subject.run, subject.config, subject.run.agent.device
    machine.set_precision(precisions(config, device)[0], device)
    batch = run.dataset.sample(config.batch_size)
    actor, lengths = copy.deepcopy(run.agent.actor).cpu(), []

    def play() -> None:
        scaling = run.dataset.scaling
        episode = cal_ql.play_episode(run.task, len(lengths), actor, scaling, explore=True)
        lengths.append(len(episode.rewards))

    run.play(subject.stop)  # an online episode to learn from
    run.progress.warmup_end = 0  # so that updates begin at once
    n = calls_per_round(subject.update, device)
    works: dict[str, Callable] = {
        "update": lambda: run.agent.update(batch, online=False),
        "sample": lambda: run.dataset.sample(config.batch_size),
    }
    names = [*works, "offline", "online", "play"]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(subject.repeats + 1):
        for name, work in works.items():
            times[name].append(seconds(work, device, n))
        for name in ("offline", "online"):
            loop = functools.partial(train_steps, subject, n, name == "online")
            times[name].append(seconds(loop, device) / n)
        begin = time.perf_counter()
        play()
        times["play"].append((time.perf_counter() - begin) / lengths[-1])
    return {name: statistics.median(values[1:]) for name, values in times.items()}


# ---------------------------------------------------------------------------- the other parts


def measure_evaluation(subject: Subject) -> Figures:
    """Environment steps/s by the number of processes, without the time of their start."""
    run, config = subject.run, subject.config
    policy = {"actor": copy.deepcopy(run.agent.actor).cpu(), "scaling": run.dataset.scaling}
    play = functools.partial(cal_ql.play_episode, **policy, explore=False)
    make_task = functools.partial(tasks.make, config.env, config.dataset_path)
    counts = sorted({1, machine.available_cores()})
    seeds = range(min(16, 2 * counts[-1]))  # an episode each
    pools = {count: Workers(count, len(seeds), run.task, make_task) for count in counts}
    rates: dict[int, list[float]] = {count: [] for count in counts}
    try:
        for _ in range(subject.repeats + 1):
            for count, pool in pools.items():
                begin = time.perf_counter()
                episodes = pool.map(play, seeds)
                steps = sum(len(episode.rewards) for episode in episodes)
                rates[count].append(steps / (time.perf_counter() - begin))
    finally:
        for pool in pools.values():
            pool.close()
    medians = {count: statistics.median(values[1:]) for count, values in rates.items()}
    figures = {f"evaluation, steps/s, processes: {count}": r for count, r in medians.items()}
    return {**figures, "evaluation, all cores to one": medians[counts[-1]] / medians[1]}


def buffer_bytes(columns: Iterable[torch.Tensor]) -> int:
    storages = {c.untyped_storage().data_ptr(): c.untyped_storage().nbytes() for c in columns}
    return sum(storages.values())


def measure_memory(subject: Subject) -> Figures:
    run = subject.run
    for _ in range(3):
        subject.update()
    offline = buffer_bytes([*run.dataset.rows, run.dataset.transitions])
    online = buffer_bytes(run.online.rows)
    rows = len(run.dataset.transitions)
    figures: Figures = {
        "offline transitions": rows,
        "loading them, and everything up to the first update, s": subject.first_update,
        "bytes per offline transition": offline / rows,
        "bytes per online transition": online / run.online.capacity,
        "both buffers, GB": (offline + online) / 1e9,
        "peak memory of the process, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    if run.agent.device.type == "cuda":
        figures["peak memory of the GPU, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return figures


def measure_kernels(subject: Subject) -> Figures:
    """Kernels of an update: on a GPU those that ran, on a CPU those that a GPU would launch."""
    config, task, device = subject.config, subject.run.task, subject.run.agent.device
    machine.set_precision(precisions(config, device)[0], device)
    batch = subject.run.dataset.sample(config.batch_size)
    agents = new_agents(subject)
    if device.type != "cuda":
        figures = kernels.shares(lambda: agents["eager"].update(batch, online=False))
        for name in agents:
            count = kernels.expected_kernels(config, task, name == "compiled")
            figures[f"kernels per update, {name}"] = count
        return figures
    figures = {}
    for name, agent in agents.items():
        update = functools.partial(agent.update, batch, online=False)
        seconds(update, device, 4)
        found = kernels.on_gpu(update, device)
        figures[f"kernels per update, {name}"] = found.kernels
        figures[f"launches per update, {name}"] = found.launches
        figures[f"copies and fills per update, {name}"] = found.copies
        figures[f"time of all of these per update, {name}, ms"] = 1e3 * found.seconds
    return figures


# ---------------------------------------------------------------------------- the report

PARTS: dict[str, Callable[[Subject], Figures]] = {
    "memory": measure_memory,  # first, since all other parts use more
    "update": measure_update,
    "loops": measure_loops,
    "evaluation": measure_evaluation,
    "kernels": measure_kernels,
}


def make_subject(
    config: cal_ql.Config, repeats: int, transitions: int, against: Optional[Path]
) -> Subject:
    """A run on the data of `dataset_path`, or on random `transitions`, after its first update."""
    stop = StopSignals()
    with stop.at_once():
        task = tasks.make(config.env, config.dataset_path)
        if config.dataset_path is None:
            path = Path(config.checkpoints_path) / "random.hdf5"
            write_random_data(path, task, transitions)
            config = dataclasses.replace(config, dataset_path=str(path))
        begin = time.perf_counter()
        with open_directory(config.checkpoints_path, "benchmark", resume=True) as directory:
            run = cal_ql.make_run(config, task, directory)
        machine.keep_freed_memory()
        os.environ["WANDB_MODE"] = "offline"
        log = cal_ql.Log(directory, "benchmark", vars(config), step=0)
        log.bar.disable = True
        subject = Subject(config, run, log, stop, repeats, against, 0.0)
        subject.update()
        if run.agent.device.type == "cuda":
            torch.cuda.synchronize()
        return subject._replace(first_update=time.perf_counter() - begin)


def benchmark(subject: Subject, parts: Iterable[str], show: Callable[[Figures], None]) -> Figures:
    """All figures of these parts; `show` gets each part's as soon as it is measured."""
    processor = machine.provenance()["processor"]
    figures: Figures = {"processor": processor, "threads": torch.get_num_threads()}
    figures["device"] = str(subject.run.agent.device)
    show(figures)
    try:
        for name in parts:
            with subject.stop.at_once():
                found = PARTS[name](subject)
            show(found)
            figures |= found
    finally:
        subject.log.close(10.0)
    return figures


def show_table(figures: Figures) -> None:
    for name, value in figures.items():
        print(f"| {name} | {value if isinstance(value, str) else f'{value:,.4g}'} |", flush=True)


def show_json(figures: Figures) -> None:
    print(json.dumps(figures), flush=True)


def parse_parts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise InputError(f"parts: found {unknown[0]!r}, expected some of {','.join(PARTS)}")
    return names


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print a line of JSON per part")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--transitions", type=int, default=1_000_000, help="of random data")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--against", type=Path, help="CORL's cal_ql.py, to time its update too")
    args, options = parser.parse_known_args()
    for name, least in (("repeats", 1), ("transitions", 2)):
        if (found := getattr(args, name)) < least:
            raise InputError(f"{name}: found {found}, expected {least} or more")
    parts = parse_parts(args.parts)
    config = cal_ql.parse_config(options)
    if args.against:
        corl.load_module(args.against)  # raises at once if it is not CORL's
    with tempfile.TemporaryDirectory() as directory:
        config = dataclasses.replace(config, checkpoints_path=directory, log_freq=10)
        subject = make_subject(config, args.repeats, args.transitions, args.against)
        benchmark(subject, parts, show_json if args.json else show_table)


if __name__ == "__main__":
    os._exit(run_program(main, "benchmark.py"))  # an exit would wait for the compiler's processes
