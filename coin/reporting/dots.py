"""Figures with a line per method and NDA along it."""

from collections.abc import Iterable

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coin.reporting.canvas import INK, WIDTH, colour, legend_below, marker, style
from coin.reporting.comparison import REFERENCES, decoders_of, heading, variant_names
from coin.reporting.series import FEW, PAPER_NDA, names_of, paper_line

_BEST, _OTHER = "#D55E00", "#0072B2"


def nda_by_method(means: pd.DataFrame) -> Figure:
    """Mean NDA ± spread, a line per method's variant; a marker per decoder, or a panel where these are many.

    Args:
        means: Rows of a summary with one number set per variant and decoder.
    """
    with style():
        names, decoders = names_of(means), decoders_of(means)
        if len(decoders) > FEW:
            return _grid({"": means}, names, decoders, "NDA (%)\nmean over tasks ± spread over seeds")
        figure = Figure(figsize=(WIDTH, 1.5 + 0.36 * len(names)))
        axes = figure.subplots()
        _dots(axes, means, names, decoders)
        axes.set_xlabel("NDA (%), mean over tasks ± spread over seeds")
        legend_below(figure, axes, "decoder")
        return figure


def nda_per_task(rows: pd.DataFrame) -> Figure:
    """NDA ± spread of every task, a panel each; a row of panels each where the decoders are many.

    Args:
        rows: Rows of a summary for single tasks: one number set per task, variant and decoder.
    """
    with style():
        names, decoders, tasks = names_of(rows), decoders_of(rows), list(dict.fromkeys(rows["task"]))
        parts = {f"task {task}": rows[rows["task"] == task] for task in tasks}
        if len(decoders) > FEW:
            return _grid(parts, names, decoders, "NDA (%)\n± spread over seeds")
        figure = Figure(figsize=(WIDTH, 1.0 + (0.6 + 0.30 * len(names)) * len(tasks)))
        panels = figure.subplots(len(tasks), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, part) in zip(panels, parts.items(), strict=True):
            _dots(axes, part, names, decoders)
            axes.set_title(title)
        panels[-1].set_xlabel("NDA (%) ± spread over seeds")
        legend_below(figure, panels[0], "decoder")
        return figure


def nda_by_experiment(means: pd.DataFrame) -> Figure:
    """Mean NDA ± spread of several experiments side by side, a panel per decoder and a marker per experiment."""
    with style():
        names, decoders = names_of(means), decoders_of(means)
        experiments = list(dict.fromkeys(means["experiment"]))
        crowd = max(1.0, len(experiments) / 4)
        figure = Figure(figsize=(WIDTH, 1.0 + (0.6 + 0.30 * len(names) * crowd) * len(decoders)))
        panels = figure.subplots(len(decoders), 1, sharex=True, squeeze=False)[:, 0]
        for axes, decoder in zip(panels, decoders, strict=True):
            _dots(axes, means[means["decoder"] == decoder], names, experiments, "experiment")
            axes.set_title(f"decoder {decoder}")
        panels[-1].set_xlabel("NDA (%), mean over tasks ± spread over seeds")
        legend_below(figure, panels[0], "experiment", columns=2)
        return figure


def _grid(parts: dict[str, pd.DataFrame], names: list[str], decoders: list[str], label: str) -> Figure:
    """Draw a panel per part and decoder, the methods below each other; the best of each panel is set apart.

    Every decoder has a scale of its own, made for the methods: a reference that is beyond it becomes an arrow.
    """
    letters = max(map(len, names))
    width, height = 0.3 + 0.075 * letters + 1.05 * len(decoders), 0.45 + 0.19 * len(names)
    figure = Figure(figsize=(width, 0.7 + height * len(parts)))
    panels = figure.subplots(len(parts), len(decoders), sharex="col", sharey=True, squeeze=False)
    limits = {decoder: _limits(parts.values(), decoder) for decoder in decoders}
    for line, (title, part) in zip(panels, parts.items(), strict=True):
        named = part.assign(name=variant_names(part))
        for axes, decoder in zip(line, decoders, strict=True):
            rows = named[(named["decoder"] == decoder) & named["name"].isin(names)]
            contenders = rows[~rows["method"].isin(REFERENCES)]
            best = contenders["nda_mean"].round(4) == contenders["nda_mean"].max().round(4)
            references = rows[rows["method"].isin(REFERENCES)]
            least = limits[decoder][0]
            beyond = 100 * references["nda_mean"] < least
            for chosen, shape, ink, filled in (
                (contenders[~best], "o", _OTHER, True),
                (contenders[best], "D", _BEST, True),
                (references[~beyond], "o", INK, False),
            ):
                axes.errorbar(
                    100 * chosen["nda_mean"], [names.index(name) for name in chosen["name"]],
                    xerr=100 * chosen["nda_std"].fillna(0.0), linestyle="none", color=ink, marker=shape,
                    markersize=4.5, capsize=0, elinewidth=1, markerfacecolor=ink if filled else "none",
                )  # fmt: skip
            for name in references.loc[beyond, "name"]:
                axes.plot(least, names.index(name), "<", color=INK, markersize=4.5, fillstyle="none", clip_on=False)
            axes.set_xlim(limits[decoder])
            paper_line(axes, vertical=True)
            axes.tick_params(labelsize=8, length=0)
            axes.xaxis.set_major_locator(MaxNLocator(3, prune="upper"))
        line[0].set_yticks(range(len(names)), names)
        line[0].set_ylim(len(names) - 0.5, -0.5)
        if title:
            line[0].set_title(f"{title}\n")
    for axes, decoder in zip(panels[0], decoders, strict=True):
        axes.annotate(
            heading(decoder), (0, 1), xycoords="axes fraction", xytext=(0, 3), textcoords="offset points",
            fontsize=8, va="bottom", fontweight="bold",
        )  # fmt: skip
    figure.supxlabel(label.replace("\n", ", "), fontsize=9)
    return figure


def _limits(parts: Iterable[pd.DataFrame], decoder: str) -> tuple[float, float]:
    """Return a scale in % that holds the methods' numbers with their spread, and the paper's line."""
    rows = pd.concat(list(parts))
    rows = rows[(rows["decoder"] == decoder) & ~rows["method"].isin(REFERENCES)]
    spread = rows["nda_std"].fillna(0.0)
    low, high = (rows["nda_mean"] - spread).min(), (rows["nda_mean"] + spread).max()
    low, high = min(low, PAPER_NDA), max(high, PAPER_NDA)  # NaN compares as false: the paper's line then
    margin = 0.05 * max(high - low, 0.01)
    return 100 * (low - margin), 100 * (high + margin)


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
    paper_line(axes, vertical=True)
    axes.annotate(
        f"{100 * PAPER_NDA:.1f}", (100 * PAPER_NDA, 1), xycoords=("data", "axes fraction"), xytext=(-2, 1),
        textcoords="offset points", fontsize=7, ha="right", va="bottom",
    )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
