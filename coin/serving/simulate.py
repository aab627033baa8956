"""The front end on a virtual clock: its own code, with simulated servers on machines that are slow or down."""

import asyncio
import math
import random
import selectors
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from coin.core.choices import check_integer, check_number
from coin.errors import LostError, OverloadedError, ServingError
from coin.modules import Coded
from coin.serving.front_end import Answer, FrontEnd, Limits, Server
from coin.serving.policies import Lateness, Policy, StandIns
from coin.serving.servers import NetworkServer

BATCHES = (1, 2, 4, 8)  # the numbers of inputs that are timed, up to `Limits.batch`
WARM_UP = 5  # passes before those that are timed
QueryTarget = StrEnum("QueryTarget", ["one", "all"])  # one expert's answer, drawn at random, or all experts'


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time, in seconds from 0, jumps to the next timer where everything waits."""

    def __init__(self) -> None:
        self._now, selector = 0.0, selectors.DefaultSelector()
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


@dataclass(frozen=True)
class Phases:
    """Exponentially distributed phases in which a machine is slow, or down.

    Args:
        share: The share of the time; 0 for never, 1 for always.
        length: The mean length, in mean service times; `factor`, the slowdown of a service that begins in a slow phase.
        machines: How many machines have such phases, the experts' first; 0 for all.
    """

    share: float = 0.0
    length: float = 100.0
    factor: float = 5.0
    machines: int = 0

    def __post_init__(self) -> None:
        if self.share != 1:
            check_number("share", self.share, low=0, high=1)
        check_number("length", self.length, low=0, strict=True)
        check_number("factor", self.factor, low=1)
        check_integer("machines", self.machines, 0)

    def share_of(self, machine: int) -> float:
        """Return the share of the time for which the phases of a machine, numbered from 0, are on."""
        return self.share if self.machines == 0 or machine < self.machines else 0.0

    def is_on(self, machine: int, unit: float, draw: random.Random) -> Callable[[float], bool]:
        """Return a function that says whether a machine's phase is on; call it with ascending times."""
        share = self.share_of(machine)
        if share in (0.0, 1.0):
            return lambda now: share == 1.0
        lengths = {True: self.length * unit, False: self.length * unit * (1 - share) / share}
        on = draw.random() < share
        ends = draw.expovariate(1 / lengths[on])

        def look(now: float) -> bool:
            nonlocal on, ends
            while now >= ends:
                on = not on
                ends += draw.expovariate(1 / lengths[on])
            return on

        return look


@dataclass(frozen=True)
class Conditions:
    """The load, and the properties of machines and front end.

    Args:
        load: The share of the experts' capacity (without batching) that own answers use, in (0, 1).
        queries: How many there are; the first quarter warms up and is not reported.
        tail: The mean of an exponential time on top of every service, in multiples of the service's own mean.
        slow: Slow phases of machines; `down`, their failures, in which all their requests are lost.
    """

    load: float = 0.4
    queries: int = 20_000
    tail: float = 0.0
    slow: Phases = field(default_factory=Phases)
    down: Phases = field(default_factory=lambda: Phases(length=1000.0))

    def __post_init__(self) -> None:
        check_number("load", self.load, low=0, high=1, strict=True)
        check_integer("queries", self.queries, 40)
        check_number("tail", self.tail, low=0)
        check_number("down.share", self.down.share, low=0, high=1)


class ServiceTimes:
    """How long a network takes for a batch, in seconds: measured at the sizes of `BATCHES`, in between interpolated.

    Args:
        seconds: For each of these sizes K measured times ``[4, K]``.
    """

    def __init__(self, seconds: NDArray[np.float64]) -> None:
        self._seconds = np.sort(seconds, axis=1)
        self._means = self._seconds.mean(axis=1)

    def mean(self, inputs: int = 1) -> float:
        """Return the mean time for so many inputs."""
        return float(np.interp(inputs, BATCHES, self._means))

    def at(self, quantile: float, inputs: int) -> float:
        """Return the time for so many inputs at a quantile in [0, 1) of the measured ones."""
        column = int(quantile * self._seconds.shape[1])
        return float(np.interp(inputs, BATCHES, self._seconds[:, column]))


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
        return float(np.mean([self.times[name].mean() for name in self.stand_ins.experts]))

    @property
    def capacity(self) -> float:
        """How many answers a second the experts can give, one at a time."""
        slow, down = self.conditions.slow, self.conditions.down
        speeds = []
        for machine in range(len(self.stand_ins.experts)):
            share = slow.share_of(machine)
            speeds.append((1 - share + share / slow.factor) * (1 - down.share_of(machine)))
        return sum(speeds) / (1 + self.conditions.tail) / self.unit

    @property
    def standin_unit(self) -> float:
        """The same of the servers beyond the experts; NaN where there are none."""
        experts = self.stand_ins.experts
        others = [self.times[name].mean() for name in self.stand_ins.servers if name not in experts]
        return float(np.mean(others)) if others else math.nan


