"""Processes that play episodes, and end with their parent."""

import ctypes
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Optional, TypeVar

from runs import machine
from runs.errors import RunError
from runs.signals import blocked_signals

Result = TypeVar("Result")


class WorkerDied(RunError):
    """A worker process cannot start, or has ended without a result."""


class Workers:
    """Calls `play(task, seed)` for several seeds, in `count` processes with a task each.

    By default there is a process per core, at most 8, and never more than `most`. If there is only
    one, it is this process, which plays `task`. Workers make their own tasks with `make_task`.
    """

    def __init__(self, count: Optional[int], most: int, task: Any, make_task: Callable[[], Any]):
        self.count = min(count or min(machine.available_cores(), 8), most)
        self.task = task
        self.make_task = make_task
        self.pool: Optional[ProcessPoolExecutor] = None  # started by the first call of `map`

    def map(self, play: Callable[[Any, int], Result], seeds: list[int]) -> list[Result]:
        """The result for each seed; raises `WorkerDied` and any error of `play`."""
        if self.count > 1 and self.pool is None:
            self.start()
        if self.pool is None:
            return [play(self.task, seed) for seed in seeds]
        packed = pickle.dumps(play)  # as bytes: tensors would go through shared memory
        try:
            with blocked_signals():
                played = [self.pool.submit(play_in_worker, packed, seed) for seed in seeds]
            return [result.result() for result in played]
        except BrokenProcessPool:
            raise WorkerDied("a process that plays evaluation episodes has died") from None

    def start(self) -> None:
        """Make the pool; without shared memory for its locks, use this process instead."""
        context = multiprocessing.get_context("spawn")  # a fork would copy threads and CUDA
        try:
            self.pool = ProcessPoolExecutor(
                self.count, context, initializer=start_worker, initargs=(self.make_task,)
            )
        except OSError as error:
            self.count = 1
            print(f"eval_workers: no processes can be made here ({error}); evaluation runs in one")

    def close(self) -> None:
        """End the workers, and the pool, which Python would otherwise report as leaked."""
        for process in multiprocessing.active_children():
            process.kill()
        if self.pool:
            self.pool.shutdown()
            self.pool = None


def start_worker(make_task: Callable[[], Any]) -> None:
    """Start a process that plays episodes: it ends with its parent, and not before."""
    global worker_task, failure
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if not multiprocessing.parent_process().is_alive():  # it was killed before the line above
        os._exit(1)
    worker_task = failure = None
    try:
        worker_task = make_task()
    except Exception as error:  # raised here, it would be printed and lost
        failure = error


def play_in_worker(play: bytes, seed: int) -> Any:
    if failure:
        raise WorkerDied(f"a process that plays evaluation episodes cannot start: {failure}")
    return pickle.loads(play)(worker_task, seed)
