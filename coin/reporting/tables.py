"""Tables of mean NDA as data frames of text, for terminal, page and notebooks; and how a terminal shows them."""

import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.ticker import EngFormatter
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coin.coding.decoder_config import REPLICA
from coin.reporting.summary import REFERENCES, decoders_of, expert_accuracies, stand_ins, undominated, variant_names

COSTS = ("residual", "merge s", "decoder s", "merge passes", "decoder passes")
FAR_ABOVE = 1.1
"""An NDA above this says more of the experts than of a stand-in."""
NEAR = 0.01
"""How far below the best NDA a stand-in may be to be called as good in a sentence."""
IN_SHORT = "In short: "
"""How a finding begins."""
BEST = "*"
"""Behind the largest mean of a decoder (and P)."""


def percent(mean: float, spread: float = math.nan, sign: str = " ± ", digits: int = 2, plus: str = "") -> str:
    """Return ``98.02 ± 0.31`` in percent, without the spread where there is none, ``–`` where there is no number."""
    if math.isnan(mean):
        return "–"
    return f"{100 * mean:{plus}.{digits}f}" + ("" if math.isnan(spread) else f"{sign}{100 * spread:.{digits}f}")


def seconds(value: float) -> str:
    """Return a duration in seconds with about three digits, ``–`` for NaN."""
    return "–" if math.isnan(value) else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def counted(number: float, what: str) -> str:
    """Return ``1 expert``, ``2 experts``."""
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def short(value: float) -> str:
    """Return a count in a few characters: ``840``, ``8.4k``, ``57.6k``, ``1.2M``; ``–`` for NaN."""
    return "–" if math.isnan(value) else EngFormatter(sep="")(float(f"{value:.3g}"))


