"""The table of a sweep, ``sweep.csv``: made from its points' results, and read back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from coin.files.yaml import as_text
from coin.reporting.results import COLUMNS, INTEGERS, KEYS, NUMBERS, read_frame, read_results
from coin.reporting.summary import summarise, variant_names
from coin.reporting.text import percents

SWEEP_CSV = "sweep.csv"
SWEEP_YAML = "sweep.yaml"  # the sweep's own file, kept beside its table
SEEDS = "seeds"
_LONGEST = 16  # longer values are named by their place among the values


@dataclass(frozen=True)
class Sweep:
    """A finished sweep. Points that differ in their seeds alone are one experiment of it."""

    name: str  # its folder's
    # Each experiment's value of every option but the seeds, by its name in `frame`.
    options: pd.DataFrame
    # ``option``, ``shown as`` and ``value`` of values that are too long for a table.
    legend: pd.DataFrame
    # All rows of ``results.csv``; ``experiment`` says the options, or is the sweep's name.
    frame: pd.DataFrame


def read_sweep_table(folder: Path) -> Sweep | None:
    """Return the sweep whose folder this is, None where it holds no ``sweep.csv``; FileError where that is damaged."""
    path = folder / SWEEP_CSV
    if not path.is_file():
        return None
    frame = read_frame(path, COLUMNS, INTEGERS, NUMBERS)
    name = folder.resolve().name
    keys = [key for key in frame.columns if key not in (*COLUMNS, SEEDS)]
    options = frame[keys].rename(columns=short_names(keys))
    legend = []
    for option in options:
        values = options[option].unique().tolist()
        shown = {}
        for place, value in enumerate(values):
            shown[value] = value
            if len(value) > _LONGEST:
                shown[value] = f"#{place}"
                legend.append((option, shown[value], value))
        options[option] = options[option].map(shown)
    labels = []
    for _, *values in options.itertuples(name=None):  # without columns pandas 2 has no records
        words = [f"{option} {value}" for option, value in zip(options, values, strict=True)]
        labels.append(", ".join(words) or name)
    rows = frame[list(COLUMNS)].assign(experiment=labels)
    return Sweep(
        name=name,
        options=options.set_axis(labels).groupby(level=0, sort=False).first(),
        legend=pd.DataFrame(legend, columns=["option", "shown as", "value"]),
        # A seed that was run twice counts once.
        frame=rows.drop_duplicates(list(KEYS), ignore_index=True),
    )


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
        plain = {}
        for key, value in values.items():
            is_plain = isinstance(value, bool | int | float | str)
            plain[key] = value if is_plain else as_text(value)
        for folder in folders:
            rows = read(folder)
            if rows is not None:
                point = pd.DataFrame(plain, index=rows.index)
                frames.append(pd.concat([point, rows], axis=1))
    return pd.concat(frames, ignore_index=True) if frames else None


def sweep_text(sweep: Sweep) -> pd.DataFrame:
    """Return mean NDA ± spread in % as text: a line per experiment of a sweep and method, a column per decoder."""
    summary = summarise(sweep.frame)
    is_mean = summary["task"] == "mean"
    is_oracle = summary["method"] == "oracle"
    means = summary[is_mean & ~is_oracle]
    texts = percents(means["nda_mean"], means["nda_std"])
    means = means.assign(method=variant_names(means), text=texts)
    means = means.join(sweep.options, on="experiment")
    erased = ["erased"] if means["erased"].nunique() > 1 else []
    heads = [*sweep.options.columns, *erased, "method"]
    lines = ["experiment", "samples_per_task", *heads]
    table = means.pivot_table(
        index=lines, columns="decoder", values="text", aggfunc="first", sort=False
    )
    columns = [*heads, *table.columns]
    return table.fillna("–").reset_index()[columns].rename_axis(columns=None)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each swept key, the whole key where another ends alike or a column is called so."""
    last = [key.rsplit(".")[-1] for key in keys]
    names = {}
    for key, name in zip(keys, last, strict=True):
        is_free = last.count(name) == 1 and name not in COLUMNS
        names[key] = name if is_free else key
    return names
