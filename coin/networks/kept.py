"""Parameters that a layer makes when it reads them, of what is kept in their place: packed codes, experts' changes."""

from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin.core.batches import tensors_in
from coin.errors import ConfigurationError
from coin.networks.calling import clone
from coin.networks.delta import Rounded, by_row, matrix_shape, pack, quantise, read

BITS = 4  # of the factors of a correction, a value
ANSWERING: ContextVar[int | None] = ContextVar("ANSWERING", default=None)
"""The expert as which a body answers in this thread or task, set by `coin.Adapted` for each pass; None: its own."""
_KEPT = "kept_parameter_"  # before a parameter's name: that of what a layer keeps in its place


@dataclass(frozen=True, eq=False)
class Change:
    """What one expert changes of a parameter θ: (θ + left right) ⊙ scale + shift, each part if it is there.

    θ is a matrix [O, K], a kernel that is flattened to one, or a vector. The parts are as they are stored.

    Args:
        scale: The codes of scale − 1, int8, of a shape that broadcasts over θ.
        scale_step: What one step of these codes is [], float32: a 127th of the largest, whatever the others are.
        shift: The codes of the shift, likewise.
        shift_step: Likewise.
        left: The packed codes of leftᵀ [r, O], `BITS` a value (`coin.networks.delta.pack`).
        left_scale: A scale for each of the r, bfloat16.
        right: Those of right [r, K].
        right_scale: Likewise.
    """

    scale: Tensor | None = None
    scale_step: Tensor | None = None
    shift: Tensor | None = None
    shift_step: Tensor | None = None
    left: Tensor | None = None
    left_scale: Tensor | None = None
    right: Tensor | None = None
    right_scale: Tensor | None = None

    @classmethod
    def of(
        cls,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        left: Tensor | Rounded | None = None,
        right: Tensor | Rounded | None = None,
    ) -> "Change":
        """Return a change as it is stored, given float tensors; factors may be rounded already, leftᵀ and right."""
        if (left is None) != (right is None):
            raise ConfigurationError(
                "found one of left and right, expected both factors or neither"
            )
        parts: dict[str, Tensor] = {}
        if scale is not None:
            parts["scale"], parts["scale_step"] = _in_bytes(scale.detach() - 1)
        if shift is not None:
            parts["shift"], parts["shift_step"] = _in_bytes(shift.detach())
        if isinstance(left, Tensor):
            left = quantise(left.detach().T.contiguous(), BITS)
        if isinstance(right, Tensor):
            right = quantise(right.detach(), BITS)
        if left is not None and right is not None:
            parts["left"] = pack(left.codes, BITS)
            parts["left_scale"] = left.scale
            parts["right"] = pack(right.codes, BITS)
            parts["right_scale"] = right.scale
        return cls(**parts)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its parts that are there, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def scales(self) -> Tensor:
        """Return the scale in float32, of the shape that it is stored in; 1 without one."""
        if self.scale is None or self.scale_step is None:
            return torch.ones(())
        return 1 + self.scale * self.scale_step

    def factors(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return left [O, r] and right [r, K] in float32, for θ [O, K]; r is 0 without a correction."""
        if self.left is None:
            return torch.zeros(rows, 0), torch.zeros(0, columns)
        return _factors(self.as_read(), rows, columns)

    def as_read(self) -> dict[str, Tensor]:
        """Return its parts as a layer holds them: of the factors' scales what `coin.networks.delta.read` takes."""
        held = self.tensors
        for side in ("left", "right"):
            if side in held:
                scale = held[f"{side}_scale"]
                held[f"{side}_first"], held[f"{side}_scale"] = by_row(scale, BITS)
        return held

    @classmethod
    def stored(cls, held: Mapping[str, Tensor]) -> "Change":
        """Return the change of which these are the parts of `as_read`."""
        parts = dict(held)
        for side in ("left", "right"):
            if side in parts:
                del parts[f"{side}_first"]
                parts[f"{side}_scale"] = parts[f"{side}_scale"].flatten().bfloat16()
        return cls(**parts)

    def __call__(self, value: Tensor) -> Tensor:
        """Return the parameter θ as the expert has it."""
        return _changed(value.clone(memory_format=torch.contiguous_format), self.as_read())


def _in_bytes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes in int8 of values' shape, and what one step of them is [], float32."""
    step = values.float().abs().amax() / 127
    divisor = step.where(step > 0, 1.0)
    codes = values.float().div(divisor).round()
    return codes.to(torch.int8), step


def _factors(parts: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return left [O, r] and right [r, K], of the parts of `Change.as_read`."""
    left = read(parts["left"], parts["left_first"], parts["left_scale"], BITS, rows)
    right = read(parts["right"], parts["right_first"], parts["right_scale"], BITS, columns)
    return left.T, right


def _changed(changed: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """Return a contiguous parameter changed by the parts of `Change.as_read`, in place."""
    if "left" in parts:
        matrix = changed.flatten(1)
        left, right = _factors(parts, *matrix.shape)
        matrix.addmm_(left.to(matrix.dtype), right.to(matrix.dtype))
    if "scale" in parts:
        beyond_one = parts["scale"] * parts["scale_step"]
        changed.addcmul_(changed, beyond_one)
    if "shift" in parts:
        changed.add_(parts["shift"] * parts["shift_step"])
    return changed


class Kept(nn.Module):
    """What is kept in place of a parameter: all of it, or the codes of a matrix; and the experts' changes.

    Args:
        original: The parameter, or for a packed one any of its type.
        codes: The packed codes ``[rows, bytes]``, uint8 (`coin.networks.delta.pack`).
        scale: The rows' scales ``[rows]``.
        bits: The bits of a code.
    """

    codes: Tensor | None
    codes_first: Tensor
    codes_scale: Tensor

    def __init__(
        self,
        original: nn.Parameter,
        codes: Tensor | None = None,
        scale: Tensor | None = None,
        bits: int = 0,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.shape = original.shape
        self.columns = matrix_shape(original.shape)[1]
        self.register_buffer("codes", codes)
        if scale is None:
            self.original = original
        else:
            # An empty parameter says of which type a packed one is, and on which device.
            self.original = nn.Parameter(original.detach().new_empty(0), requires_grad=False)
            first, row_scale = by_row(scale.flatten(), bits)
            self.register_buffer("codes_first", first)
            self.register_buffer("codes_scale", row_scale)
        self.num_experts = 0
        self._parts: tuple[str, ...] = ()  # of experts' changes, those of all under one name
        self.is_read_by_rows = False  # set by `keep`

    def set_experts(self, changes: Sequence[Change]) -> None:
        """Keep the changes by the experts: each part of all in one tensor ``[N, …]``.

        A tensor for each would take more memory than its values. Who lacks a part gets zeros, which change nothing, and
        of a smaller rank directions whose scales are zero.
        """
        self.num_experts = len(changes)
        every = [change.as_read() for change in changes]
        names = dict.fromkeys(chain(*every))
        self._parts = tuple(names)
        for part in self._parts:
            tensors = [held.get(part) for held in every]
            self.register_buffer(part, _stacked(part, tensors))

    def change(self, expert: int) -> Change:
        """Return the change by an expert, without parts that change nothing."""
        held = {part: self.get_buffer(part)[expert] for part in self._parts}
        parts = Change.stored(held).tensors
        for name in ("scale", "shift"):
            if name in parts and not bool(parts[name].any()):
                del parts[name], parts[f"{name}_step"]
        if "left" in parts:
            used = (parts["left_scale"] * parts["right_scale"]).nonzero()  # directions
            rank = int(used[-1]) + 1 if len(used) else 0
            for name in ("left", "left_scale", "right", "right_scale"):
                parts[name] = parts[name][:rank]
                if rank == 0:
                    del parts[name]
        return Change(**parts)

    @property
    def stored_nbytes(self) -> int:
        """The bytes that it takes in a file."""
        total = self.original.nbytes
        if self.codes is not None:
            total += self.codes.nbytes + 2 * len(self.codes)  # a scale a row
        for expert in range(self.num_experts):
            parts = self.change(expert).tensors
            total += sum(tensor.nbytes for tensor in parts.values())
        return total

    @property
    def working_nbytes(self) -> int:
        """The bytes that making the parameter takes: the parameter and, of a packed one, an int32 for each byte.

        Rows that are looked up one by one are as small as the activations that they are, and count as none.
        """
        if self.is_read_by_rows and not self._parts:
            return 0
        parameter = self.shape.numel() * self.original.element_size()
        if self.codes is None:
            return parameter
        return parameter + 4 * self.codes.numel()

    def forward(self) -> Tensor:
        """Return the parameter, as the expert has it that answers."""
        value: Tensor = self.original
        if self.codes is not None:
            matrix = read(self.codes, self.codes_first, self.codes_scale, self.bits, self.columns)
            value = matrix.view(self.shape).to(value.dtype)
        expert = ANSWERING.get()
        if expert is None or not self._parts:
            return value
        if self.codes is None:
            value = value.clone(memory_format=torch.contiguous_format)
        return _changed(value, {part: getattr(self, part)[expert] for part in self._parts})

    def rows(self, index: Tensor) -> Tensor:
        """Return the rows ``[…, K]`` of a matrix at an index […]; of packed codes these rows alone are read."""
        if self.codes is None or self._parts:
            return F.embedding(index, self.forward())
        places = index.flatten()
        codes = self.codes.index_select(0, places)
        first = self.codes_first.index_select(0, places)
        scale = self.codes_scale.index_select(0, places)
        found = read(codes, first, scale, self.bits, self.columns)
        return found.view(*index.shape, self.columns).to(self.original.dtype)


def _stacked(part: str, tensors: Sequence[Tensor | None]) -> Tensor:
    """Return the experts' own tensors of one part of their changes as one, of the largest shape among them."""
    there = [tensor for tensor in tensors if tensor is not None]
    largest = max(tensor.shape for tensor in there)
    stacked = there[0].new_zeros(len(tensors), *largest)
    for place, tensor in zip(stacked, tensors, strict=True):
        if tensor is None:
            continue
        if part.startswith(("scale", "shift")):
            place.copy_(tensor)
        else:
            place[: len(tensor)] = tensor  # of a smaller rank
    return stacked


def keep(network: nn.Module, names: Sequence[str], kept: Kept) -> None:
    """Have a network, in place, make a parameter of what is kept whenever a layer reads it, by all its tied names.

    The layer becomes one of a subclass that has a property of the parameter's name; it can be copied, not pickled. Of
    an embedding those rows alone are made that it looks up.
    """
    owners = [network.get_submodule(name.rpartition(".")[0]) for name in names]
    kept.is_read_by_rows = all(_looks_up(_plain_class(owner)) for owner in owners)
    for name in names:
        place, _, parameter = name.rpartition(".")
        layer = network.get_submodule(place)
        layer.add_module(_KEPT + parameter, kept)
        layer._parameters[parameter] = None  # in its place among the others
        parameters = tuple(_kept_in(layer))
        layer.__class__ = _making(_plain_class(layer), parameters)


def _kept_in(layer: nn.Module) -> dict[str, Kept]:
    """Return what a layer keeps, by the parameters' names."""
    children = layer._modules.items()
    return {name.removeprefix(_KEPT): child for name, child in children if isinstance(child, Kept)}


def kept_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Module, Kept]]:
    """Yield the parameters that are made when they are read: their dotted names, the layers and what is kept."""
    for place, layer in network.named_modules(remove_duplicate=False):
        for parameter, kept in _kept_in(layer).items():
            yield f"{place}.{parameter}".lstrip("."), layer, kept


