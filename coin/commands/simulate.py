"""``coin simulate``: how late answers are, and how right, by what extra servers hold."""

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from coin.commands.fleet import Chosen, read_fleet
from coin.commands.parser import command_parser, parsed
from coin.errors import ConfigurationError
from coin.files.atomic import atomic_path, write_text
from coin.options import described
from coin.reporting.figures import as_png
from coin.reporting.tables import results_console
from coin.serving.sim.case import Case, Want
from coin.serving.sim.fleet import Failover, Fleet
from coin.serving.sim.plots import tail_against_load, tail_against_memory
from coin.serving.sim.redundancy import Precision, Redundancy
from coin.serving.sim.scenario import Conditions, require
from coin.serving.sim.simulation import simulate_all
from coin.serving.sim.table import SIMULATION_CSV, as_row, print_simulation, write_simulation
from coin.versions import versions

SEEDS = 20


def simulate(
    folder: str,
    conditions: Conditions = Conditions(),  # noqa: B008 (frozen)
    chosen: Chosen = Chosen(),  # noqa: B008 (frozen)
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
        chosen: Which of the experiment's coded systems.
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

    Returns:
        The rows of ``simulation.csv``.

    Raises:
        ConfigurationError: An option is out of its range, or the experiment has no such results.
        FileError: A file is missing or damaged, or cannot be written.
    """
    wants, quantiles = [Want(want) for want in wants or Want], quantiles or [0.9]
    loads = [0.2, 0.4, 0.6] if loads is None else loads
    seeds = list(range(SEEDS)) if seeds is None else seeds
    require(bool(loads), "no loads", "one at least; leave the option out for all of them")
    require(bool(seeds) and len(set(seeds)) == len(seeds) and min(seeds) >= 0, f"seeds {seeds}", "distinct ones from 0")
    kinds = [Redundancy(kind) for kind in policies or _known(failover)]
    rounded = [kind.precision for kind in kinds if kind.precision not in (None, Precision.full)]
    served, fleet, conditions = read_fleet(Path(folder), chosen, conditions, rounded, failover)
    if Redundancy.failover in kinds and failover is None:
        raise ConfigurationError(
            "found policy failover, expected what its network is like; give --failover.accuracy, …"
        )
    grid = [
        (kind, sized, conditions, quantile, {"load": load, "want": want, "queries": queries})
        for want in wants
        for count in experts or [fleet.code.num_experts]
        for load in loads
        for extra in extras or [fleet.code.num_coded]
        for sized in [fleet.resized(count, extra)]
        for kind in kinds
        for quantile in (quantiles[:1] if kind is Redundancy.uncoded else quantiles)
    ]
    rows = simulate_rows(grid, seeds, jobs)
    place = Path(folder if output is None else output)
    write_simulation(place / SIMULATION_CSV, rows)
    options = {
        "method": served.method, "batchnorm": served.batchnorm, "decoder": served.decoder.name, "seeds": seeds,
        "conditions": conditions, "failover": failover, "code": fleet.code.matrix.tolist(),
        "service_seconds": [float(each.mean()) for each in (*fleet.expert_seconds, *fleet.coded_seconds)],
    }  # fmt: skip
    text = json.dumps({"options": described(options), "versions": versions()}, indent=1) + "\n"
    write_text(place / "simulation.json", text)
    middle = loads[len(loads) // 2]
    draw(place / "plots" / "simulation-memory.png", tail_against_memory(rows[rows["load"] == middle]))
    for count in dict.fromkeys(rows["experts"]):
        name = f"simulation-load-{count}.png"
        draw(place / "plots" / name, tail_against_load(rows[rows["experts"] == count]))
    return rows


def _known(failover: Failover | None) -> list[Redundancy]:
    """Return the policies that need no measured accuracy beyond the results."""
    unknown = (Redundancy.spare_half, Redundancy.spare_int8, *((Redundancy.failover,) if failover is None else ()))
    return [kind for kind in Redundancy if kind not in unknown]


def simulate_rows(
    grid: Sequence[tuple[Redundancy, Fleet, Conditions, float, dict[str, Any]]], seeds: Sequence[int], jobs: int | None
) -> pd.DataFrame:
    """Return a row for each redundancy of a fleet with its quantile and the case's options; what is alike runs once."""
    cases: dict[tuple[Any, ...], list[Case]] = {}
    keys = []
    for kind, fleet, conditions, quantile, options in grid:
        # Weights that are kept otherwise take as long.
        timed = Redundancy.spare if kind.precision is not None else kind
        key = (timed, id(fleet.code), fleet.code.num_experts, fleet.code.num_coded, quantile, *options.values())
        keys.append(key)
        if key not in cases:
            cases[key] = [fleet.case(kind, conditions, quantile, seed=seed, **options) for seed in seeds]
    outcomes = simulate_all([case for group in cases.values() for case in group], jobs)
    found = {key: outcomes[place * len(seeds) : (place + 1) * len(seeds)] for place, key in enumerate(cases)}
    return pd.DataFrame(
        [as_row(kind, fleet, cases[key][0], found[key]) for (kind, fleet, *_), key in zip(grid, keys, strict=True)]
    )


def draw(path: Path, figure: Figure) -> None:
    """Write a figure as PNG."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(as_png(figure))


def parse_fleet(name: str, function: Callable[..., Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a function that takes a fleet's folder, its `Conditions` and what is `Chosen` of it."""
    parser = command_parser(name)
    parser.add_argument("folder", type=str, help="An experiment's or a seed's folder.")
    parser.add_class_arguments(Conditions)
    parser.add_class_arguments(Chosen)
    parser.add_function_arguments(function, skip={"folder", "conditions", "chosen"})
    options = parsed(parser, arguments)
    for section, kind in (("conditions", Conditions), ("chosen", Chosen)):
        options[section] = kind(**{each.name: options.pop(each.name) for each in fields(kind)})
    return options


def main(arguments: Sequence[str]) -> None:
    """Simulate, and print the table."""
    options = parse_fleet("simulate", simulate, arguments)
    print_simulation(simulate(**options), results_console())
    print(f"table: {Path(options['output'] or options['folder']) / SIMULATION_CSV}")
