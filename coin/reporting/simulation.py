"""A simulation as a file, one row a policy and load, and in a terminal, one table a kind of query."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coin.errors import ConfigurationError
from coin.reporting.results import read_frame, write_frame

SIMULATION_CSV = "simulation.csv"
SIMULATION_JSON = "simulation.json"

LEVELS: dict[str, float] = {"p50": 0.5, "p99": 0.99, "p995": 0.995, "p999": 0.999}
"""The quantiles of the latency, by the names of their columns."""
_NAMES = {"one": "one expert's answer a query", "all": "all experts' answers a query"}


@dataclass(frozen=True)
class SimulationRow:
    """What one policy does at one load, over all seeds. Latencies are in seconds, infinite where queries failed.

    Args:
        experiment: The experiment's name.
        method: The merge method whose coded models serve.
        batchnorm: Its BatchNorm policy.
        decoder: The decoder.
        want: Whose answers a query wants: ``one`` expert's, or ``all`` experts'.
        policy: The serving policy.
        quantile: Of the time that own answers take, after which they are late; NaN where the policy waits for them.
        load: The share of the experts' capacity that own answers alone take up.
        servers: The number of servers, the same for every policy.
        queries: Queries per seed.
        seeds: How many seeds.
        p50: The median latency.
        p50_low: Its 95 % bootstrap interval begins.
        p50_high: And ends.
        p99: The 99 % quantile.
        p99_low: See `p50_low`.
        p99_high: See `p50_high`.
        p995: The 99.5 % quantile.
        p995_low: See `p50_low`.
        p995_high: See `p50_high`.
        p999: The 99.9 % quantile.
        p999_low: See `p50_low`.
        p999_high: See `p50_high`.
        share_decoded: Decoded answers among all wanted answers.
        share_failed: Wanted answers that never came.
        forwards: Forward passes a query.
        utilisation: The share of the time that servers were busy.
        expert_accuracy: Of the experts themselves, mean over tasks.
        decoded_accuracy: Of the decoded answers, by the experiment's results; NaN without any.
        effective_accuracy: (1 − share)·expert + share·decoded accuracy; answers that never came count as wrong.
        service_seconds: The mean service time.
        decoding_seconds: The time that decoding takes.
    """

    experiment: str
    method: str
    batchnorm: str
    decoder: str
    want: str
    policy: str
    quantile: float
    load: float
    servers: int
    queries: int
    seeds: int
    p50: float
    p50_low: float
    p50_high: float
    p99: float
    p99_low: float
    p99_high: float
    p995: float
    p995_low: float
    p995_high: float
    p999: float
    p999_low: float
    p999_high: float
    share_decoded: float
    share_failed: float
    forwards: float
    utilisation: float
    expert_accuracy: float
    decoded_accuracy: float
    effective_accuracy: float
    service_seconds: float
    decoding_seconds: float

    @property
    def series(self) -> str:
        """What the row's line in a figure is called: the policy, and its quantile where it has one."""
        return self.policy if self.quantile != self.quantile else f"{self.policy}, q = {self.quantile:g}"


_COLUMNS = tuple(field.name for field in fields(SimulationRow))
_TEXT = ("experiment", "method", "batchnorm", "decoder", "want", "policy")
_INTEGERS = ("servers", "queries", "seeds")


def write_simulation(folder: Path, rows: Sequence[SimulationRow]) -> None:
    """Write ``simulation.csv``.

    Raises:
        ConfigurationError: There are no rows.
        FileError: The file cannot be written.
    """
    if not rows:
        raise ConfigurationError("found no rows of a simulation to write, expected at least one")
    write_frame(folder / SIMULATION_CSV, pd.DataFrame.from_records([asdict(row) for row in rows], columns=_COLUMNS))


def read_simulation(folder: Path) -> list[SimulationRow]:
    """Return the rows of ``simulation.csv``.

    Raises:
        FileError: The file is missing or damaged.
    """
    numbers = [name for name in _COLUMNS if name not in (*_TEXT, *_INTEGERS)]
    frame = read_frame(folder / SIMULATION_CSV, _COLUMNS, _INTEGERS, numbers)
    return [SimulationRow(**{str(name): value for name, value in row.items()}) for row in frame.to_dict("records")]


def print_simulation(rows: Sequence[SimulationRow], console: Console) -> None:
    """Print a table per kind of query: a line per load and policy."""
    for want in dict.fromkeys(row.want for row in rows):
        console.print(simulation_table([row for row in rows if row.want == want]))
    console.print(
        Text(
            "Latencies in ms, ∞ where too many queries failed; decoded and failed in % of the wanted answers; forward "
            "passes a query; effective accuracy in %."
        )
    )


def simulation_table(rows: Sequence[SimulationRow]) -> Table:
    """Return the table of one kind of query."""
    first = rows[0]
    title = (
        f"{first.experiment}: {first.servers} servers, {_NAMES[first.want]}; {first.method}"
        f"{f' ({first.batchnorm})' if first.batchnorm else ''}, {first.decoder}"
    )
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("load", justify="right", no_wrap=True)
    table.add_column("policy", overflow="fold")
    for heading in ("p50", "p99", "p99.5", "p99.9", "decoded", "failed", "forw.", "acc."):
        table.add_column(heading, justify="right", no_wrap=True)
    for load in dict.fromkeys(row.load for row in rows):
        lines = [row for row in rows if row.load == load]
        for row in lines:
            table.add_row(
                f"{load:g}",
                Text(row.series),
                *(_milliseconds(getattr(row, name)) for name in LEVELS),
                f"{100 * row.share_decoded:.2f}",
                f"{100 * row.share_failed:.2f}",
                f"{row.forwards:.2f}",
                f"{100 * row.effective_accuracy:.2f}",
                end_section=row is lines[-1],
            )
    return table


def _milliseconds(seconds: float) -> str:
    if seconds == float("inf"):
        return "∞"
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
