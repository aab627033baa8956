"""Figures of NDA against a number of the coded model: its cost, its residual."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from coin.reporting.canvas import COLOURS, INK, WIDTH, colour, marker, place_legend, style
from coin.reporting.comparison import REFERENCES, decoders_of, variant_names
from coin.reporting.series import label_bottom, log_scale, names_of, panels_for, paper_line

_TOGETHER = 3
"""With more decoders than this each has its own panel."""
_NAME_HEIGHT = 0.07
"""What a name takes of a panel's height."""


def nda_against_cost(means: pd.DataFrame) -> Figure:
    """Mean NDA against the seconds of making the coded model and fitting the decoder, their sum, on a logarithmic axis.

    What is free stands at its left end.
    """
    with style():
        means = means[~means["method"].isin(REFERENCES)]
        cost = means["merge_seconds_mean"] + means["decoder_seconds_mean"]
        positive = cost[cost > 0]
        least = float(positive.min()) if len(positive) else 1.0
        # Zero has no place on a logarithmic axis: free methods get their own tick, half a decade to the left.
        free = 10 ** (math.floor(math.log10(least)) - 0.5)
        label = "seconds, merge + decoder (log scale)"
        figure, panels = _scatter(means, cost.where(cost > 0, free), label)
        for axes in panels.values():
            log_scale(axes)
            axes.set_xlim(free / 2, float(positive.max() if len(positive) else 1.0) * 2)
            if (cost <= 0).any():
                ticks = [10.0**k for k in range(math.ceil(math.log10(least)) - 1, 9) if 10.0**k <= cost.max() * 2]
                axes.set_xticks([free, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
                axes.minorticks_off()
        return figure


def nda_against_residual(means: pd.DataFrame) -> Figure:
    """Mean NDA against the residual ‖f_c − Σβf‖ / ‖Σβf‖ of the coded model."""
    with style():
        means = means[np.isfinite(means["residual_mean"]) & ~means["method"].isin(REFERENCES)]
        figure, panels = _scatter(means, means["residual_mean"], "residual, ‖f_c − Σβf‖ / ‖Σβf‖")
        for axes in panels.values():
            axes.set_xlim(0, 1.06 * float(means["residual_mean"].max()) or 1.0)
        return figure


def nda_against_accuracy(rows: pd.DataFrame, choices: "pd.Series[str]") -> Figure:
    """Mean NDA against the experts' own mean accuracy, both ± spread over seeds: how they were trained against coding.

    A panel per decoder; a colour per method, a marker per way of training the experts.

    Args:
        rows: Rows of ``results.csv`` or ``sweep.csv``, of one set of tasks.
        choices: What each row's experts were trained by, in words.
    """
    with style():
        rows = rows.assign(choice=choices)[~rows["method"].isin(REFERENCES)]
        keys = ["choice", "method", "decoder"]
        per_seed = rows.groupby([*keys, "seed"], sort=False)[["expert_accuracy", "nda"]].mean().mul(100)
        methods, ways = list(rows["method"].unique()), list(rows["choice"].unique())
        figure, panels = panels_for(decoders_of(rows), 3.4)
        for key, seeds in per_seed.groupby(keys, sort=False):
            way, method, decoder = map(str, key)
            mean, spread = seeds.mean(), seeds.std().fillna(0.0)
            panels[decoder].errorbar(
                mean["expert_accuracy"], mean["nda"], spread["nda"], spread["expert_accuracy"], linestyle="none",
                color=colour(methods.index(method)), marker=marker(ways.index(way)), markersize=6, capsize=2,
            )  # fmt: skip
        for axes in panels.values():
            paper_line(axes)
            axes.set_ylabel("NDA (%), mean over tasks")
        label_bottom(panels, "experts' own accuracy (%), mean over tasks")
        handles = [Line2D([], [], color=colour(i), marker="o", linestyle="none") for i in range(len(methods))]
        handles += [Line2D([], [], color=INK, marker=marker(k), linestyle="none") for k in range(len(ways))]
        place_legend(figure, handles, [*methods, *ways], "colour: method, shape: the experts' training", columns=3)
        return figure


def _scatter(means: pd.DataFrame, x: "pd.Series[float]", label: str) -> tuple[Figure, dict[str, Axes]]:
    """Draw all decoders together where few methods and decoders leave room, else a panel per decoder.

    In a panel of its own the methods that no other one beats in both numbers are named beside their points.
    """
    names, decoders = names_of(means), decoders_of(means)
    own = variant_names(means)
    together = len(decoders) <= _TOGETHER and len(names) <= len(COLOURS)
    if together:
        figure = Figure(figsize=(WIDTH, 4.4))
        panels = {"": figure.subplots()}
    else:
        figure, panels = panels_for(decoders, 2.7)
    for i, name in enumerate(names):
        for k, decoder in enumerate(decoders):
            chosen = (own == name) & (means["decoder"] == decoder)
            panels["" if together else decoder].errorbar(
                x[chosen], 100 * means.loc[chosen, "nda_mean"], 100 * means.loc[chosen, "nda_std"].fillna(0.0),
                linestyle="none", color=colour(i), marker=marker(k if together else i), markersize=6.5, capsize=2,
            )  # fmt: skip
    for axes in panels.values():
        paper_line(axes)
        axes.set_ylabel("NDA (%), mean over tasks" if together else "NDA (%)")
    if not together:
        for decoder, axes in panels.items():
            _name_front(axes, means.assign(name=own, x=x)[means["decoder"] == decoder])
    label_bottom(panels, label)
    handles = [
        Line2D([], [], color=colour(i), marker="o" if together else marker(i), markersize=6, linestyle="none")
        for i in range(len(names))
    ]
    labels = list(names)
    if together:
        handles += [
            Line2D([], [], color=INK, marker=marker(k), markerfacecolor="none", linestyle="none")
            for k in range(len(decoders))
        ]
        labels += decoders
    title = "colour: method, shape: decoder" if together else "method"
    place_legend(figure, handles, labels, title, columns=3 if together else 6)
    return figure, panels


def _name_front(axes: Axes, rows: pd.DataFrame) -> None:
    """Name the points that have no other one above and to the left of them, as far as the names do not collide."""
    front: list[tuple[float, float, str]] = []
    for _, row in rows.sort_values(["x", "nda_mean"], ascending=[True, False]).iterrows():
        if not front or row["nda_mean"] > front[-1][1]:
            front.append((row["x"], row["nda_mean"], row["name"]))
    low, high = axes.get_ylim()
    named: list[float] = []
    for x, nda, name in reversed(front):
        height = (100 * nda - low) / (high - low)
        if all(abs(height - other) > _NAME_HEIGHT for other in named):
            named.append(height)
            axes.annotate(
                name, (x, 100 * nda), xytext=(-3, 3), textcoords="offset points", fontsize=7, ha="right", va="bottom"
            )
