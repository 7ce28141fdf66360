"""Options: how texts in YAML files and on the command line are read, and which are refused."""

import math
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import pytest
import yaml

from runs.errors import InputError
from runs.options import ConfigParser, FilePath, Ranges


@dataclass
class Options:
    count: int = 1  # How many
    workers: Optional[int] = None  # How many processes
    factor: float = 1.0  # How much
    flag: bool = False  # Whether
    name: str = "x"  # What it is called
    label: Optional[str] = None  # What else it is called
    folder: Optional[FilePath] = None  # Where it is
    model: FilePath = ""  # Where another is


RANGES: Ranges = [("name", lambda x, _: x != "", "a name")]

# the option, its text, and the value that it has in a file and on the command line alike
MEANINGS: list[tuple[str, str, Any]] = [
    *[("workers", text, None) for text in ("null", "Null", "NULL", "~", "None")],
    *[("folder", text, None) for text in ("null", "None", "~")],
    *[("label", text, None) for text in ("null", "None", "~")],
    *[("count", text, 10) for text in ("10", "010", "+10", "0_10", "1_0", "1e1", "10.0")],
    *[("count", text, -10) for text in ("-10", "-010", "-1e1", "-1_0")],
    ("count", str(2**62 + 1), 2**62 + 1),
    ("count", "1_000_000", 1_000_000),
    *[("factor", text, -math.inf) for text in ("-inf", "-.inf", "-Infinity", "-.INF", "-INF")],
    *[("factor", text, math.inf) for text in ("inf", ".inf", "+.Inf", "infinity")],
    *[("factor", text, -0.5) for text in ("-.5", "-0.5", "-5e-1", "-00.5", "-5E-1")],
    *[("factor", text, 3e-4) for text in ("3e-4", "3.0e-4", "0.0003", ".0003")],
    ("factor", "5", 5.0),
    ("factor", "010", 10.0),
    *[("flag", text, True) for text in ("true", "True", "TRUE")],
    *[("flag", text, False) for text in ("false", "False")],
    *[("name", text, text) for text in ("12:30", "007", "1.10", "yes", "off", "0x1F", "1e3")],
    *[("name", text, text) for text in ("2024-01-01", "é", "日本", "x y", "=", "nan", "<<")],
    *[("label", text, text) for text in ("1_000", "010", "true", "-.5", "none")],
]


def parse(*args: Any) -> Options:
    return ConfigParser(Options, RANGES).parse_args(list(map(str, args)))


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read_text(text: Any) -> Options:
        path = tmp_path / "options.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return parse("--config_path", path)

    return read_text


@pytest.mark.parametrize(("name", "text", "value"), MEANINGS)
def test_a_text_means_the_same_in_a_file_and_on_the_command_line(
    name: str, text: str, value: Any, read: Any
) -> None:
    for config in (parse(f"--{name}", text), parse(f"--{name}={text}"), read(f"{name}: {text}\n")):
        found = getattr(config, name)
        assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[("count", text) for text in ("0x10", "0b1", "0o7", "1:30", "1__0", "_1", "1.5", "one")],
        *[("count", text) for text in ("inf", "nan", "true", "null", "None", str(2**63))],
        *[("count", text) for text in ("9" * 400, "9" * 5000, "1e400")],
        *[("factor", text) for text in ("0x10", "1:30.5", "1e999", "9" * 400, "x", "null", "yes")],
        *[("flag", text) for text in ("yes", "no", "on", "off", "1", "0", "y", "tRUE", "None")],
        *[("name", text) for text in ("null", "None", "~")],
    ],
)
def test_what_is_no_value_of_an_option_is_refused_in_a_file_and_on_the_command_line(
    name: str, text: str, read: Any
) -> None:
    for attempt in (lambda: parse(f"--{name}={text}"), lambda: read(f"{name}: {text}\n")):
        with pytest.raises(InputError, match=f"^{name}: found .*, expected ") as error:
            attempt()
        assert len(str(error.value)) < 300


def test_quoted_text_is_never_null_and_an_empty_value_is(read: Any) -> None:
    assert read("name: 'null'\nlabel: \"~\"").name == "null"
    assert read("name: 'null'\nlabel: \"~\"").label == "~"
    assert read("label:\nworkers:").label is None
    assert read("label: ''").label == ""
    assert parse("--label=").label == ""
    with pytest.raises(InputError, match="^workers: found ''"):
        parse("--workers=")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("name: !!timestamp abc", "name: found the tag"),
        ("count: !!int ''", "count: found the tag"),
        ("name: !!binary aGk=", "name: found the tag"),
        ("name: !!python/object/apply:os.getcwd []", "name: found a sequence"),
        ("count: [1]", "count: found a sequence"),
        ("count: {a: 1}", "count: found a mapping"),
        ("count: &a [*a]", "count: found a sequence"),
        ("x: " + "[" * 3000, "nested too deeply"),
        ("<<: {count: 1}", "<<: found a mapping"),
        ("? [1, 2]\n: 3", "there is no such option"),
        ("--- {}\n--- {}", "expected a single document"),
        ('name: "a\\0b"', "name: found 'a\\\\x00b', expected text"),
        ('name: "a\\nb"', "name: found 'a\\\\nb', expected text"),
        ('folder: "a\\0b"', "folder: found 'a\\\\x00b', expected a path"),
        (b"name: \xff", "can't decode byte"),
    ],
)
def test_a_file_of_other_things_is_refused_in_one_line(text: Any, named: str, read: Any) -> None:
    with pytest.raises(InputError, match=named) as error:
        read(text)
    assert len(str(error.value)) < 1000


