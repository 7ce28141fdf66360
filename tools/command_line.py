"""What the command lines of these tools have in common: errors are one line and an exit code."""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from runs.errors import InputError, RunError


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and raises `InputError` for what it cannot parse."""

    def __init__(self, description: str):
        super().__init__(description=description.partition("\n")[0], allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the options)")


def one_line_errors(main: Callable[..., None]) -> Callable[..., int]:
    """`main` as a program: returns its exit code, and says in one line what went wrong."""

    @functools.wraps(main)
    def program(*args: list[str]) -> int:
        try:
            main(*args)
        except (InputError, RunError) as error:
            name = Path(main.__code__.co_filename).name
            print(f"{name}: error:", *str(error).split(), file=sys.stderr)
            return error.exit_code
        return 0

    return program
