"""What is known of a system, and a simulation's rows, file, table and figures."""

import math

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from coin.coding.ready import uniform
from coin.errors import ConfigurationError
from coin.reporting.latency import print_simulation, tail_against, tail_intervals
from coin.serving.sim.conditions import Conditions, Slowdown
from coin.serving.sim.profile import Profile, Redundancy, StandIn
from coin.serving.sim.simulation import QueryTarget, run_simulation

CONDITIONS = Conditions(slowdown=Slowdown(0.05, 10.0, 50.0))
KNOWN = {
    Redundancy.uncoded: StandIn(Redundancy.uncoded),
    Redundancy.copy: StandIn(Redundancy.copy, "", 420, 0, {1: 0.95}),
    Redundancy.replica: StandIn(Redundancy.replica, "", 0, 420, {1: 0.95}),
    Redundancy.replica_delta: StandIn(Redundancy.replica_delta, "3bit-int8base", 105, 45, {1: 0.94}, unpacking=0.002),
    Redundancy.neighbours: StandIn(Redundancy.neighbours, "3bit-int8base", 105, 45, {1: 0.94}, unpacking=0.002),
    Redundancy.failover: StandIn(Redundancy.failover, "", 256, 0, {1: 0.7}, seconds=0.001),
    Redundancy.standin: StandIn(Redundancy.standin, "refit expert_head", 430, 0, {1: 0.93}),
    Redundancy.coded_proactive: StandIn(Redundancy.coded_proactive, "", 410, 0, {1: 0.9}),
    Redundancy.coded_hedged: StandIn(Redundancy.coded_hedged, "", 410, 0, {1: 0.9}),
}


def profile() -> Profile:
    return Profile(uniform(3), (np.array([0.01]),) * 3, (400, 420, 440), 0.95)


def row(what: StandIn, own: Profile, want: QueryTarget = QueryTarget.one, load: float = 0.4) -> dict[str, object]:
    simulation = own.simulation(what, CONDITIONS, load=load, want=want, queries=2000)
    return own.row(what, simulation, [run_simulation(simulation)])


def test_memory_is_that_of_what_servers_hold() -> None:
    """Of the largest server, and of all: the experts' 400 + 420 + 440, and what an extra server or each keeps."""
    memory = {
        "uncoded": (440, 1260), "copy": (440, 1680), "replica": (1260, 2520), "replica_delta": (440, 1500),
        "neighbours": (635, 1260 + 3 * 195), "failover": (440, 1516), "standin": (440, 1690),
        "coded_proactive": (440, 1670), "coded_hedged": (440, 1670),
    }  # fmt: skip
    assert {kind: profile().memory(what) for kind, what in KNOWN.items()} == memory
    assert {kind: profile().losses(what) for kind, what in KNOWN.items()} == {
        "uncoded": 0, "copy": 0, "replica": 3, "replica_delta": 3, "neighbours": 2, "failover": 3, "standin": 3,
        "coded_proactive": 1, "coded_hedged": 1,
    }  # fmt: skip
    larger = profile().resized(8, 2)
    assert larger.memory(KNOWN[Redundancy.replica]) == (3360, 3340 + 2 * 3360)
    assert larger.memory(KNOWN[Redundancy.replica_delta]) == (465, 3340 + 2 * 465)
    assert larger.memory(KNOWN[Redundancy.neighbours]) == (440 + 420, 3340 + 8 * 420)
    assert larger.memory(KNOWN[Redundancy.standin]) == (440, 3340 + 860)
    assert math.isnan(KNOWN[Redundancy.standin].elsewhere.right())
    assert KNOWN[Redundancy.replica].elsewhere.right() == 0.95


