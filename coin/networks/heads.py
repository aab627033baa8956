"""The classifier head of any network: found by name, checked, replaced, padded, and read together with its input."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin.core.batches import Batch, Network, clone, map_tensors, take
from coin.errors import DataError, HeadError, NumericalError, StateError
from coin.files.tensors import State

_ADVICE = "name the layer that gives the logits in an attribute 'head_name', or give experts of one architecture"


def head_name(network: nn.Module) -> str:
    """Return the dotted name of the classifier head.

    The head is the last `nn.Linear` in the order of registration, or, if there is none (SqueezeNet), the last
    `nn.Conv2d`. Layers inside a Hugging Face base model, at any depth, count as earlier than all others. A network with
    another head names it in an attribute ``head_name: str``.
    """
    layers: dict[str, nn.Module] = dict(network.named_modules(remove_duplicate=False))
    own = getattr(network, "head_name", None)
    if isinstance(own, str):
        if own not in layers:
            raise StateError(f"found head_name '{own}', expected a layer of {type(network).__name__}; name one")
        return own
    bases = _base_models(layers)
    for kind in (nn.Linear, nn.Conv2d):
        if names := [name for name, layer in layers.items() if isinstance(layer, kind)]:
            return min(reversed(names), key=lambda name: sum(f"{name}.".startswith(base) for base in bases))
    raise HeadError(f"found no Linear or Conv2d layer in {type(network).__name__}; name it by an attribute 'head_name'")


def _base_models(layers: Mapping[str, nn.Module]) -> set[str]:
    """Return the names, with a dot, of Hugging Face's base models: what a model calls so, or itself without one."""
    found = set()
    for name, layer in layers.items():
        if prefix := getattr(type(layer), "base_model_prefix", ""):
            inner = f"{name}.{prefix}" if name else prefix
            if inner in layers:
                found.add(f"{inner}.")
            elif type(layer).__name__.endswith("Model"):
                found.add(f"{name}." if name else "")
    return found


def replace_head(network: nn.Module, num_classes: int) -> None:
    """Replace the head by a freshly initialised one with `num_classes` outputs."""
    name = head_name(network)
    old = network.get_submodule(name)
    if isinstance(old, nn.Linear):
        new: nn.Module = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    elif isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, num_classes, kernel_size=1, bias=old.bias is not None)
    else:
        raise StateError(f"the head '{name}' is a {type(old).__name__}, expected a Linear or a Conv2d layer")
    initialise_head(new)
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, new)
    _tell_classes(network, num_classes)


def initialise_head(head: nn.Module) -> None:
    """Draw a head anew, small: entries of 1/√C, as constructors draw, give gradients that destroy pretrained layers."""
    with torch.no_grad():
        for name, parameter in head.named_parameters(recurse=False):
            parameter.zero_() if name == "bias" else parameter.normal_(std=0.01)


