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
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


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
        found = []
        for n, k, s, p, d in zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True):
            reach = d * (k - 1) + 1
            found.append((n + 2 * p - reach) // s + 1)
        return tuple(found)

    def patches(self, x: Tensor) -> Tensor:
        """Return the input patches [B, *output, *kernel, C] of x [B, C, *size] as an overlapping view of a copy."""
        sides = [side for p in reversed(self.padding) for side in (p, p)]
        rows = F.pad(x, sides).movedim(1, -1).contiguous()  # [B, *size, C]
        outer, *inner, last = rows.stride()
        steps = [distance * s for distance, s in zip(inner, self.stride, strict=True)]
        taps = [distance * d for distance, d in zip(inner, self.dilation, strict=True)]
        output = self.output_size(tuple(x.shape[2:]))
        shape = (len(x), *output, *self.kernel, x.shape[1])
        return rows.as_strided(shape, (outer, *steps, *taps, last))

    def met(self, places: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return where in an image (row by row) taps are at output places [...]: [..., taps]; whether they meet it."""
        every_tap = torch.arange(prod(self.kernel), device=places.device)
        taps = torch.unravel_index(every_tap, self.kernel)
        rows = torch.unravel_index(places, self.output_size(size))
        met = torch.zeros_like(places)[..., None]
        inside = torch.ones_like(places, dtype=torch.bool)[..., None]
        for dim, n in enumerate(size):
            at = rows[dim][..., None] * self.stride[dim] + taps[dim] * self.dilation[dim] - self.padding[dim]
            inside = inside & (at >= 0) & (at < n)
            met = met * n + at.clamp(0, n - 1)
        return met, inside


@lru_cache(maxsize=256)
def taps_of(geometry: Geometry, size: tuple[int, ...], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return by tap the output's places, row by row, at which it meets an image, and the image's that it meets."""
    places = torch.arange(prod(geometry.output_size(size)), device=device)
    met, inside = geometry.met(places, size)
    found = []
    for tap in range(prod(geometry.kernel)):
        meets = inside[:, tap]
        found.append((places[meets], met[meets, tap]))
    return found


@dataclass(eq=False)
class ConvolutionCall(LinearCall):
    """y = x ⋆ W + b for x [N, C, *size], W [O, C/G, *kernel].

    The Gram rule takes one product per kernel tap, over the positions where that tap meets the image. The weight's
    accumulator is a view [G, O/G, taps · C/G] of memory with the channels last.
    """

    geometry: Geometry = field(kw_only=True)
    many_rows: ClassVar[bool] = False

    @property
    def size(self) -> tuple[int, ...]:
        """The spatial size of the input."""
        return tuple(self.inputs.shape[2:])

    @override
    def input_gradient(self, g: Tensor, weight: Tensor) -> Tensor:
        folded = g.flatten(0, 1)  # [V·N, O, *output]
        has_channels_last = self.inputs.ndim == 4 and self.inputs.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if has_channels_last else torch.contiguous_format
        shape = (len(folded), *self.inputs.shape[1:])
        gradient = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=order)
        if self._taps_are_apart():  # one product for each: several times faster than the library's kernel
            rows = folded.flatten(2).mT  # [V·N, positions, O]
            by_place = gradient.zero_().flatten(2).mT  # [V·N, places, C], a view
            for tap, (places, met) in enumerate(taps_of(self.geometry, self.size, g.device)):
                by_place[:, met] = rows[:, places] @ weight.flatten(2)[..., tap]
        else:
            gradient = self._library_gradient(folded.contiguous(memory_format=order), gradient, weight)
        return gradient.view(*g.shape[:2], *gradient.shape[1:])

    def _taps_are_apart(self) -> bool:
        """Say whether no two taps of one group meet the same place, and the library is slow."""
        geometry = self.geometry
        is_strided_pointwise = prod(geometry.kernel) == 1 and not any(geometry.padding) and max(geometry.stride) > 1
        has_one_position = prod(geometry.output_size(self.size)) == 1
        return geometry.groups == 1 and (has_one_position or is_strided_pointwise)

    def _library_gradient(self, g: Tensor, like: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the input, shaped `like` it, from torch's own kernel."""
        geometry = self.geometry
        gradient, _, _ = torch.ops.aten.convolution_backward(
            g,
            like,
            weight,
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            False,  # not transposed
            [0] * len(self.size),
            geometry.groups,
            [True, False, False],
        )
        return gradient  # type: ignore[no-any-return]

    @override
    def output(self, inputs: Tensor, weight: Tensor) -> Tensor:
        geometry = self.geometry
        convolve = _CONVOLUTIONS[len(geometry.kernel)]
        return convolve(
            inputs, weight, self.bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )

    @override
    def along(self, values: Tensor, output: Tensor) -> Tensor:
        ones = [1] * (output.ndim - 2)
        return values.reshape(-1, *ones)

    @override
    def positions(self, g: Tensor, samples: int) -> Tensor:
        return g.movedim(2, -1).reshape(len(g), samples, -1, g.shape[2])  # a sample's rows are further positions

    @override
    def patches(self, rows: Tensor) -> Tensor:
        dims = len(self.geometry.kernel)
        patches = self.geometry.patches(rows)  # [k, *output, *kernel, C]
        grouped = patches.view(*patches.shape[:-1], self.geometry.groups, -1).movedim(-2, 0)
        by_tap = grouped.flatten(2 + dims)  # [G, k, *output, taps · C/G]
        return by_tap.flatten(1, 1 + dims)

    @override
    def matrices(self, total: Tensor) -> Tensor:
        return total.movedim(1, -1).view(self.geometry.groups, -1, total[0].numel())

    @override
    def add_pairs(self, pairs: Tensor, total: Tensor) -> None:
        rows = self.inputs.flatten(2).mT.to(total.dtype)
        positions = prod(self.geometry.output_size(self.size))
        by_tap = total.view(*total.shape[:2], prod(self.geometry.kernel), -1)
        for tap, (places, met) in enumerate(taps_of(self.geometry, self.size, total.device)):
            met_pairs = pairs
            if len(places) < positions:
                first, second, _ = position_pairs(len(places), total.device)
                # The number of a pair t ≤ t' among those of all positions, row by row.
                t = places[first]
                number = t * (2 * positions - 1 - t) // 2 + places[second]
                met_pairs = pairs.index_select(1, number)
            add_gram(by_tap[:, :, tap], met_pairs, rows[:, met])


@dataclass(eq=False)
class DepthwiseCall(ConvolutionCall):
    """A convolution of each channel by itself, W [C, 1, *kernel]: one product a channel and sample, or a tap."""

    @override
    def add_weight(self, g: Tensor, rows: Tensor, weight: Tensor) -> None:
        total = self.matrices(weight)[:, 0]  # [C, taps]
        has_one_row = len(self.inputs) == rows.shape[1]
        if has_one_row and rows.shape[2] < _FEW:
            self._add_by_tap(rows.contiguous(), total)
        else:
            self._add_by_sample(rows, total, g.shape[1] // rows.shape[1])

    def _add_by_tap(self, rows: Tensor, total: Tensor) -> None:
        """Add the squares for cotangents [V, B, T, C] to a total [C, taps]."""
        inputs = self.inputs.flatten(2).mT.to(rows.dtype).contiguous()  # [B, places, C]
        for tap, (places, met) in enumerate(taps_of(self.geometry, self.size, rows.device)):
            products = rows.index_select(2, places) * inputs.index_select(1, met)
            total[:, tap] += products.sum(2).square_().sum((0, 1))

    def _add_by_sample(self, rows: Tensor, total: Tensor, k: int) -> None:
        """Add the squares for cotangents [V, B, T, C] of k rows a sample to a total [C, taps]."""
        channels, taps = total.shape
        dims = len(self.size)
        order = 0, *range(1 + dims, 2 + 2 * dims), *range(1, 1 + dims)
        step = max(1, block_of(rows.device) // rows[0, 0].numel())
        for n, maps in enumerate(torch.split(self.inputs.to(rows.dtype), k)):
            patches = self.geometry.patches(maps.transpose(0, 1)).permute(order)  # [C, *kernel, k, *output]
            shifted = patches.reshape(channels, taps, -1)
            for block in torch.split(rows[:, n], step):
                by_channel = block.reshape(-1, channels).t().contiguous()
                cotangents = by_channel.view(channels, len(block), -1)
                total.add_(torch.bmm(cotangents, shifted.mT).square_().sum(1))
