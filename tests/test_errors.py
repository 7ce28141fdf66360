"""How programs end after any error: with one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT
from runs.errors import check_regular, describe, is_system_error, open_regular

PROGRAM = """
import argparse, os, signal, sys
from runs.errors import InputError, OutputLost, RunError, Stop, run_program
def main():
    {}
sys.exit(run_program(main, "program", goes_on={}))
"""
PRINTS = "[print(i) for i in range(10**5)]; open('done', 'w')"  # more than a pipe holds


def run(folder: Path, body: str, goes_on: bool = False, shell: str = "", **env: str) -> Any:
    """Run a program whose `main` is `body`; the command line ends with `shell`."""
    script = folder / "program.py"
    script.write_text(PROGRAM.format(body, goes_on), encoding="utf-8")
    command = f"set -o pipefail; {sys.executable} {script} {shell}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    options = dict(cwd=folder, env=env, capture_output=True, text=True, errors="backslashreplace")
    return subprocess.run(["bash", "-c", command], **options)


def ended(result: Any, code: int, line: str = "") -> bool:
    assert (result.returncode, result.stderr) == (code, f"program: {line}\n" if line else "")
    return True


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("pass", 0, ""),
        ("raise InputError('a\\n  b')", 2, "error: a b"),
        ("raise RunError('a')", 1, "error: a"),
        (
            "raise Stop(signal.SIGTERM)",
            143,
            "stopped: by SIGTERM; run the same command to continue",
        ),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "stopped: by SIGINT"),
        ("raise MemoryError", 1, "error: there is too little memory (MemoryError)"),
        ("raise RuntimeError('CUDA out of memory. Tried')", 1, None),
        ("open('nowhere')", 1, "error: [Errno 2] No such file or directory: 'nowhere'"),
        ("(f := lambda: f())()", 1, None),
        ("open('x' * 5000)", 1, None),
        ("raise InputError('\\x1b é \\udc80')", 2, None),
    ],
)
def test_a_program_ends_with_one_line_and_a_code(
    body: str, code: int, line: str | None, tmp_path: Path
) -> None:
    result = run(tmp_path, body, PYTHONIOENCODING="ascii:strict")
    if line is not None:
        assert ended(result, code, line)
    assert result.returncode == code and result.stderr.count("\n") <= 1


def test_a_mistake_in_the_code_shows_where_it_is(tmp_path: Path) -> None:
    result = run(tmp_path, "1 / 0")
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_letters_that_the_terminal_cannot_print_are_escaped(tmp_path: Path) -> None:
    result = run(tmp_path, r"print('é \udc80 x')", PYTHONIOENCODING="ascii:strict")
    assert ended(result, 0) and result.stdout == "\\xe9 \\udc80 x\n"


HELP = "argparse.ArgumentParser(prog='x' * 9999).parse_args(['--help'])"


@pytest.mark.parametrize("body", [PRINTS, HELP])
def test_a_tool_whose_output_is_lost_ends(body: str, tmp_path: Path) -> None:
    full = "error: standard output: [Errno 28] No space left on device; make room"
    assert ended(run(tmp_path, body, shell=">/dev/full"), 1, full)
    assert ended(run(tmp_path, body, shell="| true"), 128 + signal.SIGPIPE)
    assert not (tmp_path / "done").exists()
    assert ended(run(tmp_path, body, shell=">&-"), 0)
    assert ended(run(tmp_path, body, shell="2>&-"), 0)


@pytest.mark.parametrize("shell", ["| true", ">/dev/full", ">&-", ">&- 2>&-", "2>&1 | true"])
def test_a_run_whose_output_is_lost_goes_on(shell: str, tmp_path: Path) -> None:
    body = f"{PRINTS}; print('bar', file=sys.stderr); raise InputError('x')"
    result = run(tmp_path, body, goes_on=True, shell=shell)
    lines = ["bar", "program: error: x"] if "2>&" not in shell else []
    if shell == ">/dev/full":
        lines.insert(
            0, "program: standard output is lost ([Errno 28] No space left on device; make room)"
        )
    assert (result.returncode, result.stderr.splitlines()) == (2, lines)
    assert (tmp_path / "done").exists()


def test_programs_that_it_starts_have_streams_although_its_own_were_closed(tmp_path: Path) -> None:
    body = "import subprocess; open('done', 'w').write(str(subprocess.call(['ls', '.'])))"
    for shell in (">&-", "2>&-", ">&- 2>&-"):
        assert run(tmp_path, body, shell=shell).returncode == 0
        assert (tmp_path / "done").read_text() == "0"


def test_a_user_without_a_home_gets_one(tmp_path: Path) -> None:
    body = (
        "import pwd; print(os.environ['HOME'], os.path.expanduser('~/x')); "
        "from runs.errors import expand_home; expand_home('~/x', 'folder')"
    )
    code = "import pwd; pwd.getpwuid = lambda uid: dict()[uid]"
    (tmp_path / "sitecustomize.py").write_text(code)
    env = {"TMPDIR": str(tmp_path), "PYTHONPATH": f"{ROOT}:{tmp_path}", "HOME": ""}
    result = run(tmp_path, body, **env)
    place = tmp_path / f"home-{os.getuid()}"
    assert result.stdout == f"{place} {place}/x\n"
    first, second = result.stderr.splitlines()
    assert first == f"this user has no home directory; HOME is {place}"
    assert second.startswith("program: error: folder: found '~/x', but ~ is not a known home")
    assert place.stat().st_mode & 0o777 == 0o700


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for place in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        for mode in ("rb", "ab", "w"):
            with pytest.raises(OSError, match="expected a") as error:
                open_regular(place, mode)
            assert not is_system_error(error.value)  # it is what was asked for
    with pytest.raises(FileNotFoundError):
        check_regular(tmp_path / "nowhere")
    with open_regular(tmp_path / "new", "w") as file:
        file.write("x")


def test_what_the_system_refuses_is_told_from_what_a_file_holds() -> None:
    assert is_system_error(OSError(errno.ESTALE, "Stale file handle"))
    assert is_system_error(MemoryError()) and is_system_error(RuntimeError("CUDA out of memory"))
    assert not is_system_error(OSError("truncated file"))
    assert not is_system_error(ValueError("x")) and not is_system_error(RuntimeError("x"))
    denied = describe(PermissionError(errno.EACCES, "Permission denied", "x"))
    assert denied == "[Errno 13] Permission denied: 'x'; check the permissions"
    locked = BlockingIOError(errno.EAGAIN, "Unable to open file (unable to lock file, errno = 11)")
    assert "HDF5_USE_FILE_LOCKING=FALSE" in describe(locked)
