"""Which stand-in to keep, from an experiment's results and a user's limits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import pandas as pd

from coin.coding.decoder_config import REPLICA
from coin.core.choices import check_number
from coin.reporting.standins import as_printed, standins
from coin.reporting.summary import REFERENCES, read_run

ACCURACY = 0.98  # the share of a lost expert's accuracy that a recommended stand-in keeps on the worst task
WEAK_EXPERTS = (
    "what stands in is right more often than the lost experts; look at their own accuracy first"
)
_LIMITS = {
    "memory_mib": "stores at most {:g} MiB",
    "resident_mib": "holds at most {:g} MiB resident",
    "forwards": "runs at most {:g} networks",
}
_FAR_ABOVE = 1.1  # an NDA above this says more of the experts than of a stand-in


def recommended(kept: pd.DataFrame) -> "pd.Series[Any]":
    """Return the row of `standins` that is recommended where no limits are given; `kept` has at least one.

    It is the cheapest that keeps `ACCURACY` on the worst task; where none does, the most accurate one there. All that
    names one stand-in reads it: `choose` without limits, and what `coin serve` serves.
    """
    accurate = kept[kept.nda_worst >= ACCURACY]
    if len(accurate):
        return accurate.iloc[0]
    return _most_accurate(kept)


def _most_accurate(kept: pd.DataFrame) -> "pd.Series[Any]":
    """Return the row that is most accurate on the worst task, the cheapest of several that are printed alike."""
    best = as_printed(kept.nda_worst).argmax()
    return kept.iloc[best]


def weakness(row: "pd.Series[Any]") -> str:
    """Return what is wrong with the experts of a row of `standins`, so that nothing can be recommended; "" if nothing.

    One is hardly more often right than chance, or all are so weak that the row is far above them.
    """
    if row.weak_task:
        task = row.weak_task
        return f"the expert of '{task}' is hardly more often right than chance; look at its accuracy first"
    return WEAK_EXPERTS if row.nda_mean > _FAR_ABOVE else ""


def undominated(kept: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows of `standins` are Pareto-optimal in mean and worst NDA, memories, forwards and losses.

    What is printed alike is equal. What is `recommended` is one of them.
    """
    costs = ["memory_mib", "resident_mib", "forwards"]
    goods = kept[["nda_mean", "nda_worst", "losses", *costs]].apply(as_printed)
    goods[costs] = -goods[costs]
    own = goods.to_numpy()
    others = own[:, None]  # [S, 1, 6] beside own [S, 6]
    is_as_good = (others >= own).all(axis=2)
    is_better = (others > own).any(axis=2)
    is_beaten = (is_as_good & is_better).any(axis=0)
    is_known = goods.notna().all(axis=1)
    return is_known & ~pd.Series(is_beaten, index=kept.index)


def shortlist(kept: pd.DataFrame) -> "pd.Series[bool]":
    """Return which of some `standins` to look at first: every method's best decoder, and the `recommended` one."""
    best = kept.groupby("method")["nda_mean"].idxmax()
    is_first = kept.index.isin([*best, recommended(kept).name])
    return pd.Series(is_first, index=kept.index)


def choose(
    folder: str | Path,
    accuracy: float = ACCURACY,
    memory_mib: float | None = None,
    resident_mib: float | None = None,
    forwards: float | None = None,
    losses: int | Literal["all"] = 1,
) -> tuple[pd.DataFrame, str]:
    """Return the stand-ins of an experiment that meet these wishes, the cheapest first, and the reason in a sentence.

    The cheapest keeps the least memory and, of those, runs the fewest networks. Where nothing meets the wishes the
    frame is empty, and the sentence says what comes nearest; so it is where the experts themselves are too weak. Raises
    FileError where the folder holds no results.

    Args:
        folder: An experiment's folder, or a seed's.
        accuracy: The share of a lost expert's own accuracy to be kept on the worst task, in (0, 1]; no stand-in counts
            as more accurate than the expert.
        memory_mib: The most memory beyond the experts' own servers, as stored, in MiB.
        resident_mib: The most weights that processes hold which answer with it, in MiB.
        forwards: The most networks run for one lost answer.
        losses: How many experts may be lost at once: a number, or ``all``.

    >>> coin.choose("runs/nowhere")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    coin.errors.FileError: found neither 'results.csv' nor 'seed-*/results.csv' in 'runs/nowhere', expected ...
    """
    _, frame = read_run(Path(folder))
    check_number("accuracy", accuracy, low=0, most=1, strict=True)
    num_lost = frame.task.nunique() if losses == "all" else losses
    most = {"memory_mib": memory_mib, "resident_mib": resident_mib, "forwards": forwards}
    limits = {name: limit for name, limit in most.items() if limit is not None}
    return choose_from(standins(frame), accuracy, limits, num_lost)


def choose_from(
    kept: pd.DataFrame,
    accuracy: float = ACCURACY,
    limits: Mapping[str, float] = MappingProxyType({}),
    losses: int = 1,
) -> tuple[pd.DataFrame, str]:
    """Do what `choose` does with rows of `standins`; `limits` are the most of some of its columns."""
    if kept.empty:
        return kept, "Nothing can be recommended: no stand-in has a known NDA and memory."
    found = weakness(recommended(kept))
    if found:
        return kept[:0], f"Nothing can be recommended: {found}."

    is_accurate = kept.nda_worst >= accuracy
    is_within = kept.losses >= losses
    asked = [f"keeps {100 * accuracy:g} % on the worst task"]
    if losses > 1:
        asked.append(f"bears {losses} losses at once")
    for name, limit in limits.items():
        is_within &= kept[name] <= limit
        asked.append(_LIMITS[name].format(limit))
    accurate, within = kept[is_accurate], kept[is_within]
    rows = kept[is_accurate & is_within].reset_index(drop=True)
    if len(rows):
        best = _described(rows.iloc[0])
        return rows, f"Keep {best}. Of all that {_joined(asked)} it takes the least memory."

    nearest = f"Nothing {_joined(asked)}"
    if len(accurate):
        nearest += f"; the smallest that is accurate enough is {_described(accurate.iloc[0])}"
    if len(within):
        best = _described(_most_accurate(within))
        nearest += f"; the most accurate within the limits is {best}"
    return rows, f"{nearest}."


def _joined(words: Sequence[str]) -> str:
    """Return ``a, b and c``."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _in_words(row: "pd.Series[Any]") -> str:
    """Return what a row of `standins` is called in a sentence, with its decoder if it has one."""
    name = "the survivors alone" if row.method == REFERENCES[0] else row.method
    return f"{name} with {row.decoder}".removesuffix(f" with {REPLICA}")


def _described(row: "pd.Series[Any]") -> str:
    accuracy = f"{100 * row.nda_worst:.2f} % of the lost expert's accuracy on the worst task, {row.worst_task}"
    memory = f"{row.memory_mib:.3g} MiB, {row.resident_mib:.3g} MiB resident"
    costs = f"forwards {row.forwards:g}; up to {row.losses:g} lost at once"
    return f"{_in_words(row)} ({accuracy}; {memory}; {costs})"
