"""The rule for `torch.conv1d`, `conv2d` and `conv3d`: grouped, dilated, strided, padded."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from coin.statistics.rules.call import Call, Site, squared_sums
from coin.statistics.rules.positions import add_direct, add_gram, contract_pairs, position_pairs, prefers_gram
from coin.statistics.sums import sum_type


@dataclass(frozen=True)
class Geometry:
    """A convolution's options in D spatial dimensions.

    Attributes:
        kernel: Kernel sizes.
        stride: Strides.
        padding: Zeros on either side.
        dilation: Dilations.
        groups: G.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial size of the output for an input of spatial size `size`."""
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )

    def patches(self, x: Tensor) -> Tensor:
        """Return the input patches [B, *output, *kernel, C] of x [B, C, *size] as an overlapping view of a copy."""
        dims = len(self.kernel)
        output = self.output_size(tuple(x.shape[2:]))
        padding = [side for p in reversed(self.padding) for side in (p, p)]
        rows = F.pad(x, padding).movedim(1, -1).contiguous()
        strides = rows.stride()
        steps = [strides[1 + i] * self.stride[i] for i in range(dims)]
        taps = [strides[1 + i] * self.dilation[i] for i in range(dims)]
        shape = (len(x), *output, *self.kernel, x.shape[1])
        return rows.as_strided(shape, (strides[0], *steps, *taps, strides[-1]))

    def taps(self, size: tuple[int, ...]) -> list[tuple[int, tuple[slice, ...], tuple[slice, ...]]]:
        """Return, for every kernel tap that meets the image, its flat index and where it does.

        Returns:
            (index into the flattened kernel, slices of the output positions, slices of the input positions) for an
            input of spatial size `size`; taps that only ever meet padding are left out.
        """
        output = self.output_size(size)
        axes = []
        for n, out, k, s, p, d in zip(size, output, self.kernel, self.stride, self.padding, self.dilation, strict=True):
            axis = []
            for tap in range(k):
                offset = tap * d - p
                low = max(0, -(offset // s))  # the first output position with position·s + offset ≥ 0
                high = min(out, (n - 1 - offset) // s + 1)
                if low < high:
                    start = low * s + offset
                    axis.append((tap, slice(low, high), slice(start, start + (high - low - 1) * s + 1, s)))
            axes.append(axis)
        found = []
        for combination in product(*axes):
            index = 0
            for (tap, _, _), k in zip(combination, self.kernel, strict=True):
                index = index * k + tap
            found.append((index, tuple(c[1] for c in combination), tuple(c[2] for c in combination)))
        return found

    @property
    def number_of_taps(self) -> int:
        """Return the product of the kernel sizes."""
        return prod(self.kernel)


class ConvolutionCall(Call):
    """y = x ⋆ W + b for x [B, C, *size], W [O, C/G, *kernel].

    Few output positions: the Gram rule, one product per kernel tap over the positions where that tap meets the image.
    Many, or several rows a sample: the direct rule over unfolded patches. The weight's accumulator is written as
    [G, O/G, taps, C/G], which is a view of memory laid out with the channels last.

    Where padding is uneven, `inputs` is padded to make it even; `size` is the spatial size without that.
    """

    def __init__(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, size: tuple[int, ...]
    ) -> None:
        self.inputs, self.weight, self.bias, self.geometry = inputs, weight, bias, geometry
        self._size, self.reads_input = size, weight.requires_grad
        self._pairs: Tensor | None = None

    @override
    def input_gradient(self, g: Tensor) -> Tensor:
        geometry, size = self.geometry, tuple(self.inputs.shape[2:])
        folded, dims = g.flatten(0, 1), len(size)
        pointwise = geometry.number_of_taps == 1 and not any(geometry.padding)
        if geometry.groups == 1 and prod(geometry.output_size(size)) == 1:
            gradient = self._from_one_position(folded)
        elif pointwise and max(geometry.stride) > 1:
            # The library's strided pointwise kernel is several times slower than the plain one on the sampled grid.
            gradient = folded.new_zeros(len(folded), *self.inputs.shape[1:])
            grid = (slice(None), slice(None), *(slice(None, None, s) for s in geometry.stride))
            gradient[grid] = self._transposed(folded, tuple(folded.shape[2:]), (1,) * dims)
        else:
            gradient = self._transposed(folded, size, geometry.stride)
        if self._size != size:
            gradient = gradient[(slice(None), slice(None), *(slice(n) for n in self._size))]
        return gradient.reshape(*g.shape[:2], *gradient.shape[1:])

    def _transposed(self, g: Tensor, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        """Return the input's gradient [N, C, *size] by the library's kernel."""
        geometry = self.geometry
        like = g.new_empty(1).expand(len(g), self.inputs.shape[1], *size)  # the kernel reads the input's shape alone
        gradient: Tensor = torch.ops.aten.convolution_backward(
            g, like, self.weight, None, stride, geometry.padding, geometry.dilation, False,
            [0] * len(size), geometry.groups, [True, False, False],
        )[0]  # fmt: skip
        return gradient

    def _from_one_position(self, g: Tensor) -> Tensor:
        """Return the input's gradient [N, C, *size] for a single output position: only the taps that meet the image."""
        channels, size = self.inputs.shape[1], tuple(self.inputs.shape[2:])
        grid = torch.arange(prod(size), device=g.device).view(size)
        met = [(index, int(grid[inputs])) for index, _, inputs in self.geometry.taps(size)]
        taps, places = [index for index, _ in met], [place for _, place in met]
        weight = self.weight.flatten(2)[..., taps].flatten(1)
        values = (g.flatten(1) @ weight).view(len(g), channels, len(taps))
        if places == list(range(prod(size))):
            return values.view(len(g), channels, *size)
        gradient = g.new_zeros(len(g), channels, prod(size))
        gradient[..., places] = values
        return gradient.view(len(g), channels, *size)

    @override
    def accumulate(self, g: Tensor, site: Site) -> None:
        if (bias := site.total("bias")) is not None:
            bias.add_(squared_sums(g, site.samples, 2))
        if (weight := site.total("weight")) is None:
            return
        k = g.shape[1] // site.samples
        columns = g.flatten(3)  # [V, B·k, O, T]
        if k == 1 and prefers_gram(columns.shape[3], len(g)):
            pairs = contract_pairs(columns.transpose(2, 3))
            self._pairs = pairs if self._pairs is None else self._pairs.add_(pairs)
        else:
            if k > 1:  # a sample's rows are further positions
                columns = columns.reshape(len(g), site.samples, k, *columns.shape[2:])
                columns = columns.transpose(2, 3).flatten(3)  # [V, B, O, k·T]
            add_direct(self._accumulator(weight).flatten(2), columns, lambda n: self._patches(n, k))

    @override
    def finish(self, site: Site) -> None:
        if self._pairs is None:
            return
        total = self._accumulator(site.totals[site.names["weight"]])
        size = tuple(self.inputs.shape[2:])
        output = self.geometry.output_size(size)
        grid = torch.arange(prod(output), device=self.inputs.device).view(output)
        lookup = _pair_lookup(prod(output), self.inputs.device)
        rows = self.inputs.movedim(1, -1).to(total.dtype).contiguous()
        for index, outputs, inputs in self.geometry.taps(size):
            a = rows[(slice(None), *inputs)].flatten(1, -2)
            met = grid[outputs].flatten()
            pairs = self._pairs
            if len(met) < grid.numel():
                first, second, _ = position_pairs(len(met), met.device)
                pairs = pairs.index_select(1, lookup[met[first], met[second]])
            add_gram(total[:, :, index], pairs, a)

    def _patches(self, sample: int, k: int) -> Tensor:
        """Return the unfolded inputs of one sample of k rows as [G, k·T, taps·C/G]."""
        rows = self.inputs[sample * k : (sample + 1) * k]
        patches = self.geometry.patches(rows.to(sum_type(rows)))  # [k, *output, *kernel, C]
        dims, groups = len(self.geometry.kernel), self.geometry.groups
        grouped = patches.reshape(*patches.shape[:-1], groups, -1).movedim(-2, 0)
        flat: Tensor = grouped.flatten(2 + dims).flatten(1, 1 + dims)
        return flat

    def _accumulator(self, total: Tensor) -> Tensor:
        """Return the view [G, O/G, taps, C/G] of the weight's accumulator [O, C/G, *kernel]."""
        groups, taps = self.geometry.groups, self.geometry.number_of_taps
        return total.movedim(1, -1).view(groups, total.shape[0] // groups, taps, total.shape[1])


@lru_cache(maxsize=64)
def _pair_lookup(positions: int, device: torch.device) -> Tensor:
    """Return [T, T]: the place of the pair (t, t'), t ≤ t', in the order of `position_pairs`."""
    first, second, _ = position_pairs(positions, device)
    lookup = torch.zeros(positions, positions, dtype=torch.long, device=device)
    lookup[first, second] = torch.arange(len(first), device=device)
    return lookup
