"""Simulations of the serving policies: their options, and how they are run."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain, combinations
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from coin.core.choices import check_integer, check_number
from coin.core.progress import tracked
from coin.serving.layout import Layout
from coin.serving.policies import Policy
from coin.serving.sim.conditions import Conditions
from coin.serving.sim.run import SimulationOutcome, SimulationRun

_FEWEST = 28  # queries: a quarter of them warms the system up, and intervals want 20 at least


class QueryTarget(StrEnum):
    """Whose answers a query wants."""

    one = "one"
    """One expert's, drawn at random: the experts serve different users."""
    all = "all"
    """Every expert's: the experts look at the same input."""


@dataclass(frozen=True)
class Simulation:
    """The options of a simulation.

    Args:
        layout: The servers, asked by the `policy`.
        samples: For every server, measured service times in seconds ``[K]``, or their mean ``[1]``.
        conditions: The properties of machines and front end.
        load: The share of the experts' capacity (without batching) that own answers use, in (0, 1).
        machines: Every server's machine, which runs one batch at a time; by default one machine per server.
        want: Whose answers a query wants.
        queries: The number of queries; the first quarter is warm-up and not reported.
        seed: The seed of everything random; with one seed, different policies have the same queries and phases.
        decoding: Seconds to decode an answer.
        unpacking: Seconds to unpack a copy of an expert that the machine has not unpacked.
        unpacked: The number of unpacked copies that a machine keeps; 0 unpacks for every batch.
        broken: Machines that are down all the time.
    """

    layout: Layout
    policy: Policy
    samples: tuple[NDArray[np.float64], ...]
    conditions: Conditions
    load: float
    machines: tuple[int, ...] = ()
    want: QueryTarget = QueryTarget.one
    queries: int = 20_000
    seed: int = 0
    decoding: float = 0.0
    unpacking: float = 0.0
    unpacked: int = 1
    broken: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        check_number("load", self.load, low=0, high=1, strict=True)
        check_integer("queries", self.queries, _FEWEST)
        object.__setattr__(self, "machines", self.machines or tuple(range(self.layout.num_servers)))

    @property
    def unit(self) -> float:
        """The experts' mean service time without the tail, in seconds: loads and phases refer to it."""
        return float(np.mean([each.mean() for each in self.samples[: self.layout.num_experts]]))

    @property
    def rate(self) -> float:
        """Queries a second."""
        forwards = self.layout.num_experts if self.want is QueryTarget.all else 1
        return self.load * self.conditions.capacity(self.unit) * self.layout.num_experts / forwards

    def wanted(self) -> list[int]:
        """Return the set of experts that each query wants."""
        if self.want is QueryTarget.all:
            return [self.layout.every_expert] * self.queries
        experts = np.random.default_rng([self.seed, 2]).integers(self.layout.num_experts, size=self.queries)
        return [1 << expert for expert in experts.tolist()]

    def unanswered(self, share: float) -> float:
        """Return the share of queries that no server can answer, with each machine down for a share of the time.

        Exact for independent failures of up to four machines at once; with more, all answers count as lost.
        """
        machines, every = range(max(self.machines) + 1), range(self.layout.num_experts)
        wants = [self.layout.every_expert] if self.want is QueryTarget.all else [1 << expert for expert in every]
        answered = 0.0
        for down in chain.from_iterable(combinations(machines, lost) for lost in range(min(5, len(machines) + 1))):
            up = sum(1 << server for server, machine in enumerate(self.machines) if machine not in down)
            served = sum(self.layout.covers(up, wanted) for wanted in wants) / len(wants)
            answered += served * share ** len(down) * (1 - share) ** (len(machines) - len(down))
        return max(0.0, 1 - answered)


def run_simulation(simulation: Simulation) -> SimulationOutcome:
    """Run one simulation.

    A machine runs, in one batch, the requests of the server whose first request has waited longest. A query that ends
    withdraws its waiting requests, not those being served. Decoding delays the answer but occupies no server.
    """
    return SimulationRun(simulation).run()


def simulate_all(simulations: Sequence[Simulation], jobs: int | None = None) -> list[SimulationOutcome]:
    """Run simulations in parallel, by default one per core; results do not depend on the number of processes."""
    from coin.core.processes import cores  # which brings PyTorch, that the processes below need not wait for

    jobs = cores() if jobs is None else jobs
    check_integer("jobs", jobs, 1)
    if jobs == 1 or len(simulations) == 1:
        return [run_simulation(simulation) for simulation in tracked(simulations, "simulating")]
    # Spawned processes start without what this one has loaded, PyTorch above all.
    with ProcessPoolExecutor(min(jobs, len(simulations)), mp_context=get_context("spawn")) as pool:
        running = [pool.submit(run_simulation, simulation) for simulation in simulations]
        return [each.result() for each in tracked(running, "simulating")]
