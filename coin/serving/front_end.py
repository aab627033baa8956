"""The front end: asks an expert's server and, by a policy, those that stand in."""

import asyncio
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from coin.errors import DeadlineError, LostError, OverloadedError, ServingError
from coin.serving.limits import Limits
from coin.serving.policies import Lateness, Policy, StandIns
from coin.serving.server_state import ROOM, Server, ServerState

SLOW = 2.0  # an own answer is late at this multiple of when the other experts' are, however slow its server always is
EXPERIENCE = 20  # the queries after which an expert's lateness tells about others

QueryKind = tuple[tuple[int, ...], int]  # the experts wanted, and the bits of the number of inputs
# A lost expert's answer from the replies that arrived.
Decode = Callable[[int, Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Answer:
    """The answer to a query for one expert: its server's reply, a replica's, or what was `decoded` from the others'."""

    expert: int
    reply: Any
    decoded: bool
    answered_by: tuple[str, ...]


@dataclass
class _Query:
    inputs: Sized
    patience: float | None  # seconds until an own answer is late
    # By server, which is asked once at most.
    requests: dict[str, asyncio.Future[Any]] = field(default_factory=dict)
    in_time: int = 0  # how many own answers were
    late: bool = False

    def replies(self) -> dict[str, Any]:
        """The replies so far, by server."""
        found = {}
        for name, request in self.requests.items():
            if request.done() and not isinstance(request.result(), ServingError):
                found[name] = request.result()
        return found


class FrontEnd:
    """Answers queries from experts and, where an expert is late or lost, from the servers that stand in for it.

    Every query gets one answer for each expert or one error, by its deadline at the latest, in the event loop's time.
    """

    def __init__(
        self,
        servers: Mapping[str, Server],
        stand_ins: StandIns,
        policy: Policy,
        decode: Decode,
        limits: Limits,
    ) -> None:
        self.stand_ins = stand_ins
        self.policy = policy
        self.limits = limits
        self.servers = {}
        for name, call in servers.items():
            self.servers[name] = ServerState(name, call, limits)
        self.lateness: dict[QueryKind, Lateness] = {}
        self._decode = decode
        self._open = 0
        self._draining = False
        self._ended = asyncio.Event()

    async def drain(self) -> None:
        """Take no more queries, and wait for the running ones, which end by their deadline."""
        self._draining = True
        while self._open:
            self._ended.clear()
            await self._ended.wait()

    def can_answer(self, experts: Sequence[int]) -> bool:
        """Return whether the servers that are not doubted suffice for these experts."""
        up = {name for name, server in self.servers.items() if not server.doubted}
        own = self.stand_ins.experts
        for expert in experts:
            if own[expert] not in up and not self.stand_ins.suffice(expert, up):
                return False
        return not self._draining

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a query as running until the end of the block; ServingError where no more are taken."""
        if self._draining:
            raise ServingError("the front end stops; ask again later")
        if self._open >= self.limits.queries:
            raise OverloadedError(
                f"{self._open} queries are running, the most there may be; ask again later"
            )
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            self._ended.set()

    async def ask(self, inputs: Sized, experts: Sequence[int], deadline: float) -> list[Answer]:
        """Return some experts' answers to a query's inputs, by a time of the loop.

        Raises LostError where the remaining servers cannot answer, OverloadedError where one of these is only full, and
        DeadlineError where no answer came in time.
        """
        wanted = tuple(experts)
        size = len(inputs).bit_length()
        fresh = Lateness(self.policy.quantile, self.limits.initial_lateness, self.limits.deadline)
        lateness = self.lateness.setdefault((wanted, size), fresh)
        patience = min(lateness.seconds, SLOW * self._others_lateness(wanted, size))
        waits_until_lost = self.policy.moment == "lost"
        query = _Query(inputs, None if waits_until_lost else patience)
        answering = [self._answer(query, expert) for expert in wanted]
        try:
            async with asyncio.timeout_at(deadline):
                found = await asyncio.gather(*answering, return_exceptions=True)
        except TimeoutError:
            unanswered = [name for name in query.requests if name not in query.replies()]
            if not query.requests:  # the time was up before anybody was asked
                unanswered = [self.stand_ins.experts[expert] for expert in wanted]
            limit = self.limits.deadline
            silent = ", ".join(unanswered)
            raise DeadlineError(
                f"no answer in {limit:g} s from {silent}; ask again later"
            ) from None
        finally:
            # Whether a server is late by its own measure is unknown where others' is shorter.
            is_known = patience == lateness.seconds or not query.late
            has_ended = query.late or query.in_time == len(wanted)
            if is_known and has_ended:
                lateness.observe(query.late)
            for name, request in query.requests.items():
                self.servers[name].withdraw(request)
        answers = []
        for answer in found:
            if isinstance(answer, BaseException):
                raise answer
            answers.append(answer)
        return answers

    def _others_lateness(self, experts: tuple[int, ...], size: int) -> float:
        """Return the median of when the other experts' answers to queries of this size are late, in seconds.

        For queries for several experts it is that of all. Infinity where none is known from `EXPERIENCE` queries.
        """
        known = []
        for place in range(len(self.stand_ins.experts)):
            other = (place,)
            lateness = self.lateness.get((other, size))
            if lateness is None or other == experts:
                continue
            if lateness.experience >= EXPERIENCE:
                known.append(lateness.seconds)
        return statistics.median_low(known) if known else math.inf

    async def _answer(self, query: _Query, expert: int) -> Answer:
        """Return the expert's own answer if it comes in time, else the first that can be had."""
        name = self.stand_ins.experts[expert]
        stand_ins = self.stand_ins.of[expert]
        own = self.servers[name]
        silence = asyncio.get_running_loop().time() - own.silent_since
        is_silent = query.patience is not None and 0 < query.patience < silence
        is_tried_by_others = (own.doubted or is_silent) and own.pending
        if not (is_tried_by_others and stand_ins):
            self._request(query, name)
        if self.policy.moment == "at once":
            # What experts are asked for themselves comes first.
            self._request_stand_ins(query, expert, room=ROOM / 2)
        if name in query.requests and not own.doubted:
            request = query.requests[name]
            await asyncio.wait({request}, timeout=query.patience)
            query.late |= not request.done()
            query.in_time += name in query.replies()
        answering = [name]  # who needs no decoding
        if self.stand_ins.which == "replica":
            answering += stand_ins
        while True:
            replies = query.replies()
            for each in answering:
                if each in replies:
                    return Answer(expert, replies[each], False, (each,))
            self._request_stand_ins(query, expert)
            if self.stand_ins.suffice(expert, replies):
                used = tuple(each for each in stand_ins if each in replies)
                return Answer(expert, self._decode(expert, replies), True, used)
            pending = {each: task for each, task in query.requests.items() if not task.done()}
            may_suffice = self.stand_ins.suffice(expert, {*replies, *pending})
            if name in pending or may_suffice:
                await asyncio.wait(pending.values(), return_when=asyncio.FIRST_COMPLETED)
            elif name not in query.requests:
                self._request(query, name)  # doubted or not: nobody else is left
            else:
                raise self._failure(query, stand_ins)

    def _failure(self, query: _Query, stand_ins: Sequence[str]) -> ServingError:
        """Return why the servers cannot answer: OverloadedError if one of them is only full, else LostError."""
        lost = []
        for name, request in query.requests.items():
            result = request.result() if request.done() else None
            if isinstance(result, OverloadedError):
                return result
            if isinstance(result, LostError):
                lost.append(name)
        for name in stand_ins:
            if name not in query.requests and not self.servers[name].doubted:
                return self.servers[name].full
        return LostError(
            f"lost {', '.join(lost)}, more than the others make up for; ask again later"
        )

    def _request_stand_ins(self, query: _Query, expert: int, room: float = ROOM) -> None:
        """Ask the servers that stand in for an expert, unless too many of them are full to make up for it."""
        stand_ins = self.stand_ins.of[expert]
        free = set()
        for name in stand_ins:
            if name in query.requests or not self.servers[name].is_full(room):
                free.add(name)
        if self.stand_ins.suffice(expert, free):
            self._request(query, *stand_ins)

    def _request(self, query: _Query, *names: str) -> None:
        """Ask servers that this query has not asked yet."""
        for name in names:
            if name not in query.requests:
                query.requests[name] = self.servers[name].request(query.inputs)
