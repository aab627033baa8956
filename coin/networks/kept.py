"""Parameters that a layer makes when it reads them, of what is kept in their place: packed codes, experts' changes."""

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from coin.core.batches import clone, tensors_in
from coin.errors import StateError
from coin.files.tensors import State
from coin.networks.delta import Rounded, matrix_shape, pack, quantise, read

BITS = 4  # of the factors of a correction, a value
ANSWERING: ContextVar[int | None] = ContextVar("ANSWERING", default=None)
"""The expert as which bodies answer in this thread or task, set by `coin.Adapted` for each pass; None for as nobody."""


class Change(nn.Module):
    """What one expert changes of a parameter θ: (θ + left right) ⊙ scale + shift, each part if it is there.

    θ is a matrix [O, K], a kernel that is flattened to one, or a vector. Its scale and shift have a shape that
    broadcasts over θ, in float16. The factors, left [O, r] and right [r, K], are in `BITS` bits a value with a scale
    for each of the r (`coin.networks.delta.Rounded`).

    Args:
        parts: The tensors as they are stored, by `PARTS`.
    """

    PARTS = ("scale", "shift", "left", "left_scale", "right", "right_scale")

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, parts: State) -> None:
        super().__init__()
        for part in self.PARTS:
            tensor = parts.get(part)
            is_of_rows = tensor is not None and part in ("left_scale", "right_scale")
            self.register_buffer(part, cast(Tensor, tensor).view(-1, 1) if is_of_rows else tensor)

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
        return cls(parts)

    def factors(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return left [O, r] and right [r, K] in float32, for θ [O, K]; r is 0 without a correction."""
        parts = cast(dict[str, Tensor], self._buffers)  # attributes of modules take longer
        if parts["left"] is None:
            return torch.zeros(rows, 0), torch.zeros(0, columns)
        left = read(parts["left"], parts["left_scale"], BITS, rows).T
        return left, read(parts["right"], parts["right_scale"], BITS, columns)

    def forward(self, value: Tensor, in_place: bool = False) -> Tensor:
        """Return the parameter θ as the expert has it; θ itself is changed if it is done in place."""
        parts = self._buffers
        if parts["scale"] is None and parts["left"] is None and parts["shift"] is not None:  # a bias: no copy
            return torch.add(value, parts["shift"]).to(value.dtype)
        changed = value if in_place else value.clone()
        if parts["left"] is not None:
            matrix = changed.flatten(1)
            left, right = self.factors(*matrix.shape)
            if matrix.dtype != torch.float32:
                left, right = left.to(matrix.dtype), right.to(matrix.dtype)
            matrix.addmm_(left, right)
        if parts["scale"] is not None:
            changed.mul_(parts["scale"])
        if parts["shift"] is not None:
            changed.add_(parts["shift"])
        return changed


class Kept(nn.Module):
    """What is kept in place of a parameter: all of it, or the codes of a matrix; and the experts' changes.

    Args:
        original: The parameter, or for a packed one any of its type.
        codes: The packed codes ``[rows, bytes]``, uint8 (`coin.networks.delta.pack`).
        scale: The rows' scales ``[rows]``, bfloat16.
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
        self.register_buffer("scale", None if scale is None else scale.view(-1, 1))
        self.experts = nn.ModuleList()
        self.only: int | None = None  # the expert that alone answers, of `coin.Adapted.only`

    @classmethod
    def packed(cls, original: nn.Parameter, data: Tensor, bits: int) -> "Kept":
        """Return that of the bytes which `coin.networks.delta.encode` made of a matrix."""
        rows = matrix_shape(original.shape)[0]
        scales = 2 * rows  # bytes at the end
        codes = data[:-scales].clone().view(rows, -1)
        return cls(original, codes, data[-scales:].clone().view(torch.bfloat16), bits)

    def change(self, expert: int) -> Change:
        """Return the change by an expert."""
        return cast(Change, self.experts[expert])

    @property
    def working_nbytes(self) -> int:
        """The bytes that making the parameter takes: the parameter and, of a packed one, an int32 for each byte."""
        made = self.shape.numel() * self.original.element_size()
        return made if self.codes is None else made + 4 * self.codes.numel()

    def forward(self) -> Tensor:
        """Return the parameter, as the expert has it that answers."""
        codes, scale = self._buffers["codes"], self._buffers["scale"]  # attributes of modules take longer
        original = cast(Tensor, self._parameters["original"])
        changes = cast(nn.ModuleList, self._modules["experts"])._modules
        value = original
        if codes is not None and scale is not None:
            value = read(codes, scale, self.bits, self.columns).view(self.shape)
            if original.dtype != torch.float32:
                value = value.to(original.dtype)
        expert = ANSWERING.get() if self.only is None else self.only
        if expert is None or not changes:
            return value
        return cast(Change, changes[str(expert)]).forward(value, in_place=codes is not None)


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
    kept = cast(nn.Module, layer._modules["kept"])._modules[parameter]
    return cast(Kept, kept).forward()


def _plain_class(layer: nn.Module) -> type[nn.Module]:
    return getattr(type(layer), "plain_class", type(layer))
