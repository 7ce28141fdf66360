"""README and docs: links, files, options and commands exist; commands that take seconds run."""

import functools
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

import cal_ql
from helpers import ROOT, call_tool
from tools import benchmark, evaluate, make_dataset, report
from tools.command_line import Parser

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "results/README.md", ROOT / "datasets/README.md"]
STUDIES = "antmaze door maze2d-medium quickstart pointmaze".split()
TOOLS = [benchmark, evaluate, make_dataset, report]
OTHERS_OPTIONS = set("--user --seed --python --array --no-deps --requeue".split())  # uv's and so on
OUR_FOLDERS = "configs", "docs", "examples", "results", "runs", "tasks", "tests", "tools"


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---------------------------------------------------------------------------- commands

# Bash expands loops and variables of a block, and prints external commands instead of running them.
RECORD = r"""
command_not_found_handle() { printf '%s\0' "$@" '<end>'; }
id() { echo 1000; }
mktemp() { echo folder; }
PATH=/nowhere
TIMEFORMAT=
"""


def read_commands(page: Path) -> list[tuple[str, ...]]:
    """The words of each command in the page's bash blocks, once each."""
    found = {}
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        block = block.replace(".venv/bin/", "").replace("source activate", ":")
        command = ["bash", "-c", RECORD + block]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert not done.stderr, f"{page_name(page)}: {done.stderr}"
        for part in done.stdout.split("<end>\0")[:-1]:
            found[tuple(part.split("\0")[:-1])] = None
    return list(found)


CASES = [(page, command) for page in PAGES for command in read_commands(page)]


def made_data() -> tuple[str, ...]:
    """How the names begin of data that the pages' commands for tools/make_dataset.py make."""
    tasks = {c[2] for _, c in CASES if c[:2] == ("python", "tools/make_dataset.py")}
    return ("datasets/minari", *(f"datasets/{task}-" for task in tasks))


class Parsed(BaseException):
    """Ends a tool's `main` once it has its arguments; holds those that it does not know."""


def unknown_arguments(tool: ModuleType, arguments: list[str]) -> list[str]:
    """The arguments that the tool does not know; raises `InputError` if a value is wrong."""
    parse = Parser.parse_known_args

    def parse_known_args(*args, **options):
        raise Parsed(parse(*args, **options)[1])

    patches = mock.patch.object(Parser, "parse_known_args", parse_known_args)
    with patches, mock.patch.object(sys, "argv", ["tool", *arguments]):
        try:
            tool.main()
        except Parsed as parsed:
            return parsed.args[0]


def check_program(program: str, arguments: list[str]) -> None:
    """Raise unless a program of this repository takes these arguments."""
    assert (ROOT / program).is_file()
    for tool in TOOLS:
        if program == f"tools/{tool.__name__.rpartition('.')[2]}.py":
            unknown = unknown_arguments(tool, arguments)
            assert not unknown or tool is benchmark
            cal_ql.parse_config(unknown)
    if program == "cal_ql.py" and "--help" not in arguments:
        cal_ql.parse_config(arguments)