def tied_names(network: nn.Module) -> dict[str, list[str]]:
    """Return for every name in a network's state all the names that its tensor has."""
    state = network.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: names[id(tensor)] for name, tensor in state.items()}


def unpacked(network: nn.Module) -> nn.Module:
    """Return a plain copy of a network: every parameter that is made when a layer reads it is made once."""
    copied = clone(network)
    made: dict[Kept, nn.Parameter] = {}  # tied parameters are one
    for name, layer, kept in list(kept_parameters(copied)):
        if kept not in made:
            made[kept] = nn.Parameter(kept.forward().detach())
        parameter = name.rpartition(".")[2]
        layer.__class__ = _plain_class(layer)
        layer._modules.pop(_KEPT + parameter, None)
        layer._parameters[parameter] = made[kept]
    return copied


def is_making(layer: nn.Module) -> bool:
    """Say whether a layer makes parameters when it reads them."""
    return hasattr(type(layer), "plain_class")


def not_makeable(network: nn.Module) -> set[str]:
    """Return the parameters that cannot be made when they are read.

    Modules hold them in other attributes too, as LSTMs do, which would miss what is made; or a container owns them,
    which would run what is kept as one of its layers.
    """
    held: set[int] = set()  # the tensors in modules' other attributes
    found: set[str] = set()
    for module in network.modules():
        others = {name: value for name, value in vars(module).items() if name != "_parameters"}
        held.update(id(tensor) for tensor in tensors_in(others))
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owner = network.get_submodule(name.rpartition(".")[0])
        is_in_container = isinstance(owner, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        if is_in_container or id(parameter) in held:
            found.add(name)
    return found


@cache
def _making(kind: Any, parameters: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass of a kind of layer that makes these parameters when they are read."""
    attributes: dict[str, Any] = {"plain_class": kind}
    for parameter in parameters:
        attributes[parameter] = property(partial(_made, name=_KEPT + parameter))
    if _looks_up(kind):
        attributes["forward"] = _look_up
    return type(kind.__name__, (kind,), attributes)


def _looks_up(kind: Any) -> bool:
    """Say whether layers of a kind look up rows of their weight as `nn.Embedding` does."""
    return getattr(kind, "forward", None) is nn.Embedding.forward


def _look_up(layer: nn.Embedding, input: Tensor) -> Tensor:
    """Return the rows of an embedding's weight that are looked up, of what it keeps in the weight's place."""
    kept: Any = layer._modules[_KEPT + "weight"]
    found: Tensor = kept.rows(input)
    return found


def _made(layer: nn.Module, name: str) -> Tensor:
    """Return a parameter of a layer, made of what it keeps under a name."""
    kept: Any = layer._modules[name]
    made: Tensor = kept.forward()
    return made


def _plain_class(layer: nn.Module) -> Any:
    return getattr(type(layer), "plain_class", type(layer))
