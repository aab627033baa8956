"""Figures of a simulation: latency against load, accuracy against latency."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from coin.reporting.figures import WIDTH, colour, legend_below, marker, style
from coin.reporting.simulation import SimulationRow

_PANELS = {"p50": "median", "p99": "99 % quantile", "p999": "99.9 % quantile"}


def latency_against_load(rows: Sequence[SimulationRow]) -> Figure:
    """Median, 99 % and 99.9 % quantile of the latency against the load, a panel each and a line per policy.

    Points with failed queries beyond the quantile, whose latency is infinite, are left out.

    Args:
        rows: The rows of one kind of query.
    """
    with style():
        figure = Figure(figsize=(WIDTH, 1.2 + 2.1 * len(_PANELS)))
        panels = figure.subplots(len(_PANELS), 1, sharex=True)
        for axes, (column, title) in zip(panels, _PANELS.items(), strict=True):
            for index, (name, line) in enumerate(_series(rows).items()):
                shown = [row for row in line if math.isfinite(getattr(row, column))]
                _line(
                    axes,
                    index,
                    name,
                    [row.load for row in shown],
                    [1e3 * getattr(row, column) for row in shown],
                    [_spread(row, column) for row in shown],
                )
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis)
            axes.set_title(title)
            axes.set_ylabel("latency (ms, log scale)")
        panels[-1].set_xlabel("load by own answers alone")
        legend_below(figure, panels[0], columns=2)
        return figure


def accuracy_against_latency(rows: Sequence[SimulationRow]) -> Figure:
    """Effective accuracy against the 99.9 % quantile of the latency, a line per policy through its loads.

    Args:
        rows: The rows of one kind of query.
    """
    with style():
        figure = Figure(figsize=(WIDTH, 4.2))
        axes = figure.subplots()
        for index, (name, line) in enumerate(_series(rows).items()):
            shown = [row for row in line if math.isfinite(row.p999)]
            latencies, accuracies = [1e3 * row.p999 for row in shown], [100 * row.effective_accuracy for row in shown]
            _line(axes, index, name, latencies, accuracies)
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
        axes.set_xlabel("99.9 % quantile of the latency (ms, log scale)")
        axes.set_ylabel("effective accuracy (%)")
        legend_below(figure, axes, columns=2)
        return figure


def _line(
    axes: Axes,
    index: int,
    name: str,
    x: Sequence[float],
    y: Sequence[float],
    spread: Sequence[tuple[float, float]] | None = None,
) -> None:
    axes.errorbar(
        x, y, None if not spread else list(zip(*spread, strict=True)),
        color=colour(index), marker=marker(index), markersize=max(5.0, 9.0 - 2 * index),
        capsize=2, linewidth=max(1.2, 2.4 - 0.6 * index), label=name,  # lines that coincide are both seen
    )  # fmt: skip


def _plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2 and 5 with plain numbers: matplotlib's own labels need parsed mathematics."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _spread(row: SimulationRow, column: str) -> tuple[float, float]:
    """Return how far the interval reaches below and above, in ms; an infinite end is not drawn."""
    value, low, high = (getattr(row, f"{column}{part}") for part in ("", "_low", "_high"))
    return 1e3 * (value - low), 1e3 * (high - value) if math.isfinite(high) else 0.0


def _series(rows: Sequence[SimulationRow]) -> dict[str, list[SimulationRow]]:
    found: dict[str, list[SimulationRow]] = {}
    for row in sorted(rows, key=lambda row: row.load):
        found.setdefault(row.series, []).append(row)
    order = list(dict.fromkeys(row.series for row in rows))
    return {name: found[name] for name in order}
