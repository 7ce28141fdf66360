"""What surrounds a run: its command line, signals, directory on disk, W&B and the machine's limits.

Nothing here knows of Cal-QL. A run is a directory that one process holds at a time: its resolved
config, its metrics as one JSON line per record, rows of data that only grow, and checkpoints that
say how much of both belongs to them. Whatever ends a run, the same command goes on from the newest
good checkpoint.
"""

import argparse
import contextlib
import ctypes
import difflib
import fcntl
import functools
import inspect
import io
import json
import math
import multiprocessing.resource_tracker
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Optional, get_args
from unittest import mock

import numpy as np
import pyrallis
import torch
import wandb
import yaml


class InputError(Exception):
    """A wrong option, file or device, in one line for the user."""

    exit_code = 2


class RunError(Exception):
    """Something that ends a run on its way, in one line for the user."""

    exit_code = 1


class DirectoryInUse(RunError):
    """Another process holds the run's directory."""

    exit_code = os.EX_TEMPFAIL  # 75: try again later


# ---------------------------------------------------------------------------- command line

Ranges = list[tuple[str, Callable[[Any, Any], Any], str]]  # options, what must hold, in words


def value_type(kind: Any) -> type:
    """int of int and of Optional[int], and so on."""
    return (*get_args(kind), kind)[0]


def cast(value: Any, kind: Any) -> Any:
    """A YAML value as an option's type; raises TypeError or ValueError where it does not fit."""
    if value is None and type(None) in get_args(kind):
        return None
    kind = value_type(kind)
    accepted = {bool: bool, str: (str, int, float)}.get(kind, (int, float, str))
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
        raise TypeError
    if kind is int and not isinstance(value, int) and not (value := float(value)).is_integer():
        raise ValueError
    return kind(value)


def close_matches(word: str, known: Iterable[str]) -> str:
    """For an error: those of `known` that a user may have meant, in words."""
    return ", ".join(difflib.get_close_matches(word, known)) or "none"


def make_config(config_class: type, ranges: Ranges, options: dict[Any, Any]) -> Any:
    """Options as YAML gives them, checked; raises `InputError` for the first that is wrong."""
    kinds = config_class.__annotations__
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    for name, value in options.items():
        if name not in kinds:
            close = close_matches(str(name), kinds)
            raise InputError(f"{name}: there is no such option; close matches: {close}")
        try:
            options[name] = cast(value, kinds[name])
        except (TypeError, ValueError, OverflowError):
            expected = words[value_type(kinds[name])]
            found = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}..."
            raise InputError(f"{name}: found {found}, expected {expected}") from None
    config = config_class(**options)
    for names, holds, expected in ranges:
        for name in names.split():
            if not holds(value := getattr(config, name), config):
                raise InputError(f"{name}: found {value!r}, expected {expected}")
    return config


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML itself takes the last of two equal keys in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [str(key.value) for key, _ in node.value]
        if len(keys) > len(set(keys)):
            raise ValueError(f"{max(keys, key=keys.count)} is given twice")
        return super().construct_mapping(node, deep)


def read_config_file(path: str) -> dict[Any, Any]:
    """The options in a YAML file; raises `InputError` where it holds none."""
    try:
        with open(path, encoding="utf-8") as file:
            options = yaml.load(file, UniqueKeyLoader)
        if not isinstance(options, dict):
            raise ValueError(
                "it is empty" if options is None else f"it holds {str(options)[:80]!r}"
            )
        return options
    except (OSError, yaml.YAMLError, ValueError, TypeError) as error:
        raise InputError(
            f"config_path: found {path!r}, expected a YAML file of options ({error})"
        ) from None


