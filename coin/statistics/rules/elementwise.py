"""The rule for parameters that are multiplied with or added to activations: scales, shifts and normalisations.

The functions return the call of one of torch's from its arguments; None stands for a form that has no rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from coin.statistics.rules import Call, Totals
from coin.statistics.rules.linear import block_of
from coin.statistics.sums import sum_type


@dataclass(eq=False)
class ElementwiseCall(Call):
    """y = x̂ · weight + bias, or x + weight, with the parameters broadcast over x [N, …].

    weight += Σ_nv (Σ_t g x̂)² and bias += Σ_nv (Σ_t g)², where t runs over all that the parameter was broadcast over
    within a sample. x̂ is x, in a BatchNorm less its mean and times a factor.
    """

    shape: tuple[int, ...]  # in which both are broadcast over x[n]
    added: bool = False  # whether the weight is added
    statistics: tuple[Tensor, Tensor] | None = None  # a BatchNorm's mean and factor

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reads_input = not self.added

    def normalised(self) -> Tensor:
        """Return x̂, in the type of sums."""
        x = self.inputs
        x = x if self.statistics is None else (x - self.statistics[0]) * self.statistics[1]
        return x.to(sum_type(x))

    @override
    def output(self, inputs: Tensor, weight: Tensor) -> Tensor:
        own = replace(self, inputs=inputs).normalised() * weight.view(self.shape)
        return (own if self.bias is None else own + self.bias.view(self.shape)).to(inputs.dtype)

    @override
    def along(self, values: Tensor, output: Tensor) -> Tensor:
        return values.reshape(self.shape)

    @override
    def accumulate(self, g: Tensor, samples: int, totals: Totals) -> None:
        inner = g.shape[2:]
        shape = (1,) * (len(inner) - len(self.shape)) + self.shape
        over = [2, *(3 + d for d, size in enumerate(shape) if size == 1)]
        factor = None if self.added or "weight" not in totals else self.normalised()
        for block in torch.split(g, max(1, block_of(g.device) // g[0].numel())):
            for role, total in totals.items():
                local = block if role == "bias" or factor is None else block * factor
                sums = local.reshape(len(block), samples, -1, *inner).sum(over)
                total.add_(sums.square_().sum((0, 1)).view(total.shape))

    @override
    def input_gradient(self, g: Tensor, weight: Tensor) -> Tensor:
        factor = weight.view(self.shape)
        factor = factor if self.statistics is None else factor * self.statistics[1]
        return g if self.added else g * factor


def multiply(input: Any, other: Any, added: bool = False) -> Call | None:
    """Read `torch.mul`, or `torch.add` if the parameter is `added`."""
    weight, x = (input, other) if isinstance(input, nn.Parameter) else (other, input)
    if not isinstance(weight, nn.Parameter) or not isinstance(x, Tensor) or isinstance(x, nn.Parameter):
        return None
    if weight.dtype != x.dtype or not weight.ndim <= x.ndim >= 2:
        return None
    aligned = (1,) * (x.ndim - weight.ndim) + tuple(weight.shape)
    if aligned[0] != 1 or any(size not in (1, full) for size, full in zip(aligned, x.shape, strict=True)):
        return None
    return ElementwiseCall(x, weight, None, aligned[1:], added)


def expand(weight: Tensor, *sizes: Any, size: Any = None) -> Call | None:
    """Read `torch.Tensor.expand` over samples: as if the weight were added to zeros of that shape."""
    if not isinstance(weight, nn.Parameter):
        return None
    return multiply(weight.detach().expand(*(sizes if size is None else size)), weight, added=True)


def batch_norm(
    input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, **options: Any
) -> Call | None:
    """Read `torch.nn.functional.batch_norm` on running statistics; it hands on its options by name."""
    if options["training"] or running_mean is None or running_var is None or weight is None:
        return None
    shape = (input.shape[1], *(1 for _ in input.shape[2:]))
    statistics = running_mean.view(shape), torch.rsqrt(running_var + options["eps"]).view(shape)
    return ElementwiseCall(input, weight, bias, shape, statistics=statistics)


def layer_norm(input: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Call | None:
    """Read `torch.nn.functional.layer_norm`: what it makes of the input without parameters is the call's input."""
    if weight is None or input.ndim <= len(shape):
        return None
    return ElementwiseCall(F.layer_norm(input, shape, None, None, eps), weight, bias, tuple(weight.shape))


def group_norm(input: Tensor, num_groups: int, weight: Any, bias: Any, eps: float) -> Call | None:
    """Read `torch.nn.functional.group_norm`, as a `layer_norm`."""
    if weight is None:
        return None
    shape = (input.shape[1], *(1 for _ in input.shape[2:]))
    return ElementwiseCall(F.group_norm(input, num_groups, None, None, eps), weight, bias, shape)
