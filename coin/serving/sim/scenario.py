"""What machines are like in a simulation: how long they take, when they are slow, when they fail."""

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from coin.errors import ConfigurationError


def require(fine: bool, found: object, expected: str) -> None:
    """Raise a `ConfigurationError` unless all is fine."""
    if not fine:
        raise ConfigurationError(f"found {found}, expected {expected}")


class ServiceKind(StrEnum):
    """How service times are distributed."""

    measured = "measured"
    """As measured on this machine: drawn from the times of the networks themselves."""
    deterministic = "deterministic"
    """All the same."""
    exponential = "exponential"
    """Exponential."""


@dataclass(frozen=True)
class Service:
    """The time that a server takes for a batch while nothing is wrong with it.

    Args:
        kind: The distribution.
        seconds: Its mean for one input; measured where it is not given.
        tail: The mean of an exponential time on top, in multiples of `seconds`.
        marginal: What each further input of a batch takes, as a share of the first; none measures it, or takes 1.

    Raises:
        ConfigurationError: An option is out of its range or does not apply.
    """

    kind: ServiceKind = ServiceKind.measured
    seconds: float | None = None
    tail: float = 0.0
    marginal: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", ServiceKind(self.kind))
        require(self.seconds is None or self.seconds > 0, f"service.seconds={self.seconds}", "a positive time")
        require(
            (self.seconds is None) == (self.kind is ServiceKind.measured),
            f"service.kind={self.kind} with service.seconds={self.seconds}",
            "seconds for a kind that is not measured, and none for measured times",
        )
        require(self.tail >= 0, f"service.tail={self.tail}", "at least 0")
        require(self.marginal is None or self.marginal >= 0, f"service.marginal={self.marginal}", "at least 0")


@dataclass(frozen=True)
class Slowdown:
    """Machines are slow for a while: exponential phases, on and off.

    Args:
        share: The share of the time that a machine is slow; 0 for never.
        factor: By how much longer a service takes that begins in a slow phase.
        length: The mean length of a slow phase, in mean service times.
        together: The share of the slow time in which all machines are slow at once, as on a shared network or host;
            the rest comes to each on its own.

    Raises:
        ConfigurationError: An option is out of its range.
    """

    share: float = 0.0
    factor: float = 5.0
    length: float = 100.0
    together: float = 0.0

    def __post_init__(self) -> None:
        fine = 0 <= self.share < 1 and self.factor >= 1 and self.length > 0 and 0 <= self.together <= 1
        require(fine, self, "a share from 0 to below 1, a factor of at least 1, a positive length, together in [0, 1]")


@dataclass(frozen=True)
class Failures:
    """Machines fail altogether and come back, each on its own: exponential times, in mean service times.

    Args:
        share: The share of the time that a machine is down; 0 for never.
        length: How long it is down, on average. What it was working on and what waited for it is lost.
        detection: How long it takes to find out that a request to it is lost.

    Raises:
        ConfigurationError: An option is out of its range.
    """

    share: float = 0.0
    length: float = 1000.0
    detection: float = 1.0

    def __post_init__(self) -> None:
        fine = 0 <= self.share < 1 and self.length > 0 and self.detection >= 0
        require(fine, self, "a share from 0 to below 1, a positive length and a detection time of at least 0")


@dataclass(frozen=True)
class FrontEndCost:
    """What the front end adds. The defaults are what ``coin serve`` took on loopback, on two cores for everything.

    Args:
        seconds: How long it is busy with one query.
        hop: How long a request to a server takes there and back, in seconds.
        processes: How many front ends share the queries; none takes as many as keep them below half busy.

    Raises:
        ConfigurationError: One of them is out of its range.
    """

    seconds: float = 0.01
    hop: float = 0.005
    processes: int | None = None

    def __post_init__(self) -> None:
        fine = self.seconds >= 0 and self.hop >= 0 and (self.processes is None or self.processes > 0)
        require(fine, self, "no negative time, and at least one process")

    def entries(self, arrivals: NDArray[np.float64], rate: float) -> list[float]:
        """Return when the front ends are done with reading queries that arrive at these times and at this rate."""
        count = max(1, math.ceil(2 * rate * self.seconds)) if self.processes is None else self.processes
        free = [0.0] * count
        done = []
        for arrival in arrivals.tolist():
            done.append(max(heapq.heappop(free), arrival) + self.seconds)
            heapq.heappush(free, done[-1])
        return done


@dataclass(frozen=True)
class Conditions:
    """What machines and the front end are like, whatever they hold.

    Args:
        service: How long a server takes.
        slowdown: Phases in which machines are slow.
        failures: Phases in which machines are down.
        front_end: What the front end adds.
        batch: The most inputs that a server takes together.
        deadline: After how many mean service times a query fails.
        queue: The most requests that wait for one server.
        cooldown: How many mean service times pass between two tries of a server that is believed to be down.

    Raises:
        ConfigurationError: An option is out of its range.
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
        bounds = {name: getattr(self, name) for name in ("batch", "deadline", "queue", "cooldown")}
        require(min(bounds.values()) > 0, bounds, "positive numbers")

    def capacity(self, unit: float) -> float:
        """Return the queries a second that a server can do one at a time in the long run, troubles taken off."""
        slow, down = self.slowdown, self.failures
        speed = (1 - slow.share + slow.share / slow.factor) * (1 - down.share)
        return speed / (unit * (1 + self.service.tail))

    def service_times(self, samples: NDArray[np.float64], draw: np.random.Generator) -> Iterator[float]:
        """Yield a server's seconds for one input without slow phases, by measured ones ``[K]`` or their mean."""
        mean, kind, tail = float(samples.mean()), self.service.kind, self.service.tail
        while True:
            if kind is ServiceKind.measured:
                times = draw.choice(samples, _CHUNK)
            else:
                times = draw.exponential(mean, _CHUNK) if kind is ServiceKind.exponential else np.full(_CHUNK, mean)
            yield from (times + draw.exponential(mean * tail, _CHUNK) if tail > 0 else times).tolist()

    def slow_phases(self, machine: int, seed: int, unit: float) -> tuple[Iterator[float], Iterator[float]]:
        """Return the times at which a machine, and all together, turn slow and well again, in turn."""
        slow = self.slowdown
        shared = slow.share * slow.together
        own, length = (slow.share - shared) / (1 - shared), slow.length * unit
        return (
            phases(own, length, random.Random(f"slow {seed} {machine}")),
            phases(shared, length, random.Random(f"slow {seed} together")),
        )

    def down_phases(self, machine: int, seed: int, unit: float) -> Iterator[float]:
        """Yield the times at which a machine fails and comes back, in turn."""
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


_CHUNK = 4096
