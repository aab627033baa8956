"""The rule for `torch.nn.functional.embedding`."""

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from coin.statistics.rules.call import Call, Site


class EmbeddingCall(Call):
    """y = weight[tokens]: per sample, a token's cotangents are summed over its places before they are squared."""

    def __init__(self, inputs: Tensor, weight: Tensor, padding: int | None) -> None:
        self.inputs, self.weight, self.padding = inputs, weight, padding

    @override
    def output(self) -> Tensor:
        return F.embedding(self.inputs, self.weight, self.padding)

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
