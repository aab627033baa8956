"""The β-average with its last layer fitted to the coding objective, in closed form."""

import torch
from torch import Tensor

from coin.coding import fit_ridge
from coin.errors import StateError
from coin.merging.inputs import MergeInputs, Requirement
from coin.merging.method import MergeMethod, weighted_mean
from coin.networks.batchnorm import BatchNormPolicy


class HeadFit(MergeMethod):
    """The β-average below the head, and the head that reads Σ_i β_i f_i out of its features.

    With φ(x) the averaged network's features and (W̄, b̄) the averaged head, the head becomes (W̄ + ΔW, b̄ + Δb), where
    ΔW φ + Δb is the ridge regression of the residual Σβ_if_i − (W̄φ + b̄) on the calibration samples, its ridge chosen by
    leave-one-out (`fit_ridge`). The ridge pulls towards the averaged head, so experts that agree keep theirs. It costs
    one forward pass of each network and one singular value decomposition; no Fisher, no labels.

    BatchNorm statistics are those of the feature map, and changing them afterwards undoes the fit: the policy is
    ``keep``.

    Args:
        batchnorm: Policy for BatchNorm statistics.
        label: Name of this variant in results.
    """

    name = "head_fit"
    requires = frozenset({Requirement.FEATURES})

    def __init__(self, *, batchnorm: BatchNormPolicy = BatchNormPolicy.keep, label: str | None = None) -> None:
        super().__init__(batchnorm=batchnorm, label=label)

    def _merge(self, inputs: MergeInputs, weights: tuple[float, ...]) -> dict[str, Tensor]:
        assert inputs.features is not None
        assert inputs.expert_outputs is not None
        experts = inputs.experts
        merged = {key: weighted_mean(experts, weights, key).to(tensor.dtype) for key, tensor in experts[0].items()}
        weight, bias = f"{inputs.features.head}.weight", f"{inputs.features.head}.bias"
        if weight not in merged or bias not in merged or merged[weight].ndim != 2:
            raise StateError(
                f"method '{self.label}' needs a fully connected head with a bias, found none in '{weight}'; leave the "
                "method out for this network"
            )
        features = inputs.features.features(merged).double()
        target = torch.tensordot(inputs.expert_outputs.new_tensor(weights), inputs.expert_outputs, dims=1).double()
        fit = fit_ridge(features, target - (features @ merged[weight].double().T + merged[bias].double()))
        step = fit.coefficients.T
        merged[weight] = (merged[weight].double() + step).to(merged[weight].dtype)
        merged[bias] = (merged[bias].double() + fit.target_mean - step @ fit.input_mean).to(merged[bias].dtype)
        return merged