def test_a_surrogate_is_no_text() -> None:
    for name in ("name", "folder"):
        with pytest.raises(InputError, match=f"^{name}: found .*udc80"):
            parse(f"--{name}", "\udc80")


def test_a_file_is_refused_at_once_where_it_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as unused:
        unused.bind(str(tmp_path / "socket"))
    for place in (tmp_path, tmp_path / "fifo", tmp_path / "socket", "/dev/zero", "x" * 5000):
        with pytest.raises(InputError, match="^config_path: found ") as error:
            parse("--config_path", place)
        assert len(str(error.value)) < 6000


def test_home_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("--folder=~/runs").folder == f"{tmp_path}/runs"
    assert type(parse("--folder=~/runs").folder) is str
    assert parse("--model", "~/x.pt").model == f"{tmp_path}/x.pt"
    assert parse("--model=None").model == ""
    assert read("folder: ~/runs\nname: ~/x").folder == f"{tmp_path}/runs"
    assert read("folder: ~/runs\nname: ~/x").name == "~/x"  # no path
    (tmp_path / "at_home.yaml").write_text("count: 3")
    assert parse("--config_path=~/at_home.yaml").count == 3
    assert parse("--folder", "a~b/~").folder == "a~b/~"


def test_no_home_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="^folder: found '~nobody-here/x'"):
        parse("--folder", "~nobody-here/x")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # KeyError, as of an unknown user
    for options in (["--folder", "~/x"], ["--config_path", "~/x"], ["--model=~/x"]):
        with pytest.raises(InputError, match="found '~/x', but ~ is not a known home directory"):
            parse(*options)


def test_an_option_of_wandbs_own_is_ignored() -> None:
    assert parse("--_wandb={'x': 1}", "--count", 2) == Options(count=2)


def test_the_last_of_an_option_counts_and_the_help_says_so(
    capsys: pytest.CaptureFixture,
) -> None:
    assert parse("--count", 2, "--count=3").count == 3
    with pytest.raises(SystemExit):
        parse("--help")
    printed = capsys.readouterr().out
    assert "given twice, the last value counts" in printed and "_wandb" not in printed


@pytest.fixture
def two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Options that name two files, which lie in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("task.yaml").write_text("count: 2\nfactor: 2.0\nlabel: task\n")
    Path("method.yaml").write_text("factor: 3.0\nlabel: null\n")
    return "--config_path", "task.yaml", "--config_path=method.yaml"


def test_later_files_win_over_earlier_ones_and_the_command_line_over_all(
    two_files: tuple[str, ...],
) -> None:
    assert parse(*two_files) == Options(count=2, factor=3.0)
    assert parse(*two_files, "--factor", 4) == Options(count=2, factor=4.0)
    assert parse("--factor", 4, *two_files) == Options(count=2, factor=4.0)
    other_order = parse("--config_path=method.yaml", *two_files[:2])
    assert other_order == Options(count=2, factor=2.0, label="task")
    assert parse(*two_files[:2] * 2) == parse(*two_files[:2])  # as the sweep of methods does


def test_of_several_files_the_one_with_the_error_is_named(two_files: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="^config_path: found 'none.yaml', expected a YAML file"):
        parse(*two_files, "--config_path", "none.yaml")
    Path("method.yaml").write_text("factor: many\nname: ''\nno_such: 1\n")
    for fixed, found in (
        ((), "no_such: there is no such option; .* (in 'method.yaml')"),
        (("no_such: 1\n", ""), "factor: found 'many', expected a number (in 'method.yaml')"),
        (("many", "1"), "name: found '', expected a name (in 'method.yaml')"),
    ):
        text = Path("method.yaml").read_text()
        Path("method.yaml").write_text(text.replace(*fixed) if fixed else text)
        pattern = found.replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(InputError, match=f"^{pattern}$"):
            parse(*two_files)
    with pytest.raises(InputError, match="^factor: found 'x', expected a number$"):
        parse(*two_files, "--factor=x")  # not from a file


def test_the_help_tells_once_that_files_may_be_several(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("--config_path path YAML file of options. May be repeated: ") == 1
    assert printed.count("--count") == 2  # in the usage and in the list


def test_what_a_run_writes_reads_back(tmp_path: Path) -> None:
    config = Options(count=7, factor=-math.inf, name="12:30", label="null", folder="~x y: z")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(vars(config)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.path.expanduser", lambda text: text.replace("~x", "/x"))
        assert parse("--config_path", path) == Options(**vars(config) | {"folder": "/x y: z"})
