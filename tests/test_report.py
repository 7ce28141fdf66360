"""tools/report.py on runs written by hand, against independent formulas."""

import base64
import csv
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import ROOT, call_tool
from tools import published, report

MAZE, DOOR = "maze2d-umaze-v1", "D4RL/door/human-v2"


def write_run(path: Path, scores: dict[int, float], regret=None, **options) -> Path:
    """A run of 20 + 20 steps with these scores by step; a score's hundredth is the success rate."""
    path.mkdir(parents=True)
    config = {"env": MAZE, "seed": 0, "offline_iterations": 20, "online_iterations": 20, **options}
    (path / "config.yaml").write_text(yaml.dump(config))
    records = [{"step": s, report.SCORE: x, report.SUCCESS: x / 100} for s, x in scores.items()]
    if regret is not None:
        records[-1:-1] = [{"step": 22, "train/regret": 1.0}, {"step": 39, "train/regret": regret}]
    lines = [json.dumps(record) + "\n" for record in [*records, {"step": 99, "alpha": 1.0}]]
    (path / "metrics.jsonl").write_text("".join(lines))
    return path


def call(*arguments) -> tuple[int, str, list[str]]:
    """Exit code, standard output and the lines on standard error."""
    done = call_tool(report, *arguments)
    return done.returncode, done.stdout, done.stderr.splitlines()


