"""Running out of memory is no property of a network: it keeps its own error."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coin.core.memory import is_out_of_memory
from coin.merging.units import affine_units
from coin.networks.sources import Own
from coin.statistics import fisher_diagonal

ERRORS = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
    ),
}


def network_that_raises(error: RuntimeError) -> nn.Module:
    """Return a network of images whose first backward pass raises an error, and no other."""
    raised = []

    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            if not raised:
                raised.append(error)
                raise error
            return gradient

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Raises.apply(x)

    return nn.Sequential(nn.Conv2d(3, 4, 3), Layer(), nn.Flatten(), nn.Linear(16, 2))


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_passes_and_constructors_hand_it_on(error: RuntimeError) -> None:
    assert is_out_of_memory(error)
    images = torch.randn(3, 3, 4, 4)
    with pytest.raises(RuntimeError, match="memory") as raised:
        fisher_diagonal(network_that_raises(error), [images])
    assert raised.value is error
    with pytest.raises(RuntimeError, match="memory") as raised:
        affine_units(network_that_raises(error), images)
    assert raised.value is error

    def build() -> nn.Module:
        raise error

    with pytest.raises(RuntimeError, match="memory") as raised:
        Own("small_resnet", 16, None, {}).construct(build)
    assert raised.value is error
