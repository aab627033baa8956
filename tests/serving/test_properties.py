"""Random schedules of delays, losses, garbage and cancellations, under a virtual clock.

Inputs and weights are random and the coded models exact, so that an answer that is right can only be that of the
query's own expert to the query's own inputs.
"""

import asyncio
import math
import random
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from coin.errors import DeadlineError, LostError, OverloadedError, ServingError
from coin.serving.hedge import EXPERIENCE, REMEMBERED, SLOW, HedgeTimer
from coin.serving.limits import Limits
from coin.serving.policies import PolicyKind
from coin.serving.servers import Reply
from tests.serving.conftest import LinearSystem, ask_all, now, run_virtually, virtually

CODES = (
    [[0.5, 0.5]],
    [[0.5, 0.3, 0.2]],
    [[0.6, 0.4, 0.0], [0.0, 0.4, 0.6]],
    [[0.4, 0.3, 0.2, 0.1]],
)
TIMEOUT = 5.0


@dataclass
class Query:
    """A query, which servers answered it or failed, and how it ended."""

    inputs: torch.Tensor
    experts: list[int]
    cancel_after: float | None
    valid: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    seconds: float = 0.0
    answers: Any = None
    error: BaseException | None = None


class Schedule:
    """A system whose every call goes as a seed says, and up to eight queries to it."""

    def __init__(self, seed, policy, quantile):
        self.draw = draw = random.Random(seed)
        self.it = LinearSystem(draw.choice(CODES), policy, quantile, seed)
        self.servers = self.it.stand_ins.servers
        self.limits = Limits(
            deadline=20.0, timeout=TIMEOUT, initial_lateness=draw.choice((0.05, 1.0))
        )
        self.trouble = draw.choice((0.0, 0.1, 0.4))  # the share of requests that fail
        self.dies = {name: draw.uniform(0, 10) for name in self.servers if draw.random() < 0.15}
        self.cancelled = 0.2  # the share of queries that are cancelled
        # The servers that ever refused what would wait too long, or were tried by another.
        self.refused = set()

    def fails(self, name):
        """Whether a request fails that a server gets now."""
        return now() > self.dies.get(name, math.inf) or self.draw.random() < self.trouble

    def delay(self):
        """After how many seconds a server answers."""
        return self.draw.expovariate(1.0)

    def queries(self):
        count = self.it.code.num_experts
        wants = [*[[expert] for expert in range(count)], list(range(count))]
        made = []
        for number in range(self.draw.randint(1, 8)):
            size = self.draw.choice((1, 1, 3))
            rows = [[float(number), self.draw.uniform(-1, 1)] for _ in range(size)]
            is_cancelled = self.draw.random() < self.cancelled
            cancel_after = self.draw.uniform(0, 4) if is_cancelled else None
            made.append(Query(torch.tensor(rows).double(), self.draw.choice(wants), cancel_after))
        return made

    async def serve(self, name, expert, inputs):
        query = self.asked[int(inputs[0, 0])]
        reply = self.it.reply(name, expert, inputs)
        way = self.draw.choice(("raise", "hang", "nan")) if self.fails(name) else None
        delay = self.delay()
        if way is None and delay < 0.99 * TIMEOUT:
            await asyncio.sleep(delay)
            query.valid.add(name)
            return reply
        query.failed.add(name)
        await asyncio.sleep(1e6 if way in (None, "hang") else min(delay, 1.0))
        if way == "raise":
            raise RuntimeError("a server's own trouble")
        return Reply(reply.logits * torch.nan, inputs)

    async def ask(self, front, query):
        task = asyncio.create_task(ask_all(front, query.inputs, query.experts))
        if query.cancel_after is not None:
            asyncio.get_running_loop().call_later(query.cancel_after, task.cancel)
        began = now()
        try:
            query.answers = await task
        except (ServingError, asyncio.CancelledError) as error:
            query.error = error
        query.seconds = now() - began

    async def run(self):
        self.asked = self.queries()
        front = self.it.front_end(self.serve, self.limits)
        for server in front.servers.values():
            server.is_full = partial(self.noted, server.name, server.is_full)
        asking = []
        for query in self.asked:
            await asyncio.sleep(self.draw.choice((0.0, 0.0, self.draw.expovariate(1.0))))
            asking.append(asyncio.create_task(self.ask(front, query)))
        await asyncio.gather(*asking)

    def noted(self, name, is_full):
        found = is_full()
        if found:
            self.refused.add(name)
        return found

    def can_answer(self, query, servers):
        """Whether some servers suffice for all experts of a query."""
        stand_ins = self.it.stand_ins
        return all(
            stand_ins.experts[expert] in servers or stand_ins.suffice(expert, servers)
            for expert in query.experts
        )

    def check(self):
        for query in self.asked:
            assert query.seconds <= self.limits.deadline + 1e-6
            match query.error:
                case None:
                    self.check_answers(query)
                case asyncio.CancelledError():
                    assert query.cancel_after is not None
                case LostError() | OverloadedError():  # the latter of a server that answers others
                    left = set(self.servers) - query.failed - self.refused
                    assert not self.can_answer(query, left)
                case error:
                    assert isinstance(error, DeadlineError)
                    assert not self.can_answer(query, query.valid)

    def check_answers(self, query):
        stand_ins = self.it.stand_ins
        for expert, answer in zip(query.experts, query.answers, strict=True):
            torch.testing.assert_close(answer.logits, self.it.truth(expert, query.inputs))
            used = set(answer.answered_by)
            own = stand_ins.experts[expert]
            assert used <= query.valid
            if answer.decoded:
                assert own not in used
                assert stand_ins.suffice(expert, used)
            else:
                assert len(used) == 1
                assert used <= {own, *stand_ins.of[expert]}


