"""The machines in a simulation: service times, slow phases and failures."""

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from coin.core.choices import check_integer, check_number, parse_enum
from coin.errors import ConfigurationError

_CHUNK = 4096


class ServiceKind(StrEnum):
    """The distribution of service times: measured, constant or exponential."""

    measured = "measured"
    deterministic = "deterministic"
    exponential = "exponential"


@dataclass(frozen=True)
class Service:
    """The service time of a healthy server for one batch.

    Args:
        kind: The distribution.
        seconds: Its mean for one input; by default measured.
        tail: The mean of an exponential time on top, in multiples of `seconds`.
        marginal: The time of each further input of a batch, as a share of the first; by default measured, else 1.
    """

    kind: ServiceKind = ServiceKind.measured
    seconds: float | None = None
    tail: float = 0.0
    marginal: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", parse_enum(ServiceKind, "service.kind", self.kind))
        if (self.seconds is None) != (self.kind is ServiceKind.measured):
            found = f"found service.kind={self.kind} with service.seconds={self.seconds}"
            raise ConfigurationError(f"{found}, expected seconds for all kinds but none for measured times")
        check_number("service.seconds", 1.0 if self.seconds is None else self.seconds, low=0, strict=True)
        check_number("service.tail", self.tail, low=0)
        check_number("service.marginal", self.marginal or 0.0, low=0)


@dataclass(frozen=True)
class Slowdown:
    """Slow phases of machines, exponentially distributed.

    Args:
        share: The share of the time that a machine is slow; 0 for never.
        factor: The slowdown factor of a service that begins in a slow phase.
        length: The mean length of a slow phase, in mean service times.
        together: The share of the slow time in which all machines are slow at once, as on a shared network.
    """

    share: float = 0.0
    factor: float = 5.0
    length: float = 100.0
    together: float = 0.0

    def __post_init__(self) -> None:
        check_number("slowdown.share", self.share, low=0, high=1)
        check_number("slowdown.factor", self.factor, low=1)
        check_number("slowdown.length", self.length, low=0, strict=True)
        check_number("slowdown.together", self.together, low=0, most=1)


@dataclass(frozen=True)
class Failures:
    """Independent failures of machines, exponentially distributed; waiting requests are lost.

    Args:
        share: The share of the time that a machine is down; 0 for never.
        length: The mean length of a failure, in mean service times.
        detection: The time to detect that a request is lost, in mean service times.
        mtbf: Mean time between a machine's breakdowns, in hours; too rare to affect latency quantiles.
        mttr: Mean time to repair it, in hours.
    """

    share: float = 0.0
    length: float = 1000.0
    detection: float = 1.0
    mtbf: float = 720.0
    mttr: float = 1.0

    def __post_init__(self) -> None:
        check_number("failures.share", self.share, low=0, high=1)
        check_number("failures.length", self.length, low=0, strict=True)
        check_number("failures.detection", self.detection, low=0)
        check_number("failures.mtbf", self.mtbf, low=0, strict=True)
        check_number("failures.mttr", self.mttr, low=0)

    @property
    def broken(self) -> float:
        """The share of the time that a machine is broken down."""
        return self.mttr / (self.mtbf + self.mttr)


@dataclass(frozen=True)
class FrontEndCost:
    """The front end's own time; the defaults were measured with ``coin serve`` on loopback, on two cores in all.

    Args:
        seconds: The front end's processing time of one query.
        hop: The round-trip time of a request to a server, in seconds.
        processes: The number of front ends; by default enough to keep each less than half busy.
    """

    seconds: float = 0.01
    hop: float = 0.005
    processes: int | None = None

    def __post_init__(self) -> None:
        check_number("front_end.seconds", self.seconds, low=0)
        check_number("front_end.hop", self.hop, low=0)
        check_integer("front_end.processes", 1 if self.processes is None else self.processes, 1)

    def entries(self, arrivals: NDArray[np.float64], rate: float) -> list[float]:
        """Return when the front ends have read queries that arrive at these times and at this rate."""
        free = [0.0] * (self.processes or max(1, math.ceil(2 * rate * self.seconds)))
        done = []
        for arrival in arrivals.tolist():
            done.append(max(heapq.heappop(free), arrival) + self.seconds)
            heapq.heappush(free, done[-1])
        return done


