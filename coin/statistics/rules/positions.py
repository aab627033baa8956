"""Σ_n Σ_v (Σ_t g_vt a_tᵀ)² for a linear map applied at T positions: the Gram rule and the direct rule.

a is the map's input at a position, g a cotangent of its output there. Neither rule holds more than a block of
per-sample gradients.
"""

from functools import cache

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


@cache
def position_pairs(positions: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs t ≤ t' of T positions as two index vectors [P] and their weights [P]: 1 on the diagonal, else 2."""
    first, second = torch.triu_indices(positions, positions, device=device)
    return first, second, torch.where(first == second, 1, 2)


def contract_pairs(g: Tensor) -> Tensor:
    """Return w_tt' Σ_v g_vt g_vt' over the pairs of positions, [B, O, P], from g [V, B, O, T]."""
    v, b, o, t = g.shape
    if t == 1:
        return torch.square(g).sum(0)
    columns = g.permute(1, 2, 0, 3).reshape(b * o, v, t)
    products = torch.bmm(columns.mT, columns)
    first, second, weights = position_pairs(t, g.device)
    return products.view(b, o, t * t)[..., first * t + second] * weights


def add_gram(total: Tensor, pairs: Tensor, a: Tensor) -> None:
    """Add Σ_n Σ_p pairs_np a_t a_t' to `total`.

    Args:
        total: Accumulator [G, O/G, K], a view that is written in place.
        pairs: Contracted cotangents [B, O, P] from `contract_pairs`.
        a: Inputs [B, G·K, T], group after group.
    """
    groups, outputs, k = total.shape
    b, _, t = a.shape
    first, second, _ = position_pairs(t, a.device)
    products = torch.square(a) if t == 1 else a[..., first] * a[..., second]
    left = pairs.reshape(b, groups, outputs, -1).permute(1, 2, 0, 3).reshape(groups, outputs, -1)
    right = products.reshape(b, groups, k, -1).permute(1, 0, 3, 2).reshape(groups, -1, k)
    if groups == 1:
        total[0].addmm_(left[0], right[0])
    else:
        total.add_(torch.bmm(left, right))


def add_direct(total: Tensor, g: Tensor, a: Tensor) -> None:
    """Add Σ_n Σ_v (Σ_t g_vt a_tᵀ)² to `total` by forming the per-sample gradients a block at a time.

    Args:
        total: Accumulator [G, O/G, K], a view that is written in place.
        g: Cotangents [V, B, O, T].
        a: Inputs [B, G, T, K].
    """
    v, b, o, t = g.shape
    groups, outputs, k = total.shape
    rows = max(1, min(v, _BLOCK // (o * k)))
    buffer = total.new_empty(groups, rows * outputs, k)
    for n in range(b):
        for start in range(0, v, rows):
            block = g[start : start + rows, n].reshape(-1, groups, outputs, t)
            left = block.transpose(0, 1).reshape(groups, -1, t)
            gradients = buffer.view(-1)[: left.shape[0] * left.shape[1] * k].view(groups, -1, k)
            torch.bmm(left, a[n], out=gradients)
            squares = torch.mul(gradients, gradients, out=gradients).view(groups, len(block), outputs, k)
            total.add_(squares.sum(1))
