"""The command line: options of a dataclass from YAML files and arguments, checked."""

import argparse
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Optional, get_args, get_type_hints
from unittest import mock

import pyrallis
import yaml

from runs.errors import (
    InputError,
    close_matches,
    describe,
    expand_home,
    open_regular,
    shortened,
)

Ranges = list[tuple[str, Callable[[Any, Any], Any], str]]  # options, what must hold, in words

NULLS = {"null", "Null", "NULL", "~", "None"}  # the last is what `wandb agent` makes of null
BOOLEANS = {"true": True, "True": True, "TRUE": True}
BOOLEANS |= {"false": False, "False": False, "FALSE": False}


class FilePath(str):
    """The type of options that name a file or a folder: a str in which ~ is the home directory."""


FilePath.__name__ = "path"  # for --help

WORDS = {
    bool: "true or false",
    int: "a whole number below 2**63",
    float: "a number",
    str: "text without control characters",
    FilePath: "a path without control characters",
}


# ---------------------------------------------------------------------------- options

HOLDS: dict[str, tuple[Callable[[Any], Any], str]] = {  # ranges: what must hold, and in words
    ">= 1": (lambda x: x >= 1, "1 or more"),
    ">= 0": (lambda x: 0 <= x < math.inf, "0 or more"),
    "> 0": (lambda x: 0 < x < math.inf, "a number above 0"),
    "0 to 1": (lambda x: 0 <= x <= 1, "0 to 1"),
    "finite": (math.isfinite, "a finite number"),
    "< inf": (lambda x: x < math.inf, "a number below inf"),
    "device": (
        lambda x: re.fullmatch(r"auto|cpu|cuda(:[1-9]?\d)?", x),
        "cuda, cuda:N, cpu or auto",
    ),
    "precision": (lambda x: x in ("float32", "tf32", "bf16"), "float32, tf32, bf16"),
    "name": (lambda x: x and "/" not in x, "a name without /, as it begins a directory's"),
    "path": (lambda x: x != "", "a path"),
    "seed": (lambda x: 0 <= x < 2**32, "0 to 2**32 - 1"),
}


def option(default: Any, values: str) -> Any:
    """An option with a range of values, a key of `HOLDS`; an Optional type also allows null."""
    return dataclasses.field(default=default, metadata={"values": values})


def may_change(default: Any, values: str = "") -> Any:
    """An option that may change between two starts of one run: it does not change what is learned.

    A change of any other option makes another run.
    """
    metadata = {"may_change": True} | ({"values": values} if values else {})
    return dataclasses.field(default=default, metadata=metadata)


def identify(config: Any) -> dict[str, Any]:
    """What makes two commands the same run: the options that may not change within a run.

    Only values other than the defaults count, so a new option does not rename old runs.
    `dataset_path` counts by the dataset's name and size, not its folder. For a root folder with a
    dataset per task (whose id has a "/"), only the task's own dataset counts.
    """
    options = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "may_change" not in field.metadata and value != field.default:
            options[field.name] = value
    if config.dataset_path is not None:
        path = Path(config.dataset_path, config.env if "/" in config.env else "")
        inside = [os.path.join(folder, f) for folder, _, files in os.walk(path) for f in files]
        sizes = [os.path.getsize(file) for file in (path, *inside) if os.path.isfile(file)]
        options["dataset_path"] = [path.name, sum(sizes)]
    return options


def name_run(prefix: str, identity: dict[str, Any]) -> str:
    """Name of a run: the prefix and a digest of what makes it this run."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{prefix}-{digest[:8]}".replace("/", "-")


# ---------------------------------------------------------------------------- values


def resolve(text: str) -> Optional[str]:
    """None if an unquoted text means null; otherwise the text as it was written."""
    return None if text in NULLS else text


def value_type(kind: Any) -> type:
    """int of int and of Optional[int], and so on."""
    return (*get_args(kind), kind)[0]


def whole_number(text: str) -> int:
    """In decimal digits, zeros in front or not, or as a float's text: 1e6."""
    try:
        number = int(text)
    except ValueError:
        if not float(text).is_integer():
            raise
        number = int(float(text))
    if abs(number) >= 2**63:
        raise ValueError
    return number


def real_number(text: str) -> float:
    """As Python reads it, or as YAML writes infinity: -.inf."""
    number = float(re.sub(r"^([-+]?)\.(?=inf$|nan$)", r"\1", text, flags=re.IGNORECASE))
    if math.isinf(number) and "inf" not in text.lower():  # too large for a float
        raise ValueError
    return number


def cast(text: Optional[str], kind: Any) -> Any:
    """A value as its option's type; raises LookupError, TypeError or ValueError for another."""
    if text is None:
        if type(None) in get_args(kind):
            return None
        if kind is FilePath:  # "" is its null
            return ""
        raise TypeError
    kind = value_type(kind)
    if kind in (str, FilePath):
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
            raise ValueError
        return text
    return {bool: BOOLEANS.__getitem__, int: whole_number, float: real_number}[kind](text)


def cast_option(name: str, text: Optional[str], kind: Any) -> Any:
    """`cast`, naming the option in an `InputError`."""
    try:
        value = cast(text, kind)
    except (LookupError, TypeError, ValueError):
        found = "null" if text is None else shortened(repr(text))
        expected = WORDS[value_type(kind)] + (" or null" if type(None) in get_args(kind) else "")
        raise InputError(f"{name}: found {found}, expected {expected}") from None
    return expand_home(value, name) if value and value_type(kind) is FilePath else value


