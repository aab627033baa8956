"""The figure: NDA against memory."""

import math

import pandas as pd
from matplotlib.figure import Figure

from coin.reporting.style import (
    INK,
    SOFT,
    WIDTH,
    column_of_names,
    legend_below,
    marker,
    method_colour,
    plain_numbers,
    style,
)
from coin.reporting.text import counted

_MANY = 4  # so many forwards and more have one marker
_NEAR = 0.5  # points of NDA below 100 up to which an axis is about linear
_TICKS = (20, 40, 60, 80, 90, 95, 98, 99, 99.5, 100)


def nda_against_memory(stand_ins: pd.DataFrame, network_mib: float = math.nan) -> Figure:
    """Mean NDA ± spread of `stand_ins` against what they keep, on a logarithmic axis; a marker by their forwards.

    Named are those that no other beats in both (joined by a line), and every method with its best decoder. The unit is
    a network's size if given, else MiB.
    """
    in_networks = not math.isnan(network_mib)
    unit = "networks" if in_networks else "MiB"
    rows = _points(stand_ins, network_mib if in_networks else 1.0)
    kinds = sorted(set(rows["runs"]))
    markers = {runs: marker(place) for place, runs in enumerate(kinds)}
    with style():
        height = 1.1 + 0.2 * rows["is_named"].sum()
        figure = Figure(figsize=(WIDTH, max(3.6, height)))
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("asinh", linear_width=_NEAR)
        labels = []
        for row in rows.to_dict("records"):
            colour = method_colour(row["name"])
            axes.errorbar(
                row["size"],
                row["nda"],
                row["spread"] or None,
                color=colour,
                alpha=1.0 if row["is_named"] else 0.3,
                marker=markers[row["runs"]],
                markersize=6.5,
                capsize=2,
            )
            if row["is_named"]:
                labels.append((row["size"], row["nda"], row["label"], colour))
        front = rows[rows["is_front"]]
        axes.step(front["size"], front["nda"], where="post", color=INK, linewidth=0.8, zorder=0)
        for runs, shape in markers.items():
            at_least = "at least " if runs == _MANY else ""
            text = f"{at_least}{counted(runs, 'network run')} an answer"
            axes.plot([], [], color=SOFT, marker=shape, linestyle="none", label=text)
        axes.set_xlabel(f"memory kept, in {unit} (log scale)")
        axes.set_ylabel("NDA (%), finer near 100")
        plain_numbers(axes.xaxis)
        named = rows[rows["is_named"]]
        lowest = 98 + named["nda"].min()
        ticks = [tick for tick in _TICKS if tick >= lowest]
        texts = [f"{tick:g}" for tick in ticks]
        axes.set_yticks([tick - 100 for tick in ticks], texts)
        column_of_names(axes, labels, 0.18 / (figure.get_figheight() - 0.9))
        legend_below(figure)
        return figure


def _points(stand_ins: pd.DataFrame, unit: float) -> pd.DataFrame:
    """Return stand-ins by size in a unit of so many MiB, with what a figure shows of them; NDA is in points from 100.

    `is_front` says of which ones no smaller one is as good.
    """
    rows = stand_ins.sort_values(
        ["memory_mib", "nda_mean"], ascending=[True, False], ignore_index=True
    )
    best_so_far = rows["nda_mean"].cummax().shift(fill_value=-1.0)
    by_name = rows.groupby("name")
    num_decoders = by_name["decoder"].transform("nunique")
    decoders = (", " + rows["decoder"]).where(num_decoders > 1, "")
    percents = (100 * rows["nda_mean"]).map("  {:.1f}".format)
    is_front = rows["nda_mean"] > best_so_far
    is_best_of_name = rows.index.isin(by_name["nda_mean"].idxmax())
    return rows.assign(
        size=rows["memory_mib"] / unit,
        nda=100 * (rows["nda_mean"] - 1),
        spread=100 * rows["nda_std"].fillna(0),
        runs=rows["forwards"].clip(upper=_MANY).astype(int),
        is_front=is_front,
        is_named=is_front | is_best_of_name,
        label=rows["name"] + decoders + percents,
    )
