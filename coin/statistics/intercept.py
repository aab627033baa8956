"""Intercept every call of a function with a layer rule while a network runs, from any module."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coin.statistics.attention import self_attention
from coin.statistics.rules import Call
from coin.statistics.rules.convolution import ConvolutionCall, DepthwiseCall, Geometry
from coin.statistics.rules.elementwise import batch_norm, expand, group_norm, layer_norm, multiply
from coin.statistics.rules.linear import EmbeddingCall, LinearCall

Visit = Callable[[Call, dict[str, str], Callable[[], Tensor]], Tensor | None]
"""(call, role → parameter's name, the function itself) → its output; None has the function called."""


class Interceptor(TorchFunctionMode):
    """Hands the calls of ruled functions whose weight is a trainable parameter of the network to a visitor.

    Functions are watched, not modules: Swin uses weights without those.
    """

    def __init__(self, parameters: Mapping[str, Tensor], visit: Visit) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._visit = visit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = partial(func, *args, **(kwargs or {}))
        output: Any
        if func is F.multi_head_attention_forward:
            with self:  # the projections inside are calls like any other
                output = self_attention(*args, **function.keywords)
        else:
            output = self._visited(function)
        return function() if output is None else output

    def _visited(self, function: partial[Any]) -> Tensor | None:
        """Return what the visitor makes of a ruled call; None of other calls, or of those in a form without a rule."""
        reader = _READERS.get(function.func)
        if reader is None:
            return None
        try:
            call = reader(*function.args, **function.keywords)
        except TypeError:  # other arguments than the reader knows
            return None
        if call is None or call.weight.numel() == 0:
            return None
        for role, tensor in (("weight", call.weight), ("bias", call.bias)):
            if id(tensor) in self._names:
                call.names[role] = self._names[id(tensor)]
            elif tensor is not None and tensor.requires_grad:
                return None  # it was made of something trainable, and must stay in autograd's hands
        return self._visit(call, call.names, function) if call.names else None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:
    if input.ndim < 2 or weight.ndim != 2 or isinstance(input, nn.Parameter):
        return None
    return LinearCall(input, weight, bias)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Call | None:
    if input.ndim != weight.ndim:
        return None
    dims = weight.ndim - 2
    kernel = tuple(weight.shape[2:])
    dilations = _sizes(dilation, dims)
    if padding == "same":
        totals = [dilations[dim] * (size - 1) for dim, size in enumerate(kernel)]
        padding = [total // 2 for total in totals]
        if any(total % 2 for total in totals):  # one more on the far side
            return None
    if padding == "valid":
        padding = 0
    sides = _sizes(padding, dims)
    geometry = Geometry(kernel, _sizes(stride, dims), sides, dilations, groups)
    is_depthwise = groups == len(weight) == input.shape[1] > 1
    rule = DepthwiseCall if is_depthwise else ConvolutionCall
    return rule(input, weight, bias, geometry=geometry)


def _sizes(value: Any, dims: int) -> tuple[int, ...]:
    """Return a convolution's option, a number or some, for every spatial dimension."""
    values = (value,) if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        return values * dims
    return values


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, **options: Any
) -> Call | None:
    if options["max_norm"] is not None or options["scale_grad_by_freq"] or options["sparse"]:
        return None
    return EmbeddingCall(input, weight, None, padding_idx)


_READERS: dict[Any, Callable[..., Call | None]] = {
    F.linear: _linear,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.embedding: _embedding,
    torch.mul: multiply,
    Tensor.mul: multiply,
    torch.add: partial(multiply, added=True),
    Tensor.add: partial(multiply, added=True),
    Tensor.expand: expand,
}
