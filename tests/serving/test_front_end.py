"""The front end in plain situations: one thing goes wrong at a time."""

import asyncio
from collections import Counter

import pytest
import torch

from coin.errors import ConfigurationError, DeadlineError, LostError, OverloadedError, ServingError
from coin.serving.limits import Limits
from coin.serving.servers import Reply
from tests.serving.conftest import LinearSystem, ask_all, ask_one, now, timed, virtually

X = torch.tensor([[1.0, -2.0]]).double()
SERVERS = ("e0", "e1", "e2", "extra")  # the last is the coded model or the replica


async def raises(reply):
    raise RuntimeError("out of memory")


async def full(reply):
    raise OverloadedError("its queue is full")


async def hangs(reply):
    await asyncio.sleep(1e6)


async def is_nan(reply):
    return Reply(reply.logits * torch.nan, reply.features)


async def is_nothing(reply):
    return None


class World(LinearSystem):
    """Three experts and one server more; each answers after some seconds, or as a function does.

    `asked` counts their requests.
    """

    def __init__(self, behaviours, policy="coded_hedged", quantile=0.95, **limits):
        super().__init__([[0.5, 0.3, 0.2]], policy, quantile)
        self.behaviours = dict(zip(SERVERS, behaviours, strict=True))
        self.asked = Counter()
        self.front = self.front_end(self.ask, Limits(**{"initial_lateness": 0.5, **limits}))

    async def ask(self, name, expert, inputs):
        server = name if name in SERVERS else "extra"
        self.asked[server] += 1
        behaviour = self.behaviours[server]
        reply = self.reply(name, expert, inputs)
        if not isinstance(behaviour, float):
            return await behaviour(reply)
        await asyncio.sleep(behaviour)
        return reply

    async def first(self):
        """The first expert's answer, and after how many seconds it came."""
        return await timed(ask_one(self.front, X, 0))


def assert_answers(it, answers, experts):
    for answer, expert in zip(answers, experts, strict=True):
        torch.testing.assert_close(answer.logits, it.truth(expert, X))


IN_TIME = [0.25, 0.1, 0.1, 0.2]
LATE = [1.0, 0.1, 0.2, 0.3]  # after half a second
ALL = "e0 e1 e2 extra"
DECODED = "e1 e2 extra"
ANSWERED = [  # policy, quantile, the servers' times; who answers for the first expert, when, and who was asked
    ("uncoded", 0.9, IN_TIME, "e0", 0.25, "e0"),
    ("coded_hedged", 0.9, IN_TIME, "e0", 0.25, "e0"),
    ("replica_proactive", 0.9, IN_TIME, "e0", 0.25, "e0 extra"),
    ("coded_proactive", 0.9, IN_TIME, "e0", 0.25, ALL),
    ("uncoded", 0.9, LATE, "e0", 1.0, "e0"),
    ("standin_lost", 0.9, LATE, "e0", 1.0, "e0"),
    ("replica", 0.9, LATE, "extra", 0.8, "e0 extra"),
    ("standin", 0.9, LATE, "extra", 0.8, "e0 extra"),
    ("coded_hedged", 0.9, LATE, DECODED, 0.8, ALL),
    ("replica_proactive", 0.9, LATE, "extra", 0.5, "e0 extra"),
    ("coded_proactive", 0.9, LATE, DECODED, 0.5, ALL),
    ("coded_hedged", 0.9, [0.6, 0.1, 0.2, 0.3], "e0", 0.6, ALL),  # late, and still the first
    ("coded_proactive", 0.0, LATE, DECODED, 0.3, ALL),  # not waited for
    ("coded_proactive", 0.0, [0.2, 0.1, 0.1, 0.25], "e0", 0.2, ALL),
]


