"""What figures of decoding accuracy have in common: which series there are, and the paper's line."""

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from coin.reporting.canvas import INK, WIDE, WIDTH
from coin.reporting.comparison import REFERENCES, variant_names

PAPER_NDA = 0.975
"""What the paper reports that COIN's NDA exceeds "in some cases" (arXiv 2409.01420, abstract): no least."""
FEW = 4
"""With more panels than this a figure is wide."""
_COLUMNS = 3


def names_of(rows: pd.DataFrame) -> list[str]:
    """Return the variants in order of appearance, the references last; the oracle's 100 % would only take room."""
    names = variant_names(rows)[rows["method"] != "oracle"]
    references = set(names[rows["method"].isin(REFERENCES)])
    return sorted(dict.fromkeys(names), key=lambda name: name in references)


def panels_for(titles: list[str], height: float, *, sharey: bool = False) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with one panel per title: below each other where they are few, else three to a row of a wide one.

    Args:
        titles: The panels' titles.
        height: Of a panel, in inches.
        sharey: Whether all panels have one vertical axis.
    """
    columns = 1 if len(titles) <= FEW else _COLUMNS
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(WIDTH if columns == 1 else WIDE, 0.9 + height * rows))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=sharey)
    panels = dict(zip(titles, grid.flat, strict=False))
    for axes in grid.flat[len(titles) :]:
        axes.set_visible(False)
    for place, (title, axes) in enumerate(panels.items()):
        axes.set_title(title)
        # The last of its column, though the last row may be short.
        axes.tick_params(labelbottom=place + columns >= len(titles))
    return figure, panels


def label_bottom(panels: dict[str, Axes], text: str) -> None:
    """Label the horizontal axis of the lowest panel of every column."""
    for axes in panels.values():
        if axes.xaxis.get_tick_params()["labelbottom"]:
            axes.set_xlabel(text)


def paper_line(axes: Axes, *, vertical: bool = False) -> None:
    """Draw the paper's NDA as a dotted line."""
    draw = axes.axvline if vertical else axes.axhline
    draw(100 * PAPER_NDA, color=INK, linewidth=0.9, linestyle=":")


def log_scale(axes: Axes) -> None:
    """Make the x axis logarithmic with plain numbers: matplotlib's own labels need parsed mathematics."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
