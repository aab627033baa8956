"""The rules for a parameter that is multiplied with, added to or expanded over activations."""

from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from coin.statistics.rules.call import Call, Site


class BroadcastCall(Call):
    """A parameter that meets x [N, …] by broadcasting, with size 1 or nothing along the samples.

    Its per-sample gradient is the sum over all dimensions that it was broadcast over, except the samples.
    """

    @abstractmethod
    def local(self, g: Tensor) -> Tensor:
        """Return the cotangents [V, N, …] of the broadcast parameter."""

    @override
    def accumulate(self, g: Tensor, site: Site) -> None:
        if (weight := site.total("weight")) is None:
            return
        local = self.local(g)
        inner = local.shape[2:]
        shape = tuple(weight.shape[1:]) if weight.ndim > len(inner) else tuple(weight.shape)
        shape = (1,) * (len(inner) - len(shape)) + shape
        over = [2, *(3 + d for d, size in enumerate(shape) if size == 1)]
        sums = local.reshape(len(g), site.samples, -1, *inner).sum(over)
        weight.add_(torch.square(sums).sum((0, 1)).reshape(weight.shape))


class ScaleCall(BroadcastCall):
    """y = x · weight."""

    def __init__(self, inputs: Tensor, weight: Tensor) -> None:
        self.inputs, self.weight, self.reads_input = inputs, weight, weight.requires_grad

    @override
    def local(self, g: Tensor) -> Tensor:
        return g * self.inputs

    @override
    def input_gradient(self, g: Tensor) -> Tensor:
        return g * self.weight


class ShiftCall(BroadcastCall):
    """y = x + weight; or the weight expanded over the samples (a class token), as if added to zeros of that shape."""

    reads_input = False

    def __init__(self, inputs: Tensor, weight: Tensor) -> None:
        self.inputs, self.weight = inputs, weight

    @override
    def local(self, g: Tensor) -> Tensor:
        return g

    @override
    def input_gradient(self, g: Tensor) -> Tensor:
        return g
