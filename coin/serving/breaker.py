"""Which servers are believed to be down."""

from coin.errors import ConfigurationError


class Breaker:
    """Believes a server to be down after several failures on end, until it has answered.

    Queries only look; that a server is tried again, and when, is its queue's business (`coin.serving.server_queue`).

    Args:
        failures: So many failures without an answer in between.

    Raises:
        ConfigurationError: That is less than one.
    """

    def __init__(self, failures: int = 3) -> None:
        if failures < 1:
            raise ConfigurationError(f"found failures={failures} of a breaker, expected at least 1")
        self.failures = failures
        self._count = 0

    @property
    def is_down(self) -> bool:
        """Whether the server is believed to be down: queries do without it if they can."""
        return self._count >= self.failures

    @property
    def is_doubted(self) -> bool:
        """Whether the last that was heard of the server is a failure: nobody should wait for it alone."""
        return self._count > 0

    def succeed(self) -> None:
        """Note an answer."""
        self._count = 0

    def fail(self) -> None:
        """Note a failure."""
        self._count += 1