class ConfigParser(pyrallis.argparsing.ArgumentParser):
    """pyrallis' command line over a YAML file over defaults; the values are read and checked here.

    Raises `InputError` for an unknown option, a wrong type or an impossible value.
    """

    def __init__(self, config_class: type, ranges: Ranges):
        # pyrallis would read the class' source anew for the comment of each option
        with mock.patch.object(inspect, "getsource", functools.cache(inspect.getsource)):
            super().__init__(config_class=config_class, allow_abbrev=False)
        self.ranges = ranges
        self._negative_number_matcher = re.compile(r"-[\d.]")  # -.inf is a value, not an option

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the options)")

    def parse_known_args(self, args: Optional[list[str]] = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        if {"-h", "--help"} & set(args):  # pyrallis would refuse the values that stand beside it
            args = ["--help"]
        return super().parse_known_args(args, namespace)

    def _postprocessing(self, parsed: argparse.Namespace) -> Any:
        given, kinds = vars(parsed), self.config_class.__annotations__
        options = read_config_file(given.pop("config_path")) if "config_path" in given else {}
        for name, text in given.items():
            try:  # text is taken as it is
                is_text = value_type(kinds[name]) is str and text != "null"
                options[name] = text if is_text else yaml.safe_load(text)
            except (yaml.YAMLError, ValueError):
                raise InputError(f"{name}: found {text[:80]!r}, expected a YAML value") from None
        return make_config(self.config_class, self.ranges, options)


# ---------------------------------------------------------------------------- signals


class Stop(BaseException):
    """A signal asks the run to save and exit. No library's `except Exception` takes it."""

    def __init__(self, signum: int):
        super().__init__(f"by {signal.Signals(signum).name}; the same command goes on from here")
        self.exit_code = 128 + signum


class StopSignals:
    """Turns a first SIGTERM or SIGINT into `Stop`, at the next `check`; a second one exits."""

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
        """Within, a signal raises wherever it comes: what is done there can be done again."""
        self.raising = True
        try:
            self.check()
            yield
        finally:
            self.raising = False


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """SIGTERM and SIGINT wait until afterwards, and never reach a process started meanwhile.

    So what is sent to the whole group reaches this process alone, which decides when to stop.
    """
    multiprocessing.resource_tracker.ensure_running()  # started meanwhile, it would unblock them
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


# ---------------------------------------------------------------------------- the machine


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


def keep_freed_memory() -> None:
    """Have glibc reuse what an update frees; to get it anew costs a tenth of a CPU's time."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, in bytes


def provenance() -> dict[str, Any]:
    """By what code and where a run is made: what decides the last bits of its numbers."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
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


# ---------------------------------------------------------------------------- the directory

FORMAT = 2  # of checkpoints; those of other code are refused


class RunDirectory:
    """A run on disk: config.yaml, metrics.jsonl, transitions.bin, checkpoints and starts.jsonl.

    metrics.jsonl holds one record per line, transitions.bin rows of float32. Both only grow; a
    checkpoint knows how much of them belongs to it, and resuming drops the rest. starts.jsonl says
    of each start where and by what code. Raises `InputError` where it cannot be used, and
    `DirectoryInUse` where another process holds it.
    """

    def __init__(self, path: Path, resume: bool):
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = open(path / "lock", "w")  # noqa: SIM115  # held as long as it is open
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.metrics = open(path / "metrics.jsonl", "ab")  # noqa: SIM115
            self.rows = open(path / "transitions.bin", "ab")  # noqa: SIM115
        except BlockingIOError:
            raise DirectoryInUse(f"another process runs in {path}; try again later") from None
        except OSError as error:
            raise InputError(f"checkpoints_path: cannot write there ({error})") from None
        if self.checkpoints() and not resume:
            raise InputError(f"resume: {path} holds a run, expected none; take --resume true")

    def begin(self, config: Any, step: int) -> None:
        """Note this start, and say where it differs from the last one in what rounds numbers."""
        starts, now = self.path / "starts.jsonl", provenance()
        try:
            (self.path / "config.yaml").write_text(pyrallis.dump(config))
            earlier = starts.read_text().splitlines() if step and starts.exists() else []
            with open(starts, "a") as file:
                file.write(json.dumps({"step": step, **now}) + "\n")
        except OSError as error:
            raise RunError(f"cannot write in {self.path} ({error})") from None
        with contextlib.suppress(ValueError, IndexError):  # a line that was never whole
            last = json.loads(earlier[-1])
            changed = [f"{k} {last[k]} -> {now[k]}" for k in now if last[k] != now[k]]
            if changed:
                print(f"resuming with {', '.join(changed)}: numbers may differ in their last bits")

    def discard_unless_begun(self) -> None:
        """Wrong input leaves nothing behind."""
        if not (self.path / "config.yaml").exists():
            shutil.rmtree(self.path)

    def add_record(self, record: dict[str, Any]) -> None:
        self.metrics.write(json.dumps(record).encode() + b"\n")
        self.metrics.flush()

    def records(self) -> Iterator[dict[str, Any]]:
        for line in Path(self.metrics.name).read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # a line that somebody has edited
                yield json.loads(line)

    def add_rows(self, rows: np.ndarray) -> None:
        self.rows.write(rows.astype(np.float32).tobytes())

    def read_rows(self, width: int) -> np.ndarray:
        return np.fromfile(self.rows.name, np.float32).reshape(-1, width)

    def checkpoints(self) -> list[Path]:
        return checkpoints_in(self.path)

    def save(self, state: dict[str, Any], keep: tuple[int, ...]) -> None:
        """Write a checkpoint beside its place, sync it, rename it; only then drop older ones.

        The one before stays, and so do those of the steps in `keep`. Raises OSError.
        """
        for file in (self.metrics, self.rows):
            file.flush()
            os.fsync(file.fileno())
        image = io.BytesIO()  # first, since torch.save to a full disk fails in ways of its own
        sizes = {"metrics": self.metrics.tell(), "rows": self.rows.tell()}
        torch.save({**state, "format": FORMAT, "sizes": sizes}, image)
        path = self.path / f"checkpoint_{state['step']}.pt"
        part = path.with_suffix(".part")
        try:
            with open(part, "wb") as file:
                file.write(image.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        for old in self.checkpoints()[:-2]:
            if step_of(old) not in keep:
                old.unlink()

    def load(self, device: torch.device) -> Optional[dict[str, Any]]:
        """The newest checkpoint that is whole and whose rows are there; None for a new run.

        Cuts the growing files back to it, and sets newer checkpoints aside. Raises `InputError`
        where none is good, and changes nothing then.
        """
        found, problems, state = self.checkpoints()[::-1], [], None
        for path in found:
            try:
                state = self.load_with_its_rows(path, device)
                break
            except InputError as error:
                problems.append(str(error))
        if found and state is None:
            raise InputError(f"checkpoints_path: no checkpoint is good: {'; '.join(problems)}")
        for path, problem in zip(found, problems):
            path.rename(path.with_suffix(".broken"))
            print(f"{problem}: {path.name} is set aside, the run goes on from the one before")
        sizes = state["sizes"] if state else {"metrics": 0, "rows": 0}
        records = Path(self.metrics.name).read_bytes()[: sizes["metrics"]]
        if len(records) < sizes["metrics"]:  # a pity, but nothing to throw training away for
            print(f"{self.metrics.name} lacks records from before this start; the run goes on")
        whole = records.rfind(b"\n") + 1  # without a torn last line
        for file, size in ((self.metrics, whole), (self.rows, sizes["rows"])):
            file.truncate(size)
            file.seek(0, os.SEEK_END)
        return state

    def load_with_its_rows(self, path: Path, device: torch.device) -> dict[str, Any]:
        state = load_checkpoint(path, device)
        if self.rows.tell() < state["sizes"]["rows"]:
            raise InputError(f"{self.rows.name} is shorter than {path.name} says")
        return state


def step_of(checkpoint: Path) -> Optional[int]:
    """The step in a checkpoint's name; None for a name of another form."""
    match = re.fullmatch(r"checkpoint_(\d+)\.pt", checkpoint.name)
    return int(match[1]) if match else None


def checkpoints_in(directory: Path) -> list[Path]:
    """From the oldest to the newest; files that a user has named otherwise do not count."""
    found = {path: step_of(path) for path in directory.glob("checkpoint_*.pt")}
    return sorted((path for path in found if found[path] is not None), key=found.get)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint; raises `InputError` where it is missing, broken or of other code."""
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError("it was not written by this version of the code")
        return state
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}") from None
    except Exception as error:  # whatever the parts of torch.load raise on a broken file
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} is no whole checkpoint ({reason})") from None


# ---------------------------------------------------------------------------- W&B


class Wandb:
    """A W&B run: offline where there is no key or no server, and never in training's way.

    The id that is really used stays in the directory's wandb_id, and a resumed run sends all its
    records again: W&B gets each at least once, and equal steps lie on themselves.
    """

    def __init__(self, directory: Optional[RunDirectory], **options: Any):
        self.run: Any = None
        options["settings"] = wandb.Settings(init_timeout=20, quiet=True)
        if directory:
            options |= {"dir": os.environ.get("WANDB_DIR", directory.path), "resume": "allow"}
            options["id"] = os.environ.get("WANDB_RUN_ID", self.known_id(directory))
        offline = {"mode": "offline", "settings": wandb.Settings(silent=True)}
        try:
            try:
                if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
                    print("W&B: no API key, so it records offline; `wandb sync` uploads that later")
                    options |= offline
                self.run = wandb.init(**options)
            except wandb.Error as error:
                print("W&B cannot be reached, so it records offline:", *str(error).split())
                self.run = wandb.init(**options | offline)
            self.run.define_metric("*", step_metric="step")
            if directory:
                with contextlib.suppress(IsADirectoryError):  # `known_id` has said so
                    (directory.path / "wandb_id").write_text(self.run.id)
        except Exception as error:  # nothing of it is worth a run
            print("W&B fails, metrics.jsonl is written all the same:", *str(error).split())
        for record in directory.records() if directory else []:
            self.send(record)

    def known_id(self, directory: RunDirectory) -> Optional[str]:
        path = directory.path / "wandb_id"
        try:
            return path.read_text().strip() or None
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            print(f"W&B: cannot read {path}, so the run gets a new id ({error})")
            return None

    def send(self, record: dict[str, Any]) -> None:
        try:
            if self.run:
                self.run.log(record)
        except Exception as error:
            print("W&B stopped, metrics.jsonl goes on:", *str(error).split())
            self.run = None

    def close(self, patience: float) -> None:
        """Let it send what is left, for at most `patience` seconds."""
        if self.run:
            thread = threading.Thread(target=self.finish, args=(self.run,), daemon=True)
            self.run = None
            thread.start()
            thread.join(patience)

    def finish(self, run: Any) -> None:
        with contextlib.suppress(Exception):  # a signal to the whole group ends its process first
            run.finish()
