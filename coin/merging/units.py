"""The affine units of a network in the order of execution, its maps with the BatchNorms behind them: by tracing."""

from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from coin.core.batches import Batch, as_input, nested_tensors, size_of, take
from coin.errors import StateError
from coin.files.tensors import State, weighted_sum
from coin.networks.batchnorm import folded
from coin.statistics.guard import differentiable, evaluating
from coin.statistics.intercept import Interceptor
from coin.statistics.rules import Call
from coin.statistics.rules.convolution import ConvolutionCall
from coin.statistics.rules.elementwise import ElementwiseCall
from coin.statistics.rules.linear import LinearCall
from coin.statistics.tape import Tape

# Forward-equivalents of the search: of two samples, of three, and of three with two backward passes.
PROBES = 20
_ALIVE = 3  # tensors of a call's size alive beside the inputs of the modules around it


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
    def names(self) -> set[str | None]:
        """The names of all its parameters."""
        return {self.weight, self.bias, self.end, self.shift}


class Trace(NamedTuple):
    """A network's forward pass, in the order of execution."""

    units: list[Unit]
    calls: list[str]  # the weights of all calls
    floats: int  # of one sample in memory at once, at most


def floating_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return a network's floating-point parameters by name, whose calls an `Interceptor` sees."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.is_floating_point()}


