"""Make a paper's tables and pictures of runs, finished or still running.

    python tools/report.py output/* --output curves.pdf --html report.html --csv curves.csv
    python tools/report.py curves.csv --output curves.png

Prints the tables as Markdown. A path is a run directory, or a file that --csv wrote (edit its
column `method` to rename methods). A path that cannot be read is left out; one line says why.

Runs on one task with equal options are seeds of one method. Options that may change between two
starts of a run (device, logging, evaluation, number of steps) are ignored. A method is called
Cal-QL, CQL (`calibrate: false`), WSRL or RLPD, or by the option `name` if that was given. WSRL and
RLPD have an ensemble of critics, and no regularizer online; WSRL an offline phase or `load_model`,
a warm-up and no offline data online, RLPD no offline phase and offline data.

Options follow the name: those that differ from WSRL's or RLPD's file in configs/methods/, and among
all others those that differ from most methods on the task. On a tie the default counts as the usual
value; if it is not among the tied values, every method shows its own.

Below a task's scores, pictures show the values that the regularizer moves: the critics' mean value
of the data's actions and of the policy's (in Cal-QL no lower than the bound, as in the loss), the
bound, which is the mean return-to-go, and the share of the policy's actions valued below it. Each
point is a mean over the updates since the last evaluation. Older files of --csv lack these columns
and only give scores.

results/published.csv has scores that others published. If a run has the same task and method, the
table shows them as a row and the picture as marks at the switch and at the end, for any number of
steps; --published none leaves them out. CORL's "Cal-QL" trains online with plain CQL.
"""

import argparse
import base64
import csv
import dataclasses
import functools
import html
import io
import itertools
import json
import math
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from scipy import integrate, stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cal_ql
from runs.directory import SCORE
from runs.errors import InputError, check_regular, run_program
from runs.options import cast_option, read_config_file
from tools import published
from tools.command_line import Parser
from tools.published import Curves, Published

METHODS = Path(__file__).resolve().parents[1] / "configs" / "methods"
SUCCESS = "eval/success_rate"
REGRET = "train/regret"
MAY_CHANGE = {f.name for f in dataclasses.fields(cal_ql.Config) if "may_change" in f.metadata}
NO_METHOD = {*MAY_CHANGE, "env", "seed", "eval_seed", "precision", "name"}
PHRASES = {  # instead of an option and its value
    "calibrate_online false": "not calibrated online",
    "cql_alpha_online 0": "no regularizer online",
    "warmup_steps 0": "no warm-up",
    "offline_iterations 0": "no offline phase",
    "cql_importance_sample false": "no importance sampling",
    "load_model true": "from a checkpoint",
}
COUNTS = "seed", "offline_iterations", "online_iterations"
COLUMNS = "task", "method", *COUNTS, "step", "score", "success_rate", "regret"  # of a CSV file
VALUES = {  # optional columns: each is the mean of these metrics
    "data_value": ("average_qf1", "average_qf2"),
    "policy_value": ("cql_q1_current_actions", "cql_q2_current_actions"),
    "bound": ("average_return_to_go",),
    "share_below": ("bound_rate_cql_q1_current_actions", "bound_rate_cql_q2_current_actions"),
}
UNKNOWN = (math.nan,) * len(VALUES)
LINES = {  # how the values are drawn, except the share
    "data_value": ("value of data's actions", "solid"),
    "policy_value": ("value of policy's actions", "dashed"),
    "bound": ("bound (return-to-go)", "dotted"),
}
MOST_STEPS = 2**53  # float64 holds every whole number up to it
LARGEST_SCORE = 1e100  # its square is finite
SHARES = np.linspace(-1, 1, 81)  # -1 to 0: share of the offline phase; 0 to 1: of the online phase
# Okabe and Ito's colours, which the colour-blind can tell apart, without yellow (faint on white)
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()
DASHES = "solid", "dashed", "dashdot"  # for seven methods each; unfinished runs are dotted
RUNNING = dict(linestyle="dotted")
SWITCH = dict(color="grey", linestyle=(0, (4, 3)), linewidth=1, zorder=0)
SEED_OF_OTHERS = dict(linestyle="solid", linewidth=0.8, alpha=0.35, zorder=1)
MARK = dict(marker="D", markersize=5, capsize=2, linestyle="none", clip_on=False, zorder=4)


