"""Kill a short run (-9) at random moments of both phases, and restart it each time until it ends.

    python tests/kill_test.py --kills 20

Its metrics, networks, optimizer and stored transitions must equal, bit for bit, those of a run
that was left alone; what differs is printed, and the exit code is 1.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RUN = ["--dataset_path", f"{ROOT}/datasets/maze2d-umaze-v1-small.hdf5", "--checkpoints_path", "."]
# 60 steps offline, then episodes of 300 steps at 60 and 360
RUN += """--env maze2d-umaze-v1 --device cpu --offline_iterations 60 --online_iterations 320
    --eval_freq 150 --checkpoint_freq 20 --log_freq 10 --n_episodes 1 --hidden_dim 8
    --q_n_hidden_layers 1 --actor_n_hidden_layers 1 --batch_size 16 --cql_n_actions 2""".split()


def start(directory: Path, *options: Any, **settings: Any) -> subprocess.Popen:
    """`python cal_ql.py OPTIONS` in `directory`; `settings` are those of Popen."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **settings}
    settings.setdefault("env", {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **os.environ})
    command = [sys.executable, str(ROOT / "cal_ql.py"), *map(str, options)]
    return subprocess.Popen(command, cwd=directory, **settings)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def records(directory: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl so far, of the one run below `directory`."""
    text = "".join(path.read_text() for path in directory.glob("*/metrics.jsonl"))
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_until(process: subprocess.Popen, holds: Callable[[], bool]) -> None:
    """Return as soon as `holds()`; raises RuntimeError where the process ends before."""
    while not holds():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended too early: {finish(process)}")
        time.sleep(0.0005)


def flatten(value: Any, name: str) -> dict[str, Any]:
    """The leaves of nested dicts and lists by their path, tensors as bytes."""
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in pairs for k, v in flatten(part, f"{name} {key}").items()}
    return {name: value.numpy().tobytes() if torch.is_tensor(value) else value}


def outcome(directory: Path, aside: int | None = None) -> dict[str, Any]:
    """All that the run below `directory` leaves, but for its speed, and for records at `aside`."""
    (transitions,) = directory.glob("*/transitions.bin")
    final = max(transitions.parent.glob("checkpoint_*.pt"), key=lambda path: int(path.stem[11:]))
    metrics = [{**record, "updates_per_second": None} for record in records(directory)]
    metrics = [record for record in metrics if record["step"] != aside]
    # the options that are no part of a run's identity may differ, and rates vary in length
    checkpoint = {**torch.load(final, weights_only=True), "config": None, "sizes": None}
    leaves = flatten(metrics, "record") | flatten(checkpoint, "checkpoint")
    return {"file": final.name, "transitions": transitions.read_bytes(), **leaves}


def differences(one: Path, other: Path, aside: int | None = None) -> list[str]:
    """Names of what differs between the outcomes of the runs below two directories."""
    a, b = outcome(one, aside), outcome(other, aside)
    return [name for name in {**a, **b} if a.get(name, "none") != b.get(name, "none")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, default %(default)s")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as left_alone, tempfile.TemporaryDirectory() as killed:
        finish(start(Path(left_alone), *RUN))
        for step in sorted(rng.randrange(370) for _ in range(args.kills)):
            process = start(Path(killed), *RUN)
            wait_until(process, lambda: any(r["step"] >= step for r in records(Path(killed))))  # noqa: B023
            time.sleep(rng.uniform(0.0, 0.1))
            process.kill()
            print(f"killed after step {records(Path(killed))[-1]['step']}:", finish(process).stdout)
        print(finish(start(Path(killed), *RUN)).stdout)
        different = differences(Path(left_alone), Path(killed))
    print(f"{args.kills} kills, {len(different)} differences", *different, sep="\n")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
