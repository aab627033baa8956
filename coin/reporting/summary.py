"""Mean and spread over seeds, the mean over tasks, and the names of the methods' variants."""

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from coin.coding.decoder_config import REPLICA
from coin.errors import CoinWarning, FileError, first_line
from coin.files.atomic import write_text
from coin.reporting.results import (
    CHANCE,
    KEYS,
    NUMBERS,
    RESIDENT,
    RESULTS_CSV,
    STAND_IN_COSTS,
    check_current,
    read_configuration,
    read_frame,
    read_results,
    requested_policy,
    write_frame,
)

SUMMARY_CSV = "summary.csv"
SEEDS_JSON = "seeds.json"
REFERENCES = ("none", "oracle")
"""Methods that are no contenders: the survivors alone, and the exact sum of the experts."""
TRAINED = ("distillation",)  # methods that train the coded model; labels begin with the name
WEAK = 0.2  # how much of the way from chance to being always right an expert has to be

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
    frame = frame.assign(batchnorm=frame["batchnorm"].map(requested_policy))
    parts = []
    for rows in (frame, seed_means(frame)):
        means, spreads, seeds = _over(rows, list(GROUP))
        parts.append(pd.concat([seeds.rename("seeds"), means.add_suffix("_mean"), spreads.add_suffix("_std")], axis=1))
    both = pd.concat(parts).reset_index()[list(SUMMARY_COLUMNS)]
    order = both.groupby([name for name in GROUP if name not in ("erased", "task")], sort=False).ngroup()
    return both.iloc[order.argsort(kind="stable")].reset_index(drop=True)


def seed_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the means over tasks of every seed, in the columns of ``results.csv``, named as in `summarise`."""
    erasures = frame["erased"].map(lambda erased: frozenset(erased.split("+")))
    tasks = erasures.groupby(frame["experiment"]).agg(lambda sets: len(frozenset().union(*sets)))
    sizes = erasures.map(len).astype(str) + " of " + frame["experiment"].map(tasks).astype(str)
    asked = frame["batchnorm"].map(requested_policy)
    return _over(frame.assign(erased=sizes, task="mean", batchnorm=asked), list(KEYS))[0].reset_index()


def write_summary(experiment_folder: Path) -> pd.DataFrame:
    """Write and return ``summary.csv`` of an experiment's ``seed-*/results.csv``; FileError where one is unreadable."""
    summary = summarise(read_run(experiment_folder)[1])
    write_frame(experiment_folder / SUMMARY_CSV, summary)
    return summary


def read_summary(experiment_folder: Path) -> pd.DataFrame:
    """Return what `write_summary` wrote; FileError where it is missing or damaged."""
    numbers = SUMMARY_COLUMNS[len(GROUP) + 1 :]
    integers = ("samples_per_task", "seeds")
    return read_frame(experiment_folder / SUMMARY_CSV, SUMMARY_COLUMNS, integers, numbers)[list(SUMMARY_COLUMNS)]


def is_replaced(earlier: pd.DataFrame, summary: pd.DataFrame) -> bool:
    """Return whether a summary lacks rows of an earlier one, or has other numbers there.

    Rows over more seeds than before replace nothing.
    """
    both = earlier.merge(summary, on=list(GROUP), how="left", suffixes=("_earlier", ""), indicator=True)
    lost = both["_merge"] == "left_only"
    same_seeds = both["seeds_earlier"] == both["seeds"]
    other_nda = (both["nda_mean_earlier"] - both["nda_mean"]).abs() > 1e-12
    return bool((lost | (same_seeds & other_nda)).any())


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
        told = f"found neither '{RESULTS_CSV}' nor 'seed-*/{RESULTS_CSV}' in '{folder}'"
        if each := min(folder.glob(f"*/seed-*/{RESULTS_CSV}"), default=None):
            raise FileError(f"{told}, a sweep or several experiments; name one of them, such as {each.parent.parent}")
        raise FileError(f"{told}, expected the folder of an experiment or of one seed; make it with `coin run`")
    last_run = _last_seeds(folder)
    found = [each for each in found if each.name in last_run] or found
    if len(found) > 1:
        documents = {folder: read_configuration(folder) for folder in found}
        # All but what seeds of one experiment differ in.
        own = {folder: {**document["configuration"], "experts": None} for folder, document in documents.items()}
        options = {folder: re.sub(r'"seed": \d+', "", json.dumps(each)) for folder, each in own.items()}
        latest = options[max(found, key=lambda folder: str(documents[folder].get("date")))]
        if other := sorted(folder.name for folder in found if options[folder] != latest):
            told = f"left out {', '.join(other)}: measured with other options than the latest seed"
            warnings.warn(told, CoinWarning, stacklevel=2)
        found = [folder for folder in found if options[folder] == latest]
    return sorted(found, key=lambda folder: (len(folder.name), folder.name))


