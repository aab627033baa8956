"""The affine units of a network, its maps with the BatchNorms behind them, found in a forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coin.core.batches import Batch, size_of, take
from coin.errors import ConfigurationError, StateError
from coin.files.tensors import State
from coin.networks.batchnorm import folded
from coin.networks.calling import as_input, logits_of
from coin.networks.guard import check_apart, differentiable, evaluating
from coin.statistics.intercept import Interceptor, Visit
from coin.statistics.rules import Call
from coin.statistics.rules.convolution import ConvolutionCall
from coin.statistics.rules.elementwise import ElementwiseCall
from coin.statistics.rules.linear import LinearCall
from coin.statistics.tape import Tape

# Forward-equivalents of the search: two samples alone, two and three at once, and two backward passes, each of which
# costs two forward ones, of the three.
PROBES = 2 + 2 + 3 + 2 * 2 * 3
SAME_CALLS = "give experts that make the same calls whatever their inputs"
_ALIVE = 4  # tensors as large as the largest that a layer reads or writes, in memory at once


@dataclass(frozen=True)
class Unit:
    """An affine map of a network with the BatchNorm behind it: G matrices [O, K], one for each group of channels.

    A scale, as of a LayerNorm, is a group of one number for each channel.

    Attributes:
        weight: The name of its weight.
        bias: The name of its bias.
        norm: The BatchNorm's module.
        shape: The shape of its output for one sample [k, …].
        groups: G.
        outputs: O of a group; there are G·O channels.
        unknowns: K of a group, the inputs of each output.
        is_convolution: Whether it is a convolution.
        kernel: The number of taps of a convolution's kernel, 1 for other maps.
        taps: Those that meet the image anywhere; the others multiply padding alone.
    """

    weight: str
    bias: str | None
    norm: str | None
    shape: tuple[int, ...]
    groups: int
    outputs: int
    unknowns: int
    is_convolution: bool = False
    kernel: int = 1
    taps: tuple[int, ...] = (0,)

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
        return self.groups * self.outputs

    @property
    def positions(self) -> int:
        """At how many positions of a sample the weight is used."""
        return prod(self.shape) // self.channels

    @property
    def is_matrix(self) -> bool:
        """Whether it is one matrix, neither of groups nor a number."""
        return self.groups == 1 and self.outputs * self.unknowns > 1

    @property
    def share(self) -> float:
        """K' / K, the share of a weight's columns that `columns_of` has."""
        return len(self.taps) / self.kernel

    def nbytes(self, positions: int) -> int:
        """Return the bytes of its outputs at so many positions in all, in float32."""
        return 4 * positions * self.channels

    @property
    def columns(self) -> Tensor:
        """The places of these taps' columns among all K of the weight, tap by tap [K']."""
        channels = torch.arange(self.unknowns // self.kernel)
        places = torch.tensor(self.taps)[:, None] + self.kernel * channels
        return places.flatten()

    def columns_of(self, weight: Tensor) -> Tensor:
        """Return the matrices [G, O, K'] of a weight, without the columns that multiply padding alone."""
        matrices = weight.reshape(self.groups, -1, self.unknowns)
        return matrices if self.kernel == 1 else matrices[..., self.columns.to(weight.device)]

    def from_columns(self, columns: Tensor) -> Tensor:
        """Return matrices of such columns […, K'] with all columns […, K] as in the weight, zero where left out."""
        by_tap = columns.reshape(*columns.shape[:-1], len(self.taps), -1)
        # Tap by tap, which is ten times as fast as column by column.
        every = by_tap.new_zeros(*by_tap.shape[:-2], self.kernel, by_tap.shape[-1])
        every[..., list(self.taps), :] = by_tap
        return every.mT.flatten(-2)


class Trace(NamedTuple):
    """A network's forward pass.

    Attributes:
        units: In the order of execution.
        calls: The weights of all calls, in their order.
        floats: The numbers of one sample that are in memory at once, by estimate.
        probes: The forward-equivalents of the search.
    """

    units: list[Unit]
    calls: list[str]
    floats: int
    probes: int


def floating_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return a network's floating-point parameters by name, whose calls an `Interceptor` sees."""
    return {
        name: parameter
        for name, parameter in network.named_parameters()
        if parameter.is_floating_point()
    }


def run_visited(network: nn.Module, inputs: Batch, visit: Visit) -> None:
    """Run a network once in eval mode, without gradients; `visit` sees every call with a floating-point parameter."""
    with evaluating(network, gradients=False), Interceptor(floating_parameters(network), visit):
        logits_of(network, as_input(inputs, network))


def affine_units(network: nn.Module, inputs: Batch, others: Batch | None = None) -> Trace:
    """Find the affine units of a network in eval mode, by a forward and two backward passes of three samples.

    A call of a function with parameters is a unit's where

    1. it is affine in its weight: a linear map, a convolution, a normalisation or a scale;
    2. nothing else that is differentiated reads its weight or its bias (`Tape.shared`);
    3. its output has k rows for each sample, sample by sample (`Tape.misplaced`);
    4. its output is [3, O], one position a sample, or no values that parameters went into have placed rows before it,
       as sorting by a score does: gradients do not show the order of the positions within a sample, and another network
       may have another one.

    A BatchNorm that alone reads a unit's output, and is called next, belongs to the unit: nothing can change the output
    in place before it.

    Args:
        network: The network.
        inputs: Samples; three are used.
        others: Where inputs place rows, as where samples are sorted by length, three may lie in order by chance: then
            2 and 3 are asked of these too, which are unlike each other.

    Raises ConfigurationError where layers are checkpointed; StateError where two samples lead to other calls than
    three, or samples depend on one another; DataError where the outputs are not logits [B, C].
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
        # Not batched: any backward pass will do.
        excluded = three.shared(output) | three.misplaced(output, batched=False)
        if three.sorts and others is not None:
            more = Tape(parameters)
            output = more.run(network, as_input(others, network))
            excluded |= more.shared(output) | more.misplaced(output, batched=False)
            probes += size_of(others) * (1 + 2 * more.repetitions)
    numbers = [max(call.inputs.numel(), call.made.numel()) for call in three.calls]
    floats = _ALIVE * max(numbers, default=3) // 3
    return Trace(_units_of(three.calls, network, excluded), three.weights, floats, probes)


def _units_of(calls: Sequence[Call], network: nn.Module, excluded: set[str]) -> list[Unit]:
    """Return the units of a network's calls on three samples; `excluded` are the parameters that violate 2 or 3."""
    units: list[Unit] = []
    unit_before: Call | None = None  # the call just before, where it is a unit's
    for call in calls:
        if unit_before is not None and _is_norm_of(call, unit_before, network, excluded):
            units[-1] = replace(units[-1], norm=_module_of(call))
            unit_before = None
        elif _is_unit(call, excluded):
            units.append(_unit(call))
            unit_before = call
        elif "weight" in call.names:
            unit_before = None
    return units


def _samples(inputs: Batch, count: int, network: nn.Module) -> Batch:
    """Return so many of the inputs, again from the first where there are fewer."""
    places = torch.arange(count) % size_of(inputs)
    return as_input(take(inputs, places), network)


def _is_unit(call: Call, excluded: set[str]) -> bool:
    """Whether a call on three samples is a unit's map."""
    is_scale = isinstance(call, ElementwiseCall) and not call.added
    is_affine = is_scale or isinstance(call, LinearCall)
    # A bias may also be a buffer.
    has_parameters = "weight" in call.names and (call.bias is None or "bias" in call.names)
    has_one_row = call.made[:-1] == (3,)
    is_in_order = has_one_row or not call.decided
    return is_affine and has_parameters and is_in_order and excluded.isdisjoint(call.names.values())


def _is_norm_of(norm: Call, call: Call, network: nn.Module, excluded: set[str]) -> bool:
    """Whether a call is that of a BatchNorm which alone reads the output of a unit, whose channels are its own."""
    has_one_position = isinstance(call, LinearCall) and len(call.made) == 2
    is_per_channel = has_one_position or isinstance(call, ConvolutionCall)
    reads_it_alone = call.readers == 1 and norm.source == call.node
    if not (is_per_channel and reads_it_alone and norm.names.keys() == {"weight", "bias"}):
        return False
    is_batchnorm = isinstance(network.get_submodule(_module_of(norm)), _BatchNorm)
    return is_batchnorm and excluded.isdisjoint(norm.names.values())


def _module_of(call: Call) -> str:
    """Return the name of the module whose weight a call reads."""
    module, _, _ = call.names["weight"].rpartition(".")
    return module


def _unit(call: Call) -> Unit:
    """Return a call on three samples as a unit without a BatchNorm."""
    size = call.weight.numel()
    is_scale = isinstance(call, ElementwiseCall)
    channels = size if is_scale else len(call.weight)
    groups = channels if is_scale else 1
    kernel = 1
    taps: tuple[int, ...] = (0,)
    if isinstance(call, ConvolutionCall):
        groups = call.geometry.groups
        _, every_tap = call.taps
        kernel = len(every_tap)
        met = tuple(tap for tap, (places, _) in enumerate(every_tap) if len(places) > 0)
        taps = met or taps  # which multiplies zeros
    return Unit(
        weight=call.names["weight"],
        bias=call.names.get("bias"),
        norm=None,
        shape=(call.made[0] // 3, *call.made[1:]),
        groups=groups,
        outputs=channels // groups,
        unknowns=size // channels,
        is_convolution=isinstance(call, ConvolutionCall),
        kernel=kernel,
        taps=taps,
    )


def folded_unit(network: nn.Module, unit: Unit, state: State) -> dict[str, Tensor]:
    """Return a unit's parameters and statistics from a network's state, its BatchNorm `folded` in; {} without."""
    if unit.norm is None:
        return {}
    norm = network.get_submodule(unit.norm)
    assert isinstance(norm, _BatchNorm)
    return folded(state, unit.weight, unit.bias, unit.norm, norm.eps)
