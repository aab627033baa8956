"""The rows of units' regressions: at which positions of the samples, and what these weigh."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coin.core.batches import Batch, samples_of, take
from coin.core.devices import device_of
from coin.merging.units import Trace, Unit, floating_parameters, output_rows
from coin.networks.calling import as_input, logits_of
from coin.networks.guard import differentiable, evaluating
from coin.networks.running import centred
from coin.statistics.intercept import Interceptor
from coin.statistics.rules import Call

ROWS = 8  # of a regression for each of its unknowns: more where they are cheap, fewer where they are dear
# Shares of the time of a layer's calls that its rows take at least, and at most.
CHEAP, DEAR = (0.5, 4.0)
READ = 16  # multiplications that take as long as reading a number where it lies alone
LEAST = 256  # rows of a regression, where there are as many
PROBED = 16  # samples by which positions are weighed: rows of tokens are much alike from sample to sample


class Rows(NamedTuple):
    """What units are fitted to on P samples; `places` and `weights` are by the names of the units' weights."""

    inputs: Batch
    tasks: Tensor  # the samples' [P]
    shares: Tensor  # the samples' weights [P]
    places: Mapping[str, Tensor | None]  # of `chosen_places`
    weights: Mapping[str, Tensor]  # of `position_weights`
    passes: int  # that finding the weights took


def chosen_rows(
    network: nn.Module,
    trace: Trace,
    inputs: Batch,
    tasks: Tensor,
    shares: Tensor,
    budget: float,
) -> Rows:
    """Choose the rows of all units of a network on P samples; see `Rows`.

    Rows drawn alike from all positions, as many for each unknown, lost 0.3 points of NDA on a small ViT.
    """
    order = torch.zeros_like(tasks)  # each sample's place within its task
    present = set(tasks.tolist())
    for task in present:
        is_own = tasks == task
        order[is_own] = torch.arange(int(is_own.sum()))
    probed = (order < math.ceil(PROBED / len(present))).nonzero().flatten()
    weights = position_weights(network, trace, take(inputs, probed))
    places = chosen_places(trace.units, order, weights, device_of(network), budget)
    passes = 3 * len(probed) if weights else 0
    return Rows(inputs, tasks, shares, places, weights, passes)


def chosen_places(
    units: Sequence[Unit],
    order: Tensor,
    weights: Mapping[str, Tensor],
    device: torch.device,
    budget: float = math.inf,
) -> dict[str, Tensor | None]:
    """Return by units' weights the positions in every sample that are rows of the regression [P, q]; None for all.

    They are drawn as often as they weigh, one from each of q stretches of the same weight, and by the sample's place
    `order` [P] in its task, so that the order of the tasks does not matter. Where the rows' outputs would take more
    bytes than the budget there are only `ROWS` for each unknown.
    """
    samples = len(order)
    size = 0
    for unit in units:
        count = min(_count(unit, samples, few=False), unit.positions)
        size += 4 * samples * count * unit.channels  # in float32
    generator = torch.Generator().manual_seed(0)
    places: dict[str, Tensor | None] = {}
    for unit in units:
        count = _count(unit, samples, few=size > budget)  # q
        if count >= unit.positions:
            places[unit.weight] = None
            continue
        offsets = torch.rand(int(order.max()) + 1, count, generator=generator)[order]
        drawn = (offsets + torch.arange(count)) / count  # [P, q] in [0, 1)
        weight = weights.get(unit.weight, torch.ones(unit.positions)).cpu().cumsum(0)
        share = (weight / weight[-1]).to(drawn)  # of all positions up to each
        found = torch.searchsorted(share, drawn)
        places[unit.weight] = found.clamp(max=unit.positions - 1).to(device)
    return places


def _count(unit: Unit, samples: int, *, few: bool) -> int:
    """Return how many rows of each sample a unit's regression has."""
    cheap = _affordable(unit, CHEAP * samples)
    dear = _affordable(unit, DEAR * samples)
    wanted: float = ROWS * unit.unknowns
    if not few:
        wanted = max(wanted, cheap)
    return math.ceil(max(LEAST, min(wanted, dear)) / samples)


def _affordable(unit: Unit, samples: float) -> float:
    """Return how many rows' regression takes as long as the unit's calls on so many samples.

    With K unknowns for each of O outputs n rows take n K (min(n, K) + 2 O + READ) multiplications, a position K O.
    """
    unknowns = unit.unknowns
    calls = samples * unit.positions * unit.outputs
    each = 2 * unit.outputs + READ
    if calls > unknowns * (unknowns + each):
        return calls / (unknowns + each)
    half = each / 2
    return math.sqrt(half * half + calls) - half


def position_weights(network: nn.Module, trace: Trace, inputs: Batch) -> dict[str, Tensor]:
    """Return, by the weights of units that are no convolutions, what the positions weigh [L], with mean 1.

    One half is the same for all; the other goes with the mean square over samples of the gradient of ½‖f‖² by the
    unit's outputs there, f less its mean over the classes: a transformer's last layers matter at the class token alone.
    A unit that the outputs do not reach has none.
    """
    ends = {
        unit.end: unit for unit in trace.units if unit.positions > 1 and not unit.is_convolution
    }
    if not ends:
        return {}
    parameters = floating_parameters(network)
    outputs: dict[str, tuple[Call, Tensor]] = {}
    sums: dict[str, Tensor] = {}

    def visit(call: Call, names: dict[str, str], function: Callable[[], Tensor]) -> Tensor | None:
        unit = ends.get(names.get("weight", ""))
        if unit is None:
            return None
        output = function()
        outputs[unit.weight] = call, output
        return output.clone()  # which may be changed in place

    with evaluating(network), differentiable(parameters.values()), Interceptor(parameters, visit):
        for sample in samples_of(inputs):  # the graphs of many at once take much memory
            outputs.clear()
            logits = logits_of(network, as_input(sample, network))
            found = {weight: made for weight, made in outputs.items() if made[1].requires_grad}
            gradients = torch.autograd.grad(
                logits,
                [output for _, output in found.values()],
                centred(logits).detach(),
                allow_unused=True,
            )
            for (weight, (call, _)), gradient in zip(found.items(), gradients, strict=True):
                if gradient is not None:
                    squares = output_rows(call, gradient, 1, None).double().square().sum(1)  # [L]
                    sums[weight] = squares + sums.get(weight, 0)
    return {
        weight: 0.5 + 0.5 * total / total.mean()
        for weight, total in sums.items()
        if bool(total.any())
    }
