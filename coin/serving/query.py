"""One query on its way: who was asked, who answered, and what that amounts to. No clock, no data."""

from collections.abc import Sequence
from enum import IntEnum

from coin.serving.layout import Layout
from coin.serving.policies import Policy


class State(IntEnum):
    """How a query stands."""

    pending = 0
    answered = 1
    failed = 2


class Query:
    """The state of one query. Whoever drives it tells what happens and asks the servers that it returns.

    The query is answered as soon as the own answers of all wanted experts are there, or, once it is late or no own
    answer that is missing can come any more, as soon as the missing ones can be decoded. It has failed as soon as the
    servers that are left cannot answer it. While it is pending, at least one server that was asked is expected to
    answer, provided that every returned server is asked or declared lost.

    Args:
        layout: The servers.
        policy: Decides whom to ask.
        wanted: The experts whose answers are wanted.
        patient: Whether to wait for own answers until `become_late`. Not where a wanted expert's last answer failed:
            a query that tries such a server does not wait for it.
    """

    def __init__(self, layout: Layout, policy: Policy, wanted: int, patient: bool = True) -> None:
        self.layout = layout
        self.policy = policy
        self.wanted = wanted
        self.late = not patient
        self.loads: Sequence[int] = ()
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
        """The wanted experts whose own answers are not there."""
        return self.wanted & ~self.layout.read(self.arrived)[0]

    @property
    def waits_for_own(self) -> bool:
        """Whether a wanted expert's own answer is missing and may still come."""
        return bool(self.layout.hosts(self.missing) & self.expected)

    def start(self, loads: Sequence[int], down: int = 0) -> int:
        """Return the servers to ask at first.

        Args:
            loads: The number of requests at each server, now and later on.
            down: Servers that are believed to be down; they are left out if the others suffice.
        """
        layout = self.layout
        self.loads = loads
        usable = layout.everyone & ~down
        if down and not layout.covers(usable, self.wanted):
            usable = layout.everyone
        self.avoided = layout.everyone & ~usable
        chosen = self.policy.first(layout, self.wanted, usable, loads)
        if self.late:
            chosen |= self.policy.when_late(layout, usable & ~chosen, self.wanted, loads)
        self.asked = chosen
        return chosen or self._last_resort()

    def arrive(self, server: int) -> int:
        """Note a server's valid answer; return the servers to ask now."""
        self.arrived |= 1 << server
        return self._settle()

    def lose(self, server: int) -> int:
        """Note that a server will not answer this query; return the servers to ask now."""
        self.lost |= 1 << server
        layout = self.layout
        if not layout.covers(layout.everyone & ~self.lost, self.wanted):
            self.state = State.failed
            return 0
        chosen = self.policy.after_loss(layout, self._left(), self.missing, self.expected, self.loads)
        self.asked |= chosen
        return chosen | self._settle()

    def become_late(self) -> int:
        """Stop to wait for own answers; return the servers to ask now."""
        self.late = True
        chosen = self.policy.when_late(self.layout, self._left(), self.missing, self.loads)
        self.asked |= chosen
        return chosen | self._settle()

    def _left(self) -> int:
        return self.layout.everyone & ~(self.asked | self.lost | self.avoided)

    def _settle(self) -> int:
        layout = self.layout
        own, decodable = layout.read(self.arrived)
        missing = self.wanted & ~own
        expected = self.expected
        if not missing or (decodable and (self.late or not layout.hosts(missing) & expected)):
            self.state = State.answered
            self.decoded = missing
            return 0
        return 0 if expected else self._last_resort()

    def _last_resort(self) -> int:
        """Ask everybody who is left, whatever the policy and whoever is believed to be down."""
        chosen = self.layout.everyone & ~(self.asked | self.lost)
        self.asked |= chosen
        return chosen
