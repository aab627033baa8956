"""A simulation's results: a row a redundancy and load, and a table of them in a terminal."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coin.serving.sim.profile import Profile, Redundancy
from coin.serving.sim.simulation import Outcome, Simulation
from coin.serving.sim.tails import tail_intervals

LEVELS: dict[str, float] = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
"""The quantiles of the latency, by the names of their columns."""


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
            "p99.9 in ms with its 95 % interval, ∞ where too many queries failed; memory of weights in MiB, of "
            "the largest server and in all; answers that were decoded or came from a copy or spare, and that never "
            "came, in %; forward passes a query; effective accuracy in %, – where it was not measured."
        )
    )


def _table(rows: pd.DataFrame, title: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("redundancy", no_wrap=True)
    for heading in ("p99.9", "", "server", "in all", "stood\nin", "failed", "forw.", "acc."):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows.to_dict("records"):
        name = str(row["redundancy"]) + (f", q = {row['quantile']:g}" if rows["quantile"].nunique() > 1 else "")
        table.add_row(
            name if row["extras"] < 2 else f"{name}, {row['extras']}",
            milliseconds(row["p999"]),
            f"\\[{milliseconds(row['p999_low'])}, {milliseconds(row['p999_high'])}]",
            f"{row['memory_server'] / 2**20:.0f}",
            f"{row['memory'] / 2**20:.0f}",
            f"{100 * (row['share_decoded'] + row['share_spared']):.2f}",
            f"{100 * row['share_failed']:.2f}",
            f"{row['forwards']:.2f}",
            "–" if np.isnan(row["effective_accuracy"]) else f"{100 * row['effective_accuracy']:.2f}",
        )
    return table


def milliseconds(seconds: float) -> str:
    """Return a latency in ms."""
    if seconds == float("inf"):
        return "∞"
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}"
