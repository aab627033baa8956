"""Quantiles with intervals, and the quantile that is followed."""

import math
import random

import numpy as np
import pytest

from coin.errors import ConfigurationError
from coin.serving.policies import Lateness
from coin.serving.sim.tails import tail_intervals


def test_quantiles_are_numpys() -> None:
    draw = np.random.default_rng(0)
    series = [draw.exponential(size=997), draw.exponential(size=503)]
    levels = [0.5, 0.99, 0.999]
    for interval, level in zip(tail_intervals(series, levels), levels, strict=True):
        assert interval.value == np.quantile(np.concatenate(series), level, method="inverted_cdf")
        assert interval.low <= interval.value <= interval.high


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    draw = np.random.default_rng(1)
    truth = math.log(10)  # the 0.9 quantile of the exponential distribution
    intervals = [tail_intervals([draw.exponential(size=1000)], [0.9], seed)[0] for seed in range(100)]
    covered = sum(each.low <= truth <= each.high for each in intervals)
    assert 85 <= covered <= 100


def test_dependent_values_get_wider_intervals() -> None:
    draw = np.random.default_rng(2)
    slow = np.repeat(draw.exponential(size=50), 40)
    (wide,), (narrow,) = tail_intervals([slow], [0.5]), tail_intervals([draw.permutation(slow)], [0.5])
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_with_many_seeds_whole_ones_are_drawn_again() -> None:
    """One seed of twenty has all the late queries: blocks within it would hide how little is known."""
    series = [np.ones(1000) for _ in range(20)]
    series[3][:400] = 9.0
    (few,), (many,) = tail_intervals(series[3:4], [0.9]), tail_intervals(series, [0.985])
    assert (few.low, few.high) == (9.0, 9.0)
    assert (many.low, many.value, many.high) == (1.0, 9.0, 9.0)


def test_failures_are_infinite_and_never_interpolated() -> None:
    values = np.concatenate([np.ones(990), np.full(10, np.inf)])
    np.random.default_rng(3).shuffle(values)
    median, tail = tail_intervals([values], [0.5, 0.995])
    assert (median.value, median.low, median.high) == (1.0, 1.0, 1.0)
    assert tail.value == math.inf
    with pytest.raises(ConfigurationError, match="more queries"):
        tail_intervals([values[:10]], [0.5])


@pytest.mark.parametrize("initial", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("quantile", [0.5, 0.95])
def test_lateness_follows_the_quantile_from_anywhere_and_through_a_change(quantile: float, initial: float) -> None:
    lateness = Lateness(quantile, initial)
    draw = random.Random(0)
    for scale in (1.0, 3.0):
        late = []
        for _ in range(30_000):
            late.append(draw.expovariate(1 / scale) > lateness.seconds)
            lateness.observe(late[-1])
        assert sum(late[-10_000:]) / 10_000 == pytest.approx(1 - quantile, abs=0.01)
        assert lateness.seconds == pytest.approx(-scale * math.log(1 - quantile), rel=0.2)


def test_lateness_has_limits() -> None:
    impatient = Lateness(0.0, 1.0)
    impatient.observe(True)
    assert impatient.seconds == 0.0
    bounded = Lateness(0.9, 5.0, longest=2.0)
    for _ in range(50):
        bounded.observe(True)
    assert bounded.seconds == 2.0
