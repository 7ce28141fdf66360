"""Errors that end a program with one line and an exit code, and what turns others into such."""

import difflib
import errno
import os
import stat
import sys
from collections.abc import Callable, Iterable
from pathlib import Path


class InputError(Exception):
    """A wrong option, file or device, in one line for the user."""

    exit_code = 2


class RunError(Exception):
    """Something that ends a run on its way, in one line for the user."""

    exit_code = 1


class DirectoryInUse(RunError):
    """Another process holds the run's directory."""

    exit_code = os.EX_TEMPFAIL  # 75: try again later


def close_matches(word: str, known: Iterable[str]) -> str:
    """For an error: those of `known` that a user may have meant, in words."""
    return ", ".join(difflib.get_close_matches(word, known)) or "none"


def check_regular(path: Path) -> None:
    """Raise OSError unless `path` is a regular file: opening a FIFO would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def is_system_error(error: BaseException) -> bool:
    """Whether the operating system refused something, so that a file's content is not to blame."""
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno is not None
    )


def describe(error: BaseException) -> str:
    """What a file or the system raised, in words, with the remedy where there is one."""
    return " ".join(str(error).split()) or type(error).__name__


def run_program(main: Callable[[], None], name: str) -> int:
    """Run a program's `main`; returns its exit code, and says in one line what went wrong."""
    try:
        main()
    except (InputError, RunError) as error:
        print(f"{name}: error:", *str(error).split(), file=sys.stderr)
        return error.exit_code
    return 0
