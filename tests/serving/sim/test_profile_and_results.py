"""What is known of a system, and a simulation's rows, file, table and figures."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from coin.coding.ready import uniform
from coin.errors import ConfigurationError
from coin.serving.sim.conditions import Conditions, Slowdown
from coin.serving.sim.profile import Failover, Precision, Profile, Redundancy
from coin.serving.sim.results import as_row, print_simulation, tail_against_load, tail_against_memory, tail_intervals
from coin.serving.sim.simulation import Want, simulate

CONDITIONS = Conditions(slowdown=Slowdown(0.05, 10.0, 50.0))


def profile(**changes: Any) -> Profile:
    sizes = {Precision.full: (400, 420, 440), Precision.half: (200, 210, 220), Precision.int8: (100, 110, 120)}
    known: dict[str, Any] = {
        "rounded_accuracy": {Precision.half: 0.94}, "failover": Failover(0.7, 1 / 2**12, 0.001), **changes,
    }  # fmt: skip
    times = (np.array([0.01]),) * 3
    return Profile(uniform(3), times, times[:1], sizes, (410,), 0.95, {1: 0.9}, **known)


def row(kind: Redundancy, own: Profile, want: Want = Want.one, load: float = 0.4) -> dict[str, object]:
    simulation = own.simulation(kind, CONDITIONS, load=load, want=want, queries=2000)
    return as_row(kind, own, simulation, [simulate(simulation)])


def test_memory_and_accuracy_are_those_of_what_extra_servers_hold() -> None:
    known = profile()
    assert known.memory(Redundancy.uncoded) == (440, 1260)
    assert known.memory(Redundancy.copy) == (440, 1660)
    assert known.memory(Redundancy.spare) == (1260, 2520)
    assert known.memory(Redundancy.spare_half) == (630, 1890)
    assert known.memory(Redundancy.spare_int8) == (440, 1590)
    assert known.memory(Redundancy.coded_hedged) == (440, 1670)
    assert known.memory(Redundancy.failover) == (440, 1516)
    assert known.accuracy(Redundancy.spare) == 0.95
    assert known.accuracy(Redundancy.spare_half) == 0.94
    assert math.isnan(known.accuracy(Redundancy.spare_int8))  # was not measured, and is not made up
    larger = known.resized(8, 2)
    assert larger.memory(Redundancy.spare) == (3340, 3 * 3340)
    assert larger.memory(Redundancy.coded_hedged) == (440, 3340 + 820)
    assert not larger.decoded_accuracy
    with pytest.raises(ConfigurationError, match="no failover network"):
        profile(failover=None).simulation(Redundancy.failover, CONDITIONS, load=0.4)


def test_rows_tell_who_stood_in_and_how_right() -> None:
    rows = {kind: row(kind, profile()) for kind in Redundancy}
    for kind, found in rows.items():
        spare = kind.name.startswith("spare") or kind in (Redundancy.failover, Redundancy.copy)
        assert (found["share_spared"] > 0) == spare  # type: ignore[operator]
        assert (found["share_decoded"] > 0) == kind.name.startswith("coded")  # type: ignore[operator]
        assert found["extras"] == (kind is not Redundancy.uncoded)
    assert rows[Redundancy.spare]["effective_accuracy"] == pytest.approx(0.95)
    assert rows[Redundancy.failover]["standing_in_accuracy"] == pytest.approx(0.7)
    assert rows[Redundancy.coded_hedged]["standing_in_accuracy"] == pytest.approx(0.9)
    assert math.isnan(rows[Redundancy.spare_int8]["effective_accuracy"])  # type: ignore[arg-type]
    assert rows[Redundancy.spare]["p999"] == rows[Redundancy.spare_half]["p999"]
    assert rows[Redundancy.spare]["p999"] < rows[Redundancy.uncoded]["p999"]  # type: ignore[operator]


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    kinds = (Redundancy.uncoded, Redundancy.spare, Redundancy.spare_int8, Redundancy.coded_hedged)
    return pd.DataFrame([row(kind, profile(), want, load) for want in Want for load in (0.2, 0.4) for kind in kinds])


def test_table_fits_80_columns_and_shows_failures_and_what_is_not_known(rows: pd.DataFrame) -> None:
    console = Console(width=80, record=True)
    print_simulation(rows.assign(p999=rows["p999"].where(rows["redundancy"] != "uncoded", np.inf)), console)
    widest = rows.assign(redundancy="coded_proactive", p999=0.1234, p999_low=1.1111, p999_high=1.2345, quantile=0.0)
    print_simulation(widest.assign(extras=2, fits=False, buy=False), console)
    print_simulation(widest.assign(buy=True), console)
    text = console.export_text()
    assert "…" not in text
    assert "3 experts, one wanted, load 0.2" in text
    lines = {words[0]: words for line in text.splitlines() if len(words := line.split()) > 5}
    assert lines["uncoded"][2] == "∞"
    assert lines["→"][1:4] == ["coded_proactive", "at", "once"]
    assert lines["×"][1:3] == ["coded_proactive,", "2"]
    assert lines["spare_int8"][-1] == "–"


@pytest.mark.parametrize("draw", [tail_against_memory, tail_against_load])
def test_figures_have_a_line_a_policy_and_no_infinite_point(draw: Any, rows: pd.DataFrame) -> None:
    lost = rows.assign(p999=rows["p999"].where((rows["redundancy"] != "uncoded") | (rows["load"] < 0.4), np.inf))
    figure = draw(lost)
    assert len(figure.axes) == 2
    lines = {each.get_label(): each.lines[0].get_xdata() for each in figure.axes[0].containers}
    assert set(lines) == {"uncoded", "spare", "spare_int8", "coded_hedged"}
    assert len(lines["uncoded"]) == 1
    assert len(lines["spare"]) == 2


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
