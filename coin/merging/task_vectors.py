"""Data-free merges of task vectors, what each expert added to the shared initialisation; and that one itself."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coin.core.choices import check_number
from coin.core.progress import progress_bar
from coin.files.tensors import State, weighted_mean
from coin.merging.average import average_parameters
from coin.merging.closed_form import MergeMethod
from coin.merging.experts import Experts
from coin.merging.regmean import regmean_map
from coin.networks.batchnorm import BatchNormPolicy
from coin.networks.heads import head_weight
from coin.statistics.gram import linear_maps


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
        """Return the initialisation."""
        return experts.initial()[0]


class Wudi(MergeMethod):
    """RegMean with the task vectors' own Gram matrices: the closed form of WUDI-merging's objective, without data.

    With τ_i = W_i − W_0 a map's task vector, flattened to ``[C_out, K]``, the rows of τ_i span the inputs that its
    fine-tuning has seen, so that G_i = τ_iᵀτ_i / ‖τ_i‖² stands for the Gram matrix of expert i's inputs, and

        W = W_0 + (Σ_i β_i τ_i G_i)(Σ_i β_i G_i + λI)⁻¹

    is the minimiser of Σ_i β_i ‖(W − W_i) τ_iᵀ‖² / ‖τ_i‖²; λ as in `regmean_parameters`. All but fully connected layers
    and convolutions of one group is averaged, as are shared weights, maps that an expert has left as they were and,
    unless `head`, the head: task vectors that do not meet are added up, which suits features, but not coded outputs.

    Source: Cheng et al., *Whoever started the interference should end it* (ICML 2025), there by gradient descent.

    Args:
        damping: λ, relative and dimensionless, above 0. Transformers that were tuned far want more, such as 0.1.
        head: Whether the head is merged in this way too.
        **options: See `MergeMethod`.

    >>> coin.merge_networks(coin.Wudi(), experts, code, initial=torch.nn.Linear(4, 3)).passes
    0.0
    """

    name = "wudi"
    reads_initial = True

    def __init__(self, damping: float = 1e-4, *, head: bool = False, **options: Any) -> None:
        super().__init__(**options)
        check_number("damping", damping, low=0, strict=True)
        self.damping = damping
        self.head = head

    def parameters(self, experts: Experts, row: Sequence[float]) -> State:
        """Return the merge."""
        initial, _ = experts.initial()
        every = experts.parameters
        network = experts.empty_model()
        left_out = None if self.head else head_weight(network)
        merged = average_parameters(every, row)
        for name in progress_bar(self.label, items=linear_maps(network)):
            has_unchanged = any(torch.equal(expert[name], initial[name]) for expert in every)
            if has_unchanged or name == left_out:
                continue
            grams = (_delta_gram(expert[name], initial[name]) for expert in every)
            merged |= regmean_map(every, grams, row, name, alpha=1.0, damping=self.damping)
        return merged


def _delta_gram(weight: Tensor, start: Tensor) -> Tensor:
    """Return τᵀτ / ‖τ‖² ``[1, K, K]`` of a map's task vector."""
    delta = weight.double() - start.double()
    rows = delta.flatten(1)  # [C_out, K]
    gram = rows.T @ rows
    return (gram / rows.square().sum())[None]


class TaskArithmetic(MergeMethod):
    """θ = θ_0 + scale · N Σ_i β_i (θ_i − θ_0), with θ_0 the shared initialisation.

    With uniform weights this is the literature's θ_0 + scale · Σ_i (θ_i − θ_0). Scale 1/N gives the β-average.

    Source: Ilharco et al., *Editing models with task arithmetic* (ICLR 2023), section 2; 0.4 is its successors' scale
    where nothing is held out (Yadav et al., NeurIPS 2023, section 5).

    Args:
        scale: Dimensionless, finite.
        **options: See `MergeMethod`.

    >>> coin.merge_networks(coin.TaskArithmetic(), experts, code, initial=torch.nn.Linear(4, 3)).passes
    0.0
    """

    name = "task_arithmetic"
    reads_initial = True

    def __init__(self, scale: float = 0.4, **options: Any) -> None:
        super().__init__(**options)
        check_number("scale", scale)
        self.scale = scale

    def parameters(self, experts: Experts, row: Sequence[float]) -> State:
        """Return the sum."""
        initial, _ = experts.initial()
        every = experts.parameters
        merged = {}
        for key, start in initial.items():
            theta_0 = start.double()
            step = weighted_mean(every, row, key, torch.float64) - theta_0
            theta = theta_0 + self.scale * len(row) * step
            merged[key] = theta.to(every[0][key].dtype)
        return merged


class Ties(MergeMethod):
    """Trim, elect sign, disjoint merge of the task vectors τ_i = θ_i − θ_0.

    1. Trim: of each τ_i only the `keep` share of entries with the largest magnitude stays, over all parameters.
    2. Elect: an entry's sign is that of Σ_i β_i τ_i.
    3. Merge: θ = θ_0 + scale · Σ_{i∈A} β_i τ_i / Σ_{i∈A} β_i, A the experts whose trimmed entry has the elected sign.

    Source: Yadav et al., *TIES-merging* (NeurIPS 2023), algorithm 1, and its values where nothing is held out.

    Args:
        keep: Share of entries that the trim leaves, in (0, 1].
        scale: Dimensionless, finite.
        **options: See `MergeMethod`.

    >>> coin.merge_networks(coin.Ties(), experts, code, initial=torch.nn.Linear(4, 3)).passes
    0.0
    """

    name = "ties"
    reads_initial = True

    def __init__(self, keep: float = 0.2, scale: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        check_number("keep", keep, low=0, most=1, strict=True)
        check_number("scale", scale)
        self.keep = keep
        self.scale = scale

    def parameters(self, experts: Experts, row: Sequence[float]) -> State:
        """Return the merge."""
        initial, _ = experts.initial()
        return ties(experts.parameters, initial, row, self.keep, self.scale)


def ties(
    experts: Sequence[State], initial: State, weights: Sequence[float], keep: float, scale: float
) -> dict[str, Tensor]:
    """Return `Ties`' merge, in the experts' types."""
    thresholds = [_threshold(expert, initial, keep) for expert in experts]
    merged = {}
    for key, start in initial.items():
        theta_0 = start.double()
        steps = torch.stack([expert[key].double() - theta_0 for expert in experts])  # τ [N, …]
        one_each = (-1, *[1] * theta_0.ndim)  # the shape of a number for each expert
        limits = steps.new_tensor(thresholds).reshape(one_each)
        shares = steps.new_tensor(weights).reshape(one_each)  # β
        trimmed = steps.masked_fill(steps.abs() < limits, 0)
        elected = (shares * trimmed).sum(0).sign()
        agrees = (trimmed.sign() == elected) & (elected != 0)
        agreeing = shares * agrees
        share = agreeing.sum(0)
        total = (agreeing * trimmed).sum(0)
        step = total / share.masked_fill(share <= 0, 1)
        theta = theta_0 + scale * step
        merged[key] = theta.to(experts[0][key].dtype)
    return merged


def _threshold(expert: State, initial: State, keep: float) -> float:
    """Return the magnitude of the smallest entry of a task vector that the trim keeps."""
    parts = []
    for key, start in initial.items():
        delta = expert[key].double() - start.double()
        parts.append(delta.abs_().flatten())
    sizes = torch.cat(parts)
    kept = max(1, round(keep * len(sizes)))
    smallest, _ = sizes.kthvalue(len(sizes) - kept + 1)
    return float(smallest)
