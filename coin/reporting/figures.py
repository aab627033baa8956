"""The figures: NDA against memory and against an option; latency against memory."""

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from coin.reporting.style import (
    COLOURS,
    INK,
    SOFT,
    WIDTH,
    column_of_names,
    legend_below,
    log_scale,
    marker,
    method_colour,
    style,
)
from coin.reporting.summary import REFERENCES, decoders_of, variant_names

_MANY = 4  # so many forwards and more have one marker
_NAMED = 16  # so many characters of a name are written on an axis
_NEAR = 0.5  # points of NDA below 100 up to which an axis is about linear
_TICKS = tuple(step * 10.0**power for power in range(-4, 6) for step in (1, 2, 5))


def nda_against_memory(stand_ins: pd.DataFrame, network_mib: float = math.nan) -> Figure:
    """Mean NDA ± spread of `stand_ins` against what they keep, on a logarithmic axis; a marker by their forwards.

    Named are those that no other beats in both (joined by a line), and every method with its best decoder, if it has
    several. What keeps nothing stands at the left end. Points below all that are named are left out. The unit is a
    network's size if given, else MiB.
    """
    with style():
        rows = stand_ins.sort_values(["memory_mib", "nda_mean"], ascending=[True, False], ignore_index=True)
        unit, size = ("MiB", 1.0) if math.isnan(network_mib) else ("networks", network_mib)
        sizes = rows["memory_mib"] / size
        free = 10 ** (math.floor(math.log10(sizes[sizes > 0].min())) - 0.3) if (sizes > 0).any() else 1.0
        at = sizes.where(sizes > 0, free)
        front = rows["nda_mean"] > rows["nda_mean"].cummax().shift(fill_value=-1.0)  # better than all that keep less
        named = {*rows.groupby("name")["nda_mean"].idxmax(), *rows.index[front]}
        told = rows.groupby("name")["decoder"].transform("nunique") > 1  # the only decoder of a name need not be
        figure = Figure(figsize=(WIDTH, max(3.6, 1.1 + 0.2 * len(named))))
        axes = figure.subplots()
        counts = rows["forwards"].clip(upper=_MANY).astype(int)
        kinds = sorted(set(counts))
        labels: list[tuple[float, float, str, str]] = []
        ends = [100.0]
        for i, row in enumerate(rows.to_dict("records")):
            nda, spread = 100 * row["nda_mean"], 100 * (0.0 if math.isnan(row["nda_std"]) else row["nda_std"])
            look: Any = {"color": method_colour(row["name"]), "alpha": 1.0 if i in named else 0.3, "markersize": 6.5}
            axes.errorbar(at[i], nda, spread or None, capsize=2, marker=marker(kinds.index(counts[i])), **look)
            if i in named:
                ends += [nda - spread, nda + spread]
                read = f", {row['decoder']}" if told[i] else ""
                labels.append((nda, float(at[i]), f"{row['name']}{read}  {nda:.1f}", look["color"]))
        axes.step(at[front], 100 * rows["nda_mean"][front], where="post", color=INK, linewidth=0.8, zorder=0)
        lowest, highest = min(ends), max(ends)
        axes.set_yscale("function", functions=(_nearness, _nda_of))
        axes.set_ylim(*(_nda_of(_nearness(end) + room) for end, room in ((lowest, -0.06), (highest, 0.06))))
        shown = [tick for tick in (20, 40, 60, 80, 90, 95, 98, 99, 99.5, 100) if tick >= lowest - 1]
        axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
        log_scale(axes)
        ticks = {tick: f"{tick:g}" for tick in _TICKS if at.min() / 1.3 <= tick <= at.max() * 1.3}
        if at.max() > 30 * at.min():  # more than have room
            ticks = {tick: text for tick, text in ticks.items() if math.log10(tick).is_integer()}
        if (sizes <= 0).any():
            ticks = {free: "0"} | {tick: text for tick, text in ticks.items() if tick > 1.5 * free}
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
        column_of_names(axes, labels, 0.18 / (figure.get_figheight() - 0.9))
        axes.set(ylabel="NDA (%), finer near 100", xlabel=f"memory kept, in {unit} (log scale)")
        for i, count in enumerate(kinds):
            text = f"{count}{' or more' if count == _MANY else ''} network{'s' if count > 1 else ''} a lost answer"
            axes.plot([], [], color=SOFT, marker=marker(i), linestyle="none", label=text)
        legend_below(figure)
        return figure


