"""Parameters that a layer makes when it reads them, of what is kept in their place: packed codes, experts' changes."""

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin.core.batches import tensors_in
from coin.errors import ConfigurationError
from coin.networks.batchnorm import folded_norms
from coin.networks.calling import clone
from coin.networks.delta import (
    Rounded,
    balanced,
    byte_row,
    matrix_shape,
    packed_nbytes,
    read_factor,
    read_rows,
    round_factor,
    rows_of,
)

ANSWERING: ContextVar[int | None] = ContextVar("ANSWERING", default=None)
"""The expert as which a body answers in this thread or task, set by `coin.Adapted` for each pass; None: its own."""
_NORM = "norm_taken_out"  # an attribute of a layer: the BatchNorm that is folded into it
_IS_OUT = "is_taken_out"  # an attribute of such a BatchNorm
_KEPT = "kept_parameter_"  # before a parameter's name: that of what a layer keeps in its place


class Change(NamedTuple):
    """What one expert changes of a parameter θ: (θ + left right) ⊙ scale + shift, each part if it is there.

    θ is a matrix [O, K], a kernel that is flattened to one, or a vector. The parts are bytes, the same in memory and in
    files (`coin.networks.delta`).

    Args:
        scale: The scale ``[1, n + 8]`` in 8 bits a value, for n = O, or as many as θ has values.
        shift: The shift, likewise.
        left: leftᵀ ``[r, ⌈O/2⌉ + 4]`` in 4 bits a value.
        right: right ``[r, ⌈K/2⌉ + 4]``.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    @classmethod
    def of(
        cls,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        left: Tensor | None = None,
        right: Tensor | None = None,
    ) -> "Change":
        """Return a change as it is stored, given float tensors: those of the factors as [O, r] and [r, K]."""
        if (left is None) != (right is None):
            raise ConfigurationError(
                "found one of left and right, expected both factors or neither"
            )
        change = cls(
            scale=None if scale is None else byte_row(scale),
            shift=None if shift is None else byte_row(shift),
        )
        if left is None or right is None:
            return change
        balance = balanced(left.T, right)
        return change._replace(
            left=round_factor(left.T * balance), right=round_factor(right / balance)
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its parts that are there, by name."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}

    def scales(self) -> Tensor:
        """Return the scale ``[n]`` in float32; 1 without one."""
        return torch.ones(()) if self.scale is None else read_rows(self.scale)[0]

    def factors(
        self, rows: int, columns: int, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Return leftᵀ [r, O] and right [r, K], for θ [O, K]; r is 0 without a correction."""
        if self.left is None or self.right is None:
            return torch.zeros(0, rows), torch.zeros(0, columns)
        return read_factor(self.left, rows, dtype), read_factor(self.right, columns, dtype)

    def __call__(self, value: Tensor) -> Tensor:
        """Return the parameter θ as the expert has it."""
        if self.left is None and self.scale is None and self.shift is not None:
            return value + _along(self.shift, value)
        return self.change_(value.clone(memory_format=torch.contiguous_format))

    def change_(self, value: Tensor) -> Tensor:
        """Change a contiguous parameter θ in place, and return it."""
        if self.left is not None:
            matrix = value.flatten(1)
            rows, columns = matrix.shape
            left, right = self.factors(rows, columns, value.dtype)
            matrix.addmm_(left.T, right)
        if self.scale is not None:
            value.mul_(_along(self.scale, value))
        if self.shift is not None:
            value.add_(_along(self.shift, value))
        return value


def _along(row: Tensor, value: Tensor) -> Tensor:
    """Return the numbers in a row of bytes, in a shape that broadcasts over a parameter."""
    numbers = read_rows(row, value.dtype)
    if numbers.numel() == value.numel():
        return numbers.view_as(value)
    return numbers.view(-1, *[1] * (value.ndim - 1))


