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
from coin.statistics.rules.linear import at_once
from coin.statistics.sums import sum_type


@dataclass(eq=False)
class ElementwiseCall(Call):
    """y = x̂ · weight + bias, or x + weight, with the parameters broadcast over x [N, …].

    One entry of the weight is multiplied with x̂_t at all t that it is broadcast over within a sample, so its gradient
    by Uᵥ · f is Σ_t g_vt x̂_t, that of an added parameter Σ_t g_vt: weight += Σ_nv (Σ_t g x̂)², bias += Σ_nv (Σ_t g)².
    x̂ is x, in a BatchNorm less its mean and times a factor. It is computed from the input, not as (y − bias) / weight:
    a weight may be zero.
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
        if self.statistics is not None:
            mean, factor = self.statistics
            x = (x - mean) * factor
        return x.to(sum_type(x))

    @override
    def output(self, inputs: Tensor, weight: Tensor) -> Tensor:
        call = replace(self, inputs=inputs)
        scale = weight.view(self.shape)
        made = call.normalised() * scale
        if self.bias is not None:
            shift = self.bias.view(self.shape)
            made = made + shift
        return made.to(inputs.dtype)

    @override
    def along(self, values: Tensor, output: Tensor) -> Tensor:
        return values.reshape(self.shape)

    @override
    def accumulate(self, g: Tensor, samples: int, totals: Totals) -> None:
        factors = {}  # by role, what the cotangents are multiplied with
        if "weight" in totals and not self.added:
            factors["weight"] = self.normalised()
        of_a_cotangent = g[0]
        step = at_once(g.device, of_a_cotangent.numel())
        for block in torch.split(g, step):
            for role, total in totals.items():
                local = block * factors[role] if role in factors else block
                gradients = self._summed(local, samples)
                squares = gradients.square().sum((0, 1))
                total.add_(squares.view(total.shape))

    def _summed(self, products: Tensor, samples: int) -> Tensor:
        """Return products [V, B·k, …] summed over all that a parameter is broadcast over within a sample, [V, B, …]."""
        cotangents, _, *inner = products.shape
        missing = [1] * (len(inner) - len(self.shape))
        by_sample = products.reshape(cotangents, samples, -1, *inner)
        return by_sample.sum_to_size(cotangents, samples, 1, *missing, *self.shape)

    @override
    def input_gradient(self, g: Tensor, weight: Tensor) -> Tensor:
        if self.added:
            return g
        factor = weight.view(self.shape)
        if self.statistics is not None:
            factor = factor * self.statistics[1]
        return g * factor


def multiply(input: Any, other: Any, added: bool = False) -> Call | None:
    """Read `torch.mul`, or `torch.add`, of a tensor and a parameter that is broadcast over samples, in either order."""
    weight, x = (input, other) if isinstance(input, nn.Parameter) else (other, input)
    if not isinstance(weight, nn.Parameter) or isinstance(x, nn.Parameter):
        return None
    if not isinstance(x, Tensor) or weight.dtype != x.dtype or x.ndim < 2:
        return None
    if torch.broadcast_shapes(weight.shape, x.shape) != x.shape:  # type: ignore[no-untyped-call]
        return None
    missing = [1] * (x.ndim - weight.ndim)
    of_samples, *shape = *missing, *weight.shape
    if of_samples != 1:
        return None
    return ElementwiseCall(x, weight, None, tuple(shape), added)


def expand(weight: Tensor, *sizes: Any, size: Any = None) -> Call | None:
    """Read `torch.Tensor.expand` over samples: as if the weight were added to zeros of that shape."""
    if not isinstance(weight, nn.Parameter):
        return None
    shape = sizes if size is None else size
    return multiply(weight.detach().expand(*shape), weight, added=True)


def batch_norm(
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    **options: Any,
) -> Call | None:
    """Read `torch.nn.functional.batch_norm` on running statistics; it hands on its options by name."""
    if options["training"] or running_mean is None or weight is None:
        return None
    shape = _channels(input)
    factor = torch.rsqrt(running_var + options["eps"])
    statistics = running_mean.view(shape), factor.view(shape)
    return ElementwiseCall(input, weight, bias, shape, statistics=statistics)


def layer_norm(
    input: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> Call | None:
    """Read `torch.nn.functional.layer_norm`: what it makes of the input without parameters is the call's input."""
    if weight is None or input.ndim <= len(shape):
        return None
    normalised = F.layer_norm(input, shape, None, None, eps)
    return ElementwiseCall(normalised, weight, bias, tuple(weight.shape))


def group_norm(input: Tensor, num_groups: int, weight: Any, bias: Any, eps: float) -> Call | None:
    """Read `torch.nn.functional.group_norm`, as a `layer_norm`."""
    if weight is None:
        return None
    normalised = F.group_norm(input, num_groups, None, None, eps)
    return ElementwiseCall(normalised, weight, bias, _channels(input))


def _channels(x: Tensor) -> tuple[int, ...]:
    """Return the shape in which one number a channel is broadcast over x[n]."""
    return (x.shape[1], *[1] * (x.ndim - 2))
