"""The classifier head of any network: found by name, replaced, padded."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from coin.errors import HeadError, StateError
from coin.files.tensors import State
from coin.networks.calling import Network, clone

ADVICE = "name the layer that gives the logits in an attribute 'head_name', or give experts of one architecture"


def head_name(network: nn.Module) -> str:
    """Return the dotted name of the classifier head.

    The head is the last `nn.Linear` in the order of registration, or, if there is none (SqueezeNet), the last
    `nn.Conv2d`. Layers inside a Hugging Face base model, at any depth, count as earlier than all others. A network with
    another head names it in an attribute ``head_name: str``. Of a layer with several names it is the first, as of its
    parameters in `named_parameters`.
    """
    layers: dict[str, nn.Module] = dict(network.named_modules(remove_duplicate=False))
    own = getattr(network, "head_name", None)
    if isinstance(own, str):
        if own not in layers:
            raise StateError(f"found head_name '{own}', expected a layer of {type(network).__name__}; name one")
        return _names_of(network, layers[own])[0]
    bases = _base_models(layers)
    for kind in (nn.Linear, nn.Conv2d):
        if names := [name for name, layer in layers.items() if isinstance(layer, kind)]:
            last = min(reversed(names), key=lambda name: sum(f"{name}.".startswith(base) for base in bases))
            return _names_of(network, layers[last])[0]
    raise HeadError(f"found no Linear or Conv2d layer in {type(network).__name__}; name it by an attribute 'head_name'")


def without_head(network: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the names without those of the head's parameters."""
    head = f"{head_name(network)}."
    return [name for name in names if not name.startswith(head)]


def _names_of(network: nn.Module, layer: nn.Module) -> list[str]:
    """Return all dotted names of a network's layer."""
    return [name for name, each in network.named_modules(remove_duplicate=False) if each is layer]


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
    for each in _names_of(network, old):
        parent, _, child = each.rpartition(".")
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
        raise HeadError(f"tensor '{name}' is {found}, and their head is '{head}'; {ADVICE}")
    width = max(len(network.get_submodule(head).get_parameter("weight")) for network in networks)
    return [pad_head(network, width) for network in networks]


def with_head(network: Network, head: nn.Module) -> Network:
    """Give a network, in place, copies of another head's parameters, which may have other classes; return it."""
    own = network.get_submodule(head_name(network))
    for name, parameter in head.named_parameters():
        setattr(own, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    outputs = len(own.get_parameter("weight"))
    setattr(own, "out_features" if isinstance(own, nn.Linear) else "out_channels", outputs)
    return network
