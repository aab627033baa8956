"""The front end in plain situations: one thing goes wrong at a time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from coin.coding import Answers, decode_linear, make_decoder
from coin.errors import ConfigurationError, DeadlineError, DecodingError, LostError, OverloadedError, ServingError
from coin.serving.decodings import Decodings
from coin.serving.front_end import FrontEnd
from coin.serving.limits import InputLimits, Limits
from coin.serving.policies import Policy, PolicyKind
from coin.serving.replies import Reply, ReplyFormat
from coin.serving.server_queue import Request, ServerQueue
from tests.serving.conftest import ask_all, ask_one

MATRIX = [[0.5, 0.3, 0.2]]
X = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
PROBE = torch.tensor([[-1.0, 0.0]], dtype=torch.float64)
Behaviour = Callable[[torch.Tensor, Reply], Awaitable[Any]]


def after(seconds: float) -> Behaviour:
    async def answer(inputs: torch.Tensor, reply: Reply) -> Reply:
        await asyncio.sleep(seconds)
        return reply

    return answer


async def raises(inputs: torch.Tensor, reply: Reply) -> Reply:
    raise RuntimeError("out of memory")


async def hangs(inputs: torch.Tensor, reply: Reply) -> Reply:
    while True:  # not even cancelling helps
        try:
            await asyncio.sleep(1e6)
        except asyncio.CancelledError:
            if asyncio.get_running_loop().time() > 1e5:
                raise


async def gives_up(inputs: torch.Tensor, reply: Reply) -> Reply:
    raise asyncio.CancelledError


async def nan(inputs: torch.Tensor, reply: Reply) -> Reply:
    return Reply(reply.logits * torch.nan)


async def narrow(inputs: torch.Tensor, reply: Reply) -> Reply:
    return Reply(reply.logits[:, :2])


async def short(inputs: torch.Tensor, reply: Reply) -> Reply:
    return Reply(reply.logits[:0])


async def nothing(inputs: torch.Tensor, reply: Reply) -> Reply | None:
    return None


async def integers(inputs: torch.Tensor, reply: Reply) -> Reply:
    return Reply(reply.logits.long())


async def no_tensor(inputs: torch.Tensor, reply: Reply) -> Reply:
    return Reply(None)  # type: ignore[arg-type]


GARBAGE = [raises, hangs, gives_up, nan, narrow, short, nothing, integers, no_tensor]


class World:
    """A linear system behind a front end, with one behaviour a server, and a count of what each was asked."""

    def __init__(self, system: Any, behaviours: list[Behaviour], policy: str, quantile: float, limits: Limits) -> None:
        self.system = system
        self.asked = [0] * len(behaviours)
        self.batches: list[int] = []
        asks = Policy(PolicyKind(policy), quantile)
        coded, layout = asks.coded, system.layout(asks)

        def server(index: int) -> Callable[[torch.Tensor], Awaitable[Reply]]:
            host = index if coded or index < 3 else layout.copies[index - 3]

            async def ask(inputs: torch.Tensor) -> Reply:
                self.asked[index] += 1
                self.batches.append(len(inputs))
                return await behaviours[index](inputs, system.reply(host, inputs))

            return ask

        self.front = FrontEnd(
            {name: server(index) for index, name in enumerate(["a", "b", "c", "extra"])},
            layout,
            asks,
            system.expects,
            PROBE,
            system.decodings_of(asks),
            limits,
        )


@pytest.fixture
def world(linear_system: Any) -> Callable[..., World]:
    def make(behaviours: list[Behaviour], policy: str = "coded_hedged", quantile: float = 0.95, **limits: Any) -> World:
        return World(linear_system(MATRIX), behaviours, policy, quantile, Limits(**{"initial_lateness": 0.5, **limits}))

    return make


def exact(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", ["uncoded", "replicated", "coded_proactive", "coded_hedged"])
def test_own_answer_in_time(world: Any, virtually: Any, policy: str) -> None:
    it = world([after(0.1), after(0.2), after(0.3), after(0.05)], policy)

    async def main() -> None:
        async with it.front as front:
            for expert, name in ((1, "b"), (2, "c")):
                answer = await ask_one(front, X, expert)
                assert exact(answer.logits, it.system.truth(expert, X))
                assert (answer.decoded, answer.answered_by) == (False, (name,))
                assert answer.seconds == pytest.approx([0.0, 0.2, 0.3][expert])
                await asyncio.sleep(1.0)  # the others may still be busy with it

    virtually(main())
    assert it.asked == {"coded_proactive": [2, 2, 2, 2]}.get(policy, [0, 1, 1, 0])


def test_replica_answers_first_and_without_load_the_expert_itself(world: Any, virtually: Any) -> None:
    async def main(it: World) -> tuple[str, ...]:
        async with it.front as front:
            return (await ask_one(front, X, 0)).answered_by

    servers = [after(0.2), after(0.2), after(0.2), after(0.1)]
    assert virtually(main(world(servers, "replicated"))) == ("extra",)
    assert virtually(main(world(servers, "uncoded"))) == ("a",)


def test_late_expert_is_decoded_and_others_are_asked_only_then(world: Any, virtually: Any) -> None:
    it = world([after(9.0), after(0.1), after(0.2), after(0.3)])

    async def main() -> None:
        async with it.front as front:
            answer = await ask_one(front, X, 0)
            assert exact(answer.logits, it.system.truth(0, X))
            assert answer.decoded
            assert answer.answered_by == ("b", "c", "extra")
            assert answer.seconds == pytest.approx(0.5 + 0.3)

    virtually(main())
    assert it.front.counts == {"answered": 1, "decoded": 1}


def test_proactive_decodes_at_once_when_late_and_own_answer_wins_before(world: Any, virtually: Any) -> None:
    async def main(it: World) -> Any:
        async with it.front as front:
            return await ask_one(front, X, 0)

    late = virtually(main(world([after(9.0), after(0.1), after(0.2), after(0.3)], "coded_proactive")))
    assert (late.decoded, late.seconds) == (True, pytest.approx(0.5))
    own = virtually(main(world([after(0.4), after(0.1), after(0.2), after(0.3)], "coded_proactive")))
    assert (own.decoded, own.seconds) == (False, pytest.approx(0.4))
    hasty = virtually(main(world([after(0.4), after(0.1), after(0.2), after(0.3)], "coded_proactive", quantile=0.0)))
    assert (hasty.decoded, hasty.seconds) == (True, pytest.approx(0.3))


def test_a_coded_server_stands_in_alone_for_any_number_of_experts(world: Any, virtually: Any) -> None:
    it = world([hangs, raises, after(0.1), after(0.3)], "standin", timeout=5.0, failures=2)

    async def main() -> None:
        async with it.front as front:
            late, lost, all_three = await ask_one(front, X, 0), await ask_one(front, X, 1), await ask_all(front, X)
            for answer, seconds in ((late, 0.5 + 0.3), (lost, 0.3)):
                assert (answer.decoded, answer.answered_by) == (True, ("extra",))
                assert exact(answer.logits, it.system.truth(answer.expert, X))
                assert answer.seconds == pytest.approx(seconds)
            assert [answer.decoded for answer in all_three] == [True, True, False]
            assert all_three[1].answered_by == ("extra",)
            assert front.can_answer()

    virtually(main())
    assert it.asked[2:] == [1, 3]  # no survivor was asked for them


def test_a_stand_in_that_is_lost_leaves_the_expert_itself(world: Any, virtually: Any) -> None:
    it = world([after(2.0), raises, after(0.1), raises], "standin", timeout=5.0)

    async def main() -> None:
        async with it.front as front:
            slow = await ask_one(front, X, 0)
            assert (slow.decoded, slow.seconds) == (False, pytest.approx(2.0))
            with pytest.raises(LostError, match="lost b, extra"):
                await ask_one(front, X, 1)

    virtually(main())


@pytest.mark.parametrize("behaviour", GARBAGE, ids=lambda behaviour: behaviour.__name__)
def test_garbage_is_lost_and_decoded(world: Any, virtually: Any, behaviour: Behaviour) -> None:
    it = world([behaviour, after(0.1), after(0.1), after(0.1)], timeout=0.3)

    async def main() -> None:
        async with it.front as front:
            answer = await ask_one(front, X, 0)
            assert answer.decoded
            assert exact(answer.logits, it.system.truth(0, X))
            assert answer.seconds == pytest.approx(0.3 + 0.1 if behaviour is hangs else 0.1)
            assert front.queues[0].last_error

    virtually(main())


@pytest.mark.parametrize("policy", ["uncoded", "replicated", "coded_proactive", "coded_hedged"])
def test_more_losses_than_the_code_makes_up_for(world: Any, virtually: Any, policy: str) -> None:
    it = world([raises, nan, after(0.1), after(0.1) if policy.startswith("coded") else raises], policy)

    async def main() -> None:
        async with it.front as front:
            with pytest.raises(LostError, match=r"lost a, .* more than"):
                await ask_one(front, X, 0)
            assert (await ask_one(front, X, 2)).answered_by == ("c",)

    virtually(main())
    assert it.front.counts["lost"] == 1


def test_everybody_is_asked_for_all_experts(world: Any, virtually: Any) -> None:
    it = world([after(0.1), after(7.0), after(0.2), after(0.1)])

    async def main() -> None:
        async with it.front as front:
            answers = await ask_all(front, X)
            assert [answer.decoded for answer in answers] == [False, True, False]
            for expert, answer in enumerate(answers):
                assert answer.expert == expert
                assert exact(answer.logits, it.system.truth(expert, X))

    virtually(main())
    assert it.asked == [1, 1, 1, 1]


def test_deadline(world: Any, virtually: Any) -> None:
    it = world([hangs, hangs, after(0.1), after(0.1)], deadline=2.0)

    async def main() -> None:
        async with it.front as front:
            began = asyncio.get_running_loop().time()
            with pytest.raises(DeadlineError, match=r"no answer in 2 s, still waiting for a, b;"):
                await ask_one(front, X, 0)
            assert asyncio.get_running_loop().time() - began == pytest.approx(2.0)

    virtually(main())


def test_server_is_left_alone_while_it_is_down_and_tried_again(world: Any, virtually: Any) -> None:
    healthy = False

    async def recovers(inputs: torch.Tensor, reply: Reply) -> Reply:
        if not healthy:
            raise RuntimeError
        return reply

    it = world([recovers, after(0.1), after(0.1), after(0.1)], failures=2, cooldown=5.0)

    async def main() -> None:
        nonlocal healthy
        async with it.front as front:
            for _ in range(4):
                assert (await ask_one(front, X, 0)).decoded
            assert it.asked[0] == 2
            assert front.queues[0].is_down
            healthy = True
            assert (await ask_one(front, X, 0)).decoded
            await asyncio.sleep(5.0)
            assert not (await ask_one(front, X, 0)).decoded
            assert not front.queues[0].is_down

    virtually(main())


def test_nobody_waits_for_a_server_that_hangs(world: Any, virtually: Any) -> None:
    it = world([hangs, after(0.1), after(0.1), after(0.1)], timeout=2.0, failures=2, cooldown=5.0)

    async def main() -> None:
        async with it.front as front:
            first = await ask_one(front, X, 0)
            assert first.seconds == pytest.approx(0.6)  # late after 0.5 s: nothing is known of the server
            await asyncio.sleep(2.0)
            (patience,) = (each.seconds for each in front.lateness.values())
            for _ in range(3):  # the timeout is known; the server is down after the second one, and left to its queue
                answer = await ask_one(front, X, 0)
                assert answer.decoded
                assert answer.seconds == pytest.approx(0.1)
                await asyncio.sleep(8.0)
            assert [each.seconds for each in front.lateness.values()] == [patience]  # that of servers that do answer

    virtually(main())


def test_an_expert_that_is_back_answers_itself_whatever_others_ask(world: Any, virtually: Any) -> None:
    """Queries for other experts must not use up the tries of one that was down."""
    began = 0.0

    async def gone_for_four_seconds(inputs: torch.Tensor, reply: Reply) -> Reply:
        if asyncio.get_running_loop().time() < 4.0:
            raise RuntimeError
        return reply

    it = world([gone_for_four_seconds, after(0.01), after(0.01), after(0.01)], cooldown=1.0)

    async def main() -> None:
        nonlocal began
        async with it.front as front:
            for number in range(400):
                answer = await ask_one(front, X, 0 if number % 10 == 9 else 1 + number % 2)
                if answer.expert == 0 and not answer.decoded:
                    began = asyncio.get_running_loop().time()
                    break
                await asyncio.sleep(0.09)

    virtually(main())
    assert 4.0 <= began < 6.5


def test_a_server_that_nobody_asks_is_tried_until_it_is_back(world: Any, virtually: Any) -> None:
    healthy = False

    async def recovers(inputs: torch.Tensor, reply: Reply) -> Reply:
        if not healthy:
            raise RuntimeError
        return reply

    it = world([recovers, after(0.1), after(0.1), recovers], failures=1, cooldown=1.0)

    async def main() -> None:
        nonlocal healthy
        async with it.front as front:
            assert front.can_answer()
            with pytest.raises(LostError):
                await ask_one(front, X, 0)
            assert not front.can_answer()
            assert front.can_answer(2)
            await asyncio.sleep(3.5)
            assert not front.can_answer()
            healthy = True
            await asyncio.sleep(1.0)
            assert front.can_answer()

    virtually(main())
    assert it.asked[0] == 5  # the query, and every second's try


def test_a_large_query_is_cut_to_batches_that_go_as_any_query_of_their_size(world: Any, virtually: Any) -> None:
    """64 images that a server needs longer for than its timeout allows slow nobody else down by more than a batch."""

    async def by_the_image(inputs: torch.Tensor, reply: Reply) -> Reply:
        await asyncio.sleep(0.05 * len(inputs))
        return reply

    it = world([by_the_image] * 4, timeout=2.0, initial_lateness=0.3)
    large = torch.arange(128, dtype=torch.float64).reshape(64, 2)
    others: list[float] = []

    async def main() -> None:
        async with it.front as front:
            poison = asyncio.create_task(ask_one(front, large, 0))
            for number in range(20):
                await asyncio.sleep(0.1)
                others.append((await ask_one(front, X, 1 + number % 2)).seconds)
            answer = await poison
            assert (answer.decoded, answer.answered_by) == (False, ("a",))
            assert exact(answer.logits, it.system.truth(0, large))

    virtually(main())
    assert max(others) <= 0.05 + 0.4 + 1e-9  # their own image, and one batch of the large query where it was late
    assert sum(seconds > 0.06 for seconds in others) == 1
    assert it.asked[3] == 2  # of eight
    assert max(it.batches) == 8


@pytest.mark.parametrize("policy", ["coded_hedged", "coded_proactive", "hedged"])
def test_a_large_query_does_not_wait_for_a_server_that_hangs(world: Any, virtually: Any, policy: str) -> None:
    it = world([hangs, after(0.1), after(0.1), after(0.1)], policy, timeout=5.0, deadline=20.0)
    large = torch.arange(48, dtype=torch.float64).reshape(24, 2)

    async def main() -> None:
        async with it.front as front:
            answer = await ask_one(front, large, 0)
            assert exact(answer.logits, it.system.truth(0, large))
            assert answer.seconds < 5.0

    virtually(main())


def test_each_expert_and_size_of_a_batch_has_a_lateness_of_its_own(world: Any, virtually: Any) -> None:
    """One estimate for a fast and a slow expert, or for 1 and 8 images, has the slower one's answers always late."""

    async def by_the_image(inputs: torch.Tensor, reply: Reply) -> Reply:
        await asyncio.sleep(0.01 * len(inputs))
        return reply

    it = world([by_the_image, after(0.4), after(0.01), after(0.01)], quantile=0.9, initial_lateness=0.5)
    decoded = {"slow": 0, "eight": 0}

    async def main() -> None:
        async with it.front as front:
            for number in range(300):
                for _ in range(20):
                    await ask_one(front, X, 2)
                slow, eight = await ask_one(front, X, 1), await ask_one(front, X.repeat(8, 1), 0)
                if number >= 200:
                    decoded["slow"] += slow.decoded
                    decoded["eight"] += eight.decoded

    virtually(main())
    assert decoded["slow"] < 40  # about a tenth is late by definition
    assert decoded["eight"] < 40


