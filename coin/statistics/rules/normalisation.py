"""The rules for batch_norm in eval mode, layer_norm and group_norm."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from coin.statistics.rules.call import Call, Site


class NormalisationCall(Call):
    """y = x̂ · weight + bias with x̂ the normalised input: weight += Σ_nv (Σ_t g x̂)², bias += Σ_nv (Σ_t g)².

    x̂ comes from the input and the statistics, never from dividing the output by the weight, which may be zero.
    """

    weight: Tensor
    bias: Tensor | None

    @abstractmethod
    def normalised(self) -> Tensor:
        """Return x̂, of the input's shape."""

    @abstractmethod
    def grouped(self, x: Tensor, samples: int) -> Tensor:
        """Return x [..., B·k, …] as [..., B, affine entries, positions] with the leading V kept, if there is one."""

    @override
    def accumulate(self, g: Tensor, site: Site) -> None:
        cotangents = self.grouped(g, site.samples)  # [V, B, C, T]
        if (bias := site.total("bias")) is not None:
            sums = cotangents.sum(-1)
            bias.add_(torch.square(sums).sum((0, 1)).view(bias.shape))
        if (weight := site.total("weight")) is not None:
            normalised = self.grouped(self.normalised()[None].to(g.dtype), site.samples)[0]
            sums = (cotangents * normalised).sum(-1)  # quicker than a batched product of short vectors
            weight.add_(torch.square(sums).sum((0, 1)).view(weight.shape))


def _channels(x: Tensor, samples: int) -> Tensor:
    """Return x [V, B·k, C, …] as [V, B, C, k·T]."""
    split = x.reshape(len(x), samples, -1, x.shape[2], x[0, 0, 0].numel())
    return split.transpose(2, 3).flatten(3)


class BatchNormCall(NormalisationCall):
    """`torch.nn.functional.batch_norm` on running statistics."""

    def __init__(
        self, inputs: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> None:
        self.inputs, self.mean, self.variance = inputs, mean, variance
        self.weight, self.bias, self.eps = weight, bias, eps

    @override
    def output(self) -> Tensor:
        return F.batch_norm(self.inputs, self.mean, self.variance, self.weight, self.bias, False, 0.0, self.eps)

    @override
    def normalised(self) -> Tensor:
        shape = (-1, *(1 for _ in self.inputs.shape[2:]))
        return (self.inputs - self.mean.view(shape)) * torch.rsqrt(self.variance + self.eps).view(shape)

    @override
    def grouped(self, x: Tensor, samples: int) -> Tensor:
        return _channels(x, samples)

    @override
    def input_gradient(self, g: Tensor) -> Tensor:
        scale = self.weight * torch.rsqrt(self.variance + self.eps)
        return g * scale.view(-1, *(1 for _ in self.inputs.shape[2:]))


class LayerNormCall(NormalisationCall):
    """`torch.nn.functional.layer_norm` over the trailing dimensions `shape`."""

    def __init__(self, inputs: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self.inputs, self.shape, self.weight, self.bias, self.eps = inputs, shape, weight, bias, eps

    @override
    def output(self) -> Tensor:
        return F.layer_norm(self.inputs, self.shape, self.weight, self.bias, self.eps)

    @override
    def normalised(self) -> Tensor:
        return F.layer_norm(self.inputs, self.shape, None, None, self.eps)

    @override
    def grouped(self, x: Tensor, samples: int) -> Tensor:
        return x.reshape(len(x), samples, -1, self.weight.numel()).transpose(2, 3)

    @override
    def input_gradient(self, g: Tensor) -> Tensor:
        dims = tuple(range(-len(self.shape), 0))
        variance, mean = torch.var_mean(self.inputs, dims, correction=0, keepdim=True)
        scale = torch.rsqrt(variance + self.eps)
        normalised = (self.inputs - mean) * scale
        inner = g * self.weight
        along = (inner * normalised).mean(dims, keepdim=True)
        return (inner - inner.mean(dims, keepdim=True) - normalised * along) * scale


class GroupNormCall(NormalisationCall):
    """`torch.nn.functional.group_norm` of [N, C, …] in `groups` groups of channels."""

    def __init__(self, inputs: Tensor, groups: int, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self.inputs, self.groups, self.weight, self.bias, self.eps = inputs, groups, weight, bias, eps

    @override
    def output(self) -> Tensor:
        return F.group_norm(self.inputs, self.groups, self.weight, self.bias, self.eps)

    @override
    def normalised(self) -> Tensor:
        return F.group_norm(self.inputs, self.groups, None, None, self.eps)

    @override
    def grouped(self, x: Tensor, samples: int) -> Tensor:
        return _channels(x, samples)

    @override
    def input_gradient(self, g: Tensor) -> Tensor:
        n = len(self.inputs)
        inputs = self.inputs.reshape(n, self.groups, -1)
        variance, mean = torch.var_mean(inputs, -1, correction=0, keepdim=True)
        scale = torch.rsqrt(variance + self.eps)
        normalised = (inputs - mean) * scale
        weighted = g * self.weight.view(-1, *(1 for _ in self.inputs.shape[2:]))
        inner = weighted.reshape(len(g), n, self.groups, -1)
        along = (inner * normalised).mean(-1, keepdim=True)
        return ((inner - inner.mean(-1, keepdim=True) - normalised * along) * scale).reshape(g.shape)
