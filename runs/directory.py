"""A run on disk: its resolved config, records, rows of data, starts and checkpoints.

One process holds it at a time. Metrics are one JSON line per record, rows of data only grow, and
checkpoints say how much of both belongs to them. After an interruption the same command resumes
from the newest good checkpoint.
"""

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import re
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

FORMAT = 2  # of checkpoints; those of other code are refused
NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of file systems without flock


class RunDirectory:
    """A run on disk: config.yaml, metrics.jsonl, transitions.bin, checkpoints and starts.jsonl.

    metrics.jsonl holds one record per line, transitions.bin rows of float32. Both only grow; a
    checkpoint knows how much of them belongs to it. A start first takes the directory, then loads
    a checkpoint, and then begins: only then is anything changed that an earlier start has left.
    starts.jsonl says of each start where and by what code. Raises `InputError` where the directory
    cannot be used, and `DirectoryInUse` where another process holds it.
    """

    def __init__(self, path: Path, resume: bool):
        self.path = path
        self.begun = False
        self.identity: Optional[dict[str, Any]] = None  # of the run, see `load`
        self.made: list[Path] = []  # by this start
        self.state: Optional[dict[str, Any]] = None  # the checkpoint to go on from
        self.broken: list[tuple[Path, str]] = []  # newer ones, and what is wrong with each
        self.records_at = {"records": 0, "records_at_step": 0}  # of metrics.jsonl, see `save`
        self.last_step = -1  # of the records
        try:
            if not path.exists():
                path.mkdir(parents=True, exist_ok=True)
                self.made.append(path)
            self.lock = self.open("lock", "w")
            self.take_lock()
            self.metrics = self.open("metrics.jsonl", "ab")
            self.rows = self.open("transitions.bin", "ab")
            has_run = bool(self.checkpoints())
        except (OSError, ValueError) as error:  # ValueError: letters that no file name can have
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
            print(f"{self.path} cannot be locked ({error.strerror}): start the run there only once")

    def begin(self, options: dict[str, Any], step: int) -> None:
        """Cut the files to the loaded checkpoint, set newer ones aside, and note this start.

        Says where this start differs from the last one in what rounds numbers.
        """
        self.begun = True
        starts = self.path / "starts.jsonl"
        now = provenance()
        try:
            self.set_aside_broken()
            self.cut_records()
            self.rows.truncate(self.sizes()["rows"])
            self.rows.seek(0, os.SEEK_END)
            write_whole(self.path / "config.yaml", yaml.safe_dump(options).encode())
            with open_regular(starts, "ab+") as file:
                file.seek(0)
                earlier = file.read().splitlines() if step else []
                file.write(json.dumps({"step": step, **now}).encode() + b"\n")
        except OSError as error:
            raise RunError(f"cannot write in {self.path} ({describe(error)})") from None
        with contextlib.suppress(ValueError, LookupError, TypeError):  # no whole line, or not ours
            last = json.loads(earlier[-1])
            changed = [f"{k} {last[k]} -> {now[k]}" for k in now if last[k] != now[k]]
            if changed:
                print(f"resuming with {', '.join(changed)}: numbers may differ in their last bits")

    def discard_unless_begun(self) -> None:
        """Wrong input leaves nothing behind, and takes nothing that was there before."""
        for path in reversed([] if self.begun else self.made):
            with contextlib.suppress(OSError):  # a folder in which there is something by now
                path.rmdir() if path.is_dir() else path.unlink()

    # ------------------------------------------------------------------------ records and rows

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

    def cut_records(self) -> None:
        """Drop the records after the loaded checkpoint: they are made again.

        Lines that are no records move to a file of their own.
        """
        path = Path(self.metrics.name)
        content = path.read_bytes()
        lines = content.split(b"\n")
        if lines[-1].startswith(b'{"step": ') and not is_record(lines[-1]):
            lines.pop()  # a record that was being written when the process was killed
        foreign = [line for line in lines if line.strip() and not is_record(line)]
        kept = self.of_checkpoint([line for line in lines if is_record(line)], content)
        if foreign:
            aside = path.with_suffix(".jsonl.foreign")
            with open_regular(aside, "ab") as file:
                file.write(b"\n".join(foreign) + b"\n")
            print(f"{path}: {len(foreign)} lines are no records of a run; they are now in {aside}")
        cut = b"".join(line + b"\n" for line in kept)
        if content.startswith(cut):
            self.metrics.truncate(len(cut))
            self.metrics.seek(0, os.SEEK_END)
            return
        write_whole(path, cut)
        self.metrics.close()
        self.metrics = open_regular(path, "ab")

    def of_checkpoint(self, lines: list[bytes], content: bytes) -> list[bytes]:
        """The records among `lines` that the loaded checkpoint has counted."""
        if not self.state:
            return []
        sizes, newest = self.sizes(), self.state["step"]
        if "records_at_step" not in sizes:  # of older code, which noted the file's size alone
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
            print(f"{self.metrics.name} lacks records from before this start; the run goes on")
        return [lines[i] for i in numbers]

    def add_rows(self, columns: Iterable[np.ndarray]) -> None:
        """Write arrays [n, ...], one row of float32 for each of the n."""
        flat = [column.reshape(len(column), -1) for column in columns]
        self.rows.write(np.concatenate(flat, 1).astype(np.float32).tobytes())

    def read_rows(self, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """Those of the loaded checkpoint, as arrays [n, *shape]."""
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        size = self.sizes()["rows"]
        if size % (4 * ends[-1]):
            raise InputError(f"checkpoints_path: {self.rows.name} holds other rows than this run's")
        rows = np.fromfile(self.rows.name, np.float32, size // 4).reshape(-1, ends[-1])
        columns = np.split(rows, ends[:-1], axis=1)
        return [column.reshape(-1, *shape) for column, shape in zip(columns, shapes)]

    # ------------------------------------------------------------------------ checkpoints

    def checkpoints(self) -> list[Path]:
        return checkpoints_in(self.path)

    def sizes(self) -> dict[str, int]:
        """How much of the growing files belongs to the loaded checkpoint, in bytes."""
        return dict(self.state["sizes"]) if self.state else {"metrics": 0, "rows": 0}

    def save(self, state: dict[str, Any], keep: tuple[int, ...]) -> None:
        """Write a checkpoint beside its place, sync it, rename it; only then drop older ones.

        The one before stays, and so do those of the steps in `keep`. Raises OSError.
        """
        for file in (self.metrics, self.rows):
            file.flush()
            os.fsync(file.fileno())
        image = io.BytesIO()  # first, since torch.save to a full disk fails in ways of its own
        sizes = {"metrics": self.metrics.tell(), "rows": self.rows.tell(), **self.records_at}
        if self.last_step != state["step"]:
            sizes["records_at_step"] = 0
        torch.save({**state, "format": FORMAT, "sizes": sizes}, image)
        write_whole(self.path / f"checkpoint_{state['step']}.pt", image.getbuffer())
        for old in self.checkpoints()[:-2]:
            if step_of(old) not in keep:
                old.unlink()

    def load(
        self, device: torch.device, form: Any = None, identity: Optional[dict[str, Any]] = None
    ) -> Optional[dict[str, Any]]:
        """The newest checkpoint that is good and whose rows are there; None for a new run.

        `form` is what it must hold, see `check_form`. Changes nothing on disk. Raises `InputError`
        where none is good or the run is another by its `identity`, and `RunError` where the system
        does not let one be read.
        """
        self.identity = identity
        found = self.checkpoints()[::-1]
        for path in found:
            try:
                self.state = self.load_with_its_rows(path, device, form)
                break
            except InputError as error:
                self.broken.append((path, str(error)))
        if found and not self.state:
            problems = "; ".join(problem for _, problem in self.broken)
            raise InputError(f"checkpoints_path: no checkpoint is good: {problems}")
        if self.state and identity is not None:
            self.check_identity(self.state["identity"], identity)
        return self.state

    def check_identity(self, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
        """Raise `InputError` unless these options, those without their defaults, are the same."""
        names = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
        if names:
            found = ", ".join(f"{name} {theirs.get(name, '(its default)')}" for name in names)
            raise InputError(f"checkpoints_path: {self.path} contains another run, with {found}")

    def load_with_its_rows(self, path: Path, device: torch.device, form: Any) -> dict[str, Any]:
        state = load_checkpoint(path, device, form and {**form, **COUNTED})
        check_form({key: state.get(key) for key in COUNTED}, COUNTED, path)
        if state.get("counts", {}).get("step", state["step"]) != state["step"]:
            raise InputError(f"{path} is not a valid checkpoint (it says two different steps)")
        if self.rows.tell() < state["sizes"]["rows"]:
            raise InputError(f"{self.rows.name} is shorter than {path.name} says")
        return state

    def set_aside_broken(self) -> None:
        for path, problem in self.broken:
            aside = path.with_suffix(".broken")
            while os.path.lexists(aside):
                aside = aside.with_name(f"{aside.name}_")
            path.rename(aside)
            print(f"{problem}: {path.name} is set aside, the run goes on from the one before")


def write_whole(path: Path, content: Any) -> None:
    """Write bytes beside their place, sync, rename: the file is whole, or as it was."""
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
    """Save what ends early, and name the last good checkpoint where that is a failure."""
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


def step_of(checkpoint: Path) -> Optional[int]:
    """The step in a checkpoint's name; None for a name of another form."""
    match = re.fullmatch(r"checkpoint_(\d+)\.pt", checkpoint.name)
    return int(match[1]) if match else None


def checkpoints_in(directory: Path) -> list[Path]:
    """From the oldest to the newest; files that a user has named otherwise do not count."""
    found = {path: step_of(path) for path in directory.iterdir()}
    return sorted((path for path in found if found[path] is not None), key=found.get)


def load_checkpoint(
    path: Path, device: torch.device, form: Any = None, option: str = ""
) -> dict[str, Any]:
    """Read a checkpoint that has this form, see `check_form`. Errors begin with `option`.

    Raises `InputError` where it is missing, damaged, of other code or of another form, and
    `RunError` where the system does not let it be read, which says nothing about its content.
    """
    prefix = f"{option}: " if option else ""
    try:
        with open_regular(path) as file:
            image = io.BytesIO(file.read())  # so that what fails afterwards is its content
        with zipfile.ZipFile(image) as file:
            if damaged := file.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"{damaged} is damaged")
        image.seek(0)
        state = torch.load(image, map_location=device, weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError("it was not written by this version of the code")
        renew(state)
    except Exception as error:  # whatever the parts of torch.load raise on a broken file
        if getattr(error, "errno", None) in NO_FILE:
            raise InputError(f"{prefix}there is no checkpoint {path}") from None
        if is_system_error(error):
            raise RunError(f"{prefix}cannot read {path} ({describe(error)})") from None
        reason = str(error).partition("\n")[0]
        raise InputError(f"{prefix}{path} is not a valid checkpoint ({reason})") from None
    if form is not None:
        check_form(state, form, path, option)
    return state


def renew(state: dict[str, Any]) -> None:
    """Bring an older checkpoint's counts and metrics into today's form."""
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


COUNTS = {  # which of a run's are not just 0 or more; older code's lack those that may be missing
    "evaluated_at": int,
    "evaluations": Maybe(at_least_0),
    "successes": Maybe(sum_of_shares),
    "warmup_end": Maybe(at_least_0),
}
COUNTED = {  # what the directory itself adds and reads
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
    """Raise `InputError` unless `state`, of the checkpoint at `path`, is of a form.

    A form is a dict: just these keys, but for `Maybe`; a list: these in turn; a tensor: such a
    dtype and shape; a type; or a function of the value that says whether it is right, of which the
    docstring says in words what is.
    """
    prefix = f"{option}: " if option else ""
    try:
        compare(state, form, [])
    except FormError as error:
        raise InputError(f"{prefix}{path} is not a checkpoint of such a run ({error})") from None


def run_form(
    networks: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    observation_dim: int,
    counts: dict[str, int],
) -> dict[str, Any]:
    """What a checkpoint of a run must hold: networks like these, trained by such an optimizer."""
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


MODEL = "format", "step", "config", "scaling", "agent"  # what is needed to play, or to start from


def model_form(form: dict[str, Any]) -> dict[str, Any]:
    """A run's form of which only what is needed to play must be there."""
    return {key: part if key in MODEL else Maybe(part) for key, part in form.items()}


def load_model(
    path: Path, device: torch.device, form: dict[str, Any], options: dict[str, Any], names: str
) -> dict[str, Any]:
    """Read the checkpoint of `load_model` for a run of that form and those options.

    Of the options that `names` lists depend the networks; an error says which of them differ.
    """
    saved = load_checkpoint(path, device, option="load_model")
    config = saved.get("config")
    theirs = config if isinstance(config, dict) else {}
    differ = [name for name in names.split() if theirs.get(name, options[name]) != options[name]]
    try:
        check_form(saved, model_form(form), path, "load_model")
    except InputError:
        if not differ:
            raise
        found = ", ".join(f"{name} {theirs[name]}" for name in differ)
        expected = ", ".join(f"{name} {options[name]}" for name in differ)
        raise InputError(
            f"load_model: {path} has networks for {found}, expected {expected}"
        ) from None
    return saved


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
    """A part of a checkpoint is not of its form."""

    def __init__(self, place: list[str], found: str, expected: str):
        super().__init__(f"{' '.join(place) or 'all'}: found {found}, expected {expected}")


def compare(value: Any, form: Any, place: list[str]) -> None:
    """Raise `FormError` for the first part of `value` that is not of its form."""
    if isinstance(form, dict):
        compare_keys(value, form, place)
    elif isinstance(form, list):
        if not isinstance(value, (list, tuple)) or len(value) != len(form):
            raise FormError(place, kind_of(value), f"a list of {len(form)}")
        for number, (part, its_form) in enumerate(zip(value, form)):
            compare(part, its_form, [*place, str(number)])
    elif torch.is_tensor(form):
        is_alike = torch.is_tensor(value) and value.dtype == form.dtype
        if not is_alike or value.shape != form.shape:
            raise FormError(place, kind_of(value), kind_of(form))
        if value.is_floating_point() and not value.isfinite().all():
            raise FormError(place, "NaN or infinite numbers", "finite ones")
    elif isinstance(form, type):
        if not isinstance(value, form) or (isinstance(value, bool) and form is not bool):
            raise FormError(place, kind_of(value), form.__name__)
    elif not form(value):
        raise FormError(place, kind_of(value), form.__doc__ or form.__name__)


def compare_keys(value: Any, form: dict[Any, Any], place: list[str]) -> None:
    if not isinstance(value, dict):
        raise FormError(place, kind_of(value), "a dict")
    if strangers := value.keys() - form.keys():
        raise FormError(place, f"keys {shortened(str(sorted(map(str, strangers))))}", "none such")
    for key, its_form in form.items():
        may_lack = isinstance(its_form, Maybe)
        if key in value:
            compare(value[key], its_form.form if may_lack else its_form, [*place, str(key)])
        elif not may_lack:
            raise FormError([*place, str(key)], "nothing", kind_of(its_form))


def kind_of(value: Any) -> str:
    """A value in an error: what it is rather than all of it."""
    if torch.is_tensor(value):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return shortened(repr(value))
