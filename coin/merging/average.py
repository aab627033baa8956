"""Plain averaging, as it is and with its head fitted to the coding objective; and the shared initialisation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coin.coding import fit_ridge
from coin.files.tensors import State, weighted_mean
from coin.merging.closed_form import MergeMethod
from coin.merging.experts import Experts
from coin.merging.method import CodedModel
from coin.merging.rounding import Rounding
from coin.networks.batchnorm import BatchNormPolicy
from coin.networks.heads import head_weight, linear_head
from coin.networks.running import check_head


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


def fit_head(
    network: nn.Module, experts: Experts, row: Sequence[float], rounding: Rounding | None = None
) -> None:
    """Fit a coded network's head (W, b) in place, so that it reads Σ_i β_i f_i out of the network's features φ(x).

    It becomes (W + ΔW, b + Δb), where ΔW φ + Δb is the ridge regression of Σβ_if_i − (Wφ + b) on the pooled calibration
    samples, its ridge chosen by leave-one-out (`fit_ridge`). So experts that
    agree keep their head. With a `rounding` W + ΔW is rounded. Raises HeadError where the head is not a fully connected
    layer, or the logits are not the head of its inputs.
    """
    head = linear_head(network)
    target = experts.mixture(row, 0, 1).double()
    run = experts.run(network, experts.pooled, features=True)
    check_head(network, run.features, run.logits)
    features = run.features.double()
    fit = fit_ridge(features, target - run.logits.double(), intercept=head.bias is not None)
    step = fit.coefficients.T  # ΔW [C, K]
    weight = head_weight(network)
    with torch.no_grad():
        if rounding is not None and rounding.takes(weight):
            centred = features - fit.input_mean
            gram = centred.T @ centred
            metric = gram + fit.ridges * torch.eye(len(gram)).to(step)
            step = rounding.step(weight, head.weight, step[None], metric[None])[0]
            head.weight.copy_(rounding.weight(weight))
        else:
            head.weight.add_(step.to(head.weight))
        if head.bias is not None:
            constant = fit.target_mean - step @ fit.input_mean
            head.bias.add_(constant.to(head.bias))
