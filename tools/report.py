"""Table and learning curves of finished or running runs, from their metrics.jsonl.

    python tools/report.py runs/* --output curves.png

Runs that differ in nothing but their seed make one curve: the mean over seeds, and the range from
the worst to the best. It is labelled by the options in which the groups differ. The table is
Markdown: the score where the offline phase ends, the last score, and the online phase's regret.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

SCORE = "eval/d4rl_normalized_score"
NOT_COMPARED = ("seed", "checkpoints_path", "device", "group", "project", "name")


class RunMetrics(NamedTuple):
    config: dict
    steps: np.ndarray  # [n], of the evaluations
    scores: np.ndarray  # [n]
    regret: float  # share of failed training episodes; NaN before the first one


def read_run(directory: Path) -> RunMetrics:
    """Raises OSError or ValueError where `directory` holds no run."""
    config = yaml.safe_load((directory / "config.yaml").read_text())
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    evaluations = [(record["step"], record[SCORE]) for record in records if SCORE in record]
    if not evaluations:
        raise ValueError("it has no evaluation yet")
    regrets = [record["train/regret"] for record in records if "train/regret" in record]
    steps, scores = np.array(evaluations).T
    return RunMetrics(config, steps, scores, regrets[-1] if regrets else np.nan)


def group_runs(runs: list[RunMetrics]) -> dict[str, list[RunMetrics]]:
    """Runs of the same options, under the options that tell the groups apart."""
    options = [{k: v for k, v in r.config.items() if k not in NOT_COMPARED} for r in runs]
    keys = sorted({key for option in options for key in option})
    distinct = [key for key in keys if len({repr(option.get(key)) for option in options}) > 1]
    groups = defaultdict(list)
    for run, option in zip(runs, options):
        label = ", ".join(f"{key}: {option.get(key)}" for key in distinct) or option["env"]
        groups[label].append(run)
    return dict(sorted(groups.items(), reverse=True))


def mean_and_range(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def table(groups: dict[str, list[RunMetrics]]) -> str:
    """Mean over seeds, and in brackets the worst and the best seed."""
    rows = [
        "| runs | seeds | score after the offline phase | last score | regret online |",
        "| --- | --- | --- | --- | --- |",
    ]
    for label, runs in groups.items():
        offline = [r.scores[r.steps <= r.config["offline_iterations"]][-1] for r in runs]
        last = [r.scores[-1] for r in runs]
        regret = f"{np.mean([r.regret for r in runs]):.2f}"
        cells = (label, str(len(runs)), mean_and_range(offline), mean_and_range(last), regret)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(groups: dict[str, list[RunMetrics]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for label, runs in groups.items():
        shared = sorted(set.intersection(*(set(run.steps) for run in runs)))
        scores = np.array([run.scores[np.isin(run.steps, shared)] for run in runs])  # [seeds, n]
        (line,) = axes.plot(shared, scores.mean(0), label=f"{label} ({len(runs)} seeds)")
        axes.fill_between(shared, scores.min(0), scores.max(0), color=line.get_color(), alpha=0.2)
    switches = {run.config["offline_iterations"] for runs in groups.values() for run in runs}
    for switch in switches:
        axes.axvline(switch, color="grey", linestyle="--", linewidth=1)
    axes.set_xlabel("step (offline updates, then environment steps; the dashed line parts them)")
    axes.set_ylabel("D4RL normalized score")
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--output", type=Path, help="picture to write, e.g. curves.png")
    args = parser.parse_args()
    runs = []
    for directory in args.runs:
        try:
            runs.append(read_run(directory))
        except (OSError, ValueError) as error:
            print(f"report.py: error: {directory} is no run to report: {error}", file=sys.stderr)
            return 2
    groups = group_runs(runs)
    print(table(groups))
    if args.output:
        draw(groups, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
