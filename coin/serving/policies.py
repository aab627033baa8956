"""Whom a query asks and when: decisions alone, shared by the front end and by the simulation."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from coin.errors import ConfigurationError
from coin.serving.layout import Layout, members


class PolicyKind(StrEnum):
    """Whom a query asks and when."""

    uncoded = "uncoded"
    """Only the expert itself: of its servers, the one with the fewest requests. Copies share the load."""
    replicated = "replicated"
    """All servers of the expert at once; the first answer counts."""
    coded_proactive = "coded_proactive"
    """All servers at once, coded models too; an expert that is late is decoded from the others."""
    coded_hedged = "coded_hedged"
    """The expert; the other servers are asked only when it is late or lost."""


@dataclass(frozen=True)
class Policy(ABC):
    """Decides which servers a query asks: at first, when its own servers are late, and after a loss.

    Args:
        quantile: How often an expert's own answer shall come in time: it is late when it is not there after this
            quantile of the time that own answers take (`coin.serving.lateness.Lateness`). 0 waits for nobody: decoded
            as soon as the answers suffice. Only for the coded policies.

    Raises:
        ConfigurationError: The quantile is outside [0, 1).
    """

    quantile: float = 0.9

    kind: ClassVar[PolicyKind]
    coded: ClassVar[bool] = False
    """Whether the extra servers are coded models rather than copies."""

    def __post_init__(self) -> None:
        if not 0 <= self.quantile < 1:
            raise ConfigurationError(f"found quantile={self.quantile}, expected a number from 0 to below 1")

    @abstractmethod
    def first(self, layout: Layout, wanted: int, usable: int, loads: Sequence[int]) -> int:
        """Return the servers to ask at once.

        Args:
            layout: The servers.
            wanted: The experts whose answers are wanted.
            usable: The servers that are believed to be up.
            loads: The number of requests at each server.
        """

    def when_late(self, layout: Layout, left: int) -> int:
        """Return the servers to ask when an own answer is late.

        Args:
            layout: The servers.
            left: The servers that have not been asked yet and are believed to be up.
        """
        return 0

    def after_loss(self, layout: Layout, left: int, missing: int, expected: int) -> int:
        """Return the servers to ask after a server is lost.

        Args:
            layout: The servers.
            left: The servers that have not been asked yet and are believed to be up.
            missing: The wanted experts without an answer.
            expected: The servers that have been asked and may still answer.
        """
        chosen = 0
        for expert in members(missing):
            hosts = layout.hosts(1 << expert)
            if not hosts & expected:
                another = hosts & left
                chosen |= another & -another
        return chosen


class Uncoded(Policy):
    """See `PolicyKind.uncoded`."""

    kind = PolicyKind.uncoded

    def first(self, layout: Layout, wanted: int, usable: int, loads: Sequence[int]) -> int:
        """Return the least loaded server of every wanted expert."""
        if not layout.copies:
            return wanted & usable
        chosen = 0
        for expert in members(wanted):
            hosts = list(members(layout.hosts(1 << expert) & usable))
            if hosts:
                chosen |= 1 << min(hosts, key=loads.__getitem__)
        return chosen


class Replicated(Policy):
    """See `PolicyKind.replicated`."""

    kind = PolicyKind.replicated

    def first(self, layout: Layout, wanted: int, usable: int, loads: Sequence[int]) -> int:
        """Return all servers of the wanted experts."""
        return layout.hosts(wanted) & usable


class CodedProactive(Policy):
    """See `PolicyKind.coded_proactive`."""

    kind = PolicyKind.coded_proactive
    coded = True

    def first(self, layout: Layout, wanted: int, usable: int, loads: Sequence[int]) -> int:
        """Return all servers."""
        return usable

    def after_loss(self, layout: Layout, left: int, missing: int, expected: int) -> int:
        """Return all others."""
        return left


class CodedHedged(Policy):
    """See `PolicyKind.coded_hedged`."""

    kind = PolicyKind.coded_hedged
    coded = True

    def first(self, layout: Layout, wanted: int, usable: int, loads: Sequence[int]) -> int:
        """Return the wanted experts' servers; all servers where one of those is known to be down."""
        own = layout.hosts(wanted) & usable
        return own if not wanted & ~layout.read(own)[0] else usable

    def when_late(self, layout: Layout, left: int) -> int:
        """Return all others."""
        return left

    def after_loss(self, layout: Layout, left: int, missing: int, expected: int) -> int:
        """Return all others."""
        return left


_POLICIES: dict[PolicyKind, type[Policy]] = {
    policy.kind: policy for policy in (Uncoded, Replicated, CodedProactive, CodedHedged)
}


def make_policy(kind: PolicyKind | str, quantile: float = 0.9) -> Policy:
    """Return a policy by its name.

    Raises:
        ConfigurationError: There is no such policy, or the quantile is outside [0, 1).
    """
    try:
        return _POLICIES[PolicyKind(kind)](quantile)
    except ValueError as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"found policy '{kind}', expected one of {', '.join(PolicyKind)}") from error
