"""Latencies and what they cost, of `coin simulate`: quantiles, a table, a figure."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from coin.errors import ConfigurationError
from coin.reporting.style import COLOURS, WIDTH, legend_below, marker, style
from coin.reporting.tables import rich_table

_BLOCKS, _DRAWS = 20, 200
_AXES = {
    "memory_server": (1 / 2**20, "weights on the largest server (MiB, log scale)"),
    "memory": (1 / 2**20, "weights on all servers (MiB, log scale)"),
    "load": (1.0, "load by own answers alone"),
}
_WANTS = {"one": "one expert's answer a query", "all": "all experts' answers a query"}


class Interval(NamedTuple):
    """A quantity and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def tail_intervals(series: Sequence[NDArray[np.float64]], levels: Sequence[float], seed: int = 0) -> list[Interval]:
    """Return quantiles of several series ``[Q]`` together, with percentile intervals of a block bootstrap.

    Latencies of neighbouring queries depend on one another, so that what is drawn again, 200 times, are blocks: whole
    series where there are at least 20, and else each is cut into 20. A quantile is the smallest value that at least
    this share of the values does not exceed: infinite values, which are failures, are never interpolated. Raises
    ConfigurationError where a series has fewer than 20 values.

    Source: Kunsch, *The jackknife and the bootstrap for general stationary observations* (1989), with blocks that do
    not overlap as in Carlstein (1986).
    """
    if min(map(len, series)) < _BLOCKS:
        raise ConfigurationError(f"found fewer than {_BLOCKS} latencies, expected as many; simulate more queries")
    cuts = 1 if len(series) >= _BLOCKS else _BLOCKS
    parts = [part for each in series for part in np.array_split(each, cuts)]
    blocks, values = np.repeat(np.arange(len(parts)), list(map(len, parts))), np.concatenate(parts)
    order = np.argsort(values, kind="stable")
    values, blocks = values[order], blocks[order]

    def quantiles(times: NDArray[np.int64]) -> NDArray[np.float64]:  # of values whose block counts so many times
        total = times[blocks].cumsum()
        return np.asarray(values[np.searchsorted(total, np.asarray(levels) * total[-1])])

    draws = np.random.default_rng(seed).multinomial(len(parts), np.full(len(parts), 1 / len(parts)), _DRAWS)
    found = [quantiles(times) for times in draws]
    low, high = np.quantile(found, [0.025, 0.975], axis=0, method="closest_observation")
    own = quantiles(np.ones(len(parts), dtype=np.int64))
    return [Interval(*map(float, each)) for each in zip(own, low, high, strict=True)]


def print_simulation(rows: pd.DataFrame, console: Console) -> None:
    """Print a table for each kind of query, number of experts and load."""
    for (want, experts, load), group in rows.groupby(["want", "experts", "load"], sort=False):
        console.print(rich_table(_table(group), f"{experts} experts, {want} wanted, load {load:g}", ["redundancy"]))
    console.print(
        Text(
            "After which quantile of their time own answers are late, 0 for at once; p99.9 in ms with its 95 % "
            "interval, ∞ where too many queries failed; memory of weights in MiB, of the largest server and in all; "
            "answers that stood in for an expert's, and that never came, in %; queries in a million that find nobody "
            "while machines are repaired (--failures.mtbf, .mttr); forward passes a query; effective accuracy in %, – "
            "where it was not measured." + (" → is the advice, × does not fit the budget." if "buy" in rows else "")
        )
    )


def _table(rows: pd.DataFrame) -> pd.DataFrame:
    lines = [
        {
            "redundancy": ("→ " if row.get("buy") else "× " if not row.get("fits", True) else "") + named(row),
            "late": "–" if np.isnan(row["quantile"]) else f"{row['quantile']:g}",
            "p99.9": milliseconds(row["p999"]),
            "95 %": f"{milliseconds(row['p999_low'])}–{milliseconds(row['p999_high'])}",
            "most\nMiB": f"{row['memory_server'] / 2**20:.0f}",
            "all\nMiB": f"{row['memory'] / 2**20:.0f}",
            "stood\nin": f"{100 * (row['share_decoded'] + row['share_replicated']):.2f}",
            "none": f"{100 * row['share_failed']:.2f}",
            "down": f"{1e6 * row['unanswered']:.0f}",
            "forw.": f"{row['forwards']:.2f}",
            "acc.": "–" if np.isnan(row["effective_accuracy"]) else f"{100 * row['effective_accuracy']:.2f}",
        }
        for row in rows.to_dict("records")
    ]
    return pd.DataFrame(lines)


def named(row: Mapping[Any, Any]) -> str:
    """Return a row's redundancy, variant, and number of servers where there are several."""
    name = f"{row['redundancy']} {row['variant']}".strip()
    return name if row["extras"] < 2 else f"{name}, {row['extras']}"


def milliseconds(seconds: float) -> str:
    """Return a latency in ms."""
    if seconds == float("inf"):
        return "∞"
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}"


def tail_against(column: str, rows: pd.DataFrame) -> Figure:
    """The 99.9 % quantile of the latency against ``memory_server``, ``memory`` or ``load``, a panel a kind of query.

    Points are joined over numbers of experts and of extra servers; those whose quantile is infinite are left out.
    """
    wants, kinds = list(dict.fromkeys(rows["want"])), list(dict.fromkeys(rows["redundancy"]))
    scale, label = _AXES[column]
    with style():
        figure = Figure(figsize=(WIDTH, 0.9 + 2.6 * len(wants)))
        panels = figure.subplots(len(wants), 1, sharex=True, squeeze=False)[:, 0]
        for axes, want in zip(panels, wants, strict=True):
            shown = rows[(rows["want"] == want) & np.isfinite(rows["p999"])]
            for index, kind in enumerate(kinds):
                line = shown[shown["redundancy"] == kind].sort_values(["experts", "extras", column])
                if line.empty:
                    continue
                y, high = line["p999"], line["p999_high"].where(np.isfinite(line["p999_high"]), line["p999"])
                axes.errorbar(
                    line[column] * scale, 1e3 * y, [1e3 * (y - line["p999_low"]), 1e3 * (high - y)], label=kind,
                    color=COLOURS[index % len(COLOURS)], marker=marker(index), markersize=5, capsize=2, linewidth=1.3,
                )  # fmt: skip
            axes.set_title(_WANTS[want])
            axes.set_ylabel("p99.9 (ms, log scale)")
            axes.set_yscale("log")
        if "log" in label:
            panels[-1].set_xscale("log")
        panels[-1].set_xlabel(label)
        legend_below(figure, panels[0], columns=3)
        return figure
