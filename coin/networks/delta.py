"""A tensor as its difference from a base's, in few bits a value, packed into bytes."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EQUAL = 0
"""How a tensor is kept, beside 1 … 8 bits a value: not at all, for it equals the base's;"""
HALF = 16
"""its delta in float16;"""
WHOLE = 32
"""the tensor itself."""

# Of a row's largest value: the scales from which the search begins.
_CLIPS = (0.15, 0.25, 0.35, 0.5, 0.7, 1.0)
_REFINEMENTS = 2  # of a scale, for every clip
_SMALLEST = 1e-38  # divides the rows of scale 0, which may take any level
# Values, times the clips, that are searched at a time: they fit a processor's cache.
_BLOCK_VALUES = 2**18

Sums = Callable[[Tensor], tuple[Tensor, Tensor]]
"""For scales s [rows, S] the sums ⟨row, L_c⟩ and ⟨L_c, L_c⟩ [rows, S], with c the codes nearest to row/s."""


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
        packed = pack(self.codes, self.bits)
        return read(packed, *by_row(self.scale, self.bits), self.bits, self.codes.shape[1])


@cache
def levels(bits: int) -> Tensor:
    """Return the two kinds of values ``[2, 2^b]`` to which a row over its scale is rounded.

    Dense around zero, as deltas are, whose tails are heavy: L_i ∝ −sign(u) log(1 − 1.6 |u|), u = (i + ½)/2^b − ½. At 3
    bits that leaves half to three quarters of the squared error of the even ones, −1 … 1 − 2^(1−b), which have a 0 and
    are for rows of a few large values and many that are next to it. Of one bit the dense ones are ±1, as in BitDelta
    (arXiv 2402.10193).
    """
    count = 2**bits
    half = count // 2
    steps = torch.arange(-half, half, dtype=torch.float64)
    u = (steps + 0.5) / count
    curve = -u.sign() * torch.log1p(-1.6 * u.abs())
    dense = curve / curve[-1]
    even = steps / half
    return torch.stack([dense, even]).float()


@cache
def _edges(bits: int, device: torch.device) -> Tensor:
    """Return the float32 ``[2^b − 1]`` midway between the levels that are dense around zero."""
    dense = levels(bits)[0]
    edges = (dense[1:] + dense[:-1]) / 2
    return edges.to(device)


def _even_steps(ratio: Tensor, bits: int) -> Tensor:
    """Return, as floats from −2^(b−1) on, which multiples of 2^(1−b) are nearest to values over their scales."""
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
    first_even = 2**bits + 2 ** (bits - 1)  # the place of the even level 0
    even = _even_steps(ratio, bits).add_(first_even)
    return torch.where(is_even, even.int(), dense)


