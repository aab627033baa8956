"""Mean and spread over seeds, the mean over tasks, and the names of the methods' variants."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from coin.coding.decoder_config import REPLICA
from coin.errors import CoinWarning, FileError
from coin.files.atomic import write_text
from coin.reporting.results import (
    KEYS,
    NUMBERS,
    RESULTS_CSV,
    STAND_IN_COSTS,
    check_current,
    read_document,
    read_frame,
    read_results,
    requested_policy,
    write_frame,
)

SUMMARY_CSV = "summary.csv"
SEEDS_JSON = "seeds.json"
REFERENCES = ("none", "oracle")
"""Methods that are no contenders: the survivors alone, and the exact sum of the experts."""
WEAK = 0.2  # how much of the way from chance to being always right an expert has to be

GROUP: tuple[str, ...] = tuple(name for name in KEYS if name != "seed")
"""The columns that identify a row of a summary."""
SUMMARY_NUMBERS = tuple(f"{name}_{part}" for name in NUMBERS for part in ("mean", "std"))
SUMMARY_COLUMNS = (*GROUP, "seeds", *SUMMARY_NUMBERS)


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
    by_task = _over_seeds(frame)
    over_all_tasks = _over_seeds(seed_means(frame))
    both = pd.concat([by_task, over_all_tasks]).reset_index()
    # A variant's means come after its tasks.
    variant = [name for name in GROUP if name not in ("erased", "task")]
    place = both.groupby(variant, sort=False).ngroup()
    in_order = both.iloc[place.argsort(kind="stable")]
    return in_order[list(SUMMARY_COLUMNS)].reset_index(drop=True)


def seed_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the means over tasks of every seed, in the columns of ``results.csv``, named as in `summarise`."""
    lost = frame["erased"].str.split("+")
    num_lost = lost.map(len)
    num_experts = frame["experiment"].map(lost.groupby(frame["experiment"]).agg(_num_different))
    frame = frame.assign(
        erased=num_lost.astype(str) + " of " + num_experts.astype(str),
        task="mean",
        batchnorm=frame["batchnorm"].map(requested_policy),
    )
    groups = frame.groupby(list(KEYS), sort=False)
    return _mean(groups).reset_index()


def _num_different(lists: "pd.Series[Any]") -> int:
    return len(set().union(*lists))


def _over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the number of seeds, and the mean and spread over them of all numbers, by `GROUP`."""
    groups = frame.groupby(list(GROUP), sort=False)
    means = _mean(groups)
    spreads = groups[list(NUMBERS)].std(ddof=1)
    spreads = spreads.where(means.notna())
    seeds = groups["seed"].nunique().rename("seeds")
    return pd.concat([seeds, means.add_suffix("_mean"), spreads.add_suffix("_std")], axis=1)


def _mean(groups: Any) -> pd.DataFrame:
    """Return the means of all numbers, NaN where one of them is; pandas' own skip NaN."""
    numbers = groups[list(NUMBERS)]
    is_whole = numbers.count().eq(groups.size(), axis=0)
    means: pd.DataFrame = numbers.mean().where(is_whole)
    return means


def write_summary(experiment_folder: Path) -> pd.DataFrame:
    """Write and return ``summary.csv`` of an experiment's ``seed-*/results.csv``; FileError where one is unreadable."""
    _, frame = read_run(experiment_folder)
    summary = summarise(frame)
    write_frame(experiment_folder / SUMMARY_CSV, summary)
    return summary


def read_summary(experiment_folder: Path) -> pd.DataFrame:
    """Return what `write_summary` wrote; FileError where it is missing or damaged."""
    path = experiment_folder / SUMMARY_CSV
    return read_frame(path, SUMMARY_COLUMNS, ("samples_per_task", "seeds"), SUMMARY_NUMBERS)


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
        raise _no_results(folder)
    if (folder / SEEDS_JSON).is_file():
        last_run = json.loads((folder / SEEDS_JSON).read_text(encoding="utf-8"))
        names = [f"seed-{seed}" for seed in last_run["seeds"]]
        found = [each for each in found if each.name in names] or found
    documents = {each.name: read_document(each) for each in found}
    latest = max(documents, key=lambda name: str(documents[name]["date"]))
    options = {name: _options(document) for name, document in documents.items()}
    others = [name for name in sorted(options) if options[name] != options[latest]]
    if others:
        told = f"left out {', '.join(others)}: measured with other options than the latest seed"
        warnings.warn(told, CoinWarning, stacklevel=2)
    kept = [each for each in found if each.name not in others]
    return sorted(kept, key=lambda each: (len(each.name), each.name))


def _no_results(folder: Path) -> FileError:
    problem = f"found neither '{RESULTS_CSV}' nor 'seed-*/{RESULTS_CSV}' in '{folder}'"
    points = sorted(folder.glob(f"*/seed-*/{RESULTS_CSV}"))
    if points:
        return FileError(
            f"{problem}, but several experiments; name one of them, such as {points[0].parents[1]}"
        )
    return FileError(
        f"{problem}, expected the folder of an experiment or of one seed; make it with `coin run`"
    )


