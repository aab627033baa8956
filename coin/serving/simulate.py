"""The front end on a virtual clock: its own code, with simulated machines that are slow or down."""

import asyncio
import math
import selectors
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coin.errors import ServingError
from coin.modules import Coded
from coin.serving.front_end import Answer, FrontEnd
from coin.serving.limits import Limits
from coin.serving.machines import Conditions, Machine, ServiceTimes
from coin.serving.policies import Lateness, Policy, StandIns
from coin.serving.server_state import Server

# One expert's answer, drawn at random, or all experts'.
QueryTarget = StrEnum("QueryTarget", ["one", "all"])
LEVELS = {"p50": 0.5, "p99": 0.99, "p999": 0.999}  # the quantiles of the latency that are reported


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time, in seconds from 0, jumps to the next timer where everything waits."""

    def __init__(self) -> None:
        self._now = 0.0
        selector = selectors.DefaultSelector()
        selector.select = self._jump  # type: ignore[method-assign]
        super().__init__(selector)

    def _jump(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everything waits and no timer is set: this would hang for ever")
        self._now += max(timeout, 0.0)
        return []

    def time(self) -> float:
        """Return the virtual time."""
        return self._now


class SimulatedQueries(NamedTuple):
    """Seconds to an answer ``[Q]``, infinity if none came, the share that stood in, and forward passes per query."""

    latencies: NDArray[np.float64]
    stood_in: float
    forwards: float


@dataclass(frozen=True)
class Simulation:
    """One simulation; `times` has every server's own."""

    stand_ins: StandIns
    policy: Policy
    conditions: Conditions
    times: Mapping[str, ServiceTimes]
    want: QueryTarget = QueryTarget.one
    seed: int = 0  # of everything random; queries and phases are the same for all policies

    @property
    def unit(self) -> float:
        """The experts' mean service time for one input, in seconds, without the tail: loads and phases refer to it."""
        return self.mean_seconds(self.stand_ins.experts)

    def mean_seconds(self, servers: Sequence[str]) -> float:
        """Return some servers' mean service time for one input, in seconds, without the tail; NaN for none."""
        seconds = [self.times[name].mean() for name in servers]
        return float(np.mean(seconds)) if seconds else math.nan

    @property
    def capacity(self) -> float:
        """How many answers a second the experts can give, one at a time."""
        slow = self.conditions.slow
        down = self.conditions.down
        speed = 0.0
        for machine in range(len(self.stand_ins.experts)):
            share = slow.share_of(machine)
            speed_while_up = 1 - share + share / slow.factor
            speed += speed_while_up * (1 - down.share_of(machine))
        return speed / (1 + self.conditions.tail) / self.unit

    def machines(self) -> tuple[list[Machine], dict[str, Server]]:
        """Return new machines, one for each process, and the servers that they run, by name."""
        machines: list[Machine] = []
        servers: dict[str, Server] = {}
        for place, names in enumerate(self.stand_ins.processes.values()):
            machine = Machine(place, self.times, self.conditions, self.unit, self.seed)
            machines.append(machine)
            for name in names:
                servers[name] = partial(machine.ask, name)
        return machines, servers

    def run(self) -> SimulatedQueries:
        """Run the simulation; with the same options it comes out the same to the last bit."""
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(self._run())

    async def _run(self) -> SimulatedQueries:
        loop = asyncio.get_running_loop()
        total = self.conditions.queries
        warm_up = total // 4
        machines, servers = self.machines()
        limits = Limits(queries=total)
        front = FrontEnd(servers, self.stand_ins, self.policy, lambda expert, replies: None, limits)
        experts = tuple(range(len(self.stand_ins.experts)))
        # As in a system that has run for long.
        for wanted in (*((expert,) for expert in experts), experts):
            late = Lateness(self.policy.quantile, 3 * self.unit, limits.deadline, experience=4000)
            front.lateness[wanted, 1] = late
        for_all = self.want is QueryTarget.all
        answers_each = len(experts) if for_all else 1
        rate = self.conditions.load * self.capacity / answers_each
        draw_gaps = np.random.default_rng([self.seed, 0])
        draw_experts = np.random.default_rng([self.seed, 2])
        gaps = draw_gaps.exponential(1 / rate, total).tolist()
        drawn = draw_experts.integers(len(experts), size=total).tolist()
        latencies = np.full(total, np.inf)
        found: list[Answer] = []

        async def ask(query: int) -> None:
            arrived = loop.time()
            try:
                wanted = experts if for_all else (drawn[query],)
                answers = await front.ask((0,), wanted, arrived + limits.deadline)
            except ServingError:
                return
            latencies[query] = loop.time() - arrived
            if query >= warm_up:
                found.extend(answers)

        async with asyncio.TaskGroup() as group:
            for query, gap in enumerate(gaps):
                await asyncio.sleep(gap)
                group.create_task(ask(query))
        own = self.stand_ins.experts
        stood_in = sum(answer.answered_by != (own[answer.expert],) for answer in found)
        wanted_answers = (total - warm_up) * answers_each
        forwards = sum(machine.forwards for machine in machines)
        return SimulatedQueries(latencies[warm_up:], stood_in / wanted_answers, forwards / total)


