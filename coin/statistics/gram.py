"""The Gram matrices of the inputs of linear maps, for RegMean."""

from collections import Counter
from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coin.core.batches import size_of
from coin.networks.calling import Forward, as_input, called_by
from coin.networks.guard import evaluating, trainable
from coin.statistics.intercept import Interceptor
from coin.statistics.rules import Call
from coin.statistics.rules.convolution import ConvolutionCall
from coin.statistics.rules.linear import LinearCall
from coin.statistics.sums import TRANSPOSED, Sums, sum_type

_BLOCK = 1 << 24  # floats of unfolded patches formed at a time


def gram_sums(
    network: nn.Module, batches: Iterable[Any], *, progress: Callable[[int], None] | None = None,
    forward: Forward | None = None,
) -> Sums:  # fmt: skip
    """Return, for every trainable weight of a linear map, the sum over samples of Σ_positions a aᵀ.

    Trainable is what requires gradients, or everything if nothing does. a is the input that the map multiplies at a
    position, in the order of ``weight.flatten(1)`` (for a convolution: the im2col patch of one group, zeros where it
    meets the padding), with a last entry 1 if the map has a trainable bias, named as the weight is.

    Arguments and errors are as of `fisher_sums`. Returns the sums by the weights' names, [G, K, K] with G groups and
    K = C_in/G · kernel entries, plus 1 for a bias; a weight [in, out], which multiplies as x @ W, by its name and
    `TRANSPOSED`.

    >>> coin.gram_sums(torch.nn.Linear(2, 1), [torch.tensor([[1.0, 2.0]])]).mean()["weight"].tolist()
    [[[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]]
    """
    network, count = called_by(network, forward), 0
    parameters, values = trainable(network), dict[str, Tensor]()

    def visit(call: Call, names: dict[str, str], function: Callable[[], Tensor]) -> None:
        name = names.get("weight")
        if name is None or not isinstance(call, LinearCall) or call.inputs.numel() == 0:
            return
        bias = call.bias is not None and call.bias is parameters.get(name.removesuffix("weight") + "bias")
        for a in _rows(call):
            _add(values, name + TRANSPOSED if call.transposed else name, a, bias)

    for batch in batches:
        inputs = as_input(batch, network)
        with evaluating(network, gradients=False), Interceptor(parameters, visit):
            network(inputs)
        count += size_of(inputs)
        if progress is not None:
            progress(size_of(inputs))
    return Sums(values, count, float(count))


def _rows(call: LinearCall) -> Iterable[Tensor]:
    """Yield what a map multiplies, [rows, G, K]; the patches of a convolution a few samples at a time."""
    if not isinstance(call, ConvolutionCall):
        yield call.inputs.reshape(-1, 1, call.inputs.shape[-1])
        return
    geometry, x = call.geometry, call.inputs
    positions = prod(geometry.output_size(tuple(x.shape[2:])))
    for piece in torch.split(x, max(1, _BLOCK // (positions * prod(geometry.kernel) * x.shape[1]))):
        patches = geometry.patches(piece).movedim(-1, 1 + len(geometry.kernel))  # [b, *output, C, *kernel]
        yield patches.reshape(len(piece) * positions, geometry.groups, -1)


def _add(values: dict[str, Tensor], name: str, a: Tensor, bias: bool) -> None:
    """Add Σ_rows a aᵀ for a [rows, G, K], in float32 at least."""
    a = a.to(sum_type(a))
    if bias:
        a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], -1)
    if name in values and (further := values[name].shape[-1] - a.shape[-1]):  # called with a bias and without
        a = F.pad(a, (0, max(0, further)))
        values[name] = F.pad(values[name], (0, max(0, -further)) * 2)
    columns = a.permute(1, 0, 2)  # [G, rows, K]
    values[name] = values[name].baddbmm_(columns.mT, columns) if name in values else torch.bmm(columns.mT, columns)


def linear_maps(network: nn.Module) -> list[str]:
    """Return the weights of fully connected layers and convolutions of one group; Conv1D's end in `TRANSPOSED`."""
    uses = Counter(id(parameter) for module in network.modules() for parameter in module._parameters.values())
    found = []
    for prefix, module in network.named_modules():
        turned, packed = type(module).__name__ == "Conv1D", isinstance(module, nn.MultiheadAttention)
        plain = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and getattr(module, "groups", 1) == 1
        for key, weight in module.named_parameters(prefix, recurse=False):
            wanted = key.endswith("proj_weight") if packed else key.endswith("weight") and (plain or turned)
            if wanted and weight.is_floating_point() and uses[id(weight)] == 1:
                found.append(key + (TRANSPOSED if turned else ""))
    return found
