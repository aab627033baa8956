"""``coin advise``: which redundancy to buy for an experiment's experts, from a budget of servers and memory."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from coin.choices import check_integer
from coin.commands.coded_system import Choice, parse_options
from coin.commands.simulate import SEEDS, draw, read_profile, rounded_accuracies, simulate_rows
from coin.errors import CoinError, ConfigurationError
from coin.reporting.results import write_frame
from coin.reporting.tables import results_console
from coin.serving.sim.conditions import Conditions
from coin.serving.sim.profile import Failover, Precision, Profile, Redundancy
from coin.serving.sim.results import milliseconds, print_simulation, tail_against_memory
from coin.serving.sim.simulation import Want

ADVICE_CSV = "advice.csv"


def advise(
    folder: str,
    conditions: Conditions,
    choice: Choice,
    servers: int,
    memory_gib: float,
    p999_ms: float | None = None,
    want: Want = Want.one,
    load: float = 0.4,
    queries: int = 20_000,
    seeds: int = SEEDS,
    failover: Failover | None = None,
    jobs: int | None = None,
    output: str | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """Return every redundancy that may be bought, the one to buy marked, and what is to be said of them.

    Among those that the budget allows and whose accuracy is known it takes those that keep the wanted p99.9, or, where
    none is wanted or none keeps it, those whose p99.9 cannot be told from the lowest. Of these the most accurate, to a
    tenth of a percent; then the one with the least memory in all, the fewest servers, the fewest forward passes.

    Args:
        folder: An experiment's folder, or a seed's.
        conditions: What machines and the front end are like.
        choice: Which of the experiment's coded systems.
        servers: How many servers there may be, the experts' own included.
        memory_gib: What one server holds of weights.
        p999_ms: The wanted 99.9 % quantile of the latency.
        want: Whose answers a query wants: ``one`` expert's, drawn at random, or ``all`` experts'.
        load: The share of the experts' capacity that own answers take up.
        queries: Queries per seed.
        seeds: How many seeds.
        failover: A small network for all tasks: what it is like is yours to say.
        jobs: Processes; one a processor core by default.
        output: Where ``advice.csv`` and the figure go; none takes `folder`.
    """
    check_integer("seeds", seeds, 1)
    system, profile, conditions = read_profile(folder, choice, conditions, failover)
    count, notes = profile.code.num_experts, []
    check_integer("servers", servers, count)
    largest = max(profile.expert_bytes[Precision.full]) / 2**30
    if not memory_gib >= largest:
        raise ConfigurationError(f"found memory_gib={memory_gib}, expected at least {largest:.3g}, an expert's")
    kinds = [kind for kind in Redundancy if kind is not Redundancy.failover or failover is not None]
    if failover is None:
        notes.append(
            "failover: left out, for nothing is known of such a network; give --failover.accuracy, .mib, .seconds"
        )
    try:
        rounded = rounded_accuracies(system, (Precision.half, Precision.int8))
        profile = replace(profile, rounded_accuracy=rounded)
    except CoinError as error:
        notes.append(f"spare_half, spare_int8: left out, for their accuracy could not be measured ({error})")
        kinds = [kind for kind in kinds if kind.precision in (None, Precision.full)]
    candidates = [(Redundancy.uncoded, profile)]
    for extra in range(1, servers - count + 1):
        sized = profile.resized(count, extra)
        known = [
            kind for kind in kinds if kind is not Redundancy.uncoded and (sized.decoded_accuracy or not kind.is_coded)
        ]
        candidates += [(kind, sized) for kind in known]
    points = [
        (kind, sized, sized.simulation(kind, conditions, load=load, want=want, queries=queries))
        for kind, sized in candidates
    ]
    rows = simulate_rows(points, range(seeds), jobs)
    if servers - count != profile.code.num_coded:
        notes.append(f"coded: with {profile.code.num_coded} coded models only, as many as the experiment has measured")
    rows["fits"] = rows["memory_server"] <= memory_gib * 2**30
    rows["buy"] = rows.index == choose(rows, p999_ms)
    notes += _reasons(rows, profile, memory_gib, p999_ms)
    place = Path(output or folder)
    write_frame(place / ADVICE_CSV, rows)
    draw(place / "plots" / "advice.png", tail_against_memory(rows))
    return rows, notes


def choose(rows: pd.DataFrame, p999_ms: float | None) -> int:
    """Return the index of the row to buy; see `advise`."""
    able = rows[rows["fits"] & rows["effective_accuracy"].notna()]
    keeps = able[able["p999"] <= (np.inf if p999_ms is None else p999_ms / 1e3)]
    if p999_ms is None or keeps.empty:
        keeps = able[able["p999_low"] <= able.sort_values(["p999", "p999_high"])["p999_high"].iloc[0]]
    order = keeps.assign(
        wrong=(1 - keeps["effective_accuracy"]).round(3), servers=keeps["experts"] + keeps["extras"]
    ).sort_values(["wrong", "memory", "servers", "forwards"], kind="stable")
    return int(order.index[0])


def _reasons(rows: pd.DataFrame, profile: Profile, memory_gib: float, p999_ms: float | None) -> list[str]:
    """Return what the choice rests on, the choice last."""
    notes = []
    for kind, group in rows[~rows["fits"]].groupby("redundancy", sort=False):
        needs = group["memory_server"].iloc[0] / 2**30
        notes.append(
            f"{kind}: does not fit, for its server holds {needs:.3g} GiB of weights and there are {memory_gib:g}"
        )
    for kind in (Redundancy.spare, Redundancy.spare_half, Redundancy.spare_int8):
        mean = float(np.mean(profile.expert_bytes[kind.precision or Precision.full]))
        most = int(memory_gib * 2**30 // mean)
        notes.append(f"{kind}: would fit up to {most} experts of this size, a coded model any number")
    row = rows[rows["buy"]].iloc[0]
    if p999_ms is not None and not row["p999"] <= p999_ms / 1e3:
        notes.append(f"nothing that fits keeps a p99.9 of {p999_ms:g} ms; this is the nearest")
    extras = int(row["extras"])
    what = "no redundancy" if not extras else f"{extras} server{'s' if extras > 1 else ''} of {row['redundancy']}"
    notes.append(
        f"buy {what}: p99.9 {milliseconds(row['p999'])} ms [{milliseconds(row['p999_low'])}, "
        f"{milliseconds(row['p999_high'])}], {100 * row['effective_accuracy']:.2f} % right, "
        f"{row['memory_server'] / 2**20:.0f} MiB on the largest server, {row['memory'] / 2**20:.0f} in all"
    )
    return notes


def main(arguments: Sequence[str]) -> None:
    """Advise, and print it."""
    options = parse_options("advise", advise, arguments, conditions=Conditions, choice=Choice)
    rows, notes = advise(**options)
    console = results_console()
    print_simulation(rows, console)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    print(f"table: {Path(options['output'] or options['folder']) / ADVICE_CSV}")