class Run(NamedTuple):
    """One seed of one method on one task. Its n evaluations are in the order of their steps."""

    source: str  # where it was read
    task: str
    method: str  # "" until `label_methods`, unless read from a CSV file
    options: dict[str, str]  # those that distinguish methods; {} if read from a CSV file
    seed: int
    switch: int  # step at which the offline phase ends
    end: int  # its planned last step
    steps: np.ndarray  # [n], updates offline, then environment steps
    scores: np.ndarray  # [n], normalized
    successes: np.ndarray  # [n], share of the evaluation episodes; NaN where a task has no goal
    regrets: np.ndarray  # [n], mean of 1 - success over the training episodes so far, or NaN
    values: np.ndarray  # [n, 4], VALUES since the last evaluation, NaN if they are not known

    @property
    def ended(self) -> bool:
        return self.steps[-1] >= self.end

    def positions(self, by_share: bool = False) -> np.ndarray:
        """When evaluations were, [n]: steps after the switch, or shares of the phases, -1 to 1."""
        steps = self.steps - self.switch
        lengths = np.where(steps < 0, self.switch, max(self.end - self.switch, 1))
        return steps / lengths if by_share else steps

    def scores_at(self, positions: Any, by_share: bool = False) -> Any:
        """Scores, linear between evaluations; NaN before the first and after the last."""
        return np.interp(positions, self.positions(by_share), self.scores, np.nan, np.nan)

    def values_at(self, positions: np.ndarray, column: str) -> np.ndarray:
        """A column of `VALUES`, interpolated in the same way."""
        values = self.values[:, list(VALUES).index(column)]
        known = ~np.isnan(values)
        if not known.any():
            return np.full(len(positions), np.nan)
        return np.interp(positions, self.positions()[known], values[known], np.nan, np.nan)

    def online_area(self) -> float:
        """Area under the online phase's scores (trapezoids) over its steps so far: a mean score."""
        positions = np.unique(np.maximum(self.positions(), 0.0))
        return integrate.trapezoid(self.scores_at(positions), positions) / (positions[-1] or np.nan)


Group = dict[str, list[list[Run]]]  # for each method its runs on each of some tasks


# ---------------------------------------------------------------------------- reading


def make_run(
    source: Any,
    task: str,
    method: str,
    options: dict[str, str],
    counts: list[Any],
    evaluations: dict[Any, Any],
) -> Run:
    """A run by its `COUNTS` and by the score, success rate, regret and `VALUES` at each step.

    Raises ValueError, TypeError or OverflowError if a value is impossible.
    """
    for text in (task, method, *options):
        if not isinstance(text, str):
            raise TypeError(f"found {str(text)[:80]!r} for a name, expected text")
        text.encode()  # raises UnicodeError if it cannot be printed
    if not evaluations:
        raise ValueError("no evaluation yet")
    seed, offline, online = map(int, counts)
    rows = [(int(step), *map(float, values)) for step, values in evaluations.items()]
    rows.sort()
    for count in (seed, offline, online, rows[0][0], rows[-1][0]):
        if not 0 <= count <= MOST_STEPS:
            raise ValueError(f"a seed, step or number of steps of {count:.3g}")
    table = np.array(rows)
    steps, scores, successes, regrets = table[:, :4].T
    values = table[:, 4:]
    if not (np.abs(scores) <= LARGEST_SCORE).all():
        raise ValueError("a score that is not finite, or above 1e100")
    if np.isinf(successes).any() or np.isinf(regrets).any():
        raise ValueError("a success rate or a regret that is not finite")
    if not (np.abs(values[~np.isnan(values)]) <= LARGEST_SCORE).all():
        raise ValueError("a value of the critics that is not finite, or above 1e100")
    columns = steps, scores, successes, regrets, values
    return Run(str(source), task, method, options, seed, offline, offline + online, *columns)


def read_options(file: Path) -> dict[str, Any]:
    """The options in a YAML file; options that cal_ql.py does not have stay text."""
    kinds = cal_ql.Config.__annotations__
    texts = read_config_file(str(file))
    return {k: cast_option(k, v, kinds[k]) if k in kinds else v for k, v in texts.items()}


