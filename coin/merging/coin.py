"""COIN: the closed form with the diagonal Fisher."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from coin.errors import ConfigurationError
from coin.merging.inputs import MergeInputs, Requirement
from coin.merging.method import MergeMethod, check_fisher_options, weighted_mean
from coin.networks.batchnorm import BatchNormPolicy
from coin.state import State


class Coin(MergeMethod):
    """The KL barycentre of the experts with each KL replaced by its diagonal second-order form.

    θ = (Σ_i β_i F_i + λ)⁻¹ (Σ_i β_i F_i θ_i + λ Σ_i β_i θ_i), entry by entry, with F_i the diagonal of the Fisher of
    the outputs and λ = damping × the mean of Σ_i β_i F_i over all entries of all parameters. Damping therefore pulls
    towards the β-average, never towards zero. Where every F_i is exactly zero the β-average stands.

    It is computed as the β-average plus (Σβ_iF_i + λ)⁻¹ Σβ_iF_i(θ_i − Σβ_kθ_k), in float64: experts that agree in an
    entry leave it alone, however small their Fisher.

    Source: arXiv 2409.01420, section III, the closed form of the diagonal approximation; Matena and Raffel, *Merging
    models with Fisher-weighted averaging* (NeurIPS 2022), eq. 3, for the same form with the categorical Fisher.

    Args:
        damping: λ relative to the mean of Σβ_iF_i, dimensionless, at least 0.
        fisher_kind: Which Fisher it wants; None for the experiment's. The method itself never computes one.
        fisher_data: On which data, ``own`` or ``pooled``; None for the experiment's.
        batchnorm: Policy for BatchNorm statistics.
        label: Name of this variant in results.

    Raises:
        ConfigurationError: An option is out of its range.
    """

    name = "coin"
    requires = frozenset({Requirement.FISHER})

    def __init__(
        self,
        damping: float = 1e-6,
        *,
        fisher_kind: str | None = None,
        fisher_data: str | None = None,
        batchnorm: BatchNormPolicy = BatchNormPolicy.average,
        label: str | None = None,
    ) -> None:
        super().__init__(batchnorm=batchnorm, label=label)
        self.damping = check_damping(damping)
        self.fisher_kind, self.fisher_data = check_fisher_options(fisher_kind, fisher_data)

    def _merge(self, inputs: MergeInputs, weights: tuple[float, ...]) -> dict[str, Tensor]:
        assert inputs.fishers is not None
        return coin_parameters(inputs.experts, inputs.fishers, weights, self.damping)


def coin_parameters(
    experts: Sequence[State], fishers: Sequence[State], weights: Sequence[float], damping: float
) -> dict[str, Tensor]:
    """Return COIN's closed form, in the experts' types; see `Coin`.

    Args:
        experts: θ_i, checked: same names and shapes, finite.
        fishers: F_i, checked: the experts' names and shapes, finite, not negative.
        weights: β.
        damping: λ relative to the mean of Σβ_iF_i.
    """
    entries = sum(tensor.numel() for tensor in fishers[0].values())
    mass = sum(weight * total_of(fisher) for fisher, weight in zip(fishers, weights, strict=True))
    absolute = damping * mass / max(entries, 1)

    merged: dict[str, Tensor] = {}
    for key in fishers[0]:
        total = weighted_mean(fishers, weights, key)
        average = weighted_mean(experts, weights, key)
        pull = torch.zeros_like(average)
        for expert, fisher, weight in zip(experts, fishers, weights, strict=True):
            step = expert[key].double() - average
            pull.add_(step.mul_(fisher[key]), alpha=weight)
        curvature = total.add_(absolute)
        # With no damping and no Fisher the pull is exactly 0, so any divisor gives the β-average.
        correction = pull.div_(curvature.masked_fill_(curvature <= 0, 1))
        merged[key] = average.add_(correction).to(experts[0][key].dtype)
    return merged


def total_of(state: State) -> float:
    """Return the sum of all entries of a state, added up in float64."""
    return sum(float(tensor.sum(dtype=torch.float64)) for tensor in state.values())


def check_damping(damping: float) -> float:
    """Return `damping` after checking that it is a finite number and at least 0.

    Raises:
        ConfigurationError: It is not.
    """
    if not (math.isfinite(damping) and damping >= 0):
        raise ConfigurationError(f"found damping {damping}, expected a finite number of at least 0")
    return damping
