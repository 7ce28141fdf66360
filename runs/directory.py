"""A run on disk: its resolved config, records, transitions, starts and checkpoints.

One process holds it at a time. Records and transitions are only appended; each checkpoint stores
how much of both belongs to it. After an interruption the same command resumes from the newest
valid checkpoint.
"""

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import re
import shlex
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
import yaml

from runs.errors import (
    DirectoryInUse,
    InputError,
    RunError,
    Stop,
    check_regular,
    describe,
    is_system_error,
    open_regular,
    shortened,
)
from runs.machine import provenance

SCORE = "eval/d4rl_normalized_score"
FORMAT = 2  # of checkpoints; those in another format are refused
NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of file systems without flock


class RunDirectory:
    """A run on disk: config.yaml, metrics.jsonl, transitions.bin, checkpoints and starts.jsonl.

    metrics.jsonl holds one record per line, transitions.bin rows of float32. Both are only appended
    to; a checkpoint stores how much of them belongs to it. A start locks the directory, loads a
    checkpoint, then calls `begin`: nothing that an earlier start left changes before that.
    starts.jsonl lists each start, with its machine and code. Raises `InputError` if the directory
    cannot be used, and `DirectoryInUse` if another process holds it.
    """

    def __init__(self, path: Path, resume: bool):
        self.path = path
        self.begun = False
        self.identity: Optional[dict[str, Any]] = None  # of the run, see `load`
        self.made: list[Path] = []  # by this start
        self.state: Optional[dict[str, Any]] = None  # the checkpoint to resume from
        self.broken: list[tuple[Path, str]] = []  # newer checkpoints, and what is wrong with each
        self.records_at = {"records": 0, "records_at_step": 0}  # of metrics.jsonl, see `save`
        self.last_step = -1  # of the records
        try:
            if not path.exists():
                path.mkdir(parents=True, exist_ok=True)
                self.made.append(path)
            self.lock = self.open("lock", "w")
            self.take_lock()
            self.metrics = self.open("metrics.jsonl", "ab")
            self.transitions = self.open("transitions.bin", "ab")
            has_run = bool(self.checkpoints())
        except (OSError, ValueError) as error:  # ValueError: a character that no file name can have
            self.discard_unless_begun()
            raise InputError(f"checkpoints_path: cannot write there ({describe(error)})") from None
        if has_run and not resume:
            raise InputError(
                f"resume: {path} already contains a run; pass --resume true to continue it"
            )

    def open(self, name: str, mode: str) -> Any:
        path = self.path / name
        if not os.path.lexists(path):
            self.made.append(path)
        return open_regular(path, mode)

    def take_lock(self) -> None:
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DirectoryInUse(f"another process runs in {self.path}; try again later") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            reason = error.strerror
            print(f"{self.path} cannot be locked ({reason}): run only one process there at a time")

    def begin(self, options: dict[str, Any], step: int) -> None:
        """Cut the files to the loaded checkpoint, set aside broken ones, and record this start.

        Prints a line if this start may round differently from the last one.
        """
        self.begun = True
        starts = self.path / "starts.jsonl"
        now = provenance()
        try:
            self.set_aside_broken()
            self.cut_records()
            self.transitions.truncate(self.sizes()["rows"])
            self.transitions.seek(0, os.SEEK_END)
            write_atomically(self.path / "config.yaml", yaml.safe_dump(options).encode())
            with open_regular(starts, "ab+") as file:
                file.seek(0)
                earlier = file.read().splitlines() if step else []
                file.write(json.dumps({"step": step, **now}).encode() + b"\n")
        except OSError as error:
            raise RunError(f"cannot write in {self.path} ({describe(error)})") from None
        with contextlib.suppress(ValueError, LookupError, TypeError):  # a torn or foreign line
            last = json.loads(earlier[-1])
            changed = [f"{k} {last[k]} -> {now[k]}" for k in now if last[k] != now[k]]
            if changed:
                print(f"resuming with {', '.join(changed)}: numbers may differ in their last bits")

    def discard_unless_begun(self) -> None:
        """Delete what this start made, unless it has begun: wrong input leaves nothing behind."""
        for path in reversed([] if self.begun else self.made):
            with contextlib.suppress(OSError):  # a folder that is no longer empty
                path.rmdir() if path.is_dir() else path.unlink()

    # ------------------------------------------------------------------ records and transitions

    def add_record(self, record: dict[str, Any]) -> None:
        self.metrics.write(json.dumps(record).encode() + b"\n")
        self.metrics.flush()
        if record["step"] != self.last_step:
            self.records_at["records_at_step"] = 0
        self.last_step = record["step"]
        for name in self.records_at:
            self.records_at[name] += 1

    def records(self) -> Iterator[dict[str, Any]]:
        for line in Path(self.metrics.name).read_bytes().split(b"\n"):
            if is_record(line):
                yield json.loads(line)

    def closing_line(self) -> str:
        """For a run's end: its directory, its last score, the command that draws its curves."""
        scores = [record[SCORE] for record in self.records() if SCORE in record]
        score = f", last score {scores[-1]:.1f}" if scores else ""
        report = Path(__file__).resolve().parents[1] / "tools" / "report.py"
        picture = self.path / "curves.png"
        command = [from_here(sys.executable), from_here(report), self.path, "--output", picture]
        return f"{self.path}: finished{score}; to draw its curves: {shlex.join(map(str, command))}"

    def cut_records(self) -> None:
        """Drop the records after the loaded checkpoint; the run will write them again.

        Lines that are not records move to a separate file.
        """
        path = Path(self.metrics.name)
        content = path.read_bytes()
        lines = content.split(b"\n")
        if lines[-1].startswith(b'{"step": ') and not is_record(lines[-1]):
            lines.pop()  # a record that was being written when the process was killed
        foreign = [line for line in lines if line.strip() and not is_record(line)]
        kept = self.checkpoint_records([line for line in lines if is_record(line)], content)
        if foreign:
            aside = path.with_suffix(".jsonl.foreign")
            with open_regular(aside, "ab") as file:
                file.write(b"\n".join(foreign) + b"\n")
            print(f"{path}: {len(foreign)} lines are not records of a run; moved them to {aside}")
        cut = b"".join(line + b"\n" for line in kept)
        if content.startswith(cut):
            self.metrics.truncate(len(cut))
            self.metrics.seek(0, os.SEEK_END)
            return
        write_atomically(path, cut)
        self.metrics.close()
        self.metrics = open_regular(path, "ab")

    def checkpoint_records(self, lines: list[bytes], content: bytes) -> list[bytes]:
        """The records among `lines` that belong to the loaded checkpoint."""
        if not self.state:
            return []
        sizes, newest = self.sizes(), self.state["step"]
        if "records_at_step" not in sizes:  # older code only stored the file's size
            counted = content[: sizes["metrics"]].split(b"\n")
            steps = [json.loads(line)["step"] for line in counted if is_record(line)]
            sizes["records_at_step"] = steps.count(newest)
        steps = [json.loads(line)["step"] for line in lines]
        at_newest = [i for i, step in enumerate(steps) if step == newest]
        dropped = set(at_newest[sizes["records_at_step"] :])
        numbers = [i for i, step in enumerate(steps) if step <= newest and i not in dropped]
        n_at_newest = len(at_newest) - len(dropped)
        self.records_at = {"records": len(numbers), "records_at_step": n_at_newest}
        self.last_step = newest
        is_short = len(content) < sizes["metrics"]
        if len(numbers) < sizes.get("records", 0) or ("records" not in sizes and is_short):
            print(f"{self.metrics.name} lacks records from before this start; the run continues")
        return [lines[i] for i in numbers]

    def add_transitions(self, columns: Iterable[np.ndarray]) -> None:
        """Append n transitions, given as arrays [n, ...]: a row of float32 for each."""
        flat = [column.reshape(len(column), -1) for column in columns]
        self.transitions.write(np.concatenate(flat, 1).astype(np.float32).tobytes())

    def read_transitions(self, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """The transitions that belong to the loaded checkpoint, as arrays [n, *shape]."""
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        size = self.sizes()["rows"]
        if size % (4 * ends[-1]):
            name = self.transitions.name
            raise InputError(f"checkpoints_path: {name} does not hold transitions of this run")
        rows = np.fromfile(self.transitions.name, np.float32, size // 4).reshape(-1, ends[-1])
        columns = np.split(rows, ends[:-1], axis=1)
        return [column.reshape(-1, *shape) for column, shape in zip(columns, shapes)]

    # ------------------------------------------------------------------------ checkpoints

    def checkpoints(self) -> list[Path]:
        return checkpoints_in(self.path)

    def sizes(self) -> dict[str, int]:
        """How much of the growing files belongs to the loaded checkpoint, in bytes."""
        return dict(self.state["sizes"]) if self.state else {"metrics": 0, "rows": 0}

    def save(self, state: dict[str, Any], keep: tuple[int, ...]) -> None:
        """Write a checkpoint to a temporary file, sync and rename it; then delete older ones.

        The previous one stays, and so do those at the steps in `keep`. Raises OSError.
        """
        for file in (self.metrics, self.transitions):
            file.flush()
            os.fsync(file.fileno())
        image = io.BytesIO()  # since torch.save to a full disk can raise any exception
        sizes = {"metrics": self.metrics.tell(), "rows": self.transitions.tell()}
        sizes |= self.records_at
        if self.last_step != state["step"]:
            sizes["records_at_step"] = 0
        torch.save({**state, "format": FORMAT, "sizes": sizes}, image)
        write_atomically(self.path / f"checkpoint_{state['step']}.pt", image.getbuffer())
        for old in self.checkpoints()[:-2]:
            if checkpoint_step(old) not in keep:
                old.unlink()

    def load(
        self, device: torch.device, form: Any = None, identity: Optional[dict[str, Any]] = None
    ) -> Optional[dict[str, Any]]:
        """The newest valid checkpoint whose transitions are all there; None for a new run.

        `form` is what it must hold, see `check_form`. Changes nothing on disk. Raises `InputError`
        if no checkpoint is valid or the run has another `identity`, and `RunError` if the system
        refuses to read one.
        """
        self.identity = identity
        found = self.checkpoints()[::-1]
        for path in found:
            try:
                self.state = self.load_with_transitions(path, device, form)
                break
            except InputError as error:
                self.broken.append((path, str(error)))
        if found and not self.state:
            problems = "; ".join(problem for _, problem in self.broken)
            raise InputError(f"checkpoints_path: there is no valid checkpoint: {problems}")
        if self.state and identity is not None:
            self.check_identity(self.state["identity"], identity)
        return self.state

    def check_identity(self, saved: dict[str, Any], current: dict[str, Any]) -> None:
        """Raise `InputError` unless both have the same options; defaults are left out of both."""
        names = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
        if names:
            found = ", ".join(f"{name} {saved.get(name, '(its default)')}" for name in names)
            raise InputError(f"checkpoints_path: {self.path} contains another run, with {found}")

    def load_with_transitions(self, path: Path, device: torch.device, form: Any) -> dict[str, Any]:
        state = load_checkpoint(path, device, form and {**form, **COUNTED})
        check_form({key: state.get(key) for key in COUNTED}, COUNTED, path)
        if state.get("counts", {}).get("step", state["step"]) != state["step"]:
            raise InputError(f"{path} is not a valid checkpoint (it names two different steps)")
        if self.transitions.tell() < state["sizes"]["rows"]:
            raise InputError(f"{self.transitions.name} is shorter than {path.name} says")
        return state

    def set_aside_broken(self) -> None:
        for path, problem in self.broken:
            aside = path.with_suffix(".broken")
            while os.path.lexists(aside):
                aside = aside.with_name(f"{aside.name}_")
            path.rename(aside)
            print(f"{problem}: {path.name} is set aside; the run resumes from the one before")


def from_here(path: Any) -> str:
    """The path relative to the working directory, if it lies in there."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def write_atomically(path: Path, content: Any) -> None:
    """Write bytes to a temporary file, sync and rename it: the file is complete or unchanged."""
    with contextlib.suppress(FileNotFoundError):
        check_regular(path)
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def is_record(line: bytes) -> bool:
    """Whether a line of metrics.jsonl is a record: a JSON object with a step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and type(record.get("step")) is int


@contextlib.contextmanager
def open_directory(
    folder: Optional[str], name: str, resume: bool
) -> Iterator[Optional[RunDirectory]]:
    """The run's directory in `folder`, or None without one; wrong input leaves nothing behind."""
    if folder is None:
        yield None
        return
    directory = RunDirectory(Path(folder) / name, resume)
    try:
        yield directory
    finally:
        directory.discard_unless_begun()


@contextlib.contextmanager
def saved_on_failure(directory: Optional[RunDirectory], save: Callable[[], None]) -> Iterator[None]:
    """Save if the run ends early; on failure, also name the last good checkpoint."""
    try:
        try:
            yield
        except (Stop, RunError):
            save()
            raise
    except (RunError, OSError, torch.OutOfMemoryError) as error:
        saved = directory.checkpoints() if directory else []
        last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint"
        raise RunError(f"{describe(error)}; {last}") from error


def checkpoint_step(checkpoint: Path) -> Optional[int]:
    """The step in a checkpoint's name; None if it is not named like a checkpoint."""
    match = re.fullmatch(r"checkpoint_(\d+)\.pt", checkpoint.name)
    return int(match[1]) if match else None


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints from oldest to newest; files that a user has renamed do not count."""
    found = {path: checkpoint_step(path) for path in directory.iterdir()}
    return sorted((path for path in found if found[path] is not None), key=found.get)


def load_checkpoint(
    path: Path, device: torch.device, form: Any = None, option: str = ""
) -> dict[str, Any]:
    """Read a checkpoint and check its form, see `check_form`. Errors begin with `option`.

    Raises `InputError` if it is missing, damaged, in another format or of another form, and
    `RunError` if the system refuses to read it, which says nothing about its content.
    """
    prefix = f"{option}: " if option else ""
    try:
        with open_regular(path) as file:
            image = io.BytesIO(file.read())  # what fails from here on is the content
        with zipfile.ZipFile(image) as file:
            if damaged := file.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"{damaged} is damaged")
        image.seek(0)
        state = torch.load(image, map_location=device, weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError("it was not written by this version of the code")
        upgrade(state)
    except Exception as error:  # torch.load can raise any exception on a broken file
        if getattr(error, "errno", None) in NO_FILE:
            raise InputError(f"{prefix}there is no checkpoint {path}") from None
        if is_system_error(error):
            raise RunError(f"{prefix}cannot read {path} ({describe(error)})") from None
        reason = str(error).partition("\n")[0]
        raise InputError(f"{prefix}{path} is not a valid checkpoint ({reason})") from None
    if form is not None:
        check_form(state, form, path, option)
    return state


def upgrade(state: dict[str, Any]) -> None:
    """Convert an older checkpoint's counts and metrics to the current form, in place."""
    counts = state.get("counts")
    if isinstance(counts, dict) and "updates_owed" in counts:
        counts["steps_owed"] = counts.pop("updates_owed")
    metrics = state.get("metrics")
    if isinstance(metrics, dict) and {"names", "count"} <= metrics.keys():
        names, count = metrics.pop("names"), metrics.pop("count")
        metrics["counts"] = dict.fromkeys(names, count) if count else {}


# ---------------------------------------------------------------------------- forms


class Maybe(NamedTuple):
    """In a form: a key that may be missing, and the form of its value."""

    form: Any


def at_least_0(value: Any) -> bool:
    """a whole number, 0 or more"""
    return type(value) is int and value >= 0


def sum_of_shares(value: Any) -> bool:
    """a finite number, 0 or more"""
    return isinstance(value, float) and 0.0 <= value < math.inf


COUNTS = {  # a run's counts that are not just `at_least_0`; older checkpoints lack the `Maybe` ones
    "evaluated_at": int,
    "evaluations": Maybe(at_least_0),
    "successes": Maybe(sum_of_shares),
    "warmup_end": Maybe(at_least_0),
}
COUNTED = {  # what the directory itself adds to a checkpoint
    "format": int,
    "step": at_least_0,
    "sizes": {
        "metrics": at_least_0,
        "rows": at_least_0,
        "records": Maybe(at_least_0),
        "records_at_step": Maybe(at_least_0),
    },
}


def check_form(state: Any, form: Any, path: Path, option: str = "") -> None:
    """Raise `InputError` unless `state`, of the checkpoint at `path`, has this form.

    A form describes a value. A dict: exactly these keys, where `Maybe` marks optional ones. A list:
    these items in order. A tensor: its dtype and shape. A type: that type. A function: it returns
    whether the value is right, and its docstring says what is expected.
    """
    prefix = f"{option}: " if option else ""
    try:
        compare(state, form, [])
    except FormError as error:
        raise InputError(f"{prefix}{path} is not a checkpoint for this run ({error})") from None


def run_form(
    networks: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    observation_dim: int,
    counts: dict[str, int],
) -> dict[str, Any]:
    """What a run's checkpoint must hold: these networks' shapes, this optimizer's state."""
    moments = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        alike = parameter.detach()
        moments[number] = Maybe({"step": torch.tensor(0.0), "exp_avg": alike, "exp_avg_sq": alike})

    def is_scaling(values: Any) -> bool:
        """one or S finite numbers in float32"""
        sizes = [(1,), (observation_dim,)]
        is_float = torch.is_tensor(values) and values.dtype == torch.float32
        return is_float and tuple(values.shape) in sizes and bool(values.isfinite().all())

    return {
        **COUNTED,
        "identity": dict,
        "config": dict,
        "scaling": {"observation_mean": is_scaling, "observation_std": is_scaling},
        "counts": {name: COUNTS.get(name, at_least_0) for name in counts},
        "updates": at_least_0,
        "agent": dict(networks),
        "optimizer": {"state": moments, "param_groups": list},
        "metrics": are_metrics,
        "random_states": are_random_states,
    }


MODEL = "format", "step", "config", "scaling", "agent"  # enough to play, or to start a new run


def model_form(form: dict[str, Any]) -> dict[str, Any]:
    """A run's form in which only the keys of `MODEL` are required."""
    return {key: part if key in MODEL else Maybe(part) for key, part in form.items()}


SCALES = "env", "discount", "reward_scale", "reward_bias", "normalize_reward", "is_sparse_reward"


def load_model(
    path: Path, device: torch.device, form: dict[str, Any], options: dict[str, Any], names: str
) -> dict[str, Any]:
    """Read the checkpoint that `load_model` names, for a run of this form with these options.

    The networks depend on the options in `names`; an error says which of them differ. Prints a line
    if one of `SCALES` differs, which decide what a Q-value means.
    """
    state = load_checkpoint(path, device, option="load_model")
    config = state.get("config")
    saved = config if isinstance(config, dict) else {}
    differ = [name for name in names.split() if saved.get(name, options[name]) != options[name]]
    try:
        check_form(state, model_form(form), path, "load_model")
    except InputError:
        if not differ:
            raise
        found = ", ".join(f"{name} {saved[name]}" for name in differ)
        expected = ", ".join(f"{name} {options[name]}" for name in differ)
        raise InputError(
            f"load_model: {path} has networks for {found}, expected {expected}"
        ) from None
    if changed := [n for n in SCALES if n in saved and saved[n] != options[n]]:
        found = ", ".join(f"{name} {saved[name]} (here {options[name]})" for name in changed)
        print(f"load_model: {path} was trained with {found}, so its Q-values may not fit")
    return state


def are_metrics(value: Any) -> bool:
    """a count of 1 or more for each metric and, if there are any, a sum for each"""
    if not isinstance(value, dict) or value.keys() != {"counts", "total", "bad_step"}:
        return False
    counts = value["counts"]
    if not isinstance(counts, dict) or not all(isinstance(name, str) for name in counts):
        return False
    if not all(at_least_0(count) and count for count in counts.values()):
        return False
    return not counts or all(
        torch.is_tensor(sums) and sums.is_floating_point() and sums.shape == (len(counts),)
        for sums in (value["total"], value["bad_step"])
    )


def are_random_states(value: Any) -> bool:
    """the states of torch's generators"""
    own = torch.get_rng_state()
    states = value if isinstance(value, list) else []
    is_bytes = [torch.is_tensor(state) and state.dtype == torch.uint8 for state in states]
    return bool(states) and all(is_bytes) and states[0].shape == own.shape


class FormError(Exception):
    """A part of a checkpoint does not have its form."""

    def __init__(self, place: list[str], found: str, expected: str):
        super().__init__(f"{' '.join(place) or 'all'}: found {found}, expected {expected}")


def compare(value: Any, form: Any, place: list[str]) -> None:
    """Raise `FormError` for the first part of `value` that does not have its form."""
    if isinstance(form, dict):
        compare_keys(value, form, place)
    elif isinstance(form, list):
        if not isinstance(value, (list, tuple)) or len(value) != len(form):
            raise FormError(place, describe_value(value), f"a list of {len(form)}")
        for number, (part, part_form) in enumerate(zip(value, form)):
            compare(part, part_form, [*place, str(number)])
    elif torch.is_tensor(form):
        is_alike = torch.is_tensor(value) and value.dtype == form.dtype
        if not is_alike or value.shape != form.shape:
            raise FormError(place, describe_value(value), describe_value(form))
        if value.is_floating_point() and not value.isfinite().all():
            raise FormError(place, "NaN or infinite numbers", "finite ones")
    elif isinstance(form, type):
        if not isinstance(value, form) or (isinstance(value, bool) and form is not bool):
            raise FormError(place, describe_value(value), form.__name__)
    elif not form(value):
        raise FormError(place, describe_value(value), form.__doc__ or form.__name__)


def compare_keys(value: Any, form: dict[Any, Any], place: list[str]) -> None:
    if not isinstance(value, dict):
        raise FormError(place, describe_value(value), "a dict")
    if unknown := value.keys() - form.keys():
        raise FormError(place, f"keys {shortened(str(sorted(map(str, unknown))))}", "none of these")
    for key, part in form.items():
        is_optional = isinstance(part, Maybe)
        if key in value:
            compare(value[key], part.form if is_optional else part, [*place, str(key)])
        elif not is_optional:
            raise FormError([*place, str(key)], "nothing", describe_value(part))


def describe_value(value: Any) -> str:
    """A short description of a value, for an error."""
    if torch.is_tensor(value):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return shortened(repr(value))
