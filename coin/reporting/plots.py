"""Figures of decoding accuracy. Each takes rows of a summary and returns a figure with labelled axes."""

import math
from collections.abc import Iterable

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from coin.reporting.canvas import INK, WIDTH, colour, legend_below, marker, place_legend, style
from coin.reporting.comparison import REFERENCES, variant_names

PAPER_NDA = 0.975
"""The least NDA that the paper reports for COIN with the linear decoder (arXiv 2409.01420)."""


def nda_by_method(means: pd.DataFrame) -> Figure:
    """Mean NDA ± spread, a line per method's variant and a marker per decoder.

    Args:
        means: Rows of a summary with one number set per variant and decoder.
    """
    with style():
        names, decoders = _names(means), _decoders(means)
        figure = Figure(figsize=(WIDTH, 1.5 + 0.36 * len(names) * _crowd(decoders)))
        axes = figure.subplots()
        _dots(axes, means, names, decoders)
        axes.set_xlabel("NDA (%), mean over tasks ± spread over seeds")
        legend_below(figure, axes, "decoder")
        return figure


def nda_per_task(rows: pd.DataFrame) -> Figure:
    """NDA ± spread of every task, a panel each.

    Args:
        rows: Rows of a summary for single tasks: one number set per task, variant and decoder.
    """
    with style():
        names, decoders, tasks = _names(rows), _decoders(rows), _unique(rows["task"])
        figure = Figure(figsize=(WIDTH, 1.0 + (0.6 + 0.30 * len(names) * _crowd(decoders)) * len(tasks)))
        panels = figure.subplots(len(tasks), 1, sharex=True, squeeze=False)[:, 0]
        for axes, task in zip(panels, tasks, strict=True):
            _dots(axes, rows[rows["task"] == task], names, decoders)
            axes.set_title(f"task {task}")
        panels[-1].set_xlabel("NDA (%) ± spread over seeds")
        legend_below(figure, panels[0], "decoder")
        return figure


def nda_by_experiment(means: pd.DataFrame) -> Figure:
    """Mean NDA ± spread of several experiments side by side, a panel per decoder and a marker per experiment."""
    with style():
        names, decoders = _names(means), _decoders(means)
        experiments = list(dict.fromkeys(means["experiment"]))
        figure = Figure(figsize=(WIDTH, 1.0 + (0.6 + 0.30 * len(names)) * len(decoders)))
        panels = figure.subplots(len(decoders), 1, sharex=True, squeeze=False)[:, 0]
        for axes, decoder in zip(panels, decoders, strict=True):
            _dots(axes, means[means["decoder"] == decoder], names, experiments, "experiment")
            axes.set_title(f"decoder {decoder}")
        panels[-1].set_xlabel("NDA (%), mean over tasks ± spread over seeds")
        legend_below(figure, panels[0], "experiment", columns=2)
        return figure


