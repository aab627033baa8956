"""Plain averaging."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from coin.files.tensors import State
from coin.merging.experts import Experts
from coin.merging.method import MergeMethod, weighted_mean


class Average(MergeMethod):
    """The β-average of the experts' parameters, θ = Σ_i β_i θ_i.

    Source: Wortsman et al., *Model soups* (ICML 2022); the baseline of arXiv 2409.01420.
    """

    name = "average"

    def candidates(self, experts: Experts, row: Sequence[float]) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
        """Yield the one average."""
        yield {}, average_parameters(experts.parameters, row)


def average_parameters(experts: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return Σ_i β_i θ_i, summed in float64, in the experts' types."""
    return {key: weighted_mean(experts, weights, key).to(tensor.dtype) for key, tensor in experts[0].items()}