def nearest(matrix: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the codes ``[rows, K]`` of the levels nearest to a matrix ``[rows, K]``, its rows' scales ``[rows]``."""
    scale = scale.unsqueeze(1)
    divisor = scale.float().abs().clamp(min=_SMALLEST)
    ratio = matrix.float() / divisor
    places = _places(ratio, scale < 0, bits)
    codes = places.bitwise_and_(2**bits - 1)
    return codes.byte()


def quantise(matrix: Tensor, bits: int) -> Rounded:
    """Round a matrix ``[rows, K]`` to 1 … 8 bits a value, each row with the scale of the smallest squared error.

    From several clips of a row, so that few large values do not make the steps of all others too large, the scale is
    improved in turns with the codes: for given codes c it is ⟨row, L_c⟩ / ⟨L_c, L_c⟩. Sums are in float64, lest a
    base's hash shows their order, which processors choose.
    """
    codes = []
    scales = []
    values_a_row = len(_CLIPS) * max(matrix.shape[1], 2**bits)
    rows = max(1, _BLOCK_VALUES // values_a_row)
    for block in torch.split(matrix.float(), rows):
        scale = _best_scale(block, bits)
        scales.append(scale)
        codes.append(nearest(block, scale, bits))
    return Rounded(torch.cat(codes), torch.cat(scales), bits)


def _best_scale(matrix: Tensor, bits: int) -> Tensor:
    """Return the scales ``[rows]`` in bfloat16, below 0 for the even levels, of a matrix's smallest squared errors."""
    largest = matrix.abs().amax(1, keepdim=True)  # [rows, 1]
    # Whose error, less the row's squares, is 0.
    scales = [torch.zeros_like(largest, dtype=torch.bfloat16)]
    errors = [torch.zeros_like(largest, dtype=torch.float64)]
    if bits < 8:  # of 256 levels, even ones are as good
        ascending = matrix.sort(dim=1).values.double()
        first_sums = F.pad(ascending.cumsum(1), (1, 0))  # [rows, K + 1], of the first n values
        dense_sums = partial(_dense_sums, ascending, first_sums, bits)
        scale, error = _refined(largest, dense_sums)
        scales.append(scale)
        errors.append(error)
    even_sums = partial(_even_sums, matrix, bits)
    scale, error = _refined(largest, even_sums)
    scales.append(-scale)
    errors.append(error)
    every_error = torch.cat(errors, 1).nan_to_num(torch.inf)
    best = every_error.argmin(1, keepdim=True)  # the first of equals
    best_scale = torch.cat(scales, 1).gather(1, best)
    return best_scale.squeeze(1)


def _refined(largest: Tensor, sums: Sums) -> tuple[Tensor, Tensor]:
    """Return scales ``[rows, clips]`` in bfloat16, refined from clips of the rows' largest values, and their errors.

    An error is ‖row − s L_c‖² − ‖row‖².
    """
    clips = torch.tensor(_CLIPS, device=largest.device)
    scale = largest * clips
    for _ in range(_REFINEMENTS):
        products, squares = sums(scale)
        best = products / squares.clamp(min=_SMALLEST)
        scale = best.float()
    kept = scale.bfloat16()
    products, squares = sums(kept.float())
    error = kept * (kept * squares - 2 * products)
    return kept, error


def _even_sums(matrix: Tensor, bits: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the `Sums` of the even levels."""
    values = matrix.unsqueeze(1)
    divisor = scale.clamp(min=_SMALLEST).unsqueeze(2)
    ratio = values / divisor  # [rows, S, K]
    half = 2 ** (bits - 1)
    taken = _even_steps(ratio, bits) / half
    products = (values * taken).sum(2, dtype=torch.float64)
    squares = taken.square_().sum(2, dtype=torch.float64)
    return products, squares


def _dense_sums(
    ascending: Tensor, first_sums: Tensor, bits: int, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the `Sums` of the dense levels, given the rows' values in ascending order and the sums of the first n.

    Values that are rounded to one level stand side by side, so that there is a search for every edge between levels,
    not one for every value: with n_i values up to edge i, whose sum is S_i, and with the last level L, ⟨row, L_c⟩ is
    L S_K − Σ_i (L_{i+1} − L_i) S_i, and ⟨L_c, L_c⟩ is L² K − Σ_i (L²_{i+1} − L²_i) n_i.
    """
    known = levels(bits)[0].to(ascending.device).double()
    # A value over its scale is rounded to float32 before it is compared with an edge: it is above it if it is above the
    # middle of the edge and the next float32.
    edges = _edges(bits, ascending.device)
    next_edges = edges.nextafter(torch.full_like(edges, torch.inf))
    middles = (edges.double() + next_edges) / 2
    factor = scale.double().clamp(min=_SMALLEST)
    limits = factor.unsqueeze(2) * middles  # [rows, S, 2^b − 1]
    below = torch.searchsorted(ascending, limits.flatten(1), right=True)  # how many values are
    sums = first_sums.gather(1, below).view(limits.shape)
    counts = below.view(limits.shape).double()
    last = known[-1]
    columns = ascending.shape[1]
    total = first_sums[:, -1:]
    products = last * total - sums @ known.diff()
    squares = last**2 * columns - counts @ known.square().diff()
    return products, squares


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes ``[rows, K]`` below 2^b as bytes ``[rows, ⌈b K / 8⌉]``: every row begins at a byte."""
    used = _row_bytes(bits, codes.shape[1])
    return _regrouped(codes, bits, 8)[:, :used]


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes ``[rows, columns]`` that `pack` made bytes of."""
    return _regrouped(packed, 8, bits)[:, :columns]


def _regrouped(values: Tensor, before: int, after: int) -> Tensor:
    """Return the bits of rows of `before`-bit numbers as rows of `after`-bit numbers, padded with zeros.

    A word of before · after bits, at most 64, holds `after` of the ones and `before` of the others.
    """
    missing = -values.shape[1] % after
    padded = F.pad(values, (0, missing))
    parts = padded.reshape(len(values), -1, after).unbind(2)
    words = parts[0].long()  # [rows, words]
    for part in parts[1:]:
        words = words << before | part
    mask = 2**after - 1
    regrouped = []
    for shift in range(after * (before - 1), -1, -after):
        number = words >> shift & mask
        regrouped.append(number.byte())
    return torch.stack(regrouped, dim=2).flatten(1)


def read(packed: Tensor, first: Tensor, scale: Tensor, bits: int, columns: int) -> Tensor:
    """Return the matrix ``[rows, columns]`` in float32, from the bytes of its codes and what `by_row` gives.

    Every operation counts: small matrices are read at every call of a layer. With an int64 index `index_select` takes
    eight times as long.
    """
    entries = unpack(packed, bits, columns) if 8 % bits else packed
    index = entries.int().add_(first)
    found = _table(bits, packed.device).index_select(0, index.flatten()).view(torch.float32)
    matrix = found.view(entries.shape[0], -1).mul_(scale)
    return matrix if matrix.shape[1] == columns else matrix[:, :columns]


def by_row(scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return what `read` takes of rows with scales ``[rows]``, both ``[rows, 1]``.

    That is the first entry of the table of levels that a row takes, int32, and its scale in float32.
    """
    kinds_apart = 2**bits if 8 % bits else 2**8
    first = scale.signbit().int() * kinds_apart
    return first.unsqueeze(1), scale.float().unsqueeze(1)


@cache
def _table(bits: int, device: torch.device) -> Tensor:
    """Return the levels of every byte, or of every code where codes share bytes: of the dense kind, then of the even.

    Even levels have their signs turned, as the scales have that say so. The float32 of a byte of several codes are seen
    as int64, which are read several times faster than short rows.
    """
    signs = torch.tensor([[1.0], [-1.0]])
    signed = levels(bits) * signs
    if 8 % bits:
        return signed.flatten().to(device)
    codes_a_byte = 8 // bits
    every_byte = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    codes = unpack(every_byte, bits, codes_a_byte)  # [256, codes]
    table = signed[:, codes.int()].flatten(0, 1)  # [2 · 256, codes]
    if codes_a_byte > 1:
        table = table.view(torch.int64)
    return table.squeeze(1).to(device)


def _row_bytes(bits: int, columns: int) -> int:
    return math.ceil(bits * columns / 8)


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Return the rows, which have a scale each, and the columns: a row a unit of the first dimension not of size 1."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    # A table of positions [1, N, D] has N rows.
    sizes = [size for size in shape if size != 1] or [1]
    return sizes[0], math.prod(sizes[1:])


def is_smaller_rounded(shape: torch.Size, bits: int) -> bool:
    """Say whether a matrix of a shape takes fewer bytes in so many bits a value than in float16."""
    if len(shape) < 2:
        return False
    columns = matrix_shape(shape)[1]
    scale_bytes = 2
    return 0 not in shape and _row_bytes(bits, columns) + scale_bytes < 2 * columns


def encode(
    tensor: Tensor, base: Tensor, bits: int | None, rounded: Rounded | None = None
) -> tuple[int, Tensor]:
    """Encode a tensor as its difference from a base of its shape and type: return its storage kind and its bytes.

    Matrices are kept in `bits` a value, or as they are `rounded` already; vectors, and matrices that would not be
    smaller, in float16; integers and what float16 does not hold to a thousandth,
    of a buffer (without `bits`) entry by entry, as they are; and what equals the
    base's not at all. The bytes of a matrix are its packed rows, and then their scales.
    """
    if torch.equal(tensor, base):
        return EQUAL, torch.empty(0, dtype=torch.uint8)
    if not tensor.is_floating_point():
        return WHOLE, _bytes(tensor)
    is_finite = tensor.isfinite() & base.isfinite()
    if not bool(is_finite.all()):  # a causal mask
        return WHOLE, _bytes(tensor)
    delta = _wide(tensor) - _wide(base)
    if rounded is None and bits is not None and is_smaller_rounded(tensor.shape, bits):
        rounded = quantise(delta.reshape(matrix_shape(tensor.shape)), bits)
    if rounded is not None:
        packed = pack(rounded.codes, rounded.bits)
        data = torch.cat([_bytes(packed), _bytes(rounded.scale)])
        return rounded.bits, data
    half = delta.half()
    error = (half - delta).abs()
    size = delta.abs().max()
    if bits is None:  # a buffer: every entry counts
        size = torch.maximum(delta.abs(), _wide(tensor).abs())
    if bool((error <= size / 1000).all()):
        return HALF, _bytes(half)
    return WHOLE, _bytes(tensor)


def size(kind: int, base: Tensor) -> int:
    """Return how many bytes `encode` makes of a tensor like the base's."""
    if kind == EQUAL:
        return 0
    if kind == HALF:
        return 2 * base.numel()
    if kind == WHOLE:
        return base.nbytes
    rows, columns = matrix_shape(base.shape)
    row_bytes = _row_bytes(kind, columns) + 2  # with its scale
    return rows * row_bytes


def decode(kind: int, data: Tensor, base: Tensor) -> Tensor:
    """Return the tensor that `encode` made bytes of; `base` is the one that it was given."""
    if kind == EQUAL:
        return base
    if kind == WHOLE:
        return data.view(base.dtype).reshape(base.shape)
    if kind == HALF:
        return added(base, data.view(torch.float16))
    packed, scale = split_matrix(data, base.shape)
    _, columns = matrix_shape(base.shape)
    delta = read(packed, *by_row(scale, kind), kind, columns)
    return added(base, delta)


def split_matrix(data: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the packed rows ``[rows, bytes]`` and the scales ``[rows]`` of the bytes of a matrix of this shape."""
    rows, _ = matrix_shape(shape)
    scale_bytes = 2 * rows
    packed = data[:-scale_bytes].view(rows, -1)
    # A view of another type has to begin at a multiple of its size.
    scale = data[-scale_bytes:].clone()
    return packed, scale.view(torch.bfloat16)


def added(base: Tensor, delta: Tensor) -> Tensor:
    """Return a base and its delta, a matrix or of the base's shape, together in the base's type."""
    total = _wide(base) + delta.reshape(base.shape)
    return total.to(base.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or its own type if that is wider."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(wide)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


_BLOCK = 128  # columns whose errors are carried over to the rest at a time


def round_columns(wanted: Tensor, scales: Tensor, bits: int, metric: Tensor) -> Tensor:
    """Return the codes [G, O, K] of matrices rounded column by column, the columns to come making up for the errors.

    With M = metric [G, K, K] = R Rᵀ, positive definite, and U = R⁻¹, both upper triangular, column k is rounded to q_k
    and every later one l becomes w_l − (w_k − q_k) U_kl / U_kk, the minimiser of tr((q − w) M (q − w)ᵀ) given the
    columns rounded so far. Columns go by falling M_kk. `scales` [G, O] are those of the rows (`Rounded`). Columns after
    a block take the errors of all its columns in one matrix product.

    Source: Frantar et al., *GPTQ* (ICLR 2023, arXiv 2210.17323), algorithm 1.
    """
    order = metric.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True)
    wanted = wanted[..., order].mT.contiguous()  # [G, K, O]
    scales = scales.float().unsqueeze(1)  # [G, 1, O]
    metric = metric[:, order][:, :, order]
    root = torch.linalg.cholesky(metric.flip(1, 2)).flip(1, 2)
    identity = torch.eye(len(order)).to(root)
    upper = torch.linalg.solve_triangular(root, identity, upper=True)
    diagonal = upper.diagonal(dim1=1, dim2=2).unsqueeze(2)
    shares = (upper / diagonal).mT.contiguous()  # [G, later k, earlier k]

    sizes = scales.abs()
    divisors = sizes.clamp(min=_SMALLEST)
    is_even = scales < 0
    known = levels(bits).to(wanted.device).flatten()

    places = torch.empty(wanted.shape, dtype=torch.int32, device=wanted.device)
    for start in range(0, len(order), _BLOCK):
        end = min(start + _BLOCK, len(order))
        errors = torch.empty_like(wanted[:, start:end])
        for k in range(start, end):
            now = slice(k, k + 1)
            in_block = slice(k - start, k - start + 1)
            earlier = errors[:, : k - start]
            own_shares = shares[:, now, start:k]
            column = torch.baddbmm(wanted[:, now], own_shares, earlier, alpha=-1)  # [G, 1, O]
            ratio = column.float() / divisors
            place = _places(ratio, is_even, bits)
            level = known.index_select(0, place.flatten()).view(place.shape)
            places[:, now] = place
            errors[:, in_block] = column - level * sizes
        later_shares = shares[:, end:, start:end]
        wanted[:, end:] -= later_shares @ errors
    codes: Tensor = (places & 2**bits - 1).byte()
    in_place = codes[:, order.argsort()]
    return in_place.transpose(1, 2).contiguous()
