"""The two passes of a refit: experts leave outputs at some positions, and the coded network is fitted to them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coin.core.batches import Batch, as_input, take
from coin.errors import StateError
from coin.merging.affine import fit_unit, output_rows
from coin.merging.units import Trace, Unit, floating_parameters
from coin.networks.rounding import Rounding
from coin.statistics.guard import differentiable, evaluating
from coin.statistics.intercept import Interceptor
from coin.statistics.rules.call import Call
from coin.statistics.sums import sum_type

ROWS = 8
"""Rows of a regression for each of its unknowns: more where they are cheap, fewer where they are dear."""

CHEAP, DEAR = 0.5, 4.0
"""As many rows there are at least, and at most, as take these shares of the time of the layer's calls."""

READ = 16
"""How many multiplications take as long as reading a number where it lies alone."""

LEAST = 256
"""The fewest rows of a regression, where there are as many."""

PROBED = 16
"""Samples by which positions are weighed: several rows of tokens are much alike from sample to sample."""

_SAME = "give experts that make the same calls whatever their inputs"


def chosen_places(
    units: Sequence[Unit], order: Tensor, weights: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor | None]:
    """Return for every unit's weight at which positions of every sample its rows are [P, q]; none for all of them.

    `order` [P] is every sample's place among those of its task, by which it is drawn: whichever task is the first, the
    rows are the same. q is the same for every sample. The positions of a sample are drawn as often as they weigh,
    `position_weights`, one from each of q stretches of the same weight.
    """
    places: dict[str, Tensor | None] = {}
    generator, samples = torch.Generator().manual_seed(0), len(order)
    for unit in units:
        cheap, dear = (_affordable(unit, share * samples) for share in (CHEAP, DEAR))
        rows = max(LEAST, min(max(ROWS * unit.unknowns, cheap), dear))
        each = math.ceil(rows / samples)
        places[unit.weight] = None
        if each < unit.positions:
            drawn = torch.rand(int(order.max()) + 1, each, generator=generator)[order]
            drawn = (drawn + torch.arange(each)) / each
            weight = weights.get(unit.weight, torch.ones(unit.positions)).cpu().cumsum(0)
            found = torch.searchsorted((weight / weight[-1]).to(drawn), drawn)
            places[unit.weight] = found.clamp(max=unit.positions - 1).to(device)
    return places


def _affordable(unit: Unit, samples: float) -> float:
    """Return how many rows' regression takes as long as the unit's calls on so many samples.

    With K unknowns for each of O outputs n rows take n K (min(n, K) + 2 O) multiplications and n K numbers read at
    places apart, each as long as `READ` of them; a position of the call takes K O.
    """
    k, o, calls = unit.unknowns, unit.outputs, samples * unit.positions * unit.outputs
    each = 2 * o + READ
    return calls / (k + each) if calls > k * (k + each) else math.sqrt(each * each / 4 + calls) - each / 2


def position_weights(network: nn.Module, trace: Trace, inputs: Batch) -> dict[str, Tensor]:
    """Return, by the weights of units that are no convolutions, what the positions weigh [L], with mean 1.

    Half of a weight is the same for all positions; the other half goes with the mean square over samples of the
    gradient of ½‖f‖², f less its mean over the classes, by the unit's outputs there. In a transformer the last layers'
    outputs at all but the class token do not matter, and those of the first at some tokens hardly. A unit that the
    outputs do not reach has none.
    """
    outputs: dict[str, tuple[Call, Tensor]] = {}
    ends = {unit.end: unit for unit in trace.units if unit.positions > 1 and not unit.is_convolution}
    parameters = floating_parameters(network)
    if not ends:
        return {}

    def visit(call: Call, names: dict[str, str], function: Callable[[], Tensor]) -> Tensor | None:
        if (unit := ends.get(names.get("weight", ""))) is None:
            return None
        output = function()
        outputs[unit.weight] = call, output
        return output.clone()  # which may be changed in place

    with evaluating(network), differentiable(parameters.values()), Interceptor(parameters, visit):
        logits = network(as_input(inputs, network))
        cotangent = (logits - logits.mean(1, keepdim=True) if logits.shape[1] > 1 else logits).detach()
        found = [each for each in outputs.items() if each[1][1].requires_grad]
        gradients = torch.autograd.grad(logits, [output for _, (_, output) in found], cotangent, allow_unused=True)
    weights = {}
    for (weight, (call, _)), gradient in zip(found, gradients, strict=True):
        if gradient is not None and bool(gradient.any()):
            rows = output_rows(call, gradient, len(logits), None).double().square().sum(1)
            mean = rows.view(len(logits), -1).mean(0)
            weights[weight] = 0.5 + 0.5 * mean / mean.mean()
    return weights