@dataclass(frozen=True)
class Conditions:
    """The properties of machines and front end, independent of the networks.

    Args:
        service: The servers' service time; `front_end`: the front end's own time.
        slowdown: Slow phases of machines; `failures`: their failures.
        batch: The largest number of inputs per batch.
        deadline: The time after which a query fails, in mean service times.
        queue: The largest number of requests waiting for one server.
        cooldown: The time between probes of a server that is considered down, in mean service times.
    """

    service: Service = Service()
    slowdown: Slowdown = Slowdown()
    failures: Failures = Failures()
    front_end: FrontEndCost = FrontEndCost()
    batch: int = 8
    deadline: float = 1000.0
    queue: int = 256
    cooldown: float = 100.0

    def __post_init__(self) -> None:
        for name in ("batch", "deadline", "queue", "cooldown"):
            check_number(name, getattr(self, name), low=0, strict=True)

    def capacity(self, unit: float) -> float:
        """Return a server's capacity in queries per second without batching, slow phases and failures included."""
        slow, down = self.slowdown, self.failures
        speed = (1 - slow.share + slow.share / slow.factor) * (1 - down.share)
        return speed / (unit * (1 + self.service.tail))

    def service_times(self, samples: NDArray[np.float64], draw: np.random.Generator) -> Iterator[float]:
        """Yield a server's seconds for one input without slow phases, from measured times ``[K]`` or their mean."""
        mean, kind, tail = float(samples.mean()), self.service.kind, self.service.tail
        while True:
            times = draw.choice(samples, _CHUNK) if kind is ServiceKind.measured else np.full(_CHUNK, mean)
            times = draw.exponential(mean, _CHUNK) if kind is ServiceKind.exponential else times
            yield from (times + draw.exponential(mean * tail, _CHUNK) if tail > 0 else times).tolist()

    def slow_phases(self, machine: int, seed: int, unit: float) -> tuple[Iterator[float], Iterator[float]]:
        """Return the times at which a machine, and all together, turn slow and well again, in turn."""
        shared, length = self.slowdown.share * self.slowdown.together, self.slowdown.length * unit
        own = (self.slowdown.share - shared) / (1 - shared)
        alone, together = (random.Random(f"slow {seed} {each}") for each in (machine, "together"))
        return phases(own, length, alone), phases(shared, length, together)

    def down_phases(self, machine: int, seed: int, unit: float) -> Iterator[float]:
        """Return the times at which a machine fails and comes back, in turn."""
        return phases(self.failures.share, self.failures.length * unit, random.Random(f"down {seed} {machine}"))


def poisson_arrivals(rate: float, count: int, seed: int) -> NDArray[np.float64]:
    """Return the arrival times of a Poisson process of this rate ``[count]``, in seconds."""
    return np.random.default_rng([seed, 0]).exponential(1 / rate, count).cumsum()


def phases(share: float, length: float, draw: random.Random) -> Iterator[float]:
    """Yield the times at which exponential phases begin and end, in turn; the first may begin at time 0."""
    if share == 0:
        return
    between = length * (1 - share) / share
    now = 0.0 if draw.random() < share else draw.expovariate(1 / between)
    while True:
        yield now
        now += draw.expovariate(1 / length)
        yield now
        now += draw.expovariate(1 / between)


class Phase:
    """Returns whether a phase is on; call it with ascending times."""

    def __init__(self, turns: Iterator[float]) -> None:
        self._turns, self._on, self._next = turns, False, next(turns, float("inf"))

    def is_on(self, now: float) -> bool:
        """Return whether the phase is on at a time."""
        while now >= self._next:
            self._on, self._next = not self._on, next(self._turns)
        return self._on
