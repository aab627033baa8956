"""The front end in plain situations: one thing goes wrong at a time."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from coin.coding import Answers, decode_linear, make_decoder
from coin.errors import ConfigurationError, DeadlineError, LostError, OverloadedError, ServingError
from coin.serving.limits import Limits
from coin.serving.policies import PolicyKind, StandIns
from coin.serving.servers import Reply
from coin.serving.system import Answer, System
from tests.serving.conftest import LinearSystem, VirtualLoop, ask_all, ask_one, run_virtually, timed, virtually

X = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
Behaviour = Callable[[torch.Tensor, Reply], Awaitable[Any]]


def behaves(made: Callable[[Reply], Any], seconds: float = 0.0) -> Behaviour:
    async def answer(inputs: torch.Tensor, reply: Reply) -> Any:
        await asyncio.sleep(seconds)
        return made(reply)

    return answer


def after(seconds: float) -> Behaviour:
    return behaves(lambda reply: reply, seconds)


async def raises(inputs: torch.Tensor, reply: Reply) -> Reply:
    raise RuntimeError("out of memory")


async def full(inputs: torch.Tensor, reply: Reply) -> Reply:
    raise OverloadedError("its queue is full")


hangs = after(1e6)
nan = behaves(lambda reply: Reply(reply.logits * torch.nan, reply.features))
GARBAGE = {
    "raises": raises,
    "hangs": hangs,
    "nan": nan,
    "nothing": behaves(lambda reply: None),
}


class World(LinearSystem):
    """Three experts and one server more behind a front end, with a behaviour each; `asked` counts their requests."""

    def __init__(
        self, behaviours: list[Behaviour], policy: str = "coded_hedged", quantile: float = 0.95, **limits: Any
    ) -> None:
        super().__init__([[0.5, 0.3, 0.2]], PolicyKind(policy), quantile)
        self.behaviours = dict(zip(["e0", "e1", "e2", "coded-0"], behaviours, strict=True))
        self.behaviours["replica-0"] = behaviours[3]
        self.asked: Counter[str] = Counter()
        self.front = self.front_end(self.ask, Limits(**{"initial_lateness": 0.5, **limits}))

    async def ask(self, name: str, expert: int, inputs: torch.Tensor) -> Any:
        self.asked[name] += 1
        return await self.behaviours[name](inputs, self.reply(name, expert, inputs))


def test_virtual_time_jumps_to_the_next_timer_and_nothing_hangs() -> None:
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


@pytest.mark.parametrize("name", ["deadline", "pixels", "batch"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{name}=0"):
        Limits(**{name: 0})


def exact(found: Answer, wanted: torch.Tensor) -> bool:
    return torch.allclose(found.logits, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", list(PolicyKind))
@virtually
async def test_own_answer_in_time(policy: str) -> None:
    it = World([after(0.1), after(0.2), after(0.3), after(0.35)], policy)
    for expert in (1, 2):
        answer, seconds = await timed(ask_one(it.front, X, expert))
        assert exact(answer, it.truth(expert, X))
        assert (answer.decoded, answer.answered_by) == (False, (f"e{expert}",))
        assert seconds == pytest.approx([0.0, 0.2, 0.3][expert])
        await asyncio.sleep(1.0)  # no server has anything left to do
    others = {"coded_proactive": {"e0": 2, "e1": 2, "e2": 2, "coded-0": 2}}
    others["replica_proactive"] = {"e1": 1, "e2": 1, "replica-0": 2}
    assert it.asked == others.get(policy, {"e1": 1, "e2": 1})


LATE = {
    "replica": ("replica-0", 0.5 + 0.3, {"e0": 1, "replica-0": 1}),
    "replica_proactive": ("replica-0", 0.5, {"e0": 1, "replica-0": 1}),
    "standin": ("coded-0", 0.5 + 0.3, {"e0": 1, "coded-0": 1}),
    "standin_lost": ("e0", 1.0, {"e0": 1}),
    "uncoded": ("e0", 1.0, {"e0": 1}),
    "coded_hedged": ("e1 e2 coded-0", 0.5 + 0.3, {"e0": 1, "e1": 1, "e2": 1, "coded-0": 1}),
    "coded_proactive": ("e1 e2 coded-0", 0.5, {"e0": 1, "e1": 1, "e2": 1, "coded-0": 1}),
}
"""Who answers for the first expert, which takes a second, and after how long; and who was asked."""


@pytest.mark.parametrize("policy", LATE)
@virtually
async def test_who_is_asked_for_a_late_expert_and_when(policy: str) -> None:
    by, wanted, asked = LATE[policy]
    it = World([after(1.0), after(0.1), after(0.2), after(0.3)], policy)
    answer, seconds = await timed(ask_one(it.front, X, 0))
    assert exact(answer, it.truth(0, X))
    assert answer.answered_by == tuple(by.split())
    assert answer.decoded == ("coded" in by)
    assert seconds == pytest.approx(wanted)
    assert it.asked == asked


@virtually
async def test_a_silent_server_is_not_waited_for_until_it_answers() -> None:
    it = World([after(1.0), after(0.1), after(0.1), after(0.1)], "standin")
    times = [(await timed(ask_one(it.front, X, 0)))[1] for _ in range(4)]
    assert times == pytest.approx([0.5 + 0.1, 0.1, 0.1, 0.1])
    assert it.asked["e0"] == 1
    await asyncio.sleep(0.2)  # until 1.1 seconds have passed
    it.behaviours["e0"] = after(0.3)
    assert (await ask_one(it.front, X, 0)).answered_by == ("e0",)


def test_without_waiting_the_first_answer_counts_and_an_own_one_that_is_first_is_kept() -> None:
    async def main(it: World) -> tuple[bool, float]:
        answer, seconds = await timed(ask_one(it.front, X, 0))
        return answer.decoded, round(seconds, 6)

    others = after(0.1), after(0.2), after(0.3)
    assert run_virtually(main(World([after(0.4), *others], "coded_proactive", 0.0))) == (True, 0.3)
    assert run_virtually(main(World([after(0.2), *others], "coded_proactive", 0.0))) == (False, 0.2)
    assert run_virtually(main(World([after(0.6), *others], "coded_hedged"))) == (False, 0.6)  # late, and still first


@pytest.mark.parametrize("behaviour", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("policy", ["replica", "standin", "standin_lost", "coded_hedged", "coded_proactive"])
@virtually
async def test_garbage_is_lost_and_made_up_for(behaviour: Behaviour, policy: str) -> None:
    it = World([behaviour, after(0.1), after(0.1), after(0.1)], policy, timeout=0.3)
    answer, seconds = await timed(ask_one(it.front, X, 0))
    assert answer.answered_by != ("e0",)
    assert exact(answer, it.truth(0, X))
    waited = (0.3 if behaviour is hangs else 0.0) + (0.0 if "proactive" in policy and behaviour is hangs else 0.1)
    assert seconds == pytest.approx(waited)
    assert it.front.servers["e0"].is_lost


@virtually
async def test_a_coded_server_stands_in_alone_for_any_number_of_experts() -> None:
    it = World([hangs, raises, after(0.1), after(0.3)], "standin", timeout=5.0)
    late, lost = await timed(ask_one(it.front, X, 0)), await timed(ask_one(it.front, X, 1))
    for expert, (answer, seconds), wanted in ((0, late, 0.5 + 0.3), (1, lost, 0.3)):
        assert (answer.decoded, answer.answered_by) == (True, ("coded-0",))
        assert exact(answer, it.truth(expert, X))
        assert seconds == pytest.approx(wanted)
    every = await ask_all(it.front, X)
    assert [answer.decoded for answer in every] == [True, True, False]
    assert all(exact(answer, it.truth(expert, X)) for expert, answer in enumerate(every))
    assert it.front.is_ready([0, 1, 2])
    assert (it.asked["e2"], it.asked["coded-0"]) == (1, 3)  # no survivor was asked for them


@virtually
async def test_a_stand_in_that_is_lost_leaves_the_expert_itself() -> None:
    it = World([after(2.0), raises, after(0.1), raises], "standin", timeout=5.0)
    slow, seconds = await timed(ask_one(it.front, X, 0))
    assert (slow.decoded, seconds) == (False, pytest.approx(2.0))
    with pytest.raises(LostError, match="lost e1, coded-0, more than"):
        await ask_one(it.front, X, 1)


@virtually
async def test_every_server_is_asked_once_for_all_experts() -> None:
    it = World([after(0.1), after(7.0), after(0.2), after(0.1)])
    answers = await ask_all(it.front, X)
    assert [answer.decoded for answer in answers] == [False, True, False]
    assert all(exact(answer, it.truth(expert, X)) for expert, answer in enumerate(answers))
    assert set(it.asked.values()) == {1}


@virtually
async def test_deadline() -> None:
    it = World([hangs, hangs, after(0.1), after(0.1)], deadline=2.0, timeout=9.0)
    with pytest.raises(DeadlineError, match="no answer in 2 s for e0;"):
        await ask_one(it.front, X, 0)
    assert asyncio.get_running_loop().time() == pytest.approx(2.0)


@virtually
async def test_a_deadline_that_has_passed_before_anybody_was_asked_names_whose_answer_is_missing() -> None:
    it = World([after(0.1)] * 4, deadline=2.0)
    with pytest.raises(DeadlineError, match="no answer in 2 s for e0, e2;"):
        await it.front.ask(X, [0, 2], asyncio.get_running_loop().time() - 0.1)


@pytest.mark.parametrize("policy", ["standin", "coded_hedged"])
@virtually
async def test_nobody_waits_for_a_server_that_hangs_and_it_is_tried_one_request_at_a_time(policy: str) -> None:
    it = World([hangs, after(0.1), after(0.1), after(0.1)], policy)
    _, first = await timed(ask_one(it.front, X, 0))
    assert first == pytest.approx(0.6)  # late after 0.5 s: nothing is known of the server
    await asyncio.sleep(2.0)
    patience = it.front.hedge.seconds(0, 1)
    for _ in range(40):  # in 8 s, with a timeout of 2
        answer, seconds = await timed(ask_one(it.front, X, 0))
        assert (answer.decoded, seconds) == (True, pytest.approx(0.1))
        await asyncio.sleep(0.1)
    assert it.front.hedge.seconds(0, 1) == patience  # what does not answer teaches nothing
    assert 4 <= it.asked["e0"] <= 6
    it.behaviours["e0"] = after(0.01)
    for _ in range(21):  # its last request is given up in 2 s at most
        answer = await ask_one(it.front, X, 0)
        await asyncio.sleep(0.1)
    assert not answer.decoded


@virtually
async def test_each_expert_and_size_of_a_query_has_a_lateness_of_its_own() -> None:
    """One estimate for a fast and a slow expert, or for 1 and 8 images, has the slower one's answers always late."""

    async def by_the_image(inputs: torch.Tensor, reply: Reply) -> Reply:
        await asyncio.sleep(0.01 * len(inputs))
        return reply

    it = World([by_the_image, after(0.4), after(0.25), after(0.01)], quantile=0.9)
    decoded: Counter[str] = Counter()
    for number in range(300):
        for _ in range(5):
            await ask_one(it.front, X, 2)
        slow, eight = await ask_one(it.front, X, 1), await ask_one(it.front, X.repeat(8, 1), 0)
        decoded.update(slow=slow.decoded and number >= 200, eight=eight.decoded and number >= 200)
    assert max(decoded.values()) < 40  # about a tenth of a hundred is late by definition


