"""``coin simulate``: the serving policies over an experiment's networks and results."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coin.coding import Code
from coin.commands.parser import command_parser, parsed
from coin.commands.served import Accuracies, Served, read_accuracies, read_served, results_folders
from coin.errors import ConfigurationError
from coin.files.atomic import atomic_path, write_text
from coin.options import described
from coin.reporting import print_simulation
from coin.reporting.figures import as_png
from coin.reporting.results import read_results
from coin.reporting.simulation import LEVELS, SIMULATION_CSV, SIMULATION_JSON, SimulationRow, write_simulation
from coin.reporting.simulation_plots import accuracy_against_latency, latency_against_load
from coin.reporting.tables import results_console
from coin.serving.case import Case, Outcome, Want
from coin.serving.decodings import coded_layout
from coin.serving.grid import simulate_all
from coin.serving.layout import spread_copies
from coin.serving.measure import measure_decoding, measure_service
from coin.serving.model import NetworkServer
from coin.serving.policies import Policy, PolicyKind, make_policy
from coin.serving.replies import ReplyFormat
from coin.serving.scenario import Failures, Scenario, Service, ServiceKind, Slowdown, uniform_samples
from coin.serving.tails import tail_intervals
from coin.versions import versions

LOADS = (0.2, 0.4, 0.6, 0.8, 0.9)


def simulate(
    folder: str,
    method: str | None = None,
    batchnorm: str | None = None,
    decoder: str = "linear",
    wants: list[Want] | None = None,
    policies: list[PolicyKind] | None = None,
    quantiles: list[float] | None = None,
    loads: list[float] | None = None,
    queries: int = 100_000,
    seeds: list[int] | None = None,
    service: Service = Service(),  # noqa: B008 (frozen)
    slowdown: Slowdown = Slowdown(),  # noqa: B008 (frozen)
    failures: Failures = Failures(),  # noqa: B008 (frozen)
    deadline: float = 1000.0,
    queue: int = 256,
    cooldown: float = 100.0,
    jobs: int | None = None,
    output: str | None = None,
) -> list[SimulationRow]:
    """Simulate how late answers are, and how right, under every serving policy at the same number of servers.

    With N experts and R coded models every policy has N + R servers: the policies without coding have R copies of
    experts instead. The load is the share of the experts' capacity that own answers alone take up; what a policy asks
    beyond them comes on top.

    Args:
        folder: An experiment's folder, or a seed's.
        method: The merge method whose coded models serve; none takes the first one in the results.
        batchnorm: The BatchNorm policy that its run asked for; none takes its first one.
        decoder: The decoder, as the results call it.
        wants: Whose answers a query wants: ``one`` expert's, drawn at random, or ``all`` experts'; none takes both.
        policies: The policies; none takes all.
        quantiles: Of the time that own answers take, after which the coded policies take them for late; none takes
            0.9.
        loads: The loads; none takes 0.2, 0.4, 0.6, 0.8 and 0.9.
        queries: Queries per seed, policy and load.
        seeds: Of arrivals, service times and phases; none takes 0.
        service: How long a server takes.
        slowdown: Phases in which servers are slow.
        failures: Phases in which servers are down.
        deadline: After how many mean service times a query fails.
        queue: The most requests that wait for one server.
        cooldown: After how many mean service times a server is tried again that is believed to be down.
        jobs: Processes; one a processor core by default.
        output: Where ``simulation.csv``, ``simulation.json`` and the figures go; none takes `folder`.

    Returns:
        The rows of ``simulation.csv``.

    Raises:
        ConfigurationError: An option is out of its range, or the experiment has no such results.
        FileError: A file is missing or damaged, or cannot be written.
    """
    wants, seeds = [Want(want) for want in wants or Want], [0] if seeds is None else seeds
    loads = list(LOADS) if loads is None else loads
    if not loads:
        raise ConfigurationError("found no loads, expected one at least; leave the option out for all of them")
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigurationError(f"found seeds {seeds}, expected distinct numbers of at least 0")
    chosen = _policies(policies, quantiles)
    folders = results_folders(Path(folder))
    served = read_served(Path(folder), method, batchnorm, decoder)
    system = _System.of(served, service, slowdown, failures)
    limits = {"queries": queries, "deadline": deadline, "queue": queue, "cooldown": cooldown}
    cases = [
        system.case(policy, load=load, want=want, seed=seed, **limits)
        for want in wants
        for load in loads
        for policy in chosen
        for seed in seeds
    ]
    outcomes = simulate_all(cases, jobs)
    accuracies = read_accuracies(folders, served.method, served.batchnorm, decoder)
    name = str(read_results(folders[0])["experiment"].iloc[0])
    count = len(seeds)
    rows = [
        _row(name, served, accuracies, cases[start], outcomes[start : start + count])
        for start in range(0, len(cases), count)
    ]
    options = {
        **limits, "method": served.method, "batchnorm": served.batchnorm, "decoder": decoder, "wants": wants,
        "policies": [(policy.kind, policy.quantile) for policy in chosen], "loads": loads, "seeds": seeds,
        "service": service, "slowdown": slowdown, "failures": failures, "decoding_seconds": system.decoding,
        "service_times": [each.tolist() for each in (*system.experts, *system.coded)],
    }  # fmt: skip
    _write(Path(folder if output is None else output), rows, described(options))
    return rows


def _policies(kinds: list[PolicyKind] | None, quantiles: list[float] | None) -> list[Policy]:
    """Return the policies, the coded ones once with every quantile."""
    plain = [make_policy(kind) for kind in kinds or PolicyKind]
    return [
        each
        for policy in plain
        for each in ([make_policy(policy.kind, q) for q in quantiles] if policy.coded and quantiles else [policy])
    ]


@dataclass(frozen=True)
class _System:
    """The code, and the service times in seconds of each of its experts' and coded models' servers and of decoding."""

    code: Code
    experts: tuple[NDArray[np.float64], ...]
    coded: tuple[NDArray[np.float64], ...]
    decoding: float
    service: Service
    slowdown: Slowdown
    failures: Failures

    @classmethod
    def of(cls, served: Served, service: Service, slowdown: Slowdown, failures: Failures) -> "_System":
        """Measure the networks and the decoder of an experiment, or take the service times that are given."""
        code = served.code
        if service.kind is not ServiceKind.measured:
            if service.seconds is None:
                raise ConfigurationError(f"found {service.kind} service times without a mean, give service.seconds")
            experts = uniform_samples(service.seconds, code.num_experts)
            return cls(code, experts, experts[:1] * code.num_coded, 0.0, service, slowdown, failures)
        width = served.experts.width
        paths = [*served.experts.paths.values(), *served.coded]
        times = []
        for path in paths:
            server = NetworkServer(path, width, served.decoder)
            times.append(measure_service(server))
        widths = server.feature_widths()
        expects = ReplyFormat(width, None if widths is None else sum(widths))
        decoding = float(np.median(measure_decoding(code, served.decoder, expects, widths)))
        count = code.num_experts
        return cls(code, tuple(times[:count]), tuple(times[count:]), decoding, service, slowdown, failures)

    def case(self, policy: Policy, **options: Any) -> Case:
        """Return a case of this system under a policy; every policy has as many servers."""
        if policy.coded:
            layout, samples = coded_layout(self.code), (*self.experts, *self.coded)
        else:
            layout = spread_copies(self.code.num_experts, self.code.num_coded)
            samples = (*self.experts, *(self.experts[expert] for expert in layout.copies))
        mean = float(np.mean([each.mean() for each in self.experts]))
        scenario = Scenario(samples, self.service, self.slowdown, self.failures, mean)
        return Case(layout, policy, scenario, decoding=self.decoding, **options)


def _row(name: str, served: Served, accuracies: Accuracies, case: Case, outcomes: Sequence[Outcome]) -> SimulationRow:
    """Return what the seeds of one case come to."""
    answers = sum(outcome.answers for outcome in outcomes)
    decoded = {
        size: sum(outcome.decoded.get(size, 0) for outcome in outcomes) / answers
        for size in sorted({size for outcome in outcomes for size in outcome.decoded})
    }
    share, failed = sum(decoded.values()), sum(outcome.failed for outcome in outcomes) / answers
    right = sum(part * accuracies.decoded.get(size, math.nan) for size, part in decoded.items())
    intervals = tail_intervals([outcome.latencies for outcome in outcomes], list(LEVELS.values()))
    latencies = {
        f"{column}{part}": getattr(interval, value)
        for column, interval in zip(LEVELS, intervals, strict=True)
        for part, value in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
    return SimulationRow(
        experiment=name,
        method=served.method,
        batchnorm=served.batchnorm,
        decoder=served.decoder.name,
        want=str(case.want),
        policy=str(case.policy.kind),
        quantile=case.policy.quantile if case.policy.coded else math.nan,
        load=case.load,
        servers=case.layout.num_servers,
        queries=case.queries,
        seeds=len(outcomes),
        **latencies,
        share_decoded=share,
        share_failed=failed,
        forwards=float(np.mean([outcome.forwards for outcome in outcomes])),
        utilisation=float(np.mean([outcome.utilisation for outcome in outcomes])),
        expert_accuracy=accuracies.expert,
        decoded_accuracy=right / share if share else math.nan,
        effective_accuracy=(1 - share - failed) * accuracies.expert + right,
        service_seconds=case.scenario.unit * (1 + case.scenario.service.tail),
        decoding_seconds=case.decoding,
    )


def _write(folder: Path, rows: Sequence[SimulationRow], options: Any) -> None:
    write_simulation(folder, rows)
    write_text(folder / SIMULATION_JSON, json.dumps({"options": options, "versions": versions()}, indent=1) + "\n")
    for want in dict.fromkeys(row.want for row in rows):
        chosen = [row for row in rows if row.want == want]
        for what, draw in (("latency", latency_against_load), ("accuracy", accuracy_against_latency)):
            with atomic_path(folder / "plots" / f"simulation-{want}-{what}.png") as temporary:
                temporary.write_bytes(as_png(draw(chosen)))


def main(arguments: Sequence[str]) -> None:
    """Simulate, and print the table."""
    parser = command_parser("simulate")
    parser.add_argument("folder", type=str, help="An experiment's or a seed's folder.")
    parser.add_function_arguments(simulate, skip={"folder"})
    options = parsed(parser, arguments)
    print_simulation(simulate(**options), results_console(100))
    print(f"table: {Path(options['output'] or options['folder']) / SIMULATION_CSV}")
