"""The kinds of Fisher diagonal, and how Monte Carlo draws its cotangents."""

from enum import StrEnum


class FisherKind(StrEnum):
    """Which diagonal is estimated; f is the network's logits [C], θ a parameter, p = softmax(f).

    All four are per-sample quantities: a gradient is squared before samples are summed, never after.
    """

    exact = "exact"
    """Σ_c (∂f_c/∂θ)²: outputs read as Gaussian means, no labels. The one in the paper's closed form."""

    monte_carlo = "monte_carlo"
    """An unbiased estimate of `exact` from k random cotangents in place of all C outputs."""

    categorical = "categorical"
    """Σ_c p_c (∂ log p_c/∂θ)²: the softmax Fisher, exact over the classes. For the ablation."""

    empirical = "empirical"
    """(∂ log p_y/∂θ)² at the true label y. For the ablation."""


class CotangentDistribution(StrEnum):
    """How `FisherKind.monte_carlo` draws k cotangents u of length C, with E Σ_k u uᵀ = I."""

    orthogonal = "orthogonal"
    """k ≤ C rows of a random orthogonal matrix times √(C/k): k = C is exact."""

    rademacher = "rademacher"
    """k independent vectors of random signs, divided by √k."""