def padded_rows(state: State, head: str, num_outputs: int, *, mean: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a state's head, by its name, with zero or mean rows added; none where it has as many."""
    padded = {}
    for part in ("weight", "bias"):
        key = f"{head}.{part}" if head else part  # a network may itself be its head
        if key not in state:
            continue
        tensor = state[key]
        missing = num_outputs - tensor.shape[0]
        if missing < 0:
            raise HeadError(f"'{key}' has {tensor.shape[0]} outputs, expected at most {num_outputs}")
        if missing:
            row = tensor.mean(0, keepdim=True) if mean else torch.zeros_like(tensor[:1])
            padded[key] = torch.cat([tensor, row.expand(missing, *tensor.shape[1:])])
    return padded


def padded_state(state: State, head: str, num_outputs: int, *, mean: bool = False) -> State:
    """Return a network's tensors, or a statistic, with the head as of `padded_rows`; no other tensor is read."""
    rows = padded_rows(state, head, num_outputs, mean=mean)
    return ChainMap(rows, cast(Any, state)) if rows else state  # never written to, so that any mapping will do


def pad_head(network: Network, num_outputs: int) -> Network:
    """Return a network with its head padded by zeros to `num_outputs` logits, itself if it has as many.

    It shares all other tensors. Raises HeadError where its weight is used elsewhere too or is no Linear's or Conv2d's.
    """
    name = head_name(network)
    head = network.get_submodule(name)
    own = dict(head.named_parameters(recurse=False))
    uses = sum(each is own.get("weight") for _, each in network.named_parameters(remove_duplicate=False))
    if not isinstance(head, nn.Linear | nn.Conv2d) or getattr(head, "groups", 1) > 1 or uses != 1:
        found = "whose weight is used elsewhere too" if uses > 1 else f"of type {type(head).__name__}"
        told = f"found experts of unequal class counts and a head '{name}' {found}, expected a Linear or Conv2d layer"
        raise HeadError(f"{told} to pad; name another in an attribute 'head_name', or give experts of one class count")
    rows = padded_rows(own, "", num_outputs)
    if not rows:
        return network
    padded = clone(network, shared=True)
    head = padded.get_submodule(name)
    for key, tensor in rows.items():
        setattr(head, key, nn.Parameter(tensor, requires_grad=own[key].requires_grad))
    setattr(head, "out_features" if isinstance(head, nn.Linear) else "out_channels", num_outputs)
    _tell_classes(padded, num_outputs)
    return padded


def _tell_classes(network: nn.Module, num_classes: int) -> None:
    if hasattr(network, "num_classes"):  # SqueezeNet reshapes by it
        network.num_classes = num_classes  # type: ignore[assignment]


def of_one_width(networks: Sequence[Network]) -> list[Network]:
    """Return networks padded to the largest class count; HeadError where shapes differ elsewhere than in the head."""
    shapes = [{name: p.shape for name, p in each.named_parameters(remove_duplicate=False)} for each in networks]
    first = shapes[0]
    differing = {name: other[name] for other in shapes for name in first if other.get(name, first[name]) != first[name]}
    if not differing or any(other.keys() != first.keys() for other in shapes):  # refused where they are merged
        return list(networks)
    head = head_name(networks[0])
    for name in sorted(differing.keys() - {f"{head}.{part}".lstrip(".") for part in ("weight", "bias")}):
        found = f"{list(differing[name])} in one expert but {list(first[name])} in another"
        raise HeadError(f"tensor '{name}' is {found}, and their head is '{head}'; {_ADVICE}")
    width = max(len(network.get_submodule(head).get_parameter("weight")) for network in networks)
    return [pad_head(network, width) for network in networks]


def check_padding(padded: nn.Module, own: nn.Module, inputs: Batch) -> None:
    """Raise HeadError where a padded network's logits are not the network's own with zeros behind them."""
    if padded is own:
        return
    found, expected = padded(inputs), own(inputs)
    wider = found.shape[1] - expected.shape[1]
    if wider <= 0 or not torch.allclose(found, F.pad(expected, (0, wider)), rtol=1e-2, atol=1e-4):
        told = f"the logits of {type(own).__name__} are not those of its head '{head_name(own)}'"
        raise HeadError(f"{told}, which is padded since class counts differ; {_ADVICE}")


def features_and_logits(network: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor]:
    """Run a network once on inputs ``[B, ...]``; return its penultimate features ``[B, F]`` and its logits ``[B, C]``.

    The features are the head's input. Where that has positions, those of the position at which the head gives the
    logits, as the last token of a GPT, or else the average over positions.
    """
    head = network.get_submodule(head_name(network))
    captured: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        captured.append((next(iter((*arguments, *named.values()))), output))

    with head.register_forward_hook(keep, with_kwargs=True):
        logits = network(inputs)
    if len(captured) != 1:
        raise HeadError(f"the head of {type(network).__name__} ran {len(captured)} times in one pass, expected once")
    features, output = captured[0]
    if isinstance(head, nn.Conv2d):
        return features.flatten(2).mean(2), logits
    if features.ndim <= 2:
        return features, logits
    for turned in (False, True):  # samples first, or positions
        both = (each.transpose(0, 1) if turned else each for each in (features, output))
        rows, read = (each.flatten(1, -2) for each in both)
        if read[:, 0].shape == logits.shape and bool((taken := (read == logits[:, None]).all(2)).any(1).all()):
            return rows[torch.arange(len(rows), device=rows.device), taken.int().argmax(1)], logits
        if read[:, 0].shape == logits.shape and torch.allclose(read.mean(1), logits, rtol=1e-2, atol=1e-4):
            return rows.mean(1), logits
    return features.flatten(1, -2).mean(1), logits


class Run(NamedTuple):
    """What one network answers: penultimate features ``[B, F]``, F = 0 where not wanted, and logits ``[B, C]``."""

    features: Tensor
    logits: Tensor


def run_network(network: nn.Module, inputs: Batch, features: bool) -> Run:
    """Run a network once on a copy of the inputs, with its penultimate features if they are wanted."""
    inputs = map_tensors(torch.clone, inputs)
    found, logits = features_and_logits(network, inputs) if features else (None, network(inputs))
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"found {shape} of {type(network).__name__}, expected logits [B, C]; give forward=…")
    return Run(full_precision(logits[:, :0] if found is None else found), full_precision(logits))


