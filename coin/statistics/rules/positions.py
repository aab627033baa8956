"""Σ_n Σ_v (Σ_t g_vt a_tᵀ)² for a linear map applied at T positions: the Gram rule and the direct rule.

a is the map's input at a position, g a cotangent of its output there. Neither rule holds more than a block of
per-sample gradients.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

_BLOCK = 1 << 20
"""Floats of per-sample gradients that the direct rule forms at a time: few enough to stay in a core's cache."""


def prefers_gram(positions: int, cotangents: int) -> bool:
    """Say whether the Gram rule is the quicker one, by a rule of thumb measured on CPUs.

    The Gram rule's products grow with T(T+1)/2 and not with V; the direct rule's with V·T, and it also writes and
    reads V gradients.
    """
    if positions == 1:
        return True
    return positions <= 32 and positions * (positions + 1) // 2 <= cotangents * (positions + 32)


@lru_cache(maxsize=64)
def position_pairs(positions: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs t ≤ t' of T positions: two index vectors [P] and the weights [P], 1 on the diagonal, else 2."""
    first, second = torch.triu_indices(positions, positions, device=device)
    return first, second, torch.where(first == second, 1, 2)


def contract_pairs(g: Tensor) -> Tensor:
    """Return w_tt' Σ_v g_vt g_vt' over the pairs of positions, [B, P, O], from g [V, B, T, O].

    Channels come last, so that picking pairs later copies whole rows.
    """
    v, b, t, o = g.shape
    if t == 1:
        return torch.square(g).sum(0)
    columns = g.permute(1, 3, 0, 2).reshape(b * o, v, t)
    products = torch.bmm(columns.mT, columns).view(b, o, t * t)
    first, second, weights = position_pairs(t, g.device)
    return products.mT.contiguous().index_select(1, first * t + second).mul_(weights[:, None])


def add_gram(total: Tensor, pairs: Tensor, a: Tensor) -> None:
    """Add Σ_n Σ_p pairs_np a_t a_t' to `total`.

    The sum is one of squares, but where positions cancel its terms do not, and rounding may leave less than nothing.

    Args:
        total: Accumulator [G, O/G, K], a view that is written in place.
        pairs: Contracted cotangents [B, P, O] from `contract_pairs`.
        a: Inputs [B, T, G·K], group after group.
    """
    groups, outputs, k = total.shape
    t = a.shape[1]
    if t == 1:
        products = torch.square(a)
    else:
        first, second, _ = position_pairs(t, a.device)
        products = a.index_select(1, first).mul_(a.index_select(1, second))
    left = pairs.reshape(-1, groups, outputs).permute(1, 2, 0)
    right = products.view(-1, groups, k).transpose(0, 1)
    if groups == 1:
        total[0].addmm_(left[0], right[0])
    else:
        total.add_(torch.bmm(left, right))
    if t > 1:
        total.clamp_min_(0)


def add_direct(total: Tensor, g: Tensor, a: Callable[[int], Tensor]) -> None:
    """Add Σ_n Σ_v (Σ_t g_vt a_tᵀ)² to `total` by forming the per-sample gradients a block at a time.

    Args:
        total: Accumulator [G, O/G, K], a view that is written in place.
        g: Cotangents [V, B, O, T].
        a: Sample's index → its inputs [G, T, K].
    """
    v, b, o, t = g.shape
    groups, outputs, k = total.shape
    rows = max(1, min(v, _BLOCK // (o * k)))
    buffer = total.new_empty(rows * o * k)
    for n in range(b):
        right = a(n)
        for start in range(0, v, rows):
            block = g[start : start + rows, n]
            left = block.reshape(-1, groups, outputs, t).transpose(0, 1).reshape(groups, -1, t)
            gradients = buffer[: left.shape[0] * left.shape[1] * k].view(groups, -1, k)
            torch.bmm(left, right, out=gradients)
            squares = torch.mul(gradients, gradients, out=gradients).view(groups, len(block), outputs, k)
            total.add_(squares.sum(1))
