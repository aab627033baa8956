"""Simulated machines: their load and troubles, how long the networks take that they run, and their queue."""

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from coin.core.choices import check_integer, check_number
from coin.errors import LostError, OverloadedError
from coin.serving.limits import Limits
from coin.serving.servers import NetworkServer

BATCHES = (1, 2, 4, 8)  # the numbers of inputs that are timed, up to `Limits.batch`
WARM_UP = 5  # passes before those that are timed


@dataclass(frozen=True)
class Phases:
    """Exponentially distributed phases in which a machine is slow, or down.

    Args:
        share: The share of the time; 0 for never, 1 for always.
        length: The mean length, in mean service times; `factor`, the slowdown of a service that begins in a slow phase.
        machines: How many machines have such phases, the experts' first; 0 for all.
    """

    share: float = 0.0
    length: float = 100.0
    factor: float = 5.0
    machines: int = 0

    def __post_init__(self) -> None:
        check_number("share", self.share, low=0, most=1)
        check_number("length", self.length, low=0, strict=True)
        check_number("factor", self.factor, low=1)
        check_integer("machines", self.machines, 0)

    def share_of(self, machine: int) -> float:
        """Return the share of the time for which the phases of a machine, numbered from 0, are on."""
        is_concerned = self.machines == 0 or machine < self.machines
        return self.share if is_concerned else 0.0


class PhaseClock:
    """Whether a machine's phase is on; times have to ascend, in seconds. `unit` is a mean service time."""

    def __init__(self, phases: Phases, machine: int, unit: float, draw: random.Random) -> None:
        share = phases.share_of(machine)
        self._is_constant = share in (0.0, 1.0)
        self._is_on = share == 1.0
        if self._is_constant:
            return
        length = phases.length * unit
        self._lengths = {True: length, False: length * (1 - share) / share}
        self._draw = draw
        self._is_on = draw.random() < share
        self._ends = draw.expovariate(1 / self._lengths[self._is_on])

    def is_on(self, now: float) -> bool:
        """Return whether the phase is on at a time."""
        while not self._is_constant and now >= self._ends:
            self._is_on = not self._is_on
            self._ends += self._draw.expovariate(1 / self._lengths[self._is_on])
        return self._is_on


@dataclass(frozen=True)
class Conditions:
    """The load, and the properties of machines and front end.

    Args:
        load: The share of the experts' capacity (without batching) that own answers use, in (0, 1).
        queries: How many there are; the first quarter warms up and is not reported.
        tail: The mean of an exponential time on top of every service, in multiples of the service's own mean.
        slow: Slow phases of machines; `down`, their failures, in which all their requests are lost.
    """

    load: float = 0.4
    queries: int = 20_000
    tail: float = 0.0
    slow: Phases = field(default_factory=Phases)
    down: Phases = field(default_factory=lambda: Phases(length=1000.0))

    def __post_init__(self) -> None:
        check_number("load", self.load, low=0, high=1, strict=True)
        check_integer("queries", self.queries, 40)
        check_number("tail", self.tail, low=0)
        check_number("down.share", self.down.share, high=1)


class ServiceTimes:
    """How long a network takes for a batch, in seconds: measured at the sizes of `BATCHES`, in between interpolated.

    Args:
        seconds: For each of these sizes K measured times ``[4, K]``.
    """

    def __init__(self, seconds: NDArray[np.float64]) -> None:
        self._seconds = np.sort(seconds, axis=1)
        self._means = self._seconds.mean(axis=1)

    def mean(self, inputs: int = 1) -> float:
        """Return the mean time for so many inputs."""
        return float(np.interp(inputs, BATCHES, self._means))

    def at(self, quantile: float, inputs: int) -> float:
        """Return the time for so many inputs at a quantile in [0, 1) of the measured ones."""
        column = int(quantile * self._seconds.shape[1])
        return float(np.interp(inputs, BATCHES, self._seconds[:, column]))


def measure(server: NetworkServer, expert: int = 0, repeats: int = 60) -> ServiceTimes:
    """Return a server's processor seconds on one thread, warm, for an expert's batches of the sizes of `BATCHES`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = np.empty((len(BATCHES), repeats))
    try:
        for row, inputs in enumerate(BATCHES):
            batch = server.probe.repeat(inputs, 1, 1, 1)
            for _ in range(WARM_UP):
                server(batch, expert)
            for repeat in range(repeats):
                began = time.process_time()  # not a clock's: others may be at work on this machine
                server(batch, expert)
                seconds[row, repeat] = time.process_time() - began
    finally:
        torch.set_num_threads(threads)
    return ServiceTimes(seconds)


class Machine:
    """A machine that runs one batch at a time; each network that a batch asks for runs once, one after the other.

    Args:
        place: Its number, from 0; the experts' machines are the first.
        times: Those of the networks that it may run.
        conditions: Its tail and troubles.
        unit: A mean service time in seconds.
        seed: Of its service times and phases.
    """

    def __init__(
        self,
        place: int,
        times: Mapping[str, ServiceTimes],
        conditions: Conditions,
        unit: float,
        seed: int,
    ) -> None:
        self.forwards = 0
        self._times = times
        self._conditions = conditions
        self._unit = unit
        self._draws = self._service_draws(np.random.default_rng([seed, 1, place]))
        slow_draw = random.Random(f"slow {seed} {place}")
        down_draw = random.Random(f"down {seed} {place}")
        self._slow = PhaseClock(conditions.slow, place, unit, slow_draw)
        self._down = PhaseClock(conditions.down, place, unit, down_draw)
        self._busy = False
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()

    async def ask(self, network: str, inputs: object) -> None:
        """Answer a request to one of its networks; raises OverloadedError, and LostError where it is down."""
        if len(self._waiting) >= Limits.queue:
            raise OverloadedError("its queue is full")
        reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((network, reply))
        if not self._busy:
            self._begin()
        await reply

    def _begin(self) -> None:
        """Run the next batch, if anybody waits."""
        batch: list[asyncio.Future[None]] = []
        networks: list[str] = []
        while self._waiting and len(batch) < Limits.batch:
            network, reply = self._waiting.popleft()
            if not reply.done():  # it was not withdrawn
                batch.append(reply)
                networks.append(network)
        self._busy = bool(batch)
        if not batch:
            return
        loop = asyncio.get_running_loop()
        self.forwards += len(batch)
        seconds = self._seconds(networks)
        if self._slow.is_on(loop.time()):
            seconds *= self._conditions.slow.factor
        if self._down.is_on(loop.time()):
            seconds = self._unit  # after which it is known that it is down
        loop.call_later(seconds, self._end, batch)

    def _end(self, batch: Sequence["asyncio.Future[None]"]) -> None:
        is_down = self._down.is_on(asyncio.get_running_loop().time())
        for reply in batch:
            if reply.done():
                continue
            if is_down:
                reply.set_exception(LostError("it is down"))
            else:
                reply.set_result(None)
        self._begin()

    def _seconds(self, networks: Sequence[str]) -> float:
        """Return how long the networks take that the requests of a batch ask for."""
        quantile, tail = next(self._draws)
        seconds = 0.0
        for network, inputs in Counter(networks).items():
            times = self._times[network]
            seconds += times.at(quantile, inputs) + tail * times.mean(inputs)
        return seconds

    def _service_draws(self, draw: np.random.Generator) -> Iterator[tuple[float, float]]:
        """Yield for every service the quantile of its measured times, and its tail in multiples of their mean."""
        while True:
            quantiles = draw.random(4096).tolist()
            tails = draw.exponential(self._conditions.tail, 4096).tolist()
            yield from zip(quantiles, tails, strict=True)
