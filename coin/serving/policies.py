"""Which servers a query asks and when, and when it is answered: shared by front end and simulation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple

from coin.core.choices import check_number, parse_enum
from coin.serving.layout import Layout, members

Load = Callable[[int], int]
"""Returns the number of requests at a server."""


class PolicyKind(StrEnum):
    """Which servers a query asks, and when."""

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
    """For each expert the least loaded server that holds it."""
    hosts = (members(layout.hosts(1 << expert) & servers) for expert in members(experts))
    return sum(1 << min(each, key=load) for each in hosts if each)


_NOBODY: Whom = lambda layout, experts, servers, load: 0  # noqa: E731
_OWN: Whom = lambda layout, experts, servers, load: experts & servers  # noqa: E731
_HOSTS: Whom = lambda layout, experts, servers, load: layout.hosts(experts) & servers  # noqa: E731
_STANDINS: Whom = lambda layout, experts, servers, load: layout.standins(experts) & servers  # noqa: E731
_EVERYONE: Whom = lambda layout, experts, servers, load: servers if experts else 0  # noqa: E731


class Asks(NamedTuple):
    """The servers to ask at first, when an answer is late, and for experts that no asked server can answer."""

    first: Whom
    late: Whom
    lost: Whom


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

    An own answer is late after the `quantile` of own answers' time (`Lateness`); 0 does not wait. Only for policies
    that hedge.
    """

    kind: PolicyKind
    quantile: float = 0.9

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", parse_enum(PolicyKind, "policy", self.kind))
        check_number("quantile", self.quantile, low=0, high=1)

    @property
    def asks(self) -> Asks:
        """The servers that it asks."""
        return POLICIES[self.kind]

    @property
    def coded(self) -> bool:
        """Whether the extra servers are coded models rather than copies."""
        return self.asks.late in (_STANDINS, _EVERYONE)

    @property
    def hedges(self) -> bool:
        """Whether an own answer that is late is given up."""
        return self.asks.late is not _NOBODY


class Lateness:
    """The time after which a share of 1 − q of the queries are late.

    ln t rises by g·q when a query is late and falls by g·(1 − q) when its own answer came in time, so that in the long
    run the share 1 − q is late for any distribution, and answers that were not waited for cause no bias. The gain g
    falls from 1 as 20/(20 + k) to 0.005. Source: Robbins and Monro, *A stochastic approximation method* (1951), section
    4, on quantiles; on a logarithmic scale, so that it works in any unit.

    Args:
        quantile: q in [0, 1); with 0 every answer that is not immediate is late.
        initial: t at first, in seconds; `longest`, the largest t.
        experience: The number of queries from which `initial` was estimated.
    """

    def __init__(self, quantile: float, initial: float, longest: float = math.inf, experience: int = 0) -> None:
        self.quantile, self.longest, self._seconds, self._count = quantile, longest, min(initial, longest), experience

    @property
    def seconds(self) -> float:
        """Seconds after which an answer is late."""
        return self._seconds if self.quantile > 0 else 0.0

    def observe(self, late: bool) -> None:
        """Update the estimate with whether a query's own answer was late."""
        self._count += 1
        gain = max(0.005, 20.0 / (20.0 + self._count))
        change = self.quantile if late else self.quantile - 1.0
        self._seconds = min(self._seconds * math.exp(gain * change), self.longest)


State = IntEnum("State", ["pending", "answered", "failed"])
"""How a query stands."""


class Query:
    """The state of one query, without clock or data: the caller reports events, and asks the servers that are returned.

    The query is answered when all wanted experts' own answers have arrived or, once it is late or the missing own
    answers cannot arrive any more, when these can be decoded. It fails when the remaining servers cannot answer it.
    While it is pending, at least one asked server is expected to answer, provided that every returned server is asked
    or declared lost.

    Args:
        layout: The servers, asked by the `policy`.
        wanted: The experts whose answers are wanted; `lateness`, the estimate of own answers' time, or None.
        patient: Whether to wait for own answers until `become_late`; not if a wanted expert's last answer failed.
    """

    def __init__(
        self, layout: Layout, policy: Policy, wanted: int, lateness: Lateness | None = None, patient: bool = True
    ) -> None:
        self.layout, self.asks, self.wanted = layout, policy.asks, wanted
        self.lateness, self.late = lateness, not patient
        self.load: Load = lambda server: 0
        self.asked = self.arrived = self.lost = self.avoided = 0
        self.decoded = 0
        """The wanted experts whose answers are to be decoded, once the query is answered."""
        self.state = State.pending

    @property
    def expected(self) -> int:
        """The servers that have been asked and may still answer."""
        return self.asked & ~(self.arrived | self.lost)

    @property
    def missing(self) -> int:
        """The wanted experts whose own answers have not arrived."""
        return self.wanted & ~self.layout.read(self.arrived)[0]

    @property
    def waits_for_own(self) -> bool:
        """Whether a wanted expert's own answer is missing and may still arrive."""
        return bool(self.layout.hosts(self.missing) & self.expected)

    def start(self, load: Load, down: int = 0) -> int:
        """Return the servers to ask at first, without those considered down if the others suffice."""
        self.load = load
        if self.layout.covers(self.layout.everyone & ~down, self.wanted):
            self.avoided = down
        self._ask(self.asks.first, self.wanted)
        self._ask(self.asks.lost, self._deserted())
        if self.late:
            self._ask(self.asks.late, self.wanted)
        return self.asked or self._last_resort()

    def arrive(self, server: int) -> int:
        """Record a server's valid answer; return the servers to ask now."""
        self.arrived |= 1 << server
        return self._settle()

    def lose(self, server: int) -> int:
        """Record that a server will not answer this query; return the servers to ask now."""
        self.lost |= 1 << server
        if not self.layout.covers(self.layout.everyone & ~self.lost, self.wanted):
            self.state = State.failed
            return 0
        return self._ask(self.asks.lost, self._deserted()) | self._settle()

    def become_late(self) -> int:
        """Stop waiting for own answers; return the servers to ask now."""
        if self.lateness and self.waits_for_own:
            self.lateness.observe(True)
        self.late = True
        return self._ask(self.asks.late, self.missing) | self._settle()

    def _ask(self, whom: Whom, experts: int) -> int:
        left = self.layout.everyone & ~(self.asked | self.lost | self.avoided)
        chosen = whom(self.layout, experts, left, self.load)
        self.asked |= chosen
        return chosen

    def _deserted(self) -> int:
        """The missing experts that no asked server is still expected to answer."""
        hosts, expected = self.layout.hosts, self.expected
        return sum(1 << expert for expert in members(self.missing) if not hosts(1 << expert) & expected)

    def _settle(self) -> int:
        own, solved = self.layout.read(self.arrived)
        missing = self.wanted & ~own
        if not missing or (not missing & ~solved and (self.late or not self.waits_for_own)):
            self.state, self.decoded = State.answered, missing
            if self.lateness and not self.late and not missing:
                self.lateness.observe(False)
            return 0
        return 0 if self.expected else self._last_resort()

    def _last_resort(self) -> int:
        """Ask all remaining servers, for any policy, including those considered down."""
        chosen = self.layout.everyone & ~(self.asked | self.lost)
        self.asked |= chosen
        return chosen
