"""The rule for `torch.conv1d`, `conv2d` and `conv3d`: grouped, dilated, strided, padded."""

from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from coin.statistics.rules.linear import LinearCall, add_gram, at_once, position_pairs

_FEW = 32  # positions of a sample below which a depthwise convolution is quicker tap by tap, as measured on a CPU


@dataclass(frozen=True)
class Geometry:
    """A convolution's options, by spatial dimension; `padding` is the number of zeros on either side."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def options(self) -> tuple[Any, ...]:
        """The arguments of torch's general convolution that follow its tensors."""
        transposed = False
        output_padding = [0] * len(self.kernel)
        return (self.stride, self.padding, self.dilation, transposed, output_padding, self.groups)

    def patches(self, x: Tensor) -> Tensor:
        """Return the input patches [B, *output, *kernel, C] of x [B, C, *size] as an overlapping view of a copy."""
        sides = []
        for padding in reversed(self.padding):
            sides += [padding, padding]
        padded = F.pad(x, sides)
        patches = padded.movedim(1, -1).contiguous()  # [B, *size, C]
        for dim, stride in enumerate(self.stride):
            dilation = self.dilation[dim]
            reach = dilation * (self.kernel[dim] - 1) + 1
            patches = patches.unfold(1 + dim, reach, stride)[..., ::dilation]
        return patches.movedim(1 + len(self.kernel), -1)


Tap = tuple[Tensor, Tensor]
"""One place of a kernel: the output's places, counted row by row, at which it meets an image, and the image's there."""


@lru_cache(maxsize=256)
def taps_of(
    geometry: Geometry, size: tuple[int, ...], device: torch.device
) -> tuple[int, list[Tap]]:
    """Return the number of the output's places for images of a size, and the taps of the kernel."""
    count = prod(size)
    numbers = torch.arange(1, count + 1, device=device)
    image = numbers.view(1, 1, *size)
    (patches,) = geometry.patches(image)  # [*output, *kernel, 1], 0 where a tap meets the padding
    by_place = patches.flatten(0, len(size) - 1)
    by_tap = by_place.flatten(1).T  # [taps, places]
    taps = []
    for met in by_tap:
        places = met.nonzero().flatten()
        taps.append((places, met[places] - 1))
    return by_tap.shape[1], taps


@dataclass(eq=False)
class ConvolutionCall(LinearCall):
    """y = x ⋆ W + b for x [N, C, *size], W [O, C/G, *kernel]: a linear map of the patch of x at every output position.

    By the direct rule patches are unfolded, a sample at a time. By the Gram rule a patch's entries are taken tap by tap
    (a tap is one place of the kernel): for one tap the a_t are the rows [C] of the image itself that the tap meets, and
    positions at which it meets the padding have no part. So there is one product for each tap, and nothing is unfolded.

    The weight's accumulator is a view [G, O/G, taps · C/G] of memory with the channels last.
    """

    geometry: Geometry = field(kw_only=True)
    many_rows: ClassVar[bool] = False

    @property
    def size(self) -> tuple[int, ...]:
        """The spatial size of the input."""
        return tuple(self.inputs.shape[2:])

    @property
    def taps(self) -> tuple[int, list[Tap]]:
        """What `taps_of` returns for the input."""
        return taps_of(self.geometry, self.size, self.inputs.device)

    @override
    def input_gradient(self, g: Tensor, weight: Tensor) -> Tensor:
        folded = g.flatten(0, 1)  # [V·N, O, *output]
        x = self.inputs
        order = torch.contiguous_format
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            order = torch.channels_last
        shape = (len(folded), *x.shape[1:])
        gradient = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=order)
        # One product for each: several times faster than the library's kernel.
        if self._taps_are_apart(folded):
            rows = folded.flatten(2).mT  # [V·N, positions, O]
            by_place = gradient.zero_().flatten(2).mT  # [V·N, places, C], a view
            by_tap = weight.flatten(2)  # [O, C, taps]
            _, taps = self.taps
            for tap, (places, met) in enumerate(taps):
                reached = rows[:, places]
                by_place[:, met] = reached @ by_tap[..., tap]
        else:
            gradient, _, _ = torch.ops.aten.convolution_backward(
                folded.contiguous(memory_format=order),
                gradient,  # of which the shape and the order count
                weight,
                None,
                *self.geometry.options,
                [True, False, False],
            )
        return gradient.view(*g.shape[:2], *gradient.shape[1:])

    def _taps_are_apart(self, g: Tensor) -> bool:
        """Say whether no two taps of one group meet the same place, and the library is slow, for g [N, O, *output]."""
        geometry = self.geometry
        if geometry.groups > 1:
            return False
        is_pointwise = prod(geometry.kernel) == 1 and not any(geometry.padding)
        is_strided = max(geometry.stride) > 1
        positions = g[0, 0].numel()
        return positions == 1 or (is_pointwise and is_strided)

    @override
    def output(self, inputs: Tensor, weight: Tensor) -> Tensor:
        return torch.convolution(inputs, weight, self.bias, *self.geometry.options)

    @override
    def along(self, values: Tensor, output: Tensor) -> Tensor:
        ones = [1] * (output.ndim - 2)
        return values.reshape(-1, *ones)

    @override
    def positions(self, g: Tensor, samples: int) -> Tensor:
        outputs = g.shape[2]
        outputs_last = g.movedim(2, -1)
        # A sample's rows are further positions.
        return outputs_last.reshape(len(g), samples, -1, outputs)

    @override
    def patches(self, rows: Tensor) -> Tensor:
        dims = len(self.geometry.kernel)
        patches = self.geometry.patches(rows)  # [k, *output, *kernel, C]
        places_and_taps = patches.shape[:-1]
        by_group = patches.view(*places_and_taps, self.geometry.groups, -1)
        columns = by_group.movedim(-2, 0).flatten(2 + dims)  # [G, k, *output, taps · C/G]
        return columns.flatten(1, 1 + dims)

    @override
    def matrices(self, total: Tensor) -> Tensor:
        columns = total[0].numel()
        channels_last = total.movedim(1, -1)
        return channels_last.view(self.geometry.groups, -1, columns)

    @override
    def add_pairs(self, pairs: Tensor, total: Tensor) -> None:
        rows = self.inputs.flatten(2).mT.to(total.dtype)  # [B, places of the image, C]
        groups, outputs, _ = total.shape
        count, taps = self.taps
        by_tap = total.view(groups, outputs, len(taps), -1)
        for tap, (places, met) in enumerate(taps):
            met_pairs = pairs
            if len(places) < count:
                numbers = _numbers_of_pairs(places, count)
                met_pairs = pairs.index_select(1, numbers)
            own_total = by_tap[:, :, tap]
            add_gram(own_total, met_pairs, rows[:, met])