def test_server_that_is_down_is_asked_where_nobody_else_can_answer(world: Any, virtually: Any) -> None:
    it = world([raises, after(0.1), after(0.1), raises], failures=1, cooldown=100.0)

    async def main() -> None:
        async with it.front as front:
            for _ in range(3):
                with pytest.raises(LostError):
                    await ask_one(front, X, 0)

    virtually(main())
    assert it.asked[0] == 3


def test_queries_wait_in_a_bounded_queue_and_beyond_it_are_decoded(world: Any, virtually: Any) -> None:
    it = world([after(1.0), after(0.1), after(0.1), after(0.1)], queue=1, batch=1, deadline=30.0, initial_lateness=20.0)

    async def main() -> None:
        async with it.front as front:
            first = asyncio.create_task(ask_one(front, X, 0))
            await asyncio.sleep(0.01)  # at the server
            second = asyncio.create_task(ask_one(front, X, 0))
            await asyncio.sleep(0.01)  # in the queue
            third = await ask_one(front, X, 0)
            assert third.decoded
            assert third.seconds == pytest.approx(0.1)
            assert not (await first).decoded
            assert not (await second).decoded

    virtually(main())


@pytest.mark.parametrize(("policy", "other", "told"), [
    ("uncoded", after(9.0), "the queue of a, extra is full;"),
    ("coded_hedged", raises, "the queue of a is full and extra lost;"),
])  # fmt: skip
def test_a_full_queue_is_overload_and_no_loss(
    world: Any, virtually: Any, policy: str, other: Behaviour, told: str
) -> None:
    it = world([after(9.0), after(9.0), after(9.0), other], policy, queue=1, batch=1, initial_lateness=9.5, timeout=9.5)

    async def main() -> None:
        async with it.front as front:
            tasks = []
            for _ in range(5 if policy == "uncoded" else 3):  # there are two servers, or one
                tasks.append(asyncio.create_task(ask_one(front, X, 0)))
                await asyncio.sleep(0.01)
            with pytest.raises(OverloadedError, match=told):
                await tasks[-1]
            assert front.counts == {"overloaded": 1}
            assert not any(queue.is_doubted for queue in front.queues[:3])

    virtually(main())


