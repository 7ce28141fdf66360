"""Errors that end a program with one line and an exit code, and helpers that describe others."""

import contextlib
import difflib
import errno
import io
import os
import re
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, Optional


class InputError(Exception):
    """A wrong option, file or device, in one line for the user."""

    exit_code = 2


class RunError(Exception):
    """A failure during a run, in one line for the user."""

    exit_code = 1


class DirectoryInUse(RunError):
    """Another process holds the run's directory."""

    exit_code = os.EX_TEMPFAIL  # 75: try again later


class Stop(BaseException):
    """A signal asks the run to save and exit. `except Exception` in a library does not catch it."""

    def __init__(self, signum: int):
        super().__init__(f"by {signal.Signals(signum).name}; run the same command to continue")
        self.exit_code = 128 + signum


class OutputLost(BaseException):
    """Standard output cannot be written any more."""

    def __init__(self, error: OSError):
        super().__init__(f"standard output: {describe(error)}")
        self.exit_code = 128 + signal.SIGPIPE if error.errno == errno.EPIPE else 1


def close_matches(word: str, known: Iterable[str]) -> str:
    """The names in `known` that a user may have meant, as text for an error."""
    return ", ".join(difflib.get_close_matches(word, known)) or "none"


# ---------------------------------------------------------------------------- files


def check_regular(path: Path) -> None:
    """Raise OSError unless `path` is a regular file: opening a FIFO would wait forever."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise OSError(f"{path} is a directory, expected a file")
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is a pipe, a socket or a device, expected a regular file")


def open_regular(path: Path, mode: str = "rb", **options: Any) -> IO:
    """Like `open`, but raises OSError for anything that exists and is not a regular file."""
    with contextlib.suppress(FileNotFoundError):
        check_regular(path)
    return open(path, mode, **options)


def expand_home(path: str, name: str) -> str:
    """`path` with ~ replaced by the home directory; without one, an `InputError` names `name`."""
    expanded = os.path.expanduser(path)
    if path.startswith("~") and (expanded == path or expanded.startswith(stand_in_home())):
        whose = path.partition("/")[0]
        raise InputError(f"{name}: found {path!r}, but {whose} is not a known home directory")
    return expanded


def stand_in_home() -> str:
    return os.path.join(tempfile.gettempdir(), f"home-{os.getuid()}")


def ensure_home() -> None:
    """Make a home directory for a user without one, since W&B, D4RL and others write there."""
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)
    if os.path.expanduser("~") != "~":
        return
    home = stand_in_home()
    try:
        os.makedirs(home, 0o700, exist_ok=True)
        if os.stat(home).st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "it belongs to another user", home)
    except OSError as error:
        raise InputError(f"HOME: this user has no home directory ({describe(error)})") from None
    os.environ["HOME"] = home
    print(f"this user has no home directory; HOME is {home}", file=sys.stderr)


# ---------------------------------------------------------------------------- words

REMEDIES = {
    errno.EACCES: "check the permissions",
    errno.EDQUOT: "make room",
    errno.EIO: "the disk or file server is failing; try again or use another one",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOSPC: "make room",
    errno.ESTALE: "the file server has lost it; try again",
}
NO_MEMORY = re.compile("out of memory|can't allocate|cannot allocate", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Torch raises a RuntimeError for a failed allocation; only its text tells which."""
    is_torchs = isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))
    return bool(is_torchs) or isinstance(error, MemoryError)


def system_errno(error: BaseException) -> Optional[int]:
    """The errno if the operating system refused something; None if a file's content is at fault.

    HDF5 may give it only in its message. Seeking to where a damaged file points gives EINVAL.
    """
    if not isinstance(error, OSError):
        return None
    found = re.search(r"errno = (\d+)", str(error))
    number = error.errno or (int(found[1]) if found else None)
    return None if number == errno.EINVAL and error.filename is None else number


