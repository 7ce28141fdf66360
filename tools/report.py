"""Tables and pictures of runs, finished or still running, as they go into a paper.

    python tools/report.py runs/* --output curves.pdf --html report.html --csv curves.csv
    python tools/report.py curves.csv --output curves.png

Prints the tables as Markdown. A path is a run directory, or a file that --csv has written (edit its
column `method` to rename methods).

Runs on one task with equal options are seeds of one method. Options that say where, how fast, how
often or how long do not count, nor do those that differ only between tasks. A method is called
Cal-QL, CQL (`calibrate: false`) or "Cal-QL, not calibrated online", followed by each option whose
value is not that of most methods on the task; without a majority, all are followed by theirs.
`name` counts where runs of the same seed are otherwise equal.
"""

import argparse
import base64
import csv
import html
import io
import itertools
import json
import math
import sys
import textwrap
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import yaml
from scipy import integrate, stats

SCORE, SUCCESS, REGRET = "eval/d4rl_normalized_score", "eval/success_rate", "train/regret"
NOT_A_METHOD = set(  # calibrate, calibrate_online and load_model are looked at apart
    "seed eval_seed env dataset_path device compile precision eval_workers checkpoints_path resume"
    " project group log_freq checkpoint_freq eval_freq n_episodes online_iterations calibrate"
    " calibrate_online load_model".split()
)
COLUMNS = (  # of a CSV file
    "task method seed offline_iterations online_iterations step phase score success_rate regret"
).split()
RESAMPLES = 10_000
SHARES = np.linspace(-1, 1, 81)  # -1 to 0: share of the offline phase; 0 to 1: of the online phase
# Okabe and Ito's colours, which the colour-blind can tell apart, without yellow (faint on white)
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()
DASHES = ("solid", "dashed", "dashdot")  # of each seven methods; runs not at their end are dotted
BAND = dict(alpha=0.2, linewidth=0)
RUNNING = dict(linestyle="dotted", linewidth=1)
SWITCH = dict(color="grey", linestyle=(0, (4, 3)), linewidth=1, zorder=0)


class Run(NamedTuple):
    """One seed of one method on one task. Its n evaluations are in the order of their steps."""

    source: str  # where it was read
    task: str
    method: str  # "" until `label_methods`, unless read from a CSV file
    seed: int
    switch: int  # step at which the offline phase ends
    end: int  # step at which the run is to end
    options: dict[str, str]  # those that may make a method; {} if read from a CSV file
    steps: np.ndarray  # [n], updates offline, from there on environment steps
    scores: np.ndarray  # [n], normalized
    successes: np.ndarray  # [n], share of the evaluation episodes; NaN where a task has no goal
    regrets: np.ndarray  # [n], mean of 1 - success over the training episodes so far, or NaN

    @property
    def ended(self) -> bool:
        return self.steps[-1] >= self.end

    def score_at(self, steps: Any) -> Any:
        """Scores at any steps, linear between evaluations; NaN before the first, after the last."""
        return np.interp(steps, self.steps, self.scores, left=np.nan, right=np.nan)

    def online_area(self) -> float:
        """Area under the online phase's scores (trapezoids) over its steps so far: a mean score."""
        steps = np.append(self.switch, self.steps[self.steps > self.switch])
        length = steps[-1] - self.switch
        return integrate.trapezoid(self.score_at(steps), steps) / length if length else np.nan

    def score_at_phases(self) -> np.ndarray:
        """Scores at SHARES; NaN in a phase that has no steps."""
        lengths = np.where(SHARES < 0, self.switch, self.end - self.switch)
        scores = self.score_at(self.switch + SHARES * lengths)
        return np.where((lengths > 0) | (SHARES == 0), scores, np.nan)


Tasks = dict[str, dict[str, list[Run]]]  # the runs, by task and method


class Table(NamedTuple):
    title: str
    header: str  # columns, separated by |
    rows: list[list[str]]
    explanation: str


# ---------------------------------------------------------------------------- reading


def number(value: Any, what: str, whole: bool = False) -> float:
    try:
        found = float(value)
        if math.isfinite(found) and (not whole or found >= 0 and found.is_integer()):
            return int(found) if whole else found
    except (TypeError, ValueError, OverflowError):
        pass
    expected = "a whole number, 0 or more" if whole else "a number"
    raise ValueError(f"{what} is {str(value)[:40]!r}, expected {expected}")


