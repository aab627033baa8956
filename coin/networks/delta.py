"""A tensor as its difference from a base's, in few bits a value, packed into bytes."""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EQUAL, HALF, WHOLE = 0, 16, 32
"""How a tensor is kept, beside 1 … 8 bits a value: not at all, its delta in float16, itself."""

_CLIPS = (0.15, 0.25, 0.35, 0.5, 0.7, 1.0)


class Rounded(NamedTuple):
    """A matrix in few bits a value, with a scale a row whose sign says which of the levels the row takes."""

    codes: Tensor  # [rows, K], uint8
    scale: Tensor  # [rows], bfloat16
    bits: int

    def dense(self) -> Tensor:
        """Return the matrix ``[rows, K]`` in float32."""
        kinds = (self.scale < 0).long()[:, None]
        return torch.take(levels(self.bits), self.codes + 2**self.bits * kinds) * self.scale.float().abs()[:, None]


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


def nearest(matrix: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the codes ``[rows, K]`` of the levels nearest to a matrix ``[rows, K]``, its rows' scales ``[rows]``."""
    codes = torch.empty(matrix.shape, dtype=torch.uint8)
    for even in (False, True):
        own = (scale < 0) == even
        codes[own] = _codes(matrix[own], scale[own].float().abs(), bits, even).byte()
    return codes


def _codes(matrix: Tensor, scale: Tensor, bits: int, even: bool) -> Tensor:
    over = matrix / scale.clamp(min=1e-38)[:, None]  # of a row of zeros any level will do
    if even and bits > 1:
        return over.mul_(2 ** (bits - 1)).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).add_(2 ** (bits - 1))
    dense = levels(bits)[0]
    return torch.bucketize(over.contiguous(), (dense[1:] + dense[:-1]) / 2, out_int32=True)


def quantise(matrix: Tensor, bits: int) -> Rounded:
    """Round a matrix ``[rows, K]`` to 1 … 8 bits a value, each row with the scale of the smallest squared error.

    From several clips of a row, so that few large values do not make the steps of all others too large, the scale is
    improved in turns with the codes: for given codes c it is ⟨row, L_c⟩ / ⟨L_c, L_c⟩. Sums are in float64, lest a
    base's hash shows their order, which processors choose.
    """
    matrix = matrix.float()
    most = matrix.abs().amax(1)
    best, error = torch.zeros_like(most, dtype=torch.bfloat16), matrix.square().sum(1, dtype=torch.float64)
    for even in {1: [False], 8: [True]}.get(bits, [False, True]):  # of 256, even ones are as good
        known = levels(bits)[int(even)]
        for clip in _CLIPS if bits > 1 else (1.0,):
            scale = most * clip
            for _ in range(2):
                taken = known[_codes(matrix, scale, bits, even).int()]
                products, squares = (each.sum(1, dtype=torch.float64) for each in (matrix * taken, taken.square()))
                scale = (products / squares.clamp(min=1e-38)).float()
            kept = scale.bfloat16()
            read = known[_codes(matrix, kept.float(), bits, even).int()] * kept.float()[:, None]
            left = (matrix - read).square().sum(1, dtype=torch.float64)
            best, error = torch.where(left < error, -kept if even else kept, best), torch.minimum(left, error)
    return Rounded(nearest(matrix, best, bits), best, bits)


def pack(codes, bits):
    each = np.unpackbits(codes.numpy()[..., None], axis=2)[:, :, 8 - bits :].reshape(len(codes), -1)
    return torch.from_numpy(np.packbits(each, axis=1))


def unpack(packed, bits, columns):
    each = np.unpackbits(packed.numpy(), axis=1)[:, : bits * columns].reshape(len(packed), columns, bits)
    return torch.from_numpy(np.packbits(np.pad(each, ((0, 0), (0, 0), (8 - bits, 0))), axis=2)[..., 0])


