"""Figures of a simulation: latency against memory, and against the load."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from coin.reporting.figures import WIDTH, colour, legend_below, marker, style
from coin.serving.sim.profile import Redundancy

_WANTS = {"one": "one expert's answer a query", "all": "all experts' answers a query"}


def tail_against_memory(rows: pd.DataFrame) -> Figure:
    """The 99.9 % quantile of the latency against the weights' memory on the largest server, a panel a kind of query.

    Points are joined over numbers of experts and of extra servers; those whose quantile is infinite are left out.

    Args:
        rows: Of one load.
    """
    return _panels(rows, "memory_server", 1 / 2**20, "weights on the largest server (MiB, log scale)", log=True)


def tail_against_load(rows: pd.DataFrame) -> Figure:
    """The same against the load, of one number of experts."""
    return _panels(rows, "load", 1.0, "load by own answers alone", log=False)


def _panels(rows: pd.DataFrame, column: str, scale: float, label: str, *, log: bool) -> Figure:
    wants = list(dict.fromkeys(rows["want"]))
    with style():
        figure = Figure(figsize=(WIDTH, 0.9 + 2.6 * len(wants)))
        panels = figure.subplots(len(wants), 1, sharex=True, squeeze=False)[:, 0]
        for axes, want in zip(panels, wants, strict=True):
            shown = rows[(rows["want"] == want) & np.isfinite(rows["p999"])]
            for kind in Redundancy:
                if not (line := shown[shown["redundancy"] == kind].sort_values(["experts", "extras", column])).empty:
                    _line(axes, list(Redundancy).index(kind), kind, line[column] * scale, line)
            axes.set_title(_WANTS[want])
            axes.set_ylabel("p99.9 (ms, log scale)")
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis)
        if log:
            panels[-1].set_xscale("log")
            _plain_numbers(panels[-1].xaxis)
        panels[-1].set_xlabel(label)
        legend_below(figure, panels[0], columns=3)
        return figure


def _line(axes: Axes, index: int, name: str, x: "pd.Series[float]", rows: pd.DataFrame) -> None:
    y, high = 1e3 * rows["p999"], 1e3 * rows["p999_high"].replace(np.inf, np.nan).fillna(rows["p999"])
    spread = [y - 1e3 * rows["p999_low"], high - y]
    axes.errorbar(
        x, y, spread, color=colour(index), marker=marker(index), markersize=5, capsize=2, linewidth=1.3, label=name
    )


def _plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2 and 5 with plain numbers: matplotlib's own labels need parsed mathematics."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
