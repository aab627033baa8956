"""Quantiles of latencies with bootstrap intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coin.errors import ConfigurationError

_BLOCKS, _DRAWS = 20, 200


class Interval(NamedTuple):
    """A quantity and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def tail_intervals(series: Sequence[NDArray[np.float64]], levels: Sequence[float], seed: int = 0) -> list[Interval]:
    """Return quantiles of several series together, with percentile intervals of a block bootstrap.

    Latencies of neighbouring queries depend on one another, so that what is drawn again, 200 times, are blocks: whole
    series where there are at least 20, and else each is cut into 20. A quantile is the smallest value that at least
    this share of the values does not exceed: infinite values, which are failures, are never interpolated.

    Source: Kunsch, *The jackknife and the bootstrap for general stationary observations* (1989), with blocks that do
    not overlap as in Carlstein (1986).

    Args:
        series: Values in their order ``[Q]``, at least 20 each.
        levels: Of the quantiles, in (0, 1).
        seed: Of the bootstrap's draws.
    """
    if min(map(len, series)) < _BLOCKS:
        raise ConfigurationError(f"found fewer than {_BLOCKS} latencies, expected as many; simulate more queries")
    values = np.concatenate(series)
    cuts = 1 if len(series) >= _BLOCKS else _BLOCKS
    blocks = np.concatenate(
        [index * cuts + np.arange(len(each)) * cuts // len(each) for index, each in enumerate(series)]
    )
    order = np.argsort(values, kind="stable")
    values, blocks = values[order], blocks[order]
    count = cuts * len(series)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), _DRAWS)
    found = np.array([_quantiles(values, times[blocks], levels) for times in draws])
    own = _quantiles(values, np.ones(len(values), dtype=np.int64), levels)
    low, high = np.quantile(found, [0.025, 0.975], axis=0, method="closest_observation")
    return [Interval(*map(float, each)) for each in zip(own, low, high, strict=True)]


def _quantiles(values: NDArray[np.float64], weights: NDArray[np.int64], levels: Sequence[float]) -> NDArray[np.float64]:
    """Return quantiles of ascending values that count so many times."""
    total = weights.cumsum()
    chosen: NDArray[np.float64] = values[np.searchsorted(total, np.asarray(levels) * total[-1])]
    return chosen