def test_draining_refuses_new_queries_and_answers_those_that_are_under_way(world: Any, virtually: Any) -> None:
    it = world([after(1.0)] * 4, batch=1, initial_lateness=9.0)

    async def main() -> None:
        async with it.front as front:
            tasks = [asyncio.create_task(ask_one(front, X, 0)) for _ in range(3)]
            await asyncio.sleep(0.1)
            draining = asyncio.create_task(front.drain())
            await asyncio.sleep(0.1)
            assert not front.can_answer()
            with pytest.raises(ServingError, match="stops"):
                await ask_one(front, X, 0)
            await draining
            assert asyncio.get_running_loop().time() == pytest.approx(3.0)
            assert [(await task).decoded for task in tasks] == [False] * 3

    virtually(main())


def test_a_server_is_not_late_because_this_process_was_held_up() -> None:
    async def server(inputs: torch.Tensor) -> Reply:
        await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)  # read only once the loop turns again
        return Reply(inputs @ torch.ones(2, 3, dtype=inputs.dtype))

    async def main() -> None:
        delivered: list[Reply | None] = []
        queue = ServerQueue("it", server, ReplyFormat(3), PROBE.float(), Limits(timeout=0.2))
        queue.start()
        queue.put(Request(torch.ones(1, 2), delivered.append))
        await asyncio.sleep(0.02)
        time.sleep(0.6)
        await asyncio.sleep(0.3)
        await queue.stop()
        assert [reply is not None for reply in delivered] == [True]
        assert not queue.is_doubted

    asyncio.run(main())