async def seconds_beside_others(it: World, experts: list[int], count: int) -> list[float]:
    """Return the seconds to answers for some experts; the two quick ones are asked for before each."""
    times = []
    for _ in range(count):
        await ask_one(it.front, X, 1)
        await ask_one(it.front, X, 2)
        began = asyncio.get_running_loop().time()
        await ask_all(it.front, X, experts)
        times.append(asyncio.get_running_loop().time() - began)
        await asyncio.sleep(0.6)  # the slow one has answered: no silence tells on it
    return times


@pytest.mark.parametrize(
    ("policy", "experts"),
    [("standin", [0]), ("coded_hedged", [0]), ("replica", [0]), ("coded_hedged", [0, 1]), ("replica", [0, 1])],
)
@virtually
async def test_a_server_that_is_always_slow_is_relieved_until_it_is_as_quick_as_the_others(
    policy: str, experts: list[int]
) -> None:
    """Its own answers' quantile says that they are in time; others' says that they are late."""
    it = World([after(0.5), after(0.1), after(0.1), after(0.1)], policy, quantile=0.9)
    await seconds_beside_others(it, experts, 100)
    assert max(await seconds_beside_others(it, experts, 50)) < 0.4
    it.behaviours["e0"] = after(0.1)
    await seconds_beside_others(it, experts, 20)
    assert max(await seconds_beside_others(it, experts, 50)) <= 0.2 + 1e-9
    answered = [(await ask_one(it.front, X, 0)).answered_by for _ in range(20)]
    assert answered.count(("e0",)) >= 16  # a tenth is late by definition
    assert it.asked["coded-0"] + it.asked["replica-0"] > 0


