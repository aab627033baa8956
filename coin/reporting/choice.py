"""Which stand-in to keep, from an experiment's results and a user's limits."""

import math
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from coin.core.choices import check_integer, check_number
from coin.errors import FileError
from coin.reporting.results import RESIDENT
from coin.reporting.summary import read_run, stand_ins, summarise, undominated
from coin.reporting.sweeps import read_sweep_table
from coin.reporting.text import counted, percent, read_by

ACCURACY = 0.98  # the share of a lost expert's accuracy that a recommended stand-in keeps on the worst task
WEAK_EXPERTS = "what stands in is right more often than the lost experts; look at their own accuracy first"
_FAR_ABOVE = 1.1  # an NDA above this says more of the experts than of a stand-in


def recommended(kept: pd.DataFrame) -> "pd.Series[Any]":
    """Return the row of `stand_ins` that is recommended where no other is asked for; `kept` has at least one.

    It is the cheapest that keeps `ACCURACY` on the worst task; where none does, the most accurate one there. All that
    names one stand-in reads it: the headline, the finding, `choose` without limits, and what `coin serve` serves.
    """
    ordered = _cheapest_first(kept)
    accurate = ordered[ordered["nda_worst"] >= ACCURACY]
    return accurate.iloc[0] if len(accurate) else _most_accurate(ordered)


def shortlist(kept: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows of `stand_ins` to look at first.

    They are the `undominated` ones, every name's best decoder and the `recommended` one, which may be neither: it is
    chosen by the worst task.
    """
    shown = [*kept.groupby("name")["nda_mean"].idxmax(), recommended(kept).name]
    return undominated(kept) | kept.index.isin(shown)


def named_by_experiment(kept: pd.DataFrame) -> pd.DataFrame:
    """Return `stand_ins` of several experiments, as a sweep's, whose names say of which; those of one as they are."""
    if kept["experiment"].nunique() < 2:
        return kept
    return kept.assign(name=kept["experiment"] + ": " + kept["name"])


def weakness(row: "pd.Series[Any]") -> str:
    """Return what is wrong with the experts of a row of `stand_ins`, so that nothing can be recommended; "" if nothing.

    One is hardly more often right than chance, or all are so weak that the row is far above them.
    """
    if row["weak_task"]:
        task = row["weak_task"]
        return f"the expert of '{task}' is hardly more often right than chance; look at its accuracy first"
    return WEAK_EXPERTS if row["nda_mean"] > _FAR_ABOVE else ""


def _cheapest_first(kept: pd.DataFrame) -> pd.DataFrame:
    """Return stand-ins by memory, then by forwards; none counts as more accurate than the expert."""
    ascending = {"memory_mib": True, "forwards": True, "nda_worst": False, "losses": False}
    kept = kept.assign(nda_worst=kept["nda_worst"].clip(upper=1.0))
    return kept.sort_values(list(ascending), ascending=list(ascending.values()), kind="stable")


def _most_accurate(ordered: pd.DataFrame) -> "pd.Series[Any]":
    """Return the row that is most accurate on the worst task, the first of several."""
    return ordered.sort_values("nda_worst", ascending=False, kind="stable").iloc[0]


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
        folder: An experiment's folder, a seed's or a sweep's.
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
    sweep = read_sweep_table(Path(folder))
    frame = read_run(Path(folder))[1] if sweep is None else sweep.frame
    least = frame["task"].nunique() if losses == "all" else losses
    check_number("accuracy", accuracy, low=0, most=1, strict=True)
    check_number("memory_mib", memory_mib or 0, low=0)
    check_number("resident_mib", resident_mib or 0, low=0)
    check_number("forwards", forwards or 0, low=0)
    check_integer("losses", least, 1)
    kept = named_by_experiment(stand_ins(summarise(frame)))
    if kept.empty:
        raise FileError(f"found no stand-in in the results of '{folder}' whose memory is known; run `coin run` again")
    if resident_mib is not None and kept[RESIDENT].isna().all():
        told = f"found resident_mib={resident_mib:g} and results of '{folder}' from before it was measured"
        raise FileError(f"{told}; run `coin run` again")
    sound = kept[kept["weak_task"] == ""]  # of a sweep, some experiments may be
    kept = _cheapest_first(kept if sound.empty else sound)
    if found := weakness(recommended(kept)):
        return kept[:0], f"Nothing can be recommended: {found}."
    wishes = {f"at least {100 * accuracy:g} % on the worst task": kept["nda_worst"] >= accuracy}
    if memory_mib is not None:
        wishes[f"at most {memory_mib:g} MiB"] = kept["memory_mib"] <= memory_mib
    if resident_mib is not None:
        wishes[f"at most {resident_mib:g} MiB resident"] = kept[RESIDENT] <= resident_mib
    if forwards is not None:
        wishes[f"at most {counted(forwards, 'network run')}"] = kept["forwards"] <= forwards
    wishes["all experts lost at once" if losses == "all" else f"{least} lost at once"] = kept["losses"] >= least
    met = pd.DataFrame(wishes)
    rows = kept[met.all(axis=1)]
    asked = f"what is asked for ({', '.join(wishes)})"
    if len(rows):
        reason = f"the least memory of the {len(rows)} that meet" if len(rows) > 1 else "the only one that meets"
        return rows.reset_index(drop=True), f"Keep {_described(rows.iloc[0])}. It is {reason} {asked}."
    accurate, within = kept[met.iloc[:, 0]], kept[met.iloc[:, 1:].all(axis=1)]
    nearest = [f"the smallest that is accurate enough is {_described(accurate.iloc[0])}"] if len(accurate) else []
    nearest += [f"the most accurate within the limits is {_described(_most_accurate(within))}"] if len(within) else []
    if not nearest:
        nearest = [f"the most accurate is {_described(_most_accurate(kept))}"]
        nearest += [f"the smallest is {_described(kept.iloc[0])}"]
    return rows, f"Nothing meets {asked}; {'; '.join(nearest)}."


def _described(row: "pd.Series[Any]") -> str:
    resident = "" if math.isnan(row[RESIDENT]) else f", {row[RESIDENT]:.3g} MiB resident"
    return (
        f"{read_by(row)} ({percent(row['nda_worst'])} % of the lost expert's accuracy on the worst task, "
        f"{row['worst_task']}; {row['memory_mib']:.3g} MiB{resident}; "
        f"{counted(row['forwards'], 'network run')} an answer; up to {row['losses']:g} lost at once)"
    )
