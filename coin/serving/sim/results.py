"""A simulation's results: rows with intervals, a table in a terminal, and figures."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coin.errors import ConfigurationError
from coin.reporting.figures import WIDTH, colour, legend_below, marker, style
from coin.serving.sim.profile import Profile, StandIn
from coin.serving.sim.simulation import Outcome, Simulation

LEVELS = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
"""The quantiles of the latency, by the names of their columns."""
_BLOCKS, _DRAWS = 20, 200
_AXES = {
    "memory_server": (1 / 2**20, "weights on the largest server (MiB, log scale)"),
    "load": (1.0, "load by own answers alone"),
}
_WANTS = {"one": "one expert's answer a query", "all": "all experts' answers a query"}


class Interval(NamedTuple):
    """A quantity and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def tail_intervals(series: Sequence[NDArray[np.float64]], levels: Sequence[float], seed: int = 0) -> list[Interval]:
    """Return quantiles of several series together, with percentile intervals of a block bootstrap.

    Latencies of neighbouring queries depend on one another, so that what is drawn again, 200 times, are blocks: whole
    series where there are at least 20, and else each is cut into 20. A quantile is the smallest value that at least
    this share of the values does not exceed: infinite values, which are failures, are never interpolated.

    Source: Kunsch, *The jackknife and the bootstrap for general stationary observations* (1989), with blocks that do
    not overlap as in Carlstein (1986).

    Args:
        series: Values in their order ``[Q]``, at least 20 each.
        levels: Of the quantiles, in (0, 1).
        seed: Of the bootstrap's draws.
    """
    if min(map(len, series)) < _BLOCKS:
        raise ConfigurationError(f"found fewer than {_BLOCKS} latencies, expected as many; simulate more queries")
    values = np.concatenate(series)
    cuts = 1 if len(series) >= _BLOCKS else _BLOCKS
    blocks = np.concatenate(
        [index * cuts + np.arange(len(each)) * cuts // len(each) for index, each in enumerate(series)]
    )
    order = np.argsort(values, kind="stable")
    values, blocks = values[order], blocks[order]
    count = cuts * len(series)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), _DRAWS)
    found = np.array([_quantiles(values, times[blocks], levels) for times in draws])
    own = _quantiles(values, np.ones(len(values), dtype=np.int64), levels)
    low, high = np.quantile(found, [0.025, 0.975], axis=0, method="closest_observation")
    return [Interval(*map(float, each)) for each in zip(own, low, high, strict=True)]


def _quantiles(values: NDArray[np.float64], weights: NDArray[np.int64], levels: Sequence[float]) -> NDArray[np.float64]:
    """Return quantiles of ascending values that count so many times."""
    total = weights.cumsum()
    chosen: NDArray[np.float64] = values[np.searchsorted(total, np.asarray(levels) * total[-1])]
    return chosen


