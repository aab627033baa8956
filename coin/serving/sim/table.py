"""A simulation's results: a row a redundancy and load, as a frame, a file and a table in a terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coin.reporting.results import read_frame, write_frame
from coin.serving.sim.case import Case, Outcome
from coin.serving.sim.redundancy import Redundancy
from coin.serving.sim.tails import tail_intervals

if TYPE_CHECKING:
    from coin.serving.sim.fleet import Fleet

SIMULATION_CSV = "simulation.csv"
LEVELS: dict[str, float] = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
"""The quantiles of the latency, by the names of their columns."""
_TEXT = ("want", "redundancy")
_INTEGERS = ("experts", "extras", "queries", "seeds", "memory_server", "memory")
_NUMBERS = (
    "quantile", "load", *(f"{name}{part}" for name in LEVELS for part in ("", "_low", "_high")), "share_decoded",
    "share_spared", "share_failed", "forwards", "utilisation", "expert_accuracy", "standing_in_accuracy",
    "effective_accuracy", "service_seconds", "decoding_seconds",
)  # fmt: skip
COLUMNS = (*_TEXT, *_INTEGERS, *_NUMBERS)


def as_row(kind: Redundancy, fleet: "Fleet", case: Case, outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Return what the seeds of one case come to.

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
    right = sum(share * fleet.decoded_accuracy.get(size, nan) for size, share in shares.items())
    right += spared * fleet.accuracy(kind) if spared else 0.0
    server, memory = fleet.memory(kind)
    row: dict[str, object] = {
        "want": str(case.want), "redundancy": str(kind), "load": case.load,
        "quantile": case.policy.quantile if case.policy.hedges else nan,
        "experts": fleet.code.num_experts, "extras": len(set(case.machines)) - fleet.code.num_experts,
        "queries": case.queries, "seeds": len(outcomes), "share_decoded": decoded, "share_spared": spared,
        "share_failed": failed, "forwards": float(np.mean([outcome.forwards for outcome in outcomes])),
        "utilisation": float(np.mean([outcome.utilisation for outcome in outcomes])), "memory_server": server,
        "memory": memory, "expert_accuracy": fleet.expert_accuracy,
        "standing_in_accuracy": right / (decoded + spared) if decoded + spared else nan,
        "effective_accuracy": (1 - decoded - spared - failed) * fleet.expert_accuracy + right,
        "service_seconds": case.unit * (1 + case.conditions.service.tail), "decoding_seconds": case.decoding,
    }  # fmt: skip
    intervals = tail_intervals([outcome.latencies for outcome in outcomes], list(LEVELS.values()))
    for name, interval in zip(LEVELS, intervals, strict=True):
        row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return row


def write_simulation(path: Path, rows: pd.DataFrame) -> None:
    """Write the rows as CSV."""
    write_frame(path, rows[list(COLUMNS)])


def read_simulation(folder: Path) -> pd.DataFrame:
    """Return the rows of ``simulation.csv``.

    Raises:
        FileError: The file is missing or damaged.
    """
    return read_frame(folder / SIMULATION_CSV, COLUMNS, _INTEGERS, _NUMBERS)


def print_simulation(rows: pd.DataFrame, console: Console) -> None:
    """Print a table for each kind of query, number of experts and load."""
    for (want, experts, load), group in rows.groupby(["want", "experts", "load"], sort=False):
        console.print(simulation_table(group, f"{experts} experts, {want} wanted, load {load:g}"))
    console.print(
        Text(
            "p99.9 in ms with its 95 % interval, ∞ where too many queries failed; memory of weights in MiB, of "
            "the largest server and in all; answers that were decoded or came from a copy or spare, and that never "
            "came, in %; forward passes a query; effective accuracy in %, – where it was not measured."
        )
    )


def simulation_table(rows: pd.DataFrame, title: str) -> Table:
    """Return one table."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("redundancy", no_wrap=True)
    for heading in ("p99.9", "", "server", "in all", "stood\nin", "failed", "forw.", "acc."):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows.to_dict("records"):
        name = str(row["redundancy"]) + (f", q = {row['quantile']:g}" if rows["quantile"].nunique() > 1 else "")
        table.add_row(
            name if row["extras"] < 2 else f"{name}, {row['extras']}",
            milliseconds(row["p999"]),
            f"[{milliseconds(row['p999_low'])}, {milliseconds(row['p999_high'])}]".replace("[", "\\["),
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
