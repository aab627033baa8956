"""``coin simulate``: latency and accuracy of the answers by every policy, on a virtual clock."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from coin.commands.parser import parse_options
from coin.core.progress import tracked
from coin.errors import ConfigurationError
from coin.files.atomic import atomic_path
from coin.reporting.results import write_frame
from coin.reporting.style import WIDTH, as_png, colour, legend_below, log_scale, marker, style
from coin.reporting.tables import percent, results_console, rich_table
from coin.serving.policies import POLICIES, Policy, PolicyKind, Which
from coin.serving.servers import read_coded
from coin.serving.simulate import Conditions, QueryTarget, row_of, run_simulation, simulation_of

SIMULATION_CSV = "simulation.csv"


def simulate(
    folder: str,
    conditions: Conditions,
    method: str | None = None,
    decoder: str | None = None,
    policies: list[PolicyKind] | None = None,
    wants: list[QueryTarget] | None = None,
    loads: list[float] | None = None,
    quantile: float = 0.9,
    queries: int = 20_000,
    seeds: list[int] | None = None,
    output: str | None = None,
) -> pd.DataFrame:
    """Simulate the latency and accuracy of answers, for every policy.

    Args:
        folder: An experiment's folder, or a seed's.
        conditions: The machines and the front end to simulate.
        method: The merge method of the coded models; by default that of the most accurate answers.
        decoder: Their decoder; by default the most accurate one that reads survivors, and one that reads none.
        policies: The policies; by default all whose accuracy is in the results.
        wants: Whose answers a query wants: ``one`` expert's, drawn at random, or ``all`` experts'; by default both.
        loads: The loads, as shares of what the experts' servers can do; by default 0.4.
        quantile: The quantile of own answers' time after which they count as late.
        queries: Queries per seed.
        seeds: The seeds of everything random; by default 0, 1 and 2.
        output: The folder for ``simulation.csv`` and the figure; by default `folder`.
    """
    known, found = {}, {}
    for kind in policies or PolicyKind:
        survivors = {Which.coded: False, Which.everyone: True}.get(POLICIES[kind].which)
        try:
            if survivors not in known:
                known[survivors] = read_coded(Path(folder), method, decoder, survivors)
            found[kind] = known[survivors]
        except ConfigurationError:
            if policies or survivors is None:
                raise
    points = [
        (
            coded,
            [
                simulation_of(coded, Policy(kind, quantile), conditions, load, want, queries, seed)
                for seed in seeds or range(3)
            ],
        )
        for want in wants or QueryTarget
        for load in loads or [0.4]
        for kind, coded in found.items()
    ]
    rows = pd.DataFrame(
        [row_of(coded, its, list(map(run_simulation, its))) for coded, its in tracked(points, "simulating")]
    )
    place = Path(output or folder)
    write_frame(place / SIMULATION_CSV, rows)
    with atomic_path(place / "plots" / "simulation.png") as temporary:
        temporary.write_bytes(as_png(tail_figure(rows)))
    return rows


def table_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what is printed of the rows: latencies in ms, memory in MiB, shares and accuracy in %."""
    table = rows[["want", "load", "redundancy"]].astype(str)
    for name in ("p50", "p99", "p999"):
        table[name] = rows[name].map(milliseconds)
    table["95 %"] = [
        f"{milliseconds(low)}–{milliseconds(high)}" for low, high in zip(rows.p999_low, rows.p999_high, strict=True)
    ]
    table["MiB"] = (rows["memory"] / 2**20).map("{:.0f}".format)
    for name, column in (("stood in", "share_stood_in"), ("failed", "share_failed"), ("right", "effective_accuracy")):
        table[name] = rows[column].map(percent)
    return table.assign(forwards=rows["forwards"].map("{:.2f}".format))


def milliseconds(seconds: float) -> str:
    """Return a latency in ms."""
    return "∞" if math.isinf(seconds) else f"{1e3 * seconds:.0f}" if seconds >= 0.02 else f"{1e3 * seconds:.1f}"


def tail_figure(rows: pd.DataFrame) -> Figure:
    """The 99.9 % quantile of the latency against the memory of all servers, a panel a kind of query.

    Points are joined over numbers of experts; those whose quantile is infinite are left out.
    """
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
                axes.errorbar(
                    line["memory"] / 2**20, 1e3 * line["p999"], ends, label=kind,
                    color=colour(index), marker=marker(index), markersize=5, capsize=2, linewidth=1.3,
                )  # fmt: skip
            axes.set_title(f"{want} expert's answer a query" if want == "one" else "all experts' answers a query")
            axes.set_ylabel("p99.9 (ms, log scale)")
            log_scale(axes, "y", (1.0, 2.0, 5.0))
        log_scale(panels[-1], "x", (1.0, 2.0, 5.0))
        panels[-1].set_xlabel("weights on all servers (MiB, log scale)")
        legend_below(figure, panels[0], columns=3)
        return figure


def main(arguments: Sequence[str]) -> None:
    """Simulate, and print the table."""
    options = parse_options("simulate", simulate, arguments, conditions=Conditions)
    rows = simulate(**options)
    results_console().print(rich_table(table_of(rows), "simulated; ms, MiB, %", ["want", "load", "redundancy"]))
    print(f"table: {Path(options['output'] or options['folder']) / SIMULATION_CSV}")
