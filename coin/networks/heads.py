"""The classifier head of any network, a Linear layer: found by name, replaced, padded."""

from collections import ChainMap
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from coin.errors import HeadError, StateError
from coin.files.tensors import State
from coin.networks.calling import Network, clone


def head_name(network: nn.Module) -> str:
    """Return the dotted name of the classifier head, as of its parameters in `named_parameters`.

    The head is the last `nn.Linear` in the order of registration outside of Hugging Face's base models. A network with
    another head names it in an attribute ``head_name: str``.
    """
    kind = type(network).__name__
    own = getattr(network, "head_name", None)
    if isinstance(own, str):
        layers = dict(network.named_modules(remove_duplicate=False))
        if own not in layers:
            raise StateError(f"found head_name '{own}', expected a layer of {kind}; name one")
        first: str = next(name for name, each in network.named_modules() if each is layers[own])
        return first
    linear: list[str] = []
    outside: list[str] = []
    bases: tuple[str, ...] = ()
    for name, layer in network.named_modules():
        # A base model has the name that networks with a head give it.
        base: str = getattr(layer, "base_model_prefix", "")
        if base and name and not hasattr(layer, base):
            bases = (*bases, f"{name}.")
        if isinstance(layer, nn.Linear):
            linear.append(name)
            if not name.startswith(bases):
                outside.append(name)
    if not linear:
        raise HeadError(
            f"found no Linear layer in {kind}; name the head by an attribute 'head_name'"
        )
    return (outside or linear)[-1]


def head_weight(network: nn.Module) -> str:
    """Return the dotted name of the head's weight; a network may itself be its head."""
    return f"{head_name(network)}.weight".lstrip(".")


def without_head(network: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the names without those of the head's parameters."""
    head = f"{head_name(network)}."
    return [name for name in names if not name.startswith(head)]


def linear_head(network: nn.Module) -> nn.Linear:
    """Return a network's head; a HeadError where it is no Linear layer."""
    name = head_name(network)
    head = network.get_submodule(name)
    if not isinstance(head, nn.Linear):
        raise HeadError(
            f"found a head '{name}' of type {type(head).__name__} in {type(network).__name__}, expected a Linear "
            "layer; name the layer that gives the logits in an attribute 'head_name', or give experts of one "
            "architecture"
        )
    return head


def replace_head(network: nn.Module, num_classes: int) -> None:
    """Replace the head by a freshly initialised one with `num_classes` outputs."""
    old = linear_head(network)
    new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    initialise_head(new)
    with_head(network, new)


def initialise_head(head: nn.Module) -> None:
    """Draw a head anew, small: entries of 1/√C, as constructors draw, give gradients that destroy pretrained layers."""
    with torch.no_grad():
        for name, parameter in head.named_parameters(recurse=False):
            if name == "bias":
                parameter.zero_()
            else:
                parameter.normal_(std=0.01)


def with_rows(rows: Tensor, count: int, fill: Tensor | float = 0.0) -> Tensor:
    """Return so many rows of a tensor, as of a head's weight [C, F] or bias [C]: its own first, then rows of `fill`."""
    missing = count - len(rows)
    if missing <= 0:
        return rows[:count]
    row = torch.zeros_like(rows[0]) + fill
    return torch.cat([rows, row.expand(missing, *row.shape)])


def padded_state(state: State, head: str, num_outputs: int, *, mean: bool = False) -> State:
    """Return a network's tensors, or a statistic, with so many rows of the head; no other tensor is read.

    Rows beyond its own are zero, or the mean of its own.
    """
    rows = {}
    for part in ("weight", "bias"):
        name = f"{head}.{part}".lstrip(".")  # a network may itself be its head
        if name not in state:
            continue
        own = state[name]
        if len(own) != num_outputs:
            rows[name] = with_rows(own, num_outputs, own.mean(0) if mean else 0.0)
    if not rows:
        return state
    return ChainMap(rows, cast(Any, state))  # never written to, so that any mapping will do


def pad_head(network: Network, num_outputs: int) -> Network:
    """Return a network with a head of so many outputs, the first of its own and then zeros; itself if it has as many.

    It shares all other tensors. Raises HeadError where the head is no Linear layer.
    """
    own = linear_head(network)
    if len(own.weight) == num_outputs:
        return network
    padded = clone(network, shared=True)
    head = linear_head(padded)
    for name, parameter in own.named_parameters():
        rows = with_rows(parameter.detach(), num_outputs)
        setattr(head, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    head.out_features = num_outputs
    return padded


def of_one_width(networks: Sequence[Network]) -> list[Network]:
    """Return networks with heads of the largest class count among them; raises as `pad_head`."""
    shapes = [[parameter.shape for parameter in network.parameters()] for network in networks]
    if shapes.count(shapes[0]) == len(shapes):
        return list(networks)
    width = max(linear_head(network).out_features for network in networks)
    return [pad_head(network, width) for network in networks]


def with_head(network: Network, head: nn.Module) -> Network:
    """Give a network, in place, copies of another head's parameters, which may have other classes; return it."""
    own = linear_head(network)
    for name, parameter in head.named_parameters():
        setattr(own, name, deepcopy(parameter))
    own.out_features = len(own.weight)
    return network