def write_seeds(folder: Path, seeds: Sequence[int]) -> None:
    """Record the seeds of an experiment's run that has ended: the folder may hold others, of other options."""
    text = json.dumps({"seeds": list(seeds)})
    path = folder / SEEDS_JSON
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _last_seeds(folder: Path) -> list[str]:
    """Return the names of the seeds' folders that `write_seeds` has recorded, none without a record."""
    try:
        return [f"seed-{seed}" for seed in json.loads((folder / SEEDS_JSON).read_text(encoding="utf-8"))["seeds"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = f"cannot read '{folder / SEEDS_JSON}' ({first_line(error)})"
        raise FileError(f"{told}, expected the seeds of the last run; run it again") from error


def read_run(folder: Path) -> tuple[list[Path], pd.DataFrame]:
    """Return the seeds' folders of an experiment (or the one seed's folder that is given), and all their rows.

    Raises FileError where there are no results, a file is damaged, or results are of other experts than those there.
    """
    seeds = seed_folders(folder)
    for seed in seeds:
        check_current(seed)
    return seeds, pd.concat([read_results(seed) for seed in seeds], ignore_index=True)


def over_tasks(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of means over tasks, each lost alone."""
    return summary[(summary["task"] == "mean") & summary["erased"].str.startswith("1 of ")]


def stand_ins(summary: pd.DataFrame) -> pd.DataFrame:
    """Return what may be kept for a lost expert: a row per method's variant and decoder of a `summary`.

    The columns: ``name``, ``decoder``, ``nda_mean``, ``nda_std`` (means over tasks, each lost alone), ``memory_mib``,
    ``resident_mib`` (NaN where it was not measured), ``forwards``, ``losses``, ``merge_seconds``, ``nda_worst`` (the
    mean over seeds on the ``worst_task``), ``experiment``, ``weak_task`` (the first task whose expert is hardly more
    often right than chance, "" where all are).
    """
    summary = summary.assign(name=variant_names(summary))
    keys = ["experiment", "name", "decoder", "code_row", "samples_per_task"]
    alone = summary[summary["erased"] == summary["task"]].sort_values("nda_mean", kind="stable")
    worst = alone.drop_duplicates(keys).rename(columns={"task": "worst_task", "nda_mean": "nda_worst"})
    means = over_tasks(summary).merge(worst[[*keys, "worst_task", "nda_worst"]], on=keys, how="left")
    memory, *others = STAND_IN_COSTS
    costs = [memory, RESIDENT, *others, "merge_seconds"]
    means = means.rename(columns={f"{cost}_mean": cost for cost in costs})
    weak = _weak_tasks(summary)
    means["weak_task"] = [weak.get(name, "") for name in means["experiment"]]
    columns = ["name", "decoder", "nda_mean", "nda_std", *costs, "nda_worst", "worst_task", "experiment", "weak_task"]
    kept = means[columns]
    kept = kept.dropna(subset=["nda_mean", *STAND_IN_COSTS])
    return kept.sort_values(["memory_mib", "nda_mean"], ascending=[True, False], kind="stable", ignore_index=True)


def is_weak(accuracy: Any, chance: Any) -> Any:
    """Return whether experts are hardly more often right than chance, of a number or a column; False of NaN."""
    return accuracy < chance + WEAK * (1 - chance)


def _weak_tasks(summary: pd.DataFrame) -> dict[str, str]:
    """Return the first task of each experiment whose expert `is_weak`."""
    tasks = summary[summary["task"] != "mean"]
    weak = tasks[is_weak(tasks["expert_accuracy_mean"], tasks[f"{CHANCE}_mean"])]
    return dict(weak.drop_duplicates("experiment").set_index("experiment")["task"])


def undominated(kept: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows of `stand_ins` no other beats in NDA (to the digits printed), memories, forwards and losses.

    Where the resident memory was not measured, it counts as large as the stored one.
    """
    signs = {"nda_mean": 1, "memory_mib": -1, RESIDENT: -1, "forwards": -1, "losses": 1}
    kept = kept.assign(**{RESIDENT: kept[RESIDENT].fillna(kept["memory_mib"])})
    goods = (kept[list(signs)].round(4) * pd.Series(signs)).to_numpy()
    beaten = [bool(((goods >= own).all(1) & (goods > own).any(1)).any()) for own in goods]
    return ~pd.Series(beaten, index=kept.index, dtype=bool)


def decoders_of(means: pd.DataFrame) -> list[str]:
    """Return the decoders of means over tasks: ``linear``, the best method's, then the others as they come."""
    contenders = means[~means["method"].isin(REFERENCES) & (means["decoder"] != REPLICA)]
    rows = (contenders if len(contenders) else means).groupby("decoder")["nda_mean"].max().dropna()
    matter = [*(["linear"] if "linear" in set(means["decoder"]) else []), *([str(rows.idxmax())] if len(rows) else [])]
    if len(set(matter)) == 1 and len(others := rows.drop(matter[0], errors="ignore")):
        matter.append(str(others.idxmax()))
    return list(dict.fromkeys([*matter, *contenders["decoder"], *means["decoder"]]))


def variant_names(frame: pd.DataFrame) -> "pd.Series[str]":
    """Return one name per row of results or of a summary that tells a method's variants apart.

    It is the label, which the coded models' files and steps have too. Where coded models made by hand share one and
    differ in their BatchNorm policies, the policy that was asked for follows. Where a method was read out through
    several sets of coded models, the set follows (``coin[0+1]``).
    """
    # Several sets count as variants only where they read out the same loss; R = 2 uses other sets for other sizes.
    same = ["experiment", "method", "batchnorm", "decoder", "erased", "task", "samples_per_task"]
    own = frame.groupby(same, sort=False)["code_row"].transform("nunique") > 1
    several = frame["method"].isin(frame.loc[own, "method"])
    asked = frame["batchnorm"].map(requested_policy)
    shared = asked.groupby([frame["experiment"], frame["method"]]).transform("nunique") > 1
    policy = ("-" + asked).where(shared & ~asked.isin(["", "auto"]), "")
    return frame["method"] + policy + ("[" + frame["code_row"] + "]").where(several, "")


def expert_accuracies(summary: pd.DataFrame) -> pd.DataFrame:
    """Return each task's own expert's accuracy: ``experiment, task, seeds, mean, spread``, one row per task."""
    tasks = summary[summary["task"] != "mean"].drop_duplicates(["experiment", "task"])
    renamed = tasks.rename(columns={"expert_accuracy_mean": "mean", "expert_accuracy_std": "spread"})
    return renamed[["experiment", "task", "seeds", "mean", "spread"]].reset_index(drop=True)


def _over(frame: pd.DataFrame, keys: list[str]) -> tuple[pd.DataFrame, pd.DataFrame, "pd.Series[int]"]:
    """Return the mean and spread of all numbers by `keys`, NaN where one of them is, and the number of seeds."""
    groups = frame.groupby(keys, sort=False)
    numbers = groups[list(NUMBERS)]
    whole = numbers.count().eq(groups.size(), axis=0)  # pandas' own means skip NaN
    return numbers.mean().where(whole), numbers.std(ddof=1).where(whole), groups["seed"].nunique()
