"""Parameters that a layer makes when it reads them, of what is kept in their place: rounded matrices, experts' changes.

Layers become of subclasses of their own classes. That a network may read its weights in ways that pass these by, or ask
for the class of a layer, is seen when it runs: `coin.networks.running.check_as_plain`.
"""

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin.errors import StateError
from coin.networks.adapter import Change
from coin.networks.batchnorm import folded_norms
from coin.networks.calling import clone
from coin.networks.delta import Rounded, read_rows

ANSWERING: ContextVar[int | None] = ContextVar("ANSWERING", default=None)
"""The expert as which a body answers in this thread or task, set by `coin.Adapted` for each pass; None: its own."""
_NORM = "norm_taken_out"  # an attribute of a layer: the BatchNorm that is folded into it
_KEPT = "kept_parameter_"  # before a parameter's name: that of the layer's child in its place
# A parameter of which a container or an RNN is the owner cannot be made: a container would run what is kept as one of
# its layers, and RNNs hold their weights in a list, too.
_OWNERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.RNNBase)


class Kept(nn.Module):
    """Makes one parameter of a network, anew whenever a layer reads it; what it makes is not stored.

    It stands in for a parameter that is in few bits, or differs by the expert as which the network answers, or both.
    `keep` puts it in place: a layer of which it makes the ``weight`` has it as a child, ``kept_parameter_weight``, and
    instead of the tensor a property ``weight``, which calls `forward`. Tied parameters share one.

    `forward` returns

    1. the network's own parameter (`own`): ``original`` itself, not to be written to, or the matrix in ``rows``;
    2. as the expert has it that answers (`ANSWERING`), if that one has a `Change` of it (`set_changes`).

    For a batch with few positions it is less work to change a layer's outputs: then layers read `own`, and take the
    change from `change_on_outputs`.

    Its tensors, which move with the network:

    * ``original``: the parameter; beside ``rows`` an empty one, for its type and device.
    * ``rows``: a rounded matrix, a byte a value (`coin.networks.delta.Rounded`); None for one that is not.
    * ``scale``, ``shift``, ``left``, ``right``: the parts of the changes, those that they have, each of the N' experts
      with a change in one tensor ``[N', …]``. A tensor for each expert would take more memory than its values.

    Args:
        original: The parameter.
        rounded: Its matrix in few bits; the parameter's values are not kept then.
    """

    rows: Tensor | None

    def __init__(self, original: nn.Parameter, rounded: Rounded | None = None) -> None:
        super().__init__()
        self.shape = original.shape
        self.bits = 0
        self.original = original
        self.register_buffer("rows", None)
        if rounded is not None:
            self.bits = rounded.bits
            self.original = nn.Parameter(original.detach().new_empty(0), requires_grad=False)
            self.rows = rounded.rows
        self.experts: list[int] = []  # that have a change, in the order of the parts' tensors
        self._parts: list[str] = []  # of the changes
        self._most_positions = -1.0  # for which outputs are changed

    def set_changes(self, name: str, changes: Mapping[int, Change]) -> None:
        """Keep the changes by experts, at least one; a StateError about `name` where they are of several forms."""
        forms = {change.form for change in changes.values()}
        if len(forms) > 1:
            raise StateError(
                f"found changes of '{name}' of several parts or ranks, expected the same of all experts"
            )
        self.experts = [*changes]
        (form,) = forms
        self._parts = [part for part, _ in form]
        for part in self._parts:
            of_experts = [change.tensors[part] for change in changes.values()]
            self.register_buffer(part, torch.stack(of_experts))
        is_low_rank = "left" in self._parts and "shift" not in self._parts
        # A shift of a weight is none of the outputs; activations of other types are too coarse.
        if is_low_rank and self.original.dtype == torch.float32:
            rows = self.shape[0]
            columns = self.shape[1:].numel()
            self._most_positions = rows * columns / (rows + columns)

    def change(self, expert: int | None) -> Change | None:
        """Return an expert's change; None without one."""
        if expert not in self.experts:
            return None
        place = self.experts.index(expert)
        buffers: Any = self._buffers
        return Change(**{part: buffers[part][place] for part in self._parts})

    def change_on_outputs(self, positions: int) -> Change | None:
        """Return the change by the expert that answers, if it is less work on the outputs at so many positions.

        For a float32 weight [O, K] with a low-rank change it is where positions × (O + K) ≤ O × K; for others never.
        """
        if positions > self._most_positions:
            return None
        return self.change(ANSWERING.get())

    def own(self) -> Tensor:
        """Return the network's own parameter, as no expert changes it."""
        # Not as attributes, which modules look up slowly.
        original = cast(Tensor, self._parameters["original"])
        rows = self._buffers["rows"]
        if rows is None:
            return original
        return read_rows(rows, original.dtype).view(self.shape)

    def forward(self) -> Tensor:
        """Return the parameter as the expert that answers has it."""
        value = self.own()
        change = self.change(ANSWERING.get())
        if change is None:
            return value
        if self._buffers["rows"] is None:
            return change(value)
        return change.change_(value)


