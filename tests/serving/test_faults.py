"""Troubles that are put in on purpose: how long a server sleeps, and what is none."""

import time

import pytest

from coin.errors import ConfigurationError
from coin.serving.faults import Faults


def test_pace_is_filled_up_and_a_slow_server_takes_a_multiple() -> None:
    faults = Faults(pace=0.05, slow={"b": 3.0})
    assert faults.delay("a", 0.02) == pytest.approx(0.03)
    assert faults.delay("a", 0.08) == 0
    assert faults.delay("b", 0.02) == pytest.approx(0.13)
    assert faults.delay("b", 0.08) == pytest.approx(0.16)


def test_sleeps_from_the_time_at_which_the_batch_began() -> None:
    began = time.perf_counter()
    time.sleep(0.02)
    Faults(pace=0.05).sleep("a", began)
    assert time.perf_counter() - began >= 0.05


def test_there_are_none_unless_asked_for() -> None:
    assert not Faults()
    assert not Faults(slow={})
    assert Faults(pace=0.1)
    assert Faults(slow={"a": 2.0})


MISTAKES = {
    "pace": ({"pace": -1.0}, "pace=-1.0"),
    "factor": ({"slow": {"a": 0.5}}, "factor of at least 1 for a"),
    "no number": ({"pace": float("nan")}, "pace=nan"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str) -> None:
    options, message = MISTAKES[case]
    with pytest.raises(ConfigurationError, match=message):
        Faults(**options)  # type: ignore[arg-type]


def test_slow_server_must_exist() -> None:
    Faults(slow={"b": 2.0}).check(["a", "b"])
    with pytest.raises(ConfigurationError, match="slow server 'c', expected one of a, b"):
        Faults(slow={"c": 2.0}).check(["a", "b"])