def algorithm(options: dict[str, Any]) -> str:
    """Cal-QL, CQL, WSRL or RLPD, by the module's docstring."""
    if options["cql_alpha_online"] == 0 and options["n_critics"] > 2:
        is_trained = options["offline_iterations"] > 0 or options["load_model"]
        if is_trained and options["mixing_ratio"] == 0 and options["warmup_steps"] > 0:
            return "WSRL"
        if not is_trained and options["mixing_ratio"] > 0:
            return "RLPD"
    return "CQL" if options["calibrate"] is False else "Cal-QL"


def as_text(options: dict[str, Any]) -> dict[str, str]:
    texts = {key: json.dumps(value, default=str) for key, value in options.items()}
    return {key: text.strip('"').removesuffix(".0") for key, text in texts.items()}


def method_options(options: dict[str, Any]) -> dict[str, str]:
    """The options that distinguish methods, as text; "" has the first part of the method's name."""
    chosen = {key: value for key, value in options.items() if key not in NO_METHOD}
    chosen["dataset_path"] = str(options["dataset_path"]).rpartition("/")[2]  # without its folder
    chosen["load_model"] = bool(options["load_model"])  # each seed may start from its own
    is_named = options["name"] != cal_ql.Config.name
    chosen[""] = options["name"] if is_named else algorithm(options)
    return as_text(chosen)


@functools.cache
def options_in_name(name: str) -> dict[str, str]:
    """The options in the file of WSRL or RLPD, as text; {} for other methods."""
    if name not in ("WSRL", "RLPD"):
        return {}
    file = METHODS / f"{name.lower()}.yaml"
    return as_text({"calibrate": True, "calibrate_online": True} | read_options(file))


def read_run(directory: Path) -> list[Run]:
    config = directory / "config.yaml"
    metrics = directory / "metrics.jsonl"
    options = read_options(config)
    check_regular(metrics)
    lines = metrics.read_bytes().split(b"\n")[:-1]  # without an incomplete last line
    evaluations = {}
    regret = np.nan
    since = [UNKNOWN]  # VALUES since the last evaluation
    for record in json.loads(b"[" + b",\n".join(lines) + b"]"):  # errors name the file's line
        regret = record.get(REGRET, regret)
        if "average_qf1" in record:
            since.append(values_in(record))
        if SCORE in record:
            values = np.mean(since[1:] or since, 0)
            evaluations[record["step"]] = (
                record[SCORE],
                record.get(SUCCESS, np.nan),
                regret,
                *values,
            )
            since = [UNKNOWN]
    counts = [options[key] for key in COUNTS]
    chosen = method_options(vars(cal_ql.Config()) | options)
    return [make_run(directory, options["env"], "", chosen, counts, evaluations)]


def values_in(record: dict[str, Any]) -> list[float]:
    """`VALUES` of a record of updates; NaN for those that it lacks, as in older runs."""
    found = ([record[name] for name in names if name in record] for names in VALUES.values())
    return [sum(values) / len(values) if values else math.nan for values in found]


def read_csv(path: Path) -> list[Run]:
    check_regular(path)
    found = defaultdict(dict)
    for row in csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()):
        task, method, seed, offline, online, step, *values = (row[key] for key in COLUMNS)
        values += [row.get(key) for key in VALUES]  # none in older files
        found[task, method, seed, offline, online][step] = [value or np.nan for value in values]
    if not found:
        raise ValueError("no evaluation")
    runs = []
    for (task, method, *counts), evaluations in found.items():
        source = f"{path}, {method}, seed {counts[0]}"
        runs.append(make_run(source, task, method, {}, counts, evaluations))
    return runs


def read_all(paths: list[Path]) -> tuple[list[Run], list[str]]:
    """All runs that can be read, and a line for each path that cannot."""
    runs: list[Run] = []
    problems: list[str] = []
    for path in paths:
        try:
            runs += read_csv(path) if path.suffix == ".csv" else read_run(path)
        except Exception as error:  # foreign files can raise any exception
            found = " ".join(f"{type(error).__name__}: {error}".split())
            problems.append(f"{path}: expected a run or a file of --csv, found {found}")
    return runs, problems


# ---------------------------------------------------------------------------- methods


