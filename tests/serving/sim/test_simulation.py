"""The simulation against queueing theory, against an exact recursion, and against what must be so."""

import subprocess
import sys
from itertools import islice
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coin.errors import ConfigurationError
from coin.serving.layout import Layout, spread_copies, spread_replicas
from coin.serving.policies import Policy, PolicyKind
from coin.serving.sim.conditions import (
    Conditions,
    Failures,
    FrontEndCost,
    Service,
    ServiceKind,
    Slowdown,
    poisson_arrivals,
)
from coin.serving.sim.run import SimulationOutcome, SimulationRun
from coin.serving.sim.simulation import QueryTarget, Simulation, run_simulation, simulate_all

CODED = Layout(3, 1, solvable=frozenset({(1, 1), (1, 2), (1, 4)}))
STANDIN = Layout(3, 1, alone=(1, 1, 1))
MS = 1e-3
EXPONENTIAL = Service(ServiceKind.exponential, 10 * MS)
NEVER_SLOW, NEVER_DOWN = Slowdown(), Failures()
FREE = FrontEndCost(0.0, 0.0)


def make(
    kind: str = "uncoded",
    layout: Layout | None = None,
    load: float = 0.5,
    service: Service = EXPONENTIAL,
    slowdown: Slowdown = NEVER_SLOW,
    failures: Failures = NEVER_DOWN,
    front_end: FrontEndCost = FREE,
    quantile: float = 0.9,
    batch: int = 1,
    queue: int = 256,
    deadline: float = 1000.0,
    cooldown: float = 100.0,
    **options: Any,
) -> Simulation:
    policy = Policy(PolicyKind(kind), quantile)
    coded = STANDIN if policy.kind is PolicyKind.standin else CODED
    layout = layout or (coded if policy.coded else spread_copies(3, 1))
    conditions = Conditions(service, slowdown, failures, front_end, batch, deadline, queue, cooldown)
    samples = (np.array([10 * MS]),) * layout.num_servers
    return Simulation(layout, policy, samples, conditions, load, **{"queries": 4000, **options})


