"""An experiment's seeds and their rows, and ``summary.csv``: mean and spread over the seeds."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from coin.errors import CoinWarning, FileError
from coin.files.atomic import write_text
from coin.reporting.results import (
    KEYS,
    NUMBERS,
    RESULTS_CSV,
    check_current,
    read_document,
    read_results,
    requested_policy,
    write_frame,
)

SUMMARY_CSV = "summary.csv"
SEEDS_JSON = "seeds.json"
REFERENCES = ("none", "oracle")
"""Methods that are no contenders: the survivors alone, and the exact sum of the experts."""
WEAK = 0.2  # how much of the way from chance to being always right an expert has to be

GROUP = [name for name in KEYS if name != "seed"]
"""The columns that identify a row of a summary."""


def is_weak(accuracy: Any, chance: Any) -> Any:
    """Return whether experts are hardly more often right than chance, of a number or a column; False of NaN."""
    return accuracy < chance + WEAK * (1 - chance)


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Return mean and spread over seeds of rows of ``results.csv``, of every task and then of the mean over tasks.

    A row a group of `GROUP`, in order of appearance, with the BatchNorm policy that was requested: seeds may have
    chosen differently. The means over tasks have ``task = "mean"`` and, for every size r of erasure,
    ``erased = "r of N"``; they are taken within each seed first. The spread is the sample standard deviation over
    seeds, NaN with one seed. A number that is NaN in any seed or task is NaN in the mean.

    The columns are `GROUP`, ``seeds`` (how many), and ``<number>_mean`` and ``<number>_std`` of each number.
    """
    frame = frame.assign(batchnorm=frame.batchnorm.map(requested_policy))
    num_lost = frame.erased.str.count(r"\+") + 1
    of_all = f" of {frame.task.nunique()}"
    as_means = frame.assign(task="mean", erased=num_lost.astype(str) + of_all)
    by_seed = as_means.groupby(list(KEYS), sort=False)[list(NUMBERS)]
    over_tasks = by_seed.mean(skipna=False).reset_index()
    groups = pd.concat([frame, over_tasks]).groupby(GROUP, sort=False)
    columns: dict[str, pd.Series[Any]] = {"seeds": groups["seed"].nunique()}
    for name in NUMBERS:
        columns[f"{name}_mean"] = groups[name].mean(skipna=False)
        columns[f"{name}_std"] = groups[name].std(skipna=False)
    return pd.DataFrame(columns).reset_index()


def write_summary(folder: Path) -> pd.DataFrame:
    """Write and return ``summary.csv`` of an experiment's ``seed-*/results.csv``; FileError where one is unreadable."""
    _, frame = read_run(folder)
    summary = summarise(frame)
    write_frame(folder / SUMMARY_CSV, summary)
    return summary


def seed_folders(folder: Path) -> list[Path]:
    """Return an experiment's folders ``seed-*`` that hold results, by increasing seed, or the one seed's that is given.

    They are the seeds of its last whole run (`write_seeds`), or all where none has ended. Seeds with other options than
    the latest one would spoil a mean: they are left out, with a warning that names them.
    Raises FileError where there are no results.
    """
    if (folder / RESULTS_CSV).is_file():
        return [folder]
    found = [path.parent for path in folder.glob(f"seed-*/{RESULTS_CSV}")]
    if not found:
        raise FileError(
            f"found neither '{RESULTS_CSV}' nor 'seed-*/{RESULTS_CSV}' in '{folder}', expected the folder of an "
            "experiment or of one seed; make it with `coin run`"
        )
    found.sort(key=lambda seed: (len(seed.name), seed.name))
    if (folder / SEEDS_JSON).is_file():
        last_run = json.loads((folder / SEEDS_JSON).read_text(encoding="utf-8"))
        names = [f"seed-{seed}" for seed in last_run["seeds"]]
        found = [seed for seed in found if seed.name in names] or found
    documents = [read_document(seed) for seed in found]
    latest = max(documents, key=lambda document: str(document["date"]))
    kept = []
    others = []
    for seed, document in zip(found, documents, strict=True):
        if _options(document) == _options(latest):
            kept.append(seed)
        else:
            others.append(seed.name)
    if others:
        told = f"left out {', '.join(others)}: measured with other options than the latest seed"
        warnings.warn(told, CoinWarning, stacklevel=2)
    return kept


def _options(document: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of ``results.json`` without what the seeds of one experiment differ in."""
    of_seed = ("seed", "seeds", "experts")
    configuration = document["configuration"]
    return {name: value for name, value in configuration.items() if name not in of_seed}


def write_seeds(folder: Path, seeds: Sequence[int]) -> None:
    """Record the seeds of an experiment's run that has ended: the folder may hold others, of other options."""
    text = json.dumps({"seeds": list(seeds)})
    path = folder / SEEDS_JSON
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def read_run(folder: Path) -> tuple[list[Path], pd.DataFrame]:
    """Return the seeds' folders of an experiment (or the one seed's folder that is given), and all their rows.

    Raises FileError where there are no results, a file is damaged, or results are of other experts than those there.
    """
    seeds = seed_folders(folder)
    frames = []
    for seed in seeds:
        check_current(seed)
        frames.append(read_results(seed))
    return seeds, pd.concat(frames, ignore_index=True)