def rows(output: str) -> list[list[str]]:
    """The cells of all Markdown rows, headers and rules included."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def study(tmp_path) -> list[Path]:
    """Two methods on one task, one of them also on another."""
    runs, cql = tmp_path / "runs", dict(calibrate=False)
    return [
        write_run(runs / "a", {0: 0, 20: 10, 30: 40, 40: 50}, 0.25, seed=0),
        write_run(runs / "b", {0: 0, 20: 30, 30: 50, 40: 70}, 0.75, seed=1),
        write_run(runs / "c", {0: 0, 20: 10, 30: 5, 40: 60}, 0.5, seed=0, **cql),
        write_run(runs / "d", {0: 0, 20: 12, 30: 5, 40: 70}, 1.0, seed=1, **cql),
        write_run(runs / "e", {0: 5, 20: 15, 40: 25}, seed=0, env=DOOR),
    ]


def test_the_command_line_prints_known_numbers(study):
    # areas of seed 0: (10+40)/2 * 10 + (40+50)/2 * 10 = 700 over 20 steps = 35; of seed 1: 50
    command = [sys.executable, "tools/report.py", *map(str, study)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    table = rows(result.stdout)
    assert table[2] == [
        DOOR, "Cal-QL", "0", "20 + 20", "15.0 → 25.0", "15.0 (no interval) → 25.0 (no interval)",
        "20.0", "0.25", "–",
    ]  # fmt: skip
    assert table[3] == [
        MAZE, "Cal-QL", "0 1", "20 + 20", "20.0 ± 10.0 → 60.0 ± 10.0",
        "20.0 [10.0, 30.0] → 60.0 [50.0, 70.0]", "42.5 ± 7.5", "0.60 ± 0.10", "0.50 ± 0.25",
    ]  # fmt: skip
    assert table[4][4:] == [
        "11.0 ± 1.0 → 65.0 ± 5.0", "11.0 [10.0, 12.0] → 65.0 [60.0, 70.0]", "21.5 ± 1.5",
        "0.65 ± 0.05", "0.75 ± 0.25",
    ]  # fmt: skip
    # only Cal-QL has both tasks; the mean is over tasks, the IQM over runs
    assert table[5][:3] == ["all 2 tasks", "Cal-QL", "3 runs"]
    assert table[5][4:6] == ["17.5 → 42.5", "18.3 (no interval) → 48.3 (no interval)"]
    # of the four pairs 50 < 60, 50 < 70, 70 > 60, 70 = 70: 1.5 / 4. Of the resamples, one in 4 has
    # 50 and 50, which win nothing, and one in 16 has 70 and 70 against 60 and 60
    assert table[8:] == [[MAZE, "Cal-QL", "CQL", "0.38 [0.00, 1.00]"]]


# ------------------------------------------------------------------- statistics


def naive_interquartile_mean(samples) -> float:
    pooled = sorted(x for sample in samples for x in sample)
    cut = len(pooled) // 4
    middle = pooled[cut : len(pooled) - cut]
    return sum(middle) / len(middle)


def naive_improvement(samples) -> float:
    half = len(samples) // 2
    total = 0.0
    for xs, ys in zip(samples[:half], samples[half:]):
        wins = sum((x > y) + 0.5 * (x == y) for x in xs for y in ys)
        total += wins / (len(xs) * len(ys)) / half
    return total


STATISTICS = [
    (report.interquartile_mean, naive_interquartile_mean),
    (report.probability_of_improvement, naive_improvement),
]
SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=6).map(np.array)


@pytest.mark.parametrize("statistic, naive", STATISTICS)
@given(
    samples=st.integers(1, 3).flatmap(lambda n: st.lists(SCORES, min_size=2 * n, max_size=2 * n))
)
@settings(max_examples=60, deadline=None)
def test_statistics_equal_their_definitions(statistic, naive, samples):
    assert statistic(*samples) == pytest.approx(naive(samples))


@pytest.mark.parametrize("statistic, naive", STATISTICS)
def test_the_interval_is_that_of_every_resample_of_seeds_within_each_task(statistic, naive):
    samples = [np.array([1.0, 2.5, 9.0]), np.array([-3.0, 0.5, 4.0, 6.0])]
    each = [itertools.product(sample, repeat=len(sample)) for sample in samples]
    values = sorted(naive(resample) for resample in itertools.product(*each))
    found = report.interval(samples, statistic)
    # a bootstrap of 10,000 is this far from the exact quantiles, in ranks
    low, high = (np.searchsorted(values, [x - 1e-9, x + 1e-9]) / len(values) for x in found)
    assert low[0] - 0.006 <= 0.025 <= low[1] + 0.006
    assert high[0] - 0.006 <= 0.975 <= high[1] + 0.006


# ------------------------------------------------------------------- curves


def made_up(seed: int, scores: dict[int, float], switch: int = 20, method: str = "m", task="a"):
    """A run that ends 20 steps after the switch."""
    values = np.array([list(scores), list(scores.values())], float)
    nothing = np.full(len(scores), np.nan)
    unknown = np.full((len(scores), 4), np.nan)
    columns = *values, nothing, nothing, unknown
    return report.Run("", task, method, {}, seed, switch, switch + 20, *columns)


def curves(*runs: report.Run) -> list[list[dict[float, float]]]:
    """Of each panel the lines, which map positions to scores."""
    figure = report.draw_figure(report.group_runs([*runs]))
    return [[dict(line.get_xydata()) for line in axes.lines] for axes in figure.axes]


def test_curves_count_from_the_switch_and_average_between_evaluations():
    one, two = {0: 0, 10: 10, 20: 30, 40: 50}, {5: 1, 20: 3, 30: 5, 40: 9}
    (panel,) = curves(made_up(0, one), made_up(1, two), made_up(0, {0: 7, 20: 8}, 0, "n"))
    between = {-15: (5 + 1) / 2, -10: (10 + 1 + 2 / 3) / 2, 0: 33 / 2, 10: 45 / 2, 20: 59 / 2}
    assert panel[0] == pytest.approx(between)  # seed 1 begins 15 before the switch
    assert panel[1] == {0: 7, 20: 8}  # no offline phase


def test_the_aggregate_goes_by_the_share_of_each_phase():
    every_10 = [
        ("a", 0, 40, [0, 1, 2, 3, 4, 10, 30]),
        ("a", 1, 40, [2] * 7),
        ("b", 0, 20, [4, 4, 6, 8, 20]),
        ("b", 1, 20, [6] * 5),
    ]
    runs = [
        made_up(seed, {10 * i: x for i, x in enumerate(scores)}, switch, task=task)
        for task, seed, switch, scores in every_10
    ]
    drawn = curves(*runs)[2][0]
    # halfway: step 20 of the one and step 10 of the other, then steps 50 and 30
    pooled = {-1: [0, 2, 4, 6], -0.5: [2, 2, 4, 6], 0.5: [10, 2, 8, 6], 1: [30, 2, 20, 6]}
    for share, scores in pooled.items():
        assert drawn[share] == pytest.approx(naive_interquartile_mean([scores]))


@pytest.mark.parametrize("n_tasks, n_names", [(1, 9), (9, 3)])
def test_the_legend_covers_no_panel_and_titles_do_not_meet(n_tasks, n_names):
    names = ["Cal-QL, " + "an_option: 1, " * 9, *(f"Cal-QL, cql_alpha {i}" for i in range(n_names))]
    tasks = [f"antmaze-large-navigate-singletask-task{i}-v0" for i in range(n_tasks)]
    runs = [made_up(0, {0: 0, 40: 1}, 20, *both) for both in itertools.product(names, tasks)]
    figure = report.draw_figure(report.group_runs(runs))
    figure.draw_without_rendering()
    assert len(figure.axes) == n_tasks + (n_tasks > 1)
    whole, legend = figure.bbox, figure.legends[0].get_window_extent()
    assert legend.x0 >= whole.x0 and legend.x1 <= whole.x1 and legend.y0 >= whole.y0
    boxes = [legend, *(axes.get_tightbbox() for axes in figure.axes)]
    for one, other in itertools.combinations(boxes, 2):
        width = min(one.x1, other.x1) - max(one.x0, other.x0)
        assert width < 1 or min(one.y1, other.y1) - max(one.y0, other.y0) < 1


# ------------------------------------------------------------------- the critics' values

DATA, POLICY, BOUND, BELOW = range(4)


def write_values(path: Path, updates: dict[int, list[float]], **options) -> Path:
    """A run that evaluates at 0, 20, 30 and 40, with these `VALUES` of updates by step."""
    write_run(path, {0: 0, 20: 10, 30: 20, 40: 30}, **options)
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()[:-1]]
    for step, values in updates.items():
        record = {"step": step}
        for names, value in zip(report.VALUES.values(), values):
            share = names[0].startswith("bound_rate")
            away = (
                0.0 if len(names) == 1 else 0.05 if share else 1.0
            )  # of each critic from the mean
            record |= {name: value + sign * away for name, sign in zip(names, (1, -1))}
        records.append(record)
    records.sort(key=lambda record: (record["step"], report.SCORE in record))  # as runs write them
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (path / "metrics.jsonl").write_text(lines)
    return path


@pytest.fixture
def valued(tmp_path) -> list[Path]:
    """Two seeds of Cal-QL and one of CQL, with their critics' values."""
    one = {10: [1, 2, 3, 0.5], 20: [3, 4, 3, 0.3], 25: [9, 8, 5, 0.2], 40: [5, 6, 7, 0.1]}
    two = {step: [x + 2 for x in values[:3]] + [0.5] for step, values in one.items()}
    cql = {step: [-x for x in values[:3]] + [0.9] for step, values in one.items()}
    return [
        write_values(tmp_path / "one", one),
        write_values(tmp_path / "two", two, seed=1),
        write_values(tmp_path / "cql", cql, calibrate=False),
    ]


