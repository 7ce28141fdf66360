"""Where records go: metrics.jsonl, Weights & Biases and the progress bar."""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Optional

import torch
import torch.nn.functional as F
import wandb
from torch import Tensor
from tqdm import tqdm

from runs.directory import SCORE, RunDirectory, write_atomically
from runs.errors import RunError, expand_home, open_regular


class MeanMetrics:
    """Mean of each metric over the updates that had it since the last reset.

    The sums stay on the device until they are fetched.
    """

    def __init__(self):
        self.counts: dict[str, int] = {}  # updates, by metric
        self.total: Optional[Tensor] = None  # [metrics]
        self.bad_step: Optional[Tensor] = None  # [metrics], the first that was not finite, or inf

    @property
    def updates(self) -> int:
        return max(self.counts.values(), default=0)

    def reset(self) -> None:
        self.counts = {}

    def add(self, metrics: dict[str, Tensor], step: int) -> None:
        n_known = len(self.counts)
        self.counts |= {name: self.counts.get(name, 0) + 1 for name in metrics}
        absent = None
        if len(metrics) < len(self.counts):
            absent = torch.zeros_like(next(iter(metrics.values())))
        values = torch.stack([metrics.get(name, absent) for name in self.counts])
        bad_step = torch.where(values.isfinite(), math.inf, float(step))
        if n_known:
            if new := len(values) - n_known:
                self.total = F.pad(self.total, (0, new))
                self.bad_step = F.pad(self.bad_step, (0, new), value=math.inf)
            values = self.total + values
            bad_step = torch.minimum(self.bad_step, bad_step)
        self.total = values
        self.bad_step = bad_step

    def check(self) -> None:
        """Wait for the device; raise `RunError` if a metric was not finite."""
        if self.counts and not self.total.isfinite().all():
            step, index = self.bad_step.min(0)
            raise RunError(f"{list(self.counts)[index]} is not finite at step {step:.0f}")

    def means(self) -> dict[str, float]:
        self.check()
        if not self.counts:
            return {}
        counts = torch.tensor(list(self.counts.values()), device=self.total.device)
        return dict(zip(self.counts, (self.total / counts).tolist()))


def name_per_critic(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalar metrics. A metric with a value per critic, [C], becomes two scalars with CORL's names.

    `qf_loss` becomes `qf1_loss` and `qf2_loss`, `cql_q_rand` becomes `cql_q1_rand` and so on.
    Raises ValueError for a metric of another shape or name.
    """
    named = {}
    for name, values in metrics.items():
        if values.ndim == 0:
            named[name] = values
            continue
        for number, value in enumerate(values[:2], start=1):
            words = name.split("_")  # no regular expression: a compiler may have to trace this
            numbered = "_".join(f"{w}{number}" if w in ("q", "qf") else w for w in words)
            if values.ndim > 1 or numbered == name:
                raise ValueError(f"metric {name}: found shape {list(values.shape)}, expected []")
            named[numbered] = value
    return named


class Wandb:
    """A W&B run. Without a key or a server it records offline; its failures never stop training.

    The directory's wandb_id keeps the id that W&B used. A resumed run sends all its records again:
    W&B gets each at least once, and a record sent twice overwrites itself.
    """

    def __init__(self, directory: Optional[RunDirectory], **options: Any):
        self.run: Any = None
        options["settings"] = wandb.Settings(init_timeout=20, quiet=True)
        offline = {"mode": "offline", "settings": wandb.Settings(silent=True)}
        try:
            if directory:
                place = os.environ.get("WANDB_DIR", str(directory.path))
                options |= {"dir": expand_home(place, "WANDB_DIR"), "resume": "allow"}
                options["id"] = os.environ.get("WANDB_RUN_ID", self.known_id(directory))
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
                self.keep_id(directory)
        except Exception as error:  # lost log records are no reason to discard training
            print("W&B fails; metrics.jsonl is still written:", *str(error).split())
        for record in directory.records() if directory else []:
            self.send(record)

    def known_id(self, directory: RunDirectory) -> Optional[str]:
        path = directory.path / "wandb_id"
        try:
            with open_regular(path, "r") as file:
                return file.read().strip() or None
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            print(f"W&B: cannot read {path}, so the run gets a new id ({error})")
            return None

    def keep_id(self, directory: RunDirectory) -> None:
        with contextlib.suppress(OSError):  # see `known_id`
            write_atomically(directory.path / "wandb_id", self.run.id.encode())

    def send(self, record: dict[str, Any]) -> None:
        try:
            if self.run:
                self.run.log(record)
        except Exception as error:
            print("W&B stopped; metrics.jsonl is still written:", *str(error).split())
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


class Log:
    """Writes records to metrics.jsonl and W&B, and draws the progress bar.

    `config` are all options of the run. Steps are counted from the start of the offline phase.
    """

    def __init__(
        self, directory: Optional[RunDirectory], name: str, config: dict[str, Any], step: int
    ):
        self.directory = directory
        self.offline_steps = config["offline_iterations"]
        total_steps = self.offline_steps + config["online_iterations"]
        where = {"project": config["project"], "group": config["group"]}
        self.wandb = Wandb(directory, name=name, config=config, **where)
        interval = 0.5 if sys.stderr.isatty() else 30.0  # seconds; fewer lines in log files
        self.bar = tqdm(total=total_steps, initial=step, unit="step", mininterval=interval)
        self.shown: dict[str, str] = {}
        self.interval_start = time.perf_counter()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add one record."""
        offline = step <= self.offline_steps
        phase = {"offline_iter": step} if offline else {"online_iter": step - self.offline_steps}
        record = {"step": step, **phase, **metrics}
        if self.directory:
            self.directory.add_record(record)
        self.wandb.send(record)
        if SCORE in metrics:
            self.shown["score"] = f"{metrics[SCORE]:.1f}"
        self.bar.set_description("offline" if offline else "online", refresh=False)
        self.bar.set_postfix(self.shown, refresh=False)

    def write_means(self, step: int, metrics: MeanMetrics) -> None:
        """Add the update's metrics, averaged since their reset, and the rate of updates."""
        means = metrics.means()  # waits for the device
        rate = metrics.updates / (time.perf_counter() - self.interval_start)
        self.interval_start = time.perf_counter()
        self.shown["updates"] = f"{rate:.0f}/s"
        self.write(step, {**means, "updates_per_second": rate})

    @contextlib.contextmanager
    def paused(self, why: str = "") -> Iterator[None]:
        """Within, time does not count for the rate of updates; the bar says `why`."""
        before = time.perf_counter()
        description = self.bar.desc
        if why:
            self.bar.set_description(why)
        yield
        if why:
            self.bar.set_description_str(description)
        self.interval_start += time.perf_counter() - before

    def advance(self) -> None:
        """Move the bar on by a step."""
        self.bar.update()

    def close(self, patience: float) -> None:
        """Give W&B at most `patience` seconds to send the rest."""
        self.bar.close()
        self.wandb.close(patience)