def nda_tables(summary: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Return a table of mean NDA ± spread in % for every experiment and size of erasure (``1 of 2``) of a summary.

    A line per method's variant (and P where there are several), the references last. The columns: ``method``, ``P``,
    the decoders in the order of `decoders_of`, then `COSTS`: what made the coded model (``merge``) and what fitted the
    dearest decoder beside it. The largest mean of a decoder and P, to the two decimals printed, carries `BEST`.
    """
    means = summary[summary["task"] == "mean"].assign(name=variant_names(summary))
    return {
        (str(experiment), str(erased)): _nda_table(part)
        for (experiment, erased), part in means.groupby(["experiment", "erased"], sort=False)
    }


def stand_in_table(kept: pd.DataFrame, *, all_rows: bool = True) -> pd.DataFrame:
    """Return `stand_ins` as text, the `undominated` ones with `BEST`, or these alone."""
    best = undominated(kept)
    rows = zip(kept.to_dict("records"), best, strict=True)
    lines = [
        {
            "method": row["name"],
            "decoder": row["decoder"],
            "NDA": percent(row["nda_mean"], row["nda_std"]) + BEST * (all_rows and is_best),
            "memory MiB": f"{row['memory_mib']:.3g}" if row["memory_mib"] < 1000 else f"{row['memory_mib']:,.0f}",
            "forwards": f"{row['forwards']:g}",
            "losses": f"{row['losses']:g}",
            "merge s": seconds(row["merge_seconds"]),
        }
        for row, is_best in rows
        if all_rows or is_best
    ]
    return pd.DataFrame(lines)


def choice_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that `choose` returns as text, the first with `BEST`; accuracy is that of the worst task."""
    table = stand_in_table(rows).drop(columns=["merge s", "NDA"])
    table.insert(2, "worst task", [percent(nda) + BEST * (place == 0) for place, nda in enumerate(rows["nda_worst"])])
    return table


def risk_totals(risk: pd.DataFrame) -> pd.DataFrame:
    """Return the points of ``risk.csv`` over all samples of tasks lost alone, by ``name`` (a variant's) and decoder."""
    alone = risk[risk["erased"] == risk["task"]].assign(name=variant_names)
    numbers = ["risk", "agreement", "decoded_accuracy", "expert_accuracy"]
    alone[numbers] = alone[numbers].mul(alone["samples"], axis=0)
    totals = alone.groupby(["name", "decoder", "curve", "at"], sort=False)[["samples", *numbers]].sum().reset_index()
    totals[numbers] = totals[numbers].div(totals["samples"], axis=0)
    return totals


def risk_table(totals: pd.DataFrame) -> pd.DataFrame:
    """Return a line per method's variant of `risk_totals` of one decoder: accuracy and agreement in % by coverage."""
    lines: dict[str, dict[str, str]] = {}
    for row in totals[totals["curve"] == "coverage"].to_dict("records"):
        line = lines.setdefault(row["name"], {"predicted": percent(1 - row["risk"])})
        for what, column in (("agree", "agreement"), ("right", "decoded_accuracy"), ("expert", "expert_accuracy")):
            line[f"{what} at {row['at']:.0%}"] = percent(row[column])
    return pd.DataFrame([{"method": name, **line} for name, line in lines.items()])


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
    best = contenders.groupby(["decoder", "samples_per_task"])["nda_mean"].max().round(4).to_dict()
    rank = {name: place for place, name in enumerate(dict.fromkeys([*contenders["name"], *means["name"]]))}
    decoders = decoders_of(means)
    lines = []
    for (name, samples), part in means.groupby(["name", "samples_per_task"], sort=False):
        first = part.iloc[0]
        line = {"method": str(name), "P": str(samples)} | dict.fromkeys(decoders, "–")
        for row in part.to_dict("records"):
            top = best.get((row["decoder"], samples), math.nan)
            is_best = row["method"] not in REFERENCES and round(row["nda_mean"], 4) == top
            line[row["decoder"]] = percent(row["nda_mean"], row["nda_std"]) + BEST * is_best
        line["residual"] = "–" if math.isnan(first["residual_mean"]) else f"{first['residual_mean']:.3f}"
        for step in ("merge", "decoder"):
            line[f"{step} s"] = seconds(part[f"{step}_seconds_mean"].max())
            line[f"{step} passes"] = short(part[f"{step}_passes_mean"].max())
        lines.append((rank[name], samples, line))
    columns = ["method", *(["P"] if means["samples_per_task"].nunique() > 1 else []), *decoders, *COSTS]
    return pd.DataFrame([line for *_, line in sorted(lines, key=lambda each: each[:2])], columns=columns)


def results_console() -> Console:
    """Return a console for results: as wide as the terminal or as COLUMNS says, else of 80 columns."""
    return Console(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit() else 80)


def print_summary(summary: pd.DataFrame, console: Console | None = None, *, reported: bool = True) -> None:
    """Print the experts' own accuracies, one table of NDA per experiment and size of erasure, and what to keep.

    The linear decoder and the winning one always have their columns; of the others and of the costs there is as much as
    fits the width. A report and ``summary.csv`` are named where these are written (`reported`).
    """
    console = console or results_console()
    experts = expert_accuracies(summary)
    for experiment, part in experts.groupby("experiment", sort=False):
        whose = f" of {experiment}" if experts["experiment"].nunique() > 1 else ""
        rows: Any = part.itertuples(index=False)
        each = (f"{row.task} {percent(row.mean, row.spread)}" for row in rows)
        console.print(Text(f"Experts{whose}, own accuracy in %: {', '.join(each)}"))
    left_out: dict[str, None] = {}
    for (experiment, erased), table in nda_tables(summary).items():
        shown = _fitting(table, console.width)
        left_out |= dict.fromkeys(name for name in table.columns if name not in shown)
        references = sum(name.partition("[")[0] in REFERENCES for name in table["method"])
        title = f"{experiment}: NDA in %, {erased} lost"
        console.print(rich_table(table[shown], title, ends=[len(table) - references]))
    where, everything = ("summary.csv", "; all of them in the report") if reported else ("results.csv", "")
    rest = f" Not shown: {', '.join(left_out)}; see {where}." if left_out else ""
    console.print(Text(f"Mean over tasks ± spread over seeds; {BEST} largest of its decoder.{rest}"))
    for experiment, part in summary.groupby("experiment", sort=False):
        table = stand_in_table(stand_ins(part), all_rows=False)
        if len(table):
            console.print(rich_table(table, f"{experiment}: what to keep", ["method", "decoder"]))
            console.print(Text(f"What no other beats in NDA, memory, forwards and losses{everything}."))
            console.print(Text(finding(stand_ins(part))))


def finding(kept: pd.DataFrame) -> str:
    """Return `stand_ins` in a sentence: the smallest that is within `NEAR` of the best, beside the survivors alone."""
    near = kept[(kept["nda_mean"] >= kept["nda_mean"].max() - NEAR) & undominated(kept)]
    row = near.loc[near["memory_mib"].idxmin()]
    alone = kept[kept["name"] == REFERENCES[0]]["nda_mean"].max()
    if row["nda_mean"] > FAR_ABOVE:
        return f"{IN_SHORT}what stands in is right more often than the lost experts; look at their own accuracy first."
    rest = "" if math.isnan(alone) else f"; the survivors alone keep {percent(alone, digits=1)} %"
    how = f" with {row['decoder']}" if row["decoder"] != REPLICA else ""
    return (
        f"{IN_SHORT}{row['name']}{how} keeps {percent(row['nda_mean'], digits=1)} % of a lost expert's accuracy in "
        f"{row['memory_mib']:.3g} MiB; an answer takes {counted(row['forwards'], 'network run')}, and up to "
        f"{counted(row['losses'], 'expert')} may be lost at once{rest}."
    )


def describe(row: "pd.Series[Any]") -> str:
    """Return a row of `stand_ins` in words: what it is, what it keeps on the worst task, and what it costs."""
    how = f" with {row['decoder']}" if row["decoder"] != REPLICA else ""
    return (
        f"{row['name']}{how} ({percent(row['nda_worst'])} % of the lost expert's accuracy on the worst task, "
        f"{row['worst_task']}; {row['memory_mib']:.3g} MiB; {counted(row['forwards'], 'network run')} an answer; up to "
        f"{row['losses']:g} lost at once)"
    )


def rich_table(table: pd.DataFrame, title: str, texts: Sequence[str] = ("method",), ends: Sequence[int] = ()) -> Table:
    """Return a frame of text as a table for the terminal; the columns in `texts` are set to the left, and may break.

    A rule follows after each number of rows in `ends`.
    """
    out = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for name in table.columns:
        if name in texts:
            out.add_column(Text(heading(str(name))), overflow="fold")
        else:  # a number that is cut says so
            out.add_column(Text(heading(str(name))), justify="right", no_wrap=True, overflow="ellipsis")
    starred = {name: any(str(cell).endswith(BEST) for cell in table[name]) for name in table.columns}
    for place, row in enumerate(table.itertuples(index=False), 1):
        cells = (
            # Without its star a number keeps its place, so that the digits stay aligned.
            Text(cell, style="bold") if cell.endswith(BEST) else Text(cell + " " * starred[name])
            for name, cell in zip(table.columns, map(str, row), strict=True)
        )
        out.add_row(*cells, end_section=place in ends)
    return out


def heading(name: str, width: int = 14) -> str:
    """Return a name as a heading: a long one on several lines, each broken behind a hyphen or between words."""
    lines = [""]
    for part in re.findall(r"[^- ]*[- ]|[^- ]+", name):
        if lines[-1] and len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def _fitting(table: pd.DataFrame, width: int) -> list[str]:
    """Return the columns that fit, the two decoders that matter before the costs and the other decoders."""
    decoders = [name for name in table.columns if name not in ("method", "P", *COSTS)]
    room, shown = width - 1, []
    for name in ["method", *(["P"] if "P" in table else []), *decoders[:2], "merge s", *decoders[2:], *COSTS]:
        widths = [len(line) for text in (heading(name), *table[name]) for line in text.split("\n")]
        wanted = min(max(widths), 30 if name == "method" else width) + 1
        if name not in shown and (wanted <= room or name in ("method", *decoders[:2])):
            shown.append(name)
            room -= wanted
    return [name for name in table.columns if name in shown]
