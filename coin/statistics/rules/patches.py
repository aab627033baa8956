"""The geometry of a convolution: output positions, kernel taps and the input patches between them."""

from dataclasses import dataclass
from itertools import product
from math import prod

import torch.nn.functional as F
from torch import Tensor


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
