"""The rules for `torch.nn.functional.linear` and products like it, and for `embedding`, its like on one-hot rows."""

import torch
from torch import Tensor
from typing_extensions import override

from coin.statistics.rules.call import Call, Site, squared_sums
from coin.statistics.rules.positions import add_direct, add_gram, contract_pairs, prefers_gram
from coin.statistics.sums import sum_type


class LinearCall(Call):
    """y = x Wᵀ + b over the last dimension of x [N, …, I].

    With one position a sample and S = Σ_v g²: weight += Sᵀ x², bias += Σ_n S. With T positions the sums over
    positions come before the squares, by the Gram or the direct rule.

    Args:
        inputs: x.
        weight: W [O, I].
        bias: b [O].
        transposed: Whether the parameter is not W but its transpose [I, O], as in x @ parameter.
    """

    def __init__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> None:
        self.inputs, self.weight, self.bias, self.transposed = inputs, weight, bias, transposed
        self.reads_input = weight.requires_grad
        self._pairs: Tensor | None = None

    @override
    def input_gradient(self, g: Tensor) -> Tensor:
        return g @ self.weight

    @override
    def accumulate(self, g: Tensor, site: Site) -> None:
        if (bias := site.total("bias")) is not None:
            bias.add_(squared_sums(g, site.samples, -1))
        if "weight" not in site.names:
            return
        rows = g.reshape(len(g), site.samples, -1, g.shape[-1])  # [V, B, T, O]
        if prefers_gram(rows.shape[2], len(g)):
            pairs = contract_pairs(rows)
            self._pairs = pairs if self._pairs is None else self._pairs.add_(pairs)
        else:
            inputs = self._positions(site)
            add_direct(self._total(site), rows.transpose(2, 3), lambda n: inputs[None, n])

    @override
    def finish(self, site: Site) -> None:
        if self._pairs is not None:
            add_gram(self._total(site), self._pairs, self._positions(site))

    def _total(self, site: Site) -> Tensor:
        """Return the weight's accumulator as [1, O, I]."""
        total = site.totals[site.names["weight"]]
        return (total.mT if self.transposed else total)[None]

    def _positions(self, site: Site) -> Tensor:
        """Return the inputs as [B, T, I], in the type of sums."""
        inputs = self.inputs.to(sum_type(self.inputs))
        return inputs.reshape(site.samples, -1, inputs.shape[-1])


class EmbeddingCall(Call):
    """y = weight[tokens]: per sample, a token's cotangents are summed over its places before they are squared."""

    def __init__(self, inputs: Tensor, weight: Tensor, padding: int | None) -> None:
        self.inputs, self.weight, self.padding = inputs, weight, padding

    @override
    def input_gradient(self, g: Tensor) -> Tensor:
        raise AssertionError("tokens have no gradient")

    @override
    def accumulate(self, g: Tensor, site: Site) -> None:
        if (weight := site.total("weight")) is None:
            return
        v, width = len(g), weight.shape[1]
        tokens = self.inputs.reshape(site.samples, -1)
        cotangents = g.reshape(v, site.samples, -1, width)
        for n in range(site.samples):
            found, places = torch.unique(tokens[n], return_inverse=True)
            sums = cotangents.new_zeros(v, len(found), width).index_add_(1, places, cotangents[:, n])
            squares = torch.square(sums).sum(0)
            if self.padding is not None:
                squares[found == self.padding % len(self.weight)] = 0  # the padding token gets no gradient
            weight.index_add_(0, found, squares)
