"""The classifier head of any network, a Linear layer: found by name, replaced, padded."""

from collections import ChainMap
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from coin.errors import HeadError, StateError
from coin.files.tensors import State
from coin.networks.calling import Network, clone

ADVICE = "name the layer that gives the logits in an attribute 'head_name', or give experts of one architecture"


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
    bases = []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            linear.append(name)
        base: str = getattr(layer, "base_model_prefix", "")  # the attribute with the base model
        if base and hasattr(layer, base):
            bases.append(f"{name}.{base}.".lstrip("."))
        elif base and name:  # a base model itself, under whatever name
            bases.append(f"{name}.")
    if not linear:
        raise HeadError(
            f"found no Linear layer in {kind}; name the head by an attribute 'head_name'"
        )
    outside = [name for name in linear if not name.startswith(tuple(bases))]
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
        kind = type(head).__name__
        found = f"found a head '{name}' of type {kind} in {type(network).__name__}"
        raise HeadError(f"{found}, expected a Linear layer; {ADVICE}")
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


def padded_rows(
    state: State,
    head: str,
    num_outputs: int,
    *,
    mean: bool = False,
) -> dict[str, Tensor]:
    """Return the tensors of a state's head, by its name, with zero or mean rows added; none where it has as many."""
    padded = {}
    for part in ("weight", "bias"):
        key = f"{head}.{part}" if head else part  # a network may itself be its head
        if key not in state:
            continue
        tensor = state[key]
        missing = num_outputs - len(tensor)
        if missing > 0:
            row = tensor.mean(0) if mean else torch.zeros_like(tensor[0])
            rows = row.expand(missing, *row.shape)
            padded[key] = torch.cat([tensor, rows])
    return padded


def padded_state(state: State, head: str, num_outputs: int, *, mean: bool = False) -> State:
    """Return a network's tensors, or a statistic, with the head as of `padded_rows`; no other tensor is read."""
    rows = padded_rows(state, head, num_outputs, mean=mean)
    if not rows:
        return state
    return ChainMap(rows, cast(Any, state))  # never written to, so that any mapping will do


def pad_head(network: Network, num_outputs: int) -> Network:
    """Return a network with its head padded by zeros to `num_outputs` logits, itself if it has as many.

    It shares all other tensors. Raises HeadError where the head is no Linear layer.
    """
    own = dict(linear_head(network).named_parameters(recurse=False))
    rows = padded_rows(own, "", num_outputs)
    if not rows:
        return network
    padded = clone(network, shared=True)
    head = linear_head(padded)
    for key, tensor in rows.items():
        parameter = nn.Parameter(tensor, requires_grad=own[key].requires_grad)
        setattr(head, key, parameter)
    head.out_features = num_outputs
    return padded


def of_one_width(networks: Sequence[Network]) -> list[Network]:
    """Return networks with heads of the largest class count among them; raises as `pad_head`."""
    shapes = [[parameter.shape for parameter in network.parameters()] for network in networks]
    if all(each == shapes[0] for each in shapes):
        return list(networks)
    width = max(linear_head(network).out_features for network in networks)
    return [pad_head(network, width) for network in networks]


def with_head(network: Network, head: nn.Module) -> Network:
    """Give a network, in place, copies of another head's parameters, which may have other classes; return it."""
    own = linear_head(network)
    for name, parameter in head.named_parameters():
        values = parameter.detach().clone()
        setattr(own, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
    own.out_features = len(own.weight)
    return network
