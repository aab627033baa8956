"""What may be read at a time."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed: pip install '.[serve]'")

from coin.errors import OverloadedError
from coin.serving import reading
from coin.serving.limits import InputLimits
from coin.serving.protocol import Description
from coin.serving.reading import Budget, Reader
from coin.serving.requests import TooLargeError


def test_nobody_takes_more_than_half_of_what_the_others_leave() -> None:
    budget = Budget(1000, "bytes")
    with ExitStack() as stack:
        takes = [stack.enter_context(budget.share()) for _ in range(4)]
        takes[0](300)
        takes[0](200)
        with pytest.raises(TooLargeError, match="found a query of 501 bytes, expected at most 500;"):
            takes[0](1)
        with pytest.raises(OverloadedError, match="500 bytes of queries are being read already; ask again later"):
            takes[1](251)
        takes[1](250)
        with pytest.raises(OverloadedError):
            takes[2](126)
        takes[2](125)
        takes[3](60)  # there is something left for who needs little
        assert budget.held == 935
    assert budget.held == 0


def test_what_a_query_held_is_free_however_it_ends() -> None:
    budget = Budget(1000, "bytes")

    def fail() -> None:
        with budget.share() as take:
            take(400)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert budget.held == 0


def test_what_a_query_held_is_held_until_its_thread_is_done_though_its_time_is_over(monkeypatch: Any) -> None:
    ends, begun = threading.Event(), []

    def parse(*_: object) -> None:
        begun.append(1)
        ends.wait(20)
        raise KeyError

    async def stream() -> AsyncIterator[bytes]:
        yield bytes(1000)

    async def main() -> list[int]:
        reader = Reader(Description({"a": ["x", "y"]}, 8, "p"), InputLimits())
        request: Any = SimpleNamespace(headers={}, stream=stream)
        queries = [asyncio.create_task(reader.read(request, "a", None)) for _ in range(5)]  # of two threads
        while len(begun) < 2:
            await asyncio.sleep(0.01)
        held = [reader.bytes.held]
        for query in queries:
            query.cancel()
        await asyncio.wait(queries)
        held.append(reader.bytes.held)
        ends.set()
        until = time.monotonic() + 5
        while reader.bytes.held and time.monotonic() < until:
            await asyncio.sleep(0.01)
        reader.stop()
        return [*held, reader.bytes.held, len(begun)]

    monkeypatch.setattr(reading, "parse", parse)
    assert asyncio.run(main()) == [5000, 2000, 0, 2]