@pytest.mark.parametrize("lag", [0.015, 0.08, 0.3])
def test_a_server_that_hangs_is_given_up_while_the_loop_is_busy(lag: float) -> None:
    async def main() -> None:
        delivered: list[Reply | None] = []
        queue = ServerQueue("it", lambda inputs: asyncio.sleep(1e6), ReplyFormat(3), PROBE.float(), Limits(timeout=0.2))
        queue.start()
        queue.put(Request(torch.ones(1, 2), delivered.append))
        start = time.monotonic()
        while not delivered and time.monotonic() - start < 5:
            time.sleep(lag)
            await asyncio.sleep(0)
        assert delivered == [None]
        await queue.stop()

    asyncio.run(main())


def test_too_many_queries_are_refused(world: Any, virtually: Any) -> None:
    it = world([after(1.0)] * 4, queries=2)

    async def main() -> None:
        async with it.front as front:
            tasks = [asyncio.create_task(ask_one(front, X, 0)) for _ in range(3)]
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(each) for each in done].count(OverloadedError) == 1
            assert front.counts["overloaded"] == 1

    virtually(main())


def test_requests_are_batched_up_to_the_limit_and_told_apart(world: Any, virtually: Any) -> None:
    it = world([after(1.0)] * 4, batch=4, initial_lateness=9.0)
    queries = [torch.full((1 + k % 2, 2), float(k), dtype=torch.float64) for k in range(9)]

    async def main() -> None:
        async with it.front as front:
            answers = await asyncio.gather(*(ask_one(front, x, 1) for x in queries))
            for x, answer in zip(queries, answers, strict=True):
                assert exact(answer.logits, it.system.truth(1, x))

    virtually(main())
    assert max(it.batches) == 4
    assert sum(it.batches) == sum(len(x) for x in queries)


