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
from coin.errors import StateError
from coin.files.tensors import State
from coin.networks.batchnorm import folded
from coin.networks.calling import as_input
from coin.networks.compressed import Rounding
from coin.networks.guard import check_apart, differentiable, evaluating
from coin.statistics.rules import Call
from coin.statistics.rules.convolution import ConvolutionCall, Geometry
from coin.statistics.rules.elementwise import ElementwiseCall
from coin.statistics.rules.linear import LinearCall
from coin.statistics.solvers import fit_affine
from coin.statistics.sums import sum_type
from coin.statistics.tape import Tape

PROBES = 19  # forward-equivalents of the search: two samples alone, two and three at once, with two backward passes
SAME_CALLS = "give experts that make the same calls whatever their inputs"
WIDEST = 5000  # unknowns up to which a matrix is rounded by its metric [K, K], whose inverse takes time as K³
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

    def target_bytes(self, places: int) -> int:
        """Return how many bytes its outputs take at so many positions of a sample, in float32."""
        return 4 * min(places, self.positions) * self.channels


class Trace(NamedTuple):
    """A network's forward pass, in the order of execution."""

    units: list[Unit]
    calls: list[str]  # the weights of all calls
    floats: int  # of one sample in memory at once, at most
    probes: int  # forward-equivalents of the search


def floating_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return a network's floating-point parameters by name, whose calls an `Interceptor` sees."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.is_floating_point()}


