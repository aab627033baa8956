"""Random schedules of delays, losses, garbage and cancellations, under a virtual clock.

Inputs and weights are random and the coded models exact, so that an answer that is right can only be that of the
query's own expert to the query's own inputs.
"""

import asyncio
import random
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from hypothesis import example, given, settings, strategies as st

from coin.errors import DeadlineError, LostError, OverloadedError, ServingError
from coin.serving.front_end import FrontEnd
from coin.serving.layout import Layout, members, spread_copies
from coin.serving.limits import Limits
from coin.serving.policies import Policy, PolicyKind
from coin.serving.replies import Answer, Reply
from tests.serving.conftest import ask_all

CODES = ([[0.5, 0.5]], [[0.5, 0.3, 0.2]], [[0.6, 0.4, 0.0], [0.0, 0.4, 0.6]], [[0.4, 0.3, 0.2, 0.1]])
FAILURES = ("raise", "hang", "nan", "shape", "give up")
DEADLINE, TIMEOUT = 20.0, 5.0


@cache
def _system(linear_system: Any, code: int) -> Any:
    return linear_system(CODES[code])


@dataclass
class Asked:
    """A query, how it went at the servers, and how it ended."""

    inputs: torch.Tensor
    wanted: int
    cancel_at: float | None
    valid: int = 0
    failed: int = 0
    began: float = 0.0
    ended: float = 0.0
    answers: list[list[Answer]] = field(default_factory=list)
    error: BaseException | None = None


class Schedule:
    """One system with servers whose every call goes as a seed says."""

    def __init__(
        self, linear_system: Any, seed: int, kind: PolicyKind, quantile: float, bad: set[int] | None = None
    ) -> None:
        draw = self.draw = random.Random(seed)
        self.system = _system(linear_system, draw.randrange(len(CODES)))
        count, rows = self.system.code.num_experts, self.system.code.num_coded
        policy = Policy(kind, quantile)
        replicas = (
            Layout(count, copies=tuple(range(count)) * rows) if draw.random() < 0.5 else spread_copies(count, rows)
        )
        self.layout = self.system.layout(policy) if policy.coded else replicas
        self.trouble = draw.choice((0.0, 0.1, 0.4))
        self.bad = bad
        self.small = bad is None and draw.random() < 0.3
        self.dies = {server: draw.uniform(0, 10) for server in range(self.layout.num_servers) if draw.random() < 0.15}
        self.queries = [
            Asked(
                torch.tensor([[float(k), draw.uniform(-1, 1)] for _ in range(draw.choice((1, 1, 3)))]).double(),
                draw.choice([self.layout.every_expert, *(1 << expert for expert in range(count))]),
                draw.uniform(0, 4) if bad is None and draw.random() < 0.2 else None,
            )
            for k in range(draw.randint(1, 8))
        ]
        limits = Limits(
            deadline=DEADLINE,
            timeout=TIMEOUT,
            queue=draw.randint(1, 3) if self.small else 100,
            batch=draw.choice((1, 2, 8)),
            initial_lateness=draw.choice((0.05, 1.0)),
            failures=draw.choice((1, 3)),
            cooldown=draw.choice((0.5, 100.0)),
        )
        servers = {str(index): self._server(index) for index in range(self.layout.num_servers)}
        decodings = self.system.decodings_of(policy)
        probe = torch.tensor([[-1.0, 0.0]]).double()  # no query's
        self.front = FrontEnd(servers, self.layout, policy, self.system.expects, probe, decodings, limits)

    def _server(self, index: int) -> Any:
        async def answer(inputs: torch.Tensor) -> Reply:
            now = asyncio.get_running_loop().time()
            concerned = [self.queries[int(k)] for k in set(inputs[:, 0].tolist()) if k >= 0]
            way, delay = self._way(index, now), self.draw.expovariate(1.0)
            if self.bad is not None:
                delay = min(delay, 1.0)  # nobody else is late enough to be lost
            if way is None and delay < 0.99 * TIMEOUT:
                await asyncio.sleep(delay)
                for query in concerned:
                    query.valid |= 1 << index
                return self._reply(index, inputs)
            for query in concerned:
                query.failed |= 1 << index
            if way is None or way == "hang":
                await asyncio.sleep(1e6)
            await asyncio.sleep(min(delay, 1.0))
            if way == "raise":
                raise RuntimeError("a server's own trouble")
            if way == "give up":
                raise asyncio.CancelledError
            reply = self._reply(index, inputs)
            return Reply(reply.logits * torch.nan if way == "nan" else reply.logits[:, 1:])

        return answer

    def _way(self, index: int, now: float) -> str | None:
        """How a call fails, or None."""
        if self.bad is not None:
            return self.draw.choice(FAILURES) if index in self.bad else None
        if now > self.dies.get(index, 1e9) or self.draw.random() < self.trouble:
            return self.draw.choice(FAILURES)
        return None

    def _reply(self, index: int, inputs: torch.Tensor) -> Reply:
        first = self.layout.num_experts + self.layout.num_coded
        return self.system.reply(index if index < first else self.layout.copies[index - first], inputs)

    async def run(self) -> None:
        async with self.front:
            gaps = [self.draw.choice((0.0, 0.0, self.draw.expovariate(1.0))) for _ in self.queries]
            tasks = []
            for query, gap in zip(self.queries, gaps, strict=True):
                await asyncio.sleep(gap)
                tasks.append(asyncio.create_task(self._ask(query)))
            await asyncio.gather(*tasks)

    async def _ask(self, query: Asked) -> None:
        loop = asyncio.get_running_loop()
        query.began = loop.time()
        experts = list(members(query.wanted))
        task = asyncio.create_task(ask_all(self.front, query.inputs, experts))
        if query.cancel_at is not None:
            loop.call_later(query.cancel_at, task.cancel)
        try:
            query.answers.append(await task)
        except (ServingError, asyncio.CancelledError) as error:
            query.error = error
        query.ended = loop.time()

    def check(self) -> None:
        for query in self.queries:
            assert (len(query.answers) == 1) != (query.error is not None)
            assert query.ended <= query.began + DEADLINE + 1e-6
            if query.error is None:
                self.check_answers(query)
            elif isinstance(query.error, asyncio.CancelledError):
                assert query.cancel_at is not None
            elif isinstance(query.error, LostError):
                left = self.layout.everyone & ~query.failed
                assert not self.layout.covers(left, query.wanted)
            elif isinstance(query.error, OverloadedError):
                assert self.small
            else:
                assert isinstance(query.error, DeadlineError)
                assert self.is_cut(query) or not self.layout.covers(query.valid, query.wanted)
        counts = self.front.counts
        assert counts.total() - counts["decoded"] == len(self.queries)

    def is_cut(self, query: Asked) -> bool:
        """Whether the query went in several batches, each of which may have gone its own way."""
        return len(query.inputs) > self.front.limits.batch

    def check_answers(self, query: Asked) -> None:
        answers = query.answers[0]
        assert [answer.expert for answer in answers] == list(members(query.wanted))
        for answer in answers:
            wanted = self.system.truth(answer.expert, query.inputs)
            assert torch.allclose(answer.logits, wanted, rtol=0, atol=1e-9)
            hosts = {str(server) for server in members(self.layout.hosts(1 << answer.expert))}
            used = sum(1 << int(server) for server in answer.answered_by)
            assert used & ~query.valid == 0
            if self.is_cut(query):
                assert answer.decoded or set(answer.answered_by) <= hosts
            elif answer.decoded:
                assert not hosts & set(answer.answered_by)
                assert self.layout.covers(used, 1 << answer.expert)
            else:
                assert len(answer.answered_by) == 1
                assert answer.answered_by[0] in hosts


