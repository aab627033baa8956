"""The results in a terminal: tables that fit 100 columns, also when piped."""

import math
import sys
from collections.abc import Iterable, Sequence

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coin.reporting.comparison import (
    Cell,
    Comparison,
    Line,
    comparisons,
    expert_accuracies,
    heading,
    percent,
    seconds,
    short,
)

WIDTH = 100
_HEADING = 14
"""The widest heading of a decoder: ``feature_ridge-``."""
_LONGEST_NAME = 30
_COSTS = ("resid.", "seconds", "passes")


def results_console() -> Console:
    """Return a console for results: as wide as the terminal, or `WIDTH` columns where nobody watches."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def print_summary(summary: pd.DataFrame, console: Console | None = None) -> None:
    """Print the experts' own accuracies, then one table of NDA per experiment and size of erasure.

    Args:
        summary: What `coin.reporting.summarise` returns.
        console: Where to print; `results_console` by default.
    """
    console = console or results_console()
    console.print(experts_table(summary))
    for table in summary_tables(summary, console.width):
        console.print(table)
    console.print(
        Text(
            "NDA in % (decoded ÷ expert's accuracy), mean over tasks ± spread over seeds; * largest in column.\n"
            "Seconds, passes: making the coded model + fitting the dearest decoder (linear: nothing)."
        )
    )


def summary_tables(summary: pd.DataFrame, width: int = WIDTH) -> list[Table]:
    """Return tables of mean NDA ± spread: a line per method and BatchNorm policy, a column per decoder.

    The references ``none`` and ``oracle`` stand apart below a rule; the largest mean of each decoder has a star. As
    many decoders stand beside residual and cost as fit the width; the others continue in further tables.

    Args:
        summary: What `coin.reporting.summarise` returns.
        width: How many columns of text there are.
    """
    return [
        _nda_table(comparison, decoders, with_costs=place == 0)
        for comparison in comparisons(summary)
        for place, decoders in enumerate(_packed(comparison, width))
    ]


def experts_table(summary: pd.DataFrame) -> Table:
    """Return a small table of the experts' own accuracies on their tasks' test sets."""
    experts = expert_accuracies(summary)
    several = experts["experiment"].nunique() > 1
    table = Table(title="Experts' own accuracy", title_justify="left", box=box.SIMPLE_HEAD)
    if several:
        table.add_column("experiment", overflow="fold")
    table.add_column("task", overflow="fold")
    table.add_column("accuracy %", justify="right", no_wrap=True)
    table.add_column("seeds", justify="right")
    for _, row in experts.iterrows():
        cells = [Text(row["task"]), Text(percent(Cell(row["mean"], row["spread"]), "±")), Text(str(row["seeds"]))]
        table.add_row(*([Text(row["experiment"])] if several else []), *cells)
    return table


def decoder_heading(decoder: str) -> Text:
    """Return a decoder's name as a heading of a column."""
    return Text(heading(decoder, _HEADING))


def _packed(comparison: Comparison, width: int) -> list[tuple[str, ...]]:
    """Return which decoders stand in which table: as many as fit, and evenly many in those after the first."""
    samples = [max(map(len, ["P", *map(str, comparison.samples)]))] if len(comparison.samples) > 1 else []
    costs = [_width(column) for column in zip(_COSTS, *map(_costs, comparison.lines), strict=True)]
    policies = _width(["BatchNorm", *comparison.policies])
    widths = {decoder: _decoder_width(comparison, decoder) for decoder in comparison.decoders}
    first: list[str] = []
    room = width - _room([_name_width(comparison, with_policy=False), policies, *samples, *costs])
    for decoder in comparison.decoders:
        if first and _room([*(widths[other] for other in first), widths[decoder]]) > room:
            break
        first.append(decoder)
    rest = comparison.decoders[len(first) :]
    room = width - _room([_name_width(comparison, with_policy=True), *samples])
    each = max(1, room // (max((widths[decoder] for decoder in rest), default=1) + 1))
    each = math.ceil(len(rest) / max(1, math.ceil(len(rest) / each))) or 1
    return [tuple(first), *(tuple(rest[start : start + each]) for start in range(0, len(rest), each))]


def _room(widths: Sequence[int]) -> int:
    """Return what columns take, each with a space behind it."""
    return sum(widths) + len(widths)


def _width(texts: Iterable[str]) -> int:
    return max(len(line) for text in texts for line in text.split("\n"))


def _decoder_width(comparison: Comparison, decoder: str) -> int:
    cells = (percent(line.cells[decoder], "±") + "*" for line in comparison.lines if decoder in line.cells)
    return _width([heading(decoder, _HEADING), *cells])


def _name_width(comparison: Comparison, *, with_policy: bool) -> int:
    return min(_LONGEST_NAME, _width(["method", *(_name(line, with_policy) for line in comparison.lines)]))


def _name(line: Line, with_policy: bool) -> str:
    """Return a line's name, without its BatchNorm policy where that has a column of its own."""
    return line.name if with_policy or "[" in line.name else line.method


def _costs(line: Line) -> tuple[str, str, str]:
    residual = "–" if pd.isna(line.residual) else f"{line.residual:.3f}"
    spent = f"{seconds(line.merge_seconds)}+{seconds(line.decoder_seconds)}"
    return residual, spent, f"{short(line.merge_passes)}+{short(line.decoder_passes)}"


def _nda_table(comparison: Comparison, decoders: tuple[str, ...], *, with_costs: bool) -> Table:
    more = "" if with_costs else " (more decoders)"
    title = Text(f"{comparison.experiment}: NDA, {comparison.erased} lost{more}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    several_samples = len(comparison.samples) > 1
    table.add_column("method", overflow="fold", min_width=_name_width(comparison, with_policy=not with_costs))
    if with_costs:
        table.add_column("BatchNorm", no_wrap=True)
    if several_samples:
        table.add_column("P", justify="right", no_wrap=True)
    for decoder in decoders:
        table.add_column(decoder_heading(decoder), justify="right", no_wrap=True)
    for name in _COSTS if with_costs else ():
        table.add_column(name, justify="right", no_wrap=True)
    lines = [line for line in comparison.lines if with_costs or any(decoder in line.cells for decoder in decoders)]
    for i, line in enumerate(lines):
        following = lines[i + 1] if i + 1 < len(lines) else line
        table.add_row(
            *_cells(line, decoders, several_samples, with_costs),
            style="dim" if line.is_reference else None,
            end_section=following.is_reference and not line.is_reference,
        )
    return table


def _cells(line: Line, decoders: tuple[str, ...], several_samples: bool, with_costs: bool) -> list[Text]:
    cells = [Text(_name(line, not with_costs)), *([Text(line.batchnorm or "–")] if with_costs else [])]
    if several_samples:
        cells.append(Text(str(line.samples_per_task)))
    for decoder in decoders:
        cell = line.cells.get(decoder)
        if cell is None:
            cells.append(Text("–"))
        else:
            # The star keeps its place when absent, so that the digits stay aligned.
            cells.append(Text(percent(cell, "±") + ("*" if cell.best else " "), style="bold" if cell.best else ""))
    return [*cells, *(Text(cost) for cost in (_costs(line) if with_costs else ()))]
