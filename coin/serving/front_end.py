"""The front end: asks an expert's server and, by a policy, those that stand in; the same code on a virtual clock."""

import asyncio
import logging
import math
import statistics
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from coin.core.choices import check_number
from coin.errors import DeadlineError, LostError, OverloadedError, ServingError, first_line
from coin.serving.policies import Lateness, Pace, Policy, StandIns

SLOW = 2.0  # an own answer is late at this multiple of when the other experts' are, however slow its server always is
EXPERIENCE = 20  # the queries after which an expert's lateness tells about others
ROOM = 0.7  # the share of `timeout` that a request may be expected to wait: the rest is for waits longer than expected

logger = logging.getLogger("ray.serve.coin")  # Ray Serve writes what is logged below its own

Server = Callable[[Any], Awaitable[Any]]
"""Answers a query's inputs; raises where it cannot, OverloadedError where its queue is full."""
Decode = Callable[[int, Mapping[str, Any]], Any]  # a lost expert's answer from the replies that arrived


@dataclass(frozen=True)
class Limits:
    """The limits on waiting, and on the size of a query; all positive.

    Args:
        deadline: Seconds after which a query fails, including the time to read it.
        timeout: Seconds after which a request to a server is lost. One is refused at once where the wait to expect is
            more than 0.7 of this: what is above is for waits longer than expected.
        reading: Seconds that a query's body may take to arrive.
        initial_lateness: Seconds after which an own answer is late, before any was measured.
        queries: The largest number of running queries, including those being read.
        queue: The largest number of requests waiting for one server; `batch`, that it runs together.
        samples: The largest number of images in one query.
        bytes: The largest body; `pixels`: the largest number of pixels of one image.
    """

    deadline: float = 10.0
    timeout: float = 2.0
    reading: float = 5.0
    initial_lateness: float = 0.1
    queries: int = 256
    queue: int = 256
    batch: int = 8
    samples: int = 64
    bytes: int = 8 * 2**20
    pixels: int = 4096 * 4096

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_number(name, value, low=0, strict=True)


@dataclass(frozen=True)
class Answer:
    """The answer to a query for one expert: its server's reply, a replica's, or what was `decoded` from the others'."""

    expert: int
    reply: Any
    decoded: bool
    answered_by: tuple[str, ...]


@dataclass(eq=False)
class ServerState:
    """A server, doubted if its last request failed: nobody waits for it alone then; one request at a time tries it.

    Silence is the time since which it has answered nothing though it was asked: a process that was killed or hangs
    refuses no request, it leaves them unanswered until their time is up. `pending` are the requests that queries wait
    for; `running`, these and the late ones, whose replies still show that the server is alive.
    """

    name: str
    call: Server
    doubted: bool = False
    answered_at: float = -math.inf
    silent_since: float = math.inf
    pending: set[asyncio.Future[Any]] = field(default_factory=set)
    running: dict[asyncio.Task[Any], float] = field(default_factory=dict)  # by when they began, the oldest first
    pace: Pace = field(default_factory=Pace)

    def expected_wait(self) -> float:
        """Return after how many seconds one more request would be answered; 0 if nothing is known of the server."""
        return (len(self.running) + 1) * self.pace.seconds if self.running else 0.0


@dataclass(eq=False)
class _Query:
    inputs: Sized
    patience: float | None  # seconds until an own answer is late
    requests: dict[str, asyncio.Future[Any]] = field(default_factory=dict)  # by server, which is asked once at most
    in_time: int = 0  # how many own answers were
    late: bool = False

    def replies(self, *, lost: bool = False) -> dict[str, Any]:
        """The valid replies so far by server, or the errors of those that are lost."""
        done = {name: task.result() for name, task in self.requests.items() if task.done() and not task.cancelled()}
        return {name: result for name, result in done.items() if isinstance(result, ServingError) == lost}


