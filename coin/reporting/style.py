"""The style of all figures: colours by method, markers, legends, logarithmic axes and names beside what they name.

Colours belong to methods, by name, in every figure: cold for closed forms, warm for what is trained, grey for the
references. Variants of a method share its colour.
"""

import io
import math
import zlib
from contextlib import AbstractContextManager
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import FormatStrFormatter, NullFormatter

INK, SOFT = "#1b1f24", "#6b7480"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C", "#B8A800")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
WIDTH = 5.4
"""Inches. Narrow, so that the text is still legible on a phone."""
_METHODS = {
    "average": "#56B4E9", "coin": "#0072B2", "regmean": "#6A3D9A", "head_fit": "#44AA99", "refit": "#009E73",
    "task_arithmetic": "#88A0C8", "ties": "#7BAFDE",
    "wudi": "#B8A800", "base": "#A65628", "replica": "#CC79A7",
    "distillation": "#E69F00", "readout_distillation": "#D55E00", "none": SOFT, "oracle": INK,
}  # fmt: skip
_OTHERS = ("#CC79A7", "#B8A800", "#A65628", "#F781BF", "#999933")
_LINE = {"arrowstyle": "-", "alpha": 0.35, "linewidth": 0.8, "relpos": (0.0, 0.5)}  # from a point to its name
# Any: a list of matplotlib's own literal names would tie us to one version of its stubs.
_STYLE: Any = {
    "font.size": 10, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": INK,
    "grid.alpha": 0.15, "legend.frameon": False, "legend.fontsize": 9, "figure.constrained_layout.use": True,
    "text.parse_math": False,  # names come from the user: a dollar sign is no mathematics
}  # fmt: skip


def style() -> AbstractContextManager[None]:
    """Return a context that draws in the house's style, whatever the user's matplotlib settings say."""
    return context(_STYLE, after_reset=True)


def marker(index: int) -> str:
    """Return the marker of the series with this index."""
    return MARKERS[index % len(MARKERS)]


def method_colour(name: str) -> str:
    """Return the colour of a method, whatever its label, BatchNorm policy or code add to its name."""
    known = [method for method in _METHODS if name.startswith(method)]
    return _METHODS[max(known, key=len)] if known else _OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)]


def as_png(figure: Figure, dpi: int = 200) -> bytes:
    """Return a figure as PNG on white."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def legend_below(figure: Figure, title: str | None = None, columns: int = 3) -> None:
    """Put one legend of all axes under the figure, where it hides no point."""
    labels = {text: line for axes in figure.axes for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    room = 12 * figure.get_figwidth() / (8 + max(map(len, labels), default=0))
    columns = max(1, min(columns, len(labels), int(room)))
    figure.set_figheight(figure.get_figheight() + 0.19 * max(0, math.ceil(len(labels) / columns) - 2))
    figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=columns, title=title)


def log_scale(axes: Axes) -> None:
    """Make the horizontal axis logarithmic, labelled with plain numbers."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def column_of_names(axes: Axes, labels: list[tuple[float, float, str, str]], gap: float) -> None:
    """Write labels (height, place, text, colour) beside the axes, `gap` of its height apart, with lines to points."""
    low, high = axes.get_ylim()
    to_height = axes.transData + axes.transAxes.inverted()
    labels = sorted(labels, key=lambda label: -label[0])
    heights: list[float] = []
    for nda, *_ in labels:
        wanted = float(to_height.transform((axes.get_xlim()[1], min(max(nda, low), high)))[1])
        heights.append(min(wanted, heights[-1] - gap) if heights else wanted)
    floor = 0.02
    for i in reversed(range(len(heights))):
        heights[i] = max(heights[i], floor)
        floor = heights[i] + gap
    for (nda, x, text, ink), height in zip(labels, heights, strict=True):
        axes.annotate(
            text, (x, nda), (1.04, height), textcoords="axes fraction", fontsize=9, color=ink, va="center",
            annotation_clip=False, arrowprops={**_LINE, "color": ink},
        )  # fmt: skip
