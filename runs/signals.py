"""SIGTERM and SIGINT: when they stop a run, and when they have to wait."""

import contextlib
import multiprocessing.resource_tracker
import os
import signal
from collections.abc import Iterator
from typing import Any, Optional

from runs.errors import Stop


class StopSignals:
    """Turns the first SIGTERM or SIGINT into `Stop` at the next `check`; a second one exits."""

    def __init__(self):
        self.received: Optional[int] = None
        self.raising = False
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self.receive)

    def receive(self, signum: int, frame: Any) -> None:
        if self.received:
            os._exit(128 + signum)
        self.received = signum
        if self.raising:
            raise Stop(signum)

    def check(self) -> None:
        if self.received:
            raise Stop(self.received)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a signal raises immediately: what is interrupted there can be done again."""
        self.raising = True
        try:
            self.check()
            yield
        finally:
            self.raising = False


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGINT wait, and processes started there never receive them.

    So a signal to the whole process group only reaches this process, which decides when to stop.
    """
    multiprocessing.resource_tracker.ensure_running()  # started within, it would unblock them
    waiting: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        for number in handlers:  # other threads do not block them, and Python handles them here
            signal.signal(number, lambda number, frame: waiting.append(number))
        signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)
