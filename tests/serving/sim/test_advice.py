"""Which redundancy is bought: the rule on rows that are made up, and on a simulation that a pencil can follow."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from coin.coding.ready import uniform
from coin.commands.advise import candidates, recommended_row
from coin.commands.simulate import simulate_rows
from coin.serving.sim.conditions import Conditions, FrontEndCost, Service, Slowdown
from coin.serving.sim.profile import Profile, Redundancy, StandIn


def advice(**columns: Any) -> pd.DataFrame:
    plain = {
        "fits": True,
        "memory": 5,
        "experts": 3,
        "extras": 1,
        "forwards": 1.0,
        "losses": 1,
        "effective_accuracy": 0.95,
        "expert_accuracy": 1.0,
    }
    frame = pd.DataFrame({**plain, **columns})
    return frame.assign(p999_low=0.9 * frame["p999"], p999_high=1.1 * frame["p999"])


CHOICES = {
    "the lowest": ({"p999": [0.5, 0.1, 0.9]}, None, 1),
    "that fits": ({"p999": [0.5, 0.1, 0.9], "fits": [True, False, True]}, None, 0),
    "whose accuracy is known": ({"p999": [0.5, 0.1], "effective_accuracy": [0.95, math.nan]}, None, 0),
    "as right as the best that fits": ({"p999": [0.1, 0.5], "effective_accuracy": [0.94, 0.95]}, None, 1),
    "or nearly": ({"p999": [0.1, 0.5], "effective_accuracy": [0.946, 0.95]}, None, 0),
    "none is more right than the experts": (
        {"p999": 0.1, "effective_accuracy": [0.98, 0.95], "expert_accuracy": 0.95, "forwards": [2.0, 1.0]}, None, 1,
    ),
    "whatever does not fit is": (
        {"p999": [0.1, 0.5], "effective_accuracy": [0.94, 0.95], "fits": [True, False]}, None, 0,
    ),
    "fewer forward passes where latencies cannot be told apart": (
        {"p999": [0.10, 0.105], "forwards": [2.98, 1.94], "memory": [5, 9]}, None, 1,
    ),
    "less memory where these cannot": ({"p999": [0.1, 0.1], "forwards": [1.92, 1.94], "memory": [9, 5]}, None, 1),
    "the README's replica in int8 at once: proactive, float32, int8, int8 at 0.9": (
        {
            "p999": [0.066, 0.056, 0.056, 0.075], "effective_accuracy": [0.9722, 0.9727, 0.9726, 0.974],
            "forwards": [2.98, 1.94, 1.94, 1.08], "memory": [39, 52, 33, 33], "fits": [True, False, True, True],
        }, None, 2,
    ),
    "cheapest that keeps what is wanted": ({"p999": [0.19, 0.1], "forwards": [1.1, 1.9]}, 200, 0),
    "nearest where none does": ({"p999": [0.5, 0.3], "forwards": [1.1, 1.9]}, 200, 1),
    "what survives a loss, though nothing is cheaper and faster": ({"p999": [0.1, 0.5], "losses": [0, 1]}, None, 1),
    "nothing where nothing survives one": ({"p999": [0.1, 0.5], "losses": 0, "memory": [9, 5]}, None, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_what_to_buy(name: str) -> None:
    columns, wanted, best = CHOICES[name]
    assert recommended_row(advice(**columns), wanted, 0.005) == best


def test_a_latency_within_a_tenth_of_the_lowest_is_not_worth_a_pass() -> None:
    sharp = advice(p999=[0.100, 0.109, 0.111], forwards=[2.0, 1.5, 1.0])
    sharp = sharp.assign(p999_low=sharp["p999"] - 1e-4, p999_high=sharp["p999"] + 1e-4)
    assert recommended_row(sharp, None, 0.005) == 1


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Two experts and one server more; every answer takes 10 ms, or 50 on the hundredth of machines that are slow.

    Queries are so rare that none waits for another, so that all latencies can be told by hand.
    """
    times = (np.array([0.01]),) * 2
    known = [
        StandIn(Redundancy.uncoded),
        StandIn(Redundancy.copy, "", 400, 0, {1: 0.95}, 1.0),
        StandIn(Redundancy.replica, "", 0, 400, {1: 0.95}, 1.0),
        StandIn(Redundancy.replica_delta, "8bit-nobase", 0, 100, {1: 0.94}, 0.9, unpacking=0.005),
        StandIn(Redundancy.neighbours, "4bit", 100, 60, {1: 0.948}, 0.97, unpacking=0.005),
        StandIn(Redundancy.standin, "refit expert_head", 405, 0, {1: 0.94}, 0.96),
        *(StandIn(kind, "", 400, 0, {1: 0.9}, 0.8) for kind in (Redundancy.coded_proactive, Redundancy.coded_hedged)),
    ]
    conditions = Conditions(Service(marginal=0.0), Slowdown(0.01, 5.0), front_end=FrontEndCost(0.0, 0.0, 1))
    points = candidates(
        Profile(uniform(2), times, (400, 400), 0.95), conditions, known, 3, [0.0, 0.9], {"load": 1e-4, "memory": 650}
    )
    return simulate_rows(points, range(1), 1).assign(fits=True)


