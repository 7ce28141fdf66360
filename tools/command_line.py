"""What the command lines of these tools have in common."""

import argparse
from typing import NoReturn

from runs.errors import InputError


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and raises `InputError` for what it cannot parse."""

    def __init__(self, description: str):
        super().__init__(description=description.partition("\n")[0], allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the options)")
