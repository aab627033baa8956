"""Troubles put into a served system on purpose, to see what the other servers make up for."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coin.errors import ConfigurationError


@dataclass(frozen=True)
class Faults:
    """Troubles for trials; by default there are none.

    Args:
        pace: Seconds that a server takes for a batch at least: what the network does not need is slept. Servers that
            share processor cores are then about as independent of one another as on machines of their own.
        slow: For servers by name, by which factor they take longer: the rest is slept.

    Raises:
        ConfigurationError: The pace is negative, or a factor less than 1.
    """

    pace: float = 0.0
    slow: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.pace >= 0:
            raise ConfigurationError(f"found faults.pace={self.pace}, expected at least 0 seconds")
        if wrong := [name for name, factor in (self.slow or {}).items() if not factor >= 1]:
            raise ConfigurationError(f"found faults.slow={self.slow}, expected a factor of at least 1 for {wrong[0]}")

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self.pace > 0 or bool(self.slow)

    def check(self, names: Sequence[str]) -> None:
        """Raise a `ConfigurationError` unless all slow servers exist."""
        if unknown := [name for name in self.slow or () if name not in names]:
            raise ConfigurationError(
                f"found a slow server '{unknown[0]}', expected one of {', '.join(names)}; correct faults.slow"
            )

    def delay(self, name: str, seconds: float) -> float:
        """Return how long a server has to sleep after it took so many seconds for a batch."""
        factor = (self.slow or {}).get(name, 1.0)
        return max(seconds, self.pace) * factor - seconds

    def sleep(self, name: str, began: float) -> None:
        """Sleep as long as a server has to that began a batch at a time of `time.perf_counter`."""
        time.sleep(self.delay(name, time.perf_counter() - began))