def is_system_error(error: BaseException) -> bool:
    """Whether the operating system refused something, so a file's content is not to blame."""
    return is_out_of_memory(error) or system_errno(error) is not None


def describe(error: BaseException) -> str:
    """An error of a file or of the system in words, with a remedy if there is one."""
    text = " ".join(str(error).split()) or type(error).__name__
    if is_out_of_memory(error):
        return f"there is too little memory ({text})"
    if isinstance(error, RecursionError):
        return f"it is nested too deeply ({text})"
    if isinstance(error, KeyError):
        return f"it lacks {text}"
    number = system_errno(error)
    remedy = REMEDIES.get(number)
    if number and "errno = " in text:  # HDF5's words, a paragraph of them
        if "unable to lock file" in text:
            remedy = "another process or the file system prevents locking it; "
            remedy += "set HDF5_USE_FILE_LOCKING=FALSE to read it without a lock"
        text = os.strerror(number)
    return f"{text}; {remedy}" if remedy else text


def shortened(text: str, most: int = 80) -> str:
    """The text, cut for an error message if it is long."""
    return text if len(text) <= most else f"{text[:most]}..."


# ---------------------------------------------------------------------------- programs


class Output(io.FileIO):
    """Standard output or error that may be lost, for example to a closed pipe.

    `on_loss` gets the first error, and may raise. Later output is dropped.
    """

    def __init__(self, descriptor: int, on_loss: Callable[[OSError], None]):
        super().__init__(descriptor, "w", closefd=False)
        self.on_loss = on_loss
        self.lost = False

    def write(self, data: Any) -> int:
        if not self.lost:
            try:
                return super().write(data)
            except OSError as error:
                self.lost = True
                self.on_loss(error)
        return len(data)


def guard_output(name: str, goes_on: bool) -> None:
    """Let no print fail, even if a stream is closed, full, or cannot encode the text."""

    def on_loss(error: OSError) -> None:
        if not goes_on:
            raise OutputLost(error)
        if error.errno != errno.EPIPE:
            print(f"{name}: standard output is lost ({describe(error)})", file=sys.stderr)

    for stream, descriptor, act in ("stderr", 2, lambda error: None), ("stdout", 1, on_loss):
        current = getattr(sys, stream)
        if current is None:  # it was closed before the program started
            nowhere = open(os.devnull, "w")  # noqa: SIM115
            os.set_inheritable(nowhere.fileno(), nowhere.fileno() <= 2)  # programs expect 0 to 2
            setattr(sys, stream, nowhere)
        elif current is getattr(sys, f"__{stream}__"):  # and no test's
            current.flush()
            buffer = io.BufferedWriter(Output(descriptor, act))
            options = dict(encoding=current.encoding, errors="backslashreplace")
            setattr(sys, stream, io.TextIOWrapper(buffer, line_buffering=True, **options))


def run_program(main: Callable[[], None], name: str, goes_on: bool = False) -> int:
    """Run a program's `main`; return its exit code, and print in one line what went wrong.

    If its output can no longer be written, the program ends, unless it `goes_on`.
    """
    kind = "error"
    try:
        guard_output(name, goes_on)
        ensure_home()
        main()
        sys.stdout.flush()
        return 0
    except SystemExit as end:  # of --help
        return end.code or 0
    except KeyboardInterrupt:
        kind, problem, code = "stopped", "by SIGINT", 128 + signal.SIGINT
    except Stop as error:
        kind, problem, code = "stopped", str(error), error.exit_code
    except (InputError, RunError, OutputLost) as error:
        problem, code = str(error), error.exit_code
    except Exception as error:
        if not is_system_error(error) and not isinstance(error, RecursionError):
            raise
        problem, code = describe(error), 1
    if code != 128 + signal.SIGPIPE:  # then nobody reads it
        words = [shortened(word, 300) for word in problem.split()]
        print(f"{name}: {kind}:", *words, file=sys.stderr)
    return code
