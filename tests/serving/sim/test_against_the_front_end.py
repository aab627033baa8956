"""The simulation against the front end itself, on a virtual clock, with the same arrivals and service times.

Without what the two have differently: the way there and back, in which the real server is idle; a replica's machine,
which serves its networks' batches in the order in which they were formed; and queues that are full.
"""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from coin.errors import ServingError
from coin.serving.front_end import FrontEnd
from coin.serving.layout import members, spread_copies
from coin.serving.limits import Limits
from coin.serving.policies import Lateness, Policy, PolicyKind
from coin.serving.replies import Reply
from coin.serving.sim.conditions import (
    Conditions,
    FrontEndCost,
    Phase,
    Service,
    ServiceKind,
    Slowdown,
    poisson_arrivals,
)
from coin.serving.sim.simulation import QueryTarget, Simulation, run_simulation
from tests.serving.conftest import ask_all, ask_one

CONDITIONS = Conditions(
    Service(ServiceKind.exponential, 0.01, tail=0.2, marginal=0.3),
    Slowdown(0.1, 8.0, 30.0, together=0.3),
    front_end=FrontEndCost(0.0, 0.0),
    batch=4,
    deadline=40.0,
    queue=256,
)


def served(simulation: Simulation, system: Any, virtually: Any) -> np.ndarray:
    """Return the latencies of the front end's queries, infinite where they failed."""
    unit, layout, conditions = simulation.unit, simulation.layout, simulation.conditions
    deadline = conditions.deadline * unit

    def server(place: int) -> Any:
        draw = np.random.default_rng([simulation.seed, 1, place])
        times = conditions.service_times(simulation.samples[place], draw)
        phases = [Phase(turns) for turns in conditions.slow_phases(place, simulation.seed, unit)]
        holds = place if place < layout.num_experts + layout.num_coded else layout.copies[place - layout.num_experts]

        async def answer(inputs: torch.Tensor) -> Reply:
            seconds = next(times) * (1 + (conditions.service.marginal or 0) * (len(inputs) - 1))
            if any(phase.is_on(asyncio.get_running_loop().time()) for phase in phases):
                seconds *= conditions.slowdown.factor
            await asyncio.sleep(seconds)
            return system.reply(holds, inputs)

        return answer

    front = FrontEnd(
        {str(place): server(place) for place in range(layout.num_servers)},
        layout,
        simulation.policy,
        system.expects,
        torch.zeros(1, 2, dtype=torch.float64),
        system.decodings_of(simulation.policy),
        Limits(deadline, 1e3, 10**6, conditions.queue, conditions.batch),
    )
    wanted = simulation.wanted()
    for experts in set(wanted):  # as in a system that has run for long
        front.lateness[experts, 1] = Lateness(simulation.policy.quantile, 3 * unit, deadline, experience=4000)
    latencies = np.full(simulation.queries, np.inf)

    async def ask(place: int, arrival: float) -> None:
        await asyncio.sleep(arrival)
        inputs = torch.randn(1, 2, generator=torch.Generator().manual_seed(place), dtype=torch.float64)
        try:
            if simulation.want is QueryTarget.all:
                await ask_all(front, inputs)
            else:
                await ask_one(front, inputs, members(wanted[place])[0])
        except ServingError:
            return
        latencies[place] = asyncio.get_running_loop().time() - arrival

    async def main() -> None:
        arrivals = poisson_arrivals(simulation.rate, simulation.queries, simulation.seed)
        async with front:
            await asyncio.gather(*(ask(place, arrival) for place, arrival in enumerate(arrivals.tolist())))

    virtually(main())
    return latencies[simulation.queries // 4 :]


@pytest.mark.slow
@pytest.mark.parametrize("want", list(QueryTarget))
@pytest.mark.parametrize("kind", list(PolicyKind))
def test_simulated_latencies_are_those_of_the_front_end(
    kind: PolicyKind, want: QueryTarget, linear_system: Any, virtually: Any
) -> None:
    system = linear_system([[0.5, 0.3, 0.2]])
    policy = Policy(kind)
    layout = system.layout(policy) if policy.coded else spread_copies(3, 2)
    samples = (np.array([0.01]),) * layout.num_servers
    queries = 400 if want is QueryTarget.all else 1000
    simulation = Simulation(layout, policy, samples, CONDITIONS, 0.75, want=want, queries=queries, seed=3)
    outcome = run_simulation(simulation)
    found = served(simulation, system, virtually)
    np.testing.assert_allclose(found, outcome.latencies, rtol=1e-6)
    assert 0 < np.isinf(outcome.latencies).sum() < len(found) / 4
    assert bool(outcome.decoded) == policy.coded
    assert bool(outcome.replicated) != policy.coded
