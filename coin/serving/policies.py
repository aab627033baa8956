"""Whom a query asks, and from when on an answer is late: shared by the front end and the simulation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from coin.choices import check_number, chosen
from coin.serving.layout import Layout, members

Load = Callable[[int], int]
"""Returns the number of requests at a server."""


class PolicyKind(StrEnum):
    """Whom a query asks and when."""

    uncoded = "uncoded"
    """Only the expert itself: of its servers, the one with the fewest requests. Copies share the load."""
    replicated = "replicated"
    """All servers of the expert at once; the first answer counts."""
    hedged = "hedged"
    """The expert's own server; another one that holds it is asked when that is late or lost."""
    standin = "standin"
    """The expert; when it is late or lost, the coded server that makes up for it alone, and no other expert."""
    coded_hedged = "coded_hedged"
    """The expert; the other servers are asked only when it is late or lost."""
    coded_proactive = "coded_proactive"
    """All servers at once, coded models too; an expert that is late is decoded from the others."""


Whom = Callable[[Layout, int, int, Load], int]
"""Returns whom to ask for these experts, of these servers."""


def _host(layout: Layout, experts: int, servers: int, load: Load) -> int:
    """For each expert the least loaded of the servers that hold it."""
    hosts = (list(members(layout.hosts(1 << expert) & servers)) for expert in members(experts))
    return sum(1 << min(each, key=load) for each in hosts if each)


_NOBODY: Whom = lambda layout, experts, servers, load: 0  # noqa: E731
_OWN: Whom = lambda layout, experts, servers, load: experts & servers  # noqa: E731
_HOSTS: Whom = lambda layout, experts, servers, load: layout.hosts(experts) & servers  # noqa: E731
_STANDINS: Whom = lambda layout, experts, servers, load: layout.standins(experts) & servers  # noqa: E731
_EVERYONE: Whom = lambda layout, experts, servers, load: servers if experts else 0  # noqa: E731


class Asks(NamedTuple):
    """Whom a policy asks."""

    first: Whom
    """For all wanted experts, at once."""
    late: Whom
    """For those without an answer, when an own answer is late."""
    lost: Whom
    """For those whose own answer nobody who was asked can give, or can give any more."""


POLICIES = {
    PolicyKind.uncoded: Asks(first=_host, late=_NOBODY, lost=_host),
    PolicyKind.replicated: Asks(first=_HOSTS, late=_NOBODY, lost=_host),
    PolicyKind.hedged: Asks(first=_OWN, late=_host, lost=_host),
    PolicyKind.standin: Asks(first=_OWN, late=_STANDINS, lost=_STANDINS),
    PolicyKind.coded_hedged: Asks(first=_OWN, late=_EVERYONE, lost=_EVERYONE),
    PolicyKind.coded_proactive: Asks(first=_EVERYONE, late=_EVERYONE, lost=_EVERYONE),
}


@dataclass(frozen=True)
class Policy:
    """Decides which servers a query asks: at first, when its own servers are late, and after a loss.

    Args:
        kind: Whom it asks and when.
        quantile: How often an expert's own answer shall come in time: it is late when it is not there after this
            quantile of the time that own answers take (`Lateness`). 0 waits for nobody. Only for the policies that
            hedge.
    """

    kind: PolicyKind
    quantile: float = 0.9

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", chosen(PolicyKind, "policy", self.kind))
        check_number("quantile", self.quantile, low=0, high=1)

    @property
    def asks(self) -> Asks:
        """Whom it asks."""
        return POLICIES[self.kind]

    @property
    def coded(self) -> bool:
        """Whether the extra servers are coded models rather than copies."""
        return self.kind in (PolicyKind.coded_proactive, PolicyKind.coded_hedged, PolicyKind.standin)

    @property
    def hedges(self) -> bool:
        """Whether an own answer that is late is given up."""
        return self.asks.late is not _NOBODY


class Lateness:
    """The time after which a share of 1 − q of the queries are late.

    ln t rises by g·q when a query is late and falls by g·(1 − q) when its own answer came in time, so that in the long
    run exactly the share 1 − q is late, whatever the distribution. All it needs to know of a query is whether it was
    late, which is known however the query ends: answers that are never waited for bias nothing. The gain g falls from
    1 as 20/(20 + k) to 0.005.

    Source: Robbins and Monro, *A stochastic approximation method* (1951), section 4, on quantiles; on a logarithmic
    scale, so that it works in any unit.

    Args:
        quantile: q in [0, 1); with 0 every answer that is not there at once is late.
        initial: t at first, in seconds.
        longest: The largest t, in seconds.
        experience: From how many queries t is known already.
    """

    def __init__(self, quantile: float, initial: float, longest: float = math.inf, experience: int = 0) -> None:
        self.quantile = quantile
        self.longest = longest
        self._seconds = min(initial, longest)
        self._count = experience

    @property
    def seconds(self) -> float:
        """From when on an answer is late."""
        return self._seconds if self.quantile > 0 else 0.0

    def observe(self, late: bool) -> None:
        """Learn whether a query's own answer was late."""
        self._count += 1
        gain = max(0.005, 20.0 / (20.0 + self._count))
        change = self.quantile if late else self.quantile - 1.0
        self._seconds = min(self._seconds * math.exp(gain * change), self.longest)
