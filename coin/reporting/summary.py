"""Mean and spread over seeds, the mean over tasks, and the names of the methods' variants."""

import math
import warnings
from pathlib import Path
from typing import Any

import pandas as pd

from coin.coding.decoder_config import REPLICA
from coin.errors import CoinWarning, FileError
from coin.reporting.results import (
    KEYS,
    NUMBERS,
    RESULTS_CSV,
    RESULTS_JSON,
    STAND_IN_COSTS,
    check_current,
    read_configuration,
    read_frame,
    read_results,
    requested_policy,
    write_frame,
)

SUMMARY_CSV = "summary.csv"
REFERENCES = ("none", "oracle")
"""Methods that are no contenders: the survivors alone, and the exact sum of the experts."""
TRAINED = ("distillation", "readout_distillation")
"""Methods that train the coded model by gradient descent; labels begin with the name."""
ITERATIVE = ("gauss_newton",)
"""Methods that take a few steps without a learning rate: neither closed forms nor trained."""
_KEEPING = ("refit", *TRAINED)
"""Methods whose one BatchNorm policy is ``keep``; the others' default is ``auto``."""

GROUP: tuple[str, ...] = tuple(name for name in KEYS if name != "seed")
"""The columns that identify a row of a summary."""
SUMMARY_COLUMNS = (*GROUP, "seeds", *(f"{name}_{part}" for name in NUMBERS for part in ("mean", "std")))


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Return mean and spread over seeds of rows of ``results.csv``, per task and as the mean over tasks.

    One row per group of `GROUP`, in order of appearance, with the BatchNorm policy that was asked for: seeds may have
    chosen differently. After the tasks of each variant come rows with ``task = "mean"``: for every size r of erasure,
    with ``erased = "r of N"``, the mean over all (erasure, task) pairs of that size, within each seed first and then
    over seeds. The spread is the sample standard deviation over seeds: NaN with one seed. A number that is NaN in any
    seed or task is NaN in the mean.

    The columns are `SUMMARY_COLUMNS`: the group, ``seeds`` (how many), and ``<number>_mean``, ``<number>_std`` of each.
    """
    frame = _with_all_columns(frame)
    both = pd.concat([_over_seeds(frame), _over_seeds(seed_means(frame))], ignore_index=True)
    order = both.groupby([name for name in GROUP if name not in ("erased", "task")], sort=False).ngroup()
    return both.iloc[order.argsort(kind="stable")].reset_index(drop=True)


def seed_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the means over tasks of every seed, in the columns of ``results.csv``, named as in `summarise`."""
    erasures = frame["erased"].map(lambda erased: frozenset(erased.split("+")))
    tasks = erasures.groupby(frame["experiment"]).agg(lambda sets: len(frozenset().union(*sets)))
    sizes = erasures.map(len).astype(str) + " of " + frame["experiment"].map(tasks).astype(str)
    return _mean(_with_all_columns(frame).assign(erased=sizes, task="mean"), list(KEYS)).reset_index()


def write_summary(experiment_folder: Path) -> pd.DataFrame:
    """Write and return ``summary.csv`` of an experiment's ``seed-*/results.csv``; FileError where one is unreadable."""
    folders = seed_folders(experiment_folder)
    if not folders:
        raise FileError(
            f"found no 'seed-*/results.csv' in '{experiment_folder}', expected an experiment; make it with `coin run`"
        )
    summary = summarise(pd.concat([read_results(folder) for folder in folders], ignore_index=True))
    write_frame(experiment_folder / SUMMARY_CSV, summary)
    return summary


def read_summary(experiment_folder: Path) -> pd.DataFrame:
    """Return what `write_summary` wrote; FileError where it is missing or damaged."""
    numbers = SUMMARY_COLUMNS[len(GROUP) + 1 :]
    integers = ("samples_per_task", "seeds")
    return read_frame(experiment_folder / SUMMARY_CSV, SUMMARY_COLUMNS, integers, numbers)[list(SUMMARY_COLUMNS)]