def as_row(what: StandIn, profile: Profile, simulation: Simulation, outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Return what the seeds of one simulation come to: a row of ``simulation.csv``.

    Latencies are in seconds, infinite where too many queries failed, and memory in bytes of weights: ``memory_server``
    of the largest server, ``memory`` of all. ``share_spared`` are answers of experts that run on other servers than
    their own; ``standing_in_accuracy`` is that of these and of decoded ones, NaN without any and where it was not
    measured. ``unanswered`` is the share of queries that nobody can answer, by `Repair`, and in no latency.
    """
    answers = sum(outcome.answers for outcome in outcomes)
    sizes = sorted({size for outcome in outcomes for size in outcome.decoded})
    shares = {size: sum(outcome.decoded.get(size, 0) for outcome in outcomes) / answers for size in sizes}
    spared = sum(outcome.spared for outcome in outcomes) / answers
    failed, decoded = sum(outcome.failed for outcome in outcomes) / answers, sum(shares.values())
    nan = float("nan")
    right = sum(share * what.right(size) for size, share in shares.items()) + (spared * what.right() if spared else 0.0)
    memory_server, memory = profile.memory(what)
    intervals = tail_intervals([outcome.latencies for outcome in outcomes], list(LEVELS.values()))
    latencies = {
        f"{name}{part}": value
        for name, interval in zip(LEVELS, intervals, strict=True)
        for part, value in (("", interval.value), ("_low", interval.low), ("_high", interval.high))
    }
    return {
        "want": str(simulation.want),
        "redundancy": str(what.kind),
        "variant": what.variant,
        "experts": profile.code.num_experts,
        "extras": profile.extras(what),
        "queries": simulation.queries,
        "seeds": len(outcomes),
        "memory_server": memory_server,
        "memory": memory,
        "losses": profile.losses(what),
        "quantile": simulation.policy.quantile if simulation.policy.hedges else nan,
        "load": simulation.load,
        **latencies,
        "share_decoded": decoded,
        "share_spared": spared,
        "share_failed": failed,
        "unanswered": simulation.unanswered(simulation.conditions.repair.share),
        "forwards": float(np.mean([outcome.forwards for outcome in outcomes])),
        "utilisation": float(np.mean([outcome.utilisation for outcome in outcomes])),
        "expert_accuracy": profile.accuracy,
        "standing_in_accuracy": right / (decoded + spared) if decoded + spared else nan,
        "effective_accuracy": (1 - decoded - spared - failed) * profile.accuracy + right,
        "service_seconds": simulation.unit * (1 + simulation.conditions.service.tail),
        "decoding_seconds": simulation.decoding,
        "unpacking_seconds": what.unpacking,
    }


def print_simulation(rows: pd.DataFrame, console: Console) -> None:
    """Print a table for each kind of query, number of experts and load."""
    for (want, experts, load), group in rows.groupby(["want", "experts", "load"], sort=False):
        console.print(_table(group, f"{experts} experts, {want} wanted, load {load:g}"))
    console.print(
        Text(
            "After which quantile of their time own answers are late, 0 for at once; p99.9 in ms with its 95 % "
            "interval, ∞ where too many queries failed; memory of weights in MiB, of the largest server and in all; "
            "answers that stood in for an expert's, and that never came, in %; queries in a million that find nobody "
            "while machines are repaired (--repair); forward passes a query; effective accuracy in %, – "
            "where it was not measured." + (" → is the advice, × does not fit the budget." if "buy" in rows else "")
        )
    )


def _table(rows: pd.DataFrame, title: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("redundancy", overflow="fold")
    for heading in ("late", "p99.9", "95 %", "ser-\nver", "in\nall", "stood\nin", "fai-\nled", "down", "forw.", "acc."):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows.to_dict("records"):
        mark = "→ " if row.get("buy") else "× " if not row.get("fits", True) else ""
        table.add_row(
            mark + named(row),
            "–" if np.isnan(row["quantile"]) else f"{row['quantile']:g}",
            milliseconds(row["p999"]),
            f"{milliseconds(row['p999_low'])}–{milliseconds(row['p999_high'])}",
            f"{row['memory_server'] / 2**20:.0f}",
            f"{row['memory'] / 2**20:.0f}",
            f"{100 * (row['share_decoded'] + row['share_spared']):.2f}",
            f"{100 * row['share_failed']:.2f}",
            f"{1e6 * row['unanswered']:.0f}",
            f"{row['forwards']:.2f}",
            "–" if np.isnan(row["effective_accuracy"]) else f"{100 * row['effective_accuracy']:.2f}",
        )
    return table


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
    """The 99.9 % quantile of the latency against ``memory_server`` or ``load``, a panel a kind of query.

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
                y, high = (
                    1e3 * line["p999"],
                    1e3 * line["p999_high"].where(np.isfinite(line["p999_high"]), line["p999"]),
                )
                if not line.empty:
                    axes.errorbar(
                        line[column] * scale, y, [y - 1e3 * line["p999_low"], high - y], color=colour(index),
                        marker=marker(index), markersize=5, capsize=2, linewidth=1.3, label=kind,
                    )  # fmt: skip
            axes.set_title(_WANTS[want])
            axes.set_ylabel("p99.9 (ms, log scale)")
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis)
        if "log" in label:
            panels[-1].set_xscale("log")
            _plain_numbers(panels[-1].xaxis)
        panels[-1].set_xlabel(label)
        legend_below(figure, panels[0], columns=3)
        return figure


def _plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2 and 5 with plain numbers: matplotlib's own labels need parsed mathematics."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
