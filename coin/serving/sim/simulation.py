"""Discrete-event simulation of the serving policies, with the front end's own decisions on a virtual clock."""

import heapq
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from multiprocessing import get_context
from typing import Any

import numpy as np

from coin.processes import cores
from coin.serving.breaker import Breaker
from coin.serving.flight import Flight, State
from coin.serving.lateness import Lateness
from coin.serving.layout import members
from coin.serving.sim.case import Case, Outcome, Want
from coin.serving.sim.scenario import poisson_arrivals, require

Query = tuple[int, Flight]


def simulate(case: Case) -> Outcome:
    """Simulate one case.

    A machine takes what waits for the server whose first request came first, in one batch. A query that ends takes back
    its requests that wait, not those being served. Time to decode delays the answer and occupies nobody.
    """
    return _Simulation(case).run()


def simulate_all(cases: Sequence[Case], jobs: int | None = None) -> list[Outcome]:
    """Simulate several cases, in so many processes, one a processor core by default; nothing depends on how many.

    Raises:
        ConfigurationError: `jobs` is less than 1.
    """
    jobs = cores() if jobs is None else jobs
    require(jobs >= 1, f"jobs={jobs}", "at least 1")
    if jobs == 1 or len(cases) == 1:
        return [simulate(case) for case in cases]
    # Spawned processes start without what this one has loaded, PyTorch's threads above all.
    with ProcessPoolExecutor(min(jobs, len(cases)), mp_context=get_context("spawn")) as pool:
        return list(pool.map(simulate, cases))