class FrontEnd:
    """Answers queries from experts and, where an expert is late or lost, from the servers that stand in for it.

    Every query gets one answer for each expert or one error, by its deadline at the latest, in the event loop's time.
    """

    def __init__(
        self, servers: Mapping[str, Server], stand_ins: StandIns, policy: Policy, decode: Decode, limits: Limits
    ) -> None:
        self.stand_ins, self.policy, self.limits, self._decode = stand_ins, policy, limits, decode
        self.servers = {name: ServerState(name, call) for name, call in servers.items()}
        # By the experts wanted and the size class of the query, the bits of its number of inputs.
        self.lateness: dict[tuple[tuple[int, ...], int], Lateness] = {}
        self._open, self._draining, self._ended = 0, False, asyncio.Event()

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
        return not self._draining and all(own[each] in up or self.stand_ins.suffice(each, up) for each in experts)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a query as running until the end of the block; ServingError where no more are taken."""
        if self._draining:
            raise ServingError("the front end stops; ask again later")
        if self._open >= self.limits.queries:
            raise OverloadedError(f"{self._open} queries are under way, the most there may be; ask again later")
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
        fresh = Lateness(self.policy.quantile, self.limits.initial_lateness, self.limits.deadline)
        size = len(inputs).bit_length()
        lateness = self.lateness.setdefault((tuple(experts), size), fresh)
        patience = min(lateness.seconds, SLOW * self._others_lateness(tuple(experts), size))
        query = _Query(inputs, None if self.policy.moment == "lost" else patience)
        try:
            async with asyncio.timeout_at(deadline):
                each = (self._answer(query, expert) for expert in experts)
                found = await asyncio.gather(*each, return_exceptions=True) if len(experts) > 1 else [await next(each)]
        except TimeoutError:
            own = (self.stand_ins.experts[expert] for expert in experts)  # if the time was up before they were asked
            waits = ", ".join([name for name, task in query.requests.items() if not task.done()] or own)
            raise DeadlineError(f"no answer in {self.limits.deadline:g} s from {waits}; ask again later") from None
        finally:
            # Whether a server is late by its own measure is unknown where others' is shorter.
            is_known = patience == lateness.seconds or not query.late
            if is_known and (query.late or query.in_time == len(experts)):
                lateness.observe(query.late)
            self._close(query)
        if failed := [each for each in found if isinstance(each, BaseException)]:
            raise failed[0]
        return [each for each in found if isinstance(each, Answer)]

    def _others_lateness(self, experts: tuple[int, ...], size: int) -> float:
        """Return the median of when the other experts' answers to queries of this size are late, in seconds.

        For queries for several experts it is that of all. Infinity where none is known from `EXPERIENCE` queries.
        """
        own = experts[0] if len(experts) == 1 else None
        others = (self.lateness.get(((place,), size)) for place in range(len(self.stand_ins.experts)) if place != own)
        known = [each.seconds for each in others if each is not None and each.experience >= EXPERIENCE]
        return statistics.median_low(known) if known else math.inf

    async def _answer(self, query: _Query, expert: int) -> Answer:
        """Return the expert's own answer if it comes in time, else the first that can be had."""
        name, stand_ins = self.stand_ins.experts[expert], self.stand_ins.of[expert]
        copies = stand_ins if self.stand_ins.which == "replica" else ()
        own = self.servers[name]
        silence = asyncio.get_running_loop().time() - own.silent_since
        is_silent = query.patience is not None and 0 < query.patience < silence
        if not ((own.doubted or is_silent) and own.pending and stand_ins):
            self._request(query, name)
        if self.policy.moment == "at once":
            self._request_stand_ins(query, expert, room=ROOM / 2)  # what experts are asked for themselves comes first
        if name in query.requests and not own.doubted:
            await asyncio.wait({query.requests[name]}, timeout=query.patience)
            query.late |= not query.requests[name].done()
            query.in_time += name in query.replies()
        while True:
            replies = query.replies()
            if by := next((each for each in (name, *copies) if each in replies), None):
                return Answer(expert, replies[by], False, (by,))
            self._request_stand_ins(query, expert)
            if self.stand_ins.suffice(expert, replies):
                used = tuple(each for each in stand_ins if each in replies)
                return Answer(expert, self._decode(expert, replies), True, used)
            pending = {each: task for each, task in query.requests.items() if not task.done()}
            if name in pending or self.stand_ins.suffice(expert, {*replies, *pending}):
                await asyncio.wait(pending.values(), return_when=asyncio.FIRST_COMPLETED)
            elif name not in query.requests:
                self._request(query, name)  # doubted or not: nobody else is left
            else:
                raise self._failure(query, stand_ins)

    def _failure(self, query: _Query, stand_ins: Sequence[str]) -> ServingError:
        """Return why the servers cannot answer: OverloadedError if one of them is only full, else LostError."""
        lost = query.replies(lost=True)
        for error in lost.values():
            if isinstance(error, OverloadedError):
                return error
        for name in stand_ins:
            if name not in query.requests and not self.servers[name].doubted:
                return _full(name)
        return LostError(f"lost {', '.join(lost)}, more than the others make up for; ask again later")

    def is_full(self, name: str, room: float = ROOM) -> bool:
        """Return whether a request would wait for more than this share of `timeout`, by the last replies' pace."""
        return self.servers[name].expected_wait() > room * self.limits.timeout

    def _request_stand_ins(self, query: _Query, expert: int, room: float = ROOM) -> None:
        """Ask the servers that stand in for an expert, unless too many of them are full to make up for it."""
        stand_ins = self.stand_ins.of[expert]
        free = {name for name in stand_ins if name in query.requests or not self.is_full(name, room)}
        if self.stand_ins.suffice(expert, free):
            self._request(query, *stand_ins)

    def _request(self, query: _Query, *names: str) -> None:
        """Ask servers that this query has not asked yet; those that are full are refused for it at once."""
        loop = asyncio.get_running_loop()
        for name in names:
            if name in query.requests:
                continue
            server = self.servers[name]
            if self.is_full(name):
                query.requests[name] = refused = loop.create_future()
                refused.set_result(LostError(f"lost {name}") if server.doubted else _full(name))
                continue
            if not server.running:
                server.pace.begin(loop.time())
            wait = server.expected_wait()
            request = loop.create_task(self._reply(server, query.inputs))
            server.running[request] = loop.time()
            request.add_done_callback(server.running.pop)
            query.requests[name] = task = loop.create_task(self._wait(server, request, wait))
            server.pending.add(task)
            task.add_done_callback(server.pending.discard)

    def _close(self, query: _Query) -> None:
        """Withdraw the requests that nobody waits for, but for a server's only one: it tells whether it is well."""
        for name, task in query.requests.items():
            pending = self.servers[name].pending
            if not task.done() and len(pending) > 1:
                pending.discard(task)
                task.cancel()

    async def _wait(self, server: ServerState, request: asyncio.Task[Any], expected: float) -> Any:
        """Return the result of a request, or a ServingError after `timeout`, when the request runs on by itself.

        A server that has answered others meanwhile, or that had much to do, is not lost.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        server.silent_since = min(server.silent_since, began)
        try:
            await asyncio.wait({request}, timeout=self.limits.timeout)
        except asyncio.CancelledError:
            request.cancel()
            raise
        finally:
            if len(server.pending) <= 1:  # this request was the only one
                server.silent_since = math.inf
        if request.done():
            return request.result()
        late = len(server.running) - len(server.pending)
        if late >= self.limits.batch:  # the oldest run, the others would wait for nobody
            request.cancel()
        if server.answered_at > began or expected > self.limits.timeout / 2:
            return _full(server.name)
        return self._doubt(server, TimeoutError())

    async def _reply(self, server: ServerState, inputs: Sized) -> Any:
        """Return a server's reply, or a ServingError, and note whether it is well, even if nobody waits any more."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(self.limits.deadline):
                reply = await server.call(inputs)
        except OverloadedError:
            return _full(server.name)
        except Exception as error:  # whatever it is, others may answer
            if isinstance(error, TimeoutError) and server.answered_at > began:
                return _full(server.name)
            return self._doubt(server, error)
        server.doubted, server.answered_at = False, loop.time()
        server.silent_since = loop.time() if len(server.pending) > 1 else math.inf
        server.pace.observe(loop.time(), self.limits.timeout)
        for other, start in list(server.running.items()):
            if start >= began - self.limits.timeout:
                break
            other.cancel()  # a process that was stopped or killed has forgotten it
        return reply

    def _doubt(self, server: ServerState, error: Exception) -> LostError:
        server.doubted = True
        logger.info("%s lost a request (%s: %s)", server.name, type(error).__name__, first_line(error))
        return LostError(f"lost {server.name}")


def _full(name: str) -> OverloadedError:
    return OverloadedError(f"{name} cannot take more; ask again later")