class Outcome(NamedTuple):
    """Seconds to an answer ``[Q]``, infinity if none came, the share that stood in, and forward passes per query."""

    latencies: NDArray[np.float64]
    stood_in: float
    forwards: float


class Machine:
    """A machine that runs one batch at a time; each network that a batch asks for runs once, one after the other."""

    def __init__(self, it: Simulation, place: int) -> None:
        self.it, self.forwards, self._busy = it, 0, False
        self._draws = self._service_draws(place)
        self._is_slow = it.conditions.slow.is_on(place, it.unit, random.Random(f"slow {it.seed} {place}"))
        self._is_down = it.conditions.down.is_on(place, it.unit, random.Random(f"down {it.seed} {place}"))
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()

    def _service_draws(self, place: int) -> Iterator[tuple[float, float]]:
        """Yield for every service the quantile of its measured times, and its tail in multiples of their mean."""
        draw = np.random.default_rng([self.it.seed, 1, place])
        while True:
            quantiles = draw.random(4096).tolist()
            tails = draw.exponential(self.it.conditions.tail, 4096).tolist()
            yield from zip(quantiles, tails, strict=True)

    def _seconds(self, asked: Sequence[str]) -> float:
        """Return how long the networks take that the requests of a batch ask for."""
        quantile, tail = next(self._draws)
        seconds = 0.0
        for network, inputs in Counter(asked).items():
            times = self.it.times[network]
            seconds += times.at(quantile, inputs) + tail * times.mean(inputs)
        return seconds

    async def ask(self, network: str, inputs: object) -> None:
        """Answer a request to one of its networks; raises OverloadedError, and LostError where it is down."""
        if len(self._waiting) >= Limits.queue:
            raise OverloadedError("its queue is full")
        reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((network, reply))
        if not self._busy:
            self._begin()
        await reply

    def _begin(self) -> None:
        loop = asyncio.get_running_loop()
        batch: list[asyncio.Future[None]] = []
        asked: list[str] = []
        while self._waiting and len(batch) < Limits.batch:
            network, reply = self._waiting.popleft()
            if not reply.done():  # it was not withdrawn
                batch.append(reply)
                asked.append(network)
        self._busy = bool(batch)
        if batch:
            seconds = self._seconds(asked)
            seconds *= self.it.conditions.slow.factor if self._is_slow(loop.time()) else 1.0
            self.forwards += len(batch)
            # That a machine is down is known after a mean service time.
            loop.call_later(self.it.unit if self._is_down(loop.time()) else seconds, self._end, batch)

    def _end(self, batch: Sequence["asyncio.Future[None]"]) -> None:
        is_down = self._is_down(asyncio.get_running_loop().time())
        for reply in batch:
            if not reply.done():
                reply.set_exception(LostError("it is down")) if is_down else reply.set_result(None)
        self._begin()