class _Simulation:
    def __init__(self, case: Case) -> None:
        layout, conditions, unit = case.layout, case.conditions, case.unit
        servers, machines = range(layout.num_servers), range(max(case.machines) + 1)
        self.case = case
        arrivals = poisson_arrivals(case.rate, case.queries, case.seed)
        self.arrivals, self.entries = arrivals.tolist(), conditions.front_end.entries(arrivals, case.rate)
        self.wanted = wanted_experts(case)
        self.warm_up = case.queries // 4
        self.deadline, self.cooldown = conditions.deadline * unit, conditions.cooldown * unit
        self.hop, self.detection = conditions.front_end.hop, conditions.failures.detection * unit
        self.lateness: dict[int, Lateness] = {}
        self.patient = case.policy.hedges and case.policy.quantile > 0
        self.breakers = [Breaker() for _ in servers]
        self.suspects = self.down = 0
        """The servers whose last request failed, and those that are believed to be down."""
        self.times = [
            conditions.service_times(samples, np.random.default_rng([case.seed, 1, server]))
            for server, samples in enumerate(case.samples)
        ]
        self.marginal = 1.0 if conditions.service.marginal is None else conditions.service.marginal
        self.slow = [
            [_Phase(turns) for turns in conditions.slow_phases(machine, case.seed, unit)] for machine in machines
        ]
        self.turns = [conditions.down_phases(machine, case.seed, unit) for machine in machines]
        self.machine = case.machines
        self.residents = [[server for server in servers if case.machines[server] == each] for each in machines]
        self.up = [True for _ in machines]
        self.serving: list[tuple[int, list[Query]] | None] = [None for _ in machines]
        self.batches = [0 for _ in machines]
        """Batches begun; together with the machine this names one."""
        self.waiting: list[deque[tuple[int, Query]]] = [deque() for _ in servers]
        self.held = [0 for _ in servers]
        """The number of pending queries that expect each server's answer."""
        self.busy, self.begun = 0.0, 0
        self.heap: list[tuple[float, int, int, int, Any]] = []
        """Events: time, order, kind, server or machine, and the query or batch that it is about."""
        self.order = count()
        self.open = 0
        self.latencies = np.full(case.queries, np.inf)
        self.decoded: Counter[int] = Counter()
        self.spared = self.failed = 0

    def run(self) -> Outcome:
        case, heap = self.case, self.heap
        for machine, turns in enumerate(self.turns):
            self._schedule_turn(machine, turns)
        entries = self.entries
        events = (self._complete, self._arrived, self._become_late, self._expire, self._lose, self._turn, self._try)
        last, place, now = len(entries), 0, 0.0
        while place < last or self.open:
            if place < last and (not heap or entries[place] <= heap[0][0]):
                now = entries[place]
                self._enter(place, now)
                place += 1
            else:
                now, _, kind, where, item = heapq.heappop(heap)
                events[kind](now, where, item)
        counted = case.queries - self.warm_up
        each = case.layout.num_experts if case.want is Want.all else 1
        return Outcome(
            latencies=self.latencies[self.warm_up :],
            decoded=dict(self.decoded),
            spared=self.spared,
            answers=counted * each,
            failed=self.failed * each,
            forwards=self.begun / case.queries,
            utilisation=self.busy / (now * len(self.up)),
        )

    def _enter(self, place: int, now: float) -> None:
        case, wanted = self.case, self.wanted[place]
        patient = self.patient and not self.suspects & ~self.down & case.layout.hosts(wanted)
        flight = Flight(case.layout, case.policy, wanted, patient)
        query = (place, flight)
        self.open += 1
        if patient:
            self._push(now + self._lateness(wanted).seconds, _LATE, 0, query)
        self._push(now + self.deadline, _EXPIRED, 0, query)
        self._ask(query, flight.start(self.held, self.down), now)

    def _lateness(self, wanted: int) -> Lateness:
        if wanted not in self.lateness:
            # As in a system that has run for long: a first slow phase would else teach it to wait for too long.
            self.lateness[wanted] = Lateness(
                self.case.policy.quantile, 3 * self.case.unit, longest=self.deadline, experience=4000
            )
        return self.lateness[wanted]

    def _push(self, when: float, kind: int, where: int, item: Any) -> None:
        heapq.heappush(self.heap, (when, next(self.order), kind, where, item))

    def _ask(self, query: Query, servers: int, now: float) -> None:
        flight = query[1]
        while servers and flight.state is State.pending:
            lowest = servers & -servers
            servers ^= lowest
            server = lowest.bit_length() - 1
            machine = self.machine[server]
            if not self.up[machine]:
                self._push(now + self.detection + self.hop, _LOST, server, query)
            elif self._is_full(server):
                servers |= flight.lose(server)
                continue
            else:
                self.waiting[server].append((next(self.order), query))
                if self.serving[machine] is None:
                    self._begin(machine, now)
            self.held[server] += 1
        if flight.state is not State.pending:
            self._end(query, now, unasked=servers)

    def _is_full(self, server: int) -> bool:
        """Whether no more requests may wait for a server; those of its present batch do not wait."""
        if self.held[server] < self.case.conditions.queue:
            return False
        current = self.serving[self.machine[server]]
        own = current[1] if current is not None and current[0] == server else []
        return self.held[server] - sum(each[1].state is State.pending for each in own) >= self.case.conditions.queue

    def _begin(self, machine: int, now: float) -> None:
        """Let a machine that is free take what waits for one of its servers."""
        first, chosen = -1, -1
        for server in self.residents[machine]:
            waiting = self.waiting[server]
            while waiting and waiting[0][1][1].state is not State.pending:
                waiting.popleft()
            if waiting and (chosen < 0 or waiting[0][0] < first):
                first, chosen = waiting[0][0], server
        if chosen < 0:
            return
        waiting = self.waiting[chosen]
        batch: list[Query] = []
        while waiting and len(batch) < self.case.conditions.batch:
            query = waiting.popleft()[1]
            if query[1].state is State.pending:
                batch.append(query)
        seconds = next(self.times[chosen]) * (1 + self.marginal * (len(batch) - 1))
        if any(phase.is_on(now) for phase in self.slow[machine]):
            seconds *= self.case.conditions.slowdown.factor
        self.serving[machine] = (chosen, batch)
        self.batches[machine] += 1
        self.begun += len(batch)
        self.busy += seconds
        self._push(now + seconds, _COMPLETED, machine, self.batches[machine])

    def _complete(self, now: float, machine: int, number: int) -> None:
        current = self.serving[machine]
        if current is None or number != self.batches[machine] or not self.up[machine]:
            return  # the machine has failed since
        self.serving[machine] = None
        if self.hop:
            self._push(now + self.hop, _ARRIVED, current[0], current[1])
        else:
            self._arrived(now, *current)
        if self.serving[machine] is None:
            self._begin(machine, now)

    def _arrived(self, now: float, server: int, batch: list[Query]) -> None:
        self._succeed(server)
        for query in batch:
            if query[1].state is State.pending:
                self.held[server] -= 1
                self._ask(query, query[1].arrive(server), now)

    def _succeed(self, server: int) -> None:
        if self.suspects >> server & 1:
            self.breakers[server].succeed()
            self.suspects &= ~(1 << server)
            self.down &= ~(1 << server)

    def _become_late(self, now: float, _: int, query: Query) -> None:
        flight = query[1]
        if flight.state is State.pending:
            if self.case.layout.hosts(flight.missing) & flight.expected:
                self._lateness(flight.wanted).observe(True)
            self._ask(query, flight.become_late(), now)

    def _expire(self, now: float, _: int, query: Query) -> None:
        if query[1].state is State.pending:
            query[1].state = State.failed
            self._end(query, now)

    def _lose(self, now: float, server: int, query: Query) -> None:
        self.breakers[server].fail()
        self.suspects |= 1 << server
        if self.breakers[server].is_down and not self.down >> server & 1:
            self.down |= 1 << server
            self._push(now + self.cooldown, _TRIED, server, None)
        if query[1].state is State.pending:
            self.held[server] -= 1
            self._ask(query, query[1].lose(server), now)

    def _try(self, now: float, server: int, _: None) -> None:
        """Find out whether a server is back, as its queue does."""
        if self.up[self.machine[server]]:
            self._succeed(server)
        elif self.down >> server & 1:
            self._push(now + self.cooldown, _TRIED, server, None)

    def _turn(self, now: float, machine: int, _: int) -> None:
        """Let a machine fail, or come back."""
        self.up[machine] = not self.up[machine]
        if not self.up[machine]:
            current = self.serving[machine]
            lost = [] if current is None else [(current[0], query) for query in current[1]]
            for server in self.residents[machine]:
                lost += [(server, query) for _, query in self.waiting[server]]
                self.waiting[server].clear()
            for server, query in lost:
                if query[1].state is State.pending:
                    self._push(now + self.detection, _LOST, server, query)
            self.serving[machine] = None
        self._schedule_turn(machine, self.turns[machine])

    def _schedule_turn(self, machine: int, turns: Iterator[float]) -> None:
        if (when := next(turns, None)) is not None:
            self._push(when, _TURNED, machine, 0)

    def _end(self, query: Query, now: float, unasked: int = 0) -> None:
        place, flight = query
        self.open -= 1
        for server in members(flight.expected & ~unasked):
            self.held[server] -= 1
        counted = place >= self.warm_up
        if flight.state is State.failed:
            self.failed += counted
            return
        seconds = now - self.arrivals[place]
        layout = self.case.layout
        if flight.decoded:
            seconds += self.case.decoding
            if counted:
                gone = layout.every_expert & ~layout.read(flight.arrived)[0]
                self.decoded[gone.bit_count()] += flight.decoded.bit_count()
        elif self.patient and not flight.late:
            self._lateness(flight.wanted).observe(False)
        if counted:
            self.spared += (flight.wanted & ~flight.decoded & ~flight.arrived).bit_count()
        self.latencies[place] = seconds


_COMPLETED, _ARRIVED, _LATE, _EXPIRED, _LOST, _TURNED, _TRIED = range(7)


class _Phase:
    """Tells whether a phase is on; it is asked at ascending times."""

    def __init__(self, turns: Iterator[float]) -> None:
        self._turns = turns
        self._on = False
        self._next = next(turns, float("inf"))

    def is_on(self, now: float) -> bool:
        while now >= self._next:
            self._on = not self._on
            self._next = next(self._turns)
        return self._on


def wanted_experts(case: Case) -> list[int]:
    """Return the set of experts that each query of a case wants."""
    if case.want is Want.all:
        return [case.layout.every_expert] * case.queries
    experts = np.random.default_rng([case.seed, 2]).integers(case.layout.num_experts, size=case.queries)
    return [1 << expert for expert in experts.tolist()]