def mean_and_error(latencies: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and its standard error from the means of 40 batches, which hardly depend on one another."""
    batches = np.array([each.mean() for each in np.array_split(latencies, 40)])
    return float(batches.mean()), float(batches.std(ddof=1) / np.sqrt(len(batches)))


@pytest.mark.parametrize("load", [0.3, 0.7])
@pytest.mark.parametrize("kind", [ServiceKind.exponential, ServiceKind.deterministic])
@pytest.mark.slow
def test_mean_wait_is_that_of_theory(kind: ServiceKind, load: float) -> None:
    """M/M/1: W = ρ/(1 − ρ)·E[S]; M/D/1 half of it (Pollaczek and Khinchine). 99.7 % intervals, fixed seeds."""
    outcome = run_simulation(
        make(layout=Layout(1), load=load, service=Service(kind, 10 * MS), queries=40_000, queue=10**6, deadline=1e9)
    )
    wait = load / (1 - load) * 10 * MS * (1 if kind is ServiceKind.exponential else 0.5)
    mean, error = mean_and_error(outcome.latencies)
    assert abs(mean - 10 * MS - wait) < 3 * error
    assert 3 * error < 0.25 * wait  # an interval that says something
    assert outcome.utilisation == pytest.approx(load, abs=0.01)


def test_shifted_exponential_service_waits_as_pollaczek_and_khinchine_say() -> None:
    service = Service(ServiceKind.deterministic, 10 * MS, tail=0.5)
    outcome = run_simulation(
        make(layout=Layout(1), load=0.6, service=service, queries=40_000, queue=10**6, deadline=1e9)
    )
    mean_service, variance = 15 * MS, (5 * MS) ** 2
    wait = 0.6 / 0.4 * (mean_service**2 + variance) / (2 * mean_service)
    mean, error = mean_and_error(outcome.latencies)
    assert abs(mean - mean_service - wait) < 3 * error


def test_latencies_are_those_of_lindleys_recursion() -> None:
    """One server, first come first served: W_{k+1} = max(0, W_k + S_k − A_{k+1}), query by query."""
    it = make(layout=Layout(1), load=0.8, queries=3000, queue=10**6, deadline=1e9)
    arrivals = poisson_arrivals(it.rate, it.queries, it.seed)
    services = it.conditions.service_times(it.samples[0], np.random.default_rng([it.seed, 1, 0]))
    free, expected = 0.0, []
    for arrival in arrivals:
        free = max(free, arrival) + next(services)
        expected.append(free - arrival)
    np.testing.assert_allclose(run_simulation(it).latencies, expected[750:], rtol=1e-9)


def test_replicated_server_takes_the_faster_of_two() -> None:
    """One expert, one copy, next to no load: the smaller of two exponential times has half the mean."""
    outcome = run_simulation(make("replicated", spread_copies(1, 1), load=0.01, queries=10_000))
    mean, error = mean_and_error(outcome.latencies)
    assert abs(mean - 5 * MS) < 3 * error + 0.02 * 5 * MS
    assert outcome.forwards == pytest.approx(2.0, abs=0.02)


def test_decoding_at_once_is_an_order_statistic() -> None:
    """All of three experts from any three of four servers, next to no load: the third of four exponential times."""
    outcome = run_simulation(make("coded_proactive", load=0.001, quantile=0.0, want=QueryTarget.all, queries=20_000))
    mean, error = mean_and_error(outcome.latencies)
    expected = 10 * MS * (1 / 4 + 1 / 3 + 1 / 2)
    assert abs(mean - expected) < 3 * error + 0.01 * expected
    # Each of the four is the last with probability 1/4; the coded model's being last costs no decoding.
    assert sum(outcome.decoded.values()) / outcome.answers == pytest.approx(1 / 4, abs=0.01)
    assert set(outcome.decoded) == {1}


@pytest.mark.parametrize("kind", ["coded_proactive", "coded_hedged"])
@pytest.mark.parametrize("quantile", [0.6, 0.9])
@pytest.mark.slow
def test_share_that_is_late_is_what_the_quantile_says(kind: str, quantile: float) -> None:
    outcome = run_simulation(make(kind, load=0.001, quantile=quantile, queries=40_000))
    late = outcome.forwards - 1 if kind == "coded_hedged" else None
    decoded = sum(outcome.decoded.values()) / outcome.answers
    assert 0 < decoded <= 1 - quantile + 0.02
    if late is not None:
        assert late / 3 == pytest.approx(1 - quantile, abs=0.02)  # a late query asks three more servers


@pytest.mark.parametrize("want", list(QueryTarget))
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", list(PolicyKind))
def test_every_request_is_taken_off_its_server_once(kind: str, want: QueryTarget, batch: int) -> None:
    """Full queues, failing servers, deadlines: when all queries have ended, no server expects to answer any."""
    failures = Failures(share=0.05, length=50.0)
    layout = None if Policy(kind).coded else spread_replicas(3, 1)
    machines = () if layout is None else (0, 1, 2, 3, 3, 3)
    options = {"queue": 4, "want": want, "failures": failures, "deadline": 30.0, "batch": batch}
    simulation = SimulationRun(
        make(kind, layout, 0.8, machines=machines, front_end=FrontEndCost(0.0, 2 * MS), **options)
    )
    outcome = simulation.run()
    assert simulation.held == [0] * len(simulation.held)
    assert 0 < outcome.failed < outcome.answers


def test_decoding_time_delays_decoded_answers_alone() -> None:
    plain, slow = (
        run_simulation(make("coded_proactive", load=0.2, quantile=0.0, decoding=seconds)) for seconds in (0.0, 1.0)
    )
    added = slow.latencies - plain.latencies
    assert np.isclose(added, 0.0).mean() == pytest.approx(1 - sum(plain.decoded.values()) / plain.answers)
    assert np.isclose(added, 1.0).sum() == sum(plain.decoded.values())


def test_policies_see_the_same_queries_and_phases() -> None:
    slow = Slowdown(0.1, 5.0, 50.0)
    layout = Layout(3)
    alone = run_simulation(make("uncoded", layout, slowdown=slow)).latencies
    np.testing.assert_array_equal(alone, run_simulation(make("replicated", layout, slowdown=slow)).latencies)


@pytest.mark.parametrize("want", list(QueryTarget))
def test_hedging_cuts_the_tail_of_stragglers_and_costs_little(want: QueryTarget) -> None:
    # Uniform service and rare slow phases, so that what is late is late because of them.
    options = {"service": Service(ServiceKind.deterministic, 10 * MS), "slowdown": Slowdown(0.02, 20.0, 50.0)}
    outcomes = {
        kind: run_simulation(make(kind, load=0.2, want=want, queries=6000, quantile=0.9, **options))
        for kind in PolicyKind
    }
    tails = {kind: np.quantile(outcome.latencies, 0.99, method="higher") for kind, outcome in outcomes.items()}
    assert tails[PolicyKind.coded_hedged] < 0.5 * tails[PolicyKind.uncoded]
    assert tails[PolicyKind.coded_hedged] < 0.5 * tails[PolicyKind.replicated]  # copies help one expert of three
    needed = 3 if want is QueryTarget.all else 1
    assert needed < outcomes[PolicyKind.coded_hedged].forwards < needed + 0.4
    assert outcomes[PolicyKind.uncoded].forwards == needed
    assert not outcomes[PolicyKind.uncoded].decoded


def test_failures_lose_what_is_uncoded_and_little_of_what_is_coded() -> None:
    failures = Failures(share=0.05, length=50.0, detection=2.0)
    options = {"load": 0.2, "failures": failures, "queries": 10_000}
    lost = {kind: run_simulation(make(kind, **options)) for kind in PolicyKind}
    shares = {kind: outcome.failed / outcome.answers for kind, outcome in lost.items()}
    assert 0.02 < shares[PolicyKind.uncoded] < 0.05
    # A copy saves its own expert's queries either way: asked at once, or after the loss.
    assert shares[PolicyKind.replicated] == pytest.approx(shares[PolicyKind.uncoded], rel=0.1)
    for kind in (PolicyKind.coded_proactive, PolicyKind.coded_hedged):
        assert shares[kind] < 0.4 * shares[PolicyKind.uncoded]
    for kind, outcome in lost.items():
        assert np.isinf(outcome.latencies).sum() == outcome.failed, kind


def test_nobody_waits_for_a_server_that_has_failed() -> None:
    # With hardly a cooldown, every query to a server that is down tries it; a tenth of the queries does.
    service = Service(ServiceKind.deterministic, 10 * MS)
    failures = Failures(share=0.1, length=2000.0, detection=3.0)
    outcome = run_simulation(make("coded_hedged", load=0.05, service=service, failures=failures, cooldown=0.01, seed=1))
    assert outcome.decoded[1] > 0.1 * outcome.answers
    assert np.quantile(outcome.latencies, 0.9, method="higher") == pytest.approx(10 * MS)


def test_overload_fails_queries_instead_of_waiting_for_ever() -> None:
    outcome = run_simulation(make("coded_proactive", load=0.9, queries=5000, deadline=200.0))
    assert outcome.failed > 0
    assert outcome.latencies[np.isfinite(outcome.latencies)].max() <= 200 * 10 * MS + 1e-9
    assert outcome.utilisation > 0.9


def test_measured_times_are_drawn_from_the_samples() -> None:
    times = Conditions(Service()).service_times(np.array([1.0, 2.0]), np.random.default_rng(3))
    assert {next(times) for _ in range(500)} == {1.0, 2.0}


@pytest.mark.parametrize("together", [0.0, 0.5, 1.0])
def test_phases_take_their_share_of_the_time_and_are_shared_as_said(together: float) -> None:
    conditions = Conditions(slowdown=Slowdown(0.2, 5.0, 10.0, together))
    grid = np.arange(0, 20_000, 0.05)

    def on(turns: Any) -> NDArray[np.bool_]:
        times = np.array(list(islice(turns, 100_000)))
        return np.searchsorted(times, grid) % 2 == 1

    slow = []
    for machine in (0, 1):
        own, shared = (on(turns) for turns in conditions.slow_phases(machine, 1, unit=0.1))
        slow.append(own | shared)
    assert slow[0].mean() == pytest.approx(0.2, abs=0.02)
    shared_share = 0.2 * together
    own_share = (0.2 - shared_share) / (1 - shared_share)
    both = shared_share + (1 - shared_share) * own_share**2
    assert (slow[0] & slow[1]).mean() == pytest.approx(both, abs=0.02)


def test_a_replica_answers_for_every_expert_and_its_machine_runs_one_batch_at_a_time() -> None:
    """One expert always down: its queries are the replica's, an M/D/1 queue of a third of all."""
    service = Service(ServiceKind.deterministic, 10 * MS)
    options = {"service": service, "load": 0.6, "queries": 20_000, "machines": (0, 1, 2, 3, 3, 3)}
    it = SimulationRun(make("hedged", spread_replicas(3, 1), failures=Failures(1e-9), **options))
    it.turns[0] = iter([0.0])
    outcome = it.run()
    assert outcome.replicated / outcome.answers == pytest.approx(1 / 3, abs=0.05)
    assert not outcome.decoded
    assert outcome.failed == 0
    assert outcome.forwards == pytest.approx(1.0, abs=0.1)


@pytest.mark.slow
def test_a_replica_shares_its_machine_among_experts() -> None:
    """All experts down for ever at a load of 0.3 each: an M/D/1 queue at 0.9 on one machine, three at 0.3 on three."""
    service, waits = Service(ServiceKind.deterministic, 10 * MS), []
    for machines in ((0, 1, 2, 3, 3, 3), (0, 1, 2, 3, 4, 5)):
        it = SimulationRun(
            make(
                "hedged",
                spread_replicas(3, 1),
                0.3,
                service,
                machines=machines,
                queries=40_000,
                queue=10**6,
                deadline=1e9,
            )
        )
        for machine in range(3):
            it.turns[machine] = iter([0.0])
        outcome = it.run()
        assert outcome.replicated == outcome.answers
        waits.append(outcome.latencies.mean() - 10 * MS)
    assert waits[0] == pytest.approx(0.9 / 0.1 * 5 * MS, rel=0.3)
    assert waits[1] == pytest.approx(0.3 / 0.7 * 5 * MS, rel=0.3)


@pytest.mark.parametrize(("unpacked", "share"), [(0, 1.0), (1, 2 / 3), (2, 1 / 3), (3, 0.0)])
@pytest.mark.slow
def test_a_replica_unpacks_what_it_does_not_have_at_hand(unpacked: int, share: float) -> None:
    """All three experts gone, each query's drawn at random: of the last k distinct ones k/3 of the queries are."""
    service = Service(ServiceKind.deterministic, 10 * MS)
    options = {"machines": (0, 1, 2, 3, 3, 3), "broken": frozenset({0, 1, 2}), "queries": 1500, "quantile": 0.0}
    it = make("hedged", spread_replicas(3, 1), 1e-5, service, unpacking=5 * MS, unpacked=unpacked, **options)
    latencies = run_simulation(it).latencies.round(4)
    assert ((latencies == 10 * MS) | (latencies == 15 * MS)).mean() > 0.999  # hardly one waits for another
    assert (latencies == 15 * MS).mean() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("experts", [2, 5])
def test_neighbours_share_the_load_of_a_machine_that_is_gone(experts: int) -> None:
    """The first machine gone for ever: its share of the queries goes to the least loaded of the others."""
    pairs = [(machine, each) for machine in range(experts) for each in range(experts) if each != machine]
    machines = (*range(experts), *(machine for machine, _ in pairs))
    layout = Layout(experts, copies=tuple(each for _, each in pairs))
    service = Service(ServiceKind.deterministic, 10 * MS)
    gone, well = (
        run_simulation(make("hedged", layout, 0.3, service, machines=machines, broken=frozenset(broken), queries=8000))
        for broken in ({0}, ())
    )
    assert gone.failed == 0
    assert gone.replicated / gone.answers == pytest.approx(1 / experts, abs=0.05)
    assert gone.latencies.mean() > well.latencies.mean()
    assert gone.utilisation == pytest.approx(0.3, abs=0.04)  # (experts − 1) machines at 0.3·N/(N − 1), and one at 0


def test_batches_carry_a_load_that_one_at_a_time_could_not() -> None:
    """Load 0.95 and eight inputs for the price of one and a bit: waits stay within a few services."""
    service = Service(ServiceKind.deterministic, 10 * MS, marginal=0.1)
    layout = Layout(1)
    alone, together = (
        np.quantile(run_simulation(make("uncoded", layout, 0.95, service, batch=batch, queries=20_000)).latencies, 0.99)
        for batch in (1, 8)
    )
    assert together < 4 * 10 * MS < alone


def test_the_front_end_takes_its_time_and_its_way() -> None:
    service = Service(ServiceKind.deterministic, 10 * MS)
    front_end = FrontEndCost(seconds=2 * MS, hop=3 * MS)
    outcome = run_simulation(make("uncoded", Layout(3), 0.001, service, front_end=front_end))
    assert np.median(outcome.latencies) == pytest.approx(15 * MS)
    busy = run_simulation(make("uncoded", Layout(3), 0.5, service, front_end=FrontEndCost(6 * MS, 0.0, processes=1)))
    # 150 queries a second at 6 ms each: an M/D/1 queue at 0.9 before the servers, 27 ms of waiting in the mean
    free = run_simulation(make("uncoded", Layout(3), 0.5, service))
    assert busy.latencies.mean() - free.latencies.mean() > 20 * MS
    enough = run_simulation(make("uncoded", Layout(3), 0.5, service, front_end=FrontEndCost(6 * MS, 0.0)))
    assert enough.latencies.mean() - free.latencies.mean() < 10 * MS


def test_outcomes_depend_neither_on_processes_nor_on_what_ran_before() -> None:
    simulations = [make("coded_hedged", queries=400, seed=seed) for seed in (0, 1)]
    one, two, again = (
        simulate_all(simulations, jobs=1),
        simulate_all(simulations, jobs=2),
        simulate_all(simulations[::-1], jobs=1),
    )
    for a, b, c in zip(one, two, again[::-1], strict=True):
        np.testing.assert_array_equal(a.latencies, b.latencies)
        np.testing.assert_array_equal(a.latencies, c.latencies)
    assert not np.array_equal(one[0].latencies, one[1].latencies)


def test_processes_that_simulate_need_not_load_pytorch() -> None:
    code = "import sys, coin.serving.sim.simulation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_mistakes() -> None:
    for wrong in ({"load": 1.0}, {"load": 0.0}, {"queries": 3}):
        with pytest.raises(ConfigurationError, match=str(next(iter(wrong.values())))):
            make(**wrong)
    with pytest.raises(ConfigurationError, match=r"share=1\.0"):
        Slowdown(1.0)
    with pytest.raises(ConfigurationError, match="share=-1"):
        Failures(-1)
    with pytest.raises(ConfigurationError, match="measured"):
        Service(seconds=1.0)
    with pytest.raises(ConfigurationError, match="tail"):
        Service(tail=-1.0)
    with pytest.raises(ConfigurationError, match="jobs=0"):
        simulate_all([make()], jobs=0)
    assert isinstance(run_simulation(make()), SimulationOutcome)