def method_options(config: dict) -> dict[str, str]:
    """The options that may make a method, as text; what its name begins with is under ""."""
    online = config.get("calibrate_online") is not False
    base = "Cal-QL" if online else "Cal-QL, not calibrated online"
    chosen = {"": "CQL" if config.get("calibrate") is False else base}
    for key, value in config.items():
        if key not in NOT_A_METHOD and not str(key).startswith("wandb"):
            chosen[str(key)] = value
    if config.get("load_model"):
        chosen["load_model"] = "yes"  # each seed may start from a checkpoint of its own
    return {key: json.dumps(value, default=str).strip('"') for key, value in chosen.items()}


def read_metrics(path: Path) -> np.ndarray:
    """Steps, scores, success rates and regrets of the evaluations, [4, n]."""
    lines = path.read_bytes().rstrip().split(b"\n")
    evaluations, regrets = {}, {-1: np.nan}
    for i, line in enumerate(lines):
        where = f"{path.name}, line {i + 1}:"
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            if i == len(lines) - 1:  # nothing yet, or torn: the run is writing it
                break
            raise ValueError(f"{where} found {line[:40]!r}, expected a JSON object")
        step = number(record.get("step"), f"{where} step", whole=True)
        values = {
            k: number(record[k], f"{where} {k}") for k in (SCORE, SUCCESS, REGRET) if k in record
        }
        if SCORE in values:
            evaluations[step] = values[SCORE], values.get(SUCCESS, np.nan)
        if REGRET in values:
            regrets[step] = values[REGRET]
    if not evaluations:
        raise ValueError(f"{path.name}: no evaluation yet (no record with {SCORE})")
    steps, known = sorted(evaluations), sorted(regrets)
    latest = np.searchsorted(known, steps, side="right") - 1
    return np.array([(s, *evaluations[s], regrets[known[i]]) for s, i in zip(steps, latest)]).T


def read_run(directory: Path) -> Run:
    if not (directory / "config.yaml").exists():
        raise ValueError("found no config.yaml in it, expected a run directory or a .csv file")
    try:
        config = yaml.safe_load((directory / "config.yaml").read_bytes())
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"config.yaml: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("env"), str):
        raise ValueError("config.yaml: found no option env, expected all options of a run")
    counts = ("seed", "offline_iterations", "online_iterations")
    seed, offline, online = (number(config.get(k), f"config.yaml: {k}", True) for k in counts)
    name = (str(directory), config["env"], "", seed, offline, offline + online)
    return Run(*name, method_options(config), *read_metrics(directory / "metrics.jsonl"))


def read_csv(path: Path) -> list[Run]:
    evaluations = defaultdict(list)
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if missing := [column for column in COLUMNS if column not in (rows.fieldnames or [])]:
            raise ValueError(f"found no column {', '.join(missing)}, expected those of --csv")
        for row in rows:
            where = f"line {rows.line_num}:"
            if not (row["task"] and row["method"]):
                raise ValueError(f"{where} found no task or no method")
            seed, offline, online, step = (
                number(row[k], f"{where} {k}", True) for k in COLUMNS[2:6]
            )
            rates = (number(row[k], f"{where} {k}") if row[k] else np.nan for k in COLUMNS[8:])
            values = (step, number(row["score"], f"{where} score"), *rates)
            evaluations[row["task"], row["method"], seed, offline, offline + online].append(values)
    if not evaluations:
        raise ValueError("found no evaluation in it")
    return [
        Run(
            f"{path}: seed {name[2]} of {name[1]} on {name[0]}",
            *name,
            {},
            *np.array(sorted(rows)).T,
        )
        for name, rows in evaluations.items()
    ]


def read_all(paths: list[Path]) -> tuple[list[Run], list[str]]:
    """All runs that can be read, and a line for each path that cannot."""
    runs, problems = [], []
    for path in paths:
        try:
            runs += read_csv(path) if path.suffix == ".csv" else [read_run(path)]
        except OSError as error:
            problems.append(f"{error.filename or path}: {error.strerror}")
        except (ValueError, RecursionError, csv.Error) as error:
            problems.append(f"{path}: {' '.join(str(error).split())}")
    return runs, problems


# ---------------------------------------------------------------------------- methods


