"""From when on an answer counts as late: a quantile that is followed, not stored."""

import math

from coin.errors import ConfigurationError


class Lateness:
    """The time after which a share of 1 − q of the queries are late.

    ln t rises by g·q when a query is late and falls by g·(1 − q) when its own answer came in time, so that in the long
    run exactly the share 1 − q is late, whatever the distribution. All it needs to know of a query is whether it was
    late, which is known however the query ends: answers that are never waited for bias nothing. The gain g falls from
    1 as 20/(20 + k) to its last value.

    Source: Robbins and Monro, *A stochastic approximation method* (1951), section 4, on quantiles; on a logarithmic
    scale, so that it works in any unit.

    Args:
        quantile: q in [0, 1); with 0 every answer that is not there at once is late.
        initial: t at first, in seconds.
        gain: The last value of g.
        longest: The largest t, in seconds.
        experience: From how many queries t is known already.

    Raises:
        ConfigurationError: An option is out of its range.
    """

    def __init__(
        self, quantile: float, initial: float, gain: float = 0.005, longest: float = math.inf, experience: int = 0
    ) -> None:
        if not 0 <= quantile < 1:
            raise ConfigurationError(f"found quantile={quantile}, expected a number from 0 to below 1")
        if not (initial > 0 and gain > 0 and longest > 0):
            raise ConfigurationError(
                f"found initial={initial}, gain={gain}, longest={longest} of a lateness, expected positive numbers"
            )
        self.quantile = quantile
        self.gain = gain
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
        gain = max(self.gain, 20.0 / (20.0 + self._count))
        change = self.quantile if late else self.quantile - 1.0
        self._seconds = min(self._seconds * math.exp(gain * change), self.longest)