class Losses(Schedule):
    """Up to as many servers always fail as there are coded models; no other does, and none is so slow as to be lost."""

    def __init__(self, seed, policy, quantile):
        super().__init__(seed, policy, quantile)
        # With 8 queries of a second nobody is full, whatever is known of the servers' pace.
        self.limits = Limits(deadline=80.0, timeout=4 * TIMEOUT, batch=64)
        self.cancelled = 0.0
        number = self.draw.randint(1, self.it.code.num_coded)
        self.bad = set(self.draw.sample(self.servers, number))

    def fails(self, name):
        return name in self.bad

    def delay(self):
        return min(super().delay(), 1.0)


def schedules(count):
    return settings(max_examples=count, deadline=None, database=None)


SEEDS = st.integers(0, 2**32 - 1)


@schedules(300)
@given(SEEDS, st.sampled_from(PolicyKind), st.sampled_from((0.0, 0.5, 0.95)))
def test_every_query_gets_one_right_answer_or_one_justified_failure(seed, policy, quantile):
    schedule = Schedule(seed, policy, quantile)
    run_virtually(schedule.run())
    schedule.check()


@schedules(150)
@given(SEEDS, st.sampled_from(("coded_hedged", "coded_proactive")), st.sampled_from((0.0, 0.9)))
def test_losing_up_to_r_servers_loses_no_query(seed, policy, quantile):
    """A lost coded model and a lost expert may be more than one row that is left makes up for."""
    schedule = Losses(seed, policy, quantile)
    run_virtually(schedule.run())
    schedule.check()
    left = set(schedule.servers) - schedule.bad
    for query in schedule.asked:
        assert query.error is None or not schedule.can_answer(query, left)


async def taken(hedge, expert, inputs, seconds, patience=None):
    """Have a request to an expert take so long; return whether it is done when the patience ends."""
    request = asyncio.get_running_loop().create_task(asyncio.sleep(seconds, True))
    hedge.observe(expert, inputs, request)
    await asyncio.wait({request}, timeout=patience)
    is_done = request.done()
    await asyncio.wait({request}, timeout=0.2)  # a stand-in's time, in which it is overtaken
    request.cancel()
    await asyncio.sleep(0)
    return is_done


@pytest.mark.parametrize("quantile", [0.5, 0.9])
@virtually
async def test_the_share_of_late_answers_follows_the_quantile_though_late_ones_are_overtaken(
    quantile,
):
    """Those are withdrawn: how long they would have taken is not known."""
    hedge = HedgeTimer(quantile, 0.01)
    draw = random.Random(0)
    for scale in (1.0, 3.0, 0.5):
        in_time = []
        for _ in range(20 * REMEMBERED):
            seconds = draw.expovariate(1 / scale)
            in_time.append(await taken(hedge, 0, 1, seconds, hedge.seconds(0, 1)))
        settled = in_time[10 * REMEMBERED :]
        assert sum(settled) / len(settled) == pytest.approx(quantile, abs=0.05)


@virtually
async def test_an_answers_lateness_is_known_by_expert_and_size_and_bounded_by_most_experts():
    hedge = HedgeTimer(0.9, 0.5)
    for number in range(EXPERIENCE):
        assert hedge.seconds(0, 1) == 0.5
        await taken(hedge, 0, 1, 0.01 * number)
    own = hedge.seconds(0, 1)
    assert own == pytest.approx(0.18)  # of 0 to 0.19
    assert hedge.seconds(0, 8) == 0.5
    assert hedge.seconds(1, 1) == SLOW * own
    for _ in range(EXPERIENCE):
        await taken(hedge, 1, 1, 9.0)
        await taken(hedge, 2, 1, 0.1)
    assert hedge.seconds(1, 1) == SLOW * own
    assert HedgeTimer(0.0, 1.0).seconds(0, 1) == 0.0
