"""A finished sweep's table, read back: its points side by side, those that differ in seeds or P alone put together."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from coin.errors import FileError
from coin.files.atomic import is_folder_name
from coin.reporting.frames import one_line, read_frame
from coin.reporting.results import COLUMNS, INTEGERS, KEYS, NUMBERS

SWEEP_CSV = "sweep.csv"
SWEEP_YAML = "sweep.yaml"
"""The sweep's own file, kept beside its table."""
SEEDS = "seeds"
_SAMPLES = "samples_per_task"
_LONGEST = 24
"""Longer values are named by their place among the values."""


@dataclass(frozen=True)
class SweptGroup:
    """Points of a sweep that differ in nothing but their seeds and P.

    Args:
        options: What the swept options were, each under its short name, as text; P and the seeds are not among them.
        frame: The points' rows of ``results.csv``.
    """

    options: Mapping[str, str]
    frame: pd.DataFrame

    @property
    def label(self) -> str:
        """The options in one line; nothing where only P or seeds were swept."""
        return ", ".join(f"{name} {value}" for name, value in self.options.items())


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Args:
        name: The sweep's name, which is its folder's.
        swept: What each option takes, in order of appearance, by its short name; P and seeds included.
        groups: Its points, put together.
        full: Whether the groups are all combinations of the options' values.
    """

    name: str
    swept: Mapping[str, tuple[str, ...]]
    groups: tuple[SweptGroup, ...]
    full: bool


def read_sweep_table(folder: Path) -> Sweep | None:
    """Return the sweep whose folder this is, None where it holds no ``sweep.csv``.

    Raises:
        FileError: The file is damaged.
    """
    path = folder / SWEEP_CSV
    if not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8", newline="") as file:
            keys = [name for name in next(csv.reader(file), []) if name not in COLUMNS]
    except (OSError, ValueError, csv.Error) as error:
        raise FileError(f"'{path}' cannot be read as CSV ({one_line(error)}); make it again") from error
    frame = read_frame(path, [*keys, *COLUMNS], INTEGERS, NUMBERS)
    if wrong := [name for name in frame["experiment"] if not is_folder_name(name)]:
        raise FileError(f"'{path}' has the experiment {wrong[0]!r}, expected a folder's name; make it again")
    short = _short_names(keys)
    swept = {short[key]: tuple(dict.fromkeys(frame[key])) for key in keys}
    named = {key: _named(swept[short[key]]) for key in keys}
    others = [key for key in keys if key != SEEDS and key.rsplit(".")[-1] != _SAMPLES]
    groups = []
    for values, part in frame.groupby(others, sort=False) if others else [((), frame)]:
        options = {short[key]: named[key][str(value)] for key, value in zip(others, values, strict=True)}
        # A seed that several points have run is one seed.
        groups.append(SweptGroup(options, part[list(COLUMNS)].drop_duplicates(_without_name(), ignore_index=True)))
    combinations = 1
    for key in others:
        combinations *= len(swept[short[key]])
    return Sweep(folder.resolve().name, swept, tuple(groups), len(groups) == combinations)


def as_numbers(values: "pd.Series[Any]") -> "pd.Series[Any]":
    """Return the values of an option as numbers where all of them are, else as they stand."""
    numbers = pd.to_numeric(values, errors="coerce")
    return values if numbers.isna().any() else numbers


def _without_name() -> list[str]:
    return [name for name in KEYS if name != "experiment"]


def _short_names(keys: list[str]) -> dict[str, str]:
    last = [key.rsplit(".")[-1] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def _named(values: tuple[str, ...]) -> dict[str, str]:
    return {value: value if len(value) <= _LONGEST else f"#{place}" for place, value in enumerate(values)}