def test_values_are_means_since_the_evaluation_before_and_over_both_critics(valued):
    (run,) = report.read_run(valued[0])
    assert np.isnan(run.values[0]).all()  # no update yet
    expected = [[2, 3, 3, 0.4], [9, 8, 5, 0.2], [5, 6, 7, 0.1]]
    np.testing.assert_allclose(run.values[1:], expected)


def test_values_are_drawn_below_the_scores_by_method(valued):
    older = write_run(valued[0].parent / "older", {0: 0, 20: 9, 40: 9}, seed=2)
    no_values = write_run(valued[0].parent / "no_values", {0: 0, 40: 9}, cql_alpha=1)
    runs, _ = report.read_all([*valued, older, no_values])
    figure = report.draw_figure(report.group_runs(report.label_methods(runs)))
    scores, values, share = figure.axes
    lines = [dict(line.get_xydata()) for line in values.lines]
    assert lines[0] == pytest.approx({0: 3, 10: 10, 20: 6})  # Cal-QL, the data's actions
    assert lines[POLICY] == pytest.approx({0: 4, 10: 9, 20: 7})
    assert lines[BOUND] == pytest.approx({0: 4, 10: 6, 20: 8})
    assert lines[3] == pytest.approx({0: -2, 10: -9, 20: -5})  # CQL
    assert dict(share.lines[0].get_xydata()) == pytest.approx({0: 0.45, 10: 0.35, 20: 0.3})
    assert values.lines[0].get_color() == share.lines[0].get_color() == scores.lines[0].get_color()
    assert scores.get_xlim() == values.get_xlim() == share.get_xlim()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {label for label, _ in report.LINES.values()} < {*texts}


