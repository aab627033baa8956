"""RegMean: each linear map fitted to the outputs of the experts' maps on their inputs."""

from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from coin.core.choices import check_number, parse_enum
from coin.core.progress import progress_bar
from coin.errors import StateError
from coin.files.tensors import State, weighted_mean
from coin.merging.average import average_parameters
from coin.merging.closed_form import Candidate, MergeMethod
from coin.merging.experts import Experts, in_all
from coin.statistics import TRANSPOSED
from coin.statistics.solvers import solve_damped
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind


class RegMeanLayers(StrEnum):
    """Which linear maps RegMean fits; all other parameters get the β-average."""

    linear = "linear"  # fully connected layers only, as in the literature
    all = "all"  # convolutions too, as linear maps of the patches they see


class RegMean(MergeMethod):
    """The linear maps that best reproduce, on each expert's inputs, the expert's outputs; see `regmean_parameters`.

    With 200 samples the Gram matrix of a wide layer is nearly singular, and weak damping fits noise; the defaults were
    tuned on calibration samples of the embedded tasks. The data are chosen as in `coin.merging.Coin`.

    Source: Jin et al., *Dataless knowledge fusion by merging weights of language models* (ICLR 2023), eq. 1–2, §3.3.

    Args:
        layers: ``linear`` or ``all``.
        alpha: The factor on off-diagonal entries of the Gram matrices, in [0, 1].
        damping: λ relative to the mean diagonal entry, dimensionless, at least 0.
        gram_data: On which data, ``own``, ``pooled`` or ``auto``; none for the experiment's, or ``auto``.
        **options: See `MergeMethod`.

    >>> coin.merge_networks(coin.RegMean(), experts, code, calibration=inputs).chosen[0].keys()
    dict_keys(['gram_data', 'held_out_error'])
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
        self.alpha, self.damping = alpha, damping
        self.gram_data = None if gram_data is None else parse_enum(DataChoice, "gram_data", gram_data)

    def statistics(self) -> tuple[Statistic, ...]:
        """Return the Gram matrices that the option asks for."""
        return tuple(Statistic(StatisticKind.gram, data) for data in (self.gram_data or DataChoice.auto).alternatives)

    def candidates(self, experts: Experts, row: Sequence[float]) -> Iterator[Candidate]:
        """Yield the solution for the Gram matrices of every kind of data that the option allows."""
        data = experts.available(StatisticKind.gram, self.gram_data or DataChoice.auto)
        # Several are judged by Gram matrices without the held-out samples, unless a task has no other sample.
        judged = len(data) > 1 and experts.is_calibrated
        judged = judged and all(each.num_samples for each in experts.fitted(DataChoice.own))
        options: Any = {"alpha": self.alpha, "damping": self.damping, "layers": self.layers}
        solved = partial(regmean_parameters, experts.parameters, weights=row, **options)
        for each in data:
            grams = experts.statistic(Statistic(StatisticKind.gram, each))
            trial = solved(grams=experts.computed(None, experts.fitted(each))) if judged else None
            yield Candidate({"gram_data": str(each)}, solved(grams=grams), trial)


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
    like, merged = experts[0], dict[str, Tensor]()
    for name in progress_bar(RegMean.name, items=in_all(grams)):
        if layers != RegMeanLayers.linear or like[name.removesuffix(TRANSPOSED)].ndim == 2:
            merged |= regmean_map(experts, (gram[name] for gram in grams), weights, name, alpha, damping)
    return average_parameters(experts, weights) | merged


def regmean_map(
    experts: Sequence[State], grams: Iterable[Tensor], weights: Sequence[float], name: str, alpha: float, damping: float
) -> dict[str, Tensor]:
    """Return one map's weight, and its bias if the Gram matrices have a row for it; see `regmean_parameters`."""
    like, key, grams = experts[0], name.removesuffix(TRANSPOSED), iter(grams)
    first, turned = next(grams), name != key  # then the map is x ↦ x W: its weight lies the other way round
    bias = _bias_of(first, key, like, turned)
    means = {own: weighted_mean(experts, weights, own, torch.float64) for own in (key, bias) if own is not None}
    average = _joint_map(means, key, bias, len(first), turned)
    pull, total = torch.zeros_like(average), torch.zeros_like(first, dtype=torch.float64)
    for expert, gram, weight in zip(experts, chain([first], grams), weights, strict=True):
        if gram.shape != first.shape:
            raise StateError(f"the Gram matrices of '{key}' are not of one shape; give those of experts alike")
        gram = gram.double()
        gram = alpha * gram + (1 - alpha) * torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
        pull += weight * (_joint_map(expert, key, bias, len(gram), turned) - average) @ gram
        total.add_(gram, alpha=weight)
    rows, merged = (average + solve_damped(total, pull, damping, key)).flatten(0, 1), {}
    if bias is not None:
        merged[bias] = rows[:, -1].reshape(means[bias].shape).to(like[bias].dtype)
        rows = rows[:, :-1]
    merged[key] = (rows.T if turned else rows.reshape(means[key].shape)).to(like[key].dtype)
    return merged


def _bias_of(gram: Tensor, key: str, state: State, turned: bool) -> str | None:
    """Return the bias that a Gram matrix ``[G, K, K]`` solves for too, if any; StateError unless it fits."""
    weight, (groups, rows, _) = state[key], gram.shape
    width, outputs = (len(weight), weight.shape[1]) if turned else (weight[0].numel(), len(weight))
    bias = key.removesuffix("weight") + "bias" if rows == width + 1 else None
    if outputs % groups or rows not in (width, width + 1) or (bias is not None and bias not in state):
        found = f"the Gram matrix of '{key}' has {groups} groups of {rows} rows for {outputs} outputs, expected {width}"
        raise StateError(f"{found}, or {width + 1} with a bias; compute the Gram matrices of these experts")
    return bias


def _joint_map(state: State, key: str, bias: str | None, groups: int, turned: bool) -> Tensor:
    """Return a layer's weight and bias as one float64 map a group ``[G, C_out/G, K]``; `turned` from ``[K, C_out]``."""
    weight = (state[key].T if turned else state[key]).double().flatten(1)
    if bias is not None:
        weight = torch.cat([weight, state[bias].double()[:, None]], dim=1)
    return weight.reshape(groups, -1, weight.shape[1])
