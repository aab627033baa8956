"""The kinds of Fisher diagonal, and the cotangents whose squared vector-Jacobian products add up to each."""

import math
from collections.abc import Iterator
from enum import StrEnum

import torch
from torch import Tensor

from coin.errors import ConfigurationError


class FisherKind(StrEnum):
    """Which diagonal is estimated; f is the network's logits [C], θ a parameter, p = softmax(f).

    All three are per-sample quantities: a gradient is squared before samples are summed, never after.

    >>> coin.Coin(fisher_kind="categorical").fisher_kind is coin.FisherKind.categorical
    True
    """

    exact = "exact"
    """Σ_c (∂f_c/∂θ)²: outputs read as Gaussian means, no labels. The one in the paper's closed form."""

    monte_carlo = "monte_carlo"
    """An unbiased estimate of `exact` from k random cotangents in place of all C outputs."""

    categorical = "categorical"
    """Σ_c p_c (∂ log p_c/∂θ)²: the softmax Fisher, exact over the classes. For the ablation."""


def make_cotangents(
    kind: FisherKind,
    logits: Tensor,
    *,
    mc_samples: int | None = None,
    generator: torch.Generator | None = None,
    classes: range | None = None,
) -> Tensor:
    """Return cotangents U [V, B, C] at logits [B, C] with diag F = Σ_v (Uᵥ · ∂f/∂θ)² for every sample.

    exact: the rows of the identity. monte_carlo: k rows of a random orthogonal matrix times √(C/k), so that k = C is
    exact. categorical: √p_c (e_c − p). Of exact and categorical those of some `classes` alone, if these are given.
    Raises ConfigurationError for k > C.
    """
    samples, count = logits.shape
    chosen = range(count) if classes is None else classes
    if kind is FisherKind.exact:
        return _unit_rows(chosen, logits)[:, None].expand(len(chosen), samples, count)
    if kind is FisherKind.monte_carlo:
        number = mc_samples or 1
        drawn = [_draw(count, number, generator) for _ in range(samples)]
        return torch.stack(drawn, 1).to(logits)
    probabilities = logits.softmax(-1)
    roots = probabilities[:, chosen.start : chosen.stop].T.sqrt()  # [V, B]
    steps = _unit_rows(chosen, logits)[:, None] - probabilities  # [V, B, C]
    return roots[..., None] * steps


def blocks_by_class(kind: FisherKind, logits: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the cotangents of a kind with one a class, `size` at a time: those of all take C² numbers a sample."""
    count = logits.shape[1]
    for first in range(0, count, size):
        classes = range(first, min(first + size, count))
        yield make_cotangents(kind, logits, classes=classes)


def _unit_rows(chosen: range, logits: Tensor) -> Tensor:
    """Return the rows of the identity [V, C] of some classes in sequence."""
    rows = logits.new_zeros(len(chosen), logits.shape[1])
    rows.diagonal(chosen.start).fill_(1)
    return rows


def _draw(classes: int, number: int, generator: torch.Generator | None) -> Tensor:
    """Draw one sample's cotangents [k, C]; one draw per sample, so that batch sizes do not change the numbers."""
    if number > classes:
        raise ConfigurationError(
            f"found mc_samples={number}, expected at most {classes}, one a class"
        )
    device = "cpu" if generator is None else generator.device
    gaussian = torch.randn(
        classes,
        number,
        generator=generator,
        device=device,
        dtype=torch.float64,
    )
    q, r = torch.linalg.qr(gaussian)
    # The sign of R's diagonal makes the factor Haar-distributed; without it QR's convention would bias the rows.
    signs = r.diagonal().sign()
    rows: Tensor = (q * signs).T
    return rows * math.sqrt(classes / number)