def test_a_csv_file_keeps_values_and_an_older_one_gives_scores_alone(valued, tmp_path):
    new, again, old = (tmp_path / f"{name}.csv" for name in ("new", "again", "old"))
    pictures = [tmp_path / "one.png", tmp_path / "two.png"]
    _, printed, _ = call(*valued, "--csv", new, "--output", pictures[0])
    assert call(new, "--csv", again, "--output", pictures[1]) == (0, printed, [])
    assert new.read_text() == again.read_text()
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    with new.open() as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == [*report.COLUMNS, *report.VALUES]
    assert [found[1][key] for key in report.VALUES] == ["2", "3", "3", "0.4"]
    rows = [[row[key] for key in report.COLUMNS] for row in found]
    old.write_text("\n".join(",".join(row) for row in [report.COLUMNS, *rows]))
    assert call(old) == (0, printed, [])
    figure = report.draw_figure(report.group_runs(report.read_csv(old)))
    assert len(figure.axes) == 1


def test_values_and_marks_cover_nothing(valued, tmp_path):
    other = write_run(tmp_path / "other", {0: 0, 40: 5}, env=DOOR)
    runs, _ = report.read_all([*valued, other])
    figure = report.draw_figure(report.group_runs(report.label_methods(runs)))
    figure.draw_without_rendering()
    assert len(figure.axes) == 1 + 3 + 1  # the task without values, the one with, both together
    boxes = [figure.legends[0].get_window_extent(), *(a.get_tightbbox() for a in figure.axes)]
    for one, two in itertools.combinations(boxes, 2):
        width = min(one.x1, two.x1) - max(one.x0, two.x0)
        assert width < 1 or min(one.y1, two.y1) - max(one.y0, two.y0) < 1


# ------------------------------------------------------------------- what others published

UMAZE = "antmaze-umaze-v2"


def test_the_published_rows_are_those_of_corls_readme():
    rows = published.read_published(published.DEFAULT)
    assert len(rows) == 20 and len({(row.task, row.method) for row in rows}) == 20
    assert all("CORL" in row.source and "README.md" in row.source for row in rows)
    means = {"Cal-QL": [53.04, 97.33, 0.067], "CQL": [48.38, 95.58, 0.115]}
    for method, expected in means.items():
        mazes = [row for row in rows if row.method == method and "antmaze" in row.task]
        found = np.mean([[row.offline_score, row.score, row.regret] for row in mazes], 0)
        assert len(mazes) == 6 and np.abs(found - expected).max() < 0.006


def test_published_scores_are_a_row_and_marks_where_task_and_method_are_the_same(tmp_path):
    paths = [
        write_run(tmp_path / "a", {0: 0, 20: 10, 40: 50}, env=UMAZE),
        write_run(tmp_path / "b", {0: 0, 20: 10, 40: 50}, env=UMAZE, name="mine"),
        write_run(tmp_path / "c", {0: 0, 20: 10, 40: 50}),
    ]
    with_rows = rows(call(*paths)[1])
    without = rows(call(*paths, "--published", "none")[1])
    (added,) = [row for row in with_rows if row not in without]
    assert added == [
        UMAZE, "Cal-QL, by CORL (online plain CQL)", "4 seeds", "1,000,000 + 1,000,000",
        "76.8 ± 4.3 → 99.8 ± 0.2", "–", "–", "–", "0.01 ± 0.00",
    ]  # fmt: skip
    runs = report.label_methods(report.read_all(paths)[0])
    others = published.read_published(published.DEFAULT)

    def marks(runs: list[report.Run]) -> list[tuple]:
        axes = report.draw_figure(report.group_runs(runs), others).axes[0]
        lines = [line for line in axes.lines if line.get_marker() == "D"]
        return [(*line.get_xydata()[0], line.get_markerfacecolor() == "white") for line in lines]

    assert marks(runs) == [(0, 76.75, True), (20, 99.75, True)]
    assert marks(runs[2:]) == []
    as_long = [run._replace(switch=10**6, end=2 * 10**6) for run in runs]
    assert marks(as_long) == [(0, 76.75, False), (10**6, 99.75, False)]


SEEDS = [([1.0, 2.0], [3.0, 4.0, 5.0, 6.0], np.float64(0.5)), ([7.0] * 2, [8.0] * 4, 0.0)]


