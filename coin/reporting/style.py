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
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import LogLocator, NullFormatter

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
    if known:
        return _METHODS[max(known, key=len)]
    return _OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)]


def as_png(figure: Figure, dpi: int = 200) -> bytes:
    """Return a figure as PNG on white."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(
            buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None}
        )
    return buffer.getvalue()


def legend_below(figure: Figure, columns: int = 3) -> None:
    """Put one legend of all axes under the figure, where it hides no point."""
    lines: dict[str, Any] = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        lines.update(zip(names, handles, strict=True))
    longest = max(map(len, lines), default=0)
    room = int(12 * figure.get_figwidth() / (8 + longest))
    most = min(columns, len(lines), room)
    columns = max(1, most)
    rows = math.ceil(len(lines) / columns)
    more_rows = max(0, rows - 2)
    height = figure.get_figheight()
    figure.set_figheight(height + 0.19 * more_rows)
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=columns)


def plain_numbers(axis: Axis) -> None:
    """Label the logarithmic axis of what is drawn with plain numbers, fewer of them where it spans much."""
    low, high = axis.get_view_interval()
    steps = (1, 2, 5) if high < 30 * low else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def column_of_names(axes: Axes, labels: list[tuple[float, float, str, str]], gap: float) -> None:
    """Write labels (x, y, text, colour) beside the axes, `gap` of its height apart, with lines to their points."""
    to_share = axes.transData + axes.transAxes.inverted()
    highest_first = sorted(labels, key=lambda label: -label[1])
    heights: list[float] = []
    ceiling = math.inf
    for x, y, _, _ in highest_first:
        _, own = to_share.transform((x, y))
        heights.append(min(float(own), ceiling))
        ceiling = heights[-1] - gap
    floor = 0.02
    for place in reversed(range(len(heights))):  # what fell below the axes is pushed up again
        heights[place] = max(heights[place], floor)
        floor = heights[place] + gap
    for (x, y, text, ink), height in zip(highest_first, heights, strict=True):
        line = {
            "arrowstyle": "-",
            "alpha": 0.35,
            "linewidth": 0.8,
            "relpos": (0.0, 0.5),
            "color": ink,
        }
        axes.annotate(
            text,
            (x, y),
            (1.04, height),
            textcoords="axes fraction",
            fontsize=9,
            color=ink,
            va="center",
            annotation_clip=False,
            arrowprops=line,
        )