@pytest.mark.parametrize(("policy", "other"), [("uncoded", full), ("coded_hedged", raises), ("standin", full)])
@virtually
async def test_a_full_queue_is_overload_and_no_loss(policy: str, other: Behaviour) -> None:
    it = World([full, after(0.1), after(0.1), other], policy)
    with pytest.raises(OverloadedError, match=r"cannot take more; ask again later"):
        await ask_one(it.front, X, 0)
    assert not it.front.servers["e0"].is_lost


@virtually
async def test_a_server_that_is_busy_with_others_is_not_lost() -> None:
    """It answers one request in 0.8 s, and gives up none: the third of three waits longer than the timeout."""
    turn = asyncio.Lock()

    async def one_at_a_time(inputs: torch.Tensor, reply: Reply) -> Reply:
        async with turn:
            await asyncio.sleep(0.8)
        return reply

    it = World([one_at_a_time, after(0.1), after(0.1), after(0.1)], "uncoded", timeout=2.0)
    found = await asyncio.gather(*(ask_one(it.front, X, 0) for _ in range(3)), return_exceptions=True)
    assert [isinstance(each, OverloadedError) for each in found] == [False, False, True]
    assert not it.front.servers["e0"].is_lost


@virtually
async def test_draining_refuses_new_queries_and_answers_those_that_are_under_way() -> None:
    it = World([after(1.0)] * 4, initial_lateness=9.0)
    tasks = [asyncio.create_task(ask_one(it.front, X, 0)) for _ in range(3)]
    await asyncio.sleep(0.1)
    draining = asyncio.create_task(it.front.drain())
    await asyncio.sleep(0.1)
    assert not it.front.is_ready([1])
    with pytest.raises(ServingError, match="stops"):
        await ask_one(it.front, X, 0)
    await draining
    assert 1.0 <= asyncio.get_running_loop().time() <= 1.05 + 1e-9  # it looks every 50 ms
    assert [(await task).decoded for task in tasks] == [False] * 3