def make_config(config_class: type, ranges: Ranges, options: dict[str, Optional[str]]) -> Any:
    """Options from their texts, checked; raises `InputError` for the first that is wrong."""
    kinds = get_type_hints(config_class)
    for name in options:
        if name not in kinds:
            close = close_matches(name, kinds)
            raise InputError(f"{name}: there is no such option; close matches: {close}")
    values = {name: cast_option(name, text, kinds[name]) for name, text in options.items()}
    config = config_class(**values)
    check_values(config, kinds)
    for names, holds, expected in ranges:
        for name in names.split():
            if not holds(value := getattr(config, name), config):
                raise InputError(f"{name}: found {shortened(repr(value))}, expected {expected}")
    return config


def saved_config(config_class: type, ranges: Ranges, values: Any, path: Path) -> Any:
    """The options that the checkpoint at `path` holds, checked like those of a command line."""
    try:
        if not isinstance(values, dict):
            raise InputError(f"found {shortened(repr(values))}, expected options")
        texts = {str(k): None if v is None else str(v) for k, v in values.items()}
        return make_config(config_class, ranges, texts)
    except InputError as error:
        raise InputError(f"{path} is not a valid checkpoint (config: {error})") from None


def check_values(config: Any, kinds: dict[str, Any]) -> None:
    """Raise `InputError` for the first value out of its option's range."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "values" in field.metadata and value is not None:
            holds, expected = HOLDS[field.metadata["values"]]
            if not holds(value):
                null = " or null" if type(None) in get_args(kinds[field.name]) else ""
                found = shortened(repr(value))
                raise InputError(f"{field.name}: found {found}, expected {expected}{null}")


# ---------------------------------------------------------------------------- files


def node_text(name: str, node: yaml.Node) -> Optional[str]:
    """The value of a YAML node, as it is written; raises ValueError if it is not one text."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{name}: found a {node.id}, expected one value")
    if node.tag != yaml.BaseLoader.DEFAULT_SCALAR_TAG:
        raise ValueError(f"{name}: found the tag {node.tag}, expected a value without")
    is_quoted = node.style is not None
    return node.value if is_quoted or node.value not in {*NULLS, ""} else None


def read_config_file(path: str) -> dict[str, Optional[str]]:
    """The options in a YAML file, as texts; raises `InputError` if it holds none."""
    options: dict[str, Optional[str]] = {}
    try:
        with open_regular(Path(expand_home(path, "config_path")), "r", encoding="utf-8") as file:
            root = yaml.compose(file, yaml.BaseLoader)
        if not isinstance(root, yaml.MappingNode):
            raise ValueError("it holds no options" if root else "it is empty")
        for key, node in root.value:
            name = str(key.value)
            if name in options:  # YAML would silently take the last
                raise ValueError(f"{name} is given twice")
            options[name] = node_text(name, node)
        return options
    except (OSError, MemoryError, RecursionError, yaml.YAMLError, ValueError) as error:
        expected = f"expected a YAML file of options ({describe(error)})"
        raise InputError(f"config_path: found {shortened(repr(path))}, {expected}") from None


# ---------------------------------------------------------------------------- the command line


class ConfigParser(pyrallis.argparsing.ArgumentParser):
    """pyrallis' command line over YAML files over defaults; the values are read and checked here.

    Raises `InputError` for an unknown option, a wrong type or an impossible value.
    """

    def __init__(self, config_class: type, ranges: Ranges):
        epilog = "If an option is given twice, the last value counts, except for --config_path."
        settings = dict(allow_abbrev=False, conflict_handler="resolve", epilog=epilog)
        # pyrallis would read the class' source anew for the comment of each option
        with mock.patch.object(inspect, "getsource", functools.cache(inspect.getsource)):
            super().__init__(config_class=config_class, **settings)
        about = "YAML file of options. May be repeated: later files override earlier ones, "
        about += "and the command line overrides all"
        # in the place of pyrallis' own, which takes one file
        self.add_argument("--config_path", action="append", metavar="path", help=about)
        self.add_argument("--_wandb", help=argparse.SUPPRESS)  # `wandb agent` adds it
        self.ranges = ranges
        # what begins like a number is a value, not an option
        self._negative_number_matcher = re.compile(r"-(\d|\.|inf|nan)", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the options)")

    def parse_known_args(self, args: Optional[list[str]] = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        if {"-h", "--help"} & set(args):  # pyrallis would refuse other arguments beside it
            args = ["--help"]
        return super().parse_known_args(args, namespace)

    def _postprocessing(self, parsed: argparse.Namespace) -> Any:
        given = vars(parsed)
        given.pop("_wandb", None)
        options: dict[str, Optional[str]] = {}
        files: dict[str, str] = {}  # for each option the file that its value is from
        for path in given.pop("config_path", []):
            found = read_config_file(path)
            options |= found
            files |= dict.fromkeys(found, path)
        options |= {name: resolve(text) for name, text in given.items()}
        try:
            return make_config(self.config_class, self.ranges, options)
        except InputError as error:
            name = str(error).partition(":")[0]
            if name in given or name not in files:
                raise
            raise InputError(f"{error} (in {shortened(repr(files[name]))})") from None