def _numbers_of_pairs(places: Tensor, every: int) -> Tensor:
    """Return the numbers of the pairs t ≤ t' of some places among the pairs of every place, in `position_pairs`."""
    count = len(places)
    first, second, _ = position_pairs(count, places.device)
    t = places[first]
    before = t * (2 * every - 1 - t) // 2  # pairs that come before those of t, less t
    return before + places[second]


@dataclass(eq=False)
class DepthwiseCall(ConvolutionCall):
    """A convolution of each channel by itself, W [C, 1, *kernel]: one product a channel and sample, or a tap."""

    @override
    def add_weight(self, g: Tensor, weight: Tensor) -> None:
        _, samples, positions, _ = g.shape
        k = len(self.inputs) // samples
        total = self.matrices(weight)[:, 0]  # [C, taps]
        if k == 1 and positions < _FEW:
            self._add_by_tap(g.contiguous(), total)
        else:
            self._add_by_sample(g, total, k)

    def _add_by_tap(self, g: Tensor, total: Tensor) -> None:
        """Add the squares for cotangents [V, B, T, C] to a total [C, taps]."""
        by_place = self.inputs.flatten(2).mT  # [B, places, C]
        inputs = by_place.to(g.dtype).contiguous()
        _, taps = self.taps
        for tap, (places, met) in enumerate(taps):
            products = g.index_select(2, places) * inputs.index_select(1, met)
            gradients = products.sum(2)  # [V, B, C]
            total[:, tap] += gradients.square_().sum((0, 1))

    def _add_by_sample(self, g: Tensor, total: Tensor, k: int) -> None:
        """Add the squares for cotangents [V, B, T, C] of k rows a sample to a total [C, taps]."""
        channels, taps = total.shape
        dims = len(self.size)
        output_dims = range(1, 1 + dims)
        other_dims = range(1 + dims, 2 + 2 * dims)
        of_a_sample = g[0, 0]
        step = at_once(g.device, of_a_sample.numel())
        by_sample = torch.split(self.inputs.to(g.dtype), k)
        for n, maps in enumerate(by_sample):
            by_channel = maps.transpose(0, 1)
            patches = self.geometry.patches(by_channel)  # [C, *output, *kernel, k]
            output_last = patches.permute(0, *other_dims, *output_dims)
            shifted = output_last.reshape(channels, taps, -1)  # [C, taps, positions]
            for block in torch.split(g[:, n], step):
                channel_first = block.reshape(-1, channels).t().contiguous()
                cotangents = channel_first.view(channels, len(block), -1)
                gradients = torch.bmm(cotangents, shifted.mT)  # [C, v, taps]
                squares = gradients.square_()
                total.add_(squares.sum(1))
