from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def on_process() -> Callable[..., Any]:
    """Return a function that gives a datamodule a Trainer's view of the processes."""

    def see(data: Any, rank: int, world_size: int, epoch: int = 0, use_distributed_sampler: bool = False) -> Any:
        connector = SimpleNamespace(use_distributed_sampler=use_distributed_sampler)
        about = {"global_rank": rank, "world_size": world_size, "current_epoch": epoch, "training": False}
        data.trainer = SimpleNamespace(**about, testing=False, num_devices=1, _accelerator_connector=connector)
        data.setup()
        return data

    return see