def affine_units(network: nn.Module, inputs: Batch) -> Trace:
    """Find the affine units of a network in eval mode, by running it on two and on three samples.

    A unit is a linear map, a normalisation or a scale whose weight and bias nothing else reads in a forward pass, and
    whose output has the samples, or several rows of each, in order along its leading dimension, as gradients say; rows
    that activations have sorted do not count, since they differ between networks. A BatchNorm that alone and next reads
    a linear map's outputs is part of its unit. Raises StateError where the calls depend on the number of samples.
    """
    two, three = (_trace(network, take(inputs, torch.arange(count) % size_of(inputs))) for count in (2, 3))
    if [seen.unit.weight for seen in two] != [seen.unit.weight for seen in three]:
        raise StateError(
            f"{type(network).__name__} makes other calls on two samples than on three, expected the same; give experts "
            "that make the same calls whatever their inputs"
        )
    misplaced, decided = _misplaced(network, take(inputs, torch.arange(3) % size_of(inputs)))
    units: list[Unit] = []
    for seen, other, following in zip(two, three, [*two[1:], None], strict=True):
        unit, weight = seen.unit, seen.unit.weight
        leads = seen.shape[1:] == other.shape[1:] and 3 * seen.shape[0] == 2 * other.shape[0]
        placed = weight not in misplaced and (weight not in decided or seen.shape[:-1] == (2,))
        if seen.is_unit and leads and placed and not (units and units[-1].end == weight):
            reads = following is not None and following.is_batchnorm and following.source == seen.output
            if following is not None and reads and seen.is_map and following.unit.bias is not None:
                unit = replace(unit, norm=following.unit.weight.rpartition(".")[0])
            units.append(unit)
    floats = max((seen.around + _ALIVE * seen.shape.numel()) // 2 for seen in two) if two else 1
    return Trace(units, [seen.unit.weight for seen in two], floats)


def _misplaced(network: nn.Module, samples: Batch) -> tuple[set[str], set[str]]:
    """Return the parameters at whose calls row r is not of sample r // k, and before which activations decide."""
    parameters = floating_parameters(network)
    with evaluating(network), differentiable(parameters.values()):
        tape = Tape(parameters, {}, None)
        output = tape.run(network, as_input(samples, network))
        for batched in (True, False):
            with suppress(RuntimeError):  # a function that cannot batch its backward pass, or has none of this kind
                return tape.misplaced(output, unseen=True, batched=batched), tape.decided
        return set(parameters), set()


class _Seen(NamedTuple):
    """A call of a trace, as a unit without BatchNorm."""

    unit: Unit
    source: tuple[int, int]  # the input's place in memory
    output: tuple[int, int]  # the output's
    shape: torch.Size  # of the output
    around: int  # the floats that the modules around it were called with
    is_unit: bool  # it is linear in its weight and bias, which nothing else reads
    is_map: bool  # a BatchNorm over its output has a channel for every row of the weight
    is_batchnorm: bool  # of a module that alone reads its input, and of a weight and bias that nothing else reads


class _Readers(TorchFunctionMode):
    """Counts how many functions that return tensors read each address, and each parameter by id."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[int] = Counter()
        self.parameters: Counter[int] = Counter()
        self._tensors: list[Tensor] = []  # kept so that no memory is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = list(nested_tensors(result))
        self._tensors += made
        for each in nested_tensors((args, kwargs)) if made else ():
            if isinstance(each, nn.Parameter):
                self.parameters[id(each)] += each is not result
            else:
                self.times[each.data_ptr()] += 1
        return result


def _trace(network: nn.Module, samples: Batch) -> list[_Seen]:
    """Return the ruled calls with a weight of a forward pass, in their order."""
    calls: list[tuple[Call, Mapping[str, str], tuple[int, int], Tensor, tuple[int, int], int]] = []
    entered: list[dict[int, int]] = []

    def visit(call: Call, names: dict[str, str], function: Callable[[], Tensor]) -> Tensor:
        source = (call.inputs.data_ptr(), call.inputs._version)
        output = function()
        if "weight" in names:
            around = sum({place: size for each in entered for place, size in each.items()}.values())
            calls.append((call, names, source, output, (output.data_ptr(), output._version), around))
        return output

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append({each.data_ptr(): each.numel() for each in nested_tensors((args, kwargs))})

    def leave(*_: Any) -> None:
        entered.pop()

    readers, named = _Readers(), floating_parameters(network)
    # The readers come last, and so see what the network calls but not what the interceptor does on the way.
    with ExitStack() as hooks, evaluating(network, gradients=False), Interceptor(named, visit), readers:
        for each in network.modules():
            hooks.enter_context(each.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(each.register_forward_hook(leave))
        network(as_input(samples, network))
    times = Counter(names["weight"] for _, names, *_ in calls)
    seen = []
    for call, names, source, output, made, around in calls:
        weight = names["weight"]
        linear, convolution = isinstance(call, LinearCall), isinstance(call, ConvolutionCall)
        affine = linear or (isinstance(call, ElementwiseCall) and call.normalised is not None)
        unshared = times[weight] == 1 and all(readers.parameters[id(named[n])] <= 1 for n in names.values())
        is_map = convolution or (isinstance(call, LinearCall) and not call.transposed and output.ndim == 2)
        norm = isinstance(network.get_submodule(weight.rpartition(".")[0]), _BatchNorm)
        alone = norm and unshared and readers.times[source[0]] == 1
        size, shape = max(1, named[weight].numel()), (len(output) // size_of(samples), *output.shape[1:])
        outputs = output.shape[1 if convolution else -1] if linear else size
        groups = call.geometry.groups if isinstance(call, ConvolutionCall) else 1 if linear else outputs
        sizes = prod(shape) // outputs, size // outputs, outputs // groups
        unit = Unit(weight, names.get("bias"), None, shape, *sizes, convolution)
        seen.append(_Seen(unit, source, made, output.shape, around, affine and unshared, is_map, alone))
    return seen


def fold_average(
    network: nn.Module, units: Iterable[Unit], states: Sequence[tuple[State, State]], row: Sequence[float]
) -> None:
    """Write the β-average of other networks' folded maps into a network, whose BatchNorms become shifts."""
    every: list[State] = [ChainMap(*cast(Any, each)) for each in states]  # never written to
    tensors = dict(chain(network.named_parameters(), network.named_buffers()))
    for unit in units:
        if unit.norm is not None:
            eps = cast(_BatchNorm, network.get_submodule(unit.norm)).eps
            maps = [folded(state, unit.weight, unit.bias, unit.norm, eps) for state in every]
            with torch.no_grad():
                for name, tensor in weighted_sum(maps, row).items():
                    tensors[name].copy_(tensor)
