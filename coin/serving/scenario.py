"""What servers are like in a simulation: how long they take, when they are slow, when they fail."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from coin.errors import ConfigurationError


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
    """The time that a server takes for one query while nothing is wrong with it.

    Args:
        kind: The distribution.
        seconds: Its mean; measured where it is not given.
        tail: The mean of an exponential time on top, in multiples of `seconds`: together with ``deterministic`` the
            shifted exponential distribution.

    Raises:
        ConfigurationError: An option is out of its range or does not apply.
    """

    kind: ServiceKind = ServiceKind.measured
    seconds: float | None = None
    tail: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", ServiceKind(self.kind))
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigurationError(f"found service.seconds={self.seconds}, expected a positive time")
        if self.seconds is not None and self.kind is ServiceKind.measured:
            raise ConfigurationError(f"found service.seconds={self.seconds} for measured times; leave it, or set kind")
        if not self.tail >= 0:
            raise ConfigurationError(f"found service.tail={self.tail}, expected at least 0")


@dataclass(frozen=True)
class Slowdown:
    """Random servers are slow for a while, each on its own: exponential phases, on and off.

    Args:
        share: The share of the time that a server is slow; 0 for never.
        factor: By how much longer a service takes that begins in a slow phase.
        length: The mean length of a slow phase, in mean service times.

    Raises:
        ConfigurationError: An option is out of its range.
    """

    share: float = 0.0
    factor: float = 5.0
    length: float = 100.0

    def __post_init__(self) -> None:
        if not (0 <= self.share < 1 and self.factor >= 1 and self.length > 0):
            raise ConfigurationError(
                f"found slowdown share={self.share}, factor={self.factor}, length={self.length}; expected a share from "
                "0 to below 1, a factor of at least 1 and a positive length"
            )


@dataclass(frozen=True)
class Failures:
    """Servers fail altogether and come back, each on its own: exponential times, in mean service times.

    Args:
        share: The share of the time that a server is down; 0 for never.
        length: How long it is down, on average. What it was working on and what waited for it is lost.
        detection: How long it takes to find out that a request to it is lost.

    Raises:
        ConfigurationError: An option is out of its range.
    """

    share: float = 0.0
    length: float = 1000.0
    detection: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.share < 1 and self.length > 0 and self.detection >= 0):
            raise ConfigurationError(
                f"found failures share={self.share}, length={self.length}, detection={self.detection}; expected a "
                "share from 0 to below 1, a positive length and a detection time of at least 0"
            )


@dataclass(frozen=True)
class Scenario:
    """Servers and their troubles.

    Args:
        samples: For every server, measured service times in seconds ``[K]``; or one number, the mean.
        service: Their distribution.
        slowdown: Slow phases.
        failures: Failures.
        mean: The mean service time that loads and phases refer to, in seconds; none takes that of all servers.
    """

    samples: tuple[NDArray[np.float64], ...]
    service: Service = Service()
    slowdown: Slowdown = Slowdown()
    failures: Failures = Failures()
    mean: float | None = None

    @property
    def unit(self) -> float:
        """The mean service time that loads and phases refer to, without the tail, in seconds."""
        return float(np.mean([each.mean() for each in self.samples])) if self.mean is None else self.mean

    @property
    def capacity(self) -> float:
        """Queries a second that a server can do in the long run, slow phases and failures taken off."""
        slow, down = self.slowdown, self.failures
        speed = (1 - slow.share + slow.share / slow.factor) * (1 - down.share)
        return speed / (self.unit * (1 + self.service.tail))

    def service_times(self, server: int, seed: int) -> Iterator[float]:
        """Yield the service times of one server in seconds, without slow phases."""
        draw = np.random.default_rng([seed, 1, server])
        samples = self.samples[server]
        mean, tail = float(samples.mean()), self.service.tail
        while True:
            if self.service.kind is ServiceKind.measured:
                times = draw.choice(samples, _CHUNK)
            elif self.service.kind is ServiceKind.exponential:
                times = draw.exponential(mean, _CHUNK)
            else:
                times = np.full(_CHUNK, mean)
            if tail > 0:
                times = times + draw.exponential(mean * tail, _CHUNK)
            yield from times.tolist()

    def slow_phases(self, server: int, seed: int) -> Iterator[float]:
        """Yield the times at which a server turns slow and well again, in turn; it may begin with time 0."""
        return _phases(self.slowdown.share, self.slowdown.length * self.unit, random.Random(f"slow {seed} {server}"))

    def down_phases(self, server: int, seed: int) -> Iterator[float]:
        """Yield the times at which a server fails and comes back, in turn."""
        return _phases(self.failures.share, self.failures.length * self.unit, random.Random(f"down {seed} {server}"))


def uniform_samples(seconds: float, servers: int) -> tuple[NDArray[np.float64], ...]:
    """Return samples of servers that all take this mean time."""
    return (np.array([seconds]),) * servers


def poisson_arrivals(rate: float, count: int, seed: int) -> NDArray[np.float64]:
    """Return the arrival times of a Poisson process of this rate ``[count]``, in seconds."""
    return np.random.default_rng([seed, 0]).exponential(1 / rate, count).cumsum()


def _phases(share: float, length: float, draw: random.Random) -> Iterator[float]:
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


def check_samples(samples: Sequence[NDArray[np.float64]], servers: int) -> None:
    """Raise a `ConfigurationError` unless there are positive times for so many servers."""
    if len(samples) != servers or not all(len(each) and bool((each > 0).all()) for each in samples):
        raise ConfigurationError(f"found service times of {len(samples)} servers, expected positive ones of {servers}")
