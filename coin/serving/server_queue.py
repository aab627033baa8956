"""The bounded queue of one server: it sends one batch at a time, and reports the end of every request."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coin.errors import ServingError
from coin.serving.limits import Limits
from coin.serving.replies import Reply, ReplyFormat, Server

logger = logging.getLogger("ray.serve.coin")


@dataclass(eq=False)
class Request:
    """One query's request to one server, of inputs ``[B, ...]``.

    `deliver` is called once, with the valid reply or with None if there will be none; not after `cancelled` is set.
    """

    inputs: Tensor
    deliver: Callable[[Reply | None], None]
    cancelled: bool = False


class ServerQueue:
    """Sends requests to one server, first come first served, several in one batch.

    A batch is lost, with its requests, if its reply is not as `expects` says, the server raises, or the timeout passes;
    the next batch is sent anyway. Cancelled requests are dropped before they are sent. While the server is considered
    down and no query asks it, the input `probe` ``[1, ...]`` is sent after every cooldown, so that queries need not try
    it.
    """

    def __init__(self, name: str, server: Server, expects: ReplyFormat, probe: Tensor, limits: Limits) -> None:
        self.name, self.last_error = name, ""
        self._server, self._expects, self._probe, self._limits = server, expects, probe, limits
        self._failures = 0
        """Lost batches since the last good one."""
        self._waiting, self._sent, self._filled = deque[Request](), deque[Request](), asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """The number of requests waiting or sent, without cancelled ones."""
        return sum(not request.cancelled for request in (*self._waiting, *self._sent))

    @property
    def is_down(self) -> bool:
        """Whether the server is considered down: queries avoid it if they can."""
        return self._failures >= self._limits.failures

    @property
    def is_doubted(self) -> bool:
        """Whether the server's last batch failed: no query should wait for it alone."""
        return self._failures > 0

    def start(self) -> None:
        """Start sending requests, in the running event loop."""
        self._worker = asyncio.get_running_loop().create_task(self._work(), name=f"server {self.name}")

    async def stop(self) -> None:
        """Stop sending; waiting requests are lost."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait({self._worker})
        _lose(self._sent)
        _lose(self._waiting)

    def put(self, request: Request) -> bool:
        """Enqueue a request, and return whether there was room for it."""
        if len(self._waiting) >= self._limits.queue:
            self._waiting = deque(waiting for waiting in self._waiting if not waiting.cancelled)
        if len(self._waiting) >= self._limits.queue:
            return False
        self._waiting.append(request)
        self._filled.set()
        return True

    async def _work(self) -> None:
        while True:
            self._sent = self._next_batch()
            if not self._sent:
                self._filled.clear()
                try:
                    await asyncio.wait_for(self._filled.wait(), self._limits.cooldown if self.is_down else None)
                    continue
                except TimeoutError:
                    self._sent.append(Request(self._probe, lambda _: None))
            try:
                self._distribute(await self._call(torch.cat([request.inputs for request in self._sent])))
                self._failures = 0
            except Exception as error:  # whatever it is, the requests behind these are still to be served
                self.last_error = " ".join(f"{type(error).__name__}: {error}".split())
                self._failures += 1
                told = {"server": self.name, "error": self.last_error, "down": self.is_down}
                logger.warning("lost a batch", extra=told)
                _lose(self._sent)

    def _next_batch(self) -> deque[Request]:
        batch: deque[Request] = deque()
        samples = 0
        while self._waiting:
            inputs, first = self._waiting[0].inputs, (batch or self._waiting)[0].inputs
            fits = samples + len(inputs) <= self._limits.batch and inputs.shape[1:] == first.shape[1:]
            if self._waiting[0].cancelled:
                self._waiting.popleft()
            elif batch and not (fits and inputs.dtype == first.dtype):
                break
            else:
                batch.append(self._waiting.popleft())
                samples += len(inputs)
        return batch

    async def _call(self, inputs: Tensor) -> Reply:
        """Return the server's reply; returns or raises within the timeout in any case."""
        task = asyncio.ensure_future(self._server(inputs))
        # A failure that comes after the timeout has been dealt with: asyncio need not tell of it.
        task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        loop, timeout = asyncio.get_running_loop(), self._limits.timeout
        try:
            ends = loop.time() + timeout
            await asyncio.wait({task}, timeout=timeout)
            late = loop.time() - ends  # for which the loop was held up: an answer may be there, but not read
            if late > 0.01 and not task.done():
                await asyncio.wait({task}, timeout=min(late, timeout))  # once: a busy loop is always late
        finally:
            task.cancel()
        if not task.done():
            raise TimeoutError(f"no answer after {self._limits.timeout:g} s")
        if task.cancelled():
            raise ServingError("the server gave up")
        return task.result()

    def _distribute(self, reply: Reply) -> None:
        """Deliver each request its rows; raise `ServingError` if some are invalid, which fails only their requests."""
        samples = sum(len(request.inputs) for request in self._sent)
        if len(reply.logits) != samples:  # rows can only be told apart if there is one for each input
            raise ServingError(f"found no reply to {samples} inputs")
        problem, start = None, 0
        while self._sent:
            request = self._sent.popleft()
            stop = start + len(request.inputs)
            rows: Reply | None = reply.rows(start, stop)
            try:
                self._expects.check(reply.rows(start, stop), stop - start)
            except ServingError as error:
                problem, rows = error, None
            if not request.cancelled:
                request.deliver(rows)
            start = stop
        if problem is not None:
            raise problem


def _lose(requests: deque[Request]) -> None:
    while requests:
        request = requests.popleft()
        if not request.cancelled:
            request.deliver(None)