@pytest.mark.parametrize(("page", "command"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_command_exists(page: Path, command: tuple[str, ...], monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    while "=" in command[0]:
        command = command[1:]
    program, *arguments = command
    if program in ("python", "python3") and arguments[0] not in ("-m", "-c"):
        check_program(arguments[0], arguments[1:])
    elif program == "docker" and arguments[0] == "run":
        check_program("cal_ql.py", arguments[arguments.index("cal-ql") + 1 :])
    elif program == "sbatch":
        assert Path(arguments[0]).is_file()
        cal_ql.parse_config(arguments[1:])
    for word in arguments:
        for path in re.findall(r"^[\w./-]+/[\w.-]+$|^requirements.*txt$", word):
            check_path(path)


def check_path(path: str) -> None:
    folder = path.partition("/")[0]
    if folder == "datasets" and not (ROOT / path).exists():
        assert path.startswith(made_data()), f"nothing makes {path}"
    elif folder in OUR_FOLDERS or path.startswith("requirements"):
        assert (ROOT / path).exists(), path


FAST = [  # how they begin, and what is added; test_report.py makes the other tables
    ("tools/report.py results/door.csv", ["--output", "curves.png"]),
    ("tools/evaluate.py results/", ["--episodes", "1"]),
    ("results/overview.py", []),
]


def fast_commands() -> list[list[str]]:
    """The commands that take seconds, with other outputs and fewer episodes."""
    found = []
    for _, command in CASES:
        for start, options in FAST:
            if " ".join(command[1:]).startswith(start) and "--video" not in command:
                found.append([*command[1:], *options])
    return found


@pytest.mark.parametrize("command", fast_commands(), ids=lambda command: " ".join(command[:2]))
def test_a_command_of_seconds_runs(command: list[str], tmp_path: Path) -> None:
    words = [str(ROOT / word) if (ROOT / word).exists() else word for word in command]
    if "overview.py" in command[0]:
        words[1:] = ["curves.png"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "curves.png" not in words or (tmp_path / "curves.png").stat().st_size > 10_000


# ---------------------------------------------------------------------------- links and names


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
        link = "".join(target)
        if re.match(r"https://[\w.-]+\.\w+", link):
            continue
        path, _, anchor = link.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", linked.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link


@functools.cache
def known_options() -> set[str]:
    """The options of all programs here."""
    found = {f"--{name}" for name in cal_ql.Config.__annotations__} | OTHERS_OPTIONS
    for tool in TOOLS:
        found |= set(re.findall(r"--[\w-]+", call_tool(tool, "--help").stdout))
    return found | {"--config_path", "--kills"}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_options_and_files_in_the_text_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    options = known_options()
    for code in re.findall(r"`([^`]+)`", text):
        for option in re.findall(r"(?<!\S)--[a-zA-Z][\w-]*", code):
            assert option in options, code
        for path in re.findall(r"(?<!\S)[\w-]+/[\w./-]+\.\w+(?!\S)", code):
            check_path(path.replace("NAME", "quickstart"))


def test_configs_in_tables_exist() -> None:
    for page in (ROOT / "README.md", ROOT / "docs/tasks.md"):
        table = page.read_text().partition(" ids | config |")[2].partition("\n\n")[0]
        cells = [line.split(" | ")[2] for line in table.splitlines()[2:]]
        names = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
        assert {"antmaze", "quickstart", "kitchen", "ogbench"} <= names
        for name in names:
            assert (ROOT / "configs" / f"{name}.yaml").is_file(), name


def test_pages_are_short_and_each_is_linked() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    docs = "".join(page.read_text() for page in DOCS)
    for page in DOCS:
        assert len(page.read_text().splitlines()) <= 120, page.name
        assert readme.count(f"](docs/{page.name})") <= 1, page.name
        assert f"](docs/{page.name})" in readme or f"]({page.name})" in docs, page.name


def test_the_tables_of_several_studies_are_those_of_the_curves() -> None:
    """The last two columns of README's are the two halves of a column of tools/report.py's."""

    def table_rows(text: str) -> list[list[str]]:
        return [line.strip("| ").split(" | ") for line in text.splitlines() if line[:2] == "| "]

    studies = [ROOT / f"results/{name}.csv" for name in STUDIES]
    output = call_tool(report, *studies, "--published", "none").stdout
    printed = table_rows(output)
    expected = []
    for row in printed:
        if len(row) == 9 and row[1] in ("Cal-QL", "CQL") and not row[0].startswith("all"):
            expected.append([*row[:4], *row[5].split(" → ")])
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("score at the end |")[2].partition("\n\n")[0]
    assert table_rows(table)[1:] == expected
    totals = [line for line in output.partition("\n\n")[0].splitlines() if "| all 5" in line]
    assert len(totals) == 2
    assert "\n".join(totals) in (ROOT / "results/README.md").read_text()