def keep(network: nn.Module, name: str, rounded: Rounded | None = None) -> Kept:
    """Replace a parameter of a network, in place, by a `Kept` from which layers compute it; return that.

    A layer becomes one of a subclass that has a property of the parameter's name; it can be copied, not pickled. Of an
    embedding those rows alone are made that it looks up. The parameter is none of those that are `not_makeable`.
    """
    original = network.get_parameter(name)
    kept = Kept(original, rounded)
    for layer in list(network.modules()):
        for parameter, own in layer._parameters.items():
            if own is not original:
                continue
            layer.add_module(_KEPT + parameter, kept)
            layer._parameters[parameter] = None  # which keeps its place, and is in no state
            attributes = {parameter: _made(parameter)}
            forward = _FORWARDS.get(_forward_of(layer))
            if parameter == "weight" and forward is not None:
                attributes["forward"] = forward
            _give(layer, **attributes)
    return kept


def take_out_norms(network: nn.Module) -> None:
    """Have the maps into which BatchNorms are folded add the BatchNorms' biases, in place; these no longer run.

    The names of the network's tensors stay. A BatchNorm or a map of a kind that is not known stays as it is.
    """
    for name, weight in folded_norms(network).items():
        norm = network.get_submodule(name)
        layer = network.get_submodule(weight.rpartition(".")[0])
        forward = _WITHOUT_NORM.get(_forward_of(norm))
        if forward is not None and _forward_of(layer) in _MAPS and _is_identity(norm):
            vars(layer)[_NORM] = (norm,)  # in a tuple, which hides it from the module's children
            _give(layer, bias=_BIAS_OF_NORM)
            _give(norm, forward=forward)


def _is_identity(norm: Any) -> bool:
    """Say whether a folded BatchNorm is still the identity but for its bias: others may have changed it since."""
    if norm._parameters["weight"] is None or bool(norm.running_mean.any()):
        return False
    deviation = (norm.running_var + norm.eps).sqrt()
    return torch.allclose(norm.weight, deviation, rtol=1e-6, atol=0)


def kept_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Module, Kept]]:
    """Yield the parameters that are made when they are read: their dotted names, the layers and what is kept."""
    for place, layer in network.named_modules(remove_duplicate=False):
        for name, child in layer._modules.items():  # tied ones too
            if isinstance(child, Kept):
                parameter = name.removeprefix(_KEPT)
                yield f"{place}.{parameter}".lstrip("."), layer, child


def not_makeable(network: nn.Module) -> list[str]:
    """Return the parameters that cannot be made when they are read: those of containers and RNNs."""
    owned: set[int] = set()
    for layer in network.modules():
        if isinstance(layer, _OWNERS):
            owned.update(map(id, layer.parameters(recurse=False)))
    named = network.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if id(parameter) in owned]


def unpacked(network: nn.Module) -> nn.Module:
    """Return a copy without `Kept`: every parameter is made once, as the expert in `ANSWERING` has it."""
    copied = clone(network)
    made: dict[Kept, nn.Parameter] = {}  # tied parameters are one
    for name, layer, kept in list(kept_parameters(copied)):
        if kept not in made:
            value = kept.forward().detach()
            if kept.rows is None:  # in place: other attributes may hold it, too
                value = kept.original.detach().copy_(value)
            made[kept] = nn.Parameter(value)
        _, _, parameter = name.rpartition(".")
        layer._modules.pop(_KEPT + parameter, None)
        layer._parameters[parameter] = made[kept]
    for layer in copied.modules():
        vars(layer).pop(_NORM, None)
        layer.__class__ = _plain_class(layer)
    return copied


def looks_up(layer: nn.Module) -> bool:
    """Say whether a layer makes of its weight the rows alone that it looks up."""
    return type(layer).forward is _look_up


def _plain_class(layer: nn.Module) -> Any:
    return getattr(type(layer), "plain_class", type(layer))


def _give(layer: nn.Module, **attributes: Any) -> None:
    """Make a layer, in place, one of a subclass with these attributes, beside those that it was given before."""
    given = getattr(type(layer), "given", {}) | attributes
    layer.__class__ = _subclass(_plain_class(layer), tuple(given.items()))


@cache
def _subclass(kind: Any, given: tuple[tuple[str, Any], ...]) -> type[nn.Module]:
    """Return the subclass of a kind of layer with these attributes, one for all layers that are given the same."""
    attributes = dict(given)
    own = {**attributes, "plain_class": kind, "given": attributes}
    return type(kind.__name__, (kind,), own)


@cache
def _made(parameter: str) -> property:
    """Return a property of layers: the parameter of this name, made of what they keep in its place."""
    child = _KEPT + parameter

    def made(layer: nn.Module) -> Tensor:
        kept: Any = layer._modules[child]
        value: Tensor = kept.forward()
        return value

    return property(made)


