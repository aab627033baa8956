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
from coin.statistics.rules.convolution import ConvolutionCall
from coin.statistics.rules.linear import LinearCall
from coin.statistics.sums import Sums, sum_type

_BLOCK = 1 << 24  # floats of unfolded patches formed at a time


def gram_sums(
    network: nn.Module,
    batches: Iterable[Any],
    *,
    progress: Callable[[int], object] | None = None,
) -> Sums:
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
        if call.inputs.numel() == 0:
            return
        own_bias = parameters.get(name.removesuffix("weight") + "bias")
        has_bias = call.bias is not None and call.bias is own_bias
        for a in _rows(call):
            if has_bias:
                ones = torch.ones_like(a[..., :1])
                a = torch.cat([a, ones], -1)
            _add(values, name, a)

    count = 0
    for batch in batches:
        inputs = as_input(batch, network)
        with evaluating(network, gradients=False), Interceptor(parameters, visit):
            logits_of(network, inputs)
        samples = size_of(inputs)
        count += samples
        if progress is not None:
            progress(samples)
    return Sums(values, count, float(count))


def _rows(call: LinearCall) -> Iterator[Tensor]:
    """Yield what a map multiplies, [rows, G, K]; the patches of a convolution a few samples at a time."""
    x = call.inputs.to(sum_type(call.inputs))
    if not isinstance(call, ConvolutionCall):
        yield x.reshape(-1, 1, x.shape[-1])
        return
    geometry = call.geometry
    dims = len(geometry.kernel)
    positions = call.places
    floats = positions * prod(geometry.kernel) * x.shape[1]  # of one sample's patches
    samples = max(1, _BLOCK // floats)
    for piece in torch.split(x, samples):
        patches = geometry.patches(piece)  # [b, *output, *kernel, C]
        rows = patches.movedim(-1, 1 + dims)  # [b, *output, C, *kernel]
        yield rows.reshape(len(piece) * positions, geometry.groups, -1)


def _add(values: dict[str, Tensor], name: str, a: Tensor) -> None:
    """Add Σ_rows a aᵀ for a [rows, G, K]."""
    columns = a.permute(1, 0, 2)  # [G, rows, K]
    if name not in values:
        values[name] = torch.bmm(columns.mT, columns)
    elif len(values[name][0]) == a.shape[-1]:
        values[name].baddbmm_(columns.mT, columns)
    else:
        raise StateError(
            f"'{name}' is used with its bias and without it, expected one way; give the uses own weights"
        )
