"""Discrete-event simulation of the serving policies, with the front end's own decisions on a virtual clock."""

import heapq
from collections import Counter, deque
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np

from coin.serving.breaker import Breaker
from coin.serving.case import Case, Outcome, Want
from coin.serving.flight import Flight, State
from coin.serving.lateness import Lateness
from coin.serving.layout import members
from coin.serving.limits import Limits
from coin.serving.scenario import poisson_arrivals


def simulate(case: Case) -> Outcome:
    """Simulate one case.

    Every server takes one request after the other, in the order in which they came. A query that ends takes back its
    requests that wait, not those being served. Time to decode delays the answer and occupies nobody. Requests are not
    merged into batches.
    """
    return _Simulation(case).run()


class _Simulation:
    def __init__(self, case: Case) -> None:
        layout, scenario, unit = case.layout, case.scenario, case.scenario.unit
        servers = range(layout.num_servers)
        self.case = case
        self.arrivals = poisson_arrivals(case.rate, case.queries, case.seed).tolist()
        self.wanted = wanted_experts(case)
        self.warm_up = case.queries // 20
        limits = Limits(deadline=case.deadline * unit, queue=case.queue, cooldown=case.cooldown * unit)
        self.limits = limits
        self.lateness = Lateness(case.policy.quantile, 3 * unit, longest=limits.deadline)
        self.patient = case.policy.coded and case.policy.quantile > 0
        self.breakers = [Breaker(limits.failures, limits.cooldown) for _ in servers]
        self.suspects = 0
        """The servers whose last request failed."""
        self.times = [scenario.service_times(server, case.seed) for server in servers]
        self.slow = [_Phase(scenario.slow_phases(server, case.seed)) for server in servers]
        self.factor = scenario.slowdown.factor
        self.down = [scenario.down_phases(server, case.seed) for server in servers]
        self.detection = scenario.failures.detection * unit
        self.up = [True for _ in servers]
        self.waiting: list[deque[tuple[int, Flight]]] = [deque() for _ in servers]
        self.serving: list[tuple[int, Flight] | None] = [None for _ in servers]
        self.held = [0 for _ in servers]
        """The number of pending queries that expect each server's answer."""
        self.services = [0 for _ in servers]
        """Services begun; together with the server this names one service."""
        self.busy = 0.0
        self.begun = 0
        self.heap: list[tuple[float, int, int, int, Any]] = []
        """Events: time, order, kind, server, and the query or service that it is about."""
        self.order = count()
        self.open = 0
        self.latencies = np.full(case.queries, np.inf)
        self.decoded: Counter[int] = Counter()
        self.failed = 0

    def run(self) -> Outcome:
        case, heap, arrivals = self.case, self.heap, self.arrivals
        for server, phases in enumerate(self.down):
            self._schedule_turn(server, phases)
        events = (self._complete, self._become_late, self._expire, self._lose, self._turn)
        last, place, now = len(arrivals), 0, 0.0
        while place < last or self.open:
            if place < last and (not heap or arrivals[place] <= heap[0][0]):
                now = arrivals[place]
                self._arrive(place, now)
                place += 1
            else:
                now, _, kind, server, item = heapq.heappop(heap)
                events[kind](now, server, item)
        counted = case.queries - self.warm_up
        each = case.layout.num_experts if case.want is Want.all else 1
        return Outcome(
            latencies=self.latencies[self.warm_up :],
            decoded=dict(self.decoded),
            answers=counted * each,
            failed=self.failed * each,
            forwards=self.begun / case.queries,
            utilisation=self.busy / (now * case.layout.num_servers),
        )

    def _arrive(self, place: int, now: float) -> None:
        case = self.case
        wanted, patient, down = self.wanted[place], self.patient, 0
        if self.suspects:
            down = sum(1 << server for server in members(self.suspects) if self.breakers[server].refuses(now))
            patient = patient and not self.suspects & ~down & case.layout.hosts(wanted)
        flight = Flight(case.layout, case.policy, wanted, patient)
        query = (place, flight)
        self.open += 1
        if patient:
            self._push(now + self.lateness.seconds, _LATE, 0, query)
        self._push(now + self.limits.deadline, _EXPIRED, 0, query)
        self._ask(query, flight.start(self.held, down), now)

    def _push(self, when: float, kind: int, server: int, item: Any) -> None:
        heapq.heappush(self.heap, (when, next(self.order), kind, server, item))

    def _ask(self, query: tuple[int, Flight], servers: int, now: float) -> None:
        flight = query[1]
        while servers and flight.state is State.pending:
            lowest = servers & -servers
            servers ^= lowest
            server = lowest.bit_length() - 1
            if not self.up[server]:
                self._push(now + self.detection, _LOST, server, query)
            else:
                current = self.serving[server]
                if current is None:
                    self._begin(server, query, now)
                elif self.held[server] - (current[1].state is State.pending) >= self.limits.queue:
                    servers |= flight.lose(server)
                    continue
                else:
                    self.waiting[server].append(query)
            self.held[server] += 1
        if flight.state is not State.pending:
            self._end(query, now, unasked=servers)

    def _begin(self, server: int, query: tuple[int, Flight], now: float) -> None:
        seconds = next(self.times[server])
        if self.slow[server].is_on(now):
            seconds *= self.factor
        self.serving[server] = query
        self.services[server] += 1
        self.begun += 1
        self.busy += seconds
        self._push(now + seconds, _COMPLETED, server, self.services[server])

    def _complete(self, now: float, server: int, service: int) -> None:
        query = self.serving[server]
        if query is None or service != self.services[server] or not self.up[server]:
            return  # the server has failed since
        self.serving[server] = None
        if self.suspects:
            self.breakers[server].succeed()
            self.suspects &= ~(1 << server)
        flight = query[1]
        if flight.state is State.pending:
            self.held[server] -= 1
            self._ask(query, flight.arrive(server), now)
        waiting = self.waiting[server]
        while waiting and self.serving[server] is None:
            following = waiting.popleft()
            if following[1].state is State.pending:
                self._begin(server, following, now)

    def _become_late(self, now: float, _: int, query: tuple[int, Flight]) -> None:
        flight = query[1]
        if flight.state is State.pending:
            if self.case.layout.hosts(flight.missing) & flight.expected:
                self.lateness.observe(True)
            self._ask(query, flight.become_late(), now)

    def _expire(self, now: float, _: int, query: tuple[int, Flight]) -> None:
        if query[1].state is State.pending:
            query[1].state = State.failed
            self._end(query, now)

    def _lose(self, now: float, server: int, query: tuple[int, Flight]) -> None:
        self.breakers[server].fail(now)
        self.suspects |= 1 << server
        flight = query[1]
        if flight.state is State.pending:
            self.held[server] -= 1
            self._ask(query, flight.lose(server), now)

    def _turn(self, now: float, server: int, _: int) -> None:
        """Let a server fail, or come back."""
        self.up[server] = not self.up[server]
        if not self.up[server]:
            current, waiting = self.serving[server], self.waiting[server]
            for query in [*([] if current is None else [current]), *waiting]:
                if query[1].state is State.pending:
                    self._push(now + self.detection, _LOST, server, query)
            self.serving[server] = None
            waiting.clear()
        self._schedule_turn(server, self.down[server])

    def _schedule_turn(self, server: int, phases: Iterator[float]) -> None:
        if (when := next(phases, None)) is not None:
            self._push(when, _TURNED, server, 0)

    def _end(self, query: tuple[int, Flight], now: float, unasked: int = 0) -> None:
        place, flight = query
        self.open -= 1
        for server in members(flight.expected & ~unasked):
            self.held[server] -= 1
        counted = place >= self.warm_up
        if flight.state is State.failed:
            self.failed += counted
            return
        seconds = now - self.arrivals[place]
        if flight.decoded:
            seconds += self.case.decoding
            if counted:
                layout = self.case.layout
                gone = layout.every_expert & ~layout.read(flight.arrived)[0]
                self.decoded[gone.bit_count()] += flight.decoded.bit_count()
        elif self.patient and not flight.late:
            self.lateness.observe(False)
        self.latencies[place] = seconds


_COMPLETED, _LATE, _EXPIRED, _LOST, _TURNED = range(5)


class _Phase:
    """Tells whether a server is slow; it is asked at ascending times."""

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