def full_precision(values: Tensor) -> Tensor:
    """Return values that autocast left in 16 bits as float32, in which answers are compared, and others as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


# How far logits of a type may be from the head's, in the size of the sum's terms: four times the type's precision, for
# float32 that of TF32, in which GPUs compute it. Float64 has no such short cut; its room is for long sums.
_TOLERANCES = {torch.float64: 2.0**-30, torch.float32: 2.0**-8, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}


@torch.no_grad()
def check_head(network: nn.Module, features: Tensor, logits: Tensor) -> None:
    """Raise HeadError unless a network's logits are W φ + b, with (W, b) its head and φ the head's input.

    A temperature, a softmax or a nonlinearity after the head breaks what methods that fit a head assume, and so does a
    head that is neither a Linear nor a 1×1 Conv2d layer. Features ``[B, F]`` and logits ``[B, C]`` are those of
    `features_and_logits`. Every logit is compared, in float64, in units of |Wφ + b| + √(Σ_k (W_k φ_k)² + b²), in which
    rounding errors grow whatever cancels. Raises NumericalError where an output is not finite.
    """
    for what, outputs in (("logits", logits), ("head's inputs", features)):
        if not bool(torch.isfinite(outputs).all()):
            told = f"the {what} of {type(network).__name__} hold a NaN or an infinity"
            raise NumericalError(f"{told}, expected finite ones; check the inputs and the network")
    name = head_name(network)
    head = network.get_submodule(name)
    found = ""
    if isinstance(head, nn.Linear | nn.Conv2d):
        weight, inputs = head.weight.flatten(1).double(), features.double()
        bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.double()
        if inputs.shape[1:] != weight.shape[1:] or logits.shape != (len(inputs), len(weight)):
            found = f" (found logits {list(logits.shape)} and inputs {list(inputs.shape)} for {list(weight.shape)})"
        else:
            read = F.linear(inputs, weight, bias)
            size = read.abs() + F.linear(inputs.square(), weight.square(), bias.square()).sqrt()
            types = {features.dtype, logits.dtype, head.weight.dtype}
            if torch.float32 in types and torch.get_float32_matmul_precision() == "medium":
                types.add(torch.bfloat16)
            difference = (logits.double() - read).abs()
            if bool((difference <= max(_TOLERANCES[each] for each in types) * size).all()):
                return
            found = f" (found a difference of {float(difference.max()):.3g})"
    told = f"the logits of {type(network).__name__} are not its head '{name}' ({type(head).__name__}) of its input"
    advice = "name the layer that gives the logits in an attribute 'head_name', or leave out the method or decoder"
    raise HeadError(f"{told}{found}; {advice} that reads it")


_FEW = 8  # samples that tell whether logits are the head's of the features


@torch.no_grad()
def linear_heads(networks: Sequence[nn.Module], inputs: Batch | None = None) -> list[tuple[Tensor, Tensor]]:
    """Return every network's head as its weight ``[C, F]`` and bias ``[C]``, padded with zeros to the largest C.

    The networks, in eval mode, are checked by `check_head` on the first few of the inputs; without any, the layers are.
    """
    heads = []
    for network in networks:
        head = network.get_submodule(head_name(network))
        if inputs is not None:
            features, logits = features_and_logits(network, take(inputs, slice(0, _FEW)))
        else:
            shape = head.weight.flatten(1).shape if isinstance(head, nn.Linear | nn.Conv2d) else (0, 0)
            features, logits = (torch.zeros(0, size, device=next(network.parameters()).device) for size in shape[::-1])
        check_head(network, features, logits)
        assert isinstance(head, nn.Linear | nn.Conv2d)
        weight = head.weight.detach().flatten(1)
        heads.append((weight, weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach()))
    width = max(len(bias) for _, bias in heads)
    return [(F.pad(w, (0, 0, 0, width - len(b))), F.pad(b, (0, width - len(b)))) for w, b in heads]
