"""Tables of mean NDA as data frames of text, for terminal, page and notebooks; and how a terminal shows them."""

import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coin.reporting.choice import recommended, shortlist, weakness
from coin.reporting.results import RESIDENT
from coin.reporting.summary import (
    REFERENCES,
    decoders_of,
    expert_accuracies,
    stand_ins,
    undominated,
    variant_names,
)
from coin.reporting.sweeps import SEEDS, short_names, short_value, sweep_text
from coin.reporting.text import counted, mebibytes, percent, read_by, seconds

COSTS = ("residual", "merge s", "decoder s", "merge passes", "decoder passes")
IN_SHORT = "In short: "  # how a finding begins
BEST = "*"
"""Behind the largest mean of a decoder (and P)."""
NONE, ORACLE = REFERENCES
_WIDEST = 9  # characters of a heading in one line


def nda_tables(summary: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return a table of mean NDA ± spread in % for every size of erasure (``1 of 2``) of one experiment's summary.

    A line per method's variant (and P where there are several), the references last. The columns: ``method``, ``P``,
    ``NDA`` with its best ``decoder``, all decoders in the order of `decoders_of`, then `COSTS`: what made the coded
    model (``merge``) and what fitted the dearest decoder beside it. The largest mean of a column and P but for the
    oracle's, to the two decimals printed, carries `BEST`.
    """
    means = summary[summary["task"] == "mean"].assign(name=variant_names(summary))
    return {str(erased): _nda_table(part) for erased, part in means.groupby("erased", sort=False)}


def stand_in_table(kept: pd.DataFrame) -> pd.DataFrame:
    """Return `stand_ins` as text, the `undominated` ones with `BEST`; without resident memory if none was measured."""
    rows = zip(kept.to_dict("records"), undominated(kept), strict=True)
    lines = [
        {
            "method": row["name"],
            "decoder": row["decoder"],
            "NDA": percent(row["nda_mean"], row["nda_std"]) + BEST * is_best,
            "memory MiB": mebibytes(row["memory_mib"]),
            "resident MiB": mebibytes(row[RESIDENT]),
            "forwards": f"{row['forwards']:g}",
            "lost": f"{row['losses']:g}",
            "merge s": seconds(row["merge_seconds"]),
        }
        for row, is_best in rows
    ]
    table = pd.DataFrame(lines)
    return table.drop(columns="resident MiB") if kept[RESIDENT].isna().all() else table


def keep_table(kept: pd.DataFrame, experiment: str, console: Console) -> Table:
    """Return the `shortlist` of `stand_ins` for the terminal, without the time of merging where there is no room."""
    table = stand_in_table(kept[shortlist(kept)])
    layout: Any = {"title": f"{experiment}: what to keep", "texts": ["method", "decoder"]}
    if too_wide(rich_table(table, **layout), console):
        table = table.drop(columns="merge s")
    return rich_table(table, **layout)


def promise_table(promises: pd.DataFrame) -> pd.DataFrame:
    """Return a line per method's variant of rows of ``promise.csv`` of one decoder: means over tasks and seeds, in %.

    ``given`` says for how many of them anything is promised; ``found`` is over all accepted answers.
    """
    lines = []
    for name, own in promises.assign(name=variant_names).groupby("name", sort=False):
        given = own[own["threshold"].notna()]
        accepted = given["coverage"].sum()
        found = (given["coverage"] * given["found"].fillna(0)).sum() / accepted if accepted else math.nan
        line = {"method": str(name), "given": f"{len(given)} of {len(own)}"}
        line |= {column: percent(own[column].mean()) for column in ("alpha", "promised", "coverage")}
        lines.append({**line, "found": percent(found)})
    return pd.DataFrame(lines).rename(columns={"alpha": "at most", "promised": "coverage promised"})


def _nda_table(means: pd.DataFrame) -> pd.DataFrame:
    contenders = means[~means["method"].isin(REFERENCES)]
    served = means[means["method"] != ORACLE]
    best = served.groupby(["decoder", "samples_per_task"])["nda_mean"].max().round(4).to_dict()
    best_of_all = served.groupby("samples_per_task")["nda_mean"].max().round(4).to_dict()
    rank = {name: place for place, name in enumerate(dict.fromkeys([*contenders["name"], *means["name"]]))}
    decoders = decoders_of(means)
    lines = []
    for (name, samples), part in means.groupby(["name", "samples_per_task"], sort=False):
        first = part.iloc[0]
        line = {"method": str(name), "P": str(samples), "NDA": "–", "decoder": "–"} | dict.fromkeys(decoders, "–")
        for row in part.to_dict("records"):
            top = best.get((row["decoder"], samples), math.nan)
            is_best = row["method"] != ORACLE and round(row["nda_mean"], 4) == top
            line[row["decoder"]] = percent(row["nda_mean"], row["nda_std"]) + BEST * is_best
        known = part.dropna(subset="nda_mean")
        if len(known):
            own = known.sort_values("nda_mean", ascending=False, kind="stable").iloc[0]
            top = best_of_all.get(samples, math.nan)
            is_best = own["method"] != ORACLE and bool(round(own["nda_mean"], 4) == top)
            line["NDA"] = percent(own["nda_mean"], own["nda_std"]) + BEST * is_best
            line["decoder"] = str(own["decoder"])
        line["residual"] = "–" if math.isnan(first["residual_mean"]) else f"{first['residual_mean']:.3f}"
        for step in ("merge", "decoder"):
            line[f"{step} s"] = seconds(part[f"{step}_seconds_mean"].max())
            line[f"{step} passes"] = f"{part[f'{step}_passes_mean'].max():,.0f}"
        lines.append((rank[name], samples, line))
    several = ["P"] if means["samples_per_task"].nunique() > 1 else []
    columns = ["method", *several, "NDA", "decoder", *decoders, *COSTS]
    return pd.DataFrame([line for *_, line in sorted(lines, key=lambda each: each[:2])], columns=columns)


def results_console() -> Console:
    """Return a console for results: as wide as the terminal or as COLUMNS says, else of 80 columns."""
    return Console(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit() else 80)


def too_wide(table: Table, console: Console) -> bool:
    """Return whether a table, with no text broken, is wider than the console."""
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum > console.width


def print_summary(summary: pd.DataFrame, console: Console | None = None, *, reported: bool = True) -> None:
    """Print one experiment's own accuracies, a table of NDA for every size of erasure, and what to keep.

    Where a table is wider than the terminal, it has every method's best decoder and the time of merging. A report and
    ``summary.csv`` are named where these are written (`reported`).
    """
    console = console or results_console()
    rows: Any = expert_accuracies(summary).itertuples(index=False)
    each = (f"{row.task} {percent(row.mean, row.spread)}" for row in rows)
    console.print(Text(f"Experts, own accuracy in %: {', '.join(each)}"))
    left_out: dict[str, None] = {}
    experiment = summary["experiment"].iloc[0]
    for erased, table in nda_tables(summary).items():
        references = sum(name.partition("[")[0] in REFERENCES for name in table["method"])
        layout: Any = {"title": f"{experiment}: NDA in %, {erased} lost", "ends": [len(table) - references]}
        layout["texts"] = ["method", "decoder"]
        if too_wide(rich_table(table, **layout), console):
            matter = ["method", "P", "NDA", "decoder", "merge s"]
            left_out |= dict.fromkeys(name for name in table.columns if name not in matter)
            table = table[[name for name in table.columns if name in matter]]
        console.print(rich_table(table, **layout))
    where, everything = ("summary.csv", "; all of them in the report") if reported else ("results.csv", "")
    rest = f" Not shown: {', '.join(left_out)}; see {where}." if left_out else ""
    console.print(Text(f"Mean over tasks ± spread over seeds; {BEST} largest of its column.{rest}"))
    if len(kept := stand_ins(summary)):
        console.print(keep_table(kept, experiment, console))
        told = f"Every method's best decoder; {BEST} no other beats it in NDA, memories, forwards and experts lost"
        console.print(Text(f"{told}{everything}."))
        console.print(Text(finding(kept)))


def finding(kept: pd.DataFrame) -> str:
    """Return the recommended row of `stand_ins` in a sentence, beside the survivors alone."""
    row = recommended(kept)
    if found := weakness(row):
        return f"{IN_SHORT}{found}."
    alone = kept[kept["name"] == NONE]["nda_mean"].max()
    is_none = row["name"] == NONE
    share = percent(min(row["nda_mean"], 1.0), digits=1)
    rest = "" if is_none or math.isnan(alone) else f"; the survivors alone keep {percent(min(alone, 1.0), digits=1)} %"
    return (
        f"{IN_SHORT}{read_by(row)} {'keep' if is_none else 'keeps'} {share} % of a lost expert's accuracy in "
        f"{row['memory_mib']:.3g} MiB; an answer takes {counted(row['forwards'], 'network run')}, and up to "
        f"{counted(row['losses'], 'expert')} may be lost at once{rest}."
    )


def rich_table(table: pd.DataFrame, title: str, texts: Sequence[str] = ("method",), ends: Sequence[int] = ()) -> Table:
    """Return a frame of text for the terminal: `texts` are set to the left and may break, rules follow rows `ends`."""
    out = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    number: Any = {"justify": "right", "no_wrap": True, "overflow": "ellipsis"}  # one that is cut says so
    for name in table.columns:
        # A long heading is broken behind hyphens and between words.
        heading = str(name) if len(name) <= _WIDEST else str(name).replace("-", "-\n").replace(" ", "\n")
        out.add_column(Text(heading), **({"overflow": "fold"} if name in texts else number))
    starred = {name: any(str(cell).endswith(BEST) for cell in table[name]) for name in table.columns}
    for place, row in enumerate(table.itertuples(index=False), 1):
        cells = (
            # Without its star a number keeps its place, so that the digits stay aligned.
            Text(cell, style="bold") if cell.endswith(BEST) else Text(cell + " " * starred[name])
            for name, cell in zip(table.columns, map(str, row), strict=True)
        )
        out.add_row(*cells, end_section=place in ends)
    return out


def sweep_table(frame: pd.DataFrame, swept: Sequence[str], title: str) -> Table:
    """Return `sweep_text` of a `sweep_frame`, whose first columns are the swept keys, as a table for the terminal."""
    keys = [key for key in swept if key != SEEDS]
    points = frame[["experiment", *keys]].drop_duplicates("experiment").astype(str)
    for key in keys:
        every = list(dict.fromkeys(points[key]))
        points[key] = [short_value(value, every) for value in points[key]]
    text = sweep_text(frame.drop(columns=list(swept)), points.set_index("experiment"))
    text = text.rename(columns=short_names(keys))
    firsts = text.iloc[:, 0].tolist() if keys else []
    ends = [place for place in range(1, len(firsts)) if firsts[place] != firsts[place - 1]]
    return rich_table(text, title, [*text.columns[: len(keys) + 1], "method"], ends)