def read(packed, scale, bits, columns):
    return Rounded(unpack(packed, bits, columns), scale, bits).dense()


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Return the rows, which have a scale each, and the columns of a tensor: one row a unit of its first dimension."""
    sizes = [size for size in shape if size != 1] or [1]  # a table of positions [1, N, D] has N rows
    return (sizes[0], math.prod(sizes[1:])) if len(shape) > 1 else (1, math.prod(shape))


def encode(tensor: Tensor, base: Tensor, bits: int | None, rounded: Rounded | None = None) -> tuple[int, Tensor]:
    """Encode a tensor as its difference from a base of its shape and type: return its storage kind and its bytes.

    Matrices are kept in `bits` a value, or as they are `rounded` already; vectors, and matrices that would not be
    smaller, in float16; integers and what float16 does not hold to a thousandth as they are; and what equals the
    base's not at all.
    """
    if torch.equal(tensor, base):
        return EQUAL, torch.empty(0, dtype=torch.uint8)
    if not tensor.is_floating_point() or not bool((tensor.isfinite() & base.isfinite()).all()):
        return WHOLE, _bytes(tensor)
    delta, (rows, columns) = _wide(tensor) - _wide(base), matrix_shape(tensor.shape)
    if tensor.ndim > 1 and rounded is not None:
        return rounded.bits, torch.cat([pack(rounded.codes, rounded.bits).flatten(), _bytes(rounded.scale)])
    if tensor.ndim > 1 and bits is not None and columns * bits + 16 < columns * 16:
        return encode(tensor, base, None, quantise(delta.reshape(rows, columns), bits))
    half = delta.half()
    if float((half - delta).abs().max()) <= float(delta.abs().max()) / 1000:
        return HALF, _bytes(half)
    return WHOLE, _bytes(tensor)


def size(kind: int, base: Tensor) -> int:
    """Return how many bytes `encode` makes of a tensor like the base's."""
    whole = {EQUAL: 0, HALF: 2 * base.numel(), WHOLE: base.nbytes}
    return (
        whole[kind]
        if kind in whole
        else matrix_shape(base.shape)[0] * (math.ceil(kind * matrix_shape(base.shape)[1] / 8) + 2)
    )


def decode(kind: int, data: Tensor, base: Tensor) -> Tensor:
    """Return the tensor that `encode` made bytes of; `base` is the one that it was given."""
    rows, columns = matrix_shape(base.shape)
    if kind == EQUAL:
        return base
    if kind == WHOLE:
        return _typed(data, base.dtype).reshape(base.shape)
    if kind == HALF:
        delta = _typed(data, torch.float16)
    else:
        packed, scale = data[: -2 * rows], _typed(data[-2 * rows :], torch.bfloat16)
        delta = read(packed.reshape(rows, -1), scale, kind, columns)
    return added(base, delta)


def added(base: Tensor, delta: Tensor) -> Tensor:
    """Return a base and its delta, a matrix or of the base's shape, together in the base's type."""
    return (_wide(base) + delta.reshape(base.shape)).to(base.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _typed(data: Tensor, dtype: torch.dtype) -> Tensor:
    return data.clone().view(dtype)  # a clone, so that it begins where the type may


_BLOCK = 128  # columns whose errors are carried over to the rest at a time


def round_columns(wanted: Tensor, scales: Tensor, bits: int, metric: Tensor) -> Tensor:
    """Return the codes [G, O, K] of matrices rounded column by column, the columns to come making up for the errors.

    With M = metric [G, K, K] = R Rᵀ, positive definite, and U = R⁻¹, both upper triangular, column k is rounded to q_k
    and every later one l becomes w_l − (w_k − q_k) U_kl / U_kk, the minimiser of tr((q − w) M (q − w)ᵀ) given the
    columns rounded so far. Columns go by falling M_kk. `scales` [G, O, K] are those of every entry (`Rounded`).

    Source: Frantar et al., *GPTQ* (ICLR 2023, arXiv 2210.17323), algorithm 1.
    """
    order = metric.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True)
    wanted, scales, metric = wanted[..., order], scales[..., order], metric[:, order][:, :, order]
    root = torch.linalg.cholesky(metric.flip(1, 2)).flip(1, 2)
    upper = torch.linalg.solve_triangular(root, torch.eye(len(order)).to(root), upper=True)
    codes = torch.empty(wanted.shape, dtype=torch.uint8)
    for start in range(0, len(order), _BLOCK):
        end = min(start + _BLOCK, len(order))
        errors = torch.zeros_like(wanted[..., start:end])
        for k in range(start, end):
            column, scale = wanted[..., k].flatten(), scales[..., k].flatten()
            code = nearest(column[:, None].float(), scale, bits)
            codes[..., k] = code.view(codes.shape[:2])
            error = (column - Rounded(code, scale, bits).dense()[:, 0]).view(codes.shape[:2])
            errors[..., k - start] = error / upper[:, k, k, None]
            wanted[..., k:end] -= errors[..., k - start, None] * upper[:, None, k, k:end]
        wanted[..., end:] -= errors @ upper[:, start:end, end:]
    return codes[..., order.argsort()]
