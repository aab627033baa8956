"""One query on its way: who was asked, who answered, and what that amounts to. No clock, no data."""

from enum import IntEnum

from coin.serving.layout import Layout, members
from coin.serving.policies import Lateness, Load, Policy, Whom


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
        lateness: Learns how long own answers take, if anything does.
        patient: Whether to wait for own answers until `become_late`. Not where a wanted expert's last answer failed:
            a query that tries such a server does not wait for it.
    """

    def __init__(
        self, layout: Layout, policy: Policy, wanted: int, lateness: Lateness | None = None, patient: bool = True
    ) -> None:
        self.layout, self.asks, self.wanted, self.lateness, self.late = (
            layout,
            policy.asks,
            wanted,
            lateness,
            not patient,
        )
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
        """The wanted experts whose own answers are not there."""
        return self.wanted & ~self.layout.read(self.arrived)[0]

    @property
    def waits_for_own(self) -> bool:
        """Whether a wanted expert's own answer is missing and may still come."""
        return bool(self.layout.hosts(self.missing) & self.expected)

    def start(self, load: Load, down: int = 0) -> int:
        """Return the servers to ask at first.

        Args:
            load: Returns the number of requests at a server, now and later on.
            down: Servers that are believed to be down; they are left out if the others suffice.
        """
        self.load = load
        if self.layout.covers(self.layout.everyone & ~down, self.wanted):
            self.avoided = down
        self._ask(self.asks.first, self.wanted)
        self._ask(self.asks.lost, self._deserted())
        if self.late:
            self._ask(self.asks.late, self.wanted)
        return self.asked or self._last_resort()

    def arrive(self, server: int) -> int:
        """Note a server's valid answer; return the servers to ask now."""
        self.arrived |= 1 << server
        return self._settle()

    def lose(self, server: int) -> int:
        """Note that a server will not answer this query; return the servers to ask now."""
        self.lost |= 1 << server
        if not self.layout.covers(self.layout.everyone & ~self.lost, self.wanted):
            self.state = State.failed
            return 0
        return self._ask(self.asks.lost, self._deserted()) | self._settle()

    def become_late(self) -> int:
        """Stop to wait for own answers; return the servers to ask now."""
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
        """The missing experts for whom nobody is expected to answer himself."""
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
        """Ask everybody who is left, whatever the policy and whoever is believed to be down."""
        chosen = self.layout.everyone & ~(self.asked | self.lost)
        self.asked |= chosen
        return chosen
