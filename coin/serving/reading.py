"""Reads queries' bodies in threads, with limits on bytes, pixels and time, so that none blocks the others."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from torch import Tensor

from coin.errors import DataError, OverloadedError, ServingError
from coin.serving.limits import InputLimits
from coin.serving.protocol import Description
from coin.serving.requests import Parsed, TooLargeError, parse

Result = TypeVar("Result")

_LIGHT_BYTES, _LIGHT_PIXELS = 2**16, 2**20
"""What is larger waits in a line of its own; what is not is read at once, by so few threads that it is bounded."""


class SlowError(ServingError):
    """A body took too long to arrive."""


@dataclass
class Budget:
    """A shared budget: each user may take half of what the others leave, so that small requests always succeed."""

    most: int
    what: str
    held: int = 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that reserves more of the budget until the end of the block.

        It raises `OverloadedError` if too little is left, `TooLargeError` if the whole budget would not suffice.
        """
        own = 0

        def take(amount: int) -> None:
            nonlocal own
            if 2 * (own + amount) > self.most:
                raise TooLargeError(
                    f"found a query of {own + amount} {self.what}, expected at most {self.most // 2}; send fewer inputs"
                )
            if 2 * (own + amount) > self.most - (self.held - own):
                raise OverloadedError(f"{self.held} {self.what} of queries are being read already; ask again later")
            own += amount
            self.held += amount

        try:
            yield take
        finally:
            self.held -= own


class Reader:
    """Reads queries in threads; large ones never block small ones."""

    def __init__(self, about: Description, limits: InputLimits) -> None:
        self.about = about
        self.limits = limits
        self.bytes = Budget(limits.held_bytes, "bytes")
        self.pixels = Budget(limits.held_pixels, "pixels")
        self._lanes = {light: ThreadPoolExecutor(2, "reader" if light else "large-reader") for light in (True, False)}

    def stop(self) -> None:
        """Start no more reads."""
        for lane in self._lanes.values():
            lane.shutdown(wait=False, cancel_futures=True)

    async def read(self, request: Request, model: str, header: int | None) -> tuple[Parsed, Tensor]:
        """Return a request for a model and its inputs; `header` is the length of its JSON if binary data follows.

        Raises DataError where the body is invalid, too large, or does not fit the served system, OverloadedError where
        too much is being read already, and SlowError where the body takes too long to arrive.
        """
        encoding = request.headers.get("content-encoding", "identity").lower()
        with ExitStack() as held:
            take_bytes, take_pixels = (held.enter_context(budget.share()) for budget in (self.bytes, self.pixels))
            body = await self._body(request, take_bytes)
            is_light = len(body) <= _LIGHT_BYTES and encoding == "identity"

            def begin() -> tuple[Parsed, Tensor | None]:
                parsed = parse(body, encoding, header, model, self.about, self.limits)
                return parsed, parsed.read() if is_light and parsed.pixels <= _LIGHT_PIXELS else None

            parsed, inputs = await self._run(is_light, begin, held)
            if inputs is None:
                take_bytes(max(parsed.bytes - len(body), 0))
                take_pixels(parsed.pixels)
                inputs = await self._run(False, parsed.read, held)
        return parsed, inputs

    async def discard(self, request: Request) -> None:
        """Read on in the body of a refused query, but no longer than a body may take.

        A connection that is closed before is reset, and a client that is still sending never sees the answer.
        """
        with suppress(ClientDisconnect, RuntimeError, TimeoutError):  # RuntimeError: it was read to its end
            async with asyncio.timeout(self.limits.seconds):
                async for _ in request.stream():
                    pass

    async def _run(self, light: bool, function: Callable[[], Result], held: ExitStack) -> Result:
        """Run a function in a thread; if the caller gives up, the budget stays reserved until the thread ends."""
        work = self._lanes[light].submit(function)
        done = asyncio.wrap_future(work)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            if not work.cancel():  # the thread goes on
                rest = held.pop_all()
                done.add_done_callback(lambda _: rest.close())
            raise

    async def _body(self, request: Request, take: Callable[[int], None]) -> bytes:
        limits = self.limits
        too_large = TooLargeError(f"found a body of more than {limits.bytes} bytes; send fewer or smaller inputs")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal():
            raise DataError(f"found a Content-Length of {length[:40]!r}, expected a number of bytes")
        if int(length[:40]) > limits.bytes:
            raise too_large
        read = bytearray()
        try:
            async with asyncio.timeout(limits.seconds):
                async for part in request.stream():
                    take(len(part))
                    read += part
                    if len(read) > limits.bytes:
                        raise too_large
        except ClientDisconnect:
            raise SlowError("found an incomplete body: the client closed the connection; send it again") from None
        except TimeoutError:
            raise SlowError(f"found no end of the body within {limits.seconds:g} s; send it faster") from None
        return bytes(read)
