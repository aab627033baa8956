"""Running out of memory is no property of a network: it keeps its own error."""

import pytest
import torch
from torch import nn

from coin.core.memory import is_out_of_memory
from coin.merging.units import affine_units
from coin.networks.sources import Own
from coin.statistics import fisher_diagonal

ERRORS = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: out of memory"),
}
IMAGES = torch.randn(3, 3, 4, 4)


def network_that_raises(error):
    """Return a network of images whose first backward pass raises an error, and no other."""
    errors = [error]

    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            if errors:
                raise errors.pop()
            return gradient

    class Layer(nn.Module):
        def forward(self, x):
            return Raises.apply(x)

    return nn.Sequential(nn.Conv2d(3, 4, 3), Layer(), nn.Flatten(), nn.Linear(16, 2))


def construct(error):
    def build():
        raise error

    Own("small_resnet", 16, None, {}).construct(build)


USES = {
    "Fisher": lambda error: fisher_diagonal(network_that_raises(error), [IMAGES]),
    "units": lambda error: affine_units(network_that_raises(error), IMAGES),
    "constructor": construct,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", ERRORS)
def test_passes_and_constructors_hand_it_on(kind, use):
    error = ERRORS[kind]
    assert is_out_of_memory(error)
    with pytest.raises(RuntimeError, match="memory") as raised:
        USES[use](error)
    assert raised.value is error
