"""What may be read at a time."""

from contextlib import ExitStack

import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed: pip install 'coded-coin[serve]'")

from coin.errors import OverloadedError
from coin.serving.images import TooLargeError
from coin.serving.reading import Budget


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