def test_corls_curves_are_drawn_behind(tmp_path):
    file = tmp_path / "finetune_scores.pickle"
    file.write_bytes(pickle.dumps({"Cal-QL": {UMAZE: SEEDS}, "IQL": {UMAZE: []}}))
    path = write_run(tmp_path / "a", {0: 0, 20: 10, 40: 50}, env=UMAZE)
    assert call(path, "--corl", file, "--output", tmp_path / "x.svg")[::2] == (0, [])
    runs = report.label_methods(report.read_run(path))
    figure = report.draw_figure(report.group_runs(runs), [], published.read_corl(file))
    own, *seeds = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert dict(seeds[0].get_xydata()) == {-10: 1, 0: 2, 5: 3, 10: 4, 15: 5, 20: 6}
    assert len(seeds) == 2 and all(line.get_zorder() < own.get_zorder() for line in seeds)
    assert seeds[0].get_color() == own.get_color()


class Calls:
    def __reduce__(self):
        return os.system, ("touch here",)


@pytest.mark.parametrize(
    "content, says",
    [
        ({"Cal-QL": Calls()}, "system"),
        ([1], "expected CORL's finetune_scores.pickle"),
        ({"Cal-QL": {UMAZE: [([], [1.0], 0.0)]}}, "shapes"),
        ({"Cal-QL": {UMAZE: [([1.0], [float("nan")], 0.0)]}}, "finite"),
        ({"Cal-QL": {UMAZE: [(1, 2)]}}, "expected CORL's"),
    ],
)
def test_another_pickle_is_one_line_and_runs_nothing(content, says, study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.pickle").write_bytes(pickle.dumps(content))
    code, _, errors = call(*study, "--corl", "x.pickle")
    assert code == 2 and len(errors) == 1 and says in errors[0] and not Path("here").exists()


@pytest.mark.parametrize(
    "change, says",
    [
        (("76.75", "x"), "'x'"),
        (("76.75", ""), "finite"),
        (("seeds", "n"), "expected rows of task, method, source"),
        (("1000000", "0"), "below 1"),
    ],
)
def test_a_wrong_file_of_published_scores_is_one_line(change, says, study, tmp_path):
    file = tmp_path / "published.csv"
    file.write_text(published.DEFAULT.read_text().replace(*change))
    code, _, errors = call(*study, "--published", file)
    assert code == 2 and len(errors) == 1 and errors[0].startswith("report.py: error: published: ")
    assert says in errors[0]
    assert call(*study, "--published", tmp_path / "nowhere.csv")[0] == 2


# ------------------------------------------------------------------- methods, seeds, running runs


@pytest.mark.parametrize(
    "options, expected",
    [
        ([{}, {"calibrate": False}], ["Cal-QL", "CQL"]),
        ([{}, {"calibrate_online": False}], ["Cal-QL", "Cal-QL, not calibrated online"]),
        ([{"cql_alpha": 1.0}, {"cql_alpha": 5.0}], ["Cal-QL, cql_alpha 1", "Cal-QL, cql_alpha 5"]),
        (
            [{"bc_steps": 9}, {"bc_steps": 9, "calibrate": False}, {"env": DOOR}, {}],
            ["Cal-QL", "CQL", "Cal-QL", "Cal-QL, bc_steps 0"],
        ),
        (
            [{}, {"calibrate": False}, {"offline_iterations": 0}, {"mixing_ratio": 0.0}],
            ["Cal-QL", "CQL", "Cal-QL, no offline phase", "Cal-QL, mixing_ratio 0"],
        ),
        ([{"cql_alpha": 1.0}, {"cql_alpha": 5.0, "env": DOOR}], ["Cal-QL", "Cal-QL"]),
        ([{"name": "mine"}, {"name": "CQL", "calibrate": False}], ["mine", "CQL"]),
        ([{"device": "cpu", "eval_freq": 5}, {"device": "cuda", "seed": 1}], ["Cal-QL", "Cal-QL"]),
        ([{"load_model": "x0"}, {"load_model": "x1", "seed": 1}], ["Cal-QL", "Cal-QL"]),
        ([{"dataset_path": "/a/x"}, {"dataset_path": "b/x", "seed": 1}], ["Cal-QL", "Cal-QL"]),
        ([{"an_option_of_other_code": 1}, {}], ["Cal-QL, an_option_of_other_code 1", "Cal-QL"]),
    ],
)
def test_methods_are_named_by_what_differs(tmp_path, options, expected):
    paths = [write_run(tmp_path / str(i), {0: 0, 40: 1}, **o) for i, o in enumerate(options)]
    runs, problems = report.read_all(paths)
    assert [run.method for run in report.label_methods(runs)] == expected and not problems


def files_options(*names: str, **changed) -> dict:
    """The options in the configs of these names, the later over the earlier ones."""
    files = [yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) for name in names]
    options = {key: value for file in files for key, value in file.items() if key != "name"}
    return options | {"env": MAZE, "offline_iterations": 20, "online_iterations": 20} | changed


