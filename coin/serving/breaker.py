"""Which servers are believed to be down."""

from coin.errors import ConfigurationError


class Breaker:
    """Believes a server to be down after several failures on end, and lets a query try it again now and then.

    Args:
        failures: So many failures without an answer in between.
        cooldown: Seconds from one try to the next.

    Raises:
        ConfigurationError: An option is out of its range.
    """

    def __init__(self, failures: int = 3, cooldown: float = 1.0) -> None:
        if failures < 1 or cooldown <= 0:
            raise ConfigurationError(
                f"found failures={failures}, cooldown={cooldown} of a breaker, expected at least 1 and a positive time"
            )
        self.failures = failures
        self.cooldown = cooldown
        self._count = 0
        self._closed_until = 0.0

    @property
    def is_down(self) -> bool:
        """Whether the server is believed to be down."""
        return self._count >= self.failures

    @property
    def is_doubted(self) -> bool:
        """Whether the last that was heard of the server is a failure: nobody should wait for it alone."""
        return self._count > 0

    def succeed(self) -> None:
        """Note an answer."""
        self._count = 0

    def fail(self, now: float) -> None:
        """Note a failure."""
        self._count += 1
        self._closed_until = now + self.cooldown

    def refuses(self, now: float) -> bool:
        """Whether a query should do without the server; after the cooldown, one query is let through."""
        if self._count < self.failures:
            return False
        if now < self._closed_until:
            return True
        self._closed_until = now + self.cooldown
        return False
