"""Matrices in few bits a value: as they are rounded, as bytes of a file, and as rows that a layer reads."""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coin.errors import NumericalError

_LARGEST = 127  # level of fewer than 8 bits

# The scales from which the search begins, as shares of the one at which a row's largest value has the largest level.
_CLIPS = (0.15, 0.25, 0.35, 0.5, 0.7, 1.0)
_REFINEMENTS = 2  # of a scale, for every clip
_RANGES = torch.linspace(0.4, 1, 7)  # of a factor's row that are searched, as shares of the whole
SMALLEST = 1e-38  # divides the rows of scale 0, which may take any level
# Of FBGEMM's rows of 8 and of 4 bits; in float32, of the CPU alone.
_read_bytes = torch.ops.quantized.embedding_bag_byte_unpack.default
_read_halves = torch.ops.quantized.embedding_bag_4bit_unpack.default
# Values, times the clips, that are searched at a time: they fit a processor's cache.
_BLOCK_VALUES = 2**18


class Rounded(NamedTuple):
    """A matrix in few bits a value: levels, each a whole number, times the scale of their row.

    In memory it is FBGEMM's rows, of any number of bits: K levels from −128 on, each in a byte, a float32 scale, and
    the float32 value of level −128. In a file a level takes `bits` bits (`packed`). Scales are bfloat16 numbers: a
    level has at most 8 bits and a bfloat16 has 8, so that their product in float32 is exact.
    """

    rows: Tensor  # [rows, K + 8], bytes
    bits: int

    @classmethod
    def of(cls, levels: Tensor, scale: Tensor, bits: int) -> "Rounded":
        """Return the matrix of levels ``[rows, K]`` and bfloat16 scales ``[rows]``."""
        wide = scale.float()
        first = -128 * wide
        ends = torch.stack([wide, first], dim=1)
        codes = levels.short() + 128
        rows = torch.cat([codes.byte(), ends.view(torch.uint8)], dim=1)
        return cls(rows, bits)

    @property
    def levels(self) -> Tensor:
        """The levels ``[rows, K]``, int8."""
        found = self.rows[:, :-8].short() - 128
        return found.to(torch.int8)

    @property
    def scale(self) -> Tensor:
        """The scales ``[rows]``, bfloat16."""
        scale, _ = _ends(self.rows, torch.float32)
        return scale.squeeze(1).bfloat16()

    @property
    def shape(self) -> tuple[int, int]:
        """The rows, and the columns K."""
        rows, length = self.rows.shape
        return rows, length - 8

    @property
    def nbytes(self) -> int:
        """Its bytes in a file."""
        return packed_nbytes(*self.shape, self.bits)

    def cpu(self) -> "Rounded":
        """Return it in the CPU's memory."""
        return Rounded(self.rows.cpu(), self.bits)

    def dense(self) -> Tensor:
        """Return the matrix ``[rows, K]`` in float32."""
        return read_rows(self.rows)

    def packed(self) -> Tensor:
        """Return the places of its levels among all that there are, as bytes ``[rows, ⌈b K / 8⌉]``.

        A place takes b bits; every row begins at a byte.
        """
        own = self.levels.cpu().int()
        known = levels(self.bits).int()
        codes = torch.searchsorted(known, own, out_int32=True)
        digits = np.unpackbits(codes.byte().numpy())
        digits = digits.reshape(-1, 8)[:, -self.bits :]
        by_row = digits.reshape(len(codes), -1)  # [rows, b K]
        return torch.from_numpy(np.packbits(by_row, axis=1))

    @classmethod
    def unpacked(cls, packed: Tensor, scale: Tensor, bits: int, columns: int) -> "Rounded":
        """Return what `packed` made bytes of."""
        rows = len(packed)
        by_row = np.unpackbits(packed.numpy(), axis=1, count=bits * columns)
        digits = torch.from_numpy(by_row).view(rows, columns, bits)
        codes = torch.zeros(rows, columns, dtype=torch.uint8)
        for digit in digits.unbind(2):
            codes.mul_(2).add_(digit)
        found = levels(bits).index_select(0, codes.int().flatten())
        return cls.of(found.view(rows, columns), scale, bits)


@cache
def levels(bits: int) -> Tensor:
    """Return the levels ``[2^b]`` of so many bits, int8, in ascending order.

    They lie dense around zero, as deltas do, whose tails are heavy: L_i ∝ −sign(u) log(1 − 1.6 |u|), u = (i + ½)/2^b −
    ½, rounded to whole numbers up to 127. At 3 bits that leaves half to three quarters of the squared error of even
    ones. Of one bit they are ±127, as in BitDelta (arXiv 2402.10193); of 8 bits all from −128. Fewer than 8 have no 0:
    a row with one value some fifty times as large as the others' deviation wants 8.
    """
    count = 2**bits
    if bits == 8:
        return torch.arange(-128, 128).to(torch.int8)
    places = torch.arange(count, dtype=torch.float64)
    u = (places + 0.5) / count - 0.5
    curve = -u.sign() * torch.log1p(-1.6 * u.abs())
    dense: Tensor = curve / curve[-1] * _LARGEST
    return dense.round().to(torch.int8)


