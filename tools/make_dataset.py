"""Make a dataset for a task of D4RL, Minari or OGBench, by their published recipes.

    python tools/make_dataset.py antmaze-umaze-v2 --transitions 200000 --seed 0
    python tools/make_dataset.py cube-single-play-singletask-v0 --transitions 200000 --seed 0
    python tools/make_dataset.py door-binary-v0 --demonstrations door-v0_demos.pickle

Row i only depends on the task, the seed, the demonstrations (if any) and i, except that the last
row ends an episode. So a short file is the beginning of a longer one, and the number of workers
does not matter.

recipes/description.txt, and for locomotion recipes/locomotion.txt, describe the layouts and the
recipes. The recipes themselves are in recipes/, a file per family of tasks.
"""

import argparse
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tasks
from runs.errors import InputError, RunError, run_program
from tools.command_line import Parser
from tools.recipes import RECIPES, find_recipe
from tools.recipes.common import Rows
from tools.recipes.workers import rollouts

DATASETS = Path(__file__).resolve().parents[1] / "datasets"

_stopped = threading.Event()  # set by a signal


class Interrupted(RunError):
    """A signal stopped the program."""

    exit_code = 130


# ------------------------------------------------------------------------------------- making


def collect(made: Iterator[Rows], transitions: int, show_total: bool) -> tuple[Rows, int]:
    """The first `transitions` rows of the rollouts, and how many rollouts had none.

    Raises `Interrupted` after a signal, and `RunError` if no rollout has rows.
    """
    parts = []
    missing = transitions
    left_out = 0
    with tqdm(total=transitions if show_total else None, mininterval=1, unit="row") as bar:
        for rows in made:
            if _stopped.is_set():
                raise Interrupted("interrupted; nothing was saved")
            if not rows:
                left_out += 1
                continue
            part = {name: array[:missing] for name, array in rows.items()}
            parts.append(part)
            size = len(part["terminals"])
            missing -= size
            bar.update(size)
            if missing == 0:
                break
    if not parts:
        raise RunError("no rollout reaches the goal")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, left_out


def part_path(target: Path) -> Path:
    """Where the dataset is written until it is complete."""
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def write_dataset(
    target: Path,
    task: str,
    transitions: int,
    seed: int,
    workers: int,
    demonstrations: list[dict[str, Any]] | None = None,
    source: str = "",
) -> int:
    """Write a dataset of `task`; `target` only appears once it is complete.

    `source` is the end of the command line that the file stores. Returns how many rollouts were
    left out. Raises OSError if it cannot write, and what `collect` raises.
    """
    recipe = find_recipe(task)
    made = rollouts(task, seed, workers, demonstrations)
    rows, left_out = collect(made, transitions, show_total=demonstrations is None)
    command = f"tools/make_dataset.py {task} --transitions {transitions} --seed {seed}{source}"
    part = part_path(target)
    try:
        recipe.write(part, rows, recipe.metadata(task, seed, command))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return left_out


def summary(target: Path, name: str) -> str:
    """The content of the finished file as the training script reads it, and a command to train."""
    recipe = find_recipe(name)
    is_folder = recipe.layout == "minari"
    data = target.parents[name.count("/")] if is_folder else target  # Minari's root folder
    task = tasks.make(name, str(data))
    rows = task.rows(target)
    ends = rows["truncations"] if is_folder else rows["timeouts"]
    if recipe.layout == "hdf5":
        ends = ends | rows["terminals"]
    size = sum(file.stat().st_size for file in (target, *target.rglob("*")) if file.is_file())
    starts = np.flatnonzero(np.r_[True, ends[:-1]])
    goal = "the rewards are dense"
    if task.failure_reward is not None:
        solved = np.maximum.reduceat(rows["rewards"], starts) > task.failure_reward
        goal = f"{np.mean(solved):.1%} of them reach the task's goal"
    return (
        f"{target}: {len(ends):,} transitions, {size / 1e6:.1f} MB\n"
        f"{len(starts):,} episodes, {len(ends) / len(starts):.0f} transitions long on average; "
        f"{goal}\n"
        f"Train on it: python cal_ql.py --config_path configs/{recipe.config}.yaml --env {name} "
        f"--dataset_path {shlex.quote(str(data))}"
    )