@pytest.mark.parametrize(
    ("policy", "quantile", "times", "answered_by", "expected", "asked"), ANSWERED
)
@virtually
async def test_who_answers_for_an_expert_and_when(
    policy, quantile, times, answered_by, expected, asked
):
    it = World(times, policy, quantile)
    answer, seconds = await it.first()
    assert_answers(it, [answer], [0])
    extra = "replica-0" if "replica" in policy else "coded-0"
    assert " ".join(answer.answered_by) == answered_by.replace("extra", extra)
    assert answer.decoded == ("coded-0" in answer.answered_by)
    assert seconds == pytest.approx(expected)
    assert it.asked == dict.fromkeys(asked.split(), 1)


@pytest.mark.parametrize("garbage", [raises, hangs, is_nan, is_nothing])
@pytest.mark.parametrize("policy", ["replica", "standin", "standin_lost", "coded_hedged"])
@virtually
async def test_garbage_is_lost_and_made_up_for(garbage, policy):
    it = World([garbage, 0.1, 0.1, 0.1], policy, timeout=0.3)
    answer, seconds = await it.first()
    assert_answers(it, [answer], [0])
    assert "e0" not in answer.answered_by
    until_the_timeout = 0.3 if garbage is hangs else 0
    assert seconds == pytest.approx(until_the_timeout + 0.1)
    assert it.front.servers["e0"].is_lost


@virtually
async def test_a_coded_server_stands_in_alone_for_any_number_of_experts():
    it = World([hangs, raises, 0.1, 0.3], "standin", timeout=5.0)
    answers = await ask_all(it.front, X)
    assert_answers(it, answers, [0, 1, 2])
    assert [answer.answered_by for answer in answers] == [("coded-0",), ("coded-0",), ("e2",)]
    assert it.front.is_ready([0, 1, 2])
    assert it.asked == dict.fromkeys(SERVERS, 1)  # every server once for all experts


@virtually
async def test_a_stand_in_that_is_lost_leaves_the_expert_itself():
    it = World([2.0, raises, 0.1, raises], "standin", timeout=5.0)
    answer, seconds = await it.first()
    assert (answer.answered_by, seconds) == (("e0",), pytest.approx(2.0))
    with pytest.raises(LostError, match="lost e1, coded-0, more than"):
        await ask_one(it.front, X, 1)
    assert not it.front.is_ready([1])


@pytest.mark.parametrize(("since", "ends"), [(0.0, 2.0), (-2.1, 0.0)])
@virtually
async def test_the_deadline_names_whose_answer_is_missing(since, ends):
    it = World([hangs, hangs, hangs, 0.1], deadline=2.0, timeout=9.0)
    with pytest.raises(DeadlineError, match="no answer in 2 s for e0, e2;"):
        await it.front.ask(X, [0, 2], now() + since + 2.0)
    assert now() == pytest.approx(ends)


@virtually
async def test_a_silent_server_is_not_waited_for_until_it_answers():
    it = World([1.0, 0.1, 0.1, 0.1], "standin")
    for expected in (0.5 + 0.1, 0.1, 0.1, 0.1):
        _, seconds = await it.first()
        assert seconds == pytest.approx(expected)
    assert it.asked["e0"] == 1
    await asyncio.sleep(0.2)  # until 1.1 seconds have passed
    it.behaviours["e0"] = 0.3
    answer, _ = await it.first()
    assert answer.answered_by == ("e0",)


@pytest.mark.parametrize("policy", ["standin", "coded_hedged"])
@virtually
async def test_a_server_that_hangs_is_tried_with_one_request_at_a_time(policy):
    it = World([hangs, 0.1, 0.1, 0.1], policy)
    await it.first()  # late after 0.5 s: nothing is known of the server
    await asyncio.sleep(2.0)
    patience = it.front.hedge.seconds(0, 1)
    for _ in range(40):  # in 8 s, with a timeout of 2
        answer, seconds = await it.first()
        assert (answer.decoded, seconds) == (True, pytest.approx(0.1))
        await asyncio.sleep(0.1)
    assert it.front.hedge.seconds(0, 1) == patience  # what does not answer teaches nothing
    assert 4 <= it.asked["e0"] <= 6
    it.behaviours["e0"] = 0.01
    for _ in range(21):  # its last request is given up in 2 s at most
        answer, _ = await it.first()
        await asyncio.sleep(0.1)
    assert not answer.decoded


