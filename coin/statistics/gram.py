"""The Gram matrices of the inputs of linear maps, for RegMean."""

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from coin.core.batches import size_of
from coin.errors import StateError
from coin.networks.calling import as_input, logits_of
from coin.networks.guard import evaluating, trainable
from coin.statistics.intercept import Interceptor
from coin.statistics.rules import Call
from coin.statistics.rules.linear import LinearCall
from coin.statistics.sums import Sums, sum_type

_BLOCK = 1 << 24  # floats of unfolded patches formed at a time


def gram_sums(network: nn.Module, batches: Iterable[Any]) -> Sums:
    """Return, for every trainable weight of a linear map, the sum over samples of Σ_positions a aᵀ.

    Trainable is what requires gradients, or everything if nothing does. a is the input that the map multiplies at a
    position, in the order of ``weight.flatten(1)`` (for a convolution: the im2col patch of one group, zeros where it
    meets the padding), with a last entry 1 if the map has a trainable bias, named as the weight is.

    Arguments and errors are as of `fisher_sums`; a StateError where a weight is used with its bias and without it.
    Returns the sums by the weights' names, [G, K, K] with G groups and K = C_in/G · kernel entries, plus 1 for a bias.

    >>> coin.gram_sums(torch.nn.Linear(2, 1), [torch.tensor([[1.0, 2.0]])]).mean()["weight"].tolist()
    [[[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]]
    """
    parameters = trainable(network)
    values: dict[str, Tensor] = {}

    def visit(call: Call, names: dict[str, str], function: Callable[[], Tensor]) -> None:
        name = names.get("weight")
        if name is None or not isinstance(call, LinearCall):
            return
        own_bias = parameters.get(name.removesuffix("weight") + "bias")
        has_bias = call.bias is not None and call.bias is own_bias
        for a in _rows(call):
            if has_bias:
                ones = torch.ones_like(a[..., :1])
                a = torch.cat([a, ones], -1)
            columns = a.shape[2]
            if name not in values:
                values[name] = a.new_zeros(len(a), columns, columns)
            if len(values[name][0]) != columns:
                raise StateError(
                    f"'{name}' is used with its bias and without it, expected one way; give the uses own weights"
                )
            values[name].baddbmm_(a.mT, a)

    count = 0
    for batch in batches:
        inputs = as_input(batch, network)
        with evaluating(network, gradients=False), Interceptor(parameters, visit):
            logits_of(network, inputs)
        count += size_of(inputs)
    return Sums(values, count, float(count))


def _rows(call: LinearCall) -> Iterator[Tensor]:
    """Yield the rows that a map multiplies, [G, rows, K], those of a few samples at a time."""
    taps = prod(call.weight.shape[2:])  # of a convolution's kernel, else 1
    inputs = call.inputs.to(sum_type(call.inputs))
    samples = max(1, _BLOCK // max(1, taps * inputs[:1].numel()))
    for piece in torch.split(inputs, samples):
        if piece.numel() > 0:
            columns = call.patches(piece)  # [G, rows, taps · C/G]
            by_tap = columns.view(*columns.shape[:2], taps, -1)
            yield by_tap.mT.flatten(2)
