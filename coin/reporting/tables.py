"""Tables of mean NDA as data frames of text, for terminal, page and notebooks; and how a terminal shows them."""

import math
import os
import sys
from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coin.reporting.choice import choose_from, shortlist, undominated
from coin.reporting.summary import (
    REFERENCES,
    decoders_of,
    expert_accuracies,
    stand_ins,
    variant_names,
)
from coin.reporting.text import mebibytes, number, percent, percents, seconds

BEST = "*"
"""Behind the largest mean of a decoder (and P)."""
ORACLE = REFERENCES[1]
_STARS = {True: BEST, False: ""}
_WIDEST = 9  # characters of a heading in one line


def nda_tables(summary: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return a table of mean NDA ± spread in % for every size of erasure (``1 of 2``) of one experiment's summary.

    A line per method's variant (and P where there are several), the references last. The columns: ``method``, ``P``,
    ``NDA`` with its best ``decoder``, all decoders in the order of `decoders_of`, the residual, and what made the coded
    model (``merge``) and fitted the dearest decoder beside it. The largest mean of a column and P, to the two decimals
    printed, carries `BEST`; the oracle does not count.
    """
    means = summary[summary["task"] == "mean"].assign(name=variant_names(summary))
    by_size = means.groupby("erased", sort=False)
    return {str(erased): _nda_table(part) for erased, part in by_size}


def _nda_table(means: pd.DataFrame) -> pd.DataFrame:
    rounded = means["nda_mean"].round(4).mask(means["method"] == ORACLE)
    of_samples = means["samples_per_task"]
    best_of_decoder = rounded.groupby([means["decoder"], of_samples]).transform("max")
    best_of_all = rounded.groupby(of_samples).transform("max")
    ndas = percents(means["nda_mean"], means["nda_std"])
    means = means.assign(
        nda=ndas + (rounded == best_of_decoder).map(_STARS),
        best_nda=ndas + (rounded == best_of_all).map(_STARS),
        is_reference=means["method"].isin(REFERENCES),
    )
    means = means.sort_values("is_reference", kind="stable")
    lines = []
    for (name, samples), rows in means.groupby(["name", "samples_per_task"], sort=False):
        best = rows.sort_values("nda_mean", ascending=False, kind="stable").iloc[0]
        line = {
            "method": name,
            "P": str(samples),
            "NDA": best["best_nda"],
            "decoder": best["decoder"],
            "residual": number(best["residual_mean"], 3),
            "merge s": seconds(rows["merge_seconds_mean"].max()),
            "decoder s": seconds(rows["decoder_seconds_mean"].max()),
            "merge passes": f"{rows['merge_passes_mean'].max():,.0f}",
            "decoder passes": f"{rows['decoder_passes_mean'].max():,.0f}",
        }
        line |= dict(zip(rows["decoder"], rows["nda"], strict=True))
        lines.append(line)
    decoders = decoders_of(means)
    several = ["P"] if of_samples.nunique() > 1 else []
    costs = ["residual", "merge s", "decoder s", "merge passes", "decoder passes"]
    columns = ["method", *several, "NDA", "decoder", *decoders, *costs]
    return pd.DataFrame(lines).fillna("–")[columns]


def stand_in_table(kept: pd.DataFrame) -> pd.DataFrame:
    """Return `stand_ins` as text, the `undominated` ones with `BEST`."""
    ndas = percents(kept["nda_mean"], kept["nda_std"])
    stars = undominated(kept).map(_STARS)
    table = {
        "method": kept["name"],
        "decoder": kept["decoder"],
        "NDA": ndas + stars,
        "memory MiB": kept["memory_mib"].map(mebibytes),
        "resident MiB": kept["resident_mib"].map(mebibytes),
        "forwards": kept["forwards"].map("{:g}".format),
        "lost": kept["losses"].map("{:g}".format),
        "merge s": kept["merge_seconds"].map(seconds),
    }
    return pd.DataFrame(table)


def keep_table(kept: pd.DataFrame, experiment: str) -> Table:
    """Return the `shortlist` of `stand_ins` for a terminal of 80 columns."""
    table = stand_in_table(kept[shortlist(kept)]).drop(columns="merge s")
    return rich_table(table, f"{experiment}: what to keep", ["method", "decoder"])


def promise_table(promises: pd.DataFrame) -> pd.DataFrame:
    """Return a line per method's variant and decoder of rows of ``promise.csv``: means over tasks and seeds, in %.

    ``given`` says for how many of them anything is promised; ``found`` is over all accepted answers.
    """
    lines = []
    promises = promises.assign(name=variant_names)
    for (name, decoder), own in promises.groupby(["name", "decoder"], sort=False):
        given = own[own["threshold"].notna()]
        accepted = given["coverage"].sum()
        differing = (given["coverage"] * given["found"].fillna(0)).sum()
        share = differing / accepted if accepted else math.nan
        line = {
            "method": name,
            "decoder": decoder,
            "given": f"{len(given)} of {len(own)}",
            "at most": percent(own["alpha"].mean()),
            "coverage promised": percent(own["promised"].mean()),
            "coverage": percent(own["coverage"].mean()),
            "found": percent(share),
        }
        lines.append(line)
    return pd.DataFrame(lines)


def results_console() -> Console:
    """Return a console for results: as wide as the terminal or as COLUMNS says, else of 80 columns."""
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if has_width else 80)


def print_summary(summary: pd.DataFrame, console: Console | None = None) -> None:
    """Print the experts' own accuracies, every method's best decoder for every size of erasure, and what to keep."""
    console = console or results_console()
    experiment = summary["experiment"].iloc[0]
    experts = expert_accuracies(summary)
    accuracies = experts["task"] + " " + percents(experts["mean"], experts["spread"])
    console.print(Text(f"Experts, own accuracy in %: {', '.join(accuracies)}"))
    for erased, table in nda_tables(summary).items():
        shown = [name for name in ("method", "P", "NDA", "decoder", "merge s") if name in table]
        title = f"{experiment}: NDA in %, {erased} lost"
        console.print(rich_table(table[shown], title, ["method", "decoder"]))
    console.print(
        Text(f"Mean over tasks ± spread over seeds, every method's best decoder; {BEST} largest.")
    )
    kept = stand_ins(summary)
    if len(kept):
        console.print(keep_table(kept, experiment))
        console.print(
            Text(f"{BEST} no other beats it in NDA, memories, forwards and experts lost.")
        )
        _, sentence = choose_from(kept)
        console.print(Text(sentence))


def rich_table(table: pd.DataFrame, title: str, texts: Sequence[str] = ("method",)) -> Table:
    """Return a frame of text for the terminal: `texts` are set to the left and may break, a star's cell is bold."""
    out = Table(
        title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0
    )
    for name in table.columns:
        heading = str(name)
        if len(heading) > _WIDEST:  # it is broken behind hyphens and between words
            heading = heading.replace("-", "-\n").replace(" ", "\n")
        if name in texts:
            out.add_column(Text(heading), overflow="fold")
        else:
            out.add_column(Text(heading), justify="right", no_wrap=True, overflow="ellipsis")
    for row in table.to_dict("records"):
        cells = []
        for cell in row.values():
            style = "bold" if cell.endswith(BEST) else ""
            cells.append(Text(cell, style=style))
        out.add_row(*cells)
    return out
