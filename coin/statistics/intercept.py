"""Intercept every call of a function with a layer rule while a network runs, from any module."""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coin.core.batches import tensors_in
from coin.statistics.rules import Call
from coin.statistics.rules.convolution import ConvolutionCall, DepthwiseCall, Geometry
from coin.statistics.rules.elementwise import batch_norm, expand, group_norm, layer_norm, multiply
from coin.statistics.rules.linear import EmbeddingCall, LinearCall

Visit = Callable[[Call, dict[str, str], Callable[[], Tensor]], Tensor | None]

# Functions by which values can decide where a row goes; those that work in place have the same names.
_DECIDING = {"sort", "argsort", "topk", "kthvalue", "median", "mode", "msort", "unique", "unique_consecutive", "argmax"}
_DECIDING |= {"argmin", "one_hot", "nonzero", "argwhere", "multinomial", "bucketize", "searchsorted", "tolist", "item"}
_DECIDING |= {"__bool__", "__int__", "__float__", "__index__", "sign", "sgn", "heaviside", "round", "floor", "ceil"}
_DECIDING |= {"trunc", "numpy", "eq", "ne", "lt", "le", "gt", "ge", "repeat_interleave", "masked_select"}
_DECIDING |= {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
# Comparisons and rounding: their results may also be factors that leave every row where it is.
_COMPARING = {"eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "sign"}
_COMPARING |= {"sgn", "heaviside", "round", "floor", "ceil", "trunc"}
# Functions whose results' entries are of the arguments' entries in the same place, or attention under a mask.
_IN_PLACE = {"where", "masked_fill", "mul", "multiply", "add", "sub", "subtract", "div", "divide", "true_divide", "pow"}
_IN_PLACE |= {"maximum", "minimum", "clamp", "clamp_min", "clamp_max", "lerp", "addcmul", "addcdiv", "rsub"}
_IN_PLACE |= {"scaled_dot_product_attention", "multi_head_attention_forward"}
_IN_PLACE |= {f"__{kind}{name}__" for kind in ("", "r", "i") for name in ("mul", "add", "sub", "truediv", "div", "pow")}
_LIKE = {"type_as", "to", "expand_as", "view_as", "reshape_as"}  # of which the first argument alone gives values
_FOLLOWED = "_coin_followed"  # an attribute of tensors that are made of parameters
_DECISION = "_coin_decision"  # and of these, of what a comparison of them makes, before it meets others
_ATTENTION = inspect.signature(F.multi_head_attention_forward)


class Interceptor(TorchFunctionMode):
    """Hands the calls of ruled functions whose weight is a trainable parameter of the network to a visitor.

    Functions are watched, not modules: Swin uses weights without those. If `follow`, `sorts` says whether values
    may decide where a row goes, and `reads` how many functions read a node's output, detached or not.
    """

    def __init__(self, parameters: Mapping[str, Tensor], visit: Visit, *, follow: bool = False) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._visit, self._follow, self._decided, self.sorts = visit, follow, False, False
        self.reads: Counter[Any] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if not self._follow:
            return self._call(func, args, options)
        given = tensors_in((args, options))
        name = getattr(func, "__name__", "")
        name = name if name.endswith("__") else name.removesuffix("_")
        followed = [each for each in given if hasattr(each, _FOLLOWED)]
        if name in _LIKE:
            followed = [each for each in followed if each is args[0]]
        decisions = [each for each in followed if hasattr(each, _DECISION)]
        compares, in_place = name in _COMPARING, name in _IN_PLACE
        if name == "__setitem__":  # a number, in the places of a mask
            in_place = not tensors_in(args[2:])
        if name in _DECIDING or (name == "__getitem__" and _picks(*args)):
            self.sorts = True
        # By parameters, which differ between networks: at once, or where a comparison's result meets other activations.
        if name == "__getitem__":
            places = any(hasattr(each, _FOLLOWED) for each in tensors_in(_index(args[1])))
        elif decisions and len(followed) > 1:
            places = not in_place and not compares
        else:
            places = bool(followed) and name in _DECIDING and not compares
        self._decided = self._decided or places
        result = self._call(func, args, options)
        made = [each for each in tensors_in(result) if not isinstance(each, nn.Parameter)]
        self.reads.update(each.grad_fn for each in given if made)
        is_decision = bool(followed) and (compares or len(decisions) == len(followed))
        for each in made:
            if followed or any(isinstance(one, nn.Parameter) for one in given):
                setattr(each, _FOLLOWED, True)
            is_discrete = not (each.is_floating_point() or each.is_complex())
            if is_decision or (followed and is_discrete):
                setattr(each, _DECISION, True)
        return result

    def _call(self, func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Return what a function returns; a ruled call is handed to the visitor."""
        output: Any = None
        if func is F.multi_head_attention_forward:
            with self:  # the projections inside are calls like any other
                output = _self_attention(args, options)
        else:
            call = None
            with suppress(TypeError):  # called in a form that the reader does not know
                call = _READERS[func](*args, **options) if func in _READERS else None
            if call is not None:
                names = {role: self._names[id(t)] for role, t in call.roles.items() if id(t) in self._names}
                # A weight or bias that was computed from something trainable must stay in autograd's hands.
                foreign = any(t.requires_grad and id(t) not in self._names for t in call.roles.values())
                if names and not foreign and len(set(names.values())) == len(names) and call.weight.numel():
                    call.decided = self._decided
                    output = self._visit(call, names, lambda: func(*args, **options))
        return func(*args, **options) if output is None else output


def _picks(source: Tensor, at: Any) -> bool:
    """Say whether an index is made of values, other than into a table of parameters."""
    return bool(tensors_in(_index(at))) and not isinstance(source, nn.Parameter)


def _index(at: Any) -> list[Any]:
    """Return the parts of an index, of slices their ends."""
    parts = at if type(at) is tuple else [at]
    return [(part.start, part.stop) if isinstance(part, slice) else part for part in parts]


def leaves(output: Tensor) -> set[int]:
    """Return the ids of the leaf tensors in the graph behind an output."""
    seen: set[Any] = {None}
    stack: list[Any] = [output.grad_fn]
    while stack:
        if (node := stack.pop()) not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return {id(node.variable) for node in seen if hasattr(node, "variable")}


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:
    if input.ndim < 2 or weight.ndim != 2 or isinstance(input, nn.Parameter):
        return None
    return LinearCall(input, weight, bias, *_matrix(weight))


def _matrix(weight: Tensor) -> tuple[Tensor, bool]:
    """Return the matrix that a weight is a view of, and whether as its transpose; another's part is its own matrix."""
    base = weight._base
    if base is not None and base.is_leaf and base.ndim == 2 and base.dtype == weight.dtype:
        if torch.is_grad_enabled() and leaves(weight) != {id(base)}:  # made where there were no gradients
            return weight, False
        for view, transposed in ((base, False), (base.mT, True)):
            if view.is_set_to(weight):
                return base, transposed
    return weight, False


def _matmul(input: Tensor, other: Any = None, mat2: Any = None) -> Call | None:
    matrix = other if mat2 is None else mat2
    return _linear(input, matrix.mT) if matrix.ndim == 2 else None


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor) -> Call | None:
    return _linear(mat1, mat2.mT, input) if input.shape == mat2.shape[1:] else None


def _convolution(
    input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Call | None:  # fmt: skip
    if input.ndim != weight.ndim:
        return None
    dims = weight.ndim - 2
    kernel, dilations = tuple(weight.shape[2:]), _sizes(dilation, dims)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        sides = tuple(total // 2 for total in totals)
        if any(total % 2 for total in totals):  # one more on the far side
            input = F.pad(input, [far for total in reversed(totals) for far in (0, total % 2)])
    else:
        sides = _sizes(0 if padding == "valid" else padding, dims)
    geometry = Geometry(kernel, _sizes(stride, dims), sides, dilations, groups)
    rule = DepthwiseCall if groups == len(weight) == input.shape[1] > 1 else ConvolutionCall
    return rule(input, weight, bias, geometry=geometry)


def _sizes(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, **options: Any) -> Call | None:
    if options["max_norm"] is not None or options["scale_grad_by_freq"] or options["sparse"]:
        return None
    return EmbeddingCall(input, weight, None, padding_idx)


def _self_attention(arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
    """Spell out `torch.nn.functional.multi_head_attention_forward` for self-attention [T, B, E], under masks or not.

    Its projections are then ordinary linear calls with the samples first. None stands for every other form.
    """
    bound = _ATTENTION.bind(*arguments, **options)
    bound.apply_defaults()
    a = bound.arguments
    query, mask, padding, causal = (a[name] for name in ("query", "attn_mask", "key_padding_mask", "is_causal"))
    plain = query is a["key"] and query is a["value"] and query.ndim == 3 and a["in_proj_weight"] is not None
    extras = any(a[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v")) or a["add_zero_attn"]
    if not plain or extras or (a["training"] and a["dropout_p"] > 0) or (causal and mask is None):
        return None
    x = query.transpose(0, 1)
    b, t, _ = x.shape
    packed = F.linear(x, a["in_proj_weight"], a["in_proj_bias"]).view(b, t, 3, a["num_heads"], -1)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, D]
    if causal and padding is None and not a["need_weights"]:  # elsewhere torch takes the mask
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
    masks = [] if mask is None else [mask if mask.ndim == 2 else mask.view(b, -1, t, t)]
    masks += [] if padding is None else [padding[:, None, None, :]]
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT
    for each in masks:
        scores = scores.masked_fill(each, -math.inf) if each.dtype == torch.bool else scores + each
    if masks and not a["need_weights"]:  # torch's fused attention gives a row that is wholly masked zeros, else NaN
        masked = scores.isneginf().all(-1, keepdim=True)
        weights = scores.masked_fill(masked, 0).softmax(-1).masked_fill(masked, 0)  # in gradients NaN would stay
    else:
        weights = scores.softmax(-1)
    output = F.linear((weights @ v).transpose(1, 2).flatten(2), a["out_proj_weight"], a["out_proj_bias"])
    shown = weights.mean(1) if a["average_attn_weights"] else weights
    return output.transpose(0, 1), shown if a["need_weights"] else None


_READERS: dict[Any, Callable[..., Call | None]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.embedding: _embedding,
    **dict.fromkeys((torch.mul, Tensor.mul), multiply),
    **dict.fromkeys((torch.add, Tensor.add), partial(multiply, added=True)),
    Tensor.expand: expand,
}
