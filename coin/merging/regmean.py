"""RegMean: each linear map fitted to the outputs of the experts' maps on their inputs."""

from collections.abc import Sequence
from copy import copy
from enum import StrEnum
from typing import Any, Self

import torch
from torch import Tensor

from coin.core.choices import check_number, parse_enum
from coin.core.progress import progress_bar
from coin.errors import StateError
from coin.files.tensors import State, weighted_mean
from coin.merging.average import average_parameters
from coin.merging.closed_form import MergeMethod
from coin.merging.expert_statistics import statistics_of
from coin.merging.experts import Experts, in_all
from coin.statistics import FisherKind
from coin.statistics.solvers import solve_damped
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind


class RegMeanLayers(StrEnum):
    """Which linear maps RegMean fits; all other parameters get the β-average."""

    linear = "linear"  # fully connected layers only, as in the literature
    all = "all"  # convolutions too, as linear maps of the patches they see


class RegMean(MergeMethod):
    """The linear maps that best reproduce, on each expert's inputs, the expert's outputs; see `regmean_parameters`.

    With 200 samples the Gram matrix of a wide layer is nearly singular, and weak damping fits noise; the defaults were
    tuned on calibration samples of the embedded tasks.

    Source: Jin et al., *Dataless knowledge fusion by merging weights of language models* (ICLR 2023), eq. 1–2, §3.3.

    Args:
        layers: ``linear`` or ``all``.
        alpha: The factor on off-diagonal entries of the Gram matrices, in [0, 1].
        damping: λ relative to the mean diagonal entry, dimensionless, at least 0.
        gram_data: On which data, ``own`` or ``pooled``; by default the experiment's, or ``own``.
        **options: See `MergeMethod`.

    >>> coin.merge_networks(coin.RegMean(), experts, code, calibration=inputs).passes
    180.0
    """

    name = "regmean"

    def __init__(
        self,
        layers: RegMeanLayers = RegMeanLayers.all,
        alpha: float = 0.7,
        damping: float = 1.0,
        *,
        gram_data: DataChoice | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.layers = parse_enum(RegMeanLayers, "layers", layers)
        check_number("alpha", alpha, low=0, most=1)
        check_number("damping", damping, low=0)
        self.alpha = alpha
        self.damping = damping
        self.gram_data = (
            None if gram_data is None else parse_enum(DataChoice, "gram_data", gram_data)
        )

    def statistics(self) -> tuple[Statistic, ...]:
        """Return the Gram matrices."""
        return (Statistic(StatisticKind.gram, self.gram_data or DataChoice.own),)

    def with_defaults(self, fisher_kind: FisherKind, data: DataChoice) -> Self:
        """Return the method with the experiment's data where its own option is None."""
        method = copy(self)
        method.gram_data = self.gram_data or data
        return method

    def parameters(self, experts: Experts, row: Sequence[float]) -> State:
        """Return the solution."""
        (which,) = self.statistics()
        grams = statistics_of(experts, which)
        return regmean_parameters(
            experts.parameters, grams, row, self.alpha, self.damping, self.layers
        )


def regmean_parameters(
    experts: Sequence[State],
    grams: Sequence[State],
    weights: Sequence[float],
    alpha: float = 0.7,
    damping: float = 1.0,
    layers: RegMeanLayers = RegMeanLayers.all,
) -> dict[str, Tensor]:
    """Return the RegMean merge, in the experts' types; what some expert has no Gram matrix of gets the β-average.

    For a layer with weights W_i ``[C_out, K]`` and inputs a of expert i with Gram matrix G_i = E Σ_positions aaᵀ, the
    minimiser of Σ_i β_i E‖Wa − W_ia‖² is W = (Σ_i β_i W_i G_i)(Σ_i β_i G_i)⁻¹. It is computed as the β-average W̄ plus
    Σ_i β_i (W_i − W̄) G_i (Σ_k β_k G_k + λI)⁻¹ in float64, with λ = damping × the mean diagonal entry of Σβ_kG_k, per
    group of a convolution. A bias is solved for jointly, as the weight of an input that is always 1.

    The Gram matrices ``[G, K, K]``, named as by `coin.statistics.gram_sums`, have off-diagonal entries multiplied by α.
    Raises StateError where one fits no weight, and NumericalError where a damped one is singular.
    """
    merged = average_parameters(experts, weights)
    for name in progress_bar(RegMean.name, items=in_all(grams)):
        is_linear = experts[0][name].ndim == 2
        if is_linear or layers == RegMeanLayers.all:
            merged |= regmean_map(experts, grams, weights, name, alpha, damping)
    return merged


def regmean_map(
    experts: Sequence[State],
    grams: Sequence[State],
    weights: Sequence[float],
    name: str,
    alpha: float,
    damping: float,
) -> dict[str, Tensor]:
    """Return one map's weight, and its bias if the Gram matrices have a row for it; see `regmean_parameters`."""
    shape = grams[0][name].shape
    names = _solved_by(shape, name, experts[0])
    means = {each: weighted_mean(experts, weights, each, torch.float64) for each in names}
    average = _joint_map(means, names, shape[0])  # W̄ [G, C_out/G, K]
    pull = torch.zeros_like(average)
    total = average.new_zeros(shape)
    for expert, state, weight in zip(experts, grams, weights, strict=True):
        gram = state[name].double()
        if gram.shape != shape:
            raise StateError(
                f"the Gram matrices of '{name}' are not of one shape; give those of experts alike"
            )
        diagonal = torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
        shrunk = alpha * gram + (1 - alpha) * diagonal
        own = _joint_map(expert, names, shape[0])
        pull += weight * (own - average) @ shrunk
        total.add_(shrunk, alpha=weight)
    solved = average + solve_damped(total, pull, damping, name)
    columns = solved.flatten(0, 1)
    merged = {}
    first = 0
    for each in names:
        like = experts[0][each]
        width = like[0].numel()
        own = columns[:, first : first + width]
        merged[each] = own.reshape(like.shape).to(like.dtype)
        first += width
    return merged


def _solved_by(gram: torch.Size, weight: str, state: State) -> list[str]:
    """Return what a Gram matrix of this shape solves for, a weight and perhaps its bias; StateError if it fits none."""
    outputs = len(state[weight])
    width = state[weight][0].numel()
    groups, rows, _ = gram
    bias = weight.removesuffix("weight") + "bias"
    if outputs % groups == 0 and rows == width:
        return [weight]
    if outputs % groups == 0 and rows == width + 1 and bias in state:
        return [weight, bias]
    raise StateError(
        f"the Gram matrix of '{weight}' has {groups} groups of {rows} rows for {outputs} outputs, expected {width}, or "
        f"{width + 1} with a bias; compute the Gram matrices of these experts"
    )


def _joint_map(state: State, names: Sequence[str], groups: int) -> Tensor:
    """Return a layer's weight, and its bias as a further column, as one float64 map a group ``[G, C_out/G, K]``."""
    parts = [state[name].double() for name in names]
    joint = torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)
    return joint.reshape(groups, -1, joint.shape[1])