def without_names(runs: list[Run]) -> list[Run]:
    """The runs without the option `name`, unless it tells apart what would else be duplicates."""
    unnamed = [run._replace(options={**run.options, "name": ""}) for run in runs]
    names = defaultdict(set)
    for run, other in zip(runs, unnamed):
        names[run.task, run.seed, str(other.options)].add(run.options.get("name"))
    return runs if max(map(len, names.values()), default=0) > 1 else unnamed


def label_methods(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """Give runs their method's name (see the module's docstring), and say what the names omit."""
    labelled = [run for run in runs if run.method]
    runs = without_names([run for run in runs if not run.method])
    keys = sorted({key for run in runs for key in run.options} - {""})
    options = [{key: run.options.get(key, "not set") for key in keys} for run in runs]
    methods = defaultdict(dict)  # the different sets of options on each task
    for run, own in zip(runs, options):
        methods[run.task][(run.options[""], *own.values())] = own
    usual = {}  # for a task and an option the value of more than half of the methods, or None
    for task, of_task in methods.items():
        for key in keys:
            value, times = Counter(own[key] for own in of_task.values()).most_common(1)[0]
            usual[task, key] = value if 2 * times > len(of_task) else None
    tied = {key for (_, key), value in usual.items() if value is None}
    omitted = defaultdict(set)
    for run, own in zip(runs, options):
        shown = [key for key in keys if key in tied or own[key] != usual[run.task, key]]
        omitted[run.task] |= {f"{key}: {usual[run.task, key]}" for key in shown if key not in tied}
        name = ", ".join([run.options[""], *(f"{key}: {own[key]}" for key in shown)])
        labelled.append(run._replace(method=name))
    return labelled, [
        f"{task}: {', '.join(sorted(values))}, unless a method's name says otherwise."
        for task, values in sorted(omitted.items())
        if values
    ]


def without_duplicates(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """Of each task, method and seed the run that got farthest, and a line for each other one."""
    kept, lines = {}, []
    for run in sorted(runs, key=lambda run: -run.steps[-1]):
        other = kept.setdefault((run.task, run.method.casefold(), run.method, run.seed), run)
        if other is not run:
            steps = f"which is at step {other.steps[-1]:,.0f}, this one at {run.steps[-1]:,.0f}"
            lines.append(f"{run.source}: same task, method, seed as {other.source}, {steps}")
    return [kept[key] for key in sorted(kept)], lines


def by_task_and_method(runs: list[Run]) -> Tasks:
    tasks = defaultdict(lambda: defaultdict(list))
    for run in runs:
        tasks[run.task][run.method].append(run)
    return tasks


def counted(runs: list[Run]) -> list[Run]:
    """The runs that enter the numbers: those that have ended, or all while none has."""
    return [run for run in runs if run.ended] or runs


def method_order(tasks: Tasks) -> list[str]:
    return sorted({name for methods in tasks.values() for name in methods}, key=str.casefold)


def remarks(tasks: Tasks) -> list[str]:
    """What to know before methods are compared: runs not at their end, other seeds or lengths."""
    lines = []
    for task, methods in tasks.items():
        for run in itertools.chain(*methods.values()):
            if not run.ended:
                how = "not counted" if counted(methods[run.method])[0].ended else "counted as it is"
                at = f"at step {run.steps[-1]:,.0f} of {run.end:,}"
                lines.append(f"{task}: {run.method}, seed {run.seed} is {at}, {how}.")
        used = {name: counted(runs) for name, runs in methods.items()}
        seeds = {name: sorted({run.seed for run in runs}) for name, runs in used.items()}
        steps = {name: sorted({r.end - r.switch for r in runs}) for name, runs in used.items()}
        for what, found in (("seeds", seeds), ("numbers of online steps", steps)):
            if len({*map(tuple, found.values())}) > 1 or max(map(len, steps.values())) > 1:
                each = (f"{name}: {' '.join(map(str, found[name]))}" for name in found)
                lines.append(f"{task}: different {what}. {'; '.join(each)}.")
    return lines


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


def interval(samples: list[np.ndarray], statistic: Any, resamples: int = RESAMPLES) -> Any:
    """95 % interval, the percentiles of a bootstrap that resamples the seeds of each task apart.

    `samples` holds an array [seeds, ...] for each task. None where one of them has a single seed.
    """
    if min(map(len, samples)) < 2:
        return None
    how = dict(method="percentile", n_resamples=resamples, batch=1000, vectorized=True, rng=0)
    return stats.bootstrap(samples, statistic, **how).confidence_interval


def comparable(ended: Tasks) -> Tasks:
    """What to aggregate: two or more tasks, with the same methods on each; or nothing.

    Of all such choices the one with the most methods times tasks, several methods before one.
    """
    done = {name: {task for task in ended if name in ended[task]} for name in method_order(ended)}
    best, shared, compared = (), [], []
    for one, other in itertools.product(done.values(), repeat=2):
        names = [name for name in done if one & other <= done[name]]
        size = len(names) > 1, len(names) * len(one & other), len(one & other)
        if len(one & other) > 1 and size > best:
            best, shared, compared = size, sorted(one & other), names
    return {task: {name: ended[task][name] for name in compared} for task in shared}


# ---------------------------------------------------------------------------- tables


def of_runs(runs: list[Run], what: str) -> np.ndarray:
    """One number for each run, [seeds]."""
    value = {
        "offline": lambda run: run.score_at(run.switch),
        "end": lambda run: run.scores[-1],
        "area": Run.online_area,
        "success": lambda run: run.successes[-1],
        "regret": lambda run: run.regrets[-1],
    }[what]
    return np.array([value(run) for run in runs])


def mean_and_error(values: np.ndarray, digits: int = 1) -> str:
    """The mean, and the standard error where there are several values."""
    if np.isnan(values).any():
        return "–"
    error = f" ± {stats.sem(values):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{error}"


def with_interval(samples: list[np.ndarray], statistic: Any, digits: int = 1) -> str:
    if np.isnan(np.concatenate(samples)).any():
        return "–"
    found = interval(samples, statistic)
    bounds = f"[{found.low:.{digits}f}, {found.high:.{digits}f}]" if found else "(no interval)"
    return f"{statistic(*samples):.{digits}f} {bounds}"


def task_row(task: str, name: str, runs: list[Run]) -> list[str]:
    used = counted(runs)
    offline, end, area = (mean_and_error(of_runs(used, k)) for k in ("offline", "end", "area"))
    if not used[0].ended:
        steps = sorted({int(run.steps[-1]) for run in used})
        reached = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
        end += f" (at step {reached} of {max(run.end for run in used):,})"
    return [
        task,
        name,
        f"{len(used)} of {len(runs)}" if len(used) < len(runs) else str(len(runs)),
        f"{offline} → {end}",
        with_interval([of_runs(used, "end")], interquartile_mean),
        area,
        *(mean_and_error(of_runs(used, key), 2) for key in ("success", "regret")),
    ]


def task_table(tasks: Tasks) -> Table:
    header = "task|method|seeds|score: offline → end|IQM at the end|online area|success|regret"
    rows = [task_row(task, name, runs) for task in tasks for name, runs in tasks[task].items()]
    return Table(
        "Each task",
        header,
        rows,
        "Mean ± standard error over seeds. Score: normalized, after the offline phase → at the end."
        " IQM: interquartile mean of the score, with the 95 % interval of a bootstrap over seeds."
        " Online area: area under the online phase's scores over its length, a mean score. Success:"
        " share of the last evaluation's episodes. Regret: mean of 1 - success over the training"
        " episodes.",
    )


def aggregate_table(tasks: Tasks, shared: Tasks) -> Table:
    names, rows = method_order(shared), []
    for name in names:
        runs = [methods[name] for methods in shared.values()]
        cells = (
            with_interval([of_runs(seeds, key) for seeds in runs], interquartile_mean)
            for key in ("offline", "end", "area")
        )
        rows.append([name, str(sum(map(len, runs))), *cells])
    left_out = [name for name in [*tasks, *method_order(tasks)] if name not in [*shared, *names]]
    return Table(
        "All tasks",
        "method|runs|IQM after the offline phase|IQM at the end|IQM of the online area",
        rows,
        f"Over {', '.join(shared)}: interquartile mean over all runs of all these tasks, with the"
        " 95 % interval of a bootstrap over the seeds of each task."
        + (f" Left out, not ended on all or by all: {'; '.join(left_out)}." if left_out else ""),
    )


def improvement_table(ended: Tasks) -> Table:
    """For each pair of methods, over the tasks on which both have runs that ended."""
    rows = []
    for one, other in itertools.combinations(method_order(ended), 2):
        both = [task for task, methods in ended.items() if one in methods and other in methods]
        if both:
            runs = [ended[task][name] for name in (one, other) for task in both]
            samples = [of_runs(seeds, "end") for seeds in runs]
            cell = with_interval(samples, probability_of_improvement, 2)
            rows.append([one, other, f"{len(both)} of {len(ended)}", cell])
    return Table(
        "Probability of improvement",
        "method|over|tasks|probability",
        rows,
        "Probability that a run of the first ends higher than a run of the second, ties counted as"
        " one half: mean over the tasks, with the 95 % interval of a bootstrap over the seeds of"
        " each task and method.",
    )


def all_tables(tasks: Tasks, ended: Tasks, notes: list[str]) -> list[Table]:
    notes, shared = notes + remarks(tasks), comparable(ended)
    if len(tasks) > 1 and not shared:
        notes.append("No aggregate over tasks: no method has ended runs on two of them.")
    tables = [task_table(tasks), aggregate_table(tasks, shared), improvement_table(ended)]
    tables.append(Table("Notes", "note", [[note] for note in notes], ""))
    return [table for table in tables if table.rows]


def markdown(tables: list[Table]) -> str:
    parts = []
    for table in tables:
        header = table.header.split("|")
        cells = [header, ["---"] * len(header), *table.rows]
        rows = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells]
        parts.append("\n".join([f"## {table.title}", "", *rows, "", table.explanation]).strip())
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------- pictures


def draw_task(axes: Any, methods: dict[str, list[Run]], styles: dict[str, dict]) -> None:
    """Mean over seeds and band from the worst to the best; a dotted line for each running run.

    Mean and band are drawn from the first to the last step that all seeds have reached, at every
    step at which one of them was evaluated, with straight lines between a seed's evaluations.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for name, runs in methods.items():
        steps = np.unique(np.concatenate([run.steps for run in counted(runs)]))
        scores = np.array([run.score_at(steps) for run in counted(runs)])
        axes.plot(steps, scores.mean(0), **styles[name])  # NaN is not drawn
        axes.fill_between(steps, scores.min(0), scores.max(0), color=styles[name]["color"], **BAND)
        for run in runs:
            if not run.ended:
                axes.plot(run.steps, run.scores, **{**styles[name], **RUNNING})
    for switch in {run.switch for runs in methods.values() for run in runs}:
        axes.axvline(switch, **SWITCH)
    axes.set_xlabel("updates, then environment steps")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_aggregate(axes: Any, shared: Tasks, styles: dict[str, dict]) -> None:
    """IQM over all runs of the shared tasks, and its interval, against the share of each phase."""
    for name in method_order(shared):
        runs = [methods[name] for methods in shared.values()]
        samples = [np.array([run.score_at_phases() for run in seeds]) for seeds in runs]
        known = ~np.isnan(np.concatenate(samples)).any(0)
        samples = [scores[:, known] for scores in samples]
        axes.plot(SHARES[known], interquartile_mean(*samples, axis=0), **styles[name])
        if known.any() and (bounds := interval(samples, interquartile_mean, RESAMPLES // 5)):
            colour = styles[name]["color"]
            axes.fill_between(SHARES[known], bounds.low, bounds.high, color=colour, **BAND)
    axes.axvline(0, **SWITCH)
    axes.set_xticks([-1, 0, 1], ["start", "switch", "end"])
    axes.set_xlabel("share of each phase")


def draw_figure(tasks: Tasks, ended: Tasks, columns: Optional[int] = None) -> Any:
    """Small multiples: a panel for each task, one for the aggregate, and below them one legend."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    looks = itertools.cycle(itertools.product(DASHES, COLOURS))
    styles = {n: dict(color=c, linestyle=d) for n, (d, c) in zip(method_order(tasks), looks)}
    drawn = {task: partial(draw_task, methods=methods) for task, methods in tasks.items()}
    if shared := comparable(ended):
        title = f"Interquartile mean of {len(shared)} tasks"
        drawn[title] = partial(draw_aggregate, shared=shared)
    columns = columns or min(len(drawn), min((4, 3), key=lambda n: -len(drawn) % n))
    rows, width = math.ceil(len(drawn) / columns), max(3.2 * columns, 5)
    labels = {textwrap.fill(name, 60): Line2D([], [], **style) for name, style in styles.items()}
    labels["switch to the online phase"] = Line2D([], [], **SWITCH)
    if tasks != ended:
        labels["not at its end yet"] = Line2D([], [], color="black", **RUNNING)
    across = max(1, int(12 * width / (8 + max(map(len, labels)))))
    figure = Figure((width, 2.7 * rows + 0.22 * len(labels) / across), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, draw) in itertools.zip_longest(all_axes, drawn.items(), fillvalue=("", None)):
        axes.set_title(textwrap.fill(title, 36), fontsize="medium")
        axes.set_ylabel("normalized score")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, styles=styles) if draw else axes.remove()
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=across, frameon=False)
    return figure


