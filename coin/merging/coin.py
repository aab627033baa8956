"""COIN: the closed form with the diagonal Fisher."""

import warnings
from collections.abc import Sequence
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor

from coin.core.choices import check_number, parse_enum
from coin.errors import CoinWarning
from coin.files.tensors import State, weighted_mean
from coin.merging.closed_form import MergeMethod
from coin.merging.expert_statistics import statistics_of
from coin.merging.experts import Experts, in_all
from coin.statistics import FisherKind
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind


class Coin(MergeMethod):
    """The KL barycentre of the experts with each KL replaced by its diagonal second-order form; see `coin_parameters`.

    With ``pooled`` Fishers the objective is the coding objective E_x‖f_θ − Σ_i β_i f_i‖² to second order (exactly for
    one linear layer); with ``own`` ones Σ_i β_i E_{x∈T_i}‖f_θ − f_i‖².

    Source: arXiv 2409.01420, section III, the closed form of the diagonal approximation; Matena and Raffel, *Merging
    models with Fisher-weighted averaging* (NeurIPS 2022), eq. 3, for the same form with the categorical Fisher.

    Args:
        damping: λ relative to the mean of Σβ_iF_i, dimensionless, at least 0.
        fisher_kind: Which Fisher; by default the experiment's, or ``exact``.
        fisher_data: The Fisher's data, ``own`` or ``pooled``; by default the experiment's, or ``own``.
        **options: See `MergeMethod`.

    >>> coin.merge_networks(coin.Coin(), experts, code, calibration=inputs).passes  # 7 a sample
    1260.0
    """

    name = "coin"

    def __init__(
        self,
        damping: float = 1e-6,
        *,
        fisher_kind: FisherKind | None = None,
        fisher_data: DataChoice | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_number("damping", damping, low=0)
        self.damping = damping
        self.fisher_kind = (
            None if fisher_kind is None else parse_enum(FisherKind, "fisher_kind", fisher_kind)
        )
        self.fisher_data = (
            None if fisher_data is None else parse_enum(DataChoice, "fisher_data", fisher_data)
        )

    def statistics(self) -> tuple[Statistic, ...]:
        """Return the Fisher."""
        data = self.fisher_data or DataChoice.own
        kind = self.fisher_kind or FisherKind.exact
        return (Statistic(StatisticKind.fisher, data, kind),)

    def with_defaults(self, fisher_kind: FisherKind, data: DataChoice) -> Self:
        """Return the method with the experiment's Fisher where its own options are None."""
        method = copy(self)
        method.fisher_kind = self.fisher_kind or fisher_kind
        method.fisher_data = self.fisher_data or data
        return method

    def parameters(self, experts: Experts, row: Sequence[float]) -> State:
        """Return the closed form; warns where an expert's Fisher is zero."""
        (which,) = self.statistics()
        fishers = statistics_of(experts, which)
        zero = []
        for index, fisher in enumerate(fishers):
            if not any(map(torch.any, fisher.values())):
                zero.append(str(index))
        if zero:
            warnings.warn(
                f"the Fisher of expert {', '.join(zero)} is zero everywhere, so it counts in the average alone; "
                "check the expert's outputs on the calibration data",
                CoinWarning,
                stacklevel=4,
            )
        return coin_parameters(experts.parameters, fishers, row, self.damping)


def coin_parameters(
    experts: Sequence[State],
    fishers: Sequence[State],
    weights: Sequence[float],
    damping: float = 1e-6,
) -> dict[str, Tensor]:
    """Return COIN's closed form, in the experts' types.

    θ = (Σ_i β_i F_i + λ)⁻¹ (Σ_i β_i F_i θ_i + λ Σ_i β_i θ_i), entry by entry, with F_i the diagonal of the Fisher of
    the outputs and λ = damping × the mean of Σ_i β_i F_i over all entries of all parameters: damping pulls towards the
    β-average. That is the result where every F_i is zero, and in parameters that some Fisher lacks (frozen ones).

    It is computed as the β-average plus (Σβ_iF_i + λ)⁻¹ Σβ_iF_i(θ_i − Σβ_kθ_k), in float64: entries in which experts
    agree stay, however small their Fisher.
    """
    known = in_all(fishers)
    absolute = damping * _mean_fisher(fishers, weights, known)
    merged: dict[str, Tensor] = {}
    for key, like in experts[0].items():
        average = weighted_mean(experts, weights, key, torch.float64)
        if key in known:
            pull = torch.zeros_like(average)
            for expert, fisher, weight in zip(experts, fishers, weights, strict=True):
                step = expert[key].double() - average
                pull.add_(step.mul_(fisher[key]), alpha=weight)
            curvature = weighted_mean(fishers, weights, key, torch.float64).add_(absolute)
            # With no damping and no Fisher the pull is exactly 0, so any divisor gives the β-average.
            curvature.masked_fill_(curvature <= 0, 1)
            average.add_(pull.div_(curvature))
        merged[key] = average.to(like.dtype)
    return merged


def _mean_fisher(fishers: Sequence[State], weights: Sequence[float], known: Sequence[str]) -> float:
    """Return the mean of Σ_i β_i F_i over all entries of the parameters of these names, 0 without any."""
    if not known:
        return 0.0
    mass = 0.0
    for fisher, weight in zip(fishers, weights, strict=True):
        # A GPU is waited for once.
        sums = torch.stack([fisher[key].sum(dtype=torch.float64) for key in known])
        mass += sum(weight * each for each in sums.tolist())
    entries = sum(fishers[0][key].numel() for key in known)
    return mass / entries
