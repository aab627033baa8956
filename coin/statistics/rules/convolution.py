"""The rule for `torch.conv1d`, `conv2d` and `conv3d`: grouped, dilated, strided, padded."""

from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from coin.statistics.rules.linear import LinearCall, add_gram, block_of, position_pairs

_FEW = 32  # positions of a sample below which a depthwise convolution is quicker tap by tap, as measured on a CPU


@dataclass(frozen=True)
class Geometry:
    """A convolution's options, by spatial dimension; `padding` is the number of zeros on either side."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial size of the output for an input of this size."""
        options = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in options)

    def patches(self, x: Tensor) -> Tensor:
        """Return the input patches [B, *output, *kernel, C] of x [B, C, *size] as an overlapping view of a copy."""
        rows = F.pad(x, [side for p in reversed(self.padding) for side in (p, p)]).movedim(1, -1).contiguous()
        outer, *inner, last = rows.stride()
        steps = [distance * s for distance, s in zip(inner, self.stride, strict=True)]
        taps = [distance * d for distance, d in zip(inner, self.dilation, strict=True)]
        shape = (len(x), *self.output_size(tuple(x.shape[2:])), *self.kernel, x.shape[1])
        return rows.as_strided(shape, (outer, *steps, *taps, last))

    def met(self, places: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return where in an image (row by row) taps are at output places [...]: [..., taps]; whether they meet it."""
        taps = torch.unravel_index(torch.arange(prod(self.kernel), device=places.device), self.kernel)
        rows = torch.unravel_index(places, self.output_size(size))
        met, inside = torch.zeros_like(places)[..., None], torch.ones_like(places)[..., None] > 0
        options = zip(rows, taps, size, self.stride, self.dilation, self.padding, strict=True)
        for row, tap, n, s, d, p in options:
            at = row[..., None] * s + tap * d - p
            inside = inside & (at >= 0) & (at < n)
            met = met * n + at.clamp(0, n - 1)
        return met, inside


@lru_cache(maxsize=256)
def taps_of(geometry: Geometry, size: tuple[int, ...], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return by tap the output's places, row by row, at which it meets an image, and the image's that it meets."""
    places = torch.arange(prod(geometry.output_size(size)), device=device)
    taps = zip(*(each.T for each in geometry.met(places, size)), strict=True)
    return [(places[inside], met[inside]) for met, inside in taps]


@dataclass(eq=False)
class ConvolutionCall(LinearCall):
    """y = x ⋆ W + b for x [N, C, *size], W [O, C/G, *kernel].

    The Gram rule takes one product per kernel tap, over the positions where that tap meets the image. The weight's
    accumulator is a view [G, O/G, taps · C/G] of memory with the channels last.
    """

    geometry: Geometry = field(kw_only=True)
    many_rows: ClassVar[bool] = False

    @override
    def input_gradient(self, g: Tensor, weight: Tensor) -> Tensor:
        geometry, size, folded = self.geometry, tuple(self.inputs.shape[2:]), g.flatten(0, 1)
        last = self.inputs.ndim == 4 and self.inputs.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if last else torch.contiguous_format
        shape = (len(folded), *self.inputs.shape[1:])
        gradient = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=order)
        pointwise = prod(geometry.kernel) == 1 and not any(geometry.padding)
        one_position = prod(geometry.output_size(size)) == 1
        if geometry.groups == 1 and (one_position or (pointwise and max(geometry.stride) > 1)):
            # One product for each tap, as no two meet: several times faster than the library's kernel.
            rows, by_place = folded.flatten(2).mT, gradient.zero_().flatten(2).mT
            for tap, (places, met) in enumerate(taps_of(geometry, size, g.device)):
                by_place[:, met] = rows[:, places] @ weight.flatten(2)[..., tap]
        else:
            folded = folded.contiguous(memory_format=order)
            gradient = torch.ops.aten.convolution_backward(
                folded, gradient, weight, None, geometry.stride, geometry.padding, geometry.dilation, False,
                [0] * len(size), geometry.groups, [True, False, False],
            )[0]  # fmt: skip
        return gradient.view(*g.shape[:2], *gradient.shape[1:])

    @override
    def output(self, inputs: Tensor, weight: Tensor) -> Tensor:
        geometry = self.geometry
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(geometry.kernel) - 1]
        options = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        made: Tensor = convolve(inputs, weight, self.bias, *options)
        return made

    @override
    def along(self, values: Tensor, output: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (output.ndim - 2))

    @override
    def positions(self, g: Tensor, samples: int) -> Tensor:
        return g.movedim(2, -1).reshape(len(g), samples, -1, g.shape[2])  # a sample's rows are further positions

    @override
    def patches(self, rows: Tensor) -> Tensor:
        dims, groups = len(self.geometry.kernel), self.geometry.groups
        patches = self.geometry.patches(rows)  # [k, *output, *kernel, C]
        grouped = patches.view(*patches.shape[:-1], groups, -1).movedim(-2, 0)
        return grouped.flatten(2 + dims).flatten(1, 1 + dims)

    @override
    def matrices(self, total: Tensor) -> Tensor:
        return total.movedim(1, -1).view(self.geometry.groups, -1, total[0].numel())

    @override
    def add_pairs(self, pairs: Tensor, total: Tensor) -> None:
        size, rows = tuple(self.inputs.shape[2:]), self.inputs.flatten(2).mT.to(total.dtype)
        count = prod(self.geometry.output_size(size))
        by_tap = total.view(*total.shape[:2], prod(self.geometry.kernel), -1)
        for tap, (places, met) in enumerate(taps_of(self.geometry, size, total.device)):
            met_pairs = pairs
            if len(places) < count:
                first, second = (places[at] for at in position_pairs(len(places), total.device)[:2])
                met_pairs = pairs.index_select(1, first * (2 * count - 1 - first) // 2 + second)
            add_gram(by_tap[:, :, tap], met_pairs, rows[:, met])


@dataclass(eq=False)
class DepthwiseCall(ConvolutionCall):
    """A convolution of each channel by itself, W [C, 1, *kernel]: one product a channel and sample, or a tap."""

    @override
    def add_weight(self, g: Tensor, rows: Tensor, weight: Tensor) -> None:
        channels, by_channel, dims = len(weight), self.matrices(weight)[:, 0], weight.ndim - 2
        if rows.shape[2] < _FEW and len(self.inputs) == rows.shape[1]:
            rows, inputs = rows.contiguous(), self.inputs.flatten(2).mT.to(g.dtype).contiguous()
            for tap, (places, met) in enumerate(taps_of(self.geometry, tuple(self.inputs.shape[2:]), g.device)):
                sums = (rows.index_select(2, places) * inputs.index_select(1, met)).sum(2)
                by_channel[:, tap] += sums.square_().sum((0, 1))
            return
        order = 0, *range(1 + dims, 2 + 2 * dims), *range(1, 1 + dims)
        for n, maps in enumerate(torch.split(self.inputs.to(g.dtype), g.shape[1] // rows.shape[1])):
            patches = self.geometry.patches(maps.transpose(0, 1)).permute(order)  # [C, *kernel, k, *output]
            shifted = patches.reshape(channels, weight[0].numel(), -1)
            for block in torch.split(rows[:, n], max(1, block_of(g.device) // rows[0, n].numel())):
                cotangents = block.reshape(-1, channels).t().contiguous().view(channels, len(block), -1)
                by_channel.add_(torch.bmm(cotangents, shifted.mT).square_().sum(1))