FOUR = [
    files_options("antmaze"),
    files_options("antmaze", "methods/cql"),
    files_options("antmaze", "methods/wsrl"),
    files_options("antmaze", "methods/rlpd", offline_iterations=0),
]
WSRL, RLPD = FOUR[2:]


@pytest.mark.parametrize(
    "options, expected",
    [
        (FOUR, ["Cal-QL", "CQL", "WSRL", "RLPD"]),
        ([*FOUR[::2], WSRL | {"n_critics": 5}], ["Cal-QL", "WSRL", "WSRL, 5 critics"]),
        ([*FOUR, FOUR[0] | {"n_critics": 10}],
         ["Cal-QL", "CQL", "WSRL", "RLPD", "Cal-QL, 10 critics"]),
        ([FOUR[0], WSRL | {"policy_lr": 1.0}], ["Cal-QL, policy_lr 0.0001", "WSRL, policy_lr 1"]),
        ([WSRL, WSRL | {"cql_alpha": 1.0}, WSRL | {"cql_alpha": 1.0, "discount": 0.5}],
         ["WSRL, cql_alpha 5", "WSRL", "WSRL, discount 0.5"]),
        ([FOUR[0], FOUR[0] | {"bc_weight": 5.0}], ["Cal-QL", "Cal-QL, bc_weight 5"]),
        ([FOUR[0], FOUR[0] | {"cql_alpha_online": 0.0}, FOUR[1]],
         ["Cal-QL", "Cal-QL, no regularizer online", "CQL"]),
        ([FOUR[0], RLPD | {"n_target_critics": 1, "calibrate": False}],
         ["Cal-QL", "RLPD, n_target_critics 1, calibrate false"]),
        ([WSRL | {"calibrate": False}], ["WSRL, calibrate false"]),  # pre-trained by CQL
        ([FOUR[0], WSRL | {"load_model": "x.pt", "offline_iterations": 0}],
         ["Cal-QL, offline_iterations 20", "WSRL, no offline phase, from a checkpoint"]),
        ([FOUR[0], WSRL | {"name": "mine"}, WSRL | {"name": "WSRL"}], None),
        # what lacks a part of a method is not called so
        ([FOUR[0], WSRL | {"n_critics": 2}], None),
        ([FOUR[0], WSRL | {"warmup_steps": 0}], None),
        ([FOUR[0], WSRL | {"mixing_ratio": 0.5}], None),
        ([FOUR[0], RLPD | {"cql_alpha_online": 5.0}], None),
    ],
)  # fmt: skip
def test_wsrl_and_rlpd_are_named_by_their_settings(tmp_path, options, expected):
    paths = [write_run(tmp_path / str(i), {0: 0, 40: 1}, **o) for i, o in enumerate(options)]
    runs, problems = report.read_all(paths)
    found = [run.method for run in report.label_methods(runs)]
    assert not problems and len(set(found)) == len(found)
    if expected is None:
        assert not found[1].startswith(("WSRL", "RLPD"))
    else:
        parts = [[set(name.split(", ")) for name in names] for names in (found, expected)]
        assert parts[0] == parts[1]


