"""Recognise a call of a ruled function from the function and its arguments."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coin.statistics.rules.broadcast import ScaleCall, ShiftCall
from coin.statistics.rules.call import Call
from coin.statistics.rules.convolution import ConvolutionCall, Geometry
from coin.statistics.rules.linear import EmbeddingCall, LinearCall
from coin.statistics.rules.normalisation import BatchNormCall, SliceNormCall

Recognised = tuple[Call, dict[str, Tensor], Tensor | None]
"""A call, the tensors in its roles ("weight", "bias"), and its input if that may have a gradient."""


def recognise(function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Recognised | None:
    """Return the call, its tensors by role and its input, or None for whatever has no rule, which is only slower."""
    reader = _READERS.get(function)
    if reader is None:
        return None
    try:
        inspect.signature(reader).bind(*arguments, **options)
    except TypeError:  # a form of the call that no reader knows
        return None
    return reader(*arguments, **options)


def reached_tensors(output: Tensor) -> set[int]:
    """Return the ids of the leaf tensors in the graph behind an output."""
    found: set[int] = set()
    seen: set[Any] = set()
    stack: list[Any] = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack.extend(following for following, _ in node.next_functions)
    return found


def _roles(weight: Any, bias: Any = None) -> dict[str, Tensor]:
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Recognised | None:
    if input.ndim < 2 or weight.ndim != 2 or isinstance(input, nn.Parameter):
        return None
    parameter, transposed = _matrix(weight)
    return LinearCall(input.detach(), weight, bias, transposed), _roles(parameter, bias), input


def _matrix(weight: Tensor) -> tuple[Tensor, bool]:
    """Return the matrix that a weight is a view of, and whether as its transpose; another's part is its own matrix."""
    base = weight._base
    if base is None or not base.is_leaf or base.ndim != 2 or base.dtype != weight.dtype:
        return weight, False
    if torch.is_grad_enabled() and reached_tensors(weight) != {id(base)}:  # made where there were no gradients
        return weight, False

    def layout(t: Tensor) -> tuple[Any, ...]:
        return t.shape, t.stride(), t.storage_offset()

    matches = [transposed for transposed in (False, True) if layout(base.mT if transposed else base) == layout(weight)]
    return (base, matches[0]) if matches else (weight, False)


def _matmul(input: Tensor, other: Any = None, mat2: Any = None, **options: Any) -> Recognised | None:
    matrix = other if mat2 is None else mat2
    return None if options or matrix.ndim != 2 else _linear(input, matrix.mT)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **options: Any) -> Recognised | None:
    return None if options or input.shape != mat2.shape[1:] else _linear(mat1, mat2.mT, input)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
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
    return ConvolutionCall(x, weight, bias, geometry, tuple(input.shape[2:])), _roles(weight, bias), input


def _sizes(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


# The functions below are written in Python and hand on their options by name, however they were called.


def _batch_norm(
    input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, **options: Any
) -> Recognised | None:
    if options["training"] or running_mean is None or running_var is None or weight is None:
        return None
    return BatchNormCall(input.detach(), running_mean, running_var, weight, options["eps"]), _roles(weight, bias), input


def _layer_norm(input: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Recognised | None:
    if weight is None or input.ndim <= len(shape):
        return None
    slices = (*input.shape[: -weight.ndim], weight.numel())
    return SliceNormCall(input.detach(), weight, eps, slices, channels=False), _roles(weight, bias), input


def _group_norm(input: Tensor, num_groups: int, weight: Any, bias: Any, eps: float) -> Recognised | None:
    if weight is None:
        return None
    slices = (len(input), num_groups, input[0].numel() // num_groups)
    return SliceNormCall(input.detach(), weight, eps, slices, channels=True), _roles(weight, bias), input


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, **options: Any) -> Recognised | None:
    if options["max_norm"] is not None or options["scale_grad_by_freq"] or options["sparse"]:
        return None
    return EmbeddingCall(input.detach(), weight, padding_idx), _roles(weight), None


def _broadcast(kind: type[ScaleCall] | type[ShiftCall]) -> Callable[..., Recognised | None]:
    def read(input: Any, other: Any, **options: Any) -> Recognised | None:
        if options or not (isinstance(input, Tensor) and isinstance(other, Tensor)):
            return None
        if isinstance(input, nn.Parameter) == isinstance(other, nn.Parameter):
            return None
        weight, x = (input, other) if isinstance(input, nn.Parameter) else (other, input)
        if weight.dtype != x.dtype or weight.ndim > x.ndim or x.ndim < 2:
            return None
        aligned = (1,) * (x.ndim - weight.ndim) + tuple(weight.shape)
        if aligned[0] != 1 or any(size not in (1, full) for size, full in zip(aligned, x.shape, strict=True)):
            return None
        return kind(x.detach(), weight), _roles(weight), x

    return read


def _expand(weight: Tensor, *sizes: Any, size: Any = None, **options: Any) -> Recognised | None:
    if options or not isinstance(weight, nn.Parameter):
        return None
    expanded = weight.detach().expand(*(sizes if size is None else size))
    if expanded.ndim == weight.ndim and weight.shape[0] != 1:
        return None
    return ShiftCall(expanded, weight), _roles(weight), None


_READERS: dict[Any, Callable[..., Recognised | None]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.embedding: _embedding,
    **dict.fromkeys((torch.mul, Tensor.mul), _broadcast(ScaleCall)),
    **dict.fromkeys((torch.add, Tensor.add), _broadcast(ShiftCall)),
    Tensor.expand: _expand,
}
