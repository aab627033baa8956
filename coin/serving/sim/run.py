"""One simulated run, event by event on a virtual clock."""

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coin.serving.layout import members
from coin.serving.limits import Limits
from coin.serving.policies import Lateness, Query, State
from coin.serving.sim.conditions import Phase, poisson_arrivals

if TYPE_CHECKING:
    from coin.serving.sim.simulation import Simulation


@dataclass(frozen=True)
class SimulationOutcome:
    """The outcome of one simulation's queries, without the warm-up.

    Attributes:
        latencies: Seconds from arrival to answer ``[Q]``, in the order of arrival; infinity for a query that failed.
        decoded: By number of missing experts, how many answers were decoded; `replicated`, how many came from copies.
        answers: How many answers were wanted; `failed`, how many of those the failed queries had wanted.
        forwards: Forward passes started per query.
        utilisation: The share of the time that machines were busy, mean over machines.
    """

    latencies: NDArray[np.float64]
    decoded: dict[int, int]
    replicated: int
    answers: int
    failed: int
    forwards: float
    utilisation: float


class _Query(Query):
    place = 0
    """Among all."""


class SimulationRun:
    """The events of a simulation: queries enter, servers answer or are lost, machines go down and come back."""

    def __init__(self, simulation: "Simulation") -> None:
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
        slow = [conditions.slow_phases(each, it.seed, unit) if conditions.slowdown.share else () for each in machines]
        self.slow = [[Phase(turns) for turns in each] for each in slow]
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
        self.busy, self.begun, self.open, self.replicated, self.failed = 0.0, 0, 0, 0, 0

    def run(self) -> SimulationOutcome:
        """Return what came of the queries."""
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
        each = self.wanted[0].bit_count()
        return SimulationOutcome(
            self.latencies[self.warm_up :], dict(self.decoded), self.replicated, (last - self.warm_up) * each,
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
        served, batch = self.serving[self.machine[server]] or (-1, [])
        running = sum(query.state is State.pending for query in batch) if served == server else 0
        return self.held[server] - running >= self.conditions.queue

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
        kept = [*(each for each in at_hand if each != server), server]
        self.at_hand[machine] = kept[-it.unpacked :] if it.unpacked else []
        return it.unpacking * (server not in at_hand)

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
            served, batch = self.serving[machine] or (-1, [])
            lost = [(served, query) for query in batch]
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
            self.replicated += (query.wanted & ~query.decoded & ~query.arrived).bit_count()
