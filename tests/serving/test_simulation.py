"""The simulation against queueing theory, against an exact recursion, and against what must be so."""

import asyncio
import logging
import random
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from coin.coding.ready import convex
from coin.errors import ConfigurationError, OverloadedError, ServingError
from coin.serving.front_end import FrontEnd
from coin.serving.limits import Limits
from coin.serving.machines import BATCHES, Conditions, Machine, PhaseClock, Phases, ServiceTimes, measure
from coin.serving.policies import POLICIES, Policy, PolicyKind, StandIns
from coin.serving.simulate import QueryTarget, Simulation, VirtualLoop

MS = 1e-3


def make(
    kind: str = "uncoded", experts: int = 3, quantile: float = 0.9, tail: float = 0.0, standin: float = 10 * MS,
    marginal: float = 1.0, **options: Any,
) -> Simulation:  # fmt: skip
    """Return a simulation of experts that take 10 ms; a further input of a batch takes the share `marginal` of one."""
    fields = {name: options.pop(name) for name in ("want", "seed") if name in options}
    stand_ins = StandIns(POLICIES[kind][0], [f"expert-{place}" for place in range(experts)], convex(experts, 1))
    conditions = Conditions(**{"load": 0.5, "queries": 4000} | options, tail=tail)
    times = {name: constant(10 * MS if name in stand_ins.experts else standin, marginal) for name in stand_ins.servers}
    return Simulation(stand_ins, Policy(PolicyKind(kind), quantile), conditions, times, **fields)


def constant(seconds: float, marginal: float = 1.0) -> ServiceTimes:
    return ServiceTimes(np.array([[seconds * (1 + marginal * (inputs - 1))] for inputs in BATCHES]))


def test_time_jumps_to_the_next_timer_and_nothing_hangs() -> None:
    loop, order = VirtualLoop(), []

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds)
        order.append((seconds, loop.time()))

    async def main() -> None:
        await asyncio.gather(*map(sleep, (3e6, 1.0, 2.0, 1.0)))

    loop.run_until_complete(main())
    assert order == [(seconds, pytest.approx(seconds)) for seconds in (1.0, 1.0, 2.0, 3e6)]
    with pytest.raises(RuntimeError, match="no timer is set"):
        loop.run_until_complete(loop.create_future())
    loop.close()


def test_latencies_are_those_of_lindleys_recursion(monkeypatch: pytest.MonkeyPatch) -> None:
    """One server, one request at a time: W_{k+1} = max(0, W_k + S_k − A_{k+1}), query by query."""
    monkeypatch.setattr(Limits, "batch", 1)
    it = make(experts=1, load=0.6, tail=0.5)
    draw = np.random.default_rng([0, 1, 0])
    draw.random(4096)
    services = 10 * MS + 10 * MS * draw.exponential(0.5, 4096)
    arrivals = np.random.default_rng([0, 0]).exponential(15 * MS / 0.6, 4000).cumsum()
    free, expected = 0.0, []
    for arrival, service in zip(arrivals, services, strict=False):
        free = max(free, arrival) + service
        expected.append(free - arrival)
    np.testing.assert_allclose(it.run().latencies, expected[1000:], rtol=1e-7)


def test_times_of_batches_are_interpolated_between_those_measured() -> None:
    assert BATCHES[-1] == Limits.batch
    times = ServiceTimes(np.array([[3.0, 1.0], [4.0, 2.0], [6.0, 8.0], [9.0, 9.0]]))
    assert [times.mean(inputs) for inputs in (1, 2, 3, 4, 6, 8)] == [2.0, 3.0, 5.0, 7.0, 8.0, 9.0]
    assert [times.at(quantile, 3) for quantile in (0.0, 0.49, 0.5, 0.99)] == [4.0, 4.0, 6.0, 6.0]


def test_a_machine_takes_the_time_of_the_network_that_runs_and_of_several_one_after_the_other() -> None:
    it = make("replica", experts=2)
    first, second = (f"replica-0/expert-{place}" for place in range(2))
    measured = {first: [10.0, 12.0, 16.0, 30.0], second: [100.0, 110.0, 120.0, 130.0]}
    own = {name: ServiceTimes(MS * np.array(times)[:, None]) for name, times in measured.items()}
    it = replace(it, times={**it.times, **own})

    async def ended(*asked: str) -> list[float]:
        """Return when the requests end that come while the machine runs one for the first network."""
        loop = asyncio.get_running_loop()
        machine = Machine(2, it.times, it.conditions, it.unit, it.seed)

        async def ask(name: str) -> float:
            await machine.ask(name, None)
            return loop.time()

        began = loop.time()
        ends = await asyncio.gather(ask(first), *map(ask, asked))
        return [round((end - began) / MS, 6) for end in ends]

    for asked, batch in (
        ([first], 10), ([second], 100), ([first] * 3, 14), ([second] * 3, 115), ([first, second] * 2, 12 + 110),
        ([first] * 6 + [second] * 2, 23 + 110),
    ):  # fmt: skip
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            assert runner.run(ended(*asked)) == [10] + [10 + batch] * len(asked)


