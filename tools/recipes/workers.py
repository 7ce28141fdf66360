"""Worker processes that make rollouts in order."""

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import count
from typing import Any

import numpy as np

from runs.errors import RunError
from tools.recipes import find_recipe
from tools.recipes.common import Recipe, Rows

_arguments: tuple[Any, ...]  # of the recipe, in each worker process


def _start_worker(*arguments: Any) -> None:
    global _arguments
    _arguments = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers,
    threading.Thread(target=_end_with_parent, daemon=True).start()  # even when it is killed


@functools.cache
def _recipe() -> Recipe:
    """The process's one recipe; made in the first rollout, so that errors reach the parent."""
    return find_recipe(_arguments[0])(*_arguments)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _rollout(seed: int, index: int) -> Rows | None:
    return _recipe().rollout(np.random.SeedSequence((seed, index)))


def rollouts(
    task: str, seed: int, workers: int, demonstrations: list[Any] | None = None
) -> Iterator[Rows]:
    """Yield the rollouts 0, 1, 2, ... of `task` from `workers` processes.

    They never end, unless they are made from `demonstrations`. Raises `InputError` if the task
    cannot be made here, and `RunError` if a worker dies.
    """
    for library in ("OMP", "OPENBLAS", "MKL"):  # the workers' matrices are too small for threads
        os.environ[f"{library}_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    options = (demonstrations, seed) if demonstrations else ()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (task, *options))
    pending = deque()
    try:
        for index in count():
            pending.append(pool.submit(_rollout, seed, index))
            if len(pending) == 2 * workers:
                rows = pending.popleft().result()
                if rows is None:
                    return
                yield rows
    except BrokenProcessPool:
        raise RunError("a worker process has died; was there enough memory?") from None
    finally:
        pool.shutdown(cancel_futures=True)
