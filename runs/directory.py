"""A run on disk: its resolved config, records, rows of data, starts and checkpoints.

One process holds it at a time. Metrics are one JSON line per record, rows of data only grow, and
checkpoints say how much of both belongs to them. After an interruption the same command resumes
from the newest good checkpoint.
"""

import contextlib
import fcntl
import io
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pyrallis
import torch

from runs.errors import DirectoryInUse, InputError, RunError
from runs.machine import provenance
from runs.signals import Stop

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

    def add_rows(self, columns: Iterable[np.ndarray]) -> None:
        """Write arrays [n, ...], one row of float32 for each of the n."""
        flat = [column.reshape(len(column), -1) for column in columns]
        self.rows.write(np.concatenate(flat, 1).astype(np.float32).tobytes())

    def read_rows(self, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """What `add_rows` has written, as arrays [n, *shape]."""
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        rows = np.fromfile(self.rows.name, np.float32).reshape(-1, ends[-1])
        columns = np.split(rows, ends[:-1], axis=1)
        return [column.reshape(-1, *shape) for column, shape in zip(columns, shapes)]

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
        raise RunError(f"{error}; {last}") from error


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
        if "updates_owed" in state.get("counts", {}):  # the name in older checkpoints
            state["counts"]["steps_owed"] = state["counts"].pop("updates_owed")
        return state
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}") from None
    except Exception as error:  # whatever the parts of torch.load raise on a broken file
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} is no whole checkpoint ({reason})") from None
