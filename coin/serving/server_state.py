"""What the front end knows of a server: whether it is lost, silent or full; and its requests."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sized
from typing import Any

from coin.errors import LostError, OverloadedError, first_line
from coin.serving.limits import Limits

ROOM = 0.7  # the share of `timeout` that a request may be expected to wait: the rest is for waits longer than expected

logger = logging.getLogger("ray.serve.coin")  # Ray Serve writes what is logged below its own

Server = Callable[[Any], Awaitable[Any]]
"""Answers a query's inputs; raises where it cannot, OverloadedError where its queue is full."""


class Pace:
    """How many seconds a server takes for each reply while it has work, over the last seconds of work.

    Replies that come together, as of one batch, share its time; time without work does not count.
    """

    def __init__(self) -> None:
        self._work = 0.0
        self._replies = 0.0
        self._since = 0.0

    @property
    def seconds(self) -> float:
        """Seconds for each reply; 0 before the first."""
        return self._work / self._replies if self._replies > 0 else 0.0

    def begin(self, now: float) -> None:
        """Note that a server that had no work gets some."""
        self._since = now

    def observe(self, now: float, memory: float) -> None:
        """Count a reply; one of `memory` seconds of work ago weighs 1/e. A reply's time counts up to twice `memory`."""
        work = min(now - self._since, 2 * memory)
        weight = math.exp(-work / memory)
        self._work = weight * self._work + work
        self._replies = weight * self._replies + 1.0
        self._since = now


class ServerState:
    """A server and its requests.

    Attributes:
        doubted: Whether its last request failed: nobody waits for it alone then; one request at a time tries it.
        silent_since: Since when it has answered nothing though it was asked: a process that was killed or hangs refuses
            no request, it leaves them unanswered until their time is up. Infinity where it has answered.
        pending: The requests that queries wait for.
    """

    def __init__(self, name: str, call: Server, limits: Limits) -> None:
        self.name = name
        self.doubted = False
        self.silent_since = math.inf
        self.pending: set[asyncio.Future[Any]] = set()
        self._call = call
        self._limits = limits
        self._answered_at = -math.inf
        # When each call began, the oldest first: of pending requests and of late ones, whose replies are signs of life.
        self._running: dict[asyncio.Task[Any], float] = {}
        self._pace = Pace()

    def is_full(self, room: float = ROOM) -> bool:
        """Return whether one more request would wait for more than this share of `timeout`, by the last replies' pace.

        Nobody waits for a server that has no work.
        """
        return self._expected_wait() > room * self._limits.timeout

    def request(self, inputs: Sized) -> "asyncio.Future[Any]":
        """Ask the server; return its reply to be, whose result is the reply or a ServingError."""
        loop = asyncio.get_running_loop()
        if self.is_full():
            refused = loop.create_future()
            refused.set_result(self.lost if self.doubted else self.full)
            return refused
        if not self._running:
            self._pace.begin(loop.time())
        expected = self._expected_wait()
        call = loop.create_task(self._reply(inputs))
        self._running[call] = loop.time()
        call.add_done_callback(self._running.pop)
        request = loop.create_task(self._wait(call, expected))
        self.pending.add(request)
        request.add_done_callback(self.pending.discard)
        return request

    def withdraw(self, request: "asyncio.Future[Any]") -> None:
        """Cancel a request that nobody waits for, unless it is the only one: that tells whether the server is well."""
        if not request.done() and len(self.pending) > 1:
            self.pending.discard(request)
            request.cancel()

    @property
    def full(self) -> OverloadedError:
        """The error of a server that has too much to do."""
        return OverloadedError(f"{self.name} cannot take more; ask again later")

    @property
    def lost(self) -> LostError:
        """The error of a server that does not answer."""
        return LostError(f"lost {self.name}")

    def _expected_wait(self) -> float:
        """Return after how many seconds one more request would be answered; 0 if the server has no work."""
        if not self._running:
            return 0.0
        return (len(self._running) + 1) * self._pace.seconds

    async def _wait(self, call: asyncio.Task[Any], expected: float) -> Any:
        """Return the result of a call, or a ServingError after `timeout`, when the call runs on by itself.

        A server that has answered others meanwhile, or that had much to do, is not lost.
        """
        began = asyncio.get_running_loop().time()
        self.silent_since = min(self.silent_since, began)
        try:
            await asyncio.wait({call}, timeout=self._limits.timeout)
        except asyncio.CancelledError:
            call.cancel()
            raise
        finally:
            if len(self.pending) <= 1:  # this request was the only one
                self.silent_since = math.inf
        if call.done():
            return call.result()
        late = len(self._running) - len(self.pending)
        if late >= self._limits.batch:  # the oldest run on, the others would wait for nobody
            call.cancel()
        if self._answered_at > began or expected > self._limits.timeout / 2:
            return self.full
        return self._doubt(TimeoutError())

    async def _reply(self, inputs: Sized) -> Any:
        """Return the server's reply, or a ServingError, and note whether it is well, even if nobody waits any more."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(self._limits.deadline):
                reply = await self._call(inputs)
        except OverloadedError:
            return self.full
        except Exception as error:  # whatever it is, others may answer
            has_answered_others = isinstance(error, TimeoutError) and self._answered_at > began
            return self.full if has_answered_others else self._doubt(error)
        now = loop.time()
        self.doubted = False
        self._answered_at = now
        self.silent_since = now if len(self.pending) > 1 else math.inf
        self._pace.observe(now, self._limits.timeout)
        for other, start in list(self._running.items()):
            if start < began - self._limits.timeout:
                other.cancel()  # a process that was stopped or killed has forgotten it
        return reply

    def _doubt(self, error: Exception) -> LostError:
        self.doubted = True
        logger.info(
            "%s lost a request (%s: %s)", self.name, type(error).__name__, first_line(error)
        )
        return self.lost
