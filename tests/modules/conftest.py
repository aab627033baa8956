from collections.abc import Callable

import pytest

from coin.data import TaskData
from coin.data.tasks import Tasks


@pytest.fixture
def experts(write_experts: Callable[..., dict[str, str]]) -> list[str]:
    return list(write_experts([3, 2]).values())


@pytest.fixture
def tasks(synthetic: type[TaskData]) -> Callable[..., Tasks]:
    """Return a function that makes their tasks, with a share of the calibration samples held out."""

    def make(held_out: float = 0.0) -> Tasks:
        members = {"a": synthetic(3, key=1), "b": synthetic(2, key=2)}
        return Tasks(members, samples_per_task=20, batch_size=8, held_out=held_out)

    return make
