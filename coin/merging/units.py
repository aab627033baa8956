"""The affine units of a network, its maps with the BatchNorms behind them: found by tracing, fitted by regression."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coin.core.batches import Batch, size_of, take
from coin.core.memory import is_out_of_memory
from coin.errors import ConfigurationError, StateError
from coin.files.tensors import State
from coin.merging.rounding import Rounding
from coin.networks.batchnorm import folded
from coin.networks.calling import as_input
from coin.networks.guard import check_apart, differentiable, evaluating
from coin.statistics.rules import Call
from coin.statistics.rules.convolution import ConvolutionCall, Geometry
from coin.statistics.rules.elementwise import ElementwiseCall
from coin.statistics.rules.linear import LinearCall
from coin.statistics.solvers import fit_affine
from coin.statistics.sums import sum_type
from coin.statistics.tape import Tape

# Forward-equivalents of the search: two samples alone, two and three at once, and two backward passes, each of which
# costs two forward ones, of the three.
PROBES = 2 + 2 + 3 + 2 * 2 * 3
SAME_CALLS = "give experts that make the same calls whatever their inputs"
WIDEST = 5000  # unknowns up to which a matrix is rounded by its metric [K, K], whose inverse takes time as K³
DAMPING = 0.1  # relative to the inputs' mean square, of the metric by which a body that is not fitted is rounded
_ALIVE = 4  # tensors as large as the largest that a layer reads or writes, in memory at once


@dataclass(frozen=True)
class Unit:
    """An affine map of a network, by its parameters' names, with the BatchNorm behind it."""

    weight: str
    bias: str | None
    norm: str | None  # the BatchNorm's module
    shape: tuple[int, ...]  # of its output for one sample, the sample's rows first
    positions: int  # at which the same weights were used
    unknowns: int  # of each output
    outputs: int  # of each group
    is_convolution: bool

    @property
    def end(self) -> str:
        """The name of the weight of its last call."""
        return self.weight if self.norm is None else f"{self.norm}.weight"

    @property
    def shift(self) -> str | None:
        """The name of the parameter that carries its bias."""
        return self.bias if self.norm is None else f"{self.norm}.bias"

    @property
    def channels(self) -> int:
        """The number of outputs of all groups."""
        return prod(self.shape) // self.positions

    @property
    def is_matrix(self) -> bool:
        """Whether it is one matrix, neither of groups nor a number."""
        return self.outputs == self.channels and self.outputs * self.unknowns > 1


class Trace(NamedTuple):
    """A network's forward pass, in the order of execution."""

    units: list[Unit]
    calls: list[str]  # the weights of all calls
    floats: int  # of one sample in memory at once, at most
    probes: int  # forward-equivalents of the search


def floating_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return a network's floating-point parameters by name, whose calls an `Interceptor` sees."""
    return {
        name: parameter
        for name, parameter in network.named_parameters()
        if parameter.is_floating_point()
    }


