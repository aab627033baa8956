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
from coin.serving.front_end import Answer
from coin.serving.limits import Limits
from coin.serving.policies import Lateness, Policy, PolicyKind
from coin.serving.servers import Reply
from tests.serving.conftest import LinearSystem, ask_all, run_virtually

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
        self.it = LinearSystem(draw.choice(CODES), Policy(kind, quantile), seed)
        names, count = self.it.stand_ins.servers, self.it.code.num_experts
        self.trouble, self.bad = draw.choice((0.0, 0.1, 0.4)), bad
        self.full = set[str]()  # the servers that ever refused what would wait too long
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
            self.limits = Limits(deadline=4 * DEADLINE, timeout=4 * TIMEOUT, initial_lateness=lateness)
        self.front = self.it.front_end(self.ask_server, self.limits)
        for server in self.front.servers.values():
            server.is_full = partial(self.noted, server.name, server.is_full)  # type: ignore[method-assign]

    def noted(self, name: str, is_full: Callable[..., bool], *room: float) -> bool:
        self.full.update([name] if is_full() else [])
        return is_full(*room)

    async def ask_server(self, name: str, inputs: torch.Tensor) -> Reply:
        now, query = asyncio.get_running_loop().time(), self.queries[int(inputs[0, 0])]
        gone = now > self.dies.get(name, math.inf) or self.draw.random() < self.trouble
        fails = gone if self.bad is None else name in self.bad
        way, delay = self.draw.choice(FAILURES) if fails else None, self.draw.expovariate(1.0)
        if self.bad is not None:
            delay = min(delay, 1.0)  # nobody else is late enough to be lost
        if way is None and delay < 0.99 * TIMEOUT:
            await asyncio.sleep(delay)
            query.valid.add(name)
            return self.it.reply(name, inputs)
        query.failed.add(name)
        await asyncio.sleep(1e6 if way in (None, "hang") else min(delay, 1.0))
        if way == "raise":
            raise RuntimeError("a server's own trouble")
        return Reply(self.it.reply(name, inputs).logits * torch.nan, inputs)

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
                left = set(self.it.stand_ins.servers) - query.failed
                if isinstance(query.error, OverloadedError):
                    left -= self.full
                else:  # one that has failed others, and is full of requests, is not asked, and is lost
                    left -= {name for name in self.full if any(name in each.failed for each in self.queries)}
                assert not all(self.can_answer(expert, left) for expert in query.experts)
            else:
                assert isinstance(query.error, DeadlineError)
                assert not all(self.can_answer(expert, query.valid) for expert in query.experts)

    def check_answers(self, query: Asked, answers: list[Answer]) -> None:
        assert [answer.expert for answer in answers] == query.experts
        for answer in answers:
            assert torch.allclose(answer.reply.logits, self.it.truth(answer.expert, query.inputs), rtol=0, atol=1e-9)
            used, own = set(answer.answered_by), self.it.stand_ins.experts[answer.expert]
            assert used <= query.valid
            if answer.decoded:
                assert own not in used
                assert self.it.stand_ins.suffice(answer.expert, used)
            else:
                assert used & {own, *self.it.stand_ins.of[answer.expert]}
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
@given(SEEDS, st.sampled_from([k for k in PolicyKind if Policy(k).which == "everyone"]), st.sampled_from((0.0, 0.9)))
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


@pytest.mark.parametrize(("quantile", "initial"), [(0.5, 1e-4), (0.95, 1e-4), (0.95, 1.0), (0.95, 1e3)])
def test_lateness_follows_the_quantile_from_anywhere_and_through_a_change(quantile: float, initial: float) -> None:
    lateness = Lateness(quantile, initial)
    draw = random.Random(0)
    for scale in (1.0, 3.0):
        late = []
        for _ in range(30_000):
            late.append(draw.expovariate(1 / scale) > lateness.seconds)
            lateness.observe(late[-1])
        assert sum(late[-10_000:]) / 10_000 == pytest.approx(1 - quantile, abs=0.01)
        assert lateness.seconds == pytest.approx(-scale * math.log(1 - quantile), rel=0.2)


def test_lateness_has_limits() -> None:
    impatient = Lateness(0.0, 1.0)
    impatient.observe(True)
    assert impatient.seconds == 0.0
    bounded = Lateness(0.9, 5.0, longest=2.0)
    for _ in range(50):
        bounded.observe(True)
    assert bounded.seconds == 2.0