def nda_against_cost(means: pd.DataFrame) -> Figure:
    """Mean NDA against the seconds that a coded model cost, on a logarithmic axis; free methods at its left end."""
    with style():
        means = means[~means["method"].isin(REFERENCES)]
        cost = means["calibration_seconds_mean"]
        positive = cost[cost > 0]
        least = float(positive.min()) if len(positive) else 1.0
        # Zero has no place on a logarithmic axis: free methods get their own tick, half a decade to the left.
        free = 10 ** (math.floor(math.log10(least)) - 0.5)
        figure = Figure(figsize=(WIDTH, 4.4))
        axes = figure.subplots()
        _scatter(axes, means, cost.where(cost > 0, free))
        _log_scale(axes)
        axes.set_xlim(free / 2, float(positive.max() if len(positive) else 1.0) * 2)
        if (cost <= 0).any():
            ticks = [10.0**k for k in range(math.ceil(math.log10(least)) - 1, 9) if 10.0**k <= cost.max() * 2]
            axes.set_xticks([free, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
            axes.minorticks_off()
        axes.set_xlabel("seconds to make the coded model (log scale)")
        _scatter_legend(figure, means)
        return figure


def nda_against_residual(means: pd.DataFrame) -> Figure:
    """Mean NDA against the residual ‖f_c − Σβf‖ / ‖Σβf‖ of the coded model."""
    with style():
        means = means[means["residual_mean"].notna() & ~means["method"].isin(REFERENCES)]
        figure = Figure(figsize=(WIDTH, 4.4))
        axes = figure.subplots()
        _scatter(axes, means, means["residual_mean"])
        axes.set_xlim(left=0)
        axes.set_xlabel("residual of the coded model, ‖f_c − Σβf‖ / ‖Σβf‖")
        _scatter_legend(figure, means)
        return figure


def nda_against_samples(means: pd.DataFrame) -> Figure:
    """Mean NDA ± spread against the calibration samples per task, P, a panel per decoder and a line per variant.

    Where several experiments hold one variant and P, the line runs through the mean of their means. The references
    are left out: next to the survivors alone, the methods' lines would fall together.
    """
    with style():
        means = means[~means["method"].isin(REFERENCES)]
        names, decoders = _names(means), _decoders(means)
        figure = Figure(figsize=(WIDTH, 1.2 + 2.3 * len(decoders)))
        panels = figure.subplots(len(decoders), 1, sharex=True, squeeze=False)[:, 0]
        named = means.assign(name=variant_names(means))
        for axes, decoder in zip(panels, decoders, strict=True):
            for i, name in enumerate(names):
                rows = named[(named["decoder"] == decoder) & (named["name"] == name)]
                rows = rows.groupby("samples_per_task")[["nda_mean", "nda_std"]].mean()
                axes.errorbar(
                    rows.index, 100 * rows["nda_mean"], 100 * rows["nda_std"].fillna(0.0),
                    color=colour(i), marker=marker(i), markersize=5, capsize=2, linewidth=1.2, label=name,
                )  # fmt: skip
            axes.set_title(f"decoder {decoder}")
            axes.set_ylabel("NDA (%)")
        samples = sorted(set(means["samples_per_task"]))
        _log_scale(panels[-1])
        panels[-1].set_xticks(samples, [str(value) for value in samples])
        panels[-1].minorticks_off()
        panels[-1].set_xlabel("calibration samples per task, P (log scale)")
        legend_below(figure, panels[0], columns=3)
        return figure


def _dots(axes: Axes, rows: pd.DataFrame, names: list[str], series: list[str], column: str = "decoder") -> None:
    """Draw NDA ± spread: a line per variant, a marker per value of `column`, slightly apart so that none is hidden."""
    position = {name: i for i, name in enumerate(names)}
    named = rows.assign(name=variant_names(rows))
    for i, value in enumerate(series):
        part = named[(named[column] == value) & named["name"].isin(names)]
        offset = 0.5 * ((i + 0.5) / len(series) - 0.5)
        axes.errorbar(
            100 * part["nda_mean"], [position[name] + offset for name in part["name"]],
            xerr=100 * part["nda_std"].fillna(0.0), linestyle="none", color=colour(i), marker=marker(i),
            markersize=5.5, capsize=2.5, label=value,
        )  # fmt: skip
    axes.axvline(100 * PAPER_NDA, color=INK, linewidth=0.9, linestyle=":")
    axes.annotate(
        "97.5", (100 * PAPER_NDA, 1), xycoords=("data", "axes fraction"), xytext=(-2, 1), fontsize=7,
        textcoords="offset points", ha="right", va="bottom",
    )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _scatter(axes: Axes, means: pd.DataFrame, x: "pd.Series[float]") -> None:
    names, decoders = _names(means), _decoders(means)
    own = variant_names(means)
    for i, name in enumerate(names):
        for k, decoder in enumerate(decoders):
            chosen = (own == name) & (means["decoder"] == decoder)
            axes.errorbar(
                x[chosen], 100 * means.loc[chosen, "nda_mean"], 100 * means.loc[chosen, "nda_std"].fillna(0.0),
                linestyle="none", color=colour(i), marker=marker(k), markersize=6.5, capsize=2,
            )  # fmt: skip
    axes.axhline(100 * PAPER_NDA, color=INK, linewidth=0.9, linestyle=":")
    axes.set_ylabel("NDA (%), mean over tasks")


def _scatter_legend(figure: Figure, means: pd.DataFrame) -> None:
    """Explain colours (the method) and markers (the decoder) apart."""
    handles = [
        Line2D([], [], color=colour(i), marker="o", markersize=6, linestyle="none", label=name)
        for i, name in enumerate(_names(means))
    ]
    handles += [
        Line2D([], [], color=INK, marker=marker(k), markerfacecolor="none", linestyle="none", label=decoder)
        for k, decoder in enumerate(_decoders(means))
    ]
    place_legend(figure, handles, [str(handle.get_label()) for handle in handles], "colour: method, shape: decoder")


def _names(rows: pd.DataFrame) -> list[str]:
    """Return the variants in order of appearance, the references last; the oracle's 100 % would only take room."""
    names = variant_names(rows)[rows["method"] != "oracle"]
    references = set(names[rows["method"].isin(REFERENCES)])
    return sorted(dict.fromkeys(names), key=lambda name: name in references)


def _decoders(rows: pd.DataFrame) -> list[str]:
    contenders = rows[~rows["method"].isin(REFERENCES)]
    return _unique([*contenders["decoder"], *rows["decoder"]])


def _crowd(series: list[str]) -> float:
    """Return how much taller a line of dots is with so many markers on it."""
    return max(1.0, len(series) / 5)


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _log_scale(axes: Axes) -> None:
    """Make the x axis logarithmic with plain numbers: matplotlib's own labels need parsed mathematics."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
