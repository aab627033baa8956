"""A simulation in a terminal: one table per kind of query."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coin.reporting.simulation import LEVELS, SimulationRow

_NAMES = {"one": "one expert's answer a query", "all": "all experts' answers a query"}


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
