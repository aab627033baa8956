"""Random schedules of delays, losses, garbage and cancellations, under a virtual clock.

Inputs and weights are random and the coded models exact, so that an answer that is right can only be that of the
query's own expert to the query's own inputs.
"""

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from coin.errors import DeadlineError, LostError, OverloadedError, ServingError
from coin.serving.hedge import EXPERIENCE, REMEMBERED, SLOW, HedgeTimer
from coin.serving.limits import Limits
from coin.serving.policies import POLICIES, PolicyKind
from coin.serving.servers import Reply
from coin.serving.system import Answer
from tests.serving.conftest import LinearSystem, ask_all, run_virtually, virtually

CODES = ([[0.5, 0.5]], [[0.5, 0.3, 0.2]], [[0.6, 0.4, 0.0], [0.0, 0.4, 0.6]], [[0.4, 0.3, 0.2, 0.1]])
FAILURES = ("raise", "hang", "nan")
DEADLINE, TIMEOUT = 20.0, 5.0


@dataclass
class Asked:
    """A query, which servers answered it or failed, and how it ended."""

    inputs: torch.Tensor
    experts: list[int]
    cancel_at: float | None
    valid: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    began: float = 0.0
    ended: float = 0.0
    answers: list[Answer] | None = None
    error: BaseException | None = None


class Schedule:
    """One system with servers whose every call goes as a seed says; `bad` are those that always fail, and no other."""

    def __init__(self, seed: int, kind: PolicyKind, quantile: float, bad: set[str] | None = None) -> None:
        draw = self.draw = random.Random(seed)
        self.it = LinearSystem(draw.choice(CODES), kind, quantile, seed)
        names, count = self.it.stand_ins.servers, self.it.code.num_experts
        self.trouble, self.bad = draw.choice((0.0, 0.1, 0.4)), bad
        self.refused = set[str]()  # the servers that ever refused what would wait too long, or were tried by another
        self.dies = {name: draw.uniform(0, 10) for name in names if draw.random() < 0.15}
        wants = [[expert] for expert in range(count)] + [list(range(count))]
        self.queries = [
            Asked(
                torch.tensor([[float(k), draw.uniform(-1, 1)] for _ in range(draw.choice((1, 1, 3)))]).double(),
                draw.choice(wants),
                draw.uniform(0, 4) if bad is None and draw.random() < 0.2 else None,
            )
            for k in range(draw.randint(1, 8))
        ]
        lateness = draw.choice((0.05, 1.0))
        self.limits = Limits(deadline=DEADLINE, timeout=TIMEOUT, initial_lateness=lateness)
        if bad is not None:  # with 8 queries of a second nobody is full, whatever is known of the servers' pace
            self.limits = Limits(deadline=4 * DEADLINE, timeout=4 * TIMEOUT, initial_lateness=lateness, batch=64)
        self.front = self.it.front_end(self.ask_server, self.limits)
        for server in self.front.servers.values():
            server.is_full = partial(self.noted, server.name, server.is_full)  # type: ignore[method-assign]

    def noted(self, name: str, is_full: Callable[[], bool]) -> bool:
        found = is_full()
        if found:
            self.refused.add(name)
        return found

    async def ask_server(self, name: str, expert: int, inputs: torch.Tensor) -> Reply:
        now, query = asyncio.get_running_loop().time(), self.queries[int(inputs[0, 0])]
        gone = now > self.dies.get(name, math.inf) or self.draw.random() < self.trouble
        fails = gone if self.bad is None else name in self.bad
        way, delay = self.draw.choice(FAILURES) if fails else None, self.draw.expovariate(1.0)
        if self.bad is not None:
            delay = min(delay, 1.0)  # nobody else is late enough to be lost
        if way is None and delay < 0.99 * TIMEOUT:
            await asyncio.sleep(delay)
            query.valid.add(name)
            return self.it.reply(name, expert, inputs)
        query.failed.add(name)
        await asyncio.sleep(1e6 if way in (None, "hang") else min(delay, 1.0))
        if way == "raise":
            raise RuntimeError("a server's own trouble")
        return Reply(self.it.reply(name, expert, inputs).logits * torch.nan, inputs)

    async def run(self) -> None:
        tasks = []
        for query in self.queries:
            await asyncio.sleep(self.draw.choice((0.0, 0.0, self.draw.expovariate(1.0))))
            tasks.append(asyncio.create_task(self._ask(query)))
        await asyncio.gather(*tasks)

    async def _ask(self, query: Asked) -> None:
        loop = asyncio.get_running_loop()
        query.began = loop.time()
        task = asyncio.create_task(ask_all(self.front, query.inputs, query.experts))
        if query.cancel_at is not None:
            loop.call_later(query.cancel_at, task.cancel)
        try:
            query.answers = await task
        except (ServingError, asyncio.CancelledError) as error:
            query.error = error
        query.ended = loop.time()

    def can_answer(self, expert: int, servers: set[str]) -> bool:
        return self.it.stand_ins.experts[expert] in servers or self.it.stand_ins.suffice(expert, servers)

    def check(self) -> None:
        for query in self.queries:
            assert (query.answers is None) == (query.error is not None)
            assert query.ended <= query.began + self.limits.deadline + 1e-6
            if query.answers is not None:
                self.check_answers(query, query.answers)
            elif isinstance(query.error, asyncio.CancelledError):
                assert query.cancel_at is not None
            elif isinstance(query.error, LostError | OverloadedError):  # the latter of one that answers others
                left = set(self.it.stand_ins.servers) - query.failed - self.refused
                assert not all(self.can_answer(expert, left) for expert in query.experts)
            else:
                assert isinstance(query.error, DeadlineError)
                assert not all(self.can_answer(expert, query.valid) for expert in query.experts)

    def check_answers(self, query: Asked, answers: list[Answer]) -> None:
        for expert, answer in zip(query.experts, answers, strict=True):
            assert torch.allclose(answer.logits, self.it.truth(expert, query.inputs), rtol=0, atol=1e-9)
            used, own = set(answer.answered_by), self.it.stand_ins.experts[expert]
            assert used <= query.valid
            if answer.decoded:
                assert own not in used
                assert self.it.stand_ins.suffice(expert, used)
            else:
                assert used & {own, *self.it.stand_ins.of[expert]}
                assert len(used) == 1