def affine_units(network: nn.Module, inputs: Batch, others: Batch | None = None) -> Trace:
    """Find the affine units of a network in eval mode, by running it on two and on three samples.

    A unit is a linear map, a normalisation or a scale whose weight and bias nothing else reads in a forward pass. Its
    output has the samples, or several rows of each, in order along its leading dimension; gradients show that they are
    in order, and not sorted by activations. A BatchNorm that alone and next reads a linear map's outputs is part of its
    unit. Raises StateError where the calls depend on the number of samples.

    Where values may decide where rows go, these may lie in order by chance: then the network runs on `others` too, if
    they are given.
    """
    parameters = floating_parameters(network)
    probes = PROBES
    with evaluating(network), differentiable(parameters.values()):
        two, three = Tape(parameters), Tape(parameters)
        two.run(network, _samples(inputs, 2, network))
        few = _samples(inputs, 3, network)
        output = three.run(network, few)
        if two.weights != three.weights:
            found = f"{type(network).__name__} makes other calls on two samples than on three, expected the same"
            raise StateError(f"{found}; {SAME_CALLS}")
        check_apart(network, few, output)
        general = _not_by_sample(three, output, parameters)
        if three.sorts and others is not None:
            more = Tape(parameters)
            output = more.run(network, as_input(others, network))
            general |= _not_by_sample(more, output, parameters)
            probes += size_of(others) * (1 + 2 * more.repetitions)
    shapes_of_two = {call.names.get("weight"): call.made for call in two.calls}
    calls = [call for call in three.calls if "weight" in call.names]
    units: list[Unit] = []
    for place, call in enumerate(calls):
        weight = call.names["weight"]
        is_norm_of_last = bool(units) and units[-1].end == weight
        if is_norm_of_last or not _is_unit(call, shapes_of_two.get(weight, call.made), general):
            continue
        unit = _unit(call, parameters[weight].numel())
        following = calls[place + 1] if place + 1 < len(calls) else None
        if following is not None and _is_norm_of(following, call, network, general):
            unit = replace(unit, norm=following.names["weight"].rpartition(".")[0])
        units.append(unit)
    largest = max((max(call.inputs.numel(), call.made.numel()) for call in calls), default=1)  # of three samples
    return Trace(units, three.weights, max(1, _ALIVE * largest // 3), probes)


def _samples(inputs: Batch, count: int, network: nn.Module) -> Batch:
    """Return so many of the inputs, again from the first where there are fewer."""
    return as_input(take(inputs, torch.arange(count) % size_of(inputs)), network)


def _not_by_sample(tape: Tape, output: Tensor, parameters: Mapping[str, Tensor]) -> set[str]:
    """Return the parameters that are not used by one call alone whose rows lie sample by sample."""
    try:
        return tape.shared(output) | tape.misplaced(output, batched=False)
    except RuntimeError as error:  # a function that has no backward pass
        if is_out_of_memory(error):
            raise
        return {*parameters}


def _is_unit(call: Call, shape_of_two: tuple[int, ...], general: set[str]) -> bool:
    """Whether a call on three samples is affine in its weight, its rows in order, and its parameters its own.

    Args:
        call: The call.
        shape_of_two: Its output's shape on two samples.
        general: The parameters of `_not_by_sample`.
    """
    is_scale = isinstance(call, ElementwiseCall) and not call.added
    is_affine = is_scale or isinstance(call, LinearCall)
    samples_lead = shape_of_two[1:] == call.made[1:] and 3 * shape_of_two[0] == 2 * call.made[0]
    # Rows that activations have placed before the call: a single row for each sample cannot be out of order.
    in_order = not call.decided or shape_of_two[:-1] == (2,)
    return is_affine and samples_lead and in_order and general.isdisjoint(call.names.values())


def _is_norm_of(norm: Call, call: Call, network: nn.Module, general: set[str]) -> bool:
    """Whether a call is that of a BatchNorm which alone reads another call's output, a channel for each of its rows."""
    if isinstance(call, ConvolutionCall):
        is_per_row = True
    else:
        is_per_row = isinstance(call, LinearCall) and not call.transposed and len(call.made) == 2
    reads_it_alone = call.readers == 1 and norm.source == call.node
    if not (is_per_row and reads_it_alone and "bias" in norm.names and general.isdisjoint(norm.names.values())):
        return False
    module = norm.names["weight"].rpartition(".")[0]
    return isinstance(network.get_submodule(module), _BatchNorm)


def _unit(call: Call, size: int) -> Unit:
    """Return a call on three samples as a unit without a BatchNorm, given its weight's number of entries."""
    shape = (call.made[0] // 3, *call.made[1:])
    if isinstance(call, ConvolutionCall):
        outputs, groups = shape[1], call.geometry.groups
    elif isinstance(call, LinearCall):
        outputs, groups = shape[-1], 1
    else:
        outputs, groups = size, size
    return Unit(
        weight=call.names["weight"],
        bias=call.names.get("bias"),
        norm=None,
        shape=shape,
        positions=prod(shape) // outputs,
        unknowns=size // outputs,
        outputs=outputs // groups,
        is_convolution=isinstance(call, ConvolutionCall),
    )


def folded_unit(network: nn.Module, unit: Unit, state: State) -> dict[str, Tensor]:
    """Return a unit's parameters and statistics from another network's state, its BatchNorm `folded` in."""
    norm = network.get_submodule(str(unit.norm))
    assert isinstance(norm, _BatchNorm)
    return folded(state, unit.weight, unit.bias, str(unit.norm), norm.eps)


def output_rows(call: Call, output: Tensor, samples: int, places: Tensor | None) -> Tensor:
    """Return a call's outputs for P samples at positions `places` [P, q] of each, none for all, as rows [P·q, ·]."""
    if isinstance(call, ElementwiseCall):
        whole = (1,) * (output.ndim - 1 - len(call.shape)) + call.shape
        entries = [1 + place for place, size in enumerate(whole) if size > 1]
        positions = [place for place in range(1, output.ndim) if place not in entries]
        rows = _at(output.permute(0, *positions, *entries), len(positions), samples, places)
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
        rows = output_rows(call, call.normalised(), samples, places).T[..., None]
    else:
        rows = output_rows(call, call.inputs, samples, places)[None]
    return rows.to(sum_type(rows)), torch.arange(rows.shape[2], device=rows.device)


def _patches(inputs: Tensor, geometry: Geometry, samples: int, places: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return `input_rows` of images [P·k, C, *size], tap by tap, without the taps that meet no image."""
    size = tuple(inputs.shape[2:])
    channels, groups = inputs.shape[1], geometry.groups
    images_each = len(inputs) // samples  # k
    outputs = prod(geometry.output_size(size))  # positions of one image
    if places is None:
        places = torch.arange(images_each * outputs, device=inputs.device)[None]  # [1, q]
    pixels, inside = geometry.met(places % outputs, size)  # [P or 1, q, taps]: pixels of an image, and whether of it
    taps = inside.shape[2]
    alive = inside.flatten(0, 1).any(0)  # [taps]
    if not bool(alive.any()):
        alive[0] = True  # where no tap meets an image: one of zeros
    columns = torch.arange(channels // groups * taps, device=inputs.device).view(-1, taps)
    entries = columns[:, alive].T.flatten()
    image = (places // outputs)[..., None]
    pixels = (image * prod(size) + pixels[..., alive]).expand(samples, -1, -1)  # of a sample's images [P, q, taps]
    inside = inside[..., alive].expand_as(pixels).flatten(0, 1)  # [P·q, taps]
    images = inputs.reshape(samples, images_each, channels, -1).movedim(2, 0).flatten(2)  # [C, P, k · pixels]
    values = images.gather(2, pixels.flatten(1).expand(channels, -1, -1)).view(channels, *inside.shape)
    if not bool(inside.all()):
        values *= inside
    values = values.view(groups, -1, *inside.shape).movedim(1, 3)  # [G, P·q, taps, C/G]
    return values.to(sum_type(values)).flatten(2), entries


def _at(x: Tensor, dims: int, samples: int, places: Tensor | None) -> Tensor:
    """Return x [P·k, *positions, …], with so many dimensions of positions, at places [P, q] of these: [P·q, …]."""
    if places is None:
        return x.reshape(-1, *x.shape[1 + dims :])
    rows_each = len(x) // samples
    row, *position = torch.unravel_index(places, (rows_each, *x.shape[1 : 1 + dims]))
    first = rows_each * torch.arange(samples, device=places.device)[:, None]
    return x[(first + row, *position)].flatten(0, 1)


def fit_unit(
    network: nn.Module,
    unit: Unit,
    call: Call,
    rows: UnitRows,
    ridge: float,
    rounding: Rounding | None = None,
    tasks: Tensor | None = None,
) -> None:
    """Refit a unit in place to its rows' targets, at the call of its map in a forward pass.

    The ridge is relative. With a rounding, which takes the weight, the matrix is rounded, and the bias fitted to what
    that leaves. With the samples' tasks [P] each task has an intercept of its own.
    """
    weight = network.get_parameter(unit.weight)
    is_turned = isinstance(call, LinearCall) and call.transposed  # the weight is [K, O]
    inputs, entries = rows.inputs, rows.entries
    flat = (weight.T if is_turned else weight).reshape(len(inputs), -1, unit.unknowns)  # [G, O, K]
    outputs = inputs @ flat[..., entries].to(inputs).mT  # [G, P·q, O]
    shift = None if unit.shift is None else network.get_parameter(unit.shift)
    bias = call.bias if shift is None else shift  # a bias that is computed of other tensors stays
    if bias is not None:
        outputs += bias.to(inputs).reshape(len(inputs), 1, -1)
    residual = rows.targets.view(outputs.shape[1], len(inputs), -1).transpose(0, 1) - outputs

    def rounded(step: Tensor, metric: Callable[[], Tensor]) -> Tensor:
        assert rounding is not None
        whole = _whole_metric(metric(), entries, unit.unknowns) if unit.unknowns <= WIDEST else None
        step = rounding.step(unit.weight, weight, _placed(step, entries, flat), whole, is_turned)
        return step[..., entries]

    row_tasks = None if tasks is None else tasks[:, None].expand(rows.weights.shape).flatten().to(inputs.device)
    step, constant = fit_affine(
        inputs,
        residual,
        rows.weights.flatten(),
        ridge * len(entries) / unit.unknowns,
        intercept=shift is not None,
        change=None if rounding is None else rounded,
        tasks=row_tasks,
    )
    if rounding is not None:
        weight.copy_(rounding.weight(unit.weight))
    else:
        step = _placed(step, entries, flat).flatten(0, 1)
        weight.add_((step.T if is_turned else step).reshape(weight.shape))
    if shift is not None:
        shift.add_(constant.reshape(shift.shape))


def _whole_metric(metric: Tensor, entries: Tensor, unknowns: int) -> Tensor:
    """Return a metric of some entries [G, K', K'] as one of all [G, K, K]; the others weigh as these do on average."""
    mean = metric.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    whole = mean * torch.eye(unknowns).to(metric)
    whole[:, entries[:, None], entries] = metric
    return whole


def _placed(step: Tensor, entries: Tensor, flat: Tensor) -> Tensor:
    """Return a step of some entries [G, O, K'] as one of all [G, O, K], zero elsewhere."""
    whole = step.new_zeros(flat.shape)
    whole[..., entries] = step
    return whole
