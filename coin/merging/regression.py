"""The regression of one unit at its call in a forward pass: its rows, and the fit of its weight and its bias."""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coin.merging.rounding import Rounding
from coin.merging.units import Unit
from coin.statistics.rules import Call
from coin.statistics.rules.convolution import ConvolutionCall
from coin.statistics.rules.elementwise import ElementwiseCall
from coin.statistics.solvers import fit_affine
from coin.statistics.sums import sum_type

WIDEST = 5000  # unknowns up to which a matrix is rounded by its metric [K, K], whose inverse takes time as K³


class Regression(NamedTuple):
    """The rows of a unit's regression, q positions of each of P samples.

    Attributes:
        inputs: a, what the columns of the weight multiply [G, P·q, K'], see `Unit.columns_of`.
        targets: z, the wanted outputs [G, P·q, O].
        weights: The rows' weights w [P, q].
        tasks: Of which task each sample is [P].
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    tasks: Tensor

    def part(self, first: int, count: int) -> "Regression":
        """Return the regression of so many samples from the first of them on."""
        samples = slice(first, first + count)
        positions = self.weights.shape[1]
        rows = slice(positions * first, positions * (first + count))
        return Regression(
            self.inputs[:, rows], self.targets[:, rows], self.weights[samples], self.tasks[samples]
        )


def output_rows(call: Call, output: Tensor, samples: int, places: Tensor | None) -> Tensor:
    """Return a call's outputs for P samples at positions `places` [P, q] of each, none for all, as rows [P·q, G·O]."""
    if isinstance(call, ConvolutionCall):
        return _at(output.movedim(1, -1), output.ndim - 2, samples, places)
    if not isinstance(call, ElementwiseCall):
        return _at(output, output.ndim - 2, samples, places)
    # The weight's size along each dimension of an output: where it has several entries it has channels.
    sizes = [1] * (output.ndim - 1 - len(call.shape)) + list(call.shape)
    order = sorted(range(len(sizes)), key=lambda dim: sizes[dim] > 1)
    ordered = output.permute(0, *(1 + dim for dim in order))
    rows = _at(ordered, sizes.count(1), samples, places)
    return rows.reshape(len(rows), -1)


def input_rows(call: Call, unit: Unit, samples: int, places: Tensor | None) -> Tensor:
    """Return what the columns of a unit's weight multiply in a call, at the same positions [G, P·q, K']."""
    if isinstance(call, ConvolutionCall):
        dims = len(call.geometry.kernel)
        patches = call.geometry.patches(call.inputs)  # [P·k, *output, *kernel, C]
        every_tap = _at(patches, dims, samples, places).flatten(1, dims)
        if len(unit.taps) < unit.kernel:
            every_tap = every_tap[:, list(unit.taps)]
        by_channel = every_tap.permute(2, 0, 1).contiguous()  # [C, P·q, taps]
        by_group = by_channel.view(unit.groups, -1, *by_channel.shape[1:])  # [G, C/G, P·q, taps]
        rows = by_group.movedim(1, 3).flatten(2)
    elif isinstance(call, ElementwiseCall):
        numbers = output_rows(call, call.normalised(), samples, places)  # [P·q, G]
        rows = numbers.T[..., None]
    else:
        rows = output_rows(call, call.inputs, samples, places)[None]
    return rows.to(sum_type(rows))


def _at(x: Tensor, dims: int, samples: int, places: Tensor | None) -> Tensor:
    """Return x [P·k, *positions, …], with so many dimensions of positions, at places [P, q] of these: [P·q, …]."""
    if places is None:
        return x.flatten(0, dims)
    sizes = x.shape[: 1 + dims]
    starts = torch.arange(samples, device=places.device) * (prod(sizes) // samples)
    index = (starts[:, None] + places).flatten()
    # Not of the flattened x, which would be a copy: patches overlap in memory.
    return x[torch.unravel_index(index, sizes)]


def unit_outputs(network: nn.Module, unit: Unit, inputs: Tensor) -> Tensor:
    """Return a unit's outputs W a + b for its inputs, [G, n, O] for [G, n, K']."""
    columns = unit.columns_of(network.get_parameter(unit.weight))
    outputs = inputs @ columns.to(inputs).mT
    if unit.shift is not None:
        shift = network.get_parameter(unit.shift)
        outputs += shift.to(inputs).reshape(unit.groups, 1, -1)
    return outputs


def fit_unit(
    network: nn.Module,
    unit: Unit,
    regression: Regression,
    ridge: float,
    rounding: Rounding | None = None,
    by_task: bool = False,
) -> None:
    """Fit a unit in place to its targets z: W a + b becomes (W + ΔW) a + b + Δb.

    ΔW and Δb are the ridge regression of z − W a − b on a (`fit_affine`). A rounding rounds W + ΔW, and Δb is fitted to
    what that leaves. If `by_task`, each task has an intercept of its own.
    """
    weight = network.get_parameter(unit.weight)

    def rounded(step: Tensor, metric: Callable[[], Tensor]) -> Tensor:
        """Return the step [G, O, K'] from the weight to its rounded form, near a step of the regression."""
        assert rounding is not None
        whole = _whole_metric(unit, metric()) if unit.unknowns <= WIDEST else None
        taken = rounding.step(unit.weight, weight, unit.from_columns(step), whole)
        return unit.columns_of(taken)

    of_row = regression.tasks[:, None].expand(regression.weights.shape)
    tasks = of_row.flatten().to(weight.device)
    step, constant = fit_affine(
        regression.inputs,
        regression.targets - unit_outputs(network, unit, regression.inputs),
        regression.weights.flatten(),
        ridge * unit.share,
        intercept=unit.shift is not None,
        change=None if rounding is None else rounded,
        tasks=tasks if by_task else None,
    )
    if rounding is not None:
        weight.copy_(rounding.weight(unit.weight))
    else:
        weight.add_(unit.from_columns(step).reshape(weight.shape))
    if unit.shift is not None:
        shift = network.get_parameter(unit.shift)
        shift.add_(constant.reshape(shift.shape))


def _whole_metric(unit: Unit, metric: Tensor) -> Tensor:
    """Return a metric [G, K', K'] as one of all columns [G, K, K]: those left out weigh as the others on average."""
    whole = unit.from_columns(unit.from_columns(metric).mT).mT
    diagonal = whole.diagonal(dim1=1, dim2=2)
    mean = metric.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    diagonal.copy_(diagonal.where(diagonal != 0, mean))
    return whole
