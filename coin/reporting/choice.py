"""Which stand-in to keep, from an experiment's results and a user's limits."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import pandas as pd

from coin.core.choices import check_integer, check_number
from coin.errors import FileError
from coin.reporting.summary import read_run, stand_ins, summarise
from coin.reporting.text import counted, mebibytes, percent, read_by

ACCURACY = 0.98  # the share of a lost expert's accuracy that a recommended stand-in keeps on the worst task
WEAK_EXPERTS = (
    "what stands in is right more often than the lost experts; look at their own accuracy first"
)
_FAR_ABOVE = 1.1  # an NDA above this says more of the experts than of a stand-in


def recommended(kept: pd.DataFrame) -> "pd.Series[Any]":
    """Return the row of `stand_ins` that is recommended where no other is asked for; `kept` has at least one.

    It is the cheapest that keeps `ACCURACY` on the worst task; where none does, the most accurate one there. All that
    names one stand-in reads it: `choose` without limits, and what `coin serve` serves.
    """
    ordered = _cheapest_first(kept)
    accurate = ordered[ordered["nda_worst"] >= ACCURACY]
    if len(accurate):
        return accurate.iloc[0]
    return _most_accurate(ordered)


def shortlist(kept: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows of `stand_ins` to look at first.

    They are the `undominated` ones, every name's best decoder and the `recommended` one, which may be neither: it is
    chosen by the worst task.
    """
    best = kept.groupby("name")["nda_mean"].idxmax()
    return undominated(kept) | kept.index.isin([*best, recommended(kept).name])


def weakness(row: "pd.Series[Any]") -> str:
    """Return what is wrong with the experts of a row of `stand_ins`, so that nothing can be recommended; "" if nothing.

    One is hardly more often right than chance, or all are so weak that the row is far above them.
    """
    if row["weak_task"]:
        task = row["weak_task"]
        return f"the expert of '{task}' is hardly more often right than chance; look at its accuracy first"
    return WEAK_EXPERTS if row["nda_mean"] > _FAR_ABOVE else ""


def undominated(kept: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows of `stand_ins` no other beats in NDA, memories, forwards and losses, as printed."""
    less_is_better = ["memory_mib", "resident_mib", "forwards"]
    goods = _as_printed(kept)[["nda_mean", "losses", *less_is_better]]
    goods[less_is_better] = -goods[less_is_better]
    is_beaten = []
    for own in goods.to_numpy():
        as_good = (goods >= own).all(axis=1)
        better = (goods > own).any(axis=1)
        is_beaten.append(bool((as_good & better).any()))
    return ~pd.Series(is_beaten, index=kept.index, dtype=bool)


def _as_printed(kept: pd.DataFrame) -> pd.DataFrame:
    """Return `stand_ins` with shares and memories rounded as tables print them: what is printed alike is equal."""
    kept = kept.copy()
    for name in ("nda_mean", "nda_worst"):
        kept[name] = kept[name].round(4)
    for name in ("memory_mib", "resident_mib"):
        kept[name] = kept[name].map(mebibytes).str.replace(",", "").astype(float)
    return kept


def _cheapest_first(kept: pd.DataFrame) -> pd.DataFrame:
    """Return stand-ins by memory as printed, then by forwards, then by accuracy.

    None counts as more accurate than the expert on the worst task.
    """
    kept = kept.assign(nda_worst=kept["nda_worst"].clip(upper=1.0))
    order = ["memory_mib", "forwards", "nda_worst", "losses", "nda_mean"]
    directions = [True, True, False, False, False]
    ordered = _as_printed(kept).sort_values(order, ascending=directions, kind="stable")
    return kept.loc[ordered.index]


def _most_accurate(ordered: pd.DataFrame) -> "pd.Series[Any]":
    """Return the row that is most accurate on the worst task, the first of several that are printed alike."""
    printed = _as_printed(ordered)
    best_first = printed.sort_values("nda_worst", ascending=False, kind="stable")
    return ordered.loc[best_first.index].iloc[0]


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
    num_lost = frame["task"].nunique() if losses == "all" else losses
    check_number("accuracy", accuracy, low=0, most=1, strict=True)
    check_integer("losses", num_lost, 1)
    limits = {}
    for column, most in (
        ("memory_mib", memory_mib),
        ("resident_mib", resident_mib),
        ("forwards", forwards),
    ):
        if most is not None:
            check_number(column, most, low=0)
            limits[column] = most
    kept = stand_ins(summarise(frame))
    if kept.empty:
        raise FileError(
            f"found no stand-in in the results of '{folder}' whose memory is known; run `coin run` again"
        )
    return choose_from(kept, accuracy, limits, num_lost)


def choose_from(
    kept: pd.DataFrame,
    accuracy: float = ACCURACY,
    limits: Mapping[str, float] = MappingProxyType({}),
    losses: int = 1,
) -> tuple[pd.DataFrame, str]:
    """Do what `choose` does with rows of `stand_ins`; `limits` are the most by column."""
    kept = _cheapest_first(kept)
    found = weakness(recommended(kept))
    if found:
        return kept[:0], f"Nothing can be recommended: {found}."
    is_accurate = kept["nda_worst"] >= accuracy
    is_within = kept["losses"] >= losses
    wishes = [f"at least {100 * accuracy:g} % on the worst task"]
    for column, most in limits.items():
        is_within &= kept[column] <= most
        wishes.append(f"{column} up to {most:g}")
    wishes.append(f"{losses} lost at once")
    asked = f"what is asked for ({', '.join(wishes)})"

    rows = kept[is_accurate & is_within].reset_index(drop=True)
    if len(rows) == 1:
        return rows, f"Keep {_described(rows.iloc[0])}. It is the only one that meets {asked}."
    if len(rows) > 1:
        best = _described(rows.iloc[0])
        return rows, f"Keep {best}. It is the least memory of the {len(rows)} that meet {asked}."

    nearest = []
    if is_accurate.any():
        smallest = kept[is_accurate].iloc[0]
        nearest.append(f"the smallest that is accurate enough is {_described(smallest)}")
    if is_within.any():
        best_within = _most_accurate(kept[is_within])
        nearest.append(f"the most accurate within the limits is {_described(best_within)}")
    if not nearest:
        nearest.append(f"the most accurate is {_described(_most_accurate(kept))}")
        nearest.append(f"the smallest is {_described(kept.iloc[0])}")
    return rows, f"Nothing meets {asked}; {'; '.join(nearest)}."


def _described(row: "pd.Series[Any]") -> str:
    kept = f"{percent(row['nda_worst'])} % of the lost expert's accuracy on the worst task, {row['worst_task']}"
    memory = f"{row['memory_mib']:.3g} MiB, {row['resident_mib']:.3g} MiB resident"
    runs = counted(row["forwards"], "network run")
    lost = f"up to {row['losses']:g} lost at once"
    return f"{read_by(row)} ({kept}; {memory}; {runs} an answer; {lost})"
