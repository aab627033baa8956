"""The table of stand-ins as a data frame of text, for terminal, page and notebooks; and how a terminal shows it."""

import math

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from coin.reporting.choice import choose_from, shortlist, undominated
from coin.reporting.standins import experts, standins, three_digits

BEST = "*"
"""Behind the NDA of what is Pareto-optimal."""
LEGEND = f"{BEST} no other is as good in NDA, worst task, both memories, forwards and losses"
BESIDE = ["agreement", "merge s", "merge passes"]
"""Columns that a terminal of 80 columns has no room for."""
TEXTS = ["method", "decoder"]


def standin_table(kept: pd.DataFrame) -> pd.DataFrame:
    """Return `standins` as text, of shares in %; `BEST` marks those that are `undominated`."""
    stars = undominated(kept).map({True: BEST, False: ""})
    ndas = percents(kept.nda_mean, kept.nda_std)
    table = {"method": kept.method, "decoder": kept.decoder, "NDA": ndas + stars}
    for column in map(str, kept.filter(regex=r"^nda_\d+_lost$")):
        table[column.replace("nda", "NDA").replace("_", " ")] = kept[column].map(percent)
    table |= {
        "worst task": kept.nda_worst.map(percent),
        "memory MiB": kept.memory_mib.map(mebibytes),
        "resident MiB": kept.resident_mib.map(mebibytes),
        "forwards": kept.forwards.map("{:g}".format),
        "lost": kept.losses.map("{:g}".format),
        "agreement": kept.agreement.map(percent),
        "merge s": kept.merge_seconds.map("{:,.1f}".format),
        "merge passes": kept.merge_passes.map("{:,.0f}".format),
    }
    return pd.DataFrame(table).replace("nan", "–")  # the oracle keeps nothing


def percent(mean: float, spread: float = math.nan) -> str:
    """Return ``98.02 ± 0.31`` in percent, without the spread where there is none, ``–`` where there is no number."""
    if math.isnan(mean):
        return "–"
    text = f"{100 * mean:.2f}"
    return text if math.isnan(spread) else f"{text} ± {100 * spread:.2f}"


def percents(means: "pd.Series[float]", spreads: "pd.Series[float]") -> "pd.Series[str]":
    """Return `percent` of every mean and spread."""
    return means.combine(spreads, percent).astype("str")


def mebibytes(value: float) -> str:
    """Return a number of MiB with three digits."""
    return f"{three_digits(value):,g}"


def experts_line(frame: pd.DataFrame) -> str:
    """Return the experts' own accuracies, of rows of results, in a line."""
    own = experts(frame)
    accuracies = own.index + " " + percents(own["mean"], own["spread"])
    return f"Experts, own accuracy in %: {', '.join(accuracies)}"


def print_standins(frame: pd.DataFrame) -> None:
    """Print what to keep of rows of results: the experts' own accuracies, the `shortlist`, and which one."""
    print(experts_line(frame))
    kept = standins(frame)
    if len(kept):
        print_table(standin_table(kept)[shortlist(kept)])
        print(LEGEND)
    print(choose_from(kept)[1])


def print_table(table: pd.DataFrame, console: Console | None = None) -> None:
    """Print a `standin_table` without `BESIDE`; names are folded where the terminal is too narrow."""
    table = table.drop(columns=BESIDE)
    out = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for name in map(str, table):
        if name in TEXTS:
            out.add_column(name, overflow="fold")
        else:
            out.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in table.itertuples(index=False):
        out.add_row(*row)
    (console or Console(markup=False, highlight=False, emoji=False)).print(out)