def test_a_stand_in_takes_its_own_time_not_the_expert_s() -> None:
    """Next to no load: an answer that stood in comes later by as much as the stand-in takes longer, no other does."""
    options: dict[str, Any] = {"load": 3e-5, "queries": 400, "slow": Phases(0.3, 50.0, 20.0)}
    for kind in ("standin", "replica"):
        same, slower = (make(kind, standin=standin, **options).run() for standin in (10 * MS, 50 * MS))
        later = (slower.latencies - same.latencies).round(6)
        assert (later > 0).mean() == same.stood_in
        assert 0.05 < same.stood_in < 0.5
        assert np.median(later[later > 0]) == 40 * MS  # some others meet an expert that has answered, or not, meanwhile
    assert make("standin", standin=50 * MS).mean_seconds(["coded-0"]) == pytest.approx(50 * MS)
    assert make("standin", standin=50 * MS).unit == pytest.approx(10 * MS)  # the load is the experts'
    assert np.isnan(make("uncoded").mean_seconds([]))


def test_a_server_is_measured_warm_at_every_size_on_one_thread() -> None:
    passes: list[int] = []
    threads = set[int]()

    class Server:
        probe = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)

        def __call__(self, images: torch.Tensor, expert: int) -> None:
            passes.append(len(images))
            threads.add(torch.get_num_threads())
            cold = 5 * MS if passes.count(len(images)) == 1 else 0.0
            until = time.process_time() + cold + 0.5 * MS * (3 + len(images))
            while time.process_time() < until:
                pass

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        times = measure(Server(), repeats=10)  # type: ignore[arg-type]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == {1}
    assert list(dict.fromkeys(passes)) == list(BATCHES)
    fastest = [times.at(0.0, inputs) / MS for inputs in BATCHES]
    assert fastest == pytest.approx([2.0, 2.5, 3.5, 5.5], rel=0.1)
    assert times.at(0.99, 1) < 6 * MS  # the first pass is not counted


def test_decoding_at_once_is_an_order_statistic() -> None:
    """All of three experts from any three of four servers, next to no load: the third of four times."""
    it = make("coded_proactive", quantile=0.0, load=0.001, tail=1.0, want=QueryTarget.all)
    outcome = it.run()
    own = 10 * MS + 10 * MS * (1 / 4 + 1 / 3 + 1 / 2)
    assert outcome.latencies.mean() == pytest.approx(own, rel=0.03)
    # Each of the four is the last with probability 1/4; the coded model's being last costs no decoding.
    assert 3 * outcome.stood_in == pytest.approx(3 / 4, abs=0.03)
    assert outcome.forwards == pytest.approx(4.0, abs=0.01)


def test_the_same_seed_is_the_same_to_the_last_bit_and_policies_see_the_same_queries_and_phases() -> None:
    options: dict[str, Any] = {"tail": 0.2, "slow": Phases(0.1, 50.0), "down": Phases(0.02, 50.0), "queries": 1000}
    first, again, other = (make("coded_hedged", **options, seed=seed).run() for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.latencies, again.latencies)
    assert (first.stood_in, first.forwards) == (again.stood_in, again.forwards)
    assert not np.array_equal(first.latencies, other.latencies)
    options = {"slow": Phases(0.1, 50.0), "queries": 1000}
    alone, lost = (make(kind, **options).run() for kind in ("uncoded", "standin_lost"))
    np.testing.assert_array_equal(alone.latencies, lost.latencies)


def test_hedging_cuts_the_tail_of_stragglers_and_costs_little() -> None:
    tails, forwards = {}, {}
    for kind in ("uncoded", "replica", "standin", "coded_hedged"):
        outcome = make(kind, load=0.2, slow=Phases(0.02, 50.0, 20.0), want=QueryTarget.one).run()
        tails[kind] = np.quantile(outcome.latencies, 0.99, method="higher")
        forwards[kind] = outcome.forwards
    assert forwards.pop("uncoded") == pytest.approx(1, abs=0.01)
    assert all(1 < each < 1.5 for each in forwards.values())
    assert all(tails[kind] < 0.5 * tails["uncoded"] for kind in forwards)
    assert tails["replica"] == pytest.approx(tails["standin"], rel=0.1)  # one server more, of the same speed


