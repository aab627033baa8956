"""The front end on a virtual clock: its own code, with simulated servers on machines that are slow or down.

A query that fails has infinite latency, so that failing fast makes no policy look quick. The load is what own answers
alone take of the experts' capacity; what a policy asks on top is in the column ``forwards``. ParM (Kosaian, Rashmi,
Venkataraman: *Parity Models*, SOSP 2019) codes over *queries* to replicas of one network; here the code is over
*models*, every one of which sees the query itself.
"""

import asyncio
import math
import random
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from coin.coding import Code
from coin.core.choices import check_integer, check_number
from coin.errors import LostError, OverloadedError, ServingError
from coin.modules import Coded
from coin.networks import load_network
from coin.serving.front_end import Answer, FrontEnd, Limits
from coin.serving.policies import Policy, StandIns
from coin.serving.servers import NetworkServer

_FEWEST = 40  # queries: their intervals want 20 blocks
LEVELS = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
"""Quantiles of the latency, by the names of their columns."""


class _Jump(selectors.DefaultSelector):
    """Waits for nothing: instead of sleeping, it lets the clock jump."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything waits and no timer is set: this would hang for ever")
        self.now += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time, in seconds from 0, jumps to the next timer where everything waits."""

    def __init__(self) -> None:
        self._clock = _Jump()
        super().__init__(self._clock)

    def time(self) -> float:
        """Return the virtual time."""
        return self._clock.now


class QueryTarget(StrEnum):
    """Whose answers a query wants."""

    one = "one"
    """One expert's, drawn at random: the experts serve different users."""
    all = "all"
    """Every expert's: the experts look at the same input."""


@dataclass(frozen=True)
class Phases:
    """Exponentially distributed phases in which a machine is slow, or down.

    Args:
        share: The share of the time; 0 for never.
        length: The mean length, in mean service times.
        factor: The slowdown of a service that begins in a slow phase.
    """

    share: float = 0.0
    length: float = 100.0
    factor: float = 5.0

    def __post_init__(self) -> None:
        check_number("share", self.share, low=0, high=1)
        check_number("length", self.length, low=0, strict=True)
        check_number("factor", self.factor, low=1)

    def is_on(self, unit: float, draw: random.Random) -> Callable[[float], bool]:
        """Return a function that says whether a phase is on; call it with ascending times."""
        length, between = self.length * unit, self.length * unit * (1 - self.share) / (self.share or 1)
        on = draw.random() < self.share
        ends = draw.expovariate(1 / (length if on else between)) if self.share else math.inf

        def look(now: float) -> bool:
            nonlocal on, ends
            while now >= ends:
                on = not on
                ends += draw.expovariate(1 / (length if on else between))
            return on

        return look


@dataclass(frozen=True)
class Conditions:
    """The properties of machines and front end, independent of the networks.

    Args:
        seconds: The mean service time for one input; by default every expert's is measured.
        tail: The mean of an exponential time on top of every service, in multiples of its mean.
        slow: Slow phases of machines.
        down: Their failures, in which all their requests are lost.
        overhead: The time of the front end and of the messages for a query, in seconds, as measured on loopback.
        batch: The largest number of requests that a machine runs together.
        queue: The largest number of requests waiting for one machine.
        deadline: The time after which a query fails, in mean service times.
        timeout: The time after which a request is lost, in mean service times.
    """

    seconds: float | None = None
    tail: float = 0.0
    slow: Phases = field(default_factory=Phases)
    down: Phases = field(default_factory=lambda: Phases(length=1000.0))
    overhead: float = 0.015
    batch: int = 8
    queue: int = 256
    deadline: float = 1000.0
    timeout: float = 200.0

    def __post_init__(self) -> None:
        for name in ("tail", "overhead"):
            check_number(name, getattr(self, name), low=0)
        for name in ("batch", "queue", "deadline", "timeout"):
            check_number(name, getattr(self, name), low=0, strict=True)
        check_number("seconds", 1.0 if self.seconds is None else self.seconds, low=0, strict=True)


