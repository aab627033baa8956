"""What a coded system says to inputs that hold nothing, and where nobody runs."""

from typing import Any

import pytest
import torch
from torch import nn

from coin.coding.ready import convex
from coin.errors import ConfigurationError, DataError
from coin.modules import Coded
from coin.trainer import Trainer

INPUTS = torch.ones(6, 4)


@pytest.fixture
def system() -> Coded:
    return Coded(convex(2, 1), [nn.Linear(4, 3), nn.Linear(4, 3)], [nn.Linear(4, 3)])


def test_inputs_that_hold_no_batch_are_one_line(system: Coded) -> None:
    ended = iter([INPUTS])
    next(ended)
    with pytest.raises(DataError, match="found no batch of inputs, expected at least one"):
        system.fit_decoder(ended, [0], "ridge")
    system.fit_decoder([INPUTS], [0], "ridge")
    with pytest.raises(DataError, match="found no batch of inputs, expected at least one"):
        system.accept(0.1, inputs=[])


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu(*_: Any) -> bool:
        return False

    for name in ("CUDAAccelerator", "MPSAccelerator"):
        monkeypatch.setattr(f"lightning.pytorch.accelerators.{name}.is_available", no_gpu)
    with pytest.raises(ConfigurationError, match=r"give --trainer\.accelerator=cpu"):
        Trainer(accelerator="gpu", devices=1, logger=False)