def test_failures_lose_what_is_uncoded_and_little_of_what_is_coded(caplog: pytest.LogCaptureFixture) -> None:
    failed = {}
    for kind in PolicyKind:
        outcome = make(kind, load=0.1, down=Phases(0.05, 50.0)).run()
        failed[kind] = float(np.isinf(outcome.latencies).mean())
    assert 0.03 < failed[PolicyKind.uncoded] < 0.08
    assert all(share < 0.4 * failed["uncoded"] for kind, share in failed.items() if kind != "uncoded"), failed
    shown = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not shown  # which a terminal would show, thousands of lines


def test_overload_fails_queries_instead_of_waiting_for_ever() -> None:
    outcome = make("coded_proactive", load=0.95, queries=3000, seed=1).run()
    assert np.isfinite(outcome.latencies).any()
    assert outcome.latencies[np.isfinite(outcome.latencies)].max() <= Limits.deadline


def test_batches_carry_a_load_that_one_at_a_time_could_not(monkeypatch: pytest.MonkeyPatch) -> None:
    together = make(load=0.95, marginal=0.1, tail=0.5).run().latencies
    monkeypatch.setattr(Limits, "batch", 1)
    assert together.mean() < 0.5 * make(load=0.95, tail=0.5).run().latencies.mean()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.4])
def test_phases_take_their_share_of_the_time(share: float) -> None:
    clock = PhaseClock(Phases(share, 10.0), 0, 0.1, random.Random(0))
    assert np.mean([clock.is_on(now) for now in np.arange(0, 20_000, 0.1)]) == pytest.approx(share, abs=0.02)
    of_two = [PhaseClock(Phases(1.0, machines=1), machine, 0.1, random.Random(0)) for machine in (0, 1)]
    assert [each.is_on(5.0) for each in of_two] == [True, False]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Conditions, {"load": 1.0, "queries": 9, "tail": -1}),
        (Phases, {"share": 1.5, "length": 0, "factor": 0.5, "machines": -1}),
        (Limits, {"deadline": 0, "pixels": 0, "batch": 0}),
        (partial(Policy, PolicyKind.coded_hedged), {"quantile": 1.0}),
    ],
)
def test_mistakes(make: Any, options: dict[str, Any]) -> None:
    for name, value in options.items():
        with pytest.raises(ConfigurationError, match=rf"{name}={value}"):
            make(**{name: value})


async def overload(kind: str, load: float, seconds: float, marginal: float, tail: float) -> tuple[Counter[str], float]:
    """Return how the queries of 200 service times ended at a load, and the median seconds to a refusal."""
    loop = asyncio.get_running_loop()
    it = make(kind, tail=tail)
    it = replace(it, times={name: constant(seconds, marginal) for name in it.stand_ins.servers})
    _, servers = it.machines()
    front = FrontEnd(servers, it.stand_ins, it.policy, lambda expert, replies: None, Limits())
    draw = random.Random(0)
    ends = Counter[str]()
    refused = [0.0]

    async def ask(expert: int) -> None:
        began = loop.time()
        try:
            with front.admitted():
                await front.ask((0,), [expert], began + front.limits.deadline)
            ends["answered"] += 1
        except ServingError as error:
            ends[type(error).__name__] += 1
            if isinstance(error, OverloadedError):
                refused.append(loop.time() - began)

    async with asyncio.TaskGroup() as group:
        while loop.time() < 200 * seconds:
            await asyncio.sleep(draw.expovariate(load * it.capacity))
            group.create_task(ask(draw.randrange(3)))
    return ends, float(np.median(refused))


@pytest.mark.parametrize("kind", list(PolicyKind))
@pytest.mark.parametrize(
    ("marginal", "tail"),
    [(1.0, 0.0), pytest.param(0.1, 0.0, marks=pytest.mark.slow), pytest.param(1.0, 0.5, marks=pytest.mark.slow)],
)
def test_overload_is_refused_at_once_costs_no_answers_and_nobody_is_called_lost(
    kind: str, marginal: float, tail: float
) -> None:
    """Networks that take 300 ms: seven waiting requests last longer than the timeout of 2 s."""
    answered = {}
    most = 0.8 if kind == "coded_proactive" else 0.9  # which asks four servers for all that there is room for
    for load in (0.8, 2.0, 10.0):
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            ends, refused = runner.run(overload(kind, load, 0.3, marginal, tail))
        assert set(ends) <= {"answered", "OverloadedError"}, ends
        assert refused <= 0.1
        answered[load] = ends["answered"]
        assert answered[load] >= most * max(answered.values()), answered  # it does not fall with the load
    # At twice the capacity batches do not run full, and what all servers are asked for at once is often half withdrawn.
    if marginal == 1 and "proactive" not in kind:
        assert answered[2.0] >= 0.9 * answered[10.0], answered
