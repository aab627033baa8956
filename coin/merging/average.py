"""Plain averaging."""

from torch import Tensor

from coin.merging.inputs import MergeInputs
from coin.merging.method import MergeMethod, weighted_mean


class Average(MergeMethod):
    """The β-average of the experts' parameters, θ = Σ_i β_i θ_i.

    Source: Wortsman et al., *Model soups* (ICML 2022); the baseline of arXiv 2409.01420.

    Args:
        batchnorm: Policy for BatchNorm statistics.
        label: Name of this variant in results.
    """

    name = "average"

    def _merge(self, inputs: MergeInputs, weights: tuple[float, ...]) -> dict[str, Tensor]:
        experts = inputs.experts
        return {key: weighted_mean(experts, weights, key).to(tensor.dtype) for key, tensor in experts[0].items()}
