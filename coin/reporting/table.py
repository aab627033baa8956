"""The results in a terminal: tables that fit 100 columns, also when piped."""

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
_DECODERS_PER_TABLE = 3
_HEADING = 14
"""The widest heading of a decoder: ``feature_ridge-``."""


def print_summary(summary: pd.DataFrame, console: Console | None = None) -> None:
    """Print the experts' own accuracies, then one table of NDA per experiment and size of erasure.

    Args:
        summary: What `coin.reporting.summarise` returns.
        console: Where to print; standard output by default, 100 columns wide where it is not a terminal.
    """
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)
    console.print(experts_table(summary))
    for table in summary_tables(summary):
        console.print(table)
    console.print(
        Text("NDA in % (decoded ÷ expert's accuracy), mean over tasks ± spread over seeds; * best of its column.")
    )


def summary_table(summary: pd.DataFrame) -> Table:
    """Return the first of `summary_tables`: all there is with one experiment, one coded model and three decoders."""
    return summary_tables(summary)[0]


def summary_tables(summary: pd.DataFrame) -> list[Table]:
    """Return tables of mean NDA ± spread: a line per method and BatchNorm policy, a column per decoder.

    The references ``none`` and ``oracle`` stand apart below a rule; the best method of each decoder has a star. More
    than three decoders continue in a further table, so that each fits 100 columns.

    Args:
        summary: What `coin.reporting.summarise` returns.
    """
    return [
        _nda_table(comparison, comparison.decoders[start : start + _DECODERS_PER_TABLE])
        for comparison in comparisons(summary)
        for start in range(0, len(comparison.decoders), _DECODERS_PER_TABLE)
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


def _nda_table(comparison: Comparison, decoders: tuple[str, ...]) -> Table:
    title = Text(f"{comparison.experiment}: NDA, {comparison.erased} lost")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    several_samples = len(comparison.samples) > 1
    table.add_column("method", overflow="fold", min_width=8)
    table.add_column("BatchNorm", overflow="fold", min_width=9)
    if several_samples:
        table.add_column("P", justify="right", no_wrap=True)
    for decoder in decoders:
        table.add_column(decoder_heading(decoder), justify="right", no_wrap=True)
    for name in ("resid.", "sec.", "passes"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, line in enumerate(comparison.lines):
        following = comparison.lines[i + 1] if i + 1 < len(comparison.lines) else line
        table.add_row(
            *_cells(line, decoders, several_samples),
            style="dim" if line.is_reference else None,
            end_section=following.is_reference and not line.is_reference,
        )
    return table


def _cells(line: Line, decoders: tuple[str, ...], several_samples: bool) -> list[Text]:
    cells = [Text(line.method if "[" not in line.name else line.name), Text(line.batchnorm or "–")]
    if several_samples:
        cells.append(Text(str(line.samples_per_task)))
    for decoder in decoders:
        cell = line.cells.get(decoder)
        if cell is None:
            cells.append(Text("–"))
        else:
            # The star keeps its place when absent, so that the digits stay aligned.
            cells.append(Text(percent(cell, "±") + ("*" if cell.best else " "), style="bold" if cell.best else ""))
    residual = "–" if pd.isna(line.residual.mean) else f"{line.residual.mean:.3f}"
    return [*cells, Text(residual), Text(seconds(line.seconds.mean)), Text(short(line.passes.mean))]
