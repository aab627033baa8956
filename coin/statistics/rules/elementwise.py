"""The rule for parameters that are multiplied with or added to activations: scales, shifts and normalisations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from coin.statistics.rules import Call, Totals
from coin.statistics.rules.linear import BLOCK
from coin.statistics.sums import sum_type


@dataclass(eq=False)
class ElementwiseCall(Call):
    """y = x̂ · weight + bias, or x + weight, with the parameters broadcast over x [N, …].

    weight += Σ_nv (Σ_t g x̂)² and bias += Σ_nv (Σ_t g)², where t runs over all that the parameter was broadcast over
    within a sample. x̂ comes from the input, never from dividing the output by the weight, which may be zero.
    """

    shape: tuple[int, ...]  # in which both are broadcast over x[n]
    normalised: Callable[[Tensor], Tensor] | None  # x → x̂, in the type of sums; None if the weight is added
    pull_back: Callable[[Tensor, Tensor, Tensor], Tensor]  # (g, weight, x) → the cotangents of x

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reads_input = self.normalised is not None

    @override
    def accumulate(self, g: Tensor, samples: int, totals: Totals) -> None:
        inner = g.shape[2:]
        shape = (1,) * (len(inner) - len(self.shape)) + self.shape
        over = [2, *(3 + d for d, size in enumerate(shape) if size == 1)]
        factor = None if self.normalised is None or "weight" not in totals else self.normalised(self.inputs)
        for block in torch.split(g, max(1, BLOCK // g[0].numel())):
            for role, total in totals.items():
                local = block if role == "bias" or factor is None else block * factor
                sums = local.reshape(len(block), samples, -1, *inner).sum(over)
                total.add_(sums.square_().sum((0, 1)).view(total.shape))

    @override
    def input_gradient(self, g: Tensor, weight: Tensor) -> Tensor:
        return self.pull_back(g, weight.view(self.shape), self.inputs)


# What follows returns the call of a function of the same arguments; None stands for a form that has no rule.


def multiply(input: Any, other: Any) -> Call | None:
    """Read `torch.mul`."""
    return _broadcast(input, other, lambda x: x, lambda g, weight, x: g * weight)


def add(input: Any, other: Any) -> Call | None:
    """Read `torch.add`."""
    return _broadcast(input, other, None, lambda g, weight, x: g)


def expand(weight: Tensor, *sizes: Any, size: Any = None) -> Call | None:
    """Read `torch.Tensor.expand` over samples: as if the weight were added to zeros of that shape."""
    if not isinstance(weight, nn.Parameter):
        return None
    return add(weight.detach().expand(*(sizes if size is None else size)), weight)


def _broadcast(input: Any, other: Any, normalised: Any, pull_back: Any) -> Call | None:
    weight, x = (input, other) if isinstance(input, nn.Parameter) else (other, input)
    if not isinstance(weight, nn.Parameter) or not isinstance(x, Tensor) or isinstance(x, nn.Parameter):
        return None
    if weight.dtype != x.dtype or weight.ndim > x.ndim or x.ndim < 2:
        return None
    aligned = (1,) * (x.ndim - weight.ndim) + tuple(weight.shape)
    if aligned[0] != 1 or any(size not in (1, full) for size, full in zip(aligned, x.shape, strict=True)):
        return None
    return ElementwiseCall(x, weight, None, aligned[1:], normalised, pull_back)


def batch_norm(
    input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, **options: Any
) -> Call | None:
    """Read `torch.nn.functional.batch_norm` on running statistics; it hands on its options by name."""
    if options["training"] or running_mean is None or running_var is None or weight is None:
        return None
    shape = (input.shape[1], *(1 for _ in input.shape[2:]))
    mean: Tensor = running_mean.view(shape)
    factor = torch.rsqrt(running_var + options["eps"]).view(shape)
    return ElementwiseCall(
        input, weight, bias, shape, lambda x: ((x - mean) * factor).to(sum_type(x)), lambda g, w, x: g * (w * factor)
    )


def layer_norm(input: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Call | None:
    """Read `torch.nn.functional.layer_norm`."""
    if weight is None or input.ndim <= len(shape):
        return None
    return _slice_norm(input, (*input.shape[: -len(shape)], weight.numel()), weight, bias, eps, tuple(weight.shape))


def group_norm(input: Tensor, num_groups: int, weight: Any, bias: Any, eps: float) -> Call | None:
    """Read `torch.nn.functional.group_norm`."""
    if weight is None:
        return None
    shape = (input.shape[1], *(1 for _ in input.shape[2:]))
    return _slice_norm(input, (len(input), num_groups, input[0].numel() // num_groups), weight, bias, eps, shape)


def _slice_norm(x: Tensor, slices: tuple[int, ...], weight: Tensor, bias: Any, eps: float, shape: Any) -> Call:
    """Return the call of a normalisation of every slice, the last dimension of x in the shape `slices` [N, …, M]."""

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x̂ and what it was scaled with, in slices."""
        rows = x.reshape(slices)
        variance, mean = torch.var_mean(rows, -1, correction=0, keepdim=True)
        factor = torch.rsqrt(variance + eps)
        return (rows - mean) * factor, factor

    def pull_back(g: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        hat, factor = parts(x)
        inner = (g * weight).reshape(len(g), *slices)
        along = (inner * hat).mean(-1, keepdim=True)
        return ((inner - inner.mean(-1, keepdim=True) - hat * along) * factor).reshape(g.shape)

    return ElementwiseCall(x, weight, bias, shape, lambda x: parts(x.to(sum_type(x)))[0].view(x.shape), pull_back)
