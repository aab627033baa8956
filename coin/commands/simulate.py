"""``coin simulate``: latency and accuracy of the answers by every policy, on a virtual clock."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from coin.commands.parser import parse_options
from coin.core.choices import check_integer
from coin.core.progress import progress_bar
from coin.errors import ConfigurationError
from coin.files.atomic import atomic_path
from coin.modules import Coded
from coin.reporting.figures import tail_figure
from coin.reporting.results import write_frame
from coin.reporting.style import as_png
from coin.reporting.tables import results_console, rich_table
from coin.reporting.text import percent
from coin.serving.policies import Policy, PolicyKind
from coin.serving.servers import System, read_coded
from coin.serving.simulate import Conditions, QueryTarget, ServiceTimes, Simulation, measure, row_of, run_simulation


def simulate(
    folder: str,
    conditions: Conditions,
    method: str | None = None,
    decoder: str | None = None,
    policies: list[PolicyKind] | None = None,
    quantile: float = 0.9,
    seeds: int = 3,
    output: str | None = None,
) -> pd.DataFrame:
    """Simulate the latency and accuracy of answers, for every policy and kind of query: for one expert, and for all.

    First every network of every server is timed here: experts, coded models, and bodies for each expert's answer.

    Args:
        folder: An experiment's folder, or a seed's.
        conditions: The load, the machines and the front end to simulate.
        method: The merge method of the coded models; by default the recommended one.
        decoder: Their decoder; by default the recommended one that reads survivors, and one that reads none.
        policies: The policies; by default all whose accuracy is in the results.
        quantile: The quantile of own answers' time after which they count as late.
        seeds: How often, with other random numbers.
        output: The folder for ``simulation.csv`` and the figure; by default `folder`.
    """
    check_integer("seeds", seeds, 1)
    found: dict[PolicyKind, Coded] = {}
    for kind in policies or PolicyKind:
        try:
            found[kind] = read_coded(Path(folder), method, decoder, kind)
        except ConfigurationError:
            if policies or Policy(kind).which not in ("coded", "everyone"):
                raise
    systems = {}
    for kind, coded in found.items():
        systems[kind] = System.of(coded, Policy(kind, quantile))
    times = measured(list(systems.values()))
    rows = []
    cases = [(want, kind) for want in QueryTarget for kind in found]
    for want, kind in progress_bar("simulating", items=cases):
        system = systems[kind]
        own_times = {name: times[network] for name, network in networks_of(system).items()}
        simulations = [
            Simulation(system.stand_ins, system.policy, conditions, own_times, want, seed) for seed in range(seeds)
        ]
        answers = [run_simulation(simulation) for simulation in simulations]
        rows.append(row_of(found[kind], simulations[0], answers))
    table = pd.DataFrame(rows)
    place = Path(output or folder)
    write_frame(place / "simulation.csv", table)
    with atomic_path(place / "plots" / "simulation.png") as temporary:
        temporary.write_bytes(as_png(tail_figure(table)))
    return table


def networks_of(system: System) -> dict[str, tuple[Path, int]]:
    """Return by server its network: the file, and the expert that it answers for. A replica's are the experts' own."""
    return {name: (path, system.expert_of(name)) for name, path in system.files.items()}


def measured(systems: Sequence[System]) -> dict[tuple[Path, int], ServiceTimes]:
    """Measure each network of these systems once, as serving runs it."""
    servers: dict[tuple[Path, int], tuple[System, str]] = {}
    for system in systems:
        for name, network in networks_of(system).items():
            servers.setdefault(network, (system, name))
    times = {}
    for network, (system, name) in progress_bar("measuring servers", items=list(servers.items())):
        times[network] = measure(system.network(name))
    return times


def table_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what is printed of the rows: latencies in ms, MiB beyond the experts', shares and accuracy in %."""
    table = rows[["want", "redundancy"]].rename(columns={"redundancy": "policy"})
    for name in ("p50", "p99", "p999"):
        milliseconds = (1e3 * rows[name]).map("{:.3g}".format)
        table[name] = milliseconds.replace("inf", "∞")
    table["MiB"] = (rows["extra_memory"] / 2**20).map("{:.3g}".format)
    table["stood in"] = rows["share_stood_in"].map(percent)
    table["failed"] = rows["share_failed"].map(percent)
    table["right"] = rows["effective_accuracy"].map(percent)
    return table


def main(arguments: Sequence[str]) -> None:
    """Simulate, and print the table."""
    options = parse_options("simulate", simulate, arguments, conditions=Conditions)
    rows = simulate(**options)
    table = rich_table(table_of(rows), "simulated; ms, MiB, %", ["want", "policy"])
    results_console().print(table)
    folder = Path(options["output"] or options["folder"])
    print(f"table: {folder / 'simulation.csv'}")