@virtually
async def test_what_nobody_waits_for_is_withdrawn_but_for_a_servers_only_request() -> None:
    it = World([after(1.0)] * 4, initial_lateness=9.0)
    tasks = [asyncio.create_task(ask_one(it.front, X, 0)) for _ in range(5)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert all(task.cancelled() for task in tasks)
    assert len(it.front.servers["e0"].pending) == 1
    await asyncio.sleep(1.0)
    assert not it.front.servers["e0"].pending


def test_fitted_decoder_is_used_where_it_fits_and_the_code_otherwise() -> None:
    it = LinearSystem([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]], PolicyKind.coded_hedged)
    inputs = torch.randn(40, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    replies = {name: it.reply(name, 0, inputs) for name in it.stand_ins.servers}
    replies = {name: reply._replace(features=reply.logits.repeat(1, 2)) for name, reply in replies.items()}
    biased = {name: r._replace(logits=r.logits + 0.5) if "coded" in name else r for name, r in replies.items()}
    logits = torch.stack([reply.logits for reply in biased.values()])  # a bias that a fit sees and the code does not
    features = [reply.features for reply in biased.values()]
    answers = Answers(logits[:3], logits[3:], features[:3], features[3:])
    fitted = make_decoder("feature_ridge", it.code, [1]).fit(answers)
    system = System(it.system.classes, {}, it.stand_ins, {(1,): fitted}, True)

    def decode(expert: int, *lost: str) -> torch.Tensor:
        arrived = {name: reply for name, reply in biased.items() if name not in (f"e{expert}", *lost)}
        assert system.stand_ins.suffice(expert, arrived)
        found = system.decode(expert, arrived)
        assert not found.accepted.any()  # nothing was promised
        return found.logits

    assert torch.allclose(decode(1), replies["e1"].logits, atol=1e-4)
    assert not torch.allclose(decode(1, "coded-1"), replies["e1"].logits, atol=1e-1)  # the code's equation
    both = decode_linear(it.code.matrix, logits[3:], logits[2:3], (0, 1))
    assert torch.allclose(decode(0, "e1"), both[0])
    assert torch.allclose(decode(1, "e0"), both[1])
    fitted.accept(Answers(logits[:3], logits[3:], features[:3], features[3:]), 0.2)
    assert bool(system.decode(1, {name: biased[name] for name in biased if name != "e1"}).accepted.any())


@pytest.mark.parametrize(
    ("policy", "expert", "enough", "too_few"),
    [
        ("coded_hedged", 1, ["a c coded-0", "a coded-0 coded-1"], ["a coded-0"]),
        ("coded_hedged", 0, [], ["b c coded-1", "c coded-0"]),  # it is not in the second row
        ("standin", 0, ["coded-0"], ["a", "coded-1"]),
        ("standin", 2, ["coded-1"], ["coded-0"]),
        ("replica", 1, ["replica-1"], ["a"]),
        ("uncoded", 0, [], ["a b c"]),
    ],
)
def test_which_servers_suffice(policy: str, expert: int, enough: list[str], too_few: list[str]) -> None:
    code = LinearSystem([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]], PolicyKind.coded_hedged).code
    given = StandIns(PolicyKind(policy), ["a", "b", "c"], code)
    more = {"coded_hedged": ["coded-0", "coded-1"], "standin": ["coded-0", "coded-1"]}
    more |= {"replica": ["replica-0", "replica-1"], "uncoded": []}
    assert given.servers == ["a", "b", "c", *more[policy]]
    assert all(given.suffice(expert, each.split()) for each in enough)
    assert not any(given.suffice(expert, each.split()) for each in too_few)


def test_as_which_expert_a_server_is_asked() -> None:
    code = LinearSystem([[0.5, 0.5]], PolicyKind.standin).code
    for policy, adapted, coded in (("standin", False, 0), ("standin", True, 1), ("replica", False, 1)):
        given = StandIns(PolicyKind(policy), ["a", "b"], code, adapted)
        assert [given.asked_as(name, 1) for name in given.servers] == [0, 0, coded]
