"""The kinds of Fisher diagonal, and the cotangents whose squared vector-Jacobian products add up to each."""

import math
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
) -> Tensor:
    """Return cotangents U [V, B, C] at logits [B, C] with diag F = Σ_v (Uᵥ · ∂f/∂θ)² for every sample.

    exact: the rows of the identity. monte_carlo: k rows of a random orthogonal matrix times √(C/k), so that k = C is
    exact. categorical: √p_c (e_c − p). Raises ConfigurationError for k > C.
    """
    samples, classes = logits.shape
    identity = torch.eye(classes, dtype=logits.dtype, device=logits.device)
    if kind is FisherKind.exact:
        return identity[:, None].expand(classes, samples, classes)
    if kind is FisherKind.monte_carlo:
        number = mc_samples or 1
        drawn = [_draw(classes, number, generator) for _ in range(samples)]
        return torch.stack(drawn, 1).to(logits)
    probabilities = logits.softmax(-1)
    roots = probabilities.T.sqrt()  # [C, B]
    steps = identity[:, None] - probabilities  # [C, B, C]
    return roots[..., None] * steps


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