class Kept(nn.Module):
    """What is kept in place of a parameter: all of it, or a byte for each value of a rounded one; and experts' changes.

    Args:
        original: The parameter, or for a rounded one any of its type.
        rounded: The matrix of a rounded one.
    """

    rows: Tensor | None

    def __init__(self, original: nn.Parameter, rounded: Rounded | None = None) -> None:
        super().__init__()
        self.shape = original.shape
        self.bits = 0
        self.columns = matrix_shape(original.shape)[1]
        self.original = original
        self.register_buffer("rows", None)
        if rounded is not None:
            # An empty parameter says of which type a rounded one is, and on which device.
            self.original = nn.Parameter(original.detach().new_empty(0), requires_grad=False)
            self.bits = rounded.bits
            self.rows = rows_of(rounded)
        self.num_experts = 0
        self._parts: tuple[str, ...] = ()  # of experts' changes, those of all under one name
        self._own_parts: list[tuple[str, ...]] = []  # of each expert
        self.is_read_by_rows = False  # set by `keep`
        # Up to so many positions an update is less work on activations than on the weight.
        self._positions = -1.0

    def set_experts(self, changes: Sequence[Change]) -> None:
        """Keep the changes by the experts: each part of all in one tensor ``[N, …]``.

        A tensor for each would take more memory than its values. Who lacks a part, or some of the others' directions,
        gets bytes that change nothing.
        """
        self.num_experts = len(changes)
        every = [change.tensors for change in changes]
        self._own_parts = [tuple(parts) for parts in every]
        self._parts = tuple(dict.fromkeys(name for parts in every for name in parts))
        for part in self._parts:
            there = [parts[part] for parts in every if part in parts]
            largest = max(there, key=len)
            nothing = torch.zeros_like(largest)
            if part == "scale":
                nothing = byte_row(torch.ones_like(read_rows(largest)))
            stacked = nothing.repeat(len(changes), 1, 1)
            for place, parts in zip(stacked, every, strict=True):
                if part in parts:
                    place[: len(parts[part])] = parts[part]
            self.register_buffer(part, stacked)
        is_plain = "left" in self._parts and "shift" not in self._parts and self.shape[0] > 1
        if is_plain and self.original.dtype == torch.float32:  # others are too coarse
            rows = self.shape[0]
            self._positions = rows * self.columns / (rows + self.columns)

    def change(self, expert: int) -> Change:
        """Return the change by an expert, with all parts that any of them has."""
        buffers: Any = self._buffers
        return Change(**{part: buffers[part][expert] for part in self._parts})

    def own_change(self, expert: int) -> Change:
        """Return the change by an expert, with its own parts alone."""
        return Change(**{part: self.get_buffer(part)[expert] for part in self._own_parts[expert]})

    @property
    def saved_nbytes(self) -> int:
        """The bytes that a rounded one takes in a file beyond those in memory, below 0."""
        if self.rows is None:
            return 0
        return packed_nbytes(len(self.rows), self.columns, self.bits) - self.rows.nbytes

    @property
    def working_nbytes(self) -> int:
        """The bytes of the parameter where it is made; rows that are looked up one by one count as none."""
        if self.is_read_by_rows and not self._parts:
            return 0
        return self.shape.numel() * self.original.element_size()

    def is_less_work_on(self, positions: int) -> bool:
        """Say whether the answering expert's update is less work on so many positions' activations than on the weight.

        It is where positions × (O + K) ≤ O × K, for a weight [O, K].
        """
        return positions <= self._positions and ANSWERING.get() is not None

    def answering(self) -> Change:
        """Return the change by the expert that answers."""
        expert = ANSWERING.get()
        assert expert is not None
        return self.change(expert)

    def body(self) -> Tensor:
        """Return the body's own parameter."""
        original: Any = self._parameters["original"]
        rows = self._buffers["rows"]
        if rows is None:
            value: Tensor = original
            return value
        return read_rows(rows, original.dtype).view(self.shape)

    def forward(self) -> Tensor:
        """Return the parameter, as the expert has it that answers."""
        expert = ANSWERING.get()
        value = self.body()
        if expert is None or not self._parts:
            return value
        change = self.change(expert)
        return change(value) if self._buffers["rows"] is None else change.change_(value)

    def look_up(self, index: Tensor) -> Tensor:
        """Return the rows ``[…, K]`` of a matrix at an index […]; of a rounded one these rows alone are read."""
        if self.rows is None or self._parts:
            return F.embedding(index, self.forward())
        found = read_rows(self.rows.index_select(0, index.flatten()))
        return found.view(*index.shape, self.shape[1]).to(self.original.dtype)


