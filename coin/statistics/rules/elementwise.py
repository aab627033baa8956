"""The rule for parameters that are multiplied with or added to activations: scales, shifts and normalisations."""

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from coin.statistics.rules.call import Call, Totals
from coin.statistics.sums import sum_type


class ElementwiseCall(Call):
    """y = x̂ · weight + bias, or x + weight, with the parameters broadcast over x [N, …].

    weight += Σ_nv (Σ_t g x̂)² and bias += Σ_nv (Σ_t g)², where t runs over all that the parameter was broadcast over
    within a sample. x̂ comes from the input, never from dividing the output by the weight, which may be zero.

    Args:
        inputs: x.
        weight: The weight.
        bias: The bias.
        shape: The shape in which both are broadcast over x[n].
        normalised: Returns x̂, of x's shape, in the type of sums; None if the weight is added.
        pull_back: (g, weight) → the cotangents of x.
    """

    def __init__(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: tuple[int, ...],
        normalised: Callable[[], Tensor] | None,
        pull_back: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__(inputs, weight, bias)
        self.reads_input = normalised is not None and weight.requires_grad
        self._shape, self._normalised, self._pull_back = shape, normalised, pull_back

    @override
    def accumulate(self, g: Tensor, samples: int, totals: Totals) -> None:
        if "bias" in totals:
            self._add(totals["bias"], g, samples)
        if "weight" in totals:
            self._add(totals["weight"], g if self._normalised is None else g * self._normalised(), samples)

    def _add(self, total: Tensor, local: Tensor, samples: int) -> None:
        inner = local.shape[2:]
        shape = (1,) * (len(inner) - len(self._shape)) + self._shape
        over = [2, *(3 + d for d, size in enumerate(shape) if size == 1)]
        sums = local.reshape(len(local), samples, -1, *inner).sum(over)
        total.add_(torch.square(sums).sum((0, 1)).view(total.shape))

    @override
    def input_gradient(self, g: Tensor, weight: Tensor) -> Tensor:
        return self._pull_back(g, weight.view(self._shape))


def scale(x: Tensor, weight: Tensor, shape: tuple[int, ...]) -> Call:
    """Return the call of x · weight."""
    return ElementwiseCall(x, weight, None, shape, x.detach, lambda g, weight: g * weight)


def shift(x: Tensor, weight: Tensor, shape: tuple[int, ...]) -> Call:
    """Return the call of x + weight; or of the weight expanded over samples, as if added to zeros of that shape."""
    return ElementwiseCall(x, weight, None, shape, None, lambda g, weight: g)


def batch_norm(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Call:
    """Return the call of `torch.nn.functional.batch_norm` on running statistics."""
    shape = (x.shape[1], *(1 for _ in x.shape[2:]))
    inputs, centre, inverse = x.detach(), mean.view(shape), torch.rsqrt(variance + eps).view(shape)

    def normalised() -> Tensor:
        return ((inputs - centre) * inverse).to(sum_type(inputs))

    return ElementwiseCall(x, weight, bias, shape, normalised, lambda g, weight: g * (weight * inverse))


def slice_norm(
    x: Tensor, slices: tuple[int, ...], weight: Tensor, bias: Tensor | None, eps: float, shape: tuple[int, ...]
) -> Call:
    """Return the call of `layer_norm` or `group_norm`: every slice by its own mean and variance.

    `slices` is x's shape with what belongs to a slice as its last dimension, [N, …, M].
    """
    inputs = x.detach()

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x̂ and what it was scaled with, in slices."""
        rows = x.reshape(slices)
        variance, mean = torch.var_mean(rows, -1, correction=0, keepdim=True)
        inverse = torch.rsqrt(variance + eps)
        return (rows - mean) * inverse, inverse

    def normalised() -> Tensor:
        return parts(inputs.to(sum_type(inputs)))[0].view(inputs.shape)

    def pull_back(g: Tensor, weight: Tensor) -> Tensor:
        hat, inverse = parts(inputs)
        inner = (g * weight).reshape(len(g), *slices)
        along = (inner * hat).mean(-1, keepdim=True)
        return ((inner - inner.mean(-1, keepdim=True) - hat * along) * inverse).reshape(g.shape)

    call = ElementwiseCall(x, weight, bias, shape, normalised, pull_back)
    call.reads_input = True
    return call
