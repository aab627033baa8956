"""The rule for `torch.nn.functional.linear`, at one position a sample or at many."""

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from coin.statistics.rules.call import Call, Site, squared_sums
from coin.statistics.rules.positions import add_direct, add_gram, contract_pairs, prefers_gram
from coin.statistics.sums import sum_type


class LinearCall(Call):
    """y = x Wᵀ + b over the last dimension of x [N, …, I].

    With one position a sample and S = Σ_v g²: weight += Sᵀ x², bias += Σ_n S. With T positions the sums over
    positions come before the squares, by the Gram or the direct rule.
    """

    def __init__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        self.inputs, self.weight, self.bias = inputs, weight, bias
        self._pairs: Tensor | None = None

    @override
    def output(self) -> Tensor:
        return F.linear(self.inputs, self.weight, self.bias)

    @override
    def input_gradient(self, g: Tensor) -> Tensor:
        return g @ self.weight

    @override
    def accumulate(self, g: Tensor, site: Site) -> None:
        if (bias := site.total("bias")) is not None:
            bias.add_(squared_sums(g, site.samples, -1))
        if (weight := site.total("weight")) is None:
            return
        rows = g.reshape(len(g), site.samples, -1, g.shape[-1])  # [V, B, T, O]
        if prefers_gram(rows.shape[2], len(g)):
            pairs = contract_pairs(rows)
            self._pairs = pairs if self._pairs is None else self._pairs.add_(pairs)
        else:
            inputs = self._positions(site)
            add_direct(weight[None], rows.transpose(2, 3), lambda n: inputs[None, n])

    @override
    def finish(self, site: Site) -> None:
        if self._pairs is not None:
            add_gram(site.totals[site.names["weight"]][None], self._pairs, self._positions(site))

    def _positions(self, site: Site) -> Tensor:
        """Return the inputs as [B, T, I], in the type of sums."""
        inputs = self.inputs.to(sum_type(self.inputs))
        return inputs.reshape(site.samples, -1, inputs.shape[-1])
