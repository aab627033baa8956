"""State dicts from elsewhere, checked name by name, and from files of the kinds that people have."""

from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from types import FunctionType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod as Pruning
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from coin.core.devices import has_float64
from coin.errors import ConfigurationError, FileError, StateError, first_line
from coin.files.atomic import how_to_redo
from coin.files.tensors import State, check_layout
from coin.networks.calling import check_tensors, clear_caches, clone
from coin.networks.heads import head_name, initialise_head
from coin.networks.kept import is_making


def fill_network(network: nn.Module, state: State, source: str) -> None:
    """Copy a state dict into a network; raises as `check_layout`."""
    whole = network.state_dict()  # with the versions of its modules, which MNASNet asks for
    check_layout(whole, state, source)
    whole.update(state)
    network.load_state_dict(whole)
    clear_caches(network)


def without_frozen(network: nn.Module) -> nn.Module:
    """Return the network, or a copy where some of its parameters are frozen, with all of them trainable."""
    if all(parameter.requires_grad for parameter in network.parameters()):
        return network
    return clone(network).requires_grad_(True)


def check_plain(network: nn.Module, *, meta: bool = False) -> None:
    """Raise ConfigurationError for what is no module, StateError for a state not of dense parameters and buffers."""
    if not isinstance(network, nn.Module) or hasattr(network, "_orig_mod"):
        told = f"found {type(network).__name__}, expected a torch.nn.Module"
        raise ConfigurationError(f"{told}; load a state dict into one, or compile it afterwards")
    check_tensors(network, meta=meta)
    if other := [name for name, tensor in network.state_dict().items() if not isinstance(tensor, Tensor)]:
        raise StateError(f"'{other[0]}' of {type(network).__name__} is no tensor; drop get_extra_state, quantise later")
    for name, module in network.named_modules():
        held = [value.values() if isinstance(value, dict) else [value] for value in vars(module).values()]
        if type(module).__setstate__ is nn.Module.__setstate__ and any(map(_is_closure, chain(*held))):
            raise StateError(f"layer '{name}' holds a function of a module, which copies would share; make it a method")
        hooks = module._forward_pre_hooks.values()
        if is_making(module):
            told = f"a weight of layer '{name}' is made when it is read, expected a parameter"
            raise StateError(
                f"{told}; give the plain network that Compressed.network() or Adapted.network(expert) makes"
            )
        if is_parametrized(module) or any(isinstance(hook, WeightNorm | SpectralNorm | Pruning) for hook in hooks):
            told = f"a weight of layer '{name}' is computed at every pass, expected a parameter; call torch.nn.utils."
            others = "weight_norm remove_weight_norm(layer, 'weight'), for pruning prune.remove(layer, 'weight')"
            raise StateError(f"{told}parametrize.remove_parametrizations(layer, 'weight'), for the old {others}")


def _is_closure(value: object) -> bool:
    """Say whether a value is a function that holds a module or a method of one; metrics make theirs anew in a copy."""
    cells = (value.__closure__ or ()) if isinstance(value, FunctionType) else ()
    return any(isinstance(getattr(cell.cell_contents, "__self__", cell.cell_contents), nn.Module) for cell in cells)


def with_own_head(
    network: nn.Module, state: Mapping[str, Tensor], *, seed: int, wider: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return a state; a head of other classes is drawn from the seed, or the first rows of the `wider` network's."""
    head = head_name(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initialise_head(network.get_submodule(head))
    own, found = network.state_dict(), dict(state)
    for name in {f"{head}.weight", f"{head}.bias"} & own.keys() & state.keys():
        if state[name].shape != own[name].shape and state[name].shape[1:] == own[name].shape[1:]:
            found[name] = own[name] if wider is None else wider[name][: len(own[name])].clone()
    return found


def without_prefix(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors of these names without a prefix of them all, such as ``module.``; without one all tensors."""
    first = min(names, default="")
    for found in state if first not in state else ():
        prefix = found.removesuffix(first)
        if prefix.endswith(".") and all(prefix + name in state for name in names):
            return {name: state[prefix + name] for name in names}
    return dict(state)


TO_GO_ON = ("state_dict", "loops", "optimizer_states")  # what a training needs of a checkpoint


def read_checkpoint(path: Path, expected: Collection[str]) -> dict[str, Any]:
    """Return these parts of a Lightning checkpoint; a FileError where it has not all of them."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: content[name] for name in expected}
    except Exception as error:  # pickle's and zip's errors share no base class
        told = f"cannot read '{path}' as a checkpoint of a training ({first_line(error)[:160]})"
        raise FileError(f"{told}; check ckpt_path: give one that coin fit wrote") from error


def read_weights(path: Path, names: Collection[str] = ()) -> dict[str, Tensor]:
    """Read a network's tensors from ``coin``'s files, flat safetensors, or Lightning or plain PyTorch checkpoints.

    Given the `names` of the network's tensors, a prefix of them all is dropped: Lightning's ``network.``, ``module.``.
    Tensors may lie under ``state_dict`` or ``model``.
    """
    if not path.is_file():
        raise FileError(f"found no file '{path}', expected a network's weights; check the path")
    with path.open("rb") as file:
        beginning = file.read(64)
    if beginning.lstrip().startswith(b"<"):
        raise FileError(f"'{path}' is a web page (HTML), expected a network's weights; download the file itself")
    try:
        if path.suffix == ".safetensors":
            return without_prefix(load_file(path), names)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        told = f"cannot read '{path}' ({first_line(error)}), expected a checkpoint"
        raise FileError(f"{told}; {how_to_redo(path)}") from error
    except UnpicklingError as error:
        if not beginning.startswith((b"PK", b"\x80")):  # neither of PyTorch's formats
            raise FileError(f"'{path}' is no checkpoint, expected a network's weights; save them again") from error
        told = f"'{path}' holds pickled objects, such as a whole network, expected tensors by name"
        raise FileError(f"{told}; load it where its classes are, and save its state_dict()") from error
    state = content
    if isinstance(content, dict):
        state = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FileError(f"'{path}' holds no state dict, expected tensors by name; save the network's state_dict()")
    return without_prefix(state, names)


def to_compute(networks: list[nn.Module], device: torch.device) -> list[nn.Module]:
    """Return networks of a device where merges are computed: copies on the CPU, if the device has no float64."""
    return networks if has_float64(device) else [clone(network).cpu() for network in networks]


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters by name, detached."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def tensors_of(network: nn.Module) -> tuple[State, State]:
    """Return a network's parameters, detached, and its buffers."""
    return parameters_of(network), dict(network.named_buffers())
