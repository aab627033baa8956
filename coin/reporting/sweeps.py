"""The table of a sweep, ``sweep.csv``: made from its points' results, shown in the terminal, and read back."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from coin.errors import FileError
from coin.files.atomic import is_folder_name
from coin.reporting.frames import one_line, read_frame
from coin.reporting.results import COLUMNS, INTEGERS, KEYS, NUMBERS, read_results
from coin.reporting.summary import seed_means
from coin.reporting.table import decoder_heading

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


def sweep_frame(points: Sequence[tuple[Mapping[str, Any], Sequence[Path]]]) -> pd.DataFrame:
    """Return the rows of all points' results: the columns of ``results.csv`` behind one column per swept key.

    Args:
        points: The swept keys' values and the seeds' folders of every finished point. A value that is a list or a
            section is written as JSON.

    Raises:
        FileError: A point's results are missing or damaged.
    """
    frames = []
    for values, folders in points:
        frame = pd.concat([read_results(folder) for folder in folders], ignore_index=True)
        for place, (key, value) in enumerate(values.items()):
            plain = value if isinstance(value, bool | int | float | str) else as_text(value)
            frame.insert(place, key, [plain] * len(frame))
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def sweep_table(frame: pd.DataFrame, swept: Sequence[str], title: str) -> Table:
    """Return a table of mean NDA in %, a line per point and method, a column per decoder.

    Points that differ in their seeds alone share a line: mean ± standard deviation over seeds. The oracle, whose NDA
    is 1 everywhere, is left out.

    Args:
        frame: What `sweep_frame` returns.
        swept: The swept keys, the frame's first columns.
        title: The table's title.
    """
    points = frame[["experiment", *swept]].drop_duplicates("experiment")
    means = seed_means(frame[frame["method"] != "oracle"].drop(columns=list(swept))).merge(points, on="experiment")
    keys = [key for key in swept if key != SEEDS]
    heads = [*keys, *(["erased"] if means["erased"].nunique() > 1 else []), "method", "batchnorm"]
    decoders = list(dict.fromkeys(means["decoder"]))
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(Text({"batchnorm": "BatchNorm"}.get(head, head.rsplit(".")[-1])), overflow="fold")
    for decoder in decoders:
        table.add_column(decoder_heading(decoder), justify="right", overflow="fold")
    for _, lines in means.groupby(keys, sort=False, dropna=False) if keys else [((), means)]:
        for line, group in lines.groupby(heads, sort=False, dropna=False):
            cells = [_cell(group.loc[group["decoder"] == decoder, "nda"]) for decoder in decoders]
            table.add_row(*(Text(str(part) or "–") for part in line), *cells)
        table.add_section()
    return table


def as_text(value: Any) -> str:
    """Return a value as a command line or a table holds it: text as it stands, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_numbers(values: "pd.Series[Any]") -> "pd.Series[Any]":
    """Return the values of an option as numbers where all of them are, else as they stand."""
    numbers = pd.to_numeric(values, errors="coerce")
    return values if numbers.isna().any() else numbers


def _cell(values: "pd.Series[float]") -> Text:
    if values.empty or values.isna().any():
        return Text("–")
    spread = f" ± {100 * values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return Text(f"{100 * values.mean():.1f}{spread}")


def _without_name() -> list[str]:
    return [name for name in KEYS if name != "experiment"]


def _short_names(keys: list[str]) -> dict[str, str]:
    last = [key.rsplit(".")[-1] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def _named(values: tuple[str, ...]) -> dict[str, str]:
    return {value: value if len(value) <= _LONGEST else f"#{place}" for place, value in enumerate(values)}