def seed_folders(experiment_folder: Path) -> list[Path]:
    """Return the folders ``seed-*`` that hold results of one configuration, by increasing seed.

    Seeds with other options than the latest one would spoil a mean: they are left out, with a warning that names them.
    """
    found = [path.parent for path in experiment_folder.glob(f"seed-*/{RESULTS_CSV}")]
    if len(found) > 1:
        options = {folder: _comparable(read_configuration(folder)["configuration"]) for folder in found}
        latest = options[max(found, key=lambda folder: (folder / RESULTS_JSON).stat().st_mtime_ns)]
        if other := sorted(folder.name for folder in found if options[folder] != latest):
            warnings.warn(
                f"left out {', '.join(other)}: measured with other options than the latest seed",
                CoinWarning,
                stacklevel=2,
            )
        found = [folder for folder in found if options[folder] == latest]
    return sorted(found, key=lambda folder: (len(folder.name), folder.name))


def read_run(folder: Path) -> tuple[list[Path], pd.DataFrame]:
    """Return the seeds' folders of an experiment (or the one seed's folder that is given), and all their rows.

    Raises FileError where there are no results, a file is damaged, or results are of other experts than those there.
    """
    seeds = [folder] if (folder / RESULTS_CSV).is_file() else seed_folders(folder)
    if not seeds:
        raise FileError(
            f"found neither '{RESULTS_CSV}' nor 'seed-*/{RESULTS_CSV}' in '{folder}', expected the folder of an "
            "experiment or of one seed; make it with `coin run`"
        )
    for seed in seeds:
        check_current(seed)
    return seeds, pd.concat([read_results(seed) for seed in seeds], ignore_index=True)


