"""The rules for batch_norm in eval mode, layer_norm and group_norm."""

from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from coin.statistics.rules.call import Call, Site
from coin.statistics.sums import sum_type


class NormalisationCall(Call):
    """y = x̂ · weight + bias with x̂ the normalised input: weight += Σ_nv (Σ_t g x̂)², bias += Σ_nv (Σ_t g)².

    x̂ comes from the input and the statistics, never from dividing the output by the weight, which may be zero.

    Args:
        inputs: x, [N, C, …] if the weight is the channels', else [N, …, *weight.shape].
        weight: The weight.
        eps: Added to the variance.
        channels: Whether the weight is the channels'.
    """

    def __init__(self, inputs: Tensor, weight: Tensor, eps: float, *, channels: bool) -> None:
        self.inputs, self.weight, self.eps, self._channels = inputs, weight, eps, channels

    @abstractmethod
    def normalised(self) -> Tensor:
        """Return x̂, of the input's shape, in the type of sums."""

    @override
    def accumulate(self, g: Tensor, site: Site) -> None:
        cotangents = self._grouped(g, site.samples)
        if (bias := site.total("bias")) is not None:
            sums = cotangents.sum(-1)
            bias.add_(torch.square(sums).sum((0, 1)).view(bias.shape))
        if (weight := site.total("weight")) is not None:
            normalised = self._grouped(self.normalised()[None], site.samples)[0]
            sums = (cotangents * normalised).sum(-1)  # quicker than a batched product of short vectors
            weight.add_(torch.square(sums).sum((0, 1)).view(weight.shape))

    def _grouped(self, x: Tensor, samples: int) -> Tensor:
        """Return x [V, B·k, …] as [V, B, entries of the weight, positions]."""
        if not self._channels:
            return x.reshape(len(x), samples, -1, self.weight.numel()).transpose(2, 3)
        split = x.reshape(len(x), samples, -1, x.shape[2], x[0, 0, 0].numel())
        return split.transpose(2, 3).flatten(3)

    def _affine(self, values: Tensor) -> Tensor:
        """Return values of the weight's shape so that they broadcast with the input."""
        return values.view(-1, *(1 for _ in self.inputs.shape[2:])) if self._channels else values


class BatchNormCall(NormalisationCall):
    """`torch.nn.functional.batch_norm` on running statistics."""

    def __init__(self, inputs: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, eps: float) -> None:
        super().__init__(inputs, weight, eps, channels=True)
        self._mean, self._scale = mean, torch.rsqrt(variance + eps)

    @override
    def normalised(self) -> Tensor:
        return ((self.inputs - self._affine(self._mean)) * self._affine(self._scale)).to(sum_type(self.inputs))

    @override
    def input_gradient(self, g: Tensor) -> Tensor:
        return g * self._affine(self.weight * self._scale)


class SliceNormCall(NormalisationCall):
    """`torch.nn.functional.layer_norm` and `group_norm`: every slice by its own mean and variance.

    `slices` is the input's shape with what belongs to a slice as its last dimension, [N, …, M].
    """

    def __init__(self, inputs: Tensor, weight: Tensor, eps: float, slices: tuple[int, ...], *, channels: bool) -> None:
        super().__init__(inputs, weight, eps, channels=channels)
        self._slices = slices

    @override
    def normalised(self) -> Tensor:
        return self._parts(self.inputs.to(sum_type(self.inputs)))[0].view(self.inputs.shape)

    def _parts(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return x̂ and what it was scaled with, in slices."""
        x = inputs.reshape(self._slices)
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        scale = torch.rsqrt(variance + self.eps)
        return (x - mean) * scale, scale

    @override
    def input_gradient(self, g: Tensor) -> Tensor:
        normalised, scale = self._parts(self.inputs)
        inner = (g * self._affine(self.weight)).reshape(len(g), *self._slices)
        along = (inner * normalised).mean(-1, keepdim=True)
        return ((inner - inner.mean(-1, keepdim=True) - normalised * along) * scale).reshape(g.shape)