def found(rows: pd.DataFrame, kind: str, quantile: float) -> pd.Series:
    (row,) = rows[(rows["redundancy"] == kind) & (rows["quantile"].fillna(-1) == quantile)].to_dict("records")
    return pd.Series(row)


BY_HAND = {
    # P(slow) = 0.01 is above 0.001
    ("uncoded", -1): (50, 1),
    # half of the queries have no copy: 0.005
    ("copy", 0.0): (50, 1.5),
    # both slow: 0.0001 is below
    ("replica", 0.0): (10, 2),
    # 650 hold the replica's 200 and one unpacked expert of 400: every other query has it unpack the other for 5 ms
    ("replica_delta", 0.0): (15, 2),
    # and no second expert beside a neighbour's own 400 and 160: it unpacks for every query
    ("neighbours", 0.0): (15, 2),
    ("standin", 0.0): (10, 2),
    # the expert's, and one of the two others that decoding needs: 0.0002
    ("coded_proactive", 0.0): (10, 3),
    # a tenth is called late after 10 ms, just before the answer is there, and then asked again
    ("replica", 0.9): (20, 1.1),
    ("standin", 0.9): (20, 1.1),
    ("coded_hedged", 0.9): (20, 1.2),
    ("coded_proactive", 0.9): (10, 3),
}


@pytest.mark.parametrize(("kind", "quantile"), BY_HAND)
def test_candidates_are_what_a_pencil_makes_of_them(kind: str, quantile: float, rows: pd.DataFrame) -> None:
    row, (latency, forwards) = found(rows, kind, quantile), BY_HAND[kind, quantile]
    assert 1e3 * row["p999"] == pytest.approx(latency, rel=0.02)
    assert row["forwards"] == pytest.approx(forwards, abs=0.05)  # the first queries wait longer


def test_every_redundancy_is_asked_at_once_and_later_but_the_two_that_are_then_one(rows: pd.DataFrame) -> None:
    quantiles = rows.groupby("redundancy")["quantile"].agg(list)
    assert quantiles.pop("coded_hedged") == [0.9]
    assert np.isnan(quantiles.pop("uncoded")).all()
    assert set(map(tuple, quantiles)) == {(0.0, 0.9)}


BOUGHT = {
    "two machines at once, one of them with one network": ({}, None, 0.02, None, ("standin", 0.0)),
    "whose answers are right": ({}, None, 1e-5, None, ("replica", 0.0)),
    "a coded model where two networks do not fit": ({"largest": 400}, None, 0.02, None, ("coded_proactive", 0.0)),
    "the neighbour later where that will do": ({}, 27, 0.005, None, ("neighbours", 0.9)),
    "later where that will do": ({}, 55, 0.02, None, ("neighbours", 0.9)),
    "never nothing, where something fits": ({"largest": 400}, 55, 0.02, None, ("coded_hedged", 0.9)),
    "but what keeps the accuracy that is asked for": ({}, 55, 0.005, 0.95, ("neighbours", 0.9)),
    "of the worst task, not of the mean": ({}, 55, 0.005, 0.98, ("replica", 0.9)),
    "all of it": ({}, 55, 0.005, 1.0, ("replica", 0.9)),
    "or comes nearest": ({"largest": 560}, 55, 0.005, 1.0, ("neighbours", 0.9)),
}


@pytest.mark.parametrize("name", BOUGHT)
def test_the_advice_is_what_a_pencil_gives(name: str, rows: pd.DataFrame) -> None:
    budget, wanted, tolerance, accuracy, (kind, quantile) = BOUGHT[name]
    fits = rows.assign(fits=rows["memory_server"] <= budget.get("largest", 1000))
    if budget:  # the experts are as large: only what holds one network fits
        fits["fits"] &= ~fits["redundancy"].str.startswith("replica")
    row = fits.loc[recommended_row(fits, wanted, tolerance, accuracy)]
    assert (row["redundancy"], -1 if row["redundancy"] == "uncoded" else row["quantile"]) == (kind, quantile)