def over_tasks(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of means over tasks, each lost alone."""
    return summary[(summary["task"] == "mean") & summary["erased"].str.startswith("1 of ")]


def stand_ins(summary: pd.DataFrame) -> pd.DataFrame:
    """Return what may be kept for a lost expert: a row per method's variant and decoder, by what it takes to keep.

    Of one experiment's `summary`: ``name``, ``decoder``, ``nda_mean``, ``nda_std`` (means over tasks, each lost alone),
    ``memory_mib``, ``forwards``, ``losses``, ``merge_seconds``, and ``nda_worst``, the mean over seeds on the
    ``worst_task``; nothing of results that do not tell the first six, as the oracle's.
    """
    summary = summary.assign(name=variant_names(summary))
    keys = ["experiment", "name", "decoder", "code_row", "samples_per_task"]
    alone = summary[summary["erased"] == summary["task"]].sort_values("nda_mean", kind="stable")
    worst = alone.drop_duplicates(keys).rename(columns={"task": "worst_task", "nda_mean": "nda_worst"})
    means = largest_samples(over_tasks(summary)).merge(worst[[*keys, "worst_task", "nda_worst"]], on=keys, how="left")
    costs = list(STAND_IN_COSTS)
    means = means.rename(columns={f"{cost}_mean": cost for cost in (*costs, "merge_seconds")})
    kept = means[["name", "decoder", "nda_mean", "nda_std", *costs, "merge_seconds", "nda_worst", "worst_task"]]
    kept = kept.dropna(subset=["nda_mean", *costs])
    return kept.sort_values(["memory_mib", "nda_mean"], ascending=[True, False], kind="stable", ignore_index=True)


def undominated(kept: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows of `stand_ins` no other beats: none is as good in all of NDA, memory, forwards and losses.

    NDA counts to the hundredth of a percent that tables print.
    """
    signs = {"nda_mean": 1, "memory_mib": -1, "forwards": -1, "losses": 1}
    goods = (kept[list(signs)].round(4) * pd.Series(signs)).to_numpy()
    beaten = [bool(((goods >= own).all(1) & (goods > own).any(1)).any()) for own in goods]
    return ~pd.Series(beaten, index=kept.index, dtype=bool)


def shortlist(kept: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows of `stand_ins` to look at first: the `undominated` ones, and every name's best decoder."""
    return undominated(kept) | kept.index.isin(kept.groupby("name")["nda_mean"].idxmax())


def largest_samples(rows: pd.DataFrame) -> pd.DataFrame:
    """Return each variant's rows at its largest P: one point per variant, whatever P the others had."""
    variant = ["experiment", "method", "batchnorm"]
    return rows[rows["samples_per_task"] == rows.groupby(variant)["samples_per_task"].transform("max")]


def decoders_of(means: pd.DataFrame) -> list[str]:
    """Return the decoders: ``linear``, the one with the best method's largest mean NDA, then the others as they come.

    Args:
        means: Rows of a summary, means over tasks.
    """
    contenders = means[~means["method"].isin(REFERENCES) & (means["decoder"] != REPLICA)]
    rows = (contenders if len(contenders) else means).groupby("decoder")["nda_mean"].max().dropna()
    matter = [*(["linear"] if "linear" in set(means["decoder"]) else []), *([str(rows.idxmax())] if len(rows) else [])]
    if len(set(matter)) == 1 and len(others := rows.drop(matter[0], errors="ignore")):
        matter.append(str(others.idxmax()))
    return list(dict.fromkeys([*matter, *contenders["decoder"], *means["decoder"]]))


def variant_names(frame: pd.DataFrame) -> "pd.Series[str]":
    """Return one name per row of results, of a summary or of ``layers.csv`` that tells a method's variants apart.

    A name depends on the method's own options alone: its label, and the BatchNorm policy that was asked for where that
    is not the method's default (``coin (recalibrate)``). Where a method was read out through several sets of coded
    models, the set follows in brackets (``coin[0+1]``); of ``layers.csv``, the row of the code.
    """
    if "layer" in frame:
        several = pd.Series(frame["code_row"].nunique() > 1, index=frame.index)
    else:
        # Several sets count as variants only where they read out the same loss; R = 2 uses other sets for other sizes.
        same = ["experiment", "method", "batchnorm", "decoder", "erased", "task", "samples_per_task"]
        own = frame.groupby(same, sort=False)["code_row"].transform("nunique") > 1
        several = frame["method"].isin(frame.loc[own, "method"])
    asked = frame["batchnorm"].map(requested_policy)
    default = asked.isin(["", "auto"]) | (asked.eq("keep") & frame["method"].str.startswith(_KEEPING))
    return frame["method"] + (" (" + asked + ")").mask(default, "") + ("[" + frame["code_row"] + "]").where(several, "")


def expert_accuracies(summary: pd.DataFrame) -> pd.DataFrame:
    """Return each task's own expert's accuracy: ``experiment, task, seeds, mean, spread``, one row per task."""
    tasks = summary[summary["task"] != "mean"].drop_duplicates(["experiment", "task"])
    renamed = tasks.rename(columns={"expert_accuracy_mean": "mean", "expert_accuracy_std": "spread"})
    return renamed[["experiment", "task", "seeds", "mean", "spread"]].reset_index(drop=True)


def _with_all_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with the requested BatchNorm policies, and NaN for what results from before do not tell."""
    untold = {name: math.nan for name in STAND_IN_COSTS if name not in frame}
    return frame.assign(batchnorm=frame["batchnorm"].map(requested_policy), **untold)


def _comparable(configuration: Any) -> Any:
    """Return what seeds of one experiment have in common: no ``seed``, and no keys of experts."""
    if isinstance(configuration, list):
        return [_comparable(entry) for entry in configuration]
    if not isinstance(configuration, dict):
        return configuration
    own = {"seed", "experts"}
    return {name: _comparable(entry) for name, entry in configuration.items() if name not in own}


def _over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    groups = frame.groupby(list(GROUP), sort=False)
    means = _mean(frame, list(GROUP)).add_suffix("_mean")
    spreads = groups[list(NUMBERS)].std(ddof=1).where(_complete(frame, list(GROUP))).add_suffix("_std")
    seeds = groups["seed"].nunique().rename("seeds")
    return pd.concat([seeds, means, spreads], axis=1).reset_index()[list(SUMMARY_COLUMNS)]


def _mean(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    means = frame.groupby(keys, sort=False)[list(NUMBERS)].mean()
    return means.where(_complete(frame, keys))


def _complete(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return where no number of a group is NaN (pandas' own means skip NaN)."""
    groups = frame.groupby(keys, sort=False)[list(NUMBERS)]
    return groups.count().eq(groups.size(), axis=0)