def test_one_bad_row_loses_only_its_own_query(world: Any, virtually: Any) -> None:
    async def spoils_twos(inputs: torch.Tensor, reply: Reply) -> Reply:
        await asyncio.sleep(0.1)
        return Reply(torch.where(inputs[:, :1] == 2.0, torch.nan, reply.logits))

    it = world([spoils_twos, after(0.1), after(0.1), after(0.1)], initial_lateness=9.0)

    async def main() -> None:
        async with it.front as front:
            queries = [torch.full((1, 2), value, dtype=torch.float64) for value in (0.0, 1.0, 2.0, 3.0)]
            answers = await asyncio.gather(*(ask_one(front, x, 0) for x in queries))
            assert [answer.decoded for answer in answers] == [False, False, True, False]

    virtually(main())


def test_cancelled_query_leaves_nothing_behind(world: Any, virtually: Any) -> None:
    it = world([after(1.0)] * 4, batch=1)

    async def main() -> None:
        async with it.front as front:
            tasks = [asyncio.create_task(ask_one(front, X, 0)) for _ in range(5)]
            await asyncio.sleep(0.01)
            for task in tasks[1:]:
                task.cancel()
            await asyncio.sleep(0.0)
            assert len(front.queues[0]) == 1
            assert exact((await tasks[0]).logits, it.system.truth(0, X))
            for task in tasks[1:]:
                assert task.cancelled()
            await asyncio.sleep(5.0)
            assert front.counts["cancelled"] == 4

    virtually(main())
    assert it.asked[0] == 1


