"""The table of a sweep, ``sweep.csv``: made from its points' results, and read back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from coin.errors import FileError
from coin.files.atomic import is_folder_name
from coin.files.yaml import as_text
from coin.reporting.results import COLUMNS, INTEGERS, KEYS, NUMBERS, read_frame, read_results
from coin.reporting.summary import seed_means, variant_names
from coin.reporting.text import percent

SWEEP_CSV = "sweep.csv"
SWEEP_YAML = "sweep.yaml"  # the sweep's own file, kept beside its table
SEEDS = "seeds"
_LONGEST = 24  # longer values are named by their place among the values


@dataclass(frozen=True)
class Sweep:
    """A finished sweep. Points that differ in their seeds alone are one experiment of it."""

    name: str  # its folder's
    swept: Mapping[str, tuple[str, ...]]  # every option's values, as they appear, by its short name, but for seeds
    options: Mapping[str, Mapping[str, str]]  # each experiment's values of these, a long one by its place; or nothing
    frame: pd.DataFrame  # all rows of ``results.csv``; ``experiment`` says the options, or is the sweep's name
    points: tuple[str, ...]  # their folders


def read_sweep_table(folder: Path) -> Sweep | None:
    """Return the sweep whose folder this is, None where it holds no ``sweep.csv``; FileError where that is damaged."""
    path = folder / SWEEP_CSV
    if not path.is_file():
        return None
    frame = read_frame(path, COLUMNS, INTEGERS, NUMBERS)
    keys = [name for name in frame.columns if name not in (*COLUMNS, SEEDS)]
    if wrong := [name for name in frame["experiment"] if not is_folder_name(name)]:
        raise FileError(f"'{path}' has the experiment {wrong[0]!r}, expected a folder's name; make it again")
    name, short = folder.resolve().name, short_names(keys)
    points = tuple(dict.fromkeys(frame["experiment"]))
    swept = {short[key]: tuple(dict.fromkeys(frame[key])) for key in keys}
    options, parts = {}, []
    for values, part in frame.groupby(keys, sort=False) if keys else [((), frame)]:
        named = zip((short[key] for key in keys), map(str, values), strict=True)
        own = {option: short_value(value, swept[option]) for option, value in named}
        label = ", ".join(f"{option} {value}" for option, value in own.items()) or name
        options[label] = own
        parts.append(part[list(COLUMNS)].assign(experiment=label))
    rows = pd.concat(parts, ignore_index=True).drop_duplicates(list(KEYS), ignore_index=True)  # a seed run twice is one
    return Sweep(name, swept, options, rows, points)


def sweep_frame(
    points: Sequence[tuple[Mapping[str, Any], Sequence[Path]]],
    read: Callable[[Path], pd.DataFrame | None] = read_results,
) -> pd.DataFrame | None:
    """Return the rows of all points' results behind one column per swept key, None where there are none.

    `points` are the swept keys' values (a list or a section becomes JSON) and the seeds' folders of every finished
    point; `read` returns a seed's rows, those of ``results.csv`` or of ``promise.csv``.
    """
    frames = []
    for values, folders in points:
        rows = [own for folder in folders if (own := read(folder)) is not None]
        if not rows:
            continue
        frame = pd.concat(rows, ignore_index=True)
        for place, (key, value) in enumerate(values.items()):
            plain = value if isinstance(value, bool | int | float | str) else as_text(value)
            frame.insert(place, key, [plain] * len(frame))
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else None


def sweep_text(frame: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """Return mean NDA ± spread in % of rows of results as text, a line per point and method, a column per decoder.

    The options of `points` are by experiment; points that differ in their seeds alone share a line.
    """
    keys = [str(key) for key in points.columns]
    means = seed_means(frame[frame["method"] != "oracle"])
    decoders = list(dict.fromkeys([*means.loc[means["method"] != "none", "decoder"], *means["decoder"]]))
    means = means.assign(method=variant_names(means)).merge(points, left_on="experiment", right_index=True)
    heads = [*keys, *(["erased"] if means["erased"].nunique() > 1 else []), "method"]
    lines = []
    means = means.assign(place=means.groupby(keys, sort=False, dropna=False).ngroup() if keys else 0)
    for (_, *head), part in means.sort_values("place", kind="stable").groupby(["place", *heads], sort=False):
        ndas = {decoder: part.loc[part["decoder"] == decoder, "nda"] for decoder in decoders}
        cells = {d: percent(x.mean(skipna=False), x.std(), digits=1) if len(x) else "–" for d, x in ndas.items()}
        lines.append(dict(zip(heads, map(str, head), strict=True)) | cells)
    return pd.DataFrame(lines, columns=[*heads, *decoders])


def legend(sweep: Sweep) -> pd.DataFrame:
    """Return a line for every value that is too long for a table: the option, what stands for it, and the value."""
    lines = [
        {"option": option, "shown as": short_value(value, every), "value": value}
        for option, every in sweep.swept.items()
        for value in every
    ]
    return pd.DataFrame([line for line in lines if line["shown as"] != line["value"]])


def short_value(value: str, every: Sequence[str]) -> str:
    """Return a value as tables show it: a long one by its place among `every` value."""
    return value if len(value) <= _LONGEST else f"#{every.index(value)}"


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each swept key, the whole key where another ends alike or a column is called so."""
    last = [key.rsplit(".")[-1] for key in keys]
    pairs = zip(keys, last, strict=True)
    return {key: name if last.count(name) == 1 and name not in COLUMNS else key for key, name in pairs}
