"""A tensor as its difference from a base's, in few bits a value, packed into bytes."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coin.core.devices import has_float64

EQUAL, HALF, WHOLE = 0, 16, 32
"""How a tensor is kept, beside 1 … 8 bits a value: not at all, its delta in float16, itself."""

_CLIPS = (0.15, 0.25, 0.35, 0.5, 0.7, 1.0)
_REFINEMENTS = 2  # of a scale, for every clip
_SMALLEST = 1e-38  # divides the rows of scale 0, which may take any level
_BLOCK_VALUES = 2**18  # values, times the clips, that are searched at a time: they fit a processor's cache


class Rounded(NamedTuple):
    """A matrix in few bits a value, with a scale a row whose sign says which of the levels the row takes."""

    codes: Tensor  # [rows, K], uint8
    scale: Tensor  # [rows], bfloat16
    bits: int

    def cpu(self) -> "Rounded":
        """Return it in the CPU's memory."""
        return Rounded(self.codes.cpu(), self.scale.cpu(), self.bits)

    def dense(self) -> Tensor:
        """Return the matrix ``[rows, K]`` in float32."""
        table = _signed_levels(self.bits).flatten().to(self.codes.device)
        return _entries_of(table, self.codes, *_by_row(self.scale, 2**self.bits))


@cache
def levels(bits: int) -> Tensor:
    """Return the values ``[2, 2^b]`` that the values of a row are rounded to, over its scale: of two kinds.

    Dense around zero, as deltas are, whose tails are heavy: L_i ∝ −sign(u) log(1 − 1.6 |u|), u = (i + ½)/2^b − ½. At 3
    bits that leaves half to three quarters of the squared error of the even ones, −2^(b−1) … 2^(b−1) − 1, which rows of
    a few large values and many next to zero take. One bit is ±1 alone: with the mean absolute value as scale, BitDelta
    (arXiv 2402.10193).
    """
    place = torch.arange(2**bits, dtype=torch.float64) - 2 ** (bits - 1)
    u = (place + 0.5) / 2**bits
    dense = -u.sign() * torch.log1p(-1.6 * u.abs())
    dense /= dense[-1].clone()
    return torch.stack([dense, place / 2 ** (bits - 1) if bits > 1 else dense]).float()


def _signed_levels(bits: int) -> Tensor:
    """Return `levels`, the even ones with their signs turned, as the scales are that say so."""
    return levels(bits) * torch.tensor([[1.0], [-1.0]])


@cache
def _edges(bits: int, device: torch.device) -> Tensor:
    """Return the float32 ``[2^b − 1]`` midway between the levels that are dense around zero."""
    dense = levels(bits)[0]
    edges = (dense[1:] + dense[:-1]) / 2
    return edges.to(device)


def _even_places(ratio: Tensor, bits: int) -> Tensor:
    """Return which multiples of 2^(1−b), from −2^(b−1) on, are nearest to values over their scales, as floats."""
    half: int = 2 ** (bits - 1)
    return (ratio * half).round_().clamp_(-half, half - 1)


def _places(ratio: Tensor, is_even: Tensor, bits: int) -> Tensor:
    """Return the places in `levels`, flattened, of those nearest to values over their scales, both of one shape.

    Args:
        ratio: x/s in float32.
        is_even: Whether the levels are the even ones, as they are for a scale below 0; of a shape that broadcasts.
        bits: Of the codes, which are the places modulo 2^b.
    """
    dense = torch.bucketize(ratio, _edges(bits, ratio.device), out_int32=True)
    if bits == 1:
        return dense
    even = _even_places(ratio, bits).add_(2**bits + 2 ** (bits - 1))
    return torch.where(is_even, even.int(), dense)


