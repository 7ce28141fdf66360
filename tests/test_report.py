"""tools/report.py on runs written by hand, against formulations of its own."""

import base64
import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import report

ROOT = Path(__file__).resolve().parents[1]
MAZE, DOOR = "maze2d-umaze-v1", "D4RL/door/human-v2"


def write_run(path: Path, scores: dict[int, float], regret=None, **options) -> Path:
    """A run of 20 + 20 steps with these scores by step; a score's hundredth is the success rate."""
    path.mkdir(parents=True)
    config = {"env": MAZE, "seed": 0, "offline_iterations": 20, "online_iterations": 20}
    config |= {"calibrate": True, "calibrate_online": True, "name": "Cal-QL", **options}
    (path / "config.yaml").write_text(yaml.dump(config))
    records = [
        {"step": s, report.SCORE: x, report.SUCCESS: x / 100, "eval/episode_return": 1.0}
        for s, x in scores.items()
    ]
    if regret is not None:
        records.insert(-1, {"step": 22, "train/regret": 1.0, "train/is_success": 0.0})
        records.insert(-1, {"step": max(scores), "train/regret": regret})
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def call(capsys, *arguments) -> tuple[int, str, list[str]]:
    """Exit code, standard output and the lines on standard error."""
    code = report.main([*map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


def rows(output: str) -> list[list[str]]:
    """The cells of all Markdown rows, headers and rules included."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def study(tmp_path) -> list[Path]:
    """Two methods on one task, one of them also on another."""
    runs = tmp_path / "runs"
    cql = dict(calibrate=False)
    return [
        write_run(runs / "a", {0: 0, 20: 10, 30: 40, 40: 50}, 0.25, seed=0),
        write_run(runs / "b", {0: 0, 20: 30, 30: 50, 40: 70}, 0.75, seed=1),
        write_run(runs / "c", {0: 0, 20: 10, 30: 5, 40: 60}, 0.5, seed=0, **cql),
        write_run(runs / "d", {0: 0, 20: 12, 30: 5, 40: 70}, 1.0, seed=1, **cql),
        write_run(runs / "e", {0: 5, 20: 15, 40: 25}, seed=0, env=DOOR),
    ]


def test_the_command_line_prints_known_numbers_and_needs_no_torch(study, tmp_path):
    # areas of seed 0: (10+40)/2 * 10 + (40+50)/2 * 10 = 700 over 20 steps = 35; of seed 1: 50
    command = (
        "import sys; from tools import report; code = report.main(sys.argv[1:]);"
        "sys.exit(code or bool({'torch', 'cal_ql', 'matplotlib'} & {*sys.modules}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", command, *map(str, study)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0 and not result.stderr, result.stderr
    door, cal_ql, cql = rows(result.stdout)[2:5]
    assert door == [
        DOOR, "Cal-QL", "1", "15.0 → 25.0", "25.0 (no interval)", "20.0", "0.25", "–",
    ]  # fmt: skip
    assert cal_ql == [
        MAZE, "Cal-QL", "2", "20.0 ± 10.0 → 60.0 ± 10.0", "60.0 [50.0, 70.0]", "42.5 ± 7.5",
        "0.60 ± 0.10", "0.50 ± 0.25",
    ]  # fmt: skip
    assert cql[3:] == [
        "11.0 ± 1.0 → 65.0 ± 5.0", "65.0 [60.0, 70.0]", "21.5 ± 1.5", "0.65 ± 0.05", "0.75 ± 0.25",
    ]  # fmt: skip
    # of the four pairs 50 < 60, 50 < 70, 70 > 60, 70 = 70: 1.5 / 4. Of the resamples, one in 4 has
    # 50 and 50, which win nothing, and one in 16 has 70 and 70 against 60 and 60
    assert ["Cal-QL", "CQL", "1 of 2", "0.38 [0.00, 1.00]"] in rows(result.stdout)


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


def test_the_interval_does_not_mix_tasks():
    samples = [np.zeros(4), np.full(4, 100.0)]
    assert tuple(report.interval(samples, report.interquartile_mean)) == (50.0, 50.0)
    assert report.interval([np.zeros(4), np.zeros(1)], report.interquartile_mean) is None


def test_seeds_with_other_evaluation_steps_are_averaged_between_their_evaluations(tmp_path):
    one = report.read_run(write_run(tmp_path / "a", {0: 0, 10: 10, 20: 30, 40: 50}))
    two = report.read_run(write_run(tmp_path / "b", {5: 1, 20: 3, 30: 5, 40: 9}, seed=1))
    figure = report.draw_figure({MAZE: {"m": [one, two]}}, {MAZE: {"m": [one, two]}})
    drawn = {x: y for x, y in figure.axes[0].lines[0].get_xydata() if not np.isnan(y)}
    expected = {}
    for step in (5, 10, 20, 30, 40):  # seed 1 begins at 5
        total = 0.0
        for run in (one, two):
            for (x, y), (x2, y2) in itertools.pairwise(zip(run.steps, run.scores)):
                if x <= step < x2 or step == x2 == 40:
                    total += y + (y2 - y) * (step - x) / (x2 - x)
        expected[step] = total / 2
    assert drawn == pytest.approx(expected)


def made_up(seed: int, scores: list[float], switch: int = 20) -> report.Run:
    """A run that ends 20 steps after the switch, evaluated every 10 steps."""
    steps, nothing = 10.0 * np.arange(len(scores)), np.full(len(scores), np.nan)
    values = (steps, np.array(scores), nothing, nothing)
    return report.Run("", "task", "m", seed, switch, switch + 20, {}, *values)


def test_the_aggregate_goes_by_the_share_of_each_phase():
    long = made_up(0, [0, 1, 2, 3, 4, 10, 30], switch=40), made_up(1, [2] * 7, switch=40)
    short = made_up(0, [4, 4, 6, 8, 20]), made_up(1, [6, 6, 6, 6, 6])
    bare = [made_up(0, [1, 2, 3], switch=0)]
    runs = {"a": {"m": [*long], "n": bare}, "b": {"m": [*short], "n": bare}}
    m, n = report.draw_figure(runs, runs).axes[2].lines[:2]
    drawn = dict(m.get_xydata())
    # halfway: step 20 of the one and step 10 of the other, then steps 50 and 30
    pooled = {-1: [0, 2, 4, 6], -0.5: [2, 2, 4, 6], 0.5: [10, 2, 8, 6], 1: [30, 2, 20, 6]}
    for share, scores in pooled.items():
        assert drawn[share] == pytest.approx(naive_interquartile_mean([scores]))
    assert dict(n.get_xydata())[0.5] == 2 and min(n.get_xdata()) == 0


def test_several_methods_are_compared_rather_than_one_on_more_tasks():
    run = [made_up(0, [0, 0, 0, 0, 0])]
    ended = {"a": {"m": run, "n": run}, "b": {"m": run, "n": run}, "c": {"m": run}, "d": {"m": run}}
    ended |= {"e": {"m": run}}
    assert report.comparable(ended) == {"a": ended["a"], "b": ended["b"]}
    assert report.comparable({"a": {"m": run}, "b": {"n": run}}) == {}


# ------------------------------------------------------------------- runs, methods, seeds


@pytest.mark.parametrize(
    "options, expected",
    [
        ([{}, {"calibrate": False}], ["Cal-QL", "CQL"]),
        ([{}, {"calibrate_online": False}], ["Cal-QL", "Cal-QL, not calibrated online"]),
        (
            [{"cql_alpha": 1.0}, {"cql_alpha": 5.0}],
            ["Cal-QL, cql_alpha: 1.0", "Cal-QL, cql_alpha: 5.0"],
        ),
        (
            [{"bc": 0}, {"bc": 0, "calibrate": False}, {"bc": 0, "env": DOOR}, {"bc": 9}],
            ["Cal-QL", "CQL", "Cal-QL", "Cal-QL, bc: 9"],
        ),
        ([{"cql_alpha": 1.0}, {"cql_alpha": 5.0, "env": DOOR}], ["Cal-QL", "Cal-QL"]),
        ([{"name": "a"}, {"name": "b"}], ["Cal-QL, name: a", "Cal-QL, name: b"]),
        ([{"name": "a"}, {"name": "b", "seed": 1}], ["Cal-QL", "Cal-QL"]),
        ([{"name": "a"}, {"name": "b", "calibrate": False}], ["Cal-QL", "CQL"]),
        ([{"device": "cpu", "eval_freq": 5}, {"device": "cuda", "seed": 1}], ["Cal-QL", "Cal-QL"]),
        ([{"load_model": "x0"}, {"load_model": "x1", "seed": 1}], ["Cal-QL", "Cal-QL"]),
    ],
)
def test_methods_are_named_by_what_differs(tmp_path, options, expected):
    paths = [write_run(tmp_path / str(i), {0: 0, 40: 1}, **o) for i, o in enumerate(options)]
    runs, notes = report.label_methods([report.read_run(path) for path in paths])
    assert [run.method for run in runs] == expected
    assert notes == (
        [f"{MAZE}: bc: 0, unless a method's name says otherwise."] if len(runs) > 3 else []
    )


def test_a_run_not_at_its_end_is_marked_or_left_out_of_the_numbers(study, tmp_path, capsys):
    running = {0: 0, 20: 10, 28: 90}
    alone = write_run(tmp_path / "alone", running, seed=0, env="pen", calibrate=False)
    third = write_run(tmp_path / "third", running, seed=2)
    code, output, errors = call(capsys, *study, alone, third)
    table = rows(output)
    assert (code, errors) == (0, [])
    assert table[3][:4] == [MAZE, "Cal-QL", "2 of 3", "20.0 ± 10.0 → 60.0 ± 10.0"]
    assert table[5][:4] == ["pen", "CQL", "1", "10.0 → 90.0 (at step 28 of 40)"]
    assert [f"{MAZE}: Cal-QL, seed 2 is at step 28 of 40, not counted."] in table
    assert ["pen: CQL, seed 0 is at step 28 of 40, counted as it is."] in table


def test_a_torn_last_line_does_not_lose_a_run(study, capsys):
    with (study[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "eval/d4rl_norm')
    code, output, errors = call(capsys, *study)
    assert (code, errors) == (0, []) and "20.0 ± 10.0 → 60.0 ± 10.0" in output


def test_duplicates_are_named_and_the_longer_run_is_taken(study, tmp_path, capsys):
    short = write_run(tmp_path / "short", {0: 0, 20: 99, 30: 99}, seed=0, device="cuda")
    code, output, errors = call(capsys, short, *study)
    assert code == 0 and len(errors) == 1 and "20.0 ± 10.0 → 60.0 ± 10.0" in output
    assert errors[0].startswith(f"report.py: left out: {short}: ") and str(study[0]) in errors[0]


def test_different_seeds_and_lengths_are_said(study, tmp_path, capsys):
    longer = write_run(tmp_path / "e", {0: 0, 20: 9, 50: 9}, seed=2, online_iterations=30)
    code, output, _ = call(capsys, *study, longer)
    assert code == 0
    assert [f"{MAZE}: different seeds. Cal-QL: 0 1 2; CQL: 0 1."] in rows(output)
    lengths = "different numbers of online steps. Cal-QL: 20 30; CQL: 20."
    assert [f"{MAZE}: {lengths}"] in rows(output)


def test_aggregates_are_over_tasks_that_all_of_the_methods_have_ended(study, tmp_path, capsys):
    code, output, _ = call(capsys, *study)
    assert "No aggregate" not in output  # Cal-QL alone has both tasks
    assert ["Cal-QL", "3", "18.3 (no interval)"] in [row[:3] for row in rows(output)]
    assert "Left out, not ended on all or by all: CQL." in output
    more = [
        write_run(
            tmp_path / f"{i}", {0: 0, 20: i, 40: 10 * i}, seed=i % 2, env=DOOR, calibrate=i > 2
        )
        for i in (2, 3, 1)
    ]
    code, output, _ = call(capsys, *study, *more)
    # Cal-QL ends at 50, 70, 25, 30; CQL at 60, 70, 20, 10: without the highest and lowest
    table = rows(output)
    assert [row[1] for row in table if row[0] in ("Cal-QL", "CQL")][:2] == ["4", "4"]
    assert [row[3].split()[0] for row in table if row[1] == "4"] == ["40.0", "40.0"]
    # 0.375 on the maze; in the other task all of 25, 30 exceed 20, 10
    assert [row[3].split()[0] for row in table if row[2] == "2 of 2"] == ["0.69"]


# ------------------------------------------------------------------- files


def test_a_csv_file_is_tidy_and_gives_the_same_report(study, tmp_path, capsys):
    write_run(tmp_path / "running", {0: 1 / 3, 10: 2 / 3}, seed=7)
    table, again = tmp_path / "curves.csv", tmp_path / "again.csv"
    _, output, _ = call(capsys, *study, tmp_path / "running", "--csv", table)
    code, from_csv, errors = call(capsys, table, "--csv", again)
    assert (code, errors, from_csv) == (0, [], output)
    assert table.read_text() == again.read_text()
    scores = [run.scores for run in report.read_csv(table) if run.seed == 7]
    assert scores == [pytest.approx([1 / 3, 2 / 3], rel=1e-6)]
    with table.open() as file:
        found = [
            row for row in csv.DictReader(file) if (row["seed"], row["method"]) == ("1", "CQL")
        ]
    assert found[1:3] == [
        {
            "task": MAZE, "method": "CQL", "seed": "1", "offline_iterations": "20",
            "online_iterations": "20", "step": step, "phase": phase, "score": score,
            "success_rate": rate, "regret": regret,
        }
        for step, phase, score, rate, regret in (
            ("20", "offline", "12", "0.12", ""), ("30", "online", "5", "0.05", "1"),
        )
    ]  # fmt: skip


def test_pictures_and_page(study, tmp_path, capsys):
    page, notes, picture = tmp_path / "page.html", tmp_path / "tables.md", tmp_path / "curves.svg"
    for kind, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert call(capsys, study[0], "--output", tmp_path / f"x.{kind}")[::2] == (0, [])
        assert (tmp_path / f"x.{kind}").read_bytes().startswith(magic)
    code, output, errors = call(
        capsys, *study, "--output", picture, "--html", page, "--markdown", notes
    )
    assert (code, errors) == (0, []) and picture.read_text().startswith("<?xml")
    text = page.read_text()
    assert notes.read_text() == output
    for cell in itertools.chain(*rows(output)):
        assert cell.strip("-") in text or cell == "---"
    sources = [
        part.partition('"')[0] for part in text.replace("srcset=", "src=").split('src="')[1:]
    ]
    kind, data = zip(*(source.split(",") for source in sources))
    assert kind == ("data:image/svg+xml;base64",) * 2 and "http" not in text and "url(" not in text
    assert all(b"</svg>" in base64.b64decode(part) for part in data)


@pytest.mark.parametrize("tasks, names", [(1, 9), (9, 3)])
def test_the_legend_covers_no_panel_and_titles_do_not_meet(tasks, names):
    """Also with a name that is longer than the figure is wide."""
    labels = ["Cal-QL, " + "an_option: 1, " * 9, *(f"Cal-QL, cql_alpha: {i}" for i in range(names))]
    steps, scores = np.array([0.0, 20, 40]), np.arange(3.0)
    by_task = {
        f"antmaze-large-navigate-singletask-task{i}-v0": {
            name: [report.Run("", "", name, 0, 20, 40, {}, steps, scores, scores, scores)]
            for name in labels
        }
        for i in range(tasks)
    }
    figure = report.draw_figure(by_task, by_task)
    figure.draw_without_rendering()
    assert len(figure.axes) == tasks + (tasks > 1)
    whole, legend = figure.bbox, figure.legends[0].get_window_extent()
    panels = [axes.get_tightbbox() for axes in figure.axes]
    assert legend.x0 >= whole.x0 and legend.x1 <= whole.x1 and legend.y0 >= whole.y0
    for one, other in itertools.combinations([legend, *panels], 2):
        width = min(one.x1, other.x1) - max(one.x0, other.x0)
        height = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert width < 1 or height < 1
    assert all(axes.get_position().height > 0.1 for axes in figure.axes)


# ------------------------------------------------------------------- bad input

CONFIG = f"env: {MAZE}\nseed: 0\noffline_iterations: 20\nonline_iterations: 20\n"
HEADER = ",".join(report.COLUMNS) + "\n"
EVALUATION = '{"step": 0, "eval/d4rl_normalized_score": 1.0}\n'


def scored(score: str) -> dict[str, str]:
    return {"config.yaml": CONFIG, "metrics.jsonl": EVALUATION.replace("1.0", score)}


BAD_RUNS = {
    "empty directory": ({}, "found no config.yaml"),
    "no metrics": ({"config.yaml": CONFIG}, "No such file"),
    "no evaluation": ({"config.yaml": CONFIG, "metrics.jsonl": '{"step": 1}\n'}, "no evaluation"),
    "empty metrics": ({"config.yaml": CONFIG, "metrics.jsonl": ""}, "no evaluation yet"),
    "no JSON": ({"config.yaml": CONFIG, "metrics.jsonl": "x\n" + EVALUATION}, "line 1: found b'x'"),
    "no object": ({"config.yaml": CONFIG, "metrics.jsonl": "[]\n" + EVALUATION}, "expected a JSON"),
    "no step": ({"config.yaml": CONFIG, "metrics.jsonl": "{}\n" + EVALUATION}, "step is 'None'"),
    "text": (scored('"x"'), "is 'x'"),
    "NaN": (scored("NaN"), "is 'nan'"),
    "huge": (scored("9" * 400), "is '9"),
    "deep": ({"config.yaml": CONFIG, "metrics.jsonl": "[" * 99999 + "\n{}"}, "recursion"),
    "YAML": ({"config.yaml": "a: [\n"}, "expected"),
    "no mapping": ({"config.yaml": "- 1\n"}, "no option env"),
    "no seed": ({"config.yaml": CONFIG.replace("seed: 0", "seed: -1")}, "seed is '-1'"),
    "no length": ({"config.yaml": CONFIG.replace("online_i", "on_i")}, "online_iterations is"),
    "bytes": ({"config.yaml": b"\xff\xfe\x00"}, "config.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("files, problem", BAD_RUNS.values(), ids=BAD_RUNS)
def test_a_directory_without_a_readable_run_is_one_line(tmp_path, capsys, files, problem):
    path = tmp_path / "run"
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, output, errors = call(capsys, path)
    assert (code, output, len(errors)) == (2, "", 1)
    assert errors[0].startswith(f"report.py: error: {path}") and problem in errors[0]


@pytest.mark.parametrize(
    "content, problem",
    [
        ("", "no column task"),
        ("a,b\n1,2\n", "no column task"),
        (HEADER, "no evaluation"),
        (HEADER + f"{MAZE},Cal-QL,0,20,20,0,offline,x,,\n", "line 2: score is 'x'"),
        (HEADER + f"{MAZE},,0,20,20,0,offline,1,,\n", "line 2: found no task or no method"),
        (HEADER + f"{MAZE},Cal-QL,0,20\n", "line 2: online_iterations is 'None'"),
        (HEADER + f"{MAZE},Cal-QL,0,20,20,-1,offline,1,,\n", "line 2: step is '-1'"),
    ],
)
def test_a_bad_csv_file_is_one_line(tmp_path, capsys, content, problem):
    (tmp_path / "curves.csv").write_text(content)
    code, _, errors = call(capsys, tmp_path / "curves.csv")
    assert (code, len(errors)) == (2, 1) and problem in errors[0]


def test_what_cannot_be_read_is_left_out(study, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    missing = tmp_path / "missing.csv"
    code, output, errors = call(capsys, tmp_path / "empty", *study, missing)
    assert code == 0 and "20.0 ± 10.0 → 60.0 ± 10.0" in output
    assert [line.split(": ")[:3] for line in errors] == [
        ["report.py", "left out", str(path)] for path in (tmp_path / "empty", missing)
    ]


@pytest.mark.parametrize(
    "option, name",
    [("--output", "no/x.svg"), ("--csv", "."), ("--html", "."), ("--output", "x.gif")],
)
def test_what_cannot_be_written_is_one_line(study, tmp_path, capsys, option, name):
    code, _, errors = call(capsys, study[0], option, tmp_path / name)
    assert code == 2 and len(errors) == 1
    assert errors[0].startswith("report.py: error: ") and str(tmp_path / name) in errors[0]