def usual_values(methods: list[dict[str, str]]) -> dict[str, Any]:
    """The value of each option that most methods have; on a tie the default.

    Methods whose file in configs/methods/ sets the option do not count.
    """
    usual = {}
    default = method_options(vars(cal_ql.Config()))
    for option in {option for method in methods for option in method}:
        counting = [method for method in methods if option not in options_in_name(method[""])]
        counts = Counter(method.get(option) for method in counting)
        best = [value for value in counts if counts[value] == max(counts.values())]
        usual[option] = best[0] if len(best) == 1 else default.get(option)
    return usual


def phrase(option: str, value: str) -> str:
    if option == "n_critics":
        return f"{value} critics"
    return PHRASES.get(f"{option} {value}", f"{option} {value}")


def label_methods(runs: list[Run]) -> list[Run]:
    """Name each run's method, by the rules in the module's docstring."""
    methods = defaultdict(dict)
    for run in runs:
        if run.options:  # else it comes from a CSV file, with its name
            methods[run.task][str(run.options)] = run.options
    usual = {task: usual_values(list(found.values())) for task, found in methods.items()}
    labelled = []
    for run in runs:
        parts = [name := run.options.get("", run.method)]
        expected = usual.get(run.task, {}) | options_in_name(name)
        for option, value in run.options.items():
            in_name = option == "" or option == "calibrate" and name in ("Cal-QL", "CQL")
            if not in_name and value != expected[option]:
                parts.append(phrase(option, value))
        labelled.append(run._replace(method=", ".join(parts)))
    return labelled


