"""``coin simulate``: how late answers are, and how right, by what extra servers hold."""

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from coin.commands.coded_system import Choice, CodedSystem, parse_options, read_coded_system
from coin.errors import ConfigurationError
from coin.files.atomic import atomic_path, write_text
from coin.options import described
from coin.processes import say
from coin.reporting.figures import as_png
from coin.reporting.results import write_frame
from coin.reporting.tables import results_console
from coin.serving.model import NetworkServer
from coin.serving.replies import ReplyFormat
from coin.serving.sim.conditions import Conditions, ServiceKind
from coin.serving.sim.profile import (
    Failover,
    Precision,
    Profile,
    Redundancy,
    kept_bytes,
    measure_accuracy,
    measure_decoding,
    measure_service,
)
from coin.serving.sim.results import as_row, print_simulation, tail_against_load, tail_against_memory
from coin.serving.sim.simulation import Simulation, Want, simulate_all
from coin.versions import versions

SIMULATION_CSV = "simulation.csv"
SEEDS = 20


def simulate(
    folder: str,
    conditions: Conditions,
    choice: Choice,
    wants: list[Want] | None = None,
    policies: list[Redundancy] | None = None,
    quantiles: list[float] | None = None,
    loads: list[float] | None = None,
    experts: list[int] | None = None,
    extras: list[int] | None = None,
    queries: int = 20_000,
    seeds: list[int] | None = None,
    failover: Failover | None = None,
    jobs: int | None = None,
    output: str | None = None,
) -> pd.DataFrame:
    """Simulate how late answers are, and how right, by what R servers beside the N experts' hold.

    Args:
        folder: An experiment's folder, or a seed's.
        conditions: What machines and the front end are like.
        choice: Which of the experiment's coded systems.
        wants: Whose answers a query wants: ``one`` expert's, drawn at random, or ``all`` experts'; none takes both.
        policies: What the extra servers hold; none takes all for which nothing but the results is needed. For
            ``spare_half`` and ``spare_int8`` the experts' accuracy is measured with rounded weights.
        quantiles: Of the time that own answers take, after which they are late; none takes 0.9.
        loads: The loads; none takes 0.2, 0.4 and 0.6.
        experts: Numbers of experts; none takes the experiment's. With others, experts are repeated, and the accuracy of
            decoded answers is not known.
        extras: Numbers of extra servers; none takes the number of the experiment's coded models.
        queries: Queries per seed, policy and load.
        seeds: Of arrivals, service times and phases; none takes 20.
        failover: A small network for all tasks, for the policy of that name.
        jobs: Processes; one a processor core by default.
        output: Where ``simulation.csv``, ``simulation.json`` and the figures go; none takes `folder`.
    """
    quantiles = quantiles or [0.9]
    loads = [0.2, 0.4, 0.6] if loads is None else loads
    seeds = list(range(SEEDS)) if seeds is None else seeds
    if not loads:
        raise ConfigurationError("found no loads, expected one at least; leave the option out for all of them")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigurationError(f"found seeds {seeds}, expected distinct ones from 0")
    unknown = (Redundancy.spare_half, Redundancy.spare_int8, *((Redundancy.failover,) if failover is None else ()))
    kinds = policies or [kind for kind in Redundancy if kind not in unknown]
    system, profile, conditions = read_profile(folder, choice, conditions, failover)
    say(system.title)
    if rounded := [kind.precision for kind in kinds if kind.precision not in (None, Precision.full)]:
        profile = replace(profile, rounded_accuracy=rounded_accuracies(system, rounded))
    points = [
        (kind, sized, sized.simulation(kind, conditions, quantile, load=load, want=want, queries=queries))
        for want in wants or Want
        for count in experts or [profile.code.num_experts]
        for load in loads
        for extra in extras or [profile.code.num_coded]
        for sized in [profile.resized(count, extra)]
        for kind in kinds
        for quantile in (quantiles[:1] if kind is Redundancy.uncoded else quantiles)
    ]
    rows = simulate_rows(points, seeds, jobs)
    place = Path(output or folder)
    write_frame(place / SIMULATION_CSV, rows)
    options = {
        "method": system.method, "batchnorm": system.batchnorm, "decoder": system.decoder.name, "seeds": seeds,
        "conditions": conditions, "failover": failover, "code": profile.code.matrix.tolist(),
        "service_seconds": [float(each.mean()) for each in (*profile.expert_seconds, *profile.coded_seconds)],
    }  # fmt: skip
    text = json.dumps({"options": described(options), "versions": versions()}, indent=1) + "\n"
    write_text(place / "simulation.json", text)
    middle = loads[len(loads) // 2]
    draw(place / "plots" / "simulation-memory.png", tail_against_memory(rows[rows["load"] == middle]))
    for count in dict.fromkeys(rows["experts"]):
        name = f"simulation-load-{count}.png"
        draw(place / "plots" / name, tail_against_load(rows[rows["experts"] == count]))
    return rows


def read_profile(
    folder: str, choice: Choice, conditions: Conditions, failover: Failover | None
) -> tuple[CodedSystem, Profile, Conditions]:
    """Return an experiment's coded system, what is known of it, and the conditions with what was measured for them."""
    system = read_coded_system(Path(folder), choice)
    paths = [*system.experts.paths.values(), *system.coded]
    service, count = conditions.service, system.code.num_experts
    if service.kind is ServiceKind.measured:
        servers = [NetworkServer(path, system.experts.width, system.decoder) for path in paths]
        times, marginals = zip(*map(measure_service, servers), strict=True)
        widths = servers[0].feature_widths()
        expects = ReplyFormat(system.experts.width, None if widths is None else sum(widths))
        decoding = measure_decoding(system.code, system.decoder, expects, widths)
        if service.marginal is None:
            conditions = replace(conditions, service=replace(service, marginal=float(np.mean(marginals))))
    else:
        times, decoding = (np.array([service.seconds]),) * len(paths), 0.0
    profile = Profile(
        code=system.code,
        expert_seconds=times[:count],
        coded_seconds=times[count:],
        expert_bytes={kept: tuple(kept_bytes(path, kept) for path in paths[:count]) for kept in Precision},
        coded_bytes=tuple(kept_bytes(path) for path in system.coded),
        expert_accuracy=float(system.results["expert_accuracy"].mean()),
        decoded_accuracy=system.decoded_accuracy,
        decoding=decoding,
        failover=failover,
    )
    return system, profile, conditions


def rounded_accuracies(system: CodedSystem, precisions: Collection[Precision | None]) -> dict[Precision, float]:
    """Return the experts' mean accuracy on their own test sets by the precision that their weights are kept in."""
    tests, paths = system.data().test_dataloader(), system.experts.paths.values()
    return {
        precision: float(np.mean([measure_accuracy(*each, precision) for each in zip(paths, tests, strict=True)]))
        for precision in filter(None, precisions)
    }


def simulate_rows(
    points: Sequence[tuple[Redundancy, Profile, Simulation]], seeds: Sequence[int], jobs: int | None
) -> pd.DataFrame:
    """Return a row for each redundancy of a profile and its simulation, over the seeds; what is alike runs once."""

    def key(kind: Redundancy, profile: Profile, simulation: Simulation) -> tuple[object, ...]:
        # Weights that are kept otherwise take as long.
        timed = Redundancy.spare if kind.precision is not None else kind
        return timed, id(profile), simulation.policy.quantile, simulation.load, simulation.want

    distinct = {key(*point): point[2] for point in points}
    outcomes = simulate_all([replace(each, seed=seed) for each in distinct.values() for seed in seeds], jobs)
    found = {name: outcomes[place * len(seeds) : (place + 1) * len(seeds)] for place, name in enumerate(distinct)}
    return pd.DataFrame([as_row(*point, found[key(*point)]) for point in points])


def draw(path: Path, figure: Figure) -> None:
    """Write a figure as PNG."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(as_png(figure))


def main(arguments: Sequence[str]) -> None:
    """Simulate, and print the table."""
    options = parse_options("simulate", simulate, arguments, conditions=Conditions, choice=Choice)
    print_simulation(simulate(**options), results_console())
    print(f"table: {Path(options['output'] or options['folder']) / SIMULATION_CSV}")
