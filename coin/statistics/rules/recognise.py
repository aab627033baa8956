"""Recognise a call of a ruled function from the function and its arguments."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coin.statistics.rules.broadcast import ExpandCall, ScaleCall, ShiftCall
from coin.statistics.rules.call import Call
from coin.statistics.rules.convolution import ConvolutionCall
from coin.statistics.rules.embedding import EmbeddingCall
from coin.statistics.rules.linear import LinearCall
from coin.statistics.rules.normalisation import BatchNormCall, GroupNormCall, LayerNormCall
from coin.statistics.rules.patches import Geometry

Recognised = tuple[Call, dict[str, Tensor]]
"""A call and the tensors in its roles ("weight", "bias")."""


def recognise(function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Recognised | None:
    """Return the call and its tensors by role, or None for whatever has no rule; None is never wrong, only slower."""
    reader = _READERS.get(function)
    return None if reader is None else reader(*arguments, **options)


def _roles(weight: Any, bias: Any = None) -> dict[str, Tensor]:
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Recognised | None:
    if input.ndim < 2 or weight.ndim != 2:
        return None
    return LinearCall(input.detach(), weight, bias), _roles(weight, bias)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Recognised | None:
    dims = weight.ndim - 2
    if input.ndim != weight.ndim:
        return None
    kernel, dilations = tuple(weight.shape[2:]), _sizes(dilation, dims)
    x = input.detach()
    if padding == "valid":
        sides = (0,) * dims
    elif padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        sides = tuple(total // 2 for total in totals)
        if any(total % 2 for total in totals):  # one more on the far side
            x = F.pad(x, [far for total in reversed(totals) for far in (0, total % 2)])
    else:
        sides = _sizes(padding, dims)
    geometry = Geometry(kernel, _sizes(stride, dims), sides, dilations, groups)
    return ConvolutionCall(x, weight, bias, geometry, tuple(input.shape[2:])), _roles(weight, bias)


def _sizes(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Recognised | None:
    if training or running_mean is None or running_var is None or weight is None:
        return None
    return BatchNormCall(input.detach(), running_mean, running_var, weight, bias, eps), _roles(weight, bias)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Recognised | None:
    if weight is None or input.ndim <= len(normalized_shape):
        return None
    return LayerNormCall(input.detach(), tuple(normalized_shape), weight, bias, eps), _roles(weight, bias)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Recognised | None:
    if weight is None:
        return None
    return GroupNormCall(input.detach(), num_groups, weight, bias, eps), _roles(weight, bias)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Recognised | None:
    if max_norm is not None or scale_grad_by_freq or sparse:
        return None
    return EmbeddingCall(input.detach(), weight, padding_idx), _roles(weight)


def _broadcast(kind: type[ScaleCall] | type[ShiftCall]) -> Callable[..., Recognised | None]:
    def read(first: Any, second: Any, **options: Any) -> Recognised | None:
        if options or not (isinstance(first, Tensor) and isinstance(second, Tensor)):
            return None
        if isinstance(first, nn.Parameter) == isinstance(second, nn.Parameter):
            return None
        weight, x = (first, second) if isinstance(first, nn.Parameter) else (second, first)
        if weight.dtype != x.dtype or weight.ndim > x.ndim or x.ndim < 2:
            return None
        aligned = (1,) * (x.ndim - weight.ndim) + tuple(weight.shape)
        if aligned[0] != 1 or any(size not in (1, full) for size, full in zip(aligned, x.shape, strict=True)):
            return None
        return kind(x.detach(), weight), _roles(weight)

    return read


def _expand(weight: Tensor, *sizes: Any) -> Recognised | None:
    if not isinstance(weight, nn.Parameter):
        return None
    expanded = weight.detach().expand(*sizes)
    if expanded.ndim == weight.ndim and weight.shape[0] != 1:
        return None
    return ExpandCall(expanded, weight), _roles(weight)


_READERS: dict[Any, Callable[..., Recognised | None]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.embedding: _embedding,
    **dict.fromkeys((torch.mul, Tensor.mul), _broadcast(ScaleCall)),
    **dict.fromkeys((torch.add, Tensor.add), _broadcast(ShiftCall)),
    Tensor.expand: _expand,
}