def affine_units(network: nn.Module, inputs: Batch, others: Batch | None = None) -> Trace:
    """Find the affine units of a network in eval mode, by running it on two and on three samples.

    A unit is a linear map, a normalisation or a scale whose weight and bias nothing else reads in a forward pass. Its
    output has the samples, or several rows of each, in order along its leading dimension: gradients show which samples
    rows belong to, and that activations decided nothing before the call shows their order within a sample. A BatchNorm
    that alone and next reads a linear map's outputs is part of its unit.

    Raises StateError where the calls depend on the number of samples, or samples on one another; DataError where the
    outputs are not logits [B, C].

    Where values may decide where rows go, these may lie in order by chance: then the network runs on `others` too, if
    they are given.
    """
    if any(getattr(module, "grad_checkpointing", False) for module in network.modules()):  # timm's
        raise ConfigurationError(
            f"found {type(network).__name__} with gradient checkpointing, which hides its layers, expected it off; "
            "call set_grad_checkpointing(False)"
        )
    parameters = floating_parameters(network)
    probes = PROBES
    few = _samples(inputs, 3, network)
    two = Tape(parameters)
    three = Tape(parameters)
    with evaluating(network), differentiable(parameters.values()):
        two.run(network, _samples(inputs, 2, network))
        output = three.run(network, few)
        if two.weights != three.weights:
            raise StateError(
                f"{type(network).__name__} makes other calls on two samples than on three, expected the same; "
                f"{SAME_CALLS}"
            )
        check_apart(network, few, output)
        not_own = _not_by_sample(three, output, parameters)
        if three.sorts and others is not None:
            more = Tape(parameters)
            output_of_more = more.run(network, as_input(others, network))
            not_own |= _not_by_sample(more, output_of_more, parameters)
            probes += size_of(others) * (1 + 2 * more.repetitions)
    units = _assembled(network, two, three, not_own)
    sizes = [1]  # of what calls read and write, of three samples
    for call in three.calls:
        if "weight" in call.names:
            sizes += [call.inputs.numel(), call.made.numel()]
    floats = max(1, _ALIVE * max(sizes) // 3)
    return Trace(units, three.weights, floats, probes)


def _assembled(network: nn.Module, two: Tape, three: Tape, not_own: set[str]) -> list[Unit]:
    """Return the units of a network, whose passes on two and on three samples are recorded.

    `not_own` are the parameters of `_not_by_sample`.
    """
    shapes_of_two = {call.names.get("weight"): call.made for call in two.calls}
    calls = [call for call in three.calls if "weight" in call.names]
    units: list[Unit] = []
    for call, following in zip(calls, [*calls[1:], None], strict=True):
        weight = call.names["weight"]
        is_norm_of_last = bool(units) and units[-1].end == weight
        # Not recorded: then as of three, which is no unit's.
        shape_of_two = shapes_of_two.get(weight, call.made)
        if is_norm_of_last or not _is_unit(call, shape_of_two, not_own):
            continue
        size = network.get_parameter(weight).numel()
        unit = _unit(call, size)
        if following is not None and _is_norm_of(following, call, network, not_own):
            norm, _, _ = following.names["weight"].rpartition(".")
            unit = replace(unit, norm=norm)
        units.append(unit)
    return units


def _samples(inputs: Batch, count: int, network: nn.Module) -> Batch:
    """Return so many of the inputs, again from the first where there are fewer."""
    places = torch.arange(count) % size_of(inputs)
    return as_input(take(inputs, places), network)


def _not_by_sample(tape: Tape, output: Tensor, parameters: Mapping[str, Tensor]) -> set[str]:
    """Return the parameters that are not used by one call alone whose rows lie sample by sample."""
    try:
        return tape.shared(output) | tape.misplaced(output, batched=False)
    except RuntimeError as error:  # a function that has no backward pass
        if is_out_of_memory(error):
            raise
        return {*parameters}


def _is_unit(call: Call, shape_of_two: tuple[int, ...], not_own: set[str]) -> bool:
    """Whether a call on three samples is affine in its weight, its rows in order, and its parameters its own.

    Args:
        call: The call.
        shape_of_two: Its output's shape on two samples.
        not_own: The parameters of `_not_by_sample`.
    """
    is_scale = isinstance(call, ElementwiseCall) and not call.added
    is_affine = is_scale or isinstance(call, LinearCall)
    has_same_rows = shape_of_two[1:] == call.made[1:]
    samples_lead = has_same_rows and 3 * shape_of_two[0] == 2 * call.made[0]
    # Where activations have placed rows, those of one sample may be out of order, unless it has a single one.
    in_order = not call.decided or shape_of_two[:-1] == (2,)
    is_own = not_own.isdisjoint(call.names.values())
    return is_affine and samples_lead and in_order and is_own


def _is_norm_of(norm: Call, call: Call, network: nn.Module, not_own: set[str]) -> bool:
    """Whether a call is that of a BatchNorm which alone reads another call's output, whose channels are its own."""
    is_matrix = isinstance(call, LinearCall) and len(call.made) == 2
    is_per_row = is_matrix or isinstance(call, ConvolutionCall)
    reads_it_alone = call.readers == 1 and norm.source == call.node
    is_own = "bias" in norm.names and not_own.isdisjoint(norm.names.values())
    if not (is_per_row and reads_it_alone and is_own):
        return False
    module, _, _ = norm.names["weight"].rpartition(".")
    return isinstance(network.get_submodule(module), _BatchNorm)


def _unit(call: Call, size: int) -> Unit:
    """Return a call on three samples as a unit without a BatchNorm, given its weight's number of entries."""
    shape = (call.made[0] // 3, *call.made[1:])  # of one sample
    groups = 1
    if isinstance(call, ConvolutionCall):
        channels = shape[1]
        groups = call.geometry.groups
    elif isinstance(call, LinearCall):
        channels = shape[-1]
    else:
        channels = size
        groups = size
    return Unit(
        weight=call.names["weight"],
        bias=call.names.get("bias"),
        norm=None,
        shape=shape,
        positions=prod(shape) // channels,
        unknowns=size // channels,
        outputs=channels // groups,
        is_convolution=isinstance(call, ConvolutionCall),
    )


def as_map(weight: Tensor, unit: Unit) -> Tensor:
    """Return the weight of a unit as a matrix for each group [G, O, K]."""
    return weight.reshape(-1, unit.outputs, unit.unknowns)


def folded_unit(network: nn.Module, unit: Unit, state: State) -> dict[str, Tensor]:
    """Return a unit's parameters and statistics from another network's state, its BatchNorm `folded` in."""
    assert unit.norm is not None
    norm = network.get_submodule(unit.norm)
    assert isinstance(norm, _BatchNorm)
    return folded(state, unit.weight, unit.bias, unit.norm, norm.eps)


def output_rows(call: Call, output: Tensor, samples: int, places: Tensor | None) -> Tensor:
    """Return a call's outputs for P samples at positions `places` [P, q] of each, none for all, as rows [P·q, ·]."""
    if isinstance(call, ElementwiseCall):
        lacking = output.ndim - 1 - len(call.shape)
        sizes = [1] * lacking + list(call.shape)  # of the weight, along each dimension of a row
        channels = [place for place, size in enumerate(sizes, 1) if size > 1]
        positions = [place for place, size in enumerate(sizes, 1) if size == 1]
        rows = _at(output.permute(0, *positions, *channels), len(positions), samples, places)
    else:
        last = output.movedim(1, -1) if isinstance(call, ConvolutionCall) else output
        rows = _at(last, output.ndim - 2, samples, places)
    return rows.flatten(1) if rows.ndim > 1 else rows[:, None]


class UnitRows(NamedTuple):
    """The rows of a unit's regression: q positions of each of P samples."""

    inputs: Tensor  # what the weight multiplies [G, P·q, K']
    entries: Tensor  # by which entries of its rows [K']: the others meet zeros alone
    targets: Tensor  # the wanted outputs [P, q, G·O]
    weights: Tensor  # the rows' weights [P, q]


def input_rows(call: Call, samples: int, places: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what a call's weight multiplies at the same positions [G, P·q, K'], and by which entries of a row [K']."""
    if isinstance(call, ConvolutionCall):
        return _patches(call.inputs, call.geometry, samples, places)
    if isinstance(call, ElementwiseCall):
        numbers = output_rows(call, call.normalised(), samples, places)  # [P·q, G]
        rows = numbers.T[..., None]
    else:
        rows = output_rows(call, call.inputs, samples, places)[None]
    entries = torch.arange(rows.shape[2], device=rows.device)
    return rows.to(sum_type(rows)), entries


def _patches(
    inputs: Tensor, geometry: Geometry, samples: int, places: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return `input_rows` of images [P·k, C, *size], tap by tap, without the taps that meet no image."""
    channels = inputs.shape[1]
    dims = len(geometry.kernel)
    patches = geometry.patches(inputs)  # [P·k, *output, *kernel, C]
    rows = _at(patches, dims, samples, places).flatten(1, dims)  # [P·q, taps, C]
    ones = geometry.patches(torch.ones_like(inputs[:1, :1]))
    meets = ones.flatten(0, dims).flatten(1)  # whether taps meet an image, by its outputs
    if places is not None:
        meets = meets[places.flatten() % len(meets)]
    alive = meets.any(0)  # [taps]
    if not bool(alive.any()):
        alive[0] = True  # where no tap meets an image: one of zeros
    values = rows[:, alive].permute(2, 0, 1).contiguous()  # [C, P·q, taps]
    by_group = values.view(geometry.groups, -1, *values.shape[1:]).movedim(
        1, 3
    )  # [G, P·q, taps, C/G]
    unknowns = torch.arange(channels // geometry.groups * len(alive), device=inputs.device)
    columns = unknowns.view(-1, len(alive))  # [C/G, taps]
    return by_group.to(sum_type(inputs)).flatten(2), columns[:, alive].T.flatten()


def _at(x: Tensor, dims: int, samples: int, places: Tensor | None) -> Tensor:
    """Return x [P·k, *positions, …], with so many dimensions of positions, at places [P, q] of these: [P·q, …]."""
    if places is None:
        return x.reshape(-1, *x.shape[1 + dims :])
    rows_each = len(x) // samples
    sizes = (rows_each, *x.shape[1 : 1 + dims])
    row, *position = torch.unravel_index(places, sizes)
    first = rows_each * torch.arange(samples, device=places.device)[:, None]
    chosen = x[(first + row, *position)]
    return chosen.flatten(0, 1)


def fit_unit(
    network: nn.Module,
    unit: Unit,
    call: Call,
    rows: UnitRows,
    ridge: float | None,
    rounding: Rounding | None = None,
    tasks: Tensor | None = None,
) -> None:
    """Refit a unit in place to its rows' targets, at the call of its map in a forward pass.

    The ridge is relative; without one the targets are the unit's own outputs. With a rounding, which takes the weight,
    the matrix is rounded, and the bias fitted to what that leaves. With the samples' tasks [P] each task has an
    intercept of its own.
    """
    weight = network.get_parameter(unit.weight)
    inputs = rows.inputs
    entries = rows.entries
    matrix = as_map(weight, unit)  # [G, O, K]
    used = matrix[..., entries].to(inputs)
    outputs = inputs @ used.mT  # [G, P·q, O]
    shift = None if unit.shift is None else network.get_parameter(unit.shift)
    bias = call.bias if shift is None else shift  # a bias that is computed of other tensors stays
    if bias is not None:
        outputs += bias.to(inputs).reshape(len(inputs), 1, -1)
    by_row = rows.targets.view(outputs.shape[1], len(inputs), -1)
    targets = outputs if ridge is None else by_row.transpose(0, 1)  # [G, P·q, O]
    row_tasks = None
    if tasks is not None:
        by_sample = tasks[:, None].expand(rows.weights.shape)  # [P, q]
        row_tasks = by_sample.flatten().to(inputs.device)

    def rounded(step: Tensor, metric: Callable[[], Tensor]) -> Tensor:
        assert rounding is not None
        whole = None
        if unit.unknowns <= WIDEST:
            whole = _whole_metric(metric(), entries, unit.unknowns)
        placed = _placed(step, entries, matrix)
        taken = rounding.step(unit.weight, weight, placed, whole)
        return taken[..., entries]

    step, constant = fit_affine(
        inputs,
        targets - outputs,
        rows.weights.flatten(),
        (DAMPING if ridge is None else ridge) * len(entries) / unit.unknowns,
        intercept=shift is not None,
        change=None if rounding is None else rounded,
        tasks=row_tasks,
    )
    if rounding is not None:
        weight.copy_(rounding.weight(unit.weight))
    else:
        weight.add_(_placed(step, entries, matrix).reshape(weight.shape))
    if shift is not None:
        shift.add_(constant.reshape(shift.shape))


def _whole_metric(metric: Tensor, entries: Tensor, unknowns: int) -> Tensor:
    """Return a metric of some entries [G, K', K'] as one of all [G, K, K]; the others weigh as these do on average."""
    diagonal = metric.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1)[:, None, None]
    whole = mean * torch.eye(unknowns).to(metric)
    whole[:, entries[:, None], entries] = metric
    return whole


def _placed(step: Tensor, entries: Tensor, like: Tensor) -> Tensor:
    """Return a step of some entries [G, O, K'] as one of all [G, O, K], zero elsewhere."""
    whole = step.new_zeros(like.shape)
    whole[..., entries] = step
    return whole