def without_duplicates(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """The longest run of each task, method and seed; a line for each run that is left out."""
    kept: dict[tuple, Run] = {}
    lines = []
    for run in sorted(runs, key=lambda run: -run.steps[-1]):
        longest = kept.setdefault((run.task, run.method, run.seed), run)
        if longest is not run:
            steps = f"at step {longest.steps[-1]:,.0f}, this one at {run.steps[-1]:,.0f}"
            lines.append(f"{run.source}: same task, method, seed as {longest.source}: {steps}")
    return list(kept.values()), lines


def counted(runs: list[Run]) -> list[Run]:
    """The runs that count: those that have ended, or all if none has."""
    return [run for run in runs if run.ended] or runs


def group_runs(runs: list[Run]) -> dict[str, Group]:
    """Group the runs by what is shown together: each task, then all tasks.

    "All tasks" has the tasks on which runs have ended, the methods that have ended on each of them,
    and only ended runs. Short names come first, so that Cal-QL and CQL have the same colours in
    every picture.
    """
    groups = defaultdict(dict)
    ended = defaultdict(dict)
    runs = sorted(runs, key=lambda run: (run.method.casefold(), run.seed))
    for run in sorted(runs, key=lambda run: (run.task, run.method.count(","))):
        groups[run.task].setdefault(run.method, [[]])[0].append(run)
        if run.ended:
            ended[run.task].setdefault(run.method, []).append(run)
    names = Counter(name for methods in ended.values() for name in methods)
    together = {
        name: [methods[name] for methods in ended.values()]
        for name, n_tasks in names.items()
        if n_tasks == len(ended) > 1
    }
    return groups | ({f"all {len(ended)} tasks": together} if together else {})


# ---------------------------------------------------------------------------- numbers


def interquartile_mean(*samples: np.ndarray, axis: int = -1) -> Any:
    """Mean of the middle half of all runs of all tasks (Agarwal et al. 2021, arXiv 2108.13264)."""
    return stats.trim_mean(np.concatenate(samples, axis), 0.25, axis=axis)


def probability_of_improvement(*samples: np.ndarray, axis: int = -1) -> Any:
    """Mean over tasks of P(X > Y) + P(X = Y) / 2, by Mann and Whitney's U (arXiv 2108.13264).

    `samples` holds X's scores on each task, then Y's.
    """
    pairs = zip(samples, samples[len(samples) // 2 :])
    signs = [np.sign(x[..., :, None] - y[..., None, :]).mean((-2, -1)) for x, y in pairs]
    return (1 + np.mean(signs, axis=0)) / 2


def interval(samples: list[np.ndarray], statistic: Callable, resamples: int = 10_000) -> Any:
    """95 % percentile interval of a bootstrap, which resamples the seeds within each task.

    `samples` holds an array [seeds, ...] for each task. Returns None if a task has a single seed.
    """
    if min(map(len, samples)) < 2:
        return None
    how = dict(method="percentile", n_resamples=resamples, batch=1000, vectorized=True, rng=0)
    return stats.bootstrap(samples, statistic, **how).confidence_interval


# ---------------------------------------------------------------------------- tables

SCORES = "task|method|seeds|steps|score|IQM of the score|online area|success|regret".split("|")
IMPROVEMENT = "task|method|over|probability of improvement".split("|")
EXPLANATION = """Seeds: in parentheses the finished share of a run; unfinished runs count only if
no run of the method has ended. Steps: offline updates + online environment steps. Score:
normalized, after the offline phase → at the end; mean ± standard error over seeds. IQM:
interquartile mean over runs, and the 95 % interval of a bootstrap over the seeds of each task and
method. Online area: area under the online phase's scores divided by its length, a mean score.
Success: share of the last evaluation's episodes. Regret: mean of 1 - success over the training
episodes. Probability of improvement: that a run of the first method ends higher than one of the
second; a tie counts one half. All tasks: the methods that have ended on each; mean over tasks, IQM
over all runs. By others: as published, with the standard error over seeds. Curves: IQM
and its interval."""


def mean_and_error(samples: list[np.ndarray], digits: int = 1) -> str:
    """The mean over tasks of the mean over seeds; its error if every task has several seeds."""
    means = [values.mean() for values in samples]
    if np.isnan(means).any():
        return "–"
    errors = [stats.sem(values) for values in samples if len(values) > 1]
    known = len(errors) == len(samples)
    error = f" ± {np.linalg.norm(errors) / len(errors):.{digits}f}" if known else ""
    return f"{np.mean(means):.{digits}f}{error}"


def with_interval(
    samples: list[np.ndarray], statistic: Callable = interquartile_mean, digits: int = 1
) -> str:
    if np.isnan(np.concatenate(samples)).any():
        return "–"
    found = interval(samples, statistic)
    bounds = f"[{found.low:.{digits}f}, {found.high:.{digits}f}]" if found else "(no interval)"
    return f"{statistic(*samples):.{digits}f} {bounds}"


def score_row(title: str, name: str, tasks: list[list[Run]]) -> list[str]:
    used = [counted(runs) for runs in tasks]

    def values(quantity: Callable[[Run], float]) -> list[np.ndarray]:
        return [np.array([quantity(run) for run in runs]) for runs in used]

    offline = values(lambda run: run.scores_at(0.0))
    end = values(lambda run: run.scores[-1])
    row = [title, name, f"{sum(map(len, used))} runs", ""]
    if len(tasks) == 1:
        (runs,) = tasks
        shares = ("" if run.ended else f" ({run.steps[-1] / run.end:.0%})" for run in runs)
        row[2] = " ".join(f"{run.seed}{share}" for run, share in zip(runs, shares))
        lengths = {f"{run.switch:,} + {run.end - run.switch:,}" for run in used[0]}
        row[3] = " or ".join(sorted(lengths))
    row.append(f"{mean_and_error(offline)} → {mean_and_error(end)}")
    row.append(f"{with_interval(offline)} → {with_interval(end)}")
    row.append(mean_and_error(values(Run.online_area)))
    row.append(mean_and_error(values(lambda run: run.successes[-1]), 2))
    row.append(mean_and_error(values(lambda run: run.regrets[-1]), 2))
    return row


def published_row(result: Published) -> list[str]:
    def shown(value: float, deviation: float, digits: int = 1) -> str:
        error = result.error(deviation)
        if math.isnan(value):
            return "–"
        return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")

    steps = f"{result.offline_iterations:,} + {result.online_iterations:,}"
    offline = shown(result.offline_score, result.offline_deviation)
    end = shown(result.score, result.deviation)
    regret = shown(result.regret, result.regret_deviation, 2)
    name, seeds = result.name, f"{result.seeds} seeds"
    return [result.task, name, seeds, steps, f"{offline} → {end}", *"–––", regret]


def make_tables(groups: dict[str, Group], others: list[Published] = ()) -> list[list[list[str]]]:
    """Two tables as rows of cells, the first row their header: scores and improvements."""
    scores = []
    for title, group in groups.items():
        scores += [score_row(title, name, group[name]) for name in group]
        shown = [result for result in others if result.task == title and result.method in group]
        scores += map(published_row, shown)
    improvements = []
    for title, group in groups.items():
        for first, second in itertools.combinations(group, 2):
            tasks = [counted(runs) for runs in group[first] + group[second]]
            if all(runs[0].ended for runs in tasks):
                ends = [np.array([run.scores[-1] for run in runs]) for runs in tasks]
                cell = with_interval(ends, probability_of_improvement, 2)
                improvements.append([title, first, second, cell])
    return [[SCORES, *scores], *([[IMPROVEMENT, *improvements]] if improvements else [])]


def markdown(tables: list[list[list[str]]]) -> str:
    parts = []
    for header, *rows in tables:
        cells = [header, ["---"] * len(header), *rows]
        parts.append("\n".join(f"| {' | '.join(row)} |".replace("\n", " ") for row in cells))
    return "\n\n".join([*parts, EXPLANATION]) + "\n"


# ---------------------------------------------------------------------------- pictures


def draw_scores(axes: Axes, group: Group, styles: dict[str, dict]) -> None:
    """Draw each method's interquartile mean over runs, with its interval, where all have scores.

    Runs that have not ended are thin and dotted; a mean of such runs is dotted. Scores between two
    evaluations are interpolated.
    """
    by_share = len(next(iter(group.values()))) > 1
    for name, tasks in group.items():
        used = [counted(runs) for runs in tasks]
        positions = np.unique(np.concatenate([run.positions() for runs in used for run in runs]))
        positions = SHARES if by_share else positions
        samples = [np.array([r.scores_at(positions, by_share) for r in runs]) for runs in used]
        known = ~np.isnan(np.concatenate(samples)).any(0)
        positions = positions[known]
        samples = [scores[:, known] for scores in samples]
        look = styles[name] | ({} if used[0][0].ended else RUNNING)
        axes.plot(positions, interquartile_mean(*samples, axis=0), **look)
        if known.any() and (bounds := interval(samples, interquartile_mean, 2000)):
            band = dict(color=styles[name]["color"], alpha=0.2, linewidth=0)
            axes.fill_between(positions, bounds.low, bounds.high, **band)
        for run in (run for runs in tasks for run in runs if not run.ended):
            axes.plot(run.positions(by_share), run.scores, **styles[name] | RUNNING, linewidth=1)
    style_axes(axes, "normalized score")
    axes.set_xlabel("share of each phase" if by_share else "offline updates | online steps")
    if by_share:
        axes.set_xticks([-1, 0, 1], ["start", "switch", "end"])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def style_axes(axes: Axes, label: str) -> None:
    axes.axvline(0, **SWITCH)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel(label)


def has_values(group: Group) -> bool:
    """Whether the group is a single task and any of its runs has `VALUES`."""
    all_runs = [runs for tasks in group.values() for runs in tasks]
    known = any(not np.isnan(run.values).all() for runs in all_runs for run in runs)
    return known and len(next(iter(group.values()))) == 1


def draw_values(panels: list[Axes], group: Group, styles: dict[str, dict]) -> None:
    """Draw `VALUES` below the scores in the first panel: IQM over the runs that count, if known."""
    scores, values, share = panels
    for name, (runs,) in group.items():
        used = [run for run in counted(runs) if not np.isnan(run.values).all()]
        if not used:  # all come from older files
            continue
        positions = np.unique(np.concatenate([run.positions() for run in used]))
        for column in VALUES:
            samples = np.array([run.values_at(positions, column) for run in used])
            known = ~np.isnan(samples).any(0)
            mean = interquartile_mean(samples[:, known], axis=0)
            is_share = column == "share_below"
            style = "solid" if is_share else LINES[column][1]
            where = share if is_share else values
            look = dict(color=styles[name]["color"], linestyle=style, linewidth=1.3)
            where.plot(positions[known], mean, **look)
    style_axes(values, "value, bound")
    style_axes(share, "below bound")
    share.yaxis.label.set_fontsize("small")
    share.set_ylim(-0.03, 1.03)
    share.yaxis.set_major_formatter(PercentFormatter(1.0))
    share.set_xlabel(scores.get_xlabel())
    for axes in (scores, values):
        axes.set_xlabel("")
        axes.tick_params(labelbottom=False)


def draw_others(
    axes: Axes, group: Group, styles: dict[str, dict], others: list[Published], curves: Curves
) -> None:
    """Draw published scores of the group's task and methods, scaled to the runs' phases.

    A mark is filled where their phases have as many steps as the runs', else hollow.
    """
    for name, (runs, *_) in group.items():
        task = runs[0].task
        look = dict(color=styles[name]["color"])
        switch = max(run.switch for run in runs)
        length = max(run.end - run.switch for run in runs)
        for offline, online in curves.get((task, name), []):
            before = switch * (np.arange(1, len(offline) + 1) / len(offline) - 1)
            after = length * np.arange(1, len(online) + 1) / len(online)
            shown = np.r_[offline, online]
            axes.plot(np.r_[before, after], shown, **look | SEED_OF_OTHERS)
        for result in others:
            if (result.task, result.method) != (task, name):
                continue
            same = all((run.switch, run.end - run.switch) == result.lengths for run in runs)
            filling = look["color"] if same else "white"
            marks = dict(**look, **MARK, markerfacecolor=filling)
            if switch:
                error = result.error(result.offline_deviation)
                axes.errorbar(0, result.offline_score, error, **marks)
            if length:
                axes.errorbar(length, result.score, result.error(result.deviation), **marks)


def legend_labels(
    groups: dict[str, Group], styles: dict[str, dict], others: list[Published], curves: Curves
) -> dict[str, Line2D]:
    """What the legend shows, by its label."""
    labels = {textwrap.fill(name, 60): Line2D([], [], **style) for name, style in styles.items()}
    labels["switch to the online phase"] = Line2D([], [], **SWITCH)
    if any(not r.ended for group in groups.values() for (runs, *_) in group.values() for r in runs):
        labels["not at its end yet"] = Line2D([], [], color="black", **RUNNING)
    if any(map(has_values, groups.values())):
        for label, style in LINES.values():
            labels[label] = Line2D([], [], color="black", linestyle=style, linewidth=1.3)
    shown = {(title, name) for title, group in groups.items() for name in group}
    if any(key in shown for key in curves):
        labels["CORL's seeds"] = Line2D([], [], color="black", **SEED_OF_OTHERS)
    if any((result.task, result.method) in shown for result in others):
        look = MARK | dict(color="black", markerfacecolor="white")
        look.pop("capsize")
        labels["published"] = Line2D([], [], **look)
    return labels


def draw_figure(
    groups: dict[str, Group], others: list[Published] = (), curves: Curves | None = None
) -> Figure:
    """Draw a panel for each group, its values below it, and one legend below them all."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    looks = itertools.cycle(itertools.product(DASHES, COLOURS))
    styles = {name: dict(color=c, linestyle=d) for name, (d, c) in zip(names, looks)}
    labels = legend_labels(groups, styles, others, curves or {})
    columns = min(len(groups), 4 if len(groups) % 4 == 0 else 3)
    rows = [list(groups)[start : start + columns] for start in range(0, len(groups), columns)]
    heights = []  # of a row's panels: scores, and if a task in the row has values, two more
    for row in rows:
        in_three = any(has_values(groups[title]) for title in row)
        heights.append([2.5, 1.7, 1.0] if in_three else [2.7])
    width = max(3.2 * columns, 5)
    across = max(1, int(12 * width / (8 + max(map(len, labels)))))
    height = sum(map(sum, heights)) + 0.22 * math.ceil(len(labels) / across)
    figure = Figure((width, height), layout="constrained")
    grid = figure.add_gridspec(len(rows), columns, height_ratios=list(map(sum, heights)))
    for number, (row, parts) in enumerate(zip(rows, heights)):
        for column, title in enumerate(row):
            inner = grid[number, column].subgridspec(len(parts), 1, height_ratios=parts)
            axes = figure.add_subplot(inner[0])
            axes.set_title(textwrap.fill(title, 36), fontsize="medium", parse_math=False)
            draw_scores(axes, groups[title], styles)
            draw_others(axes, groups[title], styles, others, curves or {})
            if has_values(groups[title]):
                below = [figure.add_subplot(inner[place], sharex=axes) for place in (1, 2)]
                draw_values([axes, *below], groups[title], styles)
    place = dict(loc="outside lower center", ncols=across, frameon=False)
    for text in figure.legend(labels.values(), labels, **place).get_texts():
        text.set_parse_math(False)  # a $ in a name is a $
    return figure


HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Report of runs</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1500px; margin: auto; padding: 1rem }
img { max-width: 100% } div { overflow-x: auto; margin: 2rem 0 }
table { border-collapse: collapse; white-space: nowrap; font-size: 13px }
td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd }
tr:first-child { font-weight: bold }
</style>
"""


def page(figure: Figure, tables: list[list[list[str]]]) -> str:
    """Make one HTML file, with the picture in it."""
    figure.savefig(svg := io.BytesIO(), format="svg")
    picture = base64.b64encode(svg.getvalue()).decode()
    parts = [HEAD, f'<img alt="Curves" src="data:image/svg+xml;base64,{picture}">']
    for table in tables:
        rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table]
        parts.append("<div><table>\n<tr>" + "\n<tr>".join(rows) + "</table></div>")
    return "\n".join([*parts, f"<p>{html.escape(EXPLANATION)}"])


# ---------------------------------------------------------------------------- command line


def write_csv(runs: list[Run], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        known = any(not np.isnan(run.values).all() for run in runs)
        rows.writerow([*COLUMNS, *VALUES] if known else COLUMNS)
        for run in runs:
            name = (run.task, run.method, run.seed, run.switch, run.end - run.switch)
            columns = [run.scores, run.successes, run.regrets, *(run.values.T if known else [])]
            for step, *values in zip(run.steps, *columns):
                shown = ["" if math.isnan(value) else f"{value:.7g}" for value in values]
                rows.writerow([*name, int(step), *shown])


def write_outputs(
    args: argparse.Namespace, runs: list[Run], tables: list, text: str, *published: Any
) -> None:
    """Write the files that the command line names; raises `InputError` if that fails."""
    groups = group_runs(runs)
    outputs: list[tuple[Path | None, Callable[[Path], Any]]] = [
        (args.csv, lambda path: write_csv(runs, path)),
        (args.markdown, lambda path: path.write_text(text, encoding="utf-8")),
        (args.output, lambda path: draw_figure(groups, *published).savefig(path, dpi=150)),
        (
            args.html,
            lambda path: path.write_text(page(draw_figure(groups, *published), tables), "utf-8"),
        ),
    ]
    for path, write in outputs:
        try:
            if path:
                write(path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def read_others(path: Path | None) -> list[Published]:
    """What --published names; without it, what comes with the repository."""
    if path is None:
        return published.read_published(published.DEFAULT) if published.DEFAULT.exists() else []
    return [] if str(path) == "none" else published.read_published(path)


def main() -> None:
    parser = Parser(__doc__)
    option = parser.add_argument
    option("runs", nargs="+", type=Path, help="run directories, or files of --csv")
    option("--output", type=Path, help="picture to write: .png, .pdf or .svg")
    option("--html", type=Path, help="page to write, with tables and pictures in it")
    option("--markdown", type=Path, help="file to write the printed tables to")
    option("--csv", type=Path, help="file to write the curves to, to report them again")
    option(
        "--published", type=Path, help="scores of others (default: results/published.csv) or none"
    )
    option(
        "--corl", type=Path, help="CORL's finetune_scores.pickle, to draw its seeds behind these"
    )
    args = parser.parse_args()
    if args.output and args.output.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"output: found {args.output}, expected .png, .pdf or .svg")
    others = read_others(args.published)
    curves = published.read_corl(args.corl) if args.corl else {}
    runs, problems = read_all(args.runs)
    if not runs:
        raise InputError("; ".join(problems))
    runs, duplicates = without_duplicates(label_methods(runs))
    for line in problems + duplicates:
        print(f"report.py: left out: {line}", file=sys.stderr)
    tables = make_tables(group_runs(runs), others)
    text = markdown(tables)
    print(text, end="")
    write_outputs(args, runs, tables, text, others, curves)


if __name__ == "__main__":
    sys.exit(run_program(main, "report.py"))
