"""A server as the front end sees it: its requests, and whether it is lost, silent or full."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

from coin.errors import OverloadedError, first_line
from coin.serving.limits import Limits

logger = logging.getLogger("ray.serve.coin")  # Ray Serve writes what is logged below its own

Call = Callable[[int, Any], Awaitable[Any]]
"""Answers a query's inputs as an expert; raises where it cannot, OverloadedError where its queue is full."""


class Breaker:
    """The requests to a server, and a circuit breaker: a lost server is tried with one request at a time.

    Ray Serve's limit of queued requests does not know how long a server takes for each, and a process that was killed
    or stopped refuses nothing: its requests wait until their time is up. So two numbers are measured here: the seconds
    that a server takes for each request, and for how long it has answered nothing.

    Attributes:
        is_lost: Whether its last request failed.
        pending: The unanswered requests, the oldest first, and when they were sent.
    """

    def __init__(self, name: str, call: Call, limits: Limits) -> None:
        self.name = name
        self.is_lost = False
        self.pending: dict[asyncio.Future[Any], float] = {}
        self._call = call
        self._limits = limits
        self._answered_at = -math.inf
        # For each request while several wait; at first, as though a batch took the timeout.
        self._seconds = limits.timeout / limits.batch

    def silence(self) -> float:
        """Return for how many seconds the server has answered nothing while requests waited; 0 if none waits."""
        if not self.pending:
            return 0.0
        oldest = next(iter(self.pending.values()))
        return asyncio.get_running_loop().time() - max(oldest, self._answered_at)

    def is_full(self) -> bool:
        """Return whether one more request is refused: the server is lost and tried by another, or the wait is too long.

        That is more than 0.7 of `timeout`; nobody waits for a server that has no request.
        """
        wait = (len(self.pending) + 1) * self._seconds
        is_long = wait > 0.7 * self._limits.timeout
        return len(self.pending) > 0 and (self.is_lost or is_long)

    def request(self, expert: int, inputs: Any) -> "asyncio.Future[Any]":
        """Ask the server as an expert; the result of what is returned is its reply, or None."""
        loop = asyncio.get_running_loop()
        if self.is_full():
            refused = loop.create_future()
            refused.set_result(None)
            return refused
        request = loop.create_task(self._reply(expert, inputs))
        self.pending[request] = loop.time()
        request.add_done_callback(self._forget)
        return request

    def withdraw(self, request: "asyncio.Future[Any]") -> None:
        """Cancel a request that nobody waits for, unless it is the only one: that tells whether the server is lost."""
        if len(self.pending) > 1:
            self._forget(request)
            request.cancel()

    def _forget(self, request: "asyncio.Future[Any]") -> None:
        self.pending.pop(request, None)

    async def _reply(self, expert: int, inputs: Any) -> Any:
        """Return the reply to a request that has just been added to those that are pending; None if there is none."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        place = len(self.pending)
        try:
            async with asyncio.timeout(self._limits.timeout):
                reply = await self._call(expert, inputs)
        except Exception as error:  # whatever it is, others may answer
            expected = place * self._seconds
            has_work = self._answered_at > began or expected > self._limits.timeout / 2
            is_busy = isinstance(error, TimeoutError) and has_work
            if not is_busy and not isinstance(error, OverloadedError):
                self.is_lost = True
                reason = f"{type(error).__name__}: {first_line(error)}"
                logger.info("%s lost a request (%s)", self.name, reason)
            return None
        self.is_lost = False
        self._answered_at = loop.time()
        measured = (self._answered_at - began) / place
        self._seconds = 0.8 * self._seconds + 0.2 * measured
        return reply
