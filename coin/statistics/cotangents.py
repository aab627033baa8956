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


def class_cotangents(kind: FisherKind, logits: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the cotangents U [V, B, C] at logits [B, C] of a kind with one a class, `size` of all V = C at a time.

    exact: the rows of the identity. categorical: √p_c (e_c − p).
    """
    samples, count = logits.shape
    probabilities = logits.softmax(-1)
    for first in range(0, count, size):
        last = min(first + size, count)
        rows = logits.new_zeros(last - first, count)
        rows.diagonal(first).fill_(1)
        ones = rows[:, None].expand(-1, samples, -1)
        if kind is FisherKind.exact:
            yield ones
        else:
            roots = probabilities[:, first:last].T.sqrt()  # [V, B]
            yield roots[..., None] * (ones - probabilities)


def random_cotangents(
    logits: Tensor, number: int, generator: torch.Generator | None = None
) -> Tensor:
    """Return k random cotangents U [k, B, C] at logits [B, C] with E Σ_v Uᵥᵀ Uᵥ = 1 for every sample.

    They are k rows of a random orthogonal matrix times √(C/k), so that k = C is exact. Raises ConfigurationError for
    k > C.
    """
    samples, count = logits.shape
    if number > count:
        raise ConfigurationError(
            f"found mc_samples={number}, expected at most {count}, one a class"
        )
    # One draw per sample, so that batch sizes do not change the numbers.
    drawn = [_draw(count, number, generator) for _ in range(samples)]
    return torch.stack(drawn, 1).to(logits)


def _draw(classes: int, number: int, generator: torch.Generator | None) -> Tensor:
    """Draw one sample's cotangents [k, C]."""
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
    rows: Tensor = (q * r.diagonal().sign()).T
    return rows * math.sqrt(classes / number)
