"""The quantile that is followed."""

import math
import random

import pytest

from coin.serving.policies import Lateness


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