def test_what_is_not_at_its_end_or_differs_between_methods_is_said(study, tmp_path):
    running, copy = {0: 0, 20: 10, 28: 90}, tmp_path / "copy"
    write_run(copy, {0: 0, 20: 99, 30: 99}, seed=0, device="cuda")
    alone = write_run(tmp_path / "alone", running, env="pen", calibrate=False)
    third = write_run(tmp_path / "third", running, seed=2)
    longer = write_run(tmp_path / "longer", {0: 0, 20: 11, 50: 65}, 1, seed=4, calibrate=False,
                       online_iterations=30)  # fmt: skip
    with (third / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "eval/d4rl_norm')
    code, output, errors = call(copy, *study, alone, third, longer)
    table = rows(output)
    assert code == 0 and table[3][:4] == [MAZE, "Cal-QL", "0 1 2 (70%)", "20 + 20"]
    assert table[3][4] == "20.0 ± 10.0 → 60.0 ± 10.0"
    assert table[4][1:5] == ["CQL", "0 1 4", "20 + 20 or 20 + 30", "11.0 ± 0.6 → 65.0 ± 2.9"]
    assert table[5][:5] == ["pen", "CQL", "0 (70%)", "20 + 20", "10.0 → 90.0"]
    (line,) = errors
    assert line.startswith(f"report.py: left out: {copy}: same task") and str(study[0]) in line


# ------------------------------------------------------------------- files


def test_a_csv_file_gives_the_same_report_and_picture(study, tmp_path):
    write_run(tmp_path / "running", {0: 1 / 3, 10: 2 / 3}, seed=7)
    table, again = tmp_path / "curves.csv", tmp_path / "again.csv"
    pictures = [tmp_path / "one.png", tmp_path / "two.png"]
    _, output, _ = call(*study, tmp_path / "running", "--csv", table, "--output", pictures[0])
    code, from_csv, errors = call(table, "--csv", again, "--output", pictures[1])
    assert (code, errors, from_csv) == (0, [], output)
    assert table.read_text() == again.read_text()
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    with table.open() as file:
        found = [row for row in csv.DictReader(file) if row["method"] == "CQL"]
    assert len(call(table, *study[2:4])[2]) == 2  # those are in the file already
    assert [list(row.values()) for row in found[5:7]] == [
        [MAZE, "CQL", "1", "20", "20", "20", "12", "0.12", ""],
        [MAZE, "CQL", "1", "20", "20", "30", "5", "0.05", ""],
    ]


STUDIES = """antmaze door maze2d-medium quickstart pointmaze costs layer-norm antmaze-slow methods
    methods-quickstart door-cloning first-runs"""


@pytest.mark.parametrize("study", STUDIES.split())
def test_the_published_tables_are_those_of_the_published_curves(study):
    _, printed, _ = call(ROOT / "results" / f"{study}.csv", "--published", "none")
    assert printed.partition("\n\n")[0] in (ROOT / "results/README.md").read_text()


def test_pictures_and_page(study, tmp_path):
    for kind, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        assert call(study[0], "--output", tmp_path / f"x.{kind}")[::2] == (0, [])
        assert (tmp_path / f"x.{kind}").read_bytes().startswith(magic)
    page, notes = tmp_path / "page.html", tmp_path / "tables.md"
    code, output, errors = call(*study, "--html", page, "--markdown", notes)
    assert (code, errors) == (0, []) and notes.read_text() == output
    text = page.read_text()
    for cell in itertools.chain(*rows(output)):
        assert f"<td>{cell}</td>" in text or cell == "---"
    source = text.split('src="data:image/svg+xml;base64,')[1].partition('"')[0]
    assert b"</svg>" in base64.b64decode(source) and "http" not in text and "url(" not in text


def test_a_method_none_of_whose_runs_has_ended_is_dotted():
    (run, *_) = report.read_csv(ROOT / "results" / "first-runs.csv")
    ends = {"ended": run.steps[-1], "running": run.steps[-1] + 1}
    runs = [run._replace(task=task, end=end) for task, end in ends.items()]
    figure = report.draw_figure(report.group_runs(runs))
    assert [axes.lines[0].get_linestyle() for axes in figure.axes] == ["-", ":"]


CONFIG = f"env: {MAZE}\nseed: 0\noffline_iterations: 20\nonline_iterations: 20\n"
EVALUATION = '{"step": 0, "eval/d4rl_normalized_score": 1.0}\n'
HEADER = ",".join(report.COLUMNS) + "\n"
BAD = {
    "empty directory": ({}, "No such file"),
    "no metrics": ({"config.yaml": CONFIG}, "No such file"),
    "no evaluation": ({"config.yaml": CONFIG, "metrics.jsonl": '{"step": 1}\n'}, "no evaluation"),
    "no JSON": ({"config.yaml": CONFIG, "metrics.jsonl": EVALUATION + "x\n"}, "line 2"),
    "no object": ({"config.yaml": CONFIG, "metrics.jsonl": "[]\n" + EVALUATION}, "list"),
    "no score": ({"config.yaml": CONFIG, "metrics.jsonl": EVALUATION.replace("1.0", "NaN")}, "not"),
    "no YAML": ({"config.yaml": "a: [\n"}, "config.yaml"),
    "no seed": ({"config.yaml": CONFIG.replace("seed", "x"), "metrics.jsonl": EVALUATION}, "seed"),
    "no columns": ({"x.csv": "a,b\n1,2\n"}, "task"),
    "no rows": ({"x.csv": HEADER}, "no evaluation"),
    "a list for a task": (
        {"config.yaml": CONFIG.replace(MAZE, "[a]"), "metrics.jsonl": EVALUATION},
        "expected",
    ),
    "a name that cannot be printed": (
        {"config.yaml": CONFIG + '"\\ud800": 1\n', "metrics.jsonl": EVALUATION},
        "surrogates",
    ),
    "a list for a number": (
        {"config.yaml": CONFIG.replace("seed: 0", "seed: [1]"), "metrics.jsonl": EVALUATION},
        "found",
    ),
    "no end": (
        {"config.yaml": CONFIG.replace("20", "1" + 18 * "0"), "metrics.jsonl": EVALUATION},
        "1e+18",
    ),
    "no text": ({"config.yaml": CONFIG, "metrics.jsonl": b"\xff\xfe\n"}, "codec"),
    "a score that overflows": (
        {"config.yaml": CONFIG, "metrics.jsonl": EVALUATION.replace("1.0", "1e308")},
        "score",
    ),
    "a list for a score": (
        {"config.yaml": CONFIG, "metrics.jsonl": EVALUATION.replace("1.0", "[1.0]")},
        "list",
    ),
    "brackets": ({"config.yaml": CONFIG, "metrics.jsonl": 100_000 * "[" + "\n"}, "recursion"),
    "a FIFO": ({"config.yaml": CONFIG, "metrics.jsonl": None}, "regular file"),
    "a FIFO for a CSV file": ({"x.csv": None}, "regular file"),
    "a late step": ({"x.csv": HEADER + f"{MAZE},Cal-QL,0,20,20,1{24 * '0'},1,,\n"}, "1e+24"),
    "a success rate without end": ({"x.csv": HEADER + f"{MAZE},Cal-QL,0,20,20,1,1,inf,\n"}, "rate"),
    "no number": ({"x.csv": HEADER + f"{MAZE},Cal-QL,0,20,20,0,x,,\n"}, "'x'"),
    "short row": ({"x.csv": HEADER + f"{MAZE},Cal-QL,0,20\n"}, "None"),
}


@pytest.mark.parametrize("files, problem", BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_one_line_and_left_out(study, tmp_path, files, problem):
    path = tmp_path / "run"
    path.mkdir()
    for name, content in files.items():
        if content is None:
            os.mkfifo(path / name)
        else:
            (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    path = path / "x.csv" if "x.csv" in files else path
    code, output, errors = call(path)
    assert (code, output, len(errors)) == (2, "", 1)
    assert errors[0].startswith(f"report.py: error: {path}") and problem in errors[0]
    code, output, errors = call(path, *study)
    assert code == 0 and "20.0 ± 10.0 → 60.0 ± 10.0" in output
    assert len(errors) == 1 and errors[0].startswith(f"report.py: left out: {path}: ")


def test_paths_may_be_long_or_at_home(study, tmp_path, monkeypatch):
    long = 5_000 * "x"
    code, output, errors = call(long, *study)
    assert code == 0 and "20.0 ± 10.0 → 60.0 ± 10.0" in output
    assert len(errors) == 1 and "File name too long" in errors[0]
    code, _, errors = call(*study, "--markdown", long)
    assert code == 2 and len(errors) == 1 and errors[0].endswith("File name too long")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call("~/runs/a", "--csv=~/curves.csv")[0] == 0
    assert (tmp_path / "curves.csv").exists()


def test_names_may_look_like_formulas(tmp_path):
    odd = [r"$\frac{", "_hidden", "100 %"]
    runs = [write_run(tmp_path / str(i), {0: 1}, env=x, name=x) for i, x in enumerate(odd)]
    assert call(*runs, "--output", tmp_path / "x.png")[::2] == (0, [])


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("--output no/x.svg", "no/x.svg"),
        ("--csv .", "."),
        ("--output x.gif", ".gif"),
        ("--x", "--x"),
    ],
)
def test_wrong_arguments_are_one_line(study, arguments, named):
    code, _, errors = call(study[0], *arguments.split())
    assert code == 2 and len(errors) == 1
    assert errors[0].startswith("report.py: error: ") and named in errors[0]