def row_of(coded: Coded, it: Simulation, runs: Sequence[SimulatedQueries]) -> dict[str, object]:
    """Return the summary of one simulation over its seeds: a row of ``simulation.csv``.

    Latencies are in seconds, of all seeds together and the least and largest of one, as order statistics: failures are
    never interpolated. Memory is in bytes of weights on all servers; ``extra_memory`` is without the experts' own.
    ``standing_in_accuracy`` is that of the answers that stood in, ``effective_accuracy`` that of all that were wanted;
    those that never came are wrong. ``service_seconds`` is the experts' mean service time for one input,
    ``standin_seconds`` that of the servers that stand in, empty where nobody does.
    """
    assert coded.results is not None
    is_several = coded.results["erased"].str.contains("+", regex=False)
    rows = coded.results[~is_several]  # of one lost expert
    own_accuracy = float(rows["expert_accuracy"].mean())
    tensors = coded.experts.state_dict().values()
    expert_bytes = float(sum(tensor.nbytes for tensor in tensors))
    if it.policy.which in ("nobody", "replica"):
        variant = ""
        accuracy = own_accuracy
        extra_bytes = expert_bytes * len(it.stand_ins.of[0])
    else:
        variant = f"{coded.method} {rows['decoder'].iloc[0]}"
        accuracy = float(rows["decoded_accuracy"].mean())
        extra_bytes = 2**20 * float(rows["memory_mib"].mean())
    row: dict[str, object] = {
        "want": str(it.want),
        "redundancy": str(it.policy.kind),
        "variant": variant,
        "seeds": len(runs),
        "memory": expert_bytes + extra_bytes,
        "extra_memory": extra_bytes,
    }
    latencies = np.stack([run.latencies for run in runs])  # [S, Q]
    for name, level in LEVELS.items():
        of_seeds = np.quantile(latencies, level, axis=1, method="higher")
        row[name] = np.quantile(latencies, level, method="higher")
        row[f"{name}_low"] = of_seeds.min()
        row[f"{name}_high"] = of_seeds.max()
    stood_in = np.mean([run.stood_in for run in runs])
    failed = np.isinf(latencies).mean()
    stand_ins = it.stand_ins.servers[len(it.stand_ins.experts) :]
    with_tail = 1 + it.conditions.tail
    return row | {
        "share_stood_in": stood_in,
        "share_failed": failed,
        "forwards": np.mean([run.forwards for run in runs]),
        "standing_in_accuracy": accuracy,
        "effective_accuracy": (1 - stood_in - failed) * own_accuracy + stood_in * accuracy,
        "service_seconds": it.unit * with_tail,
        "standin_seconds": it.mean_seconds(stand_ins) * with_tail,
    }