def run_simulation(it: Simulation) -> Outcome:
    """Run one simulation; with the same options it comes out the same to the last bit."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_run(it))


async def _run(it: Simulation) -> Outcome:
    loop, count, total = asyncio.get_running_loop(), len(it.stand_ins.experts), it.conditions.queries
    machines, servers = dict[str, Machine](), dict[str, Server]()
    for name in it.stand_ins.servers:
        process = name.partition("/")[0]
        machines[process] = machines.get(process) or Machine(it, len(machines))
        servers[name] = partial(machines[process].ask, name)
    limits = Limits(queries=total)
    front = FrontEnd(servers, it.stand_ins, it.policy, lambda expert, replies: None, limits)
    for wants in (*((place,) for place in range(count)), tuple(range(count))):  # as in a system that has run for long
        front.lateness[wants, 1] = Lateness(it.policy.quantile, 3 * it.unit, limits.deadline, experience=4000)
    rate = it.conditions.load * it.capacity * (1 / count if it.want is QueryTarget.all else 1)
    gaps = np.random.default_rng([it.seed, 0]).exponential(1 / rate, total).tolist()
    wanted = np.random.default_rng([it.seed, 2]).integers(count, size=total).tolist()
    latencies, found = np.full(total, np.inf), list[Answer]()

    async def ask(place: int) -> None:
        arrived = loop.time()
        try:
            experts = range(count) if it.want is QueryTarget.all else [wanted[place]]
            answers = await front.ask((0,), experts, arrived + limits.deadline)
        except ServingError:
            return
        latencies[place] = loop.time() - arrived
        found.extend(answers if place >= total // 4 else ())

    async with asyncio.TaskGroup() as group:
        for place, gap in enumerate(gaps):
            await asyncio.sleep(gap)
            group.create_task(ask(place))
    kept = latencies[total // 4 :]
    stood_in = sum(answer.answered_by != (it.stand_ins.experts[answer.expert],) for answer in found)
    answers = len(kept) * (count if it.want is QueryTarget.all else 1)
    return Outcome(kept, stood_in / answers, sum(each.forwards for each in machines.values()) / total)


def measure(server: NetworkServer, repeats: int = 60) -> ServiceTimes:
    """Return a server's processor seconds on one thread, warm, for batches of the sizes of `BATCHES`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = [_processor_seconds(server, inputs, repeats) for inputs in BATCHES]
    finally:
        torch.set_num_threads(threads)
    return ServiceTimes(np.stack(seconds))


def _processor_seconds(server: NetworkServer, inputs: int, repeats: int) -> NDArray[np.float64]:
    """Return the processor seconds of passes over so many inputs ``[repeats]``."""
    batch = server.probe.repeat(inputs, 1, 1, 1)
    for _ in range(WARM_UP):
        server(batch)
    marks = [time.process_time()]  # not a clock's: others may be at work on this machine
    for _ in range(repeats):
        server(batch)
        marks.append(time.process_time())
    return np.diff(marks)


def row_of(coded: Coded, it: Simulation, outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Return the summary of one simulation over its seeds: a row of ``simulation.csv``.

    Latencies are in seconds, of all seeds together and the least and largest of one, as order statistics: failures are
    never interpolated. Memory is in bytes of weights on all servers; ``extra_memory`` is without the experts' own.
    ``standing_in_accuracy`` is that of the answers that stood in, ``effective_accuracy`` that of all that were wanted;
    those that never came are wrong. ``service_seconds`` is the experts' mean service time for one input,
    ``standin_seconds`` that of the servers that stand in, empty where nobody does.
    """
    assert coded.results is not None
    rows = coded.results[~coded.results["erased"].str.contains("+", regex=False)]
    own, right = float(rows["expert_accuracy"].mean()), float(rows["decoded_accuracy"].mean())
    experts = float(sum(each.nbytes for each in coded.experts.state_dict().values()))
    extra, variant = 2**20 * float(rows["memory_mib"].mean()), f"{coded.method} {rows['decoder'].iloc[0]}"
    if it.policy.which in ("nobody", "replica"):
        right, extra, variant = own, experts * len(it.stand_ins.of[0]), ""
    series = [each.latencies for each in outcomes]
    latencies: dict[str, float] = {}
    for name, level in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999)):
        every, *each = (np.quantile(values, level, method="higher") for values in (np.concatenate(series), *series))
        latencies |= {name: every, f"{name}_low": min(each), f"{name}_high": max(each)}
    stood_in, failed = np.mean([(each.stood_in, np.isinf(each.latencies).mean()) for each in outcomes], 0)
    return {
        "want": str(it.want), "redundancy": str(it.policy.kind), "variant": variant, "experts": len(coded.names),
        "seeds": len(series), "memory": experts + extra, "extra_memory": extra, "load": it.conditions.load, **latencies,
        "share_stood_in": stood_in, "share_failed": failed, "forwards": np.mean([each.forwards for each in outcomes]),
        "standing_in_accuracy": right, "effective_accuracy": (1 - stood_in - failed) * own + stood_in * right,
        "service_seconds": it.unit * (1 + it.conditions.tail),
        "standin_seconds": it.standin_unit * (1 + it.conditions.tail),
    }  # fmt: skip
