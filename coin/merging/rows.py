"""The rows of units' regressions: of which samples, at which of their positions, and what these weigh."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin.core.batches import Batch, samples_of, take
from coin.core.devices import device_of
from coin.errors import DataError
from coin.merging.regression import Regression, input_rows, output_rows
from coin.merging.units import Unit, floating_parameters
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
    """Which rows units' regressions have.

    Attributes:
        inputs: P samples.
        tasks: Of which task each is [P].
        shares: What each weighs [P].
        places: By the units' weights the positions of `chosen_places`.
        weights: By the units' weights the positions' own, of `position_weights`.
        passes: How many forward-equivalents finding the weights took.
    """

    inputs: Batch
    tasks: Tensor
    shares: Tensor
    places: Mapping[str, Tensor | None]
    weights: Mapping[str, Tensor]
    passes: int

    def regression(self, unit: Unit, call: Call, targets: Tensor) -> Regression:
        """Return the regression of a unit to its targets [P, q, G·O], at its call on all samples."""
        samples, positions, _ = targets.shape
        places = self.places[unit.weight]
        weights = self.shares.to(targets)[:, None].expand(samples, positions)
        # Chosen places are drawn by these weights already.
        if places is None and unit.weight in self.weights:
            weights = weights * self.weights[unit.weight].to(weights)
        return Regression(
            inputs=input_rows(call, unit, samples, places),
            targets=targets.view(-1, unit.groups, unit.outputs).transpose(0, 1),
            weights=weights,
            tasks=self.tasks,
        )

    def nbytes_of_targets(self, unit: Unit) -> int:
        """Return the bytes of a unit's targets."""
        places = self.places[unit.weight]
        positions = unit.positions if places is None else places.shape[1]
        return unit.nbytes(len(self.tasks) * positions)


def chosen_rows(
    network: nn.Module,
    units: Sequence[Unit],
    inputs: Batch,
    tasks: Tensor,
    row: Sequence[float],
    budget: float,
) -> Rows:
    """Choose the rows of all units of a network on P samples, whose tasks weigh as in a code's row; see `Rows`.

    Rows drawn alike from all positions, as many for each unknown, lost 0.3 points of NDA on a small ViT.
    """
    of_task = F.one_hot(tasks)  # [P, N]
    order = (
        (of_task.cumsum(0) - 1).gather(1, tasks[:, None]).flatten()
    )  # each sample's place within its task
    present = int(of_task.any(0).sum())
    probed = (order < math.ceil(PROBED / present)).nonzero().flatten()
    weights = position_weights(network, units, take(inputs, probed))
    places = chosen_places(units, order, weights, device_of(network), budget)
    passes = 3 * len(probed) if weights else 0
    return Rows(inputs, tasks, sample_weights(row, tasks), places, weights, passes)


def sample_weights(row: Sequence[float], tasks: Tensor) -> Tensor:
    """Return what samples of these tasks [P] weigh: those of task i together β_i.

    Raises DataError where a task that has a share in the row has no samples.
    """
    beta = torch.tensor(row, dtype=torch.float64)
    counts = torch.bincount(tasks, minlength=len(row))
    missing = ((beta > 0) & (counts == 0)).nonzero().flatten().tolist()
    if missing:
        raise DataError(
            f"found no calibration samples of task {missing[0]}, which has a share in the code row {list(row)}, "
            "expected at least one; give some, or raise memory_mib"
        )
    return (beta / counts)[tasks]


def chosen_places(
    units: Sequence[Unit],
    order: Tensor,
    weights: Mapping[str, Tensor],
    device: torch.device,
    budget: float = math.inf,
) -> dict[str, Tensor | None]:
    """Return by units' weights the positions in every sample that are rows of the regression [P, q]; None for all.

    They are drawn as often as they weigh, one from each of q stretches of the same weight, and by the sample's place
    `order` [P] in its task, so that the order of the tasks does not matter. Where the targets would take more bytes
    than the budget there are only `ROWS` for each unknown.
    """
    samples = len(order)
    nbytes = 0
    for unit in units:
        count = min(_count(unit, samples, few=False), unit.positions)
        nbytes += unit.nbytes(samples * count)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, Tensor | None] = {}
    for unit in units:
        count = _count(unit, samples, few=nbytes > budget)  # q
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
    wanted: float = ROWS * unit.unknowns
    if not few:
        wanted = max(wanted, _affordable(unit, CHEAP * samples))
    rows = max(LEAST, min(wanted, _affordable(unit, DEAR * samples)))
    return math.ceil(rows / samples)


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


def position_weights(network: nn.Module, units: Sequence[Unit], inputs: Batch) -> dict[str, Tensor]:
    """Return, by the weights of units that are no convolutions, what the positions weigh [L], with mean 1.

    One half is the same for all; the other goes with the mean square over samples of the gradient of ½‖f‖² by the
    unit's outputs there, f less its mean over the classes: a transformer's last layers matter at the class token alone.
    A unit that the outputs do not reach has none.
    """
    ends = {unit.end: unit for unit in units if unit.positions > 1 and not unit.is_convolution}
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
        if output.requires_grad:
            outputs[unit.weight] = call, output
        return output.clone()  # which may be changed in place

    with evaluating(network), differentiable(parameters.values()), Interceptor(parameters, visit):
        for sample in samples_of(inputs):  # the graphs of many at once take much memory
            outputs.clear()
            logits = logits_of(network, as_input(sample, network))
            gradients = torch.autograd.grad(
                logits,
                [output for _, output in outputs.values()],
                centred(logits).detach(),
                allow_unused=True,
            )
            for (weight, (call, _)), gradient in zip(outputs.items(), gradients, strict=True):
                if gradient is not None:
                    squares = output_rows(call, gradient, 1, None).double().square().sum(1)  # [L]
                    sums[weight] = squares + sums.get(weight, 0)
    return {
        weight: 0.5 + 0.5 * total / total.mean()
        for weight, total in sums.items()
        if bool(total.any())
    }
