"""Parameters that a layer makes when it reads them, of what is kept in their place: packed codes, experts' changes."""

from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from coin.core.batches import tensors_in
from coin.errors import StateError
from coin.files.tensors import State
from coin.networks.calling import clone
from coin.networks.delta import Rounded, by_row, looked_up, matrix_shape, pack, quantise, read

BITS = 4  # of the factors of a correction, a value
ANSWERING: ContextVar[int | None] = ContextVar("ANSWERING", default=None)
"""The expert as which bodies answer in this thread or task, set by `coin.Adapted` for each pass; None for as nobody."""


@dataclass(frozen=True, eq=False)
class Change:
    """What one expert changes of a parameter θ: (θ + left right) ⊙ scale + shift, each part if it is there.

    θ is a matrix [O, K], a kernel that is flattened to one, or a vector. The parts are as they are stored.

    Args:
        scale: In float16, of a shape that broadcasts over θ.
        shift: Likewise.
        left: The packed codes of leftᵀ [r, O], `BITS` a value (`coin.networks.delta.pack`).
        left_scale: A scale for each of the r, bfloat16.
        right: Those of right [r, K].
        right_scale: Likewise.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    left: Tensor | None = None
    left_scale: Tensor | None = None
    right: Tensor | None = None
    right_scale: Tensor | None = None

    @classmethod
    def of(
        cls, scale: Tensor | None = None, shift: Tensor | None = None, left: Tensor | Rounded | None = None,
        right: Tensor | Rounded | None = None,
    ) -> "Change":  # fmt: skip
        """Return a change as it is stored, given float tensors; factors may be rounded already, leftᵀ and right."""
        parts: dict[str, Tensor] = {}
        if scale is not None:
            parts["scale"] = scale.detach().half()
        if shift is not None:
            parts["shift"] = shift.detach().half()
        for name, factor in (("left", left), ("right", right)):
            if isinstance(factor, Tensor):
                rows = factor.T if name == "left" else factor
                factor = quantise(rows.detach().contiguous(), BITS)
            if factor is not None:
                parts[name] = pack(factor.codes, BITS)
                parts[f"{name}_scale"] = factor.scale
        return cls(**parts)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its parts that are there, by name."""
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    def factors(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return left [O, r] and right [r, K] in float32, for θ [O, K]; r is 0 without a correction."""
        if self.left is None or self.left_scale is None or self.right is None or self.right_scale is None:
            return torch.zeros(rows, 0), torch.zeros(0, columns)
        left = read(self.left, self.left_scale, BITS, rows).T
        return left, read(self.right, self.right_scale, BITS, columns)

    def as_read(self) -> dict[str, Tensor]:
        """Return what a layer holds of it: the scales of factors as `coin.networks.delta.looked_up` wants them."""
        held = dict(self.tensors)
        for factor in ("left", "right"):
            if factor in held:
                first, scale = by_row(held[f"{factor}_scale"], BITS)
                held |= {f"{factor}_first": first, f"{factor}_scale": scale}
        return held

    @classmethod
    def held(cls, parts: State) -> "Change":
        """Return the change of which these are the parts as they are read."""
        stored = {field.name: parts[field.name] for field in fields(cls) if field.name in parts}
        for name in ("left_scale", "right_scale"):
            if name in stored:
                stored[name] = stored[name].flatten().bfloat16()
        return cls(**stored)

    def without_idle_parts(self) -> "Change":
        """Return the same change without parts that change nothing: scales of one, shifts and directions of zero."""
        parts = dict(self.tensors)
        if "scale" in parts and bool((parts["scale"] == 1).all()):
            del parts["scale"]
        if "shift" in parts and not bool(parts["shift"].any()):
            del parts["shift"]
        if "left" in parts:
            used = (parts["left_scale"] * parts["right_scale"]).nonzero()
            rank = int(used[-1]) + 1 if len(used) else 0
            for name in ("left", "left_scale", "right", "right_scale"):
                parts[name] = parts[name][:rank]
                if rank == 0:
                    del parts[name]
        return type(self)(**parts)

    def __call__(self, value: Tensor) -> Tensor:
        """Return the parameter θ as the expert has it."""
        return _changed(value, self.as_read(), in_place=False)


def _changed(value: Tensor, held: Mapping[str, Tensor], in_place: bool) -> Tensor:
    """Return a parameter changed by the parts of `Change.as_read`; the parameter itself if it is done in place."""
    scale, shift, left = held.get("scale"), held.get("shift"), held.get("left")
    if scale is None and left is None and shift is not None:  # a bias: no copy
        added = torch.add(value, shift)
        return added if added.dtype == value.dtype else added.to(value.dtype)
    changed = value if in_place else value.clone()
    if left is not None:
        matrix = changed.flatten(1)
        rows, columns = matrix.shape
        first = looked_up(left, held["left_first"], held["left_scale"], BITS, rows)
        second = looked_up(held["right"], held["right_first"], held["right_scale"], BITS, columns)
        if matrix.dtype != torch.float32:
            first, second = first.to(matrix.dtype), second.to(matrix.dtype)
        matrix.addmm_(first.T, second)
    if scale is not None:
        changed.mul_(scale)
    if shift is not None:
        changed.add_(shift)
    return changed


class Kept(nn.Module):
    """What is kept in place of a parameter: all of it, or the codes of a matrix; and the experts' changes.

    Args:
        original: The parameter, or for a packed one any of its type.
        codes: The packed codes ``[rows, bytes]``, uint8 (`coin.networks.delta.pack`).
        scale: The rows' scales ``[rows]`` or ``[rows, 1]``.
        bits: The bits of a code.
    """

    codes: Tensor | None

    def __init__(
        self, original: nn.Parameter, codes: Tensor | None = None, scale: Tensor | None = None, bits: int = 0
    ) -> None:
        super().__init__()
        self.bits, self.shape = bits, original.shape
        self.columns = matrix_shape(original.shape)[1]
        # An empty parameter says of which type a packed one is, and on which device.
        self.original = original if codes is None else nn.Parameter(original.detach().new_empty(0), requires_grad=False)
        self.register_buffer("codes", codes)
        if scale is not None:
            first, scale = by_row(scale.flatten(), bits)
            self.register_buffer("codes_first", first)
            self.register_buffer("codes_scale", scale)
        self.num_experts = 0
        self._parts: tuple[str, ...] = ()  # of experts' changes, those of all under one name
        self.only: int | None = None  # the expert that alone answers, of `coin.Adapted.only`

    @classmethod
    def packed(cls, original: nn.Parameter, data: Tensor, bits: int) -> "Kept":
        """Return that of the bytes which `coin.networks.delta.encode` made of a matrix."""
        rows = matrix_shape(original.shape)[0]
        scales = 2 * rows  # bytes at the end
        codes = data[:-scales].clone().view(rows, -1)
        return cls(original, codes, data[-scales:].clone().view(torch.bfloat16), bits)

    def set_experts(self, changes: Sequence[Change]) -> None:
        """Keep the changes by the experts: each part of all in one tensor ``[N, …]``.

        A tensor for each would take more memory than its values. Who lacks a part gets one that changes nothing: a
        scale of one, a shift of zero; of a smaller rank, directions whose scales are zero.
        """
        self.num_experts = len(changes)
        every = [change.as_read() for change in changes]
        self._parts = tuple(dict.fromkeys(part for held in every for part in held))
        for part in self._parts:
            found = [held.get(part) for held in every]
            own = [tensor for tensor in found if tensor is not None]
            if part in ("scale", "shift"):
                shape = torch.broadcast_shapes(*(tensor.shape for tensor in own))  # type: ignore[no-untyped-call]
            else:
                shape = max(tensor.shape for tensor in own)  # of the largest rank
            stacked = own[0].new_full((len(found), *shape), float(part == "scale"))
            for tensor, place in zip(found, stacked, strict=True):
                if tensor is None:
                    continue
                if part in ("scale", "shift"):
                    place.copy_(tensor)
                else:
                    place[: len(tensor)] = tensor
            self.register_buffer(part, stacked)

    def change(self, expert: int) -> Change:
        """Return the change by an expert, without parts that change nothing."""
        held = {part: self.get_buffer(part)[expert] for part in self._parts}
        return Change.held(held).without_idle_parts()

    @property
    def stored_nbytes(self) -> int:
        """The bytes that it takes in a file, where the scale of a row of codes has two."""
        body = self.original.nbytes if self.codes is None else self.codes.nbytes + 2 * len(self.codes)
        changes = [self.change(expert) for expert in range(self.num_experts)]
        return body + sum(tensor.nbytes for change in changes for tensor in change.tensors.values())

    @property
    def working_nbytes(self) -> int:
        """The bytes that making the parameter takes: the parameter and, of a packed one, an int32 for each byte."""
        made = self.shape.numel() * self.original.element_size()
        return made if self.codes is None else made + 4 * self.codes.numel()

    def forward(self) -> Tensor:
        """Return the parameter, as the expert has it that answers."""
        # It is called for every layer: attributes of modules, and `cast`, would take longer.
        held: Any = self._buffers
        original: Any = self._parameters["original"]
        value: Tensor = original
        codes = held["codes"]
        if codes is not None:
            made = looked_up(codes, held["codes_first"], held["codes_scale"], self.bits, self.columns)
            value = made.view(self.shape)
            if original.dtype != torch.float32:
                value = value.to(original.dtype)
        expert = ANSWERING.get() if self.only is None else self.only
        if expert is None or not self._parts:
            return value
        own = {part: held[part].select(0, expert) for part in self._parts}
        return _changed(value, own, in_place=codes is not None)


def keep(network: nn.Module, names: Sequence[str], kept: Kept) -> None:
    """Have a network, in place, make a parameter of what is kept whenever a layer reads it, by all its tied names.

    The layer becomes one of a subclass that has a property of the parameter's name. Raises StateError where a layer has
    an attribute ``kept``.
    """
    for name in names:
        place, _, parameter = name.rpartition(".")
        layer = network.get_submodule(place)
        if not is_making(layer):
            if hasattr(layer, "kept"):
                raise StateError(f"found an attribute 'kept' of layer '{place}', which coin uses; rename it")
            layer.kept = nn.ModuleDict()
        cast(nn.ModuleDict, layer.kept)[parameter] = kept
        layer._parameters[parameter] = None  # in its place among the others
        layer.__class__ = _reading(cast(Any, _plain_class(layer)), tuple(cast(nn.ModuleDict, layer.kept)))


def tied_names(network: nn.Module) -> dict[str, list[str]]:
    """Return for every name of a parameter all the names that it has."""
    every = list(network.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in every:
        names.setdefault(id(parameter), []).append(name)
    return {name: names[id(parameter)] for name, parameter in every}


def kept_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Module, Kept]]:
    """Yield the parameters that are made when they are read: their dotted names, the layers and what is kept."""
    for place, layer in network.named_modules(remove_duplicate=False):
        if is_making(layer):
            for parameter, kept in cast(nn.ModuleDict, layer.kept).items():
                yield f"{place}.{parameter}".lstrip("."), layer, cast(Kept, kept)


def unpacked(network: nn.Module) -> nn.Module:
    """Return a plain copy of a network: every parameter that is made when a layer reads it is made once."""
    copied = clone(network)
    made = dict[nn.Module, nn.Parameter]()  # tied parameters are one
    for name, layer, kept in [*kept_parameters(copied)]:
        if kept not in made:
            made[kept] = nn.Parameter(kept.forward().detach())
        layer._parameters[name.rpartition(".")[2]] = made[kept]
    for layer in filter(is_making, copied.modules()):
        layer.__class__ = _plain_class(layer)
        del layer.kept
    return copied


def is_making(layer: nn.Module) -> bool:
    """Say whether a layer makes parameters when it reads them."""
    return hasattr(type(layer), "plain_class")


def not_makeable(network: nn.Module) -> set[str]:
    """Return the parameters that cannot be made when they are read.

    Modules hold them in other attributes too, as LSTMs do, which would miss what is made; or a container owns them,
    which would run what is kept as one of its layers; or a module could not have a child of that name.
    """
    attributes = (vars(module).items() for module in network.modules())
    held = {id(t) for own in attributes for name, value in own if name != "_parameters" for t in tensors_in(value)}
    found = set()
    for name, parameter in network.named_parameters(remove_duplicate=False):
        place, _, own_name = name.rpartition(".")
        is_in_container = isinstance(network.get_submodule(place), nn.Sequential | nn.ModuleList | nn.ModuleDict)
        if id(parameter) in held or is_in_container or hasattr(nn.ModuleDict, own_name):
            found.add(name)
    return found


@cache
def _reading(kind: Any, parameters: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass of a kind of layer that makes these parameters when they are read."""
    made = {parameter: property(partial(_read, parameter=parameter)) for parameter in parameters}
    return type(kind.__name__, (kind,), {**made, "plain_class": kind, "__reduce_ex__": _reduced})


def _reduced(layer: Any, protocol: int) -> tuple[Any, ...]:
    """Return how a layer is copied and pickled, whose class is in no module."""
    kind = type(layer)
    return _new_layer, (kind.plain_class, tuple(layer.kept)), layer.__getstate__()


def _new_layer(kind: Any, parameters: tuple[str, ...]) -> nn.Module:
    made = _reading(kind, parameters)
    return made.__new__(made)


def _read(layer: nn.Module, parameter: str) -> Tensor:
    """Return a parameter of a layer."""
    kept: Any = layer._modules["kept"]
    made: Tensor = kept._modules[parameter].forward()
    return made


def _plain_class(layer: nn.Module) -> type[nn.Module]:
    return getattr(type(layer), "plain_class", type(layer))
