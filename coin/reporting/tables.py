"""The report's tables of numbers."""

import math
from collections.abc import Mapping, Sequence
from html import escape

import pandas as pd

from coin.reporting import markup
from coin.reporting.comparison import (
    Cell,
    Comparison,
    Line,
    comparisons,
    expert_accuracies,
    percent,
    seconds,
    short,
)  # fmt: skip

NOTE = (
    "NDA in %: accuracy of the decoded output ÷ accuracy of the expert itself, mean over the lost tasks, ± sample "
    "standard deviation over seeds. Shaded: the largest mean of its decoder (and P). <i>none</i>: the survivors alone, "
    "without a coded model; <i>oracle</i>: Σβf itself. Seconds and passes (forward-equivalents of one sample): <i>merge"
    "</i> is what it took to make the coded model, <i>decoder</i> what fitting the dearest of the decoders took beside "
    "it; the linear one takes nothing."
)
"""How to read a table of NDA, as HTML."""
_COSTS = ("residual", "merge seconds", "merge passes", "decoder seconds", "decoder passes")


def nda_tables(summary: pd.DataFrame) -> str:
    """Return all comparisons of a summary, one table each."""
    several = summary["experiment"].nunique() > 1
    return "".join(
        f"<h3>{escape(f'{each.experiment}: ' if several else '')}{escape(each.erased)} lost</h3>{nda_table(each)}"
        for each in comparisons(summary)
    )


def nda_table(comparison: Comparison) -> str:
    """Return one comparison as a table: the best cells marked, the references set apart."""
    several = len(comparison.samples) > 1
    head = ["method", "BatchNorm", *(["P"] if several else []), *comparison.decoders, *_COSTS]
    rows = []
    before: Line | None = None
    for line in comparison.lines:
        rows.append(markup.row(_line_cells(line, comparison.decoders, several), _kind(line, before)))
        before = line
    return markup.table(head, rows, text_columns=("method", "BatchNorm"))


def sweep_table(summary: pd.DataFrame, options: Mapping[str, Mapping[str, str]]) -> str:
    """Return all comparisons of a sweep's parts as one table, a part after the other; the best of each part is marked.

    Args:
        summary: The parts' summaries; ``experiment`` is the part.
        options: The swept options by part.
    """
    found = comparisons(summary)
    decoders = tuple(dict.fromkeys(decoder for each in found for decoder in each.decoders))
    names = list(next(iter(options.values())))
    several = len({samples for each in found for samples in each.samples}) > 1
    erasures = len({each.erased for each in found}) > 1
    head = [*names, *(["lost"] if erasures else []), "method", "BatchNorm", *(["P"] if several else [])]
    rows: list[str] = []
    for each in found:
        lead = [markup.cell(options[each.experiment][name], "text") for name in names]
        lead += [markup.cell(each.erased, "text")] if erasures else []
        for place, line in enumerate(line for line in each.lines if line.method != "oracle"):
            kind = " ".join(["reference"] * line.is_reference + ["first"] * (place == 0 and bool(rows)))
            rows.append(markup.row([*lead, *_line_cells(line, decoders, several)], kind))
    return markup.table([*head, *decoders, *_COSTS], rows, text_columns=head)


def experts_table(summary: pd.DataFrame) -> str:
    """Return the experts' own accuracies; experiments that share their experts share a line."""
    experts = expert_accuracies(summary)
    total = experts["experiment"].nunique()
    rows = []
    for _, same in experts.groupby(["task", "seeds", "mean", "spread"], sort=False, dropna=False):
        row = same.iloc[0]
        whose = ", ".join(same["experiment"]) if len(same) < total else "all"
        cells = [markup.cell(whose, "text wrap")] if total > 1 else []
        cells += [
            markup.cell(row["task"], "text"),
            markup.cell(percent(Cell(row["mean"], row["spread"]))),
            markup.cell(str(row["seeds"])),
        ]
        rows.append(markup.row(cells))
    head = [*(["experiment"] if total > 1 else []), "task", "test accuracy (%)", "seeds"]
    return markup.table(head, rows, text_columns=("experiment", "task"))


def _kind(line: Line, before: Line | None) -> str:
    several = before is not None and before.samples_per_task != line.samples_per_task and before.name != line.name
    first = several or (before is not None and line.is_reference and not before.is_reference)
    return " ".join(["reference"] * line.is_reference + ["first"] * first)


def _line_cells(line: Line, decoders: Sequence[str], several_samples: bool) -> list[str]:
    cells = [markup.cell(line.name), markup.cell(line.batchnorm or "–", "text")]
    cells += [markup.cell(str(line.samples_per_task))] if several_samples else []
    for decoder in decoders:
        cell = line.cells.get(decoder)
        cells.append(markup.cell("–") if cell is None else markup.cell(percent(cell), "best" if cell.best else ""))
    costs = (
        "–" if math.isnan(line.residual) else f"{line.residual:.3f}",
        *(seconds(line.merge_seconds), short(line.merge_passes)),
        *(seconds(line.decoder_seconds), short(line.decoder_passes)),
    )
    return [*cells, *map(markup.cell, costs)]
