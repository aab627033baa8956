"""An experiment's seeds and their rows, and ``summary.csv``: mean and spread over the seeds."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from coin.errors import FileError
from coin.reporting.results import (
    KEYS,
    NUMBERS,
    RESULTS_CSV,
    RESULTS_JSON,
    read_document,
    read_results,
    requested_policy,
    write_frame,
)

SUMMARY_CSV = "summary.csv"
SEEDS_JSON = "seeds.json"
REFERENCES = ("none", "oracle")
"""Methods that are no contenders: the survivors alone, and the exact sum of the experts."""
_OF_SEEDS = ("seed", "seeds", "experts", "output")  # what seeds of one choice of options differ in
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

    The columns are `GROUP`, ``seeds`` (how many), ``<number>_mean`` of each number, and then ``<number>_std``.
    """
    frame = frame.assign(batchnorm=frame.batchnorm.map(requested_policy))
    num_lost = frame.erased.str.count(r"\+") + 1
    of_all = f" of {frame.task.nunique()}"
    as_means = frame.assign(task="mean", erased=num_lost.astype(str) + of_all)
    by_seed = as_means.groupby(list(KEYS), sort=False)[list(NUMBERS)]
    over_tasks = by_seed.mean(skipna=False).reset_index()
    groups = pd.concat([frame, over_tasks]).groupby(GROUP, sort=False)
    numbers = groups[list(NUMBERS)]
    seeds = groups["seed"].nunique().rename("seeds")
    means = numbers.mean(skipna=False).add_suffix("_mean")
    spreads = numbers.std(skipna=False).add_suffix("_std")
    return pd.concat([seeds, means, spreads], axis=1).reset_index()


def write_summary(folder: Path) -> pd.DataFrame:
    """Write and return ``summary.csv`` of an experiment's ``seed-*/results.csv``; FileError where one is unreadable."""
    summary = summarise(read_run(folder)[1])
    write_frame(folder / SUMMARY_CSV, summary)
    return summary


def seed_folders(folder: Path) -> list[Path]:
    """Return an experiment's folders ``seed-*`` that hold results, by increasing seed, or the one seed's that is given.

    They are the seeds of its last whole run (``seeds.json``): the folder may hold others, of other options; all where
    none has ended. Raises FileError where there are no results, or the seeds' are of different options.
    """
    if (folder / RESULTS_CSV).is_file():
        return [folder]
    found = [path.parent for path in folder.glob(f"seed-*/{RESULTS_CSV}")]
    if (folder / SEEDS_JSON).is_file():
        seeds = json.loads((folder / SEEDS_JSON).read_text(encoding="utf-8"))["seeds"]
        found = [path for path in found if path.name in [f"seed-{seed}" for seed in seeds]]
    if len({_options(path) for path in found}) > 1:
        raise FileError(
            f"found seeds in '{folder}' that were measured with different options, expected one choice of them; run "
            "coin run with all seeds, or give one seed's folder"
        )
    if not found:
        raise FileError(
            f"found neither '{RESULTS_CSV}' nor 'seed-*/{RESULTS_CSV}' in '{folder}', expected the folder of an "
            "experiment or of one seed; make it with `coin run`"
        )
    return sorted(found, key=lambda seed: (len(seed.name), seed.name))


def _options(seed: Path) -> str:
    """Return the options of a seed's results, without what the seeds of one experiment may differ in ("" unknown)."""
    if not (seed / RESULTS_JSON).is_file():  # rows alone, which somebody has kept
        return ""
    configuration = read_document(seed)["configuration"]
    options = {name: value for name, value in configuration.items() if name not in _OF_SEEDS}
    return json.dumps(options, sort_keys=True)


def read_run(folder: Path) -> tuple[list[Path], pd.DataFrame]:
    """Return the seeds' folders of an experiment (or the one seed's folder that is given), and all their rows.

    Raises FileError where there are no results, or a file is damaged.
    """
    seeds = seed_folders(folder)
    return seeds, pd.concat(map(read_results, seeds), ignore_index=True)