def _bias_of_norm(layer: nn.Module) -> Tensor:
    """Return the bias of the BatchNorm that is folded into a layer."""
    (norm,) = vars(layer)[_NORM]
    bias: Tensor = norm.bias
    return bias


_BIAS_OF_NORM = property(_bias_of_norm)


def _nothing(norm: nn.Module, inputs: Tensor) -> Tensor:
    """Run a BatchNorm that is taken out."""
    return inputs


def _activation(norm: Any, inputs: Tensor) -> Tensor:
    """Run timm's BatchNorm with an activation, the BatchNorm taken out."""
    activated: Tensor = norm.act(norm.drop(inputs))
    return activated


def _kept_weight(layer: nn.Module) -> Kept:
    kept = layer._modules[_KEPT + "weight"]
    return cast(Kept, kept)


def _look_up(layer: nn.Embedding, input: Tensor) -> Tensor:
    """Return the rows ``[…, K]`` of an embedding's weight at an index […]; of a rounded one these alone are read."""
    kept = _kept_weight(layer)
    if kept.rows is None or kept.experts:
        return F.embedding(input, kept.forward())
    found = read_rows(kept.rows.index_select(0, input.flatten()))
    return found.view(*input.shape, layer.embedding_dim).to(kept.original.dtype)


def _run_linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Return a layer's outputs for inputs ``[…, K]``, an expert's change made on them where that is less work."""
    kept = _kept_weight(layer)
    positions = inputs.numel() // layer.in_features
    change = kept.change_on_outputs(positions)
    if change is None:
        return F.linear(inputs, kept.forward(), layer.bias)
    flat = inputs.reshape(positions, layer.in_features)
    outputs = _changed_outputs(kept, change, flat, layer.bias)
    return outputs.view(*inputs.shape[:-1], layer.out_features)


def _run_conv2d(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Return a convolution's outputs for images ``[B, C, H, W]``, with an expert's change as `_run_linear`."""
    kept = _kept_weight(layer)
    change = None
    if layer.groups == 1 and inputs.ndim == 4:
        positions = inputs.numel() // (layer.in_channels * layer.stride[0] * layer.stride[1])
        change = kept.change_on_outputs(positions)
    if change is None:
        plain: Tensor = layer._conv_forward(inputs, kept.forward(), layer.bias)
        return plain
    is_product = layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)
    if is_product:
        # With few columns a product is several times as slow as its transpose.
        flat = inputs.permute(0, 2, 3, 1).reshape(-1, layer.in_channels)
        of_each = _changed_outputs(kept, change, flat, layer.bias)
        images = of_each.view(len(inputs), *inputs.shape[2:], layer.out_channels)
        return images.permute(0, 3, 1, 2).contiguous()
    kernel = kept.own()
    left, right = change.factors(len(kernel), kernel[0].numel())
    right_kernel = right.view(-1, *kernel.shape[1:])
    left_kernel = left.T[:, :, None, None]
    inner = layer._conv_forward(inputs, right_kernel, None)  # [B, r, H', W']
    update = F.conv2d(inner, left_kernel)
    outputs: Tensor = layer._conv_forward(inputs, kernel, None).add_(update)
    if change.scale is not None:
        scale = read_rows(change.scale)
        outputs.mul_(scale.view(-1, 1, 1))
    bias = layer.bias
    if bias is not None:
        outputs.add_(bias.view(-1, 1, 1))
    return outputs


def _changed_outputs(kept: Kept, change: Change, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Return a map's outputs for inputs a ``[positions, K]``, with a change: (a Wᵀ + a rightᵀ leftᵀ) ⊙ scale + bias."""
    weight = kept.own().flatten(1)
    left, right = change.factors(*weight.shape)
    plain = F.linear(inputs, weight)
    inner = F.linear(inputs, right)  # [positions, r]
    outputs = torch.addmm(plain, inner, left)
    if change.scale is None:
        return outputs if bias is None else outputs.add_(bias)
    # All of the type that autocast gives products.
    scale = read_rows(change.scale, outputs.dtype)
    if bias is None:
        return outputs.mul_(scale)
    return torch.addcmul(bias.to(outputs.dtype), outputs, scale)


def _forward_of(layer: nn.Module) -> str:
    """Return the full name of the function that a kind of layer runs: a convolution's own product, if it has one."""
    kind = _plain_class(layer)
    function = getattr(kind, "_conv_forward", kind.forward)
    if function.__module__ == nn.Conv2d.__module__:
        function = kind.forward
    return f"{function.__module__}.{function.__qualname__}"


# The forwards of kinds of layers, and those that take their places.
_FORWARDS: dict[str, Any] = {
    "torch.nn.modules.sparse.Embedding.forward": _look_up,
    "torch.nn.modules.linear.Linear.forward": _run_linear,
    "torch.nn.modules.conv.Conv2d.forward": _run_conv2d,
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
