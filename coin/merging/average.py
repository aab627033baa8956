"""Plain averaging, as it is and with its head fitted to the coding objective; and the shared initialisation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coin.files.tensors import State, weighted_mean
from coin.merging.closed_form import MergeMethod
from coin.merging.experts import Experts
from coin.merging.head import fit_head
from coin.merging.method import CodedModel
from coin.networks.batchnorm import BatchNormPolicy


class Average(MergeMethod):
    """The β-average of the experts' parameters, θ = Σ_i β_i θ_i.

    Source: Wortsman et al., *Model soups* (ICML 2022); the baseline of arXiv 2409.01420.

    >>> mean = coin.merge_networks(coin.Average(), experts, code)[0]
    >>> torch.allclose(mean.weight, sum(expert.weight for expert in experts) / 3)
    True
    """

    name = "average"

    def parameters(self, experts: Experts, row: Sequence[float]) -> State:
        """Return the average."""
        return average_parameters(experts.parameters, row)


def average_parameters(experts: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return Σ_i β_i θ_i, summed in float64, in the experts' types."""
    averages = {}
    for name, like in experts[0].items():
        mean = weighted_mean(experts, weights, name, torch.float64)
        averages[name] = mean.to(like.dtype)
    return averages


class Base(MergeMethod):
    """The shared initialisation itself, the floor of every table; policies but ``keep`` change its statistics.

    >>> torch.equal(coin.merge_networks(coin.Base(), experts, code, initial=experts[0])[0].weight, experts[0].weight)
    True
    """

    name = "base"
    reads_initial = True
    batchnorm = BatchNormPolicy.keep

    def __init__(
        self, *, batchnorm: BatchNormPolicy = BatchNormPolicy.keep, **options: Any
    ) -> None:
        super().__init__(batchnorm=batchnorm, **options)

    def parameters(self, experts: Experts, row: Sequence[float]) -> State:
        """Return the initialisation's."""
        return experts.initial()[0]


class HeadFit(Average):
    """The β-average with its head fitted to Σ_i β_i f_i (`fit_head`), after BatchNorm's statistics, by the policy.

    >>> coin.merge_networks(coin.HeadFit(), experts, code, calibration=inputs).passes
    720.0
    """

    name = "head_fit"

    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row of the code; see `Method.make`."""
        made = super().make(experts, row)
        fit_head(made.network, experts, row)
        return made