async def seconds_beside_others(it, experts, count):
    """The seconds to answers for some experts; the two quick ones are asked for before each."""
    times = []
    for _ in range(count):
        await ask_one(it.front, X, 1)
        await ask_one(it.front, X, 2)
        _, seconds = await timed(ask_all(it.front, X, experts))
        times.append(seconds)
        await asyncio.sleep(0.6)  # the slow one has answered: no silence tells on it
    return times


@pytest.mark.parametrize("experts", [[0], [0, 1]])
@pytest.mark.parametrize("policy", ["standin", "coded_hedged"])
@virtually
async def test_a_slow_server_is_relieved_until_it_is_as_quick_as_the_others(policy, experts):
    """Its own answers' quantile says that they are in time; others' says that they are late."""
    it = World([0.5, 0.1, 0.1, 0.1], policy, quantile=0.9)
    await seconds_beside_others(it, experts, 100)
    assert max(await seconds_beside_others(it, experts, 50)) < 0.4
    assert it.asked["extra"] > 0
    it.behaviours["e0"] = 0.1
    await seconds_beside_others(it, experts, 20)
    assert max(await seconds_beside_others(it, experts, 50)) <= 0.2 + 1e-9
    answers = [await it.first() for _ in range(20)]
    answered = [answer.answered_by for answer, _ in answers]
    assert answered.count(("e0",)) >= 16  # a tenth is late by definition


@pytest.mark.parametrize(
    ("policy", "other"), [("uncoded", full), ("coded_hedged", raises), ("standin", full)]
)
@virtually
async def test_a_full_queue_is_overload_and_no_loss(policy, other):
    it = World([full, 0.1, 0.1, other], policy)
    with pytest.raises(OverloadedError, match=r"cannot take more; ask again later"):
        await it.first()
    assert not it.front.servers["e0"].is_lost


@virtually
async def test_a_server_that_is_busy_with_others_is_not_lost():
    """It answers one request in 0.8 s, and gives up none: the third of three waits longer than the timeout."""
    turn = asyncio.Lock()

    async def one_at_a_time(reply):
        async with turn:
            await asyncio.sleep(0.8)
        return reply

    it = World([one_at_a_time, 0.1, 0.1, 0.1], "uncoded", timeout=2.0)
    asking = [it.first() for _ in range(3)]
    found = await asyncio.gather(*asking, return_exceptions=True)
    assert [isinstance(each, OverloadedError) for each in found] == [False, False, True]
    assert not it.front.servers["e0"].is_lost


@virtually
async def test_draining_refuses_new_queries_and_answers_running_ones():
    it = World([1.0] * 4, initial_lateness=9.0)
    running = [asyncio.create_task(it.first()) for _ in range(3)]
    await asyncio.sleep(0.1)
    draining = asyncio.create_task(it.front.drain())
    await asyncio.sleep(0.1)
    assert not it.front.is_ready([1])
    with pytest.raises(ServingError, match="stops"):
        await it.first()
    await draining
    assert 1.0 <= now() <= 1.05 + 1e-9  # it looks every 50 ms
    assert [query.result()[0].decoded for query in running] == [False] * 3


@virtually
async def test_requests_that_nobody_waits_for_are_withdrawn_but_for_a_servers_only_one():
    it = World([1.0] * 4, initial_lateness=9.0)
    queries = [asyncio.create_task(it.first()) for _ in range(5)]
    await asyncio.sleep(0.01)
    for query in queries:
        query.cancel()
    await asyncio.gather(*queries, return_exceptions=True)
    assert len(it.front.servers["e0"].pending) == 1
    await asyncio.sleep(1.0)
    assert not it.front.servers["e0"].pending


def test_limits_are_positive():
    with pytest.raises(ConfigurationError, match="batch=0"):
        Limits(batch=0)
