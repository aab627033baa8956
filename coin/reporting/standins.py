"""From rows of results to stand-ins: what may be kept for a lost expert, how accurate it is and what it costs."""

from typing import Any

import pandas as pd

from coin.reporting.results import NUMBERS
from coin.reporting.summary import is_weak

STAND_IN = ["method", "decoder"]
"""The columns of results that a stand-in is told by."""
CHEAPEST = ["memory_mib", "forwards", "resident_mib", "nda_worst", "losses", "nda_mean"]
"""What comes first, the cheapest: the first three in rising, the others in falling order."""


def standins(frame: pd.DataFrame, *, oracle: bool = False) -> pd.DataFrame:
    """Return what may be kept for a lost expert, of rows of ``results.csv``: a row a method and decoder.

    The cheapest comes first: the least memory, then the fewest forwards, then the least resident memory, then the most
    accurate on the worst task; what is printed alike is equal. What has no known NDA or memory is left out, but for
    the oracle where it is asked for.

    The columns: ``method``, ``decoder``, and of each number of ``results.csv`` the mean over tasks, each lost alone,
    and seeds; the NDA's is ``nda_mean``, and with it come ``nda_std`` (the sample standard deviation over seeds),
    ``nda_worst`` (the mean over seeds on the ``worst_task``, at most 1), and where more may be lost at once
    ``nda_2_lost``, …; ``weak_task`` is the first task whose expert is hardly more often right than chance, "" for none.
    """
    num_lost = frame.erased.str.count(r"\+") + 1
    alone = frame[num_lost == 1]
    by_seed = _by_seed(alone, STAND_IN)
    means: pd.DataFrame = by_seed.mean(skipna=False)
    means = means.rename(columns={"nda": "nda_mean"})
    means["nda_std"] = by_seed["nda"].std()
    means = means.dropna(subset=["nda_mean"] if oracle else ["nda_mean", "memory_mib"])

    by_task = alone.groupby([*STAND_IN, "task"], sort=False)
    ndas = by_task["nda"].mean().unstack("task", sort=False)
    ndas = ndas.loc[means.index]
    means["nda_worst"] = ndas.min(axis=1).clip(upper=1.0)
    means["worst_task"] = ndas.idxmin(axis=1)
    is_of_weak = is_weak(alone.expert_accuracy, alone.chance)
    means["weak_task"] = next(iter(alone.task[is_of_weak]), "")

    several = frame[num_lost > 1].assign(num_lost=num_lost)
    of_several = _by_seed(several, [*STAND_IN, "num_lost"])
    ndas = of_several["nda"].mean(skipna=False).unstack("num_lost")
    ndas = ndas.add_prefix("nda_").add_suffix("_lost")
    found = means.join(ndas).reset_index()

    printed = found[CHEAPEST].apply(as_printed)
    ordered = printed.sort_values(
        CHEAPEST, ascending=[True, True, True, False, False, False], kind="stable"
    )
    return found.loc[ordered.index].reset_index(drop=True)


def _by_seed(frame: pd.DataFrame, keys: list[str]) -> Any:
    """Return the means over tasks of every seed, grouped by `keys`."""
    groups = frame.groupby([*keys, "seed"], sort=False)
    means = groups[list(NUMBERS)].mean(skipna=False)
    return means.groupby(keys, sort=False)


def as_printed(column: "pd.Series[float]") -> "pd.Series[float]":
    """Return a column of shares, memories or counts in the digits of the tables: what is printed alike is equal."""
    if str(column.name).endswith("_mib"):
        return column.map(three_digits)
    return column.round(4)


def three_digits(value: float) -> float:
    """Return a number rounded to three digits."""
    return float(f"{value:.3g}")


def experts(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the experts' own accuracies of rows of ``results.csv``: ``seeds, mean, spread`` by task."""
    own = frame.drop_duplicates(["task", "seed"]).groupby("task", sort=False)["expert_accuracy"]
    return pd.DataFrame({"seeds": own.size(), "mean": own.mean(), "spread": own.std()})