SEEDS = st.integers(0, 2**32 - 1)


def schedules(count: int) -> settings:
    return settings(max_examples=count, deadline=None, database=None)


@schedules(600)
@given(SEEDS, st.sampled_from(PolicyKind), st.sampled_from((0.0, 0.5, 0.95)))
def test_every_query_gets_one_right_answer_or_one_justified_failure(
    linear_system: Any, virtually: Any, seed: int, kind: PolicyKind, quantile: float
) -> None:
    schedule = Schedule(linear_system, seed, kind, quantile)
    virtually(schedule.run())
    schedule.check()


@schedules(250)
@example(291208, PolicyKind.coded_proactive, 0.0)  # cut, behind a server that hangs
@given(SEEDS, st.sampled_from([kind for kind in PolicyKind if Policy(kind).coded]), st.sampled_from((0.0, 0.9)))
def test_losing_up_to_r_servers_loses_no_query(
    linear_system: Any, virtually: Any, seed: int, kind: PolicyKind, quantile: float
) -> None:
    schedule = Schedule(linear_system, seed, kind, quantile, bad=set())
    servers = range(schedule.layout.num_servers)
    bad = set(schedule.draw.sample(servers, schedule.draw.randint(1, schedule.layout.num_coded)))
    schedule.bad = bad
    left = schedule.layout.everyone & ~sum(1 << server for server in bad)
    virtually(schedule.run())
    schedule.check()
    for query in schedule.queries:
        # A lost coded model and a lost expert may be more than one row that is left makes up for.
        if schedule.layout.covers(left, query.wanted):
            assert query.error is None


@schedules(150)
@given(SEEDS, st.sampled_from(PolicyKind))
def test_losing_more_is_a_failure_of_every_query_that_needs_them(
    linear_system: Any, virtually: Any, seed: int, kind: PolicyKind
) -> None:
    schedule = Schedule(linear_system, seed, kind, 0.9, bad=set())
    layout = schedule.layout
    schedule.bad = set(members(layout.hosts(1))) | set(range(layout.num_experts, layout.num_experts + layout.num_coded))
    virtually(schedule.run())
    schedule.check()
    for query in schedule.queries:
        if query.wanted & 1:
            assert isinstance(query.error, LostError | DeadlineError)
        else:
            assert query.error is None
            assert not any(answer.decoded for answer in query.answers[0])
