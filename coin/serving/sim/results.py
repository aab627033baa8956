"""A simulation's results: rows with intervals, a table in a terminal, and figures."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
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
from coin.serving.sim.profile import Profile, Redundancy
from coin.serving.sim.simulation import Outcome, Simulation

LEVELS = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
"""The quantiles of the latency, by the names of their columns."""
_BLOCKS, _DRAWS = 20, 200
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


def as_row(
    kind: Redundancy, profile: Profile, simulation: Simulation, outcomes: Sequence[Outcome]
) -> dict[str, object]:
    """Return what the seeds of one simulation come to: a row of ``simulation.csv``.

    Latencies are in seconds, infinite where too many queries failed, and memory in bytes of weights: ``memory_server``
    of the largest server, ``memory`` of all. ``share_spared`` are answers from copies and spares;
    ``standing_in_accuracy`` is that of these and of decoded ones, NaN without any and where it was not measured.
    """
    answers = sum(outcome.answers for outcome in outcomes)
    sizes = sorted({size for outcome in outcomes for size in outcome.decoded})
    shares = {size: sum(outcome.decoded.get(size, 0) for outcome in outcomes) / answers for size in sizes}
    spared = sum(outcome.spared for outcome in outcomes) / answers
    failed, decoded = sum(outcome.failed for outcome in outcomes) / answers, sum(shares.values())
    nan = float("nan")
    right = sum(share * profile.decoded_accuracy.get(size, nan) for size, share in shares.items())
    right += spared * profile.accuracy(kind) if spared else 0.0
    memory_server, memory = profile.memory(kind)
    intervals = tail_intervals([outcome.latencies for outcome in outcomes], list(LEVELS.values()))
    latencies = {
        f"{name}{part}": value
        for name, interval in zip(LEVELS, intervals, strict=True)
        for part, value in (("", interval.value), ("_low", interval.low), ("_high", interval.high))
    }
    return {
        "want": str(simulation.want),
        "redundancy": str(kind),
        "experts": profile.code.num_experts,
        "extras": len(set(simulation.machines)) - profile.code.num_experts,
        "queries": simulation.queries,
        "seeds": len(outcomes),
        "memory_server": memory_server,
        "memory": memory,
        "quantile": simulation.policy.quantile if simulation.policy.hedges else nan,
        "load": simulation.load,
        **latencies,
        "share_decoded": decoded,
        "share_spared": spared,
        "share_failed": failed,
        "forwards": float(np.mean([outcome.forwards for outcome in outcomes])),
        "utilisation": float(np.mean([outcome.utilisation for outcome in outcomes])),
        "expert_accuracy": profile.expert_accuracy,
        "standing_in_accuracy": right / (decoded + spared) if decoded + spared else nan,
        "effective_accuracy": (1 - decoded - spared - failed) * profile.expert_accuracy + right,
        "service_seconds": simulation.unit * (1 + simulation.conditions.service.tail),
        "decoding_seconds": simulation.decoding,
    }


def print_simulation(rows: pd.DataFrame, console: Console) -> None:
    """Print a table for each kind of query, number of experts and load."""
    for (want, experts, load), group in rows.groupby(["want", "experts", "load"], sort=False):
        console.print(_table(group, f"{experts} experts, {want} wanted, load {load:g}"))
    console.print(
        Text(
            "After which quantile of their time own answers are late; p99.9 in ms with its 95 % interval, ∞ where too "
            "many queries failed; memory of weights in MiB, of the largest server and in all; answers that were "
            "decoded or came from a copy or spare, and that never came, in %; forward passes a query; effective "
            "accuracy in %, – where it was not measured."
            + (" → is the advice, × does not fit the budget." if "buy" in rows else "")
        )
    )


def _table(rows: pd.DataFrame, title: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("redundancy", no_wrap=True)
    for heading in ("late", "p99.9", "95 %", "ser-\nver", "in\nall", "stood\nin", "failed", "forw.", "acc."):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows.to_dict("records"):
        name = str(row["redundancy"]) if row["extras"] < 2 else f"{row['redundancy']}, {row['extras']}"
        mark = "→ " if row.get("buy") else "× " if not row.get("fits", True) else ""
        table.add_row(
            mark + name,
            when_asked(row["quantile"]),
            milliseconds(row["p999"]),
            f"{milliseconds(row['p999_low'])}–{milliseconds(row['p999_high'])}",
            f"{row['memory_server'] / 2**20:.0f}",
            f"{row['memory'] / 2**20:.0f}",
            f"{100 * (row['share_decoded'] + row['share_spared']):.2f}",
            f"{100 * row['share_failed']:.2f}",
            f"{row['forwards']:.2f}",
            "–" if np.isnan(row["effective_accuracy"]) else f"{100 * row['effective_accuracy']:.2f}",
        )
    return table


def when_asked(quantile: float) -> str:
    """Return from which quantile of lateness on others than the expert are asked, or their answers taken."""
    return "–" if np.isnan(quantile) else "at once" if quantile == 0 else f"q {quantile:g}"


def milliseconds(seconds: float) -> str:
    """Return a latency in ms."""
    if seconds == float("inf"):
        return "∞"
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}"


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
