"""The figure of stand-ins, NDA against memory, and the style of all figures.

Colours belong to methods, by name, in every figure: cold for closed forms, warm for what is trained, grey for the
references. Variants of a method share its colour.
"""

import io
import math
from contextlib import AbstractContextManager
from typing import Any

import pandas as pd
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
    "base": "#A65628", "replica": "#CC79A7", "distillation": "#E69F00", "none": SOFT,
}  # fmt: skip
_OTHER = "#B8A800"
# Any: a list of matplotlib's own literal names would tie us to one version of its stubs.
_STYLE: Any = {
    "font.size": 10, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": INK,
    "grid.alpha": 0.15, "legend.frameon": False, "legend.fontsize": 9, "figure.constrained_layout.use": True,
    "text.parse_math": False,  # names come from the user: a dollar sign is no mathematics
}  # fmt: skip
_NEAR = 0.5  # points of NDA below 100 up to which an axis is about linear
_TICKS = (20, 40, 60, 80, 90, 95, 98, 99, 99.5, 100)


def style() -> AbstractContextManager[None]:
    """Return a context that draws in the house's style, whatever the user's matplotlib settings say."""
    return context(_STYLE, after_reset=True)


def method_colour(name: str) -> str:
    """Return the colour of a method, whatever its label adds to its name."""
    known = [method for method in _METHODS if name.startswith(method)]
    return _METHODS[known[0]] if known else _OTHER


def as_png(figure: Figure, dpi: int = 200) -> bytes:
    """Return a figure as PNG on white."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(
            buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None}
        )
    return buffer.getvalue()


def nda_against_memory(
    standins: pd.DataFrame, is_best: "pd.Series[bool]", network_mib: float = math.nan
) -> Figure:
    """Draw the mean NDA ± spread of `standins` against what they keep, on a logarithmic axis.

    The legend names them, the most accurate first. Those that are `is_best` are filled, and have the table's star. The
    unit is a network's size if given, else MiB.
    """
    in_mib = math.isnan(network_mib)
    sizes = standins["memory_mib"] / (1.0 if in_mib else network_mib)
    points = standins.assign(size=sizes, nda=100 * standins["nda_mean"] - 100, is_best=is_best)
    points["spread"] = 100 * points["nda_std"].fillna(0)
    best_first = points.sort_values("nda", ascending=False, kind="stable")
    with style():
        figure = Figure(figsize=(WIDTH, 3.2 + 0.19 * len(points)))
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("asinh", linear_width=_NEAR)
        for place, row in enumerate(best_first.to_dict("records")):
            colour = method_colour(row["method"])
            star = "*" if row["is_best"] else " "
            axes.errorbar(
                row["size"],
                row["nda"],
                row["spread"] or None,
                color=colour,
                markerfacecolor=colour if row["is_best"] else "white",
                marker=MARKERS[place % len(MARKERS)],
                linestyle="none",
                markersize=6.5,
                capsize=2,
                label=f"{100 + row['nda']:.1f}{star} {row['method']}, {row['decoder']}",
            )
        axes.set_xlabel(f"memory kept, in {'MiB' if in_mib else 'networks'} (log scale)")
        axes.set_ylabel("NDA (%), finer near 100")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        lowest = 98 + points["nda"].min()
        ticks = [tick for tick in _TICKS if tick >= lowest]
        axes.set_yticks([tick - 100 for tick in ticks], [f"{tick:g}" for tick in ticks])
        figure.legend(loc="outside lower left")
        return figure