def test_stopping_fails_queries_at_once_and_refuses_new_ones(world: Any, virtually: Any) -> None:
    it = world([hangs] * 4)

    async def main() -> None:
        async with it.front:
            task = asyncio.create_task(ask_one(it.front, X, 0))
            await asyncio.sleep(0.1)
        with pytest.raises(ServingError, match="stopping"):
            await task
        with pytest.raises(ServingError, match="not running"):
            await ask_one(it.front, X, 0)

    virtually(main())


def test_mistakes() -> None:
    with pytest.raises(ConfigurationError, match="deadline=0"):
        Limits(deadline=0)
    with pytest.raises(ConfigurationError, match="failures=0"):
        Limits(failures=0)
    with pytest.raises(ConfigurationError, match="pixels=0"):
        InputLimits(pixels=0)
    with pytest.raises(ConfigurationError, match="coded_proactive"):
        Policy("coded")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"quantile=1\.0"):
        Policy(PolicyKind.coded_hedged, 1.0)


def test_fitted_decoder_is_used_where_it_fits_and_the_code_otherwise(linear_system: Any) -> None:
    system = linear_system([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 2, generator=draw, dtype=torch.float64)
    replies = [system.reply(server, inputs) for server in range(5)]
    features = [reply.logits.repeat(1, 2) for reply in replies]
    answers = Answers(
        torch.stack([reply.logits for reply in replies[:3]]),
        torch.stack([reply.logits for reply in replies[3:]]) + 0.5,  # a bias that a fit sees and the code does not
        features[:3],
        features[3:],
    )
    fitted = [make_decoder(kind, system.code, erased).fit(answers) for kind, erased in (("feature_ridge", [1]),)]
    decodings = Decodings(system.code, fitted, class_counts=[3, 2, 3], thresholds={((1,), 1): 0.01})
    biased = {
        server: Reply(reply.logits + (0.5 if server > 2 else 0.0), features[server])
        for server, reply in enumerate(replies)
    }

    def decode(*lost: int) -> dict[int, torch.Tensor]:
        arrived = {server: reply for server, reply in biased.items() if server not in lost}
        decoded, used = decodings.decode(arrived)
        assert used == tuple(arrived)
        for expert, (logits, risk, accepted) in decoded.items():
            if lost == (1,):
                assert torch.equal(risk, fitted[0].risk(expert, logits, 2))
                assert torch.equal(accepted, risk <= 0.01)
            else:  # the code's equations tell none, and nothing is promised of them
                assert bool(risk.isnan().all())
                assert not accepted.any()
        return {expert: each.logits for expert, each in decoded.items()}

    assert torch.allclose(decode(1)[1], replies[1].logits, atol=1e-4)
    assert not torch.allclose(decode(1, 4)[1], replies[1].logits, atol=1e-1)  # one coded model: the code's equation
    both = decode(0, 1)
    assert set(both) == {0, 1}
    assert torch.allclose(both[0], decode_linear(system.code.matrix, answers.coded, answers.experts[2:], (0, 1))[0])
    with pytest.raises(DecodingError, match="linearly dependent"):
        decode(0, 3)  # expert 0 is not in the second row
    huge = {server: Reply(reply.logits * 1e308 * 10) for server, reply in enumerate(replies) if server != 0}
    with pytest.raises(DecodingError, match="not finite"):
        decodings.decode(huge)
    assert ReplyFormat(3, 6).check(biased[0], 40) is None


def test_a_queue_lives_on_whatever_goes_wrong_in_it(virtually: Any) -> None:
    delivered: list[Reply | None] = []

    async def server(inputs: torch.Tensor) -> Reply:
        return Reply(inputs @ torch.ones(2, 3, dtype=inputs.dtype), None)

    async def main() -> None:
        queue = ServerQueue("it", server, ReplyFormat(3), PROBE.float(), Limits(queue=4, batch=1, timeout=10.0))
        queue.start()

        def refuse(_: Reply | None) -> None:
            raise RuntimeError("out of memory")

        queue.put(Request(torch.ones(1, 2), refuse))
        await asyncio.sleep(1)
        assert queue.last_error == "RuntimeError: out of memory"
        queue.put(Request(torch.ones(1, 2), delivered.append))
        await asyncio.sleep(1)
        await queue.stop()

    virtually(main())
    assert [reply.logits.tolist() for reply in delivered if reply is not None] == [[[2.0, 2.0, 2.0]]]