# ---------------------------------------------------------------------------- the page

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Report of runs</title>
<style>
  body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
         max-width: 1300px; margin: auto; padding: 0 1rem 3rem }}
  h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem }}
  p {{ max-width: 75ch; color: #555 }}
  img {{ max-width: 100% }}
  div {{ overflow-x: auto }}
  table {{ border-collapse: collapse; font-size: .9em; white-space: nowrap;
          font-variant-numeric: tabular-nums }}
  th, td {{ padding: .3rem 1em .3rem 0; text-align: left; border-bottom: 1px solid #ddd }}
  td:only-child {{ white-space: normal }}
</style>
<h1>Report of runs</h1>
<picture><source media="(max-width: 700px)" srcset="{narrow}"><img alt="Curves" src="{wide}">
</picture>
<p>Lines are means over seeds, bands reach from the worst to the best seed. In a panel over several
tasks: interquartile mean over all runs, and the 95 % interval of a bootstrap over seeds.</p>
{tables}
</html>
"""


def page(tasks: Tasks, ended: Tasks, tables: list[Table]) -> str:
    """HTML that needs no other file: its two pictures, for wide and narrow windows, are in it."""

    def picture(columns: Optional[int]) -> str:
        svg = io.BytesIO()
        draw_figure(tasks, ended, columns).savefig(svg, format="svg")
        return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()

    def row(tag: str, cells: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    parts = []
    for table in tables:
        rows = [row("th", table.header.split("|")), *(row("td", cells) for cells in table.rows)]
        rows = "\n".join(rows)
        parts.append(f"<h2>{table.title}</h2>\n<div><table>\n{rows}\n</table></div>")
        parts.append(f"<p>{html.escape(table.explanation)}</p>")
    return PAGE.format(wide=picture(None), narrow=picture(1), tables="\n".join(parts))


# ---------------------------------------------------------------------------- command line


def write_csv(runs: list[Run], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for run in runs:
            name = (run.task, run.method, run.seed, run.switch, run.end - run.switch)
            for step, *values in zip(run.steps, run.scores, run.successes, run.regrets):
                shown = ["" if math.isnan(value) else f"{value:.7g}" for value in values]
                phase = "offline" if step <= run.switch else "online"
                rows.writerow([*name, int(step), phase, *shown])


def complain(what: str, lines: list[str]) -> int:
    for line in lines:
        print(f"report.py: {what}: {line}", file=sys.stderr)
    return 2


def report(runs: list[Run], notes: list[str], args: argparse.Namespace) -> None:
    tasks = by_task_and_method(runs)
    ended = by_task_and_method([run for run in runs if run.ended])
    tables = all_tables(tasks, ended, notes)
    sys.stdout.reconfigure(encoding="utf-8")
    print(markdown(tables), end="")
    if args.csv:
        write_csv(runs, args.csv)
    if args.markdown:
        args.markdown.write_text(markdown(tables), encoding="utf-8")
    if args.output:
        draw_figure(tasks, ended).savefig(args.output, dpi=150)
    if args.html:
        args.html.write_text(page(tasks, ended, tables), encoding="utf-8")


def main(arguments: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser("report.py", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or files of --csv")
    parser.add_argument("--output", type=Path, help="picture to write: .png, .pdf or .svg")
    parser.add_argument("--html", type=Path, help="page to write, with tables and pictures in it")
    parser.add_argument("--markdown", type=Path, help="file to write the printed tables to")
    parser.add_argument(
        "--csv", type=Path, help="file to write the curves to, to report them again"
    )
    args = parser.parse_args(arguments)
    if args.output and args.output.suffix not in (".png", ".pdf", ".svg"):
        return complain("error", [f"--output is {args.output}, expected .png, .pdf or .svg"])
    runs, problems = read_all(args.runs)
    if not runs:
        return complain("error", problems)
    runs, notes = label_methods(runs)
    runs, duplicates = without_duplicates(runs)
    complain("left out", problems + duplicates)
    try:
        report(runs, notes, args)
    except OSError as error:
        return complain(
            "error", [f"cannot write {error.filename or 'the output'}: {error.strerror}"]
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
