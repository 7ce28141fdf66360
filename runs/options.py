"""The command line: options of a dataclass from YAML files and arguments, checked."""

import argparse
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, get_args
from unittest import mock

import pyrallis
import yaml

from runs.errors import InputError, close_matches

Ranges = list[tuple[str, Callable[[Any, Any], Any], str]]  # options, what must hold, in words


HOLDS: dict[str, tuple[Callable[[Any], Any], str]] = {  # ranges: what must hold, and in words
    ">= 1": (lambda x: x >= 1, "1 or more"),
    ">= 0": (lambda x: 0 <= x < math.inf, "0 or more"),
    "> 0": (lambda x: 0 < x < math.inf, "a number above 0"),
    "0 to 1": (lambda x: 0 <= x <= 1, "0 to 1"),
    "finite": (math.isfinite, "a finite number"),
    "not nan": (lambda x: not math.isnan(x), "a number"),
    "device": (
        lambda x: re.fullmatch(r"auto|cpu|cuda(:[1-9]?\d)?", x),
        "cuda, cuda:N, cpu or auto",
    ),
    "precision": (lambda x: x in ("float32", "tf32"), "float32, tf32"),
    "name": (lambda x: x and "/" not in x, "a name without /, as it begins a directory's"),
    "path": (lambda x: x != "", "a path"),
    "seed": (lambda x: 0 <= x < 2**32, "0 to 2**32 - 1"),
}


def option(default: Any, values: str) -> Any:
    """An option with a range of values, a key of `HOLDS`; null is allowed where the type is."""
    return dataclasses.field(default=default, metadata={"values": values})


def may_change(default: Any, values: str = "") -> Any:
    """An option that may change between two starts of one run: it does not change what is learned.

    A change of any other option makes another run.
    """
    metadata = {"may_change": True} | ({"values": values} if values else {})
    return dataclasses.field(default=default, metadata=metadata)


def identify(config: Any, dataset: Optional[str], task: str) -> dict[str, Any]:
    """What makes two commands the same run: the options that may not change within a run.

    Only those that differ from the defaults count, so that new options leave old runs their names.
    `dataset_path` counts by the dataset's name and bytes, wherever it lies; of a root folder with
    datasets by task (those have a "/"), only the task's own counts.
    """
    options = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "may_change" not in field.metadata and value != field.default:
            options[field.name] = value
    if dataset is not None:
        path = Path(dataset, task if "/" in task else "")
        files = [file for file in (path, *path.rglob("*")) if file.is_file()]
        options["dataset_path"] = [path.name, sum(file.stat().st_size for file in files)]
    return options


def name_run(prefix: str, identity: dict[str, Any]) -> str:
    """Name of a run: the prefix and a digest of what makes it this run."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{prefix}-{digest[:8]}".replace("/", "-")


def value_type(kind: Any) -> type:
    """int of int and of Optional[int], and so on."""
    return (*get_args(kind), kind)[0]


def cast(value: Any, kind: Any) -> Any:
    """A YAML value as an option's type; raises TypeError or ValueError where it does not fit."""
    if value is None and type(None) in get_args(kind):
        return None
    kind = value_type(kind)
    accepted = {bool: bool, str: (str, int, float)}.get(kind, (int, float, str))
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
        raise TypeError
    if kind is int and not isinstance(value, int) and not (value := float(value)).is_integer():
        raise ValueError
    return kind(value)


def make_config(config_class: type, ranges: Ranges, options: dict[Any, Any]) -> Any:
    """Options as YAML gives them, checked; raises `InputError` for the first that is wrong."""
    kinds = config_class.__annotations__
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    for name, value in options.items():
        if name not in kinds:
            close = close_matches(str(name), kinds)
            raise InputError(f"{name}: there is no such option; close matches: {close}")
        try:
            options[name] = cast(value, kinds[name])
        except (TypeError, ValueError, OverflowError):
            expected = words[value_type(kinds[name])]
            found = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}..."
            raise InputError(f"{name}: found {found}, expected {expected}") from None
    config = config_class(**options)
    for field in dataclasses.fields(config_class):
        value = getattr(config, field.name)
        if "values" in field.metadata and value is not None:
            holds, expected = HOLDS[field.metadata["values"]]
            if not holds(value):
                null = " or null" if type(None) in get_args(kinds[field.name]) else ""
                raise InputError(f"{field.name}: found {value!r}, expected {expected}{null}")
    for names, holds, expected in ranges:
        for name in names.split():
            if not holds(value := getattr(config, name), config):
                raise InputError(f"{name}: found {value!r}, expected {expected}")
    return config


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML itself takes the last of two equal keys in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [str(key.value) for key, _ in node.value]
        if len(keys) > len(set(keys)):
            raise ValueError(f"{max(keys, key=keys.count)} is given twice")
        return super().construct_mapping(node, deep)


def read_config_file(path: str) -> dict[Any, Any]:
    """The options in a YAML file; raises `InputError` where it holds none."""
    try:
        with open(path, encoding="utf-8") as file:
            options = yaml.load(file, UniqueKeyLoader)
        if not isinstance(options, dict):
            raise ValueError(
                "it is empty" if options is None else f"it holds {str(options)[:80]!r}"
            )
        return options
    except (OSError, yaml.YAMLError, ValueError, TypeError) as error:
        raise InputError(
            f"config_path: found {path!r}, expected a YAML file of options ({error})"
        ) from None


class ConfigParser(pyrallis.argparsing.ArgumentParser):
    """pyrallis' command line over a YAML file over defaults; the values are read and checked here.

    Raises `InputError` for an unknown option, a wrong type or an impossible value.
    """

    def __init__(self, config_class: type, ranges: Ranges):
        # pyrallis would read the class' source anew for the comment of each option
        with mock.patch.object(inspect, "getsource", functools.cache(inspect.getsource)):
            super().__init__(config_class=config_class, allow_abbrev=False)
        self.ranges = ranges
        self._negative_number_matcher = re.compile(r"-[\d.]")  # -.inf is a value, not an option

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the options)")

    def parse_known_args(self, args: Optional[list[str]] = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        if {"-h", "--help"} & set(args):  # pyrallis would refuse the values that stand beside it
            args = ["--help"]
        return super().parse_known_args(args, namespace)

    def _postprocessing(self, parsed: argparse.Namespace) -> Any:
        given, kinds = vars(parsed), self.config_class.__annotations__
        options = read_config_file(given.pop("config_path")) if "config_path" in given else {}
        for name, text in given.items():
            try:  # text is taken as it is
                is_text = value_type(kinds[name]) is str and text != "null"
                options[name] = text if is_text else yaml.safe_load(text)
            except (yaml.YAMLError, ValueError):
                raise InputError(f"{name}: found {text[:80]!r}, expected a YAML value") from None
        return make_config(self.config_class, self.ranges, options)
