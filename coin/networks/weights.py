"""State dicts from elsewhere, checked name by name, and from files of the kinds that people have."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from coin.core.devices import has_float64, seeded
from coin.errors import FileError, first_line
from coin.files.atomic import how_to_redo
from coin.files.tensors import State, check_layout, check_tensors
from coin.networks.calling import clear_caches, clone
from coin.networks.heads import head_name, initialise_head, with_rows


def fill_network(network: nn.Module, state: State, source: str) -> None:
    """Copy a state dict into a network; raises as `check_layout`."""
    whole = network.state_dict()  # with the versions of its modules, which MNASNet asks for
    check_layout(whole, state, source)
    whole.update(state)
    network.load_state_dict(whole)
    clear_caches(network)


def without_frozen(network: nn.Module) -> nn.Module:
    """Return the network, or a copy where some of its parameters are frozen, with all of them trainable."""
    is_trainable = all(parameter.requires_grad for parameter in network.parameters())
    return network if is_trainable else clone(network).requires_grad_(True)


def with_own_head(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *,
    seed: int,
    wider: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return a state; a head of other classes is drawn from the seed, or the first rows of the `wider` network's."""
    head = network.get_submodule(head_name(network))
    with seeded(seed):
        initialise_head(head)
    found = dict(state)
    for part, own in head.state_dict().items():
        name = f"{head_name(network)}.{part}"
        if name in state and len(state[name]) != len(own):
            source = own if wider is None else wider[name]
            found[name] = with_rows(source, len(own)).clone()
    return found


def without_prefix(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors of these names without a prefix of them all, such as ``module.``; without one all tensors."""
    first = min(names, default="")
    if first in state:
        return dict(state)
    for found in state:
        prefix = found.removesuffix(first)
        of_prefix = {name: prefix + name for name in names}
        if prefix.endswith(".") and state.keys() >= set(of_prefix.values()):
            return {name: state[key] for name, key in of_prefix.items()}
    return dict(state)


def read_checkpoint(path: Path, expected: Collection[str]) -> dict[str, Any]:
    """Return these parts of a Lightning checkpoint; a FileError where it has not all of them."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: content[name] for name in expected}
    except Exception as error:  # pickle's and zip's errors share no base class
        raise FileError(
            f"cannot read '{path}' as a checkpoint of a training ({first_line(error)[:160]}); check ckpt_path: give "
            "one that coin fit wrote"
        ) from error


def read_weights(path: Path, names: Collection[str] = ()) -> dict[str, Tensor]:
    """Read a network's tensors from ``coin``'s files, flat safetensors, or Lightning or plain PyTorch checkpoints.

    Given the `names` of the network's tensors, a prefix of them all is dropped: Lightning's ``network.``, ``module.``.
    Tensors may lie under ``state_dict`` or under ``model``, but not under both.
    """
    if not path.is_file():
        raise FileError(f"found no file '{path}', expected a network's weights; check the path")
    try:
        if path.suffix == ".safetensors":
            return without_prefix(load_file(path), names)
        state = torch.load(path, map_location="cpu", weights_only=True)
        places = [key for key in ("state_dict", "model") if isinstance(state.get(key), dict)]
        if len(places) > 1:
            raise ValueError("it has both 'state_dict' and 'model': save one of them")
        for key in places:
            state = state[key]
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError("not all values are tensors")
    except Exception as error:  # those of pickle, zip and safetensors share no base class
        reason, _, _ = first_line(error).partition(". ")
        raise FileError(
            f"cannot read '{path}' as a network's weights ({reason}), expected tensors by name, such as what "
            f"network.state_dict() returns, as safetensors or a checkpoint; {how_to_redo(path)}"
        ) from error
    return without_prefix(state, names)


def to_compute(networks: list[nn.Module], device: torch.device) -> list[nn.Module]:
    """Return networks of a device where merges are computed: copies on the CPU, if the device has no float64."""
    return networks if has_float64(device) else [clone(network).cpu() for network in networks]


def stored(network: nn.Module) -> dict[str, Tensor]:
    """Return what is in a network's state, parameters and buffers by name, tied ones once."""
    state = network.state_dict(keep_vars=True)
    check_tensors(state)
    seen: set[int] = set()
    tensors = {}
    for name, tensor in state.items():
        if id(tensor) not in seen:
            tensors[name] = tensor
        seen.add(id(tensor))
    return tensors


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters by name, detached."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def tensors_of(network: nn.Module) -> tuple[State, State]:
    """Return a network's parameters, detached, and its buffers."""
    return parameters_of(network), dict(network.named_buffers())
