"""Figures of NDA and of the risk of decoded answers; the `means` are rows of a summary, means over tasks."""

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coin.coding.decoder_config import REPLICA
from coin.reporting.style import (
    INK,
    SOFT,
    WIDTH,
    column_of_names,
    legend_below,
    log_scale,
    marker,
    method_colour,
    style,
    tick_text,
)
from coin.reporting.summary import REFERENCES, decoders_of, largest_samples, variant_names

PAPER_NDA = 0.975
"""What the paper reports that COIN's NDA exceeds "in some cases" (arXiv 2409.01420, abstract): no least."""
_MANY = 4  # so many forwards and more have one marker
_NEAR = 0.5  # points of NDA below 100 up to which an axis is about linear
_TICKS = tuple(step * 10.0**power for power in range(-4, 6) for step in (1, 2, 5))


def nda_against_cost(means: pd.DataFrame, decoder: str | None = None, unit: str = "seconds") -> Figure:
    """Mean NDA ± spread of every method against what it cost, decoder included, in ``seconds`` or ``passes``.

    What is free stands at the left end of the logarithmic axis. Names stand at the right, the best one first. The
    decoder is the one with the largest mean NDA by default.
    """
    with style():
        means, decoder = _of_decoder(means, decoder, last=True)
        cost = means[f"merge_{unit}_mean"] + means[f"decoder_{unit}_mean"]
        own = cost[~means["method"].isin(REFERENCES)]
        least, most = (float(own[own > 0].min()), float(own.max())) if (own > 0).any() else (1.0, 1.0)
        free = 10 ** (math.floor(math.log10(least)) - 0.5)
        figure, axes = _scatter(means, cost.where(cost > 0, free), decoder)
        log_scale(axes)
        some_free = bool((own <= 0).any())
        axes.set_xlim((free if some_free else least) / 1.6, most * 1.6)
        if some_free:
            ticks = [10.0**k for k in range(math.ceil(math.log10(least)) - 1, 9) if 2 * free < 10.0**k <= most * 1.6]
            axes.set_xticks([free, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
            axes.minorticks_off()
        axes.set_xlabel(f"{unit} for coded model and decoder (log scale)")
        return figure


def nda_against_memory(stand_ins: pd.DataFrame, network_mib: float = math.nan) -> Figure:
    """Mean NDA ± spread of `stand_ins` against what they keep, on a logarithmic axis; a marker by their forwards.

    Named are those that no other beats in both (joined by a line), and every method with its best decoder. What keeps
    nothing stands at the left end. Points below all that are named are left out. The unit is a network's size if given,
    else MiB.
    """
    with style():
        rows = stand_ins.sort_values(["memory_mib", "nda_mean"], ascending=[True, False], ignore_index=True)
        unit, size = ("MiB", 1.0) if math.isnan(network_mib) else ("networks", network_mib)
        sizes = rows["memory_mib"] / size
        free = 10 ** (math.floor(math.log10(sizes[sizes > 0].min())) - 0.3) if (sizes > 0).any() else 1.0
        at = sizes.where(sizes > 0, free)
        front = rows["nda_mean"] > rows["nda_mean"].cummax().shift(fill_value=-1.0)  # better than all that keep less
        named = {*rows.groupby("name")["nda_mean"].idxmax(), *rows.index[front]}
        figure = Figure(figsize=(1.5 * WIDTH, max(3.6, 1.1 + 0.2 * len(named))))
        axes = figure.subplots()
        counts = rows["forwards"].clip(upper=_MANY).astype(int)
        kinds = sorted(set(counts))
        labels: list[tuple[float, float | None, str, str]] = []
        ends = [100.0]
        for i, row in enumerate(rows.to_dict("records")):
            nda, spread = 100 * row["nda_mean"], 100 * (0.0 if math.isnan(row["nda_std"]) else row["nda_std"])
            look: Any = {"color": method_colour(row["name"]), "alpha": 1.0 if i in named else 0.3, "markersize": 6.5}
            axes.errorbar(at[i], nda, spread or None, capsize=2, marker=marker(kinds.index(counts[i])), **look)
            if i in named:
                ends += [nda - spread, nda + spread]
                read = "" if row["decoder"] == REPLICA else f", {row['decoder']}"
                labels.append((nda, float(at[i]), f"{row['name']}{read}  {nda:.1f}", look["color"]))
        axes.step(at[front], 100 * rows["nda_mean"][front], where="post", color=INK, linewidth=0.8, zorder=0)
        lowest, highest = min(ends), max(ends)
        axes.set_yscale("function", functions=(_nearness, _nda_of))
        axes.set_ylim(*(_nda_of(_nearness(end) + room) for end, room in ((lowest, -0.06), (highest, 0.06))))
        shown = [tick for tick in (20, 40, 60, 80, 90, 95, 98, 99, 99.5, 100) if tick >= lowest - 1]
        axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
        log_scale(axes)
        ticks = {tick: f"{tick:g}" for tick in _TICKS if at.min() / 1.3 <= tick <= at.max() * 1.3}
        if at.max() > 100 * at.min():  # more than have room
            ticks = {tick: text for tick, text in ticks.items() if math.log10(tick).is_integer()}
        if (sizes <= 0).any():
            ticks = {free: "0"} | {tick: text for tick, text in ticks.items() if tick > 1.5 * free}
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
        column_of_names(axes, labels, 0.18 / (figure.get_figheight() - 0.9))
        axes.set(ylabel="NDA (%), finer near 100", xlabel=f"kept beyond the experts' servers, in {unit} (log scale)")
        for i, count in enumerate(kinds):
            text = f"{count}{' or more' if count == _MANY else ''} network{'s' if count > 1 else ''} a lost answer"
            axes.plot([], [], color=SOFT, marker=marker(i), linestyle="none", label=text)
        legend_below(figure, axes)
        return figure


def nda_against_residual(means: pd.DataFrame) -> Figure:
    """Mean NDA ± spread against the residual ‖f_c − Σβf‖ / ‖Σβf‖, for the first of `decoders_of`."""
    with style():
        means, decoder = _of_decoder(means[means["method"] != "none"], None, last=False)
        means = means[np.isfinite(means["residual_mean"])]
        figure, axes = _scatter(means, means["residual_mean"], decoder)
        axes.set_xlabel("residual, ‖f_c − Σβf‖ / ‖Σβf‖")
        return figure


def nda_by_method(means: pd.DataFrame) -> Figure:
    """Mean NDA ± spread, a line per method's variant and a marker per decoder."""
    return _dots(means, decoders_of(means), "decoder", ["decoder"])


def nda_by_experiment(means: pd.DataFrame) -> Figure:
    """Mean NDA ± spread of several experiments, a marker each, for the first two of `decoders_of`."""
    decoders = decoders_of(means)[:2]
    shown, experiments = means[means["decoder"].isin(decoders)], list(dict.fromkeys(means["experiment"]))
    return _dots(shown, experiments, "experiment", decoders)


def nda_against_samples(means: pd.DataFrame) -> Figure:
    """Mean NDA ± spread against P, a panel for each of the first two of `decoders_of`, a line per variant."""
    return nda_against_option(means, "calibration samples per task, P", means["samples_per_task"])


def nda_against_option(means: pd.DataFrame, option: str, values: "pd.Series[Any]", *, joined: bool = True) -> Figure:
    """The same against an option of a sweep: along its values where they are numbers, else in order of appearance.

    Where several experiments hold one variant and value, the point is the mean of their means. The points of a variant
    are `joined` by a line, unless other options differ from point to point.
    """
    with style():
        points = means.assign(name=variant_names(means), value=values)[~means["method"].isin(REFERENCES)]
        numeric = pd.api.types.is_numeric_dtype(points["value"]) and points["value"].dtype != bool
        known = list(dict.fromkeys(points["value"].sort_values() if numeric else points["value"]))
        logarithmic = numeric and known[0] > 0 and known[-1] >= 8 * known[0]
        decoders = decoders_of(points)[:2]
        figure = Figure(figsize=(WIDTH, 0.8 + 2.5 * len(decoders)))
        panels = figure.subplots(len(decoders), 1, sharex=True, squeeze=False)[:, 0]
        for axes, decoder in zip(panels, decoders, strict=True):
            for i, (name, rows) in enumerate(points[points["decoder"] == decoder].groupby("name", sort=False)):
                at = 100 * rows.groupby("value", sort=False)[["nda_mean", "nda_std"]].mean()
                at = at.set_axis([value if numeric else known.index(value) for value in at.index]).sort_index()
                axes.errorbar(
                    at.index, at["nda_mean"], at["nda_std"].fillna(0.0), color=method_colour(str(name)),
                    marker=marker(i), markersize=5, capsize=2, linewidth=1.2, label=str(name),
                    linestyle="-" if joined and numeric else "none",
                )  # fmt: skip
            axes.set(ylabel="NDA (%)", title=f"decoder {decoder}")
            if logarithmic:
                log_scale(axes)
            if not numeric or len(known) <= 8:
                axes.set_xticks(known if numeric else range(len(known)), [tick_text(value) for value in known])
                axes.minorticks_off()
        panels[-1].set_xlabel(f"{option} (log scale)" if logarithmic else option)
        legend_below(figure, panels[0])
        return figure


def risk_curves(risk: pd.DataFrame) -> Figure:
    """Calibration of the predicted risk, and accuracy of the lowest-risk answers, of `risk_totals`: a colour a name."""
    with style():
        figure = Figure(figsize=(WIDTH, 3.0))
        calibration, coverage = figure.subplots(1, 2)
        for i, (name, points) in enumerate(risk.groupby("name", sort=False)):
            look = {"color": method_colour(str(name)), "marker": marker(i), "markersize": 5, "linewidth": 1.2}
            at = points[points["curve"] == "calibration"].sort_values("at")
            calibration.plot(100 * at["risk"], 100 * (1 - at["agreement"]), label=str(name), **look)
            at = points[points["curve"] == "coverage"].sort_values("at")
            coverage.plot(100 * at["at"], 100 * at["decoded_accuracy"], **look)
            coverage.plot(100 * at["at"], 100 * at["expert_accuracy"], **look | {"marker": None, "linestyle": ":"})
        most = 100 * risk["risk"].max()
        calibration.plot([0, most], [0, most], color=SOFT, linestyle="--", linewidth=0.9)
        calibration.set(xlabel="risk (%), mean of a bin", ylabel="disagree with the expert (%)")
        coverage.set(xlabel="kept, of least risk (%)", ylabel="accuracy (%)")
        coverage.invert_xaxis()
        legend_below(figure, calibration)
        return figure


def _of_decoder(means: pd.DataFrame, decoder: str | None, *, last: bool) -> tuple[pd.DataFrame, str]:
    means = largest_samples(means[means["method"] != "oracle"])
    decoder = decoder or decoders_of(means)[:2][-1 if last else 0]
    return means[means["decoder"] == decoder], decoder


def _scatter(means: pd.DataFrame, x: "pd.Series[float]", decoder: str) -> tuple[Figure, Axes]:
    """Draw NDA ± spread against a number, with the names and numbers of the points in a column at the right."""
    names, own = variant_names(means), ~means["method"].isin(REFERENCES)
    figure = Figure(figsize=(WIDTH, max(3.3, 0.6 + 0.2 * len(means))))
    axes = figure.subplots()
    labels = []
    for i in means.index:
        nda, spread = 100 * float(means.loc[i, "nda_mean"]), 100 * float(means.loc[i, "nda_std"])
        ink = method_colour(names[i])
        text = f"{names[i]}  {nda:.1f}" + ("" if math.isnan(spread) else f" ± {spread:.1f}")
        labels.append((nda, float(x[i]) if own[i] else None, text, ink))
        if own[i]:
            axes.errorbar(x[i], nda, np.nan_to_num(spread), color=ink, marker="o", markersize=7, capsize=3)
    low, high = axes.get_ylim()
    for nda in (nda for nda, at, _, _ in labels if at is None and nda > low - 1.5 * (high - low)):
        axes.axhline(nda, color=SOFT, linestyle="--", linewidth=1.1)
    if low - 0.5 * (high - low) < 100 * PAPER_NDA < high + 0.5 * (high - low):
        axes.axhline(100 * PAPER_NDA, color=INK, linewidth=0.9, linestyle=":")
    column_of_names(axes, labels, 0.18 / (figure.get_figheight() - 0.8))
    axes.set_ylabel(f"NDA (%), {decoder} decoder")
    return figure, axes


def _dots(means: pd.DataFrame, series: list[str], column: str, decoders: list[str]) -> Figure:
    """Draw NDA ± spread, a line per variant and a marker per value of `column`, in a panel per decoder if need be."""
    with style():
        means = largest_samples(means[means["method"] != "oracle"])
        means = means.assign(name=variant_names(means), last=means["method"].isin(REFERENCES))
        names = list(dict.fromkeys(means.sort_values("last", kind="stable")["name"]))
        panels_of = {"": means} if column == "decoder" else {d: means[means["decoder"] == d] for d in decoders}
        lines = [[name for name in names if name in set(part["name"])] for part in panels_of.values()]
        crowd = 0.26 * max(1.0, len(series) / 4)
        figure = Figure(figsize=(WIDTH, 1.3 + sum(0.4 + crowd * len(own) for own in lines)))
        panels = figure.subplots(len(lines), 1, squeeze=False, sharex=True, height_ratios=[len(own) for own in lines])
        for axes, own, (decoder, part) in zip(panels[:, 0], lines, panels_of.items(), strict=True):
            for i, value in enumerate(series):
                for _, row in part[part[column] == value].iterrows():
                    place = own.index(row["name"]) + 0.6 * ((i + 0.5) / len(series) - 0.5)
                    spread = 0.0 if math.isnan(row["nda_std"]) else 100 * row["nda_std"]
                    look = {"color": method_colour(row["name"]), "marker": marker(i), "markersize": 5.5, "capsize": 2}
                    axes.errorbar(100 * row["nda_mean"], place, xerr=spread, **look)
            axes.set_yticks(range(len(own)), own)
            axes.set_ylim(len(own) - 0.5, -0.5)
            axes.axvline(100 * PAPER_NDA, color=INK, linewidth=0.9, linestyle=":")
            axes.set_title(f"decoder {decoder}" if decoder else "")
        panels[-1, 0].set_xlabel("NDA (%), mean over tasks ± spread over seeds")
        for i, value in enumerate(series):
            panels[0, 0].plot([], [], color=SOFT, marker=marker(i), linestyle="none", label=value)
        legend_below(figure, panels[0, 0], column)
        return figure


def _nearness(nda: Any) -> Any:
    """Return how near an NDA in % is to 100, on a scale on which its distance halves in equal steps."""
    return -np.arcsinh((100 - np.asarray(nda)) / _NEAR)


def _nda_of(nearness: Any) -> Any:
    return 100 + _NEAR * np.sinh(np.asarray(nearness))