def test_rows_tell_who_stood_in_and_how_right() -> None:
    rows = {kind: row(what, profile()) for kind, what in KNOWN.items()}
    assert set(rows) == set(Redundancy)
    for kind, found in rows.items():
        assert (found["share_decoded"] > 0) == kind.is_coded  # type: ignore[operator]
        assert (found["share_replicated"] > 0) == (not kind.is_coded and kind is not Redundancy.uncoded)  # type: ignore[operator]
        assert found["extras"] == (kind not in (Redundancy.uncoded, Redundancy.neighbours))
        if kind is not Redundancy.uncoded:
            assert found["standing_in_accuracy"] == pytest.approx(KNOWN[kind].right())
    assert rows[Redundancy.replica]["effective_accuracy"] == pytest.approx(0.95)
    unknown = row(StandIn(Redundancy.replica_delta), profile())
    assert math.isnan(unknown["effective_accuracy"])  # type: ignore[arg-type]
    assert rows[Redundancy.replica]["p999"] < rows[Redundancy.uncoded]["p999"]  # type: ignore[operator]
    assert rows[Redundancy.standin]["forwards"] < rows[Redundancy.coded_hedged]["forwards"]  # type: ignore[operator]


def test_machines_in_repair_leave_the_share_of_queries_unanswered_that_a_pencil_gives() -> None:
    """u the share of the time that a machine is down; three experts, and one server more or none."""
    u = CONDITIONS.failures.broken
    assert u == pytest.approx(1 / 721)
    two = u * (1 - (1 - u) ** 3)
    one = {
        "uncoded": u, "copy": (u**2 + 2 * u) / 3, "replica": u**2, "replica_delta": u**2, "neighbours": u**3,
        "failover": u**2, "standin": u**2, "coded_proactive": two, "coded_hedged": two,
    }  # fmt: skip
    every = {"uncoded": 1 - (1 - u) ** 3, "standin": two, "neighbours": u**3}
    for want, wanted in ((QueryTarget.one, one), (QueryTarget.all, every)):
        for kind, share in wanted.items():
            simulation = profile().simulation(KNOWN[Redundancy(kind)], CONDITIONS, load=0.4, want=want)
            assert simulation.unanswered(u) == pytest.approx(share, rel=1e-6, abs=1e-15), kind


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    kinds = (Redundancy.uncoded, Redundancy.replica, Redundancy.replica_delta, Redundancy.coded_hedged)
    known = [KNOWN[kind] for kind in kinds[:2]] + [StandIn(Redundancy.replica_delta, "8bit"), KNOWN[kinds[3]]]
    return pd.DataFrame(
        [row(what, profile(), want, load) for want in QueryTarget for load in (0.2, 0.4) for what in known]
    )


def test_table_fits_80_columns_and_shows_failures_and_what_is_not_known(rows: pd.DataFrame) -> None:
    console = Console(width=80, record=True)
    print_simulation(rows.assign(p999=rows["p999"].where(rows["redundancy"] != "uncoded", np.inf)), console)
    widest = rows.assign(redundancy="coded_proactive", p999=0.1234, p999_low=1.1111, p999_high=1.2345, quantile=0.0)
    print_simulation(widest.assign(extras=2, fits=False, buy=False, variant=""), console)
    print_simulation(widest.assign(buy=True, variant="refit-3bit feature_ridge-alone"), console)
    text = console.export_text()
    assert "…" not in text
    assert "3 experts, one wanted, load 0.2" in text
    lines = {words[0]: words for line in text.splitlines() if len(words := line.split()) > 5}
    assert lines["uncoded"][2] == "∞"
    assert lines["→"][1:3] == ["coded_proactive", "refit-3bit"] or lines["→"][1:3] == ["coded_proactive", "0"]
    assert lines["×"][1:4] == ["coded_proactive,", "2", "0"]
    assert lines["replica_delta"][-1] == "–"


@pytest.mark.parametrize("column", ["memory_server", "memory", "load"])
def test_figures_have_a_line_a_policy_and_no_infinite_point(column: str, rows: pd.DataFrame) -> None:
    lost = rows.assign(p999=rows["p999"].where((rows["redundancy"] != "uncoded") | (rows["load"] < 0.4), np.inf))
    figure = tail_against(column, lost)
    assert len(figure.axes) == 2
    lines = {each.get_label(): each.lines[0].get_xdata() for each in figure.axes[0].containers}
    assert set(lines) == {"uncoded", "replica", "replica_delta", "coded_hedged"}
    assert len(lines["uncoded"]) == 1
    assert len(lines["replica"]) == 2


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
