"""One simulation of serving: what is simulated, and what comes of it."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from coin.errors import ConfigurationError
from coin.serving.layout import Layout
from coin.serving.policies import Policy
from coin.serving.scenario import Scenario, check_samples

_FEWEST = 22
"""Queries: a twentieth of them warms the system up, and intervals want 20 at least."""


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
        scenario: How long the servers take.
        load: The share of the experts' capacity that own answers alone take up, in (0, 1): the load of every server
            without copies and coded models. Other policies load their servers more, or less.
        want: Whose answers a query wants.
        queries: How many, the first twentieth included, which warms the system up and is not reported.
        seed: Of everything random. Cases that differ in their policy alone see the same queries and phases.
        decoding: Seconds that it takes to decode.
        deadline: After how many mean service times a query fails.
        queue: The most requests that wait for one server.
        cooldown: After how many mean service times a server is tried again that is believed to be down.

    Raises:
        ConfigurationError: An option is out of its range, or the scenario is for other servers.
    """

    layout: Layout
    policy: Policy
    scenario: Scenario
    load: float
    want: Want = Want.one
    queries: int = 100_000
    seed: int = 0
    decoding: float = 0.0
    deadline: float = 1000.0
    queue: int = 256
    cooldown: float = 100.0

    def __post_init__(self) -> None:
        if not 0 < self.load < 1:
            raise ConfigurationError(f"found load {self.load}, expected a number between 0 and 1")
        if self.queries < _FEWEST:
            raise ConfigurationError(f"found {self.queries} queries, expected at least {_FEWEST}")
        check_samples(self.scenario.samples, self.layout.num_servers)

    @property
    def rate(self) -> float:
        """Queries a second."""
        forwards = self.layout.num_experts if self.want is Want.all else 1
        return self.load * self.scenario.capacity * self.layout.num_experts / forwards


@dataclass(frozen=True)
class Outcome:
    """What came of the queries of one simulation, in the order of their arrival, without the warm-up ones.

    Attributes:
        latencies: Seconds from arrival to answer ``[Q]``; infinity for a query that failed.
        decoded: By number of missing experts, how many answers were decoded.
        answers: How many answers were wanted.
        failed: How many of those the failed queries had wanted.
        forwards: Services begun per query.
        utilisation: The share of the time that servers were busy, mean over servers.
    """

    latencies: NDArray[np.float64]
    decoded: dict[int, int]
    answers: int
    failed: int
    forwards: float
    utilisation: float