class Rows(NamedTuple):
    """What units are fitted to on P samples.

    Attributes:
        inputs: The samples.
        mixtures: Every sample's mixture of the experts' outputs [N, P].
        shares: What the samples weigh [P].
        places: By the units' weights, at which positions, as `chosen_places` returns them.
        weights: By the units' weights, what the positions weigh, as `position_weights` returns them.
    """

    inputs: Batch
    mixtures: Tensor
    shares: Tensor
    places: Mapping[str, Tensor | None]
    weights: Mapping[str, Tensor]


def expert_targets(
    experts: Sequence[nn.Module], trace: Trace, rows: Rows, batch_size: int
) -> tuple[dict[str, Tensor], int]:
    """Return the mixtures of the experts' outputs, which the units shall give, and how many passes that took.

    An expert runs on the samples alone of whose mixtures it is part, `batch_size` at once. The targets [P, q, ·] are by
    the units' weights, in the order of `output_rows`. Raises StateError where an expert makes other calls than the
    coded network did in its `trace`, or gives outputs of another shape.
    """
    targets: dict[str, Tensor] = {}
    passes = 0
    for network, mixture in zip(experts, rows.mixtures, strict=True):
        for part in filter(len, mixture.nonzero().flatten().split(batch_size)):
            _add_targets(targets, network, trace, rows, part, mixture)
            passes += len(part)
    return targets, passes


def _add_targets(
    targets: dict[str, Tensor], network: nn.Module, trace: Trace, rows: Rows, part: Tensor, mixture: Tensor
) -> None:
    """Run an expert on the samples `part` [p], and add its share of their targets, of the mixtures [P]."""
    ends = {unit.end: unit for unit in trace.units}
    made: list[str] = []

    def visit(call: Call, names: dict[str, str], function: Callable[[], Tensor]) -> Tensor | None:
        if (weight := names.get("weight")) is None:
            return None
        made.append(weight)
        _check_calls(made, trace.calls)
        output = function()
        if unit := ends.get(weight):
            shape = (len(output) // len(part), *output.shape[1:])
            if shape != unit.shape:
                raise StateError(
                    f"'{weight}' gives {[*shape]} a sample in an expert and {[*unit.shape]} in the coded network; "
                    f"{_SAME}"
                )
            at = rows.places[unit.weight]
            found = output_rows(call, output, len(part), None if at is None else at[part.to(at.device)])
            found = found.to(sum_type(found)).view(len(part), -1, found.shape[1])
            if unit.weight not in targets:
                targets[unit.weight] = found.new_zeros(len(mixture), *found.shape[1:])
            share = mixture[part].to(found)
            targets[unit.weight].index_add_(0, part.to(found.device), found * share[:, None, None])
        return output

    with evaluating(network, gradients=False), Interceptor(floating_parameters(network), visit):
        network(as_input(take(rows.inputs, part), network))
    _check_calls([*made, ""], [*trace.calls, ""])


def _check_calls(made: Sequence[str], expected: Sequence[str]) -> None:
    """Raise StateError where the last call is another than the coded network makes at its place."""
    there = expected[len(made) - 1] if len(made) <= len(expected) else ""
    if made[-1] != there:
        own, theirs = (f"calls '{weight}'" if weight else "is at its end" for weight in (made[-1], there))
        raise StateError(f"an expert {own} where the coded network {theirs}; {_SAME}")


def fit_in_order(
    network: nn.Module,
    units: Sequence[Unit],
    rows: Rows,
    targets: dict[str, Tensor],
    ridge: float,
    rounding: Rounding | None = None,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Run the coded network once, in place fitting every unit to its targets before its call; see `fit_unit`.

    A row weighs what its sample does, times what its position does.
    """
    waiting = {unit.weight: unit for unit in units}

    def visit(call: Call, names: dict[str, str], function: Callable[[], Tensor]) -> None:
        if unit := waiting.get(names.get("weight", "")):
            target, at = targets.pop(unit.weight), rows.places[unit.weight]
            mine = rows.shares.to(target)[:, None].expand(target.shape[:2])
            if at is None and unit.weight in rows.weights:  # places are drawn by them
                mine = mine * rows.weights[unit.weight].to(mine)
            fit_unit(network, unit, call, target, at, mine, ridge, rounding)
            progress()

    with evaluating(network, gradients=False), Interceptor(floating_parameters(network), visit):
        network(as_input(rows.inputs, network))