def nda_against_option(means: pd.DataFrame, option: str, values: "pd.Series[Any]", *, joined: bool = True) -> Figure:
    """Mean NDA ± spread against an option: a panel for each of the first two of `decoders_of`, a line a variant.

    Values stand along the axis where they are numbers, else in order of appearance. Where several experiments hold one
    variant and value, the point is the mean of their means; the points of a variant are `joined` where that is alike.
    """
    with style():
        points = means.assign(name=variant_names(means), value=values)[means["method"] != REFERENCES[1]]
        numeric = pd.api.types.is_numeric_dtype(points["value"]) and points["value"].dtype != bool
        known = list(dict.fromkeys(points["value"].sort_values() if numeric else points["value"]))
        logarithmic = numeric and known[0] > 0 and known[-1] >= 8 * known[0]
        decoders, names = decoders_of(points)[:2], list(dict.fromkeys(points["name"]))
        figure = Figure(figsize=(WIDTH, 0.8 + 2.5 * len(decoders)))
        panels = figure.subplots(len(decoders), 1, sharex=True, squeeze=False)[:, 0]
        for axes, decoder in zip(panels, decoders, strict=True):
            for name, rows in points[points["decoder"] == decoder].groupby("name", sort=False):
                at = 100 * rows.groupby("value", sort=False)[["nda_mean", "nda_std"]].mean()
                at = at.set_axis([value if numeric else known.index(value) for value in at.index]).sort_index()
                axes.errorbar(
                    at.index, at["nda_mean"], at["nda_std"].fillna(0.0), color=method_colour(str(name)),
                    marker=marker(names.index(str(name))), markersize=5, capsize=2, linewidth=1.2, label=str(name),
                    linestyle="-" if joined and numeric else "none",
                )  # fmt: skip
            axes.set(ylabel="NDA (%)", title=f"decoder {decoder}")
            if logarithmic:
                log_scale(axes)
            if not numeric or len(known) <= 8:
                texts = (f"{value:g}" if isinstance(value, float) else str(value) for value in known)
                short = [text if len(text) <= _NAMED else f"{text[: _NAMED - 1]}…" for text in texts]
                axes.set_xticks(known if numeric else range(len(known)), short)
                axes.minorticks_off()
        panels[-1].set_xlabel(f"{option} (log scale)" if logarithmic else option)
        legend_below(figure)
        return figure


def _nearness(nda: Any) -> Any:
    """Return how near an NDA in % is to 100, on a scale on which its distance halves in equal steps."""
    return -np.arcsinh((100 - np.asarray(nda)) / _NEAR)


def _nda_of(nearness: Any) -> Any:
    return 100 + _NEAR * np.sinh(np.asarray(nearness))


def tail_figure(rows: pd.DataFrame) -> Figure:
    """The 99.9 % quantile of the latency against the memory of all servers, where finite, a panel a kind of query."""
    wants, kinds = list(dict.fromkeys(rows["want"])), list(dict.fromkeys(rows["redundancy"]))
    with style():
        figure = Figure(figsize=(WIDTH, 0.9 + 2.6 * len(wants)))
        panels = figure.subplots(len(wants), 1, sharex=True, squeeze=False)[:, 0]
        for axes, want in zip(panels, wants, strict=True):
            shown = rows[(rows["want"] == want) & np.isfinite(rows["p999"])]
            for index, kind in enumerate(kinds):
                line = shown[shown["redundancy"] == kind].sort_values("memory")
                high = line["p999_high"].where(np.isfinite(line["p999_high"]), line["p999"])
                ends = [1e3 * (line["p999"] - line["p999_low"]), 1e3 * (high - line["p999"])]
                look = {"color": COLOURS[index], "marker": marker(index), "capsize": 2, "linewidth": 1.3}
                axes.errorbar(line["memory"] / 2**20, 1e3 * line["p999"], ends, label=kind, markersize=5, **look)
            axes.set(title=f"queries for {want}", ylabel="p99.9 (ms, log scale)", xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(LogFormatter())
                axis.set_minor_formatter(LogFormatter())
        panels[-1].set_xlabel("weights on all servers (MiB, log scale)")
        legend_below(figure)
        return figure
