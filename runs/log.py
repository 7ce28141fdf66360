"""Where records go: metrics.jsonl, Weights & Biases and the progress bar."""

import contextlib
import os
import threading
from typing import Any, Optional

import wandb

from runs.directory import RunDirectory
from runs.errors import expand_home, open_regular


class Wandb:
    """A W&B run: offline where there is no key or no server, and never in training's way.

    The id that is really used stays in the directory's wandb_id, and a resumed run sends all its
    records again: W&B gets each at least once, and equal steps lie on themselves.
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
        except Exception as error:  # nothing of it is worth a run
            print("W&B fails, metrics.jsonl is written all the same:", *str(error).split())
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
        path = directory.path / "wandb_id"
        with contextlib.suppress(OSError), open_regular(path, "w") as file:  # see `known_id`
            file.write(self.run.id)

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
