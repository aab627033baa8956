"""Discrete-event simulation of the serving policies, with the front end's own decisions on a virtual clock."""

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import chain, combinations, count
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coin.core.choices import check_integer, check_number
from coin.core.progress import tracked
from coin.serving.layout import Layout, members
from coin.serving.limits import Limits
from coin.serving.policies import Lateness, Policy, Query, State
from coin.serving.sim.conditions import Conditions, poisson_arrivals

_FEWEST = 28
"""Queries: a quarter of them warms the system up, and intervals want 20 at least."""


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
        seed: The seed of everything random. Simulations that differ only in the policy have the same queries and
            phases.
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


@dataclass(frozen=True)
class Outcome:
    """The outcome of one simulation's queries, without the warm-up.

    Attributes:
        latencies: Seconds from arrival to answer ``[Q]``, in the order of arrival; infinity for a query that failed.
        decoded: By number of missing experts, how many answers were decoded; `spared`, how many came from copies.
        answers: How many answers were wanted; `failed`, how many of those the failed queries had wanted.
        forwards: Forward passes started per query.
        utilisation: The share of the time that machines were busy, mean over machines.
    """

    latencies: NDArray[np.float64]
    decoded: dict[int, int]
    spared: int
    answers: int
    failed: int
    forwards: float
    utilisation: float


def simulate(simulation: Simulation) -> Outcome:
    """Run one simulation.

    A machine runs, in one batch, the requests of the server whose first request has waited longest. A query that ends
    withdraws its waiting requests, not those being served. Decoding delays the answer but occupies no server.
    """
    return _Run(simulation).run()


def simulate_all(simulations: Sequence[Simulation], jobs: int | None = None) -> list[Outcome]:
    """Run simulations in parallel, by default one per core; results do not depend on the number of processes."""
    from coin.core.processes import cores  # which brings PyTorch, that the processes below need not wait for

    jobs = cores() if jobs is None else jobs
    check_integer("jobs", jobs, 1)
    if jobs == 1 or len(simulations) == 1:
        return [simulate(simulation) for simulation in tracked(simulations, "simulating")]
    # Spawned processes start without what this one has loaded, PyTorch above all.
    with ProcessPoolExecutor(min(jobs, len(simulations)), mp_context=get_context("spawn")) as pool:
        running = [pool.submit(simulate, simulation) for simulation in simulations]
        return [each.result() for each in tracked(running, "simulating")]


class _Query(Query):
    place = 0
    """Among all."""


