"""What bounds waiting, in the front end and in the simulation."""

from dataclasses import dataclass

from coin.errors import ConfigurationError


@dataclass(frozen=True)
class Limits:
    """What bounds waiting.

    Args:
        deadline: Seconds after which a query fails.
        timeout: Seconds that a server gets for one batch.
        queries: The most queries at a time.
        queue: The most requests that wait for one server.
        batch: The most inputs that are sent to a server together; a query with more is cut, and is not hedged.
        initial_lateness: Seconds after which an own answer is late, before there is any experience.
        failures: A server is believed to be down after so many failures on end.
        cooldown: Seconds until such a server is tried again, while nobody asks it.

    Raises:
        ConfigurationError: One of them is not positive.
    """

    deadline: float = 10.0
    timeout: float = 2.0
    queries: int = 1024
    queue: int = 256
    batch: int = 8
    initial_lateness: float = 0.1
    failures: int = 3
    cooldown: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigurationError(f"found {name}={value}, expected a positive number")
