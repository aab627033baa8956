"""The Gram matrices of the inputs of linear maps, for RegMean."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from coin.inputs import as_input
from coin.statistics.guard import evaluating, trainable
from coin.statistics.intercept import Interceptor
from coin.statistics.rules import Call
from coin.statistics.rules.convolution import ConvolutionCall
from coin.statistics.rules.linear import LinearCall
from coin.statistics.sums import Sums, sum_type

_BLOCK = 1 << 24
"""Floats of unfolded patches formed at a time."""


def gram_sums(
    network: nn.Module,
    batches: Iterable[Tensor],
    *,
    progress: Callable[[int], None] | None = None,
) -> Sums:
    """Return, for every trainable weight of a linear map, the sum over samples of Σ_positions a aᵀ.

    a is the input that the map multiplies at a position, in the order of ``weight.flatten(1)`` (for a convolution: the
    im2col patch of one group, zeros where it meets the padding), with a last entry 1 if the map has a bias.

    Args:
        network: Maps [B, …] to any output; run in eval mode and left as found.
        batches: Input batches [B, …].
        progress: Called with the number of samples after every batch.

    Returns:
        Sums of weight name → [G, K, K] with G groups and K = C_in/G · kernel entries, plus 1 for a bias; a map that is
        called more than once has the sum over its calls. Without any batch there are no names.

    Raises:
        ConfigurationError: No parameter requires a gradient.
    """
    values: dict[str, Tensor] = {}
    count = 0

    def visit(call: Call, names: dict[str, str], source: Any) -> None:
        name = names.get("weight")
        if name is None:
            return
        if isinstance(call, LinearCall):
            a = call.inputs.reshape(-1, 1, call.inputs.shape[-1])
            _add(values, name, a, call.bias is not None)
        elif isinstance(call, ConvolutionCall):
            for a in _patches(call):
                _add(values, name, a, call.bias is not None)

    with evaluating(network, gradients=False):
        parameters = trainable(network)
        for batch in batches:
            inputs = as_input(batch, network)
            with Interceptor(parameters, visit):
                network(inputs)
            count += len(inputs)
            if progress is not None:
                progress(len(inputs))
    return Sums(values, count, float(count))


def _patches(call: ConvolutionCall) -> Iterable[Tensor]:
    """Yield the patches [rows, G, C/G · kernel] of a convolution, a few samples at a time."""
    geometry, x = call.geometry, call.inputs
    dims = len(geometry.kernel)
    positions = torch.Size(geometry.output_size(tuple(x.shape[2:]))).numel()
    step = max(1, _BLOCK // (positions * geometry.number_of_taps * x.shape[1]))
    for piece in torch.split(x, step):
        patches = geometry.patches(piece).movedim(-1, 1 + dims)  # [b, *output, C, *kernel]
        yield patches.reshape(len(piece) * positions, geometry.groups, -1)


def _add(values: dict[str, Tensor], name: str, a: Tensor, bias: bool) -> None:
    """Add Σ_rows a aᵀ for a [rows, G, K], in float32 at least."""
    a = a.to(sum_type(a))
    if bias:
        a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], -1)
    columns = a.permute(1, 0, 2)  # [G, rows, K]
    if name in values:
        values[name].baddbmm_(columns.mT, columns)
    else:
        values[name] = torch.bmm(columns.mT, columns)