def keep(network: nn.Module, names: Sequence[str], kept: Kept) -> None:
    """Have a network, in place, make a parameter of what is kept whenever a layer reads it, by all its tied names.

    The layer becomes one of a subclass that has a property of the parameter's name; it can be copied, not pickled. Of
    an embedding those rows alone are made that it looks up.
    """
    for name in names:
        place, _, parameter = name.rpartition(".")
        layer = network.get_submodule(place)
        layer.add_module(_KEPT + parameter, kept)
        layer._parameters[parameter] = None  # in its place among the others
        _set_class(layer)
    layers = [network.get_submodule(name.rpartition(".")[0]) for name in names]
    kept.is_read_by_rows = all(type(layer).forward is _look_up for layer in layers)


def take_out_norms(network: nn.Module) -> None:
    """Have the maps into which BatchNorms are folded add these one's biases, in place; the BatchNorms no longer run.

    The names of the network's tensors stay. A BatchNorm or a map of a kind that is not known stays as it is.
    """
    for name, weight in folded_norms(network).items():
        norm = network.get_submodule(name)
        layer = network.get_submodule(weight.rpartition(".")[0])
        is_known = (
            _forward_of(_plain_class(norm)) in _WITHOUT_NORM
            and _forward_of(_plain_class(layer)) in _MAPS
        )
        if is_known and _is_identity(norm):
            vars(layer)[_NORM] = (norm,)  # in a tuple, which hides it from the module's children
            vars(norm)[_IS_OUT] = True
            _set_class(layer)
            _set_class(norm)


def _is_identity(norm: Any) -> bool:
    """Say whether a folded BatchNorm is still the identity but for its bias: others may have trained it since."""
    if norm._parameters["weight"] is None or bool(norm.running_mean.any()):
        return False
    deviation = (norm.running_var + norm.eps).sqrt()
    return torch.allclose(norm.weight, deviation, rtol=1e-6, atol=0)


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
        layer._modules.pop(_KEPT + parameter, None)
        layer._parameters[parameter] = made[kept]
    for layer in copied.modules():
        vars(layer).pop(_NORM, None)
        vars(layer).pop(_IS_OUT, None)
        layer.__class__ = _plain_class(layer)
    return copied


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


def _set_class(layer: nn.Module) -> None:
    """Give a layer the class that makes what it keeps when it is read, and runs without what is taken out."""
    kind = _plain_class(layer)
    layer.__class__ = _class_of(
        kind, tuple(_kept_in(layer)), _NORM in vars(layer), _IS_OUT in vars(layer)
    )


def _forward_of(kind: Any) -> str:
    """Return the full name of the function that a kind of layer runs."""
    forward = kind.forward
    return f"{forward.__module__}.{forward.__qualname__}"


@cache
def _class_of(
    kind: Any, parameters: tuple[str, ...], has_norm: bool, is_out: bool
) -> type[nn.Module]:
    """Return a subclass of a kind of layer.

    Args:
        kind: The layer's own class.
        parameters: The names of the parameters that it makes when they are read.
        has_norm: Whether it adds the bias of a BatchNorm that is taken out.
        is_out: Whether it is such a BatchNorm.
    """
    attributes: dict[str, Any] = {"plain_class": kind}
    for parameter in parameters:
        attributes[parameter] = property(partial(_made, name=_KEPT + parameter))
    if has_norm:
        attributes["bias"] = property(_bias_of_norm)
    if is_out:
        attributes["forward"] = _WITHOUT_NORM[_forward_of(kind)]
    elif "weight" in parameters and kind.forward in _FORWARDS:
        attributes["forward"] = _FORWARDS[kind.forward]
    return type(kind.__name__, (kind,), attributes)


def _made(layer: nn.Module, name: str) -> Tensor:
    """Return a parameter of a layer, made of what it keeps under a name."""
    kept: Any = layer._modules[name]
    made: Tensor = kept.forward()
    return made


def _bias_of_norm(layer: nn.Module) -> Tensor:
    """Return the bias of the BatchNorm that is folded into a layer."""
    (norm,) = vars(layer)[_NORM]
    bias: Tensor = norm.bias
    return bias


def _nothing(norm: nn.Module, inputs: Tensor) -> Tensor:
    """Run a BatchNorm that is taken out."""
    return inputs