# ------------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    """The command line, checked; raises `InputError`."""
    parser = Parser(__doc__)
    parser.add_argument("task", help=f"one of {', '.join(RECIPES)}")
    option = parser.add_argument
    option("--transitions", type=int, default=1_000_000, metavar="N", help="default: 1000000")
    option("--seed", type=int, default=0, metavar="S", help="default: 0")
    option("--output", type=Path, metavar="PATH", help="default: datasets/TASK-N-seedS.SUFFIX")
    option("--demonstrations", type=Path, metavar="PATH", help="hand_dapg's door-v0_demos.pickle")
    option("--workers", type=int, default=os.cpu_count() or 1, help="default: one per core")
    args = parser.parse_args()
    if find_recipe(args.task) is None:
        raise InputError(f"no recipe for {args.task!r}; there is one for {', '.join(RECIPES)}")
    for name, least, most in (
        ("transitions", 1, 2**40),
        ("seed", 0, 2**32 - 1),
        ("workers", 1, 999),
    ):
        found = getattr(args, name)
        if not least <= found <= most:
            raise InputError(f"{name}: found {found}, expected {least} to {most}")
    return args


def default_output(args: argparse.Namespace, layout: str) -> Path:
    if layout == "minari":
        name = "minari"  # a root folder for many datasets
    elif args.demonstrations:
        name = f"{args.task}-seed{args.seed}.{layout}"
    else:
        name = f"{args.task}-{args.transitions}-seed{args.seed}.{layout}"
    return Path(os.path.relpath(DATASETS / name))


def target_path(args: argparse.Namespace) -> Path:
    """The path of the dataset; sets `args.output` to its default. Raises `InputError`."""
    layout = find_recipe(args.task).layout
    if args.output is None:
        args.output = default_output(args, layout)
    target = args.output / args.task if layout == "minari" else args.output
    parent = args.output.parent
    if not os.path.isdir(parent):
        raise InputError(f"there is no directory {parent}")
    if not os.access(parent, os.W_OK):
        raise InputError(f"cannot write to {parent}")
    try:
        exists = target.exists()
        part_path(target).exists()  # its longer name must be possible too
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from None
    if exists:
        raise InputError(f"{target} exists; choose another --output")
    return target


def load_demonstrations(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """The episodes in --demonstrations, for the tasks that need them; raises `InputError`."""
    needs_them = find_recipe(args.task).needs_demonstrations
    if needs_them != bool(args.demonstrations):
        needed = "needs" if needs_them else "takes no"
        raise InputError(f"{args.task} {needed} --demonstrations; see --help")
    if not needs_them:
        return None
    from tools.recipes.door import read_demonstrations

    try:
        return read_demonstrations(args.demonstrations)
    except (InputError, OSError) as error:
        raise InputError(f"--demonstrations: {error}") from None


def main() -> None:
    args = parse_arguments()
    target = target_path(args)
    find_recipe(args.task).check()
    demonstrations = load_demonstrations(args)
    source = f" --demonstrations {args.demonstrations.name}" if demonstrations else ""
    for number in (signal.SIGINT, signal.SIGTERM):  # an exception could be lost in a destructor
        signal.signal(number, lambda *_: _stopped.set())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        how_much = args.transitions, args.seed, args.workers
        left_out = write_dataset(target, args.task, *how_much, demonstrations, source)
    except OSError as error:
        raise RunError(f"cannot write {args.output}: {error}") from None
    print(summary(target, args.task))
    if left_out:
        print(f"Left out: {left_out} rollouts that did not reach the goal")


if __name__ == "__main__":
    sys.exit(run_program(main, "make_dataset.py"))
