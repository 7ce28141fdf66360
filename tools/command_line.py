"""What the command lines of these tools have in common."""

import argparse
import os
from pathlib import Path
from typing import NoReturn

from runs.errors import InputError


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and raises `InputError` for what it cannot parse."""

    def __init__(self, description: str):
        super().__init__(description=description.partition("\n")[0], allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the options)")


def user_path(text: str) -> Path:
    """A path argument. `~` is the home directory: no shell expands it in `--option=~/x`."""
    return Path(os.path.expanduser(text))