def _options(document: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of ``results.json`` without what the seeds of one experiment differ in."""
    configuration = dict(document["configuration"])
    for name in ("seed", "seeds", "experts"):
        configuration.pop(name, None)
    return configuration


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


def over_tasks(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of means over tasks, each lost alone."""
    is_mean = summary["task"] == "mean"
    is_alone = summary["erased"].str.startswith("1 of ")
    return summary[is_mean & is_alone]


def stand_ins(summary: pd.DataFrame) -> pd.DataFrame:
    """Return what may be kept for a lost expert: a row per method's variant and decoder of a `summary`.

    The columns: ``name``, ``decoder``, ``nda_mean``, ``nda_std`` (means over tasks, each lost alone), ``memory_mib``,
    ``resident_mib``, ``forwards``, ``losses``, ``merge_seconds``, ``nda_worst`` (the mean over seeds on the
    ``worst_task``), ``weak_task`` (the first task whose expert is hardly more often right than chance, "" where all
    are).
    """
    summary = summary.assign(name=variant_names(summary))
    keys = ["experiment", "name", "decoder", "code_row", "samples_per_task"]
    alone = summary[summary["erased"] == summary["task"]]
    worst = alone.sort_values("nda_mean", kind="stable").drop_duplicates(keys)
    worst = worst.rename(columns={"task": "worst_task", "nda_mean": "nda_worst"})
    worst = worst[[*keys, "worst_task", "nda_worst"]]
    means = over_tasks(summary).merge(worst, on=keys, how="left")
    costs = [*STAND_IN_COSTS, "merge_seconds"]
    means = means.rename(columns={f"{cost}_mean": cost for cost in costs})
    means["weak_task"] = _weak_task(summary)
    columns = [
        "name",
        "decoder",
        "nda_mean",
        "nda_std",
        *costs,
        "nda_worst",
        "worst_task",
        "weak_task",
    ]
    kept = means[columns]
    kept = kept.dropna(subset=["nda_mean", "memory_mib"])
    by_memory = ["memory_mib", "nda_mean"]
    return kept.sort_values(by_memory, ascending=[True, False], kind="stable", ignore_index=True)


def is_weak(accuracy: Any, chance: Any) -> Any:
    """Return whether experts are hardly more often right than chance, of a number or a column; False of NaN."""
    return accuracy < chance + WEAK * (1 - chance)


def _weak_task(summary: pd.DataFrame) -> str:
    """Return the first task whose expert `is_weak`, "" where none is."""
    tasks = summary[summary["task"] != "mean"]
    weak = tasks[is_weak(tasks["expert_accuracy_mean"], tasks["chance_mean"])]
    return "" if weak.empty else str(weak["task"].iloc[0])


def decoders_of(means: pd.DataFrame) -> list[str]:
    """Return the decoders of means over tasks: ``linear``, then by a method's best NDA, then the references' own."""
    is_reference = means["method"].isin(REFERENCES)
    is_replica = means["decoder"] == REPLICA
    contenders = means[~is_reference & ~is_replica]
    best = contenders.groupby("decoder")["nda_mean"].max()
    best = best.sort_values(ascending=False, kind="stable")
    every = [*best.index, *means["decoder"]]
    if "linear" in every:
        every.insert(0, "linear")
    return list(dict.fromkeys(every))


def variant_names(frame: pd.DataFrame) -> "pd.Series[str]":
    """Return one name per row of results or of a summary that tells a method's variants apart.

    It is the label, which the coded models' files and steps have too. Where coded models made by hand share one and
    differ in their BatchNorm policies, the policy that was asked for follows. Where a method was read out through
    several sets of coded models, the set follows (``coin[0+1]``).
    """
    # Several sets count as variants only where they read out the same loss; R = 2 uses other sets for other sizes.
    same_loss = [
        "experiment",
        "method",
        "batchnorm",
        "decoder",
        "erased",
        "task",
        "samples_per_task",
    ]
    num_sets = frame.groupby(same_loss, sort=False)["code_row"].transform("nunique")
    has_several = frame["method"].isin(frame.loc[num_sets > 1, "method"])
    asked = frame["batchnorm"].map(requested_policy)
    num_policies = asked.groupby([frame["experiment"], frame["method"]]).transform("nunique")
    has_policy = (num_policies > 1) & ~asked.isin(["", "auto"])
    policies = ("-" + asked).where(has_policy, "")
    sets = ("[" + frame["code_row"] + "]").where(has_several, "")
    return frame["method"] + policies + sets


def expert_accuracies(summary: pd.DataFrame) -> pd.DataFrame:
    """Return each task's own expert's accuracy: ``experiment, task, seeds, mean, spread``, one row per task."""
    tasks = summary[summary["task"] != "mean"].drop_duplicates(["experiment", "task"])
    renamed = tasks.rename(
        columns={"expert_accuracy_mean": "mean", "expert_accuracy_std": "spread"}
    )
    return renamed[["experiment", "task", "seeds", "mean", "spread"]].reset_index(drop=True)