SEEDS = st.integers(0, 2**32 - 1)


def schedules(count: int) -> settings:
    return settings(max_examples=count, deadline=None, database=None)


@schedules(400)
@given(SEEDS, st.sampled_from(PolicyKind), st.sampled_from((0.0, 0.5, 0.95)))
def test_every_query_gets_one_right_answer_or_one_justified_failure(seed: int, kind: PolicyKind, late: float) -> None:
    schedule = Schedule(seed, kind, late)
    run_virtually(schedule.run())
    schedule.check()


@schedules(200)
@given(SEEDS, st.sampled_from([k for k in PolicyKind if POLICIES[k][0] == "everyone"]), st.sampled_from((0.0, 0.9)))
def test_losing_up_to_r_servers_loses_no_query(seed: int, kind: PolicyKind, quantile: float) -> None:
    schedule = Schedule(seed, kind, quantile, bad=set())
    servers: Any = schedule.it.stand_ins.servers
    schedule.bad = set(schedule.draw.sample(servers, schedule.draw.randint(1, schedule.it.code.num_coded)))
    run_virtually(schedule.run())
    schedule.check()
    for query in schedule.queries:
        # A lost coded model and a lost expert may be more than one row that is left makes up for.
        if all(schedule.can_answer(expert, set(servers) - schedule.bad) for expert in query.experts):
            assert query.error is None


@pytest.mark.parametrize("quantile", [0.5, 0.9])
@virtually
async def test_the_share_of_late_answers_follows_the_quantile_though_late_ones_are_overtaken(quantile: float) -> None:
    """Those are withdrawn after a stand-in's 0.2 seconds: how long they would have taken is not known."""
    hedge, draw = HedgeTimer(quantile, 0.01), random.Random(0)
    for scale in (1.0, 3.0, 0.5):
        late = []
        for _ in range(20 * REMEMBERED):
            taken, patience = draw.expovariate(1 / scale), hedge.seconds(0, 1)
            request = asyncio.get_running_loop().create_task(asyncio.sleep(taken, True))
            hedge.observe(0, 1, request)
            await asyncio.wait({request}, timeout=patience)
            late.append(not request.done())
            await asyncio.wait({request}, timeout=0.2)
            request.cancel()
            await asyncio.sleep(0)
        assert sum(late[10 * REMEMBERED :]) / (10 * REMEMBERED) == pytest.approx(1 - quantile, abs=0.05)


@virtually
async def test_an_answers_lateness_is_known_by_expert_and_size_and_bounded_by_most_experts() -> None:
    hedge = HedgeTimer(0.9, 0.5)

    async def take(expert: int, inputs: int, seconds: float) -> None:
        request = asyncio.get_running_loop().create_task(asyncio.sleep(seconds, True))
        hedge.observe(expert, inputs, request)
        await request

    for number in range(EXPERIENCE):
        assert hedge.seconds(0, 1) == 0.5
        await take(0, 1, 0.01 * number)
    assert hedge.seconds(0, 1) == pytest.approx(0.18)  # of 0 to 0.19
    assert hedge.seconds(0, 8) == 0.5
    assert hedge.seconds(1, 1) == SLOW * hedge.seconds(0, 1)
    for _ in range(EXPERIENCE):
        await take(1, 1, 9.0)
        await take(2, 1, 0.1)
    assert hedge.seconds(1, 1) == SLOW * hedge.seconds(0, 1)
    assert HedgeTimer(0.0, 1.0).seconds(0, 1) == 0.0
