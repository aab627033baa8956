"""One simulation of serving: what is simulated, and what comes of it."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from coin.errors import ConfigurationError
from coin.serving.layout import Layout
from coin.serving.policies import Policy
from coin.serving.sim.scenario import Conditions, require

_FEWEST = 28
"""Queries: a quarter of them warms the system up, and intervals want 20 at least."""


class Want(StrEnum):
    """Whose answers a query wants."""

    one = "one"
    """One expert's, drawn at random: the experts serve different users."""
    all = "all"
    """Every expert's: the experts look at the same input."""


@dataclass(frozen=True)
class Case:
    """One simulation.

    Args:
        layout: The servers.
        policy: Decides whom to ask.
        samples: For every server, measured service times in seconds ``[K]``, or their mean ``[1]``.
        conditions: What machines and the front end are like.
        load: The share of the experts' capacity that own answers alone take up, one at a time, in (0, 1).
        machines: Every server's machine, which runs one batch at a time; none gives each server one of its own.
        want: Whose answers a query wants.
        queries: How many, the first quarter included, which warms the system up and is not reported.
        seed: Of everything random. Cases that differ in their policy alone see the same queries and phases.
        decoding: Seconds that it takes to decode.

    Raises:
        ConfigurationError: An option is out of its range.
    """

    layout: Layout
    policy: Policy
    samples: tuple[NDArray[np.float64], ...]
    conditions: Conditions
    load: float
    machines: tuple[int, ...] = ()
    want: Want = Want.one
    queries: int = 20_000
    seed: int = 0
    decoding: float = 0.0

    def __post_init__(self) -> None:
        require(0 < self.load < 1, f"load {self.load}", "a number between 0 and 1")
        require(self.queries >= _FEWEST, f"{self.queries} queries", f"at least {_FEWEST}")
        servers = self.layout.num_servers
        if len(self.samples) != servers or not all(len(each) and bool((each > 0).all()) for each in self.samples):
            raise ConfigurationError(
                f"found service times of {len(self.samples)} servers, expected positive ones of {servers}"
            )
        if not self.machines:
            object.__setattr__(self, "machines", tuple(range(servers)))

    @property
    def unit(self) -> float:
        """The experts' mean service time without the tail, in seconds: loads and phases refer to it."""
        return float(np.mean([each.mean() for each in self.samples[: self.layout.num_experts]]))

    @property
    def rate(self) -> float:
        """Queries a second."""
        forwards = self.layout.num_experts if self.want is Want.all else 1
        return self.load * self.conditions.capacity(self.unit) * self.layout.num_experts / forwards


@dataclass(frozen=True)
class Outcome:
    """What came of the queries of one simulation, in the order of their arrival, without the warm-up ones.

    Attributes:
        latencies: Seconds from arrival to answer ``[Q]``; infinity for a query that failed.
        decoded: By number of missing experts, how many answers were decoded.
        spared: How many answers came from copies and spares.
        answers: How many answers were wanted.
        failed: How many of those the failed queries had wanted.
        forwards: Inputs that servers have begun with, per query.
        utilisation: The share of the time that machines were busy, mean over machines.
    """

    latencies: NDArray[np.float64]
    decoded: dict[int, int]
    spared: int
    answers: int
    failed: int
    forwards: float
    utilisation: float