def nearest(matrix: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the codes ``[rows, K]`` of the levels nearest to a matrix ``[rows, K]``, its rows' scales ``[rows]``."""
    divisor = scale.float().abs().clamp(min=_SMALLEST)
    places = _places(matrix.float() / divisor[:, None], (scale < 0)[:, None], bits)
    codes = places.bitwise_and_(2**bits - 1)
    return codes.byte()


def quantise(matrix: Tensor, bits: int) -> Rounded:
    """Round a matrix ``[rows, K]`` to 1 … 8 bits a value, each row with the scale of the smallest squared error.

    From several clips of a row, so that few large values do not make the steps of all others too large, the scale is
    improved in turns with the codes: for given codes c it is ⟨row, L_c⟩ / ⟨L_c, L_c⟩. Sums are in float64, lest a
    base's hash shows their order, which processors choose.
    """
    codes, scales = [], []
    rows = max(1, _BLOCK_VALUES // (len(_CLIPS) * max(matrix.shape[1], 2**bits)))
    for block in torch.split(matrix.float(), rows):
        scale = _best_scale(block, bits)
        scales.append(scale)
        codes.append(nearest(block, scale, bits))
    return Rounded(torch.cat(codes), torch.cat(scales), bits)


def _best_scale(matrix: Tensor, bits: int) -> Tensor:
    """Return the scales ``[rows]`` in bfloat16, below 0 for the even levels, of a matrix's smallest squared errors."""
    clips = torch.tensor(_CLIPS if bits > 1 else (1.0,), device=matrix.device)
    most = matrix.abs().amax(1, keepdim=True)
    kinds: list[tuple[int, Callable[[Tensor], tuple[Tensor, Tensor]]]] = []
    if bits < 8:  # of 256 levels, even ones are as good
        kinds.append((1, _SortedRows(matrix, bits).dense_sums))
    if bits > 1:
        kinds.append((-1, partial(_even_sums, matrix, bits)))
    scales = [torch.zeros_like(most, dtype=torch.bfloat16)]  # which no other has to be better than
    errors = [torch.zeros_like(most, dtype=torch.float64)]
    for sign, sums in kinds:
        scale = most * clips  # [rows, clips]
        for _ in range(_REFINEMENTS):
            products, squares = sums(scale)
            scale = (products / squares.clamp(min=_SMALLEST)).float()
        kept = scale.bfloat16()
        products, squares = sums(kept.float())
        scales.append(sign * kept)
        errors.append(kept * (kept * squares - 2 * products))  # ‖row − s L_c‖² − ‖row‖²
    best = torch.cat(errors, 1).nan_to_num(torch.inf).argmin(1, keepdim=True)  # the first of equals
    return torch.cat(scales, 1).gather(1, best).squeeze(1)


def _even_sums(matrix: Tensor, bits: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return ⟨row, L_c⟩ and ⟨L_c, L_c⟩ ``[rows, S]``, c the codes of the even levels for scales ``[rows, S]``."""
    values = matrix[:, None]
    ratio = values / scale.clamp(min=_SMALLEST)[..., None]  # [rows, S, K]
    taken = _even_places(ratio, bits) / 2 ** (bits - 1)
    return (values * taken).sum(2, dtype=torch.float64), taken.square_().sum(2, dtype=torch.float64)


class _SortedRows:
    """Rows in ascending order, in which the values that are rounded to one level stand side by side.

    Their sums then take a search for every edge between levels, not one for every value.
    """

    def __init__(self, matrix: Tensor, bits: int) -> None:
        self._values = _sorted(matrix).double()  # [rows, K]
        self._sums = F.pad(self._values.cumsum(1), (1, 0))  # [rows, K + 1], of the first n values
        # A value over its scale is rounded to float32 before it is compared with an edge: it is above it if it is above
        # the middle of the edge and the next float32.
        edges = _edges(bits, matrix.device)
        self._edges = (edges.double() + edges.nextafter(torch.full_like(edges, torch.inf))) / 2
        self._levels = levels(bits)[0].to(matrix.device).double()

    def dense_sums(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return ⟨row, L_c⟩ and ⟨L_c, L_c⟩ ``[rows, S]``, c the codes of the dense levels for scales ``[rows, S]``.

        With n_i values up to edge i, whose sum is S_i, and with the last level L, the first is
        L S_K − Σ_i (L_{i+1} − L_i) S_i, and the second L² K − Σ_i (L²_{i+1} − L²_i) n_i.
        """
        limits = scale.double().clamp(min=_SMALLEST)[..., None] * self._edges  # [rows, S, 2^b − 1]
        counts = torch.searchsorted(self._values, limits.flatten(1), right=True)
        sums = self._sums.gather(1, counts).view(limits.shape)
        counts = counts.view(limits.shape)
        last, columns = self._levels[-1], self._values.shape[1]
        products = last * self._sums[:, -1:] - sums @ self._levels.diff()
        squares = last**2 * columns - counts.double() @ self._levels.square().diff()
        return products, squares


def _sorted(matrix: Tensor) -> Tensor:
    """Return rows of finite float32 in ascending order: as integers of the same order, which are sorted faster."""

    def turned(bits: Tensor) -> Tensor:
        return bits ^ (bits >> 31 & 0x7FFFFFFF)  # of numbers below 0 all bits but the sign; its own inverse

    keys = turned(matrix.view(torch.int32)).sort(dim=1).values
    return turned(keys).view(torch.float32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes ``[rows, K]`` below 2^b as bytes ``[rows, ⌈b K / 8⌉]``: every row begins at a byte."""
    return _regrouped(codes, bits, 8)[:, : _row_bytes(bits, codes.shape[1])]


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes ``[rows, columns]`` that `pack` made bytes of."""
    return _regrouped(packed, 8, bits)[:, :columns]


def _regrouped(values: Tensor, before: int, after: int) -> Tensor:
    """Return the bits of rows of `before`-bit numbers as rows of `after`-bit numbers, padded with zeros.

    A word of before · after bits, at most 64, holds `after` of the ones and `before` of the others.
    """
    padded = F.pad(values, (0, -values.shape[1] % after))
    parts = padded.reshape(len(values), -1, after).unbind(2)
    words = parts[0].long()  # [rows, words]
    for part in parts[1:]:
        words = words << before | part
    shifts = range(after * (before - 1), -1, -after)
    return torch.stack([(words >> shift & 2**after - 1).byte() for shift in shifts], dim=2).flatten(1)


def read(packed: Tensor, scale: Tensor, bits: int, columns: int) -> Tensor:
    """Return the matrix ``[rows, columns]`` in float32, as `Rounded.dense` does, from the bytes of its codes.

    Scales are ``[rows]``.
    """
    return looked_up(packed, *by_row(scale, bits), bits, columns)


def by_row(scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return what `looked_up` wants to know of rows with scales ``[rows]``, both ``[rows, 1]``.

    That is the first entry of the table of levels that a row takes, int32, and its scale in float32.
    """
    return _by_row(scale, 2**bits if 8 % bits else 2**8)


def _by_row(scale: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `by_row` for a table in which so many entries of the dense levels are before those of the even ones."""
    first = scale.signbit().int() * count
    return first.unsqueeze(1), scale.float().unsqueeze(1)


def looked_up(packed: Tensor, first: Tensor, scale: Tensor, bits: int, columns: int) -> Tensor:
    """Return the matrix ``[rows, columns]`` in float32 from the bytes of its codes and what `by_row` gives.

    Every operation counts: small matrices are read at every call of a layer.
    """
    entries = unpack(packed, bits, columns) if 8 % bits else packed
    found = _entries_of(_table(bits, packed.device), entries, first, scale)
    return found if found.shape[1] == columns else found[:, :columns]


@cache
def _table(bits: int, device: torch.device) -> Tensor:
    """Return the signed levels of every byte, or of every code where codes share bytes, of both kinds.

    They are float32 seen as one number of a wider type, which is read several times faster than a short row.
    """
    if 8 % bits:
        return _signed_levels(bits).flatten().to(device)
    count = 8 // bits  # codes in a byte
    codes = unpack(torch.arange(256, dtype=torch.uint8)[:, None], bits, count)
    table = _signed_levels(bits)[:, codes.int()].view(2 * 256, count)
    if count > 1 and not has_float64(device):
        return table.view(torch.int64).to(device)  # rows of them
    wide = {1: torch.float32, 2: torch.float64}.get(count, torch.complex128)
    return table.view(wide).squeeze(1).to(device)


def _entries_of(table: Tensor, entries: Tensor, first: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 numbers of a table's entries, counted from the first of each row, times the rows' scales.

    The index is int32: with int64 `index_select` takes eight times as long.
    """
    index = entries.int().add_(first)
    found = table.index_select(0, index.flatten()).view(torch.float32)
    return found.view(entries.shape[0], -1).mul_(scale)


def _row_bytes(bits: int, columns: int) -> int:
    return math.ceil(bits * columns / 8)


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Return the rows, which have a scale each, and the columns of a tensor: one row a unit of its first dimension."""
    sizes = [size for size in shape if size != 1] or [1]  # a table of positions [1, N, D] has N rows
    return (sizes[0], math.prod(sizes[1:])) if len(shape) > 1 else (1, math.prod(shape))


def is_smaller_rounded(shape: torch.Size, bits: int) -> bool:
    """Say whether a matrix of a shape takes fewer bytes in so many bits a value than in float16."""
    columns = matrix_shape(shape)[1]
    return len(shape) > 1 and 0 not in shape and _row_bytes(bits, columns) + 2 < 2 * columns


def encode(tensor: Tensor, base: Tensor, bits: int | None, rounded: Rounded | None = None) -> tuple[int, Tensor]:
    """Encode a tensor as its difference from a base of its shape and type: return its storage kind and its bytes.

    Matrices are kept in `bits` a value, or as they are `rounded` already; vectors, and matrices that would not be
    smaller, in float16; integers and what float16 does not hold to a thousandth as they are; and what equals the
    base's not at all. The bytes of a matrix are its packed rows, and then their scales.
    """
    if torch.equal(tensor, base):
        return EQUAL, torch.empty(0, dtype=torch.uint8)
    if not tensor.is_floating_point() or not bool((tensor.isfinite() & base.isfinite()).all()):
        return WHOLE, _bytes(tensor)
    delta = _wide(tensor) - _wide(base)
    if tensor.ndim > 1:
        rows, columns = matrix_shape(tensor.shape)
        if rounded is None and bits is not None and is_smaller_rounded(tensor.shape, bits):
            rounded = quantise(delta.reshape(rows, columns), bits)
        if rounded is not None:
            packed = pack(rounded.codes, rounded.bits)
            return rounded.bits, torch.cat([_bytes(packed), _bytes(rounded.scale)])
    half = delta.half()
    if float((half - delta).abs().max()) <= float(delta.abs().max()) / 1000:
        return HALF, _bytes(half)
    return WHOLE, _bytes(tensor)


def size(kind: int, base: Tensor) -> int:
    """Return how many bytes `encode` makes of a tensor like the base's."""
    whole = {EQUAL: 0, HALF: 2 * base.numel(), WHOLE: base.nbytes}
    if kind in whole:
        return whole[kind]
    rows, columns = matrix_shape(base.shape)
    return rows * (_row_bytes(kind, columns) + 2)


def decode(kind: int, data: Tensor, base: Tensor) -> Tensor:
    """Return the tensor that `encode` made bytes of; `base` is the one that it was given."""
    if kind == EQUAL:
        return base
    if kind == WHOLE:
        return _typed(data, base.dtype).reshape(base.shape)
    if kind == HALF:
        return added(base, _typed(data, torch.float16))
    rows, columns = matrix_shape(base.shape)
    packed = data[: -2 * rows].view(rows, -1)
    scale = _typed(data[-2 * rows :], torch.bfloat16)
    return added(base, read(packed, scale, kind, columns))


def added(base: Tensor, delta: Tensor) -> Tensor:
    """Return a base and its delta, a matrix or of the base's shape, together in the base's type."""
    return (_wide(base) + delta.reshape(base.shape)).to(base.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _typed(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bytes as numbers of a type, which may begin only at multiples of its size; elsewhere it is a copy."""
    is_aligned = data.storage_offset() % dtype.itemsize == 0
    return (data if is_aligned else data.clone()).view(dtype)


_BLOCK = 128  # columns whose errors are carried over to the rest at a time


def round_columns(wanted: Tensor, scales: Tensor, bits: int, metric: Tensor) -> Tensor:
    """Return the codes [G, O, K] of matrices rounded column by column, the columns to come making up for the errors.

    With M = metric [G, K, K] = R Rᵀ, positive definite, and U = R⁻¹, both upper triangular, column k is rounded to q_k
    and every later one l becomes w_l − (w_k − q_k) U_kl / U_kk, the minimiser of tr((q − w) M (q − w)ᵀ) given the
    columns rounded so far. Columns go by falling M_kk. `scales` [G, O, K] are those of every entry (`Rounded`). Columns
    after a block take the errors of all its columns in one matrix product.

    Source: Frantar et al., *GPTQ* (ICLR 2023, arXiv 2210.17323), algorithm 1.
    """
    order = metric.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True)
    wanted = wanted[..., order].mT.contiguous()  # [G, K, O]
    scales = scales[..., order].mT.float().contiguous()
    metric = metric[:, order][:, :, order]
    root = torch.linalg.cholesky(metric.flip(1, 2)).flip(1, 2)
    upper = torch.linalg.solve_triangular(root, torch.eye(len(order)).to(root), upper=True)
    shares = (upper / upper.diagonal(dim1=1, dim2=2)[..., None]).mT.contiguous()  # [G, later k, earlier k]

    sizes = scales.abs()
    divisors = sizes.clamp(min=_SMALLEST)
    is_even = scales < 0
    known = levels(bits).to(wanted.device).flatten()

    places = torch.empty(wanted.shape, dtype=torch.int32, device=wanted.device)
    for start in range(0, len(order), _BLOCK):
        end = min(start + _BLOCK, len(order))
        errors = torch.empty_like(wanted[:, start:end])
        for k in range(start, end):
            now, place_in_block = slice(k, k + 1), k - start
            earlier = errors[:, :place_in_block]
            column = torch.baddbmm(wanted[:, now], shares[:, now, start:k], earlier, alpha=-1)  # [G, 1, O]
            place = _places(column.float() / divisors[:, now], is_even[:, now], bits)
            level = known.index_select(0, place.flatten()).view(place.shape)
            places[:, now] = place
            errors[:, place_in_block, None] = column - level * sizes[:, now]
        wanted[:, end:] -= shares[:, end:, start:end] @ errors
    codes: Tensor = (places & 2**bits - 1).byte()
    return codes[:, order.argsort()].transpose(1, 2).contiguous()