def _activation(norm: Any, inputs: Tensor) -> Tensor:
    """Run timm's BatchNorm with an activation, the BatchNorm taken out."""
    activated: Tensor = norm.act(norm.drop(inputs))
    return activated


def _look_up(layer: nn.Embedding, input: Tensor) -> Tensor:
    """Return the rows of an embedding's weight that are looked up, of what it keeps in the weight's place."""
    kept: Any = layer._modules[_KEPT + "weight"]
    found: Tensor = kept.look_up(input)
    return found


def _run_linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Return what a layer makes of inputs ``[…, K]``, with an expert's update on them where that is less work."""
    kept = cast(Kept, layer._modules[_KEPT + "weight"])
    positions = inputs.numel() // layer.in_features
    if not kept.is_less_work_on(positions):
        return F.linear(inputs, kept.forward(), layer.bias)
    outputs = _on_activations(kept, inputs.reshape(positions, layer.in_features), layer.bias)
    return outputs.view(*inputs.shape[:-1], layer.out_features)


def _run_conv2d(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Return what a convolution makes of images ``[B, C, H, W]``, with an expert's update on them as `_run_linear`."""
    kept = cast(Kept, layer._modules[_KEPT + "weight"])
    positions = inputs.numel() // (layer.in_channels * layer.stride[0] * layer.stride[1])
    is_plain = layer.groups == 1 and inputs.ndim == 4
    if not is_plain or not kept.is_less_work_on(positions):
        made: Tensor = layer._conv_forward(inputs, kept.forward(), layer.bias)
        return made
    if layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0):
        # With few columns a product is several times as slow as its transpose.
        flat = inputs.permute(0, 2, 3, 1).reshape(positions, layer.in_channels)
        of_each = _on_activations(kept, flat, layer.bias)
        images = of_each.view(len(inputs), *inputs.shape[2:], layer.out_channels)
        return images.permute(0, 3, 1, 2).contiguous()
    change = kept.answering()
    kernel = kept.body()
    left, right = change.factors(kernel.shape[0], kept.columns, kernel.dtype)
    right_kernel = right.view(-1, *kernel.shape[1:])
    inner = layer._conv_forward(inputs, right_kernel, None)  # [B, r, H', W']
    update = F.conv2d(inner, left.T[:, :, None, None])
    outputs: Tensor = layer._conv_forward(inputs, kernel, None).add_(update)
    if change.scale is not None:
        outputs.mul_(read_rows(change.scale, kernel.dtype).view(-1, 1, 1))
    bias = layer.bias
    return outputs if bias is None else outputs.add_(bias.view(-1, 1, 1))


def _on_activations(kept: Kept, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Return what a map [O, K] makes of inputs ``[positions, K]`` as the answering expert's, its update on them."""
    change = kept.answering()
    weight = kept.body().view(-1, kept.columns)
    left, right = change.factors(weight.shape[0], kept.columns, weight.dtype)
    outputs = torch.addmm(F.linear(inputs, weight), F.linear(inputs, right), left)
    if change.scale is None:
        return outputs if bias is None else outputs + bias
    scale = read_rows(change.scale, weight.dtype)
    return outputs.mul_(scale) if bias is None else torch.addcmul(bias, outputs, scale)


# The forwards of kinds of layers, and those that take their places.
_FORWARDS: dict[Any, Any] = {
    nn.Embedding.forward: _look_up,
    nn.Linear.forward: _run_linear,
    nn.Conv2d.forward: _run_conv2d,
}
# What takes the place of a BatchNorm's forward.
_WITHOUT_NORM: dict[str, Any] = {
    "torch.nn.modules.batchnorm._BatchNorm.forward": _nothing,
    "timm.layers.norm_act.BatchNormAct2d.forward": _activation,
}
# The forwards that add a bias to what they make of a weight.
_MAPS = {
    "torch.nn.modules.linear.Linear.forward",
    "torch.nn.modules.conv.Conv1d.forward",
    "torch.nn.modules.conv.Conv2d.forward",
    "torch.nn.modules.conv.Conv3d.forward",
    "timm.layers.conv2d_same.Conv2dSame.forward",
}


def _plain_class(layer: nn.Module) -> Any:
    return getattr(type(layer), "plain_class", type(layer))
