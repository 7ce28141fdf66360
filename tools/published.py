"""Published scores, which tools/report.py shows beside yours.

Each row of results/published.csv names its source. A row is shown if a run has the same task and
method.
"""

import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runs.errors import InputError, check_regular

DEFAULT = Path(__file__).resolve().parents[1] / "results" / "published.csv"
Curves = dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]]  # by task and method


class Published(NamedTuple):
    """A source's scores of a method on a task. Deviations are over seeds; NaN if not published."""

    task: str
    method: str
    source: str  # its name, a comma, and the place in it
    offline_iterations: int
    online_iterations: int
    offline_score: float  # normalized, after the offline phase
    offline_deviation: float
    score: float  # at the end
    deviation: float
    regret: float  # mean of 1 - success over the training episodes
    regret_deviation: float
    seeds: int

    @property
    def name(self) -> str:
        return f"{self.method}, by {self.source.partition(',')[0]}"

    @property
    def lengths(self) -> tuple[int, int]:
        return self.offline_iterations, self.online_iterations

    def error(self, deviation: float) -> float:
        """The standard error of a mean, from the standard deviation over seeds (divided by n)."""
        return deviation / math.sqrt(self.seeds - 1) if self.seeds > 1 else math.nan


def read_published(path: Path) -> list[Published]:
    """The rows of a file like results/published.csv; raises `InputError` for any other file."""
    kinds = Published.__annotations__
    rows = []
    try:
        check_regular(path)
        for row in csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()):
            values = {key: kind(row[key] or "nan") for key, kind in kinds.items()}
            found = Published(**values)
            numbers = [value for value in found if not isinstance(value, str)]
            if np.isinf(numbers).any() or not np.isfinite([found.offline_score, found.score]).all():
                raise ValueError(f"a score that is not finite, of {found.task}")
            if min(found.seeds, *found.lengths) < 1:
                raise ValueError(f"a number below 1 of seeds or steps, of {found.task}")
            rows.append(found)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
        columns = ", ".join(kinds)
        raise InputError(
            f"published: {path}: expected rows of {columns}, found {type(error).__name__}: {error}"
        ) from None
    return rows


def read_corl(path: Path) -> Curves:
    """The curves in CORL's results/bin/finetune_scores.pickle, of each seed in both phases.

    It holds {method: {task: [(offline scores, online scores, regret) of each seed]}}. Evaluations
    are evenly spaced and end with the phase. Raises `InputError` for any other file.
    """
    from tasks.adroit import unpickle  # which calls nothing that a file names

    content = unpickle(path)
    curves: Curves = {}
    try:
        for method, of_tasks in content.items():
            for task, seeds in of_tasks.items():
                for *phases, _ in seeds:
                    offline, online = (np.array(scores, float) for scores in phases)
                    if not (offline.ndim == online.ndim == 1 and len(offline) and len(online)):
                        raise ValueError(f"scores of shapes {offline.shape} and {online.shape}")
                    if not np.isfinite(np.r_[offline, online]).all():
                        raise ValueError("scores that are not finite")
                    curves.setdefault((task, method), []).append((offline, online))
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"corl: {path}: expected CORL's finetune_scores.pickle, found {error}"
        ) from None
    return curves