@dataclass(frozen=True)
class Simulation:
    """One simulation.

    Args:
        stand_ins: The servers, and which of them stand in for an expert; `policy`, when they are asked.
        seconds: For each expert measured service times ``[K]``, or their mean ``[1]``; other servers take the first's.
        conditions: The properties of machines and front end.
        load: The share of the experts' capacity (without batching) that own answers use, in (0, 1).
        marginal: The time of each further input of a batch, as a share of the first.
        want: Whose answers a query wants.
        queries: How many there are; the first quarter warms up and is not reported.
        seed: The seed of everything random; with one seed, different policies have the same queries and phases.
    """

    stand_ins: StandIns
    policy: Policy
    seconds: tuple[NDArray[np.float64], ...]
    conditions: Conditions
    load: float
    marginal: float = 1.0
    want: QueryTarget = QueryTarget.one
    queries: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("load", self.load, low=0, high=1, strict=True)
        check_integer("queries", self.queries, _FEWEST)

    @property
    def unit(self) -> float:
        """The experts' mean service time without the tail, in seconds: loads and phases refer to it."""
        return float(np.mean([each.mean() for each in self.seconds]))

    @property
    def rate(self) -> float:
        """Queries a second."""
        slow, down, count = self.conditions.slow, self.conditions.down, len(self.seconds)
        speed = (1 - slow.share + slow.share / slow.factor) * (1 - down.share)
        servers = 1 if self.want is QueryTarget.all else count
        return self.load * speed / (self.unit * (1 + self.conditions.tail)) * servers


class Outcome(NamedTuple):
    """The outcome of one simulation's queries, without the warm-up.

    Attributes:
        latencies: Seconds from arrival to answer ``[Q]``, in the order of arrival; infinity for a query that failed.
        stood_in: The share of the answers wanted that were not the expert's own server's.
        forwards: Forward passes started per query.
    """

    latencies: NDArray[np.float64]
    stood_in: float
    forwards: float


class Machine:
    """A machine that runs one batch at a time, of the requests to one of its networks; the first of all."""

    def __init__(self, it: Simulation, place: int) -> None:
        self.it, self.forwards, self._busy = it, 0, False
        self._seconds = self._service_times(it.seconds[place if place < len(it.seconds) else 0], place)
        self._is_slow = it.conditions.slow.is_on(it.unit, random.Random(f"slow {it.seed} {place}"))
        self._is_down = it.conditions.down.is_on(it.unit, random.Random(f"down {it.seed} {place}"))
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()

    def _service_times(self, samples: NDArray[np.float64], place: int) -> Iterator[float]:
        draw, tail = np.random.default_rng([self.it.seed, 1, place]), self.it.conditions.tail * samples.mean()
        while True:
            yield from (draw.choice(samples, 4096) + draw.exponential(tail, 4096)).tolist()

    async def ask(self, network: str) -> None:
        """Answer a request to one of its networks; raises OverloadedError, and LostError where it is down."""
        if len(self._waiting) >= self.it.conditions.queue:
            raise OverloadedError("its queue is full")
        reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((network, reply))
        if not self._busy:
            self._begin()
        await reply

    def _begin(self) -> None:
        loop, batch, conditions = asyncio.get_running_loop(), list[asyncio.Future[None]](), self.it.conditions
        chosen = ""
        while self._waiting and len(batch) < conditions.batch and (not batch or self._waiting[0][0] == chosen):
            chosen, reply = self._waiting.popleft()
            if not reply.done():  # it was not withdrawn
                batch.append(reply)
        self._busy = bool(batch)
        if batch:
            seconds = next(self._seconds) * (1 + self.it.marginal * (len(batch) - 1))
            seconds *= conditions.slow.factor if self._is_slow(loop.time()) else 1.0
            self.forwards += len(batch)
            # That a machine is down is known after a mean service time.
            loop.call_later(self.it.unit if self._is_down(loop.time()) else seconds, self._end, batch)

    def _end(self, batch: Sequence["asyncio.Future[None]"]) -> None:
        is_down = self._is_down(asyncio.get_running_loop().time())
        for reply in batch:
            if not reply.done():
                reply.set_exception(LostError("it is down")) if is_down else reply.set_result(None)
        self._begin()


