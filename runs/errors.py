"""Errors that end a program with one line and an exit code."""

import difflib
import os
from collections.abc import Iterable


class InputError(Exception):
    """A wrong option, file or device, in one line for the user."""

    exit_code = 2


class RunError(Exception):
    """Something that ends a run on its way, in one line for the user."""

    exit_code = 1


class DirectoryInUse(RunError):
    """Another process holds the run's directory."""

    exit_code = os.EX_TEMPFAIL  # 75: try again later


def close_matches(word: str, known: Iterable[str]) -> str:
    """For an error: those of `known` that a user may have meant, in words."""
    return ", ".join(difflib.get_close_matches(word, known)) or "none"
