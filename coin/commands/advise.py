"""``coin advise``: which redundancy to buy for an experiment's experts, given a budget of servers and memory."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from coin.commands.coded_system import Choice
from coin.commands.parser import parse_options
from coin.commands.simulate import LACKING, Point, draw, lacking, read_profile, simulate_rows
from coin.core.choices import check_integer, check_number
from coin.errors import ConfigurationError
from coin.reporting.latency import milliseconds, named, print_simulation
from coin.reporting.results import write_frame
from coin.reporting.tables import results_console
from coin.serving.sim.conditions import Conditions
from coin.serving.sim.profile import Failover, Profile, Redundancy, StandIn
from coin.serving.sim.simulation import QueryTarget

ADVICE_CSV = "advice.csv"
QUANTILES = (0.0, 0.5, 0.9, 0.99)
SEEDS = 8
"""Of 20,000 queries each: some hundred are slower than the p99.9."""
NEAR = 1.1
"""A p99.9 of so many times the lowest is as good: less is not worth a forward pass."""
HOURS = 8766
"""Of a year."""


def advise(
    folder: str,
    conditions: Conditions,
    choice: Choice,
    servers: int,
    memory_gib: float,
    p999_ms: float | None = None,
    accuracy: float | None = None,
    want: QueryTarget = QueryTarget.one,
    load: float = 0.4,
    quantiles: list[float] | None = None,
    tolerance: float = 0.005,
    queries: int = 20_000,
    seeds: int = SEEDS,
    failover: Failover | None = None,
    jobs: int | None = None,
    output: str | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """Return all possible stand-ins with the recommended one marked, and the reasons as text.

    The candidates are all stand-ins in the results, with every number of extra servers, asked at once or after several
    quantiles of lateness. One must fit the budget, answer while any one expert is lost, and be accurate enough; none
    counts as more accurate than the experts. Those are kept that meet the requested p99.9; without a request, or if
    none meets it, those whose p99.9 is at most a tenth above the lowest or not significantly different. Of these the
    fewest forward passes (to a tenth of one) win, then the fewest servers, the least memory, the lowest p99.9.

    Args:
        folder: An experiment's folder, or a seed's.
        conditions: The machines and the front end to simulate.
        choice: Which of the experiment's coded systems; by default the most accurate one.
        servers: The largest number of servers, the experts' own included.
        memory_gib: The memory for weights on one server, in GiB.
        p999_ms: The requested 99.9 % quantile of the latency, in ms.
        accuracy: The required accuracy of answers for a lost expert, as a share of its own, in (0, 1], on the worst
            task. None requires accuracy within `tolerance` of the best.
        want: Whose answers a query wants: ``one`` expert's, drawn at random, or ``all`` experts'.
        load: The share of the experts' capacity that own answers use.
        quantiles: Quantiles of own answers' time after which they are late; by default 0 (at once), 0.5, 0.9 and 0.99.
        tolerance: How far the accuracy of all answers may lie below the best, in [0, 1).
        queries: Queries per seed.
        seeds: How many seeds.
        failover: A small network for all tasks, described by its options.
        jobs: The number of processes; by default one per processor core.
        output: The folder for ``advice.csv`` and the figure; by default `folder`.
    """
    check_integer("seeds", seeds, 1)
    check_number("tolerance", tolerance, low=0, high=1)
    if not 0 < (1 if accuracy is None else accuracy) <= 1:
        raise ConfigurationError(f"found accuracy={accuracy}, expected a share above 0 and of at most 1, such as 0.98")
    system, profile, conditions, known = read_profile(folder, choice, conditions, failover)
    count, room, notes = profile.code.num_experts, memory_gib * 2**30, [system.title]
    check_integer("servers", servers, count)
    if not room >= max(profile.sizes):
        least = max(profile.sizes) / 2**30
        raise ConfigurationError(f"found memory_gib={memory_gib}, expected at least {least:.3g}, an expert's")
    kinds = {what.kind for what in known}
    notes += [
        f"{kind}: left out, for nothing is known of it; {lacking(kind, folder, choice)}"
        for kind in LACKING
        if kind not in kinds
    ]
    options = {"load": load, "want": want, "queries": queries, "memory": room}
    points = candidates(profile, conditions, known, servers, quantiles or QUANTILES, options)
    rows = simulate_rows(points, range(seeds), jobs)
    if servers - count != profile.code.num_coded:
        notes.append(f"coded: with {profile.code.num_coded} coded models only, as many as the experiment has measured")
    rows["fits"] = rows["memory_server"] <= room
    taken = recommended_row(rows, p999_ms, tolerance, accuracy)
    rows["buy"] = rows.index == taken
    notes += _reasons(rows, known, room, p999_ms, tolerance, accuracy)
    notes += _while_repaired(points[taken], conditions, range(seeds), jobs) + when_coding(rows, want)
    rows = rows.sort_values(["fits", "p999"], ascending=[False, True], kind="stable", ignore_index=True)
    place = Path(output or folder)
    write_frame(place / ADVICE_CSV, rows)
    draw(place / "plots" / "advice.png", "memory_server", rows.drop_duplicates(["redundancy", "variant", "extras"]))
    return rows, notes


def candidates(
    profile: Profile,
    conditions: Conditions,
    known: Sequence[StandIn],
    servers: int,
    quantiles: Sequence[float],
    options: dict[str, Any],
) -> list[Point]:
    """Return the stand-ins that need at most this many servers; coded models only in the number that was measured."""
    count, found = profile.code.num_experts, []
    for what in known:
        for extra in [profile.code.num_coded] if not profile.extras(what) else range(1, servers - count + 1):
            sized = profile.resized(count, extra)
            if what.kind.is_coded and sized is not profile:
                continue
            # Asked at once, the hedged code is the proactive one.
            each = [quantile for quantile in quantiles if quantile or what.kind is not Redundancy.coded_hedged]
            if what.kind is Redundancy.uncoded:
                each = each[:1]
            found += [(what, sized, sized.simulation(what, conditions, quantile, **options)) for quantile in each]
    return found


def recommended_row(rows: pd.DataFrame, p999_ms: float | None, tolerance: float, accuracy: float | None = None) -> int:
    """Return the index of the row to take; see `advise`."""
    able = rows[rows["fits"]]
    survives = able[(able["losses"] > 0) & able["effective_accuracy"].notna()]
    able = able if survives.empty else survives
    if accuracy is None:
        right = able["effective_accuracy"].clip(upper=able["expert_accuracy"])
        able = able[right >= right.max() - tolerance]
    else:
        share = able["worst_nda"].fillna(0)
        able = able[share >= min(accuracy, share.max())]
    keeps = able[able["p999"] <= (np.inf if p999_ms is None else p999_ms / 1e3)]
    if p999_ms is None or keeps.empty:
        lowest = able.sort_values(["p999", "p999_high"]).iloc[0]
        keeps = able[(able["p999_low"] <= lowest["p999_high"]) | (able["p999"] <= NEAR * lowest["p999"])]
    order = keeps.assign(forwards=keeps["forwards"].round(1)).sort_values(["forwards", "extras", "memory", "p999"])
    return int(order.index[0])


def _reasons(
    rows: pd.DataFrame,
    known: Sequence[StandIn],
    room: float,
    p999_ms: float | None,
    tolerance: float,
    accuracy: float | None,
) -> list[str]:
    """Return the reasons for the choice, and last the choice."""
    notes, row = [], rows[rows["buy"]].iloc[0]
    if not row["losses"]:
        notes.append("nothing that fits answers while an expert is lost; give more --servers or --memory_gib")
    for left in rows[~rows["fits"]].drop_duplicates(["redundancy", "variant"]).to_dict("records"):
        name, needs = named({**left, "extras": 0}), left["memory_server"] / 2**30
        notes.append(
            f"{name}: does not fit, for its server holds {needs:.3g} GiB of weights and there are {room / 2**30:g}"
        )
    for what in known:
        if what.each and what.kind is not Redundancy.neighbours:
            most = int((room - what.fixed) // what.each)
            name = f"{what.kind} {what.variant}".strip()
            notes.append(f"{name}: would fit up to {most} experts of this size, a coded model any number")
    tail = "have a p99.9 within a tenth of the lowest, or not measurably above it"
    if p999_ms is not None and row["p999"] <= p999_ms / 1e3:
        tail = f"keep a p99.9 of {p999_ms:g} ms"
    elif p999_ms is not None:
        notes.append(f"nothing that fits keeps a p99.9 of {p999_ms:g} ms; this is the nearest")
    right = f"are right to within {100 * tolerance:g} points of the best (--tolerance)"
    if accuracy is not None:
        share = f"{100 * accuracy:g} % of any expert's accuracy (--accuracy)"
        right = f"keep {share}"
        if not row["worst_nda"] >= accuracy:
            notes.append(f"nothing that fits keeps {share}; the nearest keeps {100 * row['worst_nda']:.2f} %")
            right = "come nearest to it"
    extras = int(row["extras"])
    buy = named({**row.to_dict(), "extras": 0})
    buy = buy if not extras else f"{extras} server{'s' if extras > 1 else ''} of {buy}"
    late = f", asked after the {row['quantile']:g} quantile" if row["quantile"] else ", asked at once"
    late = "" if row["redundancy"] == Redundancy.uncoded else late
    fits = "fit, answer while an expert is lost" if row["losses"] else "fit"
    return [
        *notes,
        f"among those that {fits}, {right} and {tail}, this one takes the fewest forward passes, then the fewest "
        "servers, then the least memory",
        f"buy {buy}{late}: p99.9 {milliseconds(row['p999'])} ms [{milliseconds(row['p999_low'])}, "
        f"{milliseconds(row['p999_high'])}], {100 * row['effective_accuracy']:.2f} % right, "
        f"{row['forwards']:.2f} forward passes a query, {row['memory_server'] / 2**20:.0f} MiB on the largest server, "
        f"{row['memory'] / 2**20:.0f} in all",
    ]


def _while_repaired(point: Point, conditions: Conditions, seeds: Sequence[int], jobs: int | None) -> list[str]:
    """Return the outcome of queries while the first expert's machine is repaired, and how often no server is left."""
    what, profile, simulation = point
    broken = replace(simulation, broken=frozenset({0}))
    row, repair = simulate_rows([(what, profile, broken)], seeds, jobs).iloc[0], conditions.failures
    hours = HOURS * simulation.unanswered(repair.broken)
    return [
        f"while an expert's machine is repaired ({repair.mttr:g} h every {repair.mtbf:g}; --failures.mttr, .mtbf): "
        f"p99.9 {milliseconds(row['p999'])} ms, {100 * row['share_failed']:.2f} % without an answer, "
        f"{100 * row['effective_accuracy']:.2f} % right; in a year a query finds nobody for {hours:.2g} h"
    ]


def when_coding(rows: pd.DataFrame, want: QueryTarget) -> list[str]:
    """Return when a coded model is the best choice, as far as these rows show it."""
    coded = rows[rows["redundancy"].isin([Redundancy.standin, Redundancy.coded_proactive])]
    notes = []
    if want is QueryTarget.all and not coded.empty:
        count, extras = coded[["experts", "extras"]].iloc[0]
        notes.append(
            f"asked at once for all answers, a coded model takes {count + extras} forward passes a query and a replica "
            f"{2 * count}: one pass makes up for any expert"
        )
    elif want is QueryTarget.one:
        notes.append(
            "a coded model is what to take where all answers are wanted at once (--want=all): one pass for any"
        )
    notes.append("only a coded model can also expose an expert that answers wrongly")
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