def run_simulation(it: Simulation) -> Outcome:
    """Run one simulation; with the same options it comes out the same to the last bit."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(_run(it))
    finally:
        loop.close()


async def _run(it: Simulation) -> Outcome:
    loop, count, conditions = asyncio.get_running_loop(), len(it.seconds), it.conditions
    machines: dict[str, Machine] = {}
    servers = {}
    for name in it.stand_ins.servers:
        process = name.partition("/")[0]
        machine = machines.setdefault(process, Machine(it, len(machines)))
        servers[name] = lambda inputs, machine=machine, name=name: machine.ask(name)
    deadline, timeout = conditions.deadline * it.unit, conditions.timeout * it.unit
    limits = Limits(deadline, timeout, it.queries, initial_lateness=3 * it.unit)
    front = FrontEnd(servers, it.stand_ins, it.policy, lambda expert, replies: None, limits)
    gaps = np.random.default_rng([it.seed, 0]).exponential(1 / it.rate, it.queries).tolist()
    wanted = np.random.default_rng([it.seed, 2]).integers(count, size=it.queries).tolist()
    latencies, found = np.full(it.queries, np.inf), list[Answer]()

    async def ask(place: int) -> None:
        arrived = loop.time()
        await asyncio.sleep(conditions.overhead)
        try:
            experts = range(count) if it.want is QueryTarget.all else [wanted[place]]
            answers = await front.ask((0,), experts, arrived + deadline)
        except ServingError:
            return
        latencies[place] = loop.time() - arrived
        if place >= it.queries // 4:
            found.extend(answers)

    async with asyncio.TaskGroup() as group:
        for place, gap in enumerate(gaps):
            await asyncio.sleep(gap)
            group.create_task(ask(place))
    left = [request for server in front.servers.values() for request in server.pending]
    for request in left:
        request.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    kept = latencies[it.queries // 4 :]
    stood_in = sum(answer.answered_by != (it.stand_ins.experts[answer.expert],) for answer in found)
    total = len(kept) * (count if it.want is QueryTarget.all else 1)
    return Outcome(kept, stood_in / total, sum(each.forwards for each in machines.values()) / it.queries)


def quantiles(series: Sequence[NDArray[np.float64]], draws: int = 200) -> dict[str, float]:
    """Return quantiles of several series ``[Q]`` together, by `LEVELS`, each with its 95 % interval.

    They are order statistics: infinite values, which are failures, are never interpolated. Latencies of neighbouring
    queries depend on one another, so that what the bootstrap draws again are 20 blocks of each series.
    """
    parts = [part for each in series for part in np.array_split(each, 20)]
    draw = np.random.default_rng(0)

    def of(chosen: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        values = np.sort(np.concatenate(chosen))
        return np.asarray(values[[math.ceil(level * len(values)) - 1 for level in LEVELS.values()]])

    drawn = np.sort([of([parts[each] for each in draw.integers(len(parts), size=len(parts))]) for _ in range(draws)], 0)
    low, high = drawn[round(0.025 * draws)], drawn[round(0.975 * draws) - 1]
    columns = {"": of(parts), "_low": low, "_high": high}
    return {f"{name}{end}": float(own[i]) for i, name in enumerate(LEVELS) for end, own in columns.items()}


def measure(server: NetworkServer, batch: int = 8, repeats: int = 200) -> tuple[NDArray[np.float64], float]:
    """Return a server's processor seconds for one input on one core ``[repeats]``, and the share a further one adds."""
    several, threads = server.probe.repeat(batch, *[1] * (server.probe.ndim - 1)), torch.get_num_threads()

    def times(inputs: torch.Tensor, count: int) -> NDArray[np.float64]:
        marks = [time.process_time()]  # not a clock's: others may be at work on this machine
        for _ in range(count + 20):
            server(inputs)
            marks.append(time.process_time())
        return np.diff(marks)[20:]

    torch.set_num_threads(1)
    try:
        one, more = times(server.probe, repeats), times(several, repeats // batch)
    finally:
        torch.set_num_threads(threads)
    return one, max(0.0, float(np.median(more) / np.median(one) - 1) / (batch - 1))