def nearest(ratio: Tensor, bits: int) -> Tensor:
    """Return as floats the levels nearest to values over their scales, in float32; the larger one of two.

    Levels are whole numbers, so that the middle between two of them is a multiple of ½: between two such multiples all
    values have the same nearest level, and a table has it.
    """
    half_steps = ratio.mul(2).floor_().clamp_(-256, 255)
    places = half_steps.add_(256).int()
    table = _table(bits, ratio.device)
    return table.index_select(0, places.flatten()).view(ratio.shape)


@cache
def _table(bits: int, device: torch.device) -> Tensor:
    """Return the level nearest to the values from h/2 up to (h + 1)/2, for h = −256 … 255."""
    half_steps = torch.arange(-256, 256, dtype=torch.float64)
    inside = (half_steps + 0.5) / 2
    ascending = levels(bits).double()
    distance = (inside.unsqueeze(1) - ascending).abs()
    nearest = ascending[distance.argmin(1)]
    return nearest.float().to(device)


def quantise(matrix: Tensor, bits: int) -> Rounded:
    """Round a matrix ``[rows, K]`` to 1 … 8 bits a value, each row with the scale of the smallest squared error.

    From several clips of a row, so that few large values do not make the scale too large for all others, the scale is
    improved in turns with the levels: for given levels L it is ⟨row, L⟩ / ⟨L, L⟩. Sums are in float64, lest a base's
    hash shows their order, which processors choose.
    """
    found = []
    scales = []
    values_of_row = len(_CLIPS) * max(1, matrix.shape[1])
    rows = max(1, _BLOCK_VALUES // values_of_row)
    for block in torch.split(matrix.float(), rows):
        scale = _best_scale(block, bits)
        taken = _levels_of(block, scale, bits)
        scales.append(scale)
        found.append(taken.to(torch.int8))
    return Rounded.of(torch.cat(found), torch.cat(scales), bits)


def _levels_of(matrix: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the levels nearest to a matrix ``[…, K]`` over its scales ``[…]``, as floats."""
    divisor = scale.float().clamp(min=SMALLEST).unsqueeze(-1)
    return nearest(matrix / divisor, bits)


def _best_scale(matrix: Tensor, bits: int) -> Tensor:
    """Return the scales ``[rows]`` of a matrix's smallest squared errors, in bfloat16."""
    largest = matrix.abs().amax(1, keepdim=True)
    largest_level = float(levels(bits)[-1])
    clips = torch.tensor(_CLIPS, device=matrix.device) / largest_level
    scale = largest * clips  # [rows, clips]
    values = matrix.unsqueeze(1)
    for _ in range(_REFINEMENTS):
        products, squares = _sums(values, scale, bits)
        scale = (products / squares.clamp(min=SMALLEST)).float()
    scale = scale.bfloat16()
    products, squares = _sums(values, scale, bits)
    errors = scale * (scale * squares - 2 * products)  # less the row's squares
    best = errors.nan_to_num(torch.inf).argmin(1, keepdim=True)  # the first of equals
    return scale.gather(1, best).squeeze(1)


def _sums(values: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return ⟨row, L⟩ and ⟨L, L⟩ [rows, S], with L the levels nearest to values [rows, 1, K] over scales [rows, S]."""
    taken = _levels_of(values, scale, bits)  # [rows, S, K]
    products = (values * taken).sum(2, dtype=torch.float64)
    squares = taken.square_().sum(2, dtype=torch.float64)
    return products, squares


def check_range(values: Tensor, dtype: torch.dtype) -> None:
    """Raise NumericalError where an adapter's value is not finite or beyond the largest of a type."""
    largest = torch.finfo(dtype).max
    if not bool((values.abs() <= largest).all()):
        raise NumericalError(
            f"found a value of an adapter that is not finite or beyond {largest:.3g}; check the experts"
        )


def byte_row(values: Tensor) -> Tensor:
    """Return n values in 8 bits each, of even steps from their least to their largest, as bytes ``[1, n + 8]``."""
    row = values.detach().float().cpu().reshape(1, -1)
    check_range(row, torch.float32)
    rounded: Tensor = torch.ops.quantized.embedding_bag_byte_prepack(row)
    return rounded.to(values.device)


def read_rows(rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the matrix ``[…, K]`` that bytes ``[…, K + 8]`` of a `Rounded` or a `byte_row` hold."""
    if rows.is_cpu:
        return _of_type(_read_bytes(rows), dtype)
    scale, first = _ends(rows, torch.float32)
    return _of_type(rows[..., :-8] * scale + first, dtype)


def _of_type(read: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 values in a type; `Tensor.to` takes as long as an operation where there is nothing to do."""
    return read if dtype == torch.float32 else read.to(dtype)


def balanced(left: Tensor, right: Tensor) -> Tensor:
    """Return by what leftᵀ [r, O] is to be multiplied and right [r, K] divided, [r, 1], so that both are as large."""
    largest_left = left.abs().amax(1, keepdim=True)
    largest_right = right.abs().amax(1, keepdim=True)
    balance = (largest_right / largest_left).sqrt()
    return balance.where(balance.isfinite() & (balance > 0), 1.0)


def round_factor(factor: Tensor, used: Tensor | None = None) -> Tensor:
    """Return a factor ``[r, K]`` of a low-rank update in 4 bits a value, as bytes ``[r, ⌈K/2⌉ + 4]``.

    They are FBGEMM's rows: two codes in each byte, the first one in its lower half, a float16 scale, and the float16
    value of code 0. The range that a row's 16 even steps span is the one of the smallest squared error, of some whose
    ends are shares of the row's own; over the columns `used`, where they are given.
    """
    values = factor.detach().float().cpu()
    check_range(values, torch.float16)
    searched = values if used is None else values[:, used.cpu()]
    searched = searched.unsqueeze(1)  # [r, 1, K]
    low, high = searched.aminmax(dim=2)  # [r, 1]
    shares = torch.cartesian_prod(_RANGES, _RANGES)
    first = low * shares[:, 0]
    last = high * shares[:, 1]
    scale = (last - first) / 15
    ends = torch.stack([scale, first], dim=2).half()  # [r, ranges, 2]
    scale, first = ends.float().unsqueeze(3).unbind(2)
    read = _half_codes(searched, scale, first) * scale + first
    errors = (read - searched).square_().sum(2, dtype=torch.float64)
    rows = torch.arange(len(values))
    best = ends[rows, errors.argmin(1)]
    scale, first = best.float().unsqueeze(2).unbind(1)
    codes = _half_codes(values, scale, first)
    is_odd = codes.shape[1] % 2
    padded = F.pad(codes, (0, is_odd)).byte()
    pairs = padded[:, 0::2] + 16 * padded[:, 1::2]
    rounded = torch.cat([pairs, best.view(torch.uint8)], dim=1)
    return rounded.to(factor.device)


def _half_codes(values: Tensor, scale: Tensor, first: Tensor) -> Tensor:
    """Return, as floats, the 4-bit codes nearest to values, given their scale and the value of code 0."""
    codes = (values - first) / scale.clamp(min=SMALLEST)
    return codes.round_().clamp_(0, 15)


def read_factor(rows: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the factor ``[r, columns]`` that bytes of `round_factor` hold."""
    if rows.is_cpu:
        read = _read_halves(rows)
    else:
        scale, first = _ends(rows, torch.float16)
        pairs = rows[..., :-4]
        lower = pairs & 15
        upper = pairs >> 4
        codes = torch.stack([lower, upper], dim=-1).flatten(-2)
        read = codes * scale.float() + first.float()
    if read.shape[-1] != columns:
        read = read[..., :columns]
    return _of_type(read, dtype)


def _ends(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the scales and the values of the first codes […, 1] at the ends of rows."""
    length = 2 * dtype.itemsize
    own = rows[..., -length:].clone(memory_format=torch.contiguous_format)
    ends = own.view(dtype)
    return ends[..., :1], ends[..., 1:]


def packed_nbytes(rows: int, columns: int, bits: int) -> int:
    """Return the bytes of a rounded matrix in a file, in so many bits a value and with a scale of two bytes a row."""
    bytes_of_row = math.ceil(bits * columns / 8)
    return rows * (bytes_of_row + 2)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the rows, which have a scale each, and the columns: a row a unit of the first dimension not of size 1."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    # A table of positions [1, N, D] has N rows.
    sizes = [size for size in shape if size != 1] or [1]
    return sizes[0], math.prod(sizes[1:])


def is_smaller_rounded(shape: Sequence[int], bits: int) -> bool:
    """Say whether a matrix of a shape takes fewer bytes in so many bits a value than in float16."""
    if len(shape) < 2:
        return False
    rows, columns = matrix_shape(shape)
    in_float16 = 2 * rows * columns
    return packed_nbytes(rows, columns, bits) < in_float16