class _Run:
    def __init__(self, simulation: Simulation) -> None:
        it, layout, conditions, unit = simulation, simulation.layout, simulation.conditions, simulation.unit
        self.simulation, self.layout, self.conditions, self.machine = it, layout, conditions, it.machines
        servers, machines = range(layout.num_servers), range(max(it.machines) + 1)
        arrivals = poisson_arrivals(it.rate, it.queries, it.seed)
        self.arrivals, self.entries = arrivals.tolist(), conditions.front_end.entries(arrivals, it.rate)
        self.wanted, self.warm_up = it.wanted(), it.queries // 4
        self.deadline, self.cooldown = conditions.deadline * unit, conditions.cooldown * unit
        self.hop, self.detection = conditions.front_end.hop, conditions.failures.detection * unit
        # As in a system that has run for long: a first slow phase would else teach it to wait for too long.
        fresh = partial(Lateness, it.policy.quantile, 3 * unit, self.deadline, experience=4000)
        self.lateness: defaultdict[int, Lateness] = defaultdict(fresh)
        self.patient = it.policy.hedges and it.policy.quantile > 0
        self.failures = [0 for _ in servers]  # since its last answer
        self.doubted = self.down = 0  # the servers whose last request was lost, and those that are believed to be down
        self.times = [
            conditions.service_times(samples, np.random.default_rng([it.seed, 1, server]))
            for server, samples in enumerate(it.samples)
        ]
        self.marginal = 1.0 if conditions.service.marginal is None else conditions.service.marginal
        self.slow = [[Phase(turns) for turns in conditions.slow_phases(each, it.seed, unit)] for each in machines]
        self.turns = [
            iter([0.0]) if each in it.broken else conditions.down_phases(each, it.seed, unit) for each in machines
        ]
        self.residents = [[server for server in servers if it.machines[server] == each] for each in machines]
        self.at_hand: list[list[int]] = [[] for _ in machines]  # the unpacked copies, the last used last
        self.up = [True for _ in machines]
        self.serving: list[tuple[int, list[_Query]] | None] = [None for _ in machines]  # a server and its batch
        self.waiting: list[deque[tuple[int, _Query]]] = [deque() for _ in servers]
        self.held = [0 for _ in servers]  # the pending queries that expect its answer
        # A heap: the time, the order among those of one time, and what happens.
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.order = count()
        self.latencies, self.decoded = np.full(it.queries, np.inf), Counter[int]()
        self.busy, self.begun, self.open, self.spared, self.failed = 0.0, 0, 0, 0, 0

    def run(self) -> Outcome:
        events, entries = self.events, self.entries
        for machine, turns in enumerate(self.turns):
            self._push(next(turns, np.inf), self._turn, machine)
        last, place, now = len(entries), 0, 0.0
        while place < last or self.open:
            if place < last and (not events or entries[place] <= events[0][0]):
                now = entries[place]
                self._enter(now, place)
                place += 1
            else:
                now, _, happen, about = heapq.heappop(events)
                happen(now, *about)
        each = self.layout.num_experts if self.simulation.want is QueryTarget.all else 1
        return Outcome(
            self.latencies[self.warm_up :], dict(self.decoded), self.spared, (last - self.warm_up) * each,
            self.failed * each, self.begun / last, self.busy / (now * len(self.up)),
        )  # fmt: skip

    def _push(self, when: float, happen: Callable[..., None], *about: Any) -> None:
        heapq.heappush(self.events, (when, next(self.order), happen, about))

    def _enter(self, now: float, place: int) -> None:
        wanted = self.wanted[place]
        lateness = self.lateness[wanted] if self.patient else None
        patient = lateness is not None and not self.doubted & ~self.down & self.layout.hosts(wanted)
        query = _Query(self.layout, self.simulation.policy, wanted, lateness, patient)
        query.place = place
        self.open += 1
        if lateness and patient:
            self._push(now + lateness.seconds, self._become_late, query)
        self._push(now + self.deadline, self._expire, query)
        self._ask(now, query, query.start(self._load, self.down))

    def _load(self, server: int) -> int:
        """The requests waiting for a server's machine."""
        return sum(self.held[each] for each in self.residents[self.machine[server]])

    def _ask(self, now: float, query: _Query, servers: int) -> None:
        while servers and query.state is State.pending:
            server = (servers & -servers).bit_length() - 1
            servers &= servers - 1
            machine = self.machine[server]
            if not self.up[machine]:
                self._push(now + self.detection + self.hop, self._lose, server, query)
            elif self._is_full(server):
                servers |= query.lose(server)
                continue
            else:
                self.waiting[server].append((next(self.order), query))
                if self.serving[machine] is None:
                    self._begin(now, machine)
            self.held[server] += 1
        if query.state is not State.pending:
            self._end(now, query, unasked=servers)

    def _is_full(self, server: int) -> bool:
        """Whether a server's queue is full; the running batch does not count."""
        if self.held[server] < self.conditions.queue:
            return False
        current = self.serving[self.machine[server]]
        own = current[1] if current is not None and current[0] == server else []
        return self.held[server] - sum(query.state is State.pending for query in own) >= self.conditions.queue

    def _begin(self, now: float, machine: int) -> None:
        """Start the next batch on a free machine."""
        first, chosen = -1, -1
        for server in self.residents[machine]:
            waiting = self.waiting[server]
            while waiting and waiting[0][1].state is not State.pending:
                waiting.popleft()
            if waiting and (chosen < 0 or waiting[0][0] < first):
                first, chosen = waiting[0][0], server
        if chosen < 0:
            return
        waiting, batch = self.waiting[chosen], list[_Query]()
        while waiting and len(batch) < self.conditions.batch:
            query = waiting.popleft()[1]
            if query.state is State.pending:
                batch.append(query)
        seconds = next(self.times[chosen]) * (1 + self.marginal * (len(batch) - 1)) + self._unpack(machine, chosen)
        if any(phase.is_on(now) for phase in self.slow[machine]):
            seconds *= self.conditions.slowdown.factor
        self.serving[machine] = current = chosen, batch
        self.begun += len(batch)
        self.busy += seconds
        self._push(now + seconds, self._complete, machine, current)

    def _unpack(self, machine: int, server: int) -> float:
        """Return the seconds until a machine has unpacked a server's network."""
        at_hand, it = self.at_hand[machine], self.simulation
        if not it.unpacking or server < self.layout.num_experts:
            return 0.0
        is_new = server not in at_hand
        self.at_hand[machine] = [*(each for each in at_hand if each != server), server][
            -it.unpacked or len(at_hand) + 1 :
        ]
        return it.unpacking * is_new

    def _complete(self, now: float, machine: int, served: tuple[int, list[_Query]]) -> None:
        if self.serving[machine] is not served:
            return  # the machine has failed since
        self.serving[machine] = None
        if self.hop:
            self._push(now + self.hop, self._arrive, *served)
        else:
            self._arrive(now, *served)
        if self.serving[machine] is None:
            self._begin(now, machine)

    def _arrive(self, now: float, server: int, batch: list[_Query]) -> None:
        self._succeed(server)
        for query in batch:
            if query.state is State.pending:
                self.held[server] -= 1
                self._ask(now, query, query.arrive(server))

    def _succeed(self, server: int) -> None:
        self.failures[server] = 0
        self.doubted &= ~(1 << server)
        self.down &= ~(1 << server)

    def _become_late(self, now: float, query: _Query) -> None:
        if query.state is State.pending:
            self._ask(now, query, query.become_late())

    def _expire(self, now: float, query: _Query) -> None:
        if query.state is State.pending:
            query.state = State.failed
            self._end(now, query)

    def _lose(self, now: float, server: int, query: _Query) -> None:
        self.failures[server] += 1
        self.doubted |= 1 << server
        if self.failures[server] >= Limits.failures and not self.down >> server & 1:
            self.down |= 1 << server
            self._push(now + self.cooldown, self._try, server)
        if query.state is State.pending:
            self.held[server] -= 1
            self._ask(now, query, query.lose(server))

    def _try(self, now: float, server: int) -> None:
        """Probe whether a server is back, as `ServerQueue` does."""
        if self.up[self.machine[server]]:
            self._succeed(server)
        elif self.down >> server & 1:
            self._push(now + self.cooldown, self._try, server)

    def _turn(self, now: float, machine: int) -> None:
        """Switch a machine down or up."""
        self.up[machine] = not self.up[machine]
        if not self.up[machine]:
            current = self.serving[machine]
            lost = [] if current is None else [(current[0], query) for query in current[1]]
            for server in self.residents[machine]:
                lost += [(server, query) for _, query in self.waiting[server]]
                self.waiting[server].clear()
            for server, query in lost:
                if query.state is State.pending:
                    self._push(now + self.detection, self._lose, server, query)
            self.serving[machine] = None
        self._push(next(self.turns[machine], np.inf), self._turn, machine)

    def _end(self, now: float, query: _Query, unasked: int = 0) -> None:
        self.open -= 1
        for server in members(query.expected & ~unasked):
            self.held[server] -= 1
        counted = query.place >= self.warm_up
        if query.state is State.failed:
            self.failed += counted
            return
        self.latencies[query.place] = now - self.arrivals[query.place] + self.simulation.decoding * bool(query.decoded)
        if counted and query.decoded:
            gone = self.layout.every_expert & ~self.layout.read(query.arrived)[0]
            self.decoded[gone.bit_count()] += query.decoded.bit_count()
        if counted:
            self.spared += (query.wanted & ~query.decoded & ~query.arrived).bit_count()


class Phase:
    """Returns whether a phase is on; call it with ascending times."""

    def __init__(self, turns: Iterator[float]) -> None:
        self._turns, self._on, self._next = turns, False, next(turns, float("inf"))

    def is_on(self, now: float) -> bool:
        """Return whether the phase is on at a time."""
        while now >= self._next:
            self._on, self._next = not self._on, next(self._turns)
        return self._on
