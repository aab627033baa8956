"""``coin advise``: which redundancy to buy for an experiment's experts, from a budget of servers and memory."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from coin.choices import check_integer, check_number
from coin.commands.coded_system import Choice, parse_options
from coin.commands.simulate import SEEDS, draw, read_profile, rounded_accuracies, simulate_rows
from coin.errors import CoinError, ConfigurationError
from coin.reporting.results import write_frame
from coin.reporting.tables import results_console
from coin.serving.sim.conditions import Conditions
from coin.serving.sim.profile import Failover, Precision, Profile, Redundancy
from coin.serving.sim.results import milliseconds, print_simulation, tail_against_memory, when_asked
from coin.serving.sim.simulation import Simulation, Want

ADVICE_CSV = "advice.csv"
QUANTILES = (0.0, 0.5, 0.9, 0.99)


def advise(
    folder: str,
    conditions: Conditions,
    choice: Choice,
    servers: int,
    memory_gib: float,
    p999_ms: float | None = None,
    want: Want = Want.one,
    load: float = 0.4,
    quantiles: list[float] | None = None,
    tolerance: float = 0.005,
    queries: int = 20_000,
    seeds: int = SEEDS,
    failover: Failover | None = None,
    jobs: int | None = None,
    output: str | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """Return every redundancy that may be bought, the one to buy marked, and what is to be said of them.

    The candidates are every redundancy with every number of extra servers, asked at once and from several quantiles of
    lateness on. Of those that the budget allows and that are right as often as the best of them, to within the
    tolerance, it takes those that keep the wanted p99.9, or, where none is wanted or none keeps it, those whose p99.9
    cannot be told from the lowest. Of these the one with the fewest forward passes, to a tenth of one; then the least
    memory in all, the fewest servers, the lowest p99.9.

    Args:
        folder: An experiment's folder, or a seed's.
        conditions: What machines and the front end are like.
        choice: Which of the experiment's coded systems; none takes the most accurate that was measured.
        servers: How many servers there may be, the experts' own included.
        memory_gib: What one server holds of weights.
        p999_ms: The wanted 99.9 % quantile of the latency.
        want: Whose answers a query wants: ``one`` expert's, drawn at random, or ``all`` experts'.
        load: The share of the experts' capacity that own answers take up.
        quantiles: Of the time that own answers take, after which they are late; none takes 0, which asks at once, 0.5,
            0.9 and 0.99.
        tolerance: How much less often than the best its answers may be right, from 0 to below 1.
        queries: Queries per seed.
        seeds: How many seeds.
        failover: A small network for all tasks: what it is like is yours to say.
        jobs: Processes; one a processor core by default.
        output: Where ``advice.csv`` and the figure go; none takes `folder`.
    """
    check_integer("seeds", seeds, 1)
    check_number("tolerance", tolerance, low=0, high=1)
    system, profile, conditions = read_profile(folder, choice, conditions, failover)
    count, notes = profile.code.num_experts, [system.title]
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
    options = {"load": load, "want": want, "queries": queries}
    points = candidates(profile, conditions, kinds, servers, quantiles or QUANTILES, options)
    rows = simulate_rows(points, range(seeds), jobs)
    if servers - count != profile.code.num_coded:
        notes.append(f"coded: with {profile.code.num_coded} coded models only, as many as the experiment has measured")
    rows["fits"] = rows["memory_server"] <= memory_gib * 2**30
    rows = rows.sort_values(["fits", "p999"], ascending=[False, True], kind="stable", ignore_index=True)
    rows["buy"] = rows.index == choose(rows, p999_ms, tolerance)
    notes += _reasons(rows, profile, memory_gib, p999_ms, tolerance)
    place = Path(output or folder)
    write_frame(place / ADVICE_CSV, rows)
    draw(place / "plots" / "advice.png", tail_against_memory(rows.drop_duplicates(["redundancy", "extras"])))
    return rows, notes


def candidates(
    profile: Profile,
    conditions: Conditions,
    kinds: Sequence[Redundancy],
    servers: int,
    quantiles: Sequence[float],
    options: dict[str, Any],
) -> list[tuple[Redundancy, Profile, Simulation]]:
    """Return what may be bought for at most so many servers; coded models only as many as were measured."""
    count = profile.code.num_experts
    found = [(Redundancy.uncoded, profile, profile.simulation(Redundancy.uncoded, conditions, **options))]
    for extra in range(1, servers - count + 1):
        sized = profile.resized(count, extra)
        for kind in kinds:
            if kind is Redundancy.uncoded or (kind.is_coded and not sized.decoded_accuracy):
                continue
            # Asked at once, the hedged code is the proactive one.
            each = [quantile for quantile in quantiles if quantile or kind is not Redundancy.coded_hedged]
            found += [(kind, sized, sized.simulation(kind, conditions, quantile, **options)) for quantile in each]
    return found


def choose(rows: pd.DataFrame, p999_ms: float | None, tolerance: float) -> int:
    """Return the index of the row to buy; see `advise`."""
    able = rows[rows["fits"]]
    able = able[able["effective_accuracy"] >= able["effective_accuracy"].max() - tolerance]
    keeps = able[able["p999"] <= (np.inf if p999_ms is None else p999_ms / 1e3)]
    if p999_ms is None or keeps.empty:
        keeps = able[able["p999_low"] <= able.sort_values(["p999", "p999_high"])["p999_high"].iloc[0]]
    order = keeps.assign(forwards=keeps["forwards"].round(1)).sort_values(["forwards", "memory", "extras", "p999"])
    return int(order.index[0])


def _reasons(
    rows: pd.DataFrame, profile: Profile, memory_gib: float, p999_ms: float | None, tolerance: float
) -> list[str]:
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
    tail = "whose p99.9 cannot be told from the lowest"
    if p999_ms is not None and row["p999"] <= p999_ms / 1e3:
        tail = f"keeps a p99.9 of {p999_ms:g} ms"
    elif p999_ms is not None:
        notes.append(f"nothing that fits keeps a p99.9 of {p999_ms:g} ms; this is the nearest")
    extras = int(row["extras"])
    what = "no redundancy" if not extras else f"{extras} server{'s' if extras > 1 else ''} of {row['redundancy']}"
    notes.append(
        f"of what fits, is right to within {100 * tolerance:g} points of the best (--tolerance) and {tail}, it is what "
        "takes the fewest forward passes, and then the least memory"
    )
    late = "" if not extras else f", {when_asked(row['quantile'])}"
    notes.append(
        f"buy {what}{late}: p99.9 {milliseconds(row['p999'])} ms [{milliseconds(row['p999_low'])}, "
        f"{milliseconds(row['p999_high'])}], {100 * row['effective_accuracy']:.2f} % right, "
        f"{row['forwards']:.2f} forward passes a query, {row['memory_server'] / 2**20:.0f} MiB on the largest server, "
        f"{row['memory'] / 2**20:.0f} in all"
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
