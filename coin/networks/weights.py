"""State dicts from elsewhere, checked name by name, and from files of the kinds that people have."""

from collections.abc import Collection, Mapping
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

from coin.core.devices import has_float64, seeded
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
    kind = type(network).__name__
    if not isinstance(network, nn.Module) or hasattr(network, "_orig_mod"):
        expected = "a torch.nn.Module; load a state dict into one, or compile it afterwards"
        raise ConfigurationError(f"found {kind}, expected {expected}")
    check_tensors(network, meta=meta)
    odd = _odd_part(network)
    if odd:
        raise StateError(
            f"{odd} in {kind}, expected a module whose state is its real parameters and buffers; drop "
            "get_extra_state and such functions, take the plain network of a compressed or adapted one, and call "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), for the old weight_norm "
            "remove_weight_norm(layer, 'weight'), for pruning prune.remove(layer, 'weight')"
        )


def _odd_part(network: nn.Module) -> str | None:
    """Name what a network's state does not hold, what has no average, or what copies would share; None without."""
    for name, tensor in network.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            return f"'{name}' is no tensor"
        if isinstance(tensor, nn.Parameter) and tensor.is_complex():
            return f"parameter '{name}' is complex"
    for name, module in network.named_modules():
        hooks = module._forward_pre_hooks.values()
        is_wrapped = any(isinstance(hook, WeightNorm | SpectralNorm | Pruning) for hook in hooks)
        if is_making(module) or is_parametrized(module) or is_wrapped:
            return f"a weight of layer '{name}' is computed at every pass"
        # In copies, as metrics do.
        makes_functions_anew = type(module).__setstate__ is not nn.Module.__setstate__
        if not makes_functions_anew and _holds_closure(module):
            return f"layer '{name}' holds a function of a module, which copies would share,"
        if getattr(module, "max_norm", None) is not None:  # of an nn.Embedding
            return f"layer '{name}' has max_norm and writes its weight at every pass,"
        if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # of Hugging Face's GPT-2
            return f"the weight of layer '{name}' is stored transposed"
    return None


def _holds_closure(module: nn.Module) -> bool:
    """Return whether an attribute or a hook is a function that refers to a module, or to a method of one."""
    for value in vars(module).values():
        for held in value.values() if isinstance(value, dict) else [value]:
            cells = held.__closure__ or () if isinstance(held, FunctionType) else ()
            contents = [cell.cell_contents for cell in cells]
            if any(isinstance(getattr(each, "__self__", each), nn.Module) for each in contents):
                return True
    return False


def with_own_head(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *,
    seed: int,
    wider: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return a state; a head of other classes is drawn from the seed, or the first rows of the `wider` network's."""
    head = head_name(network)
    with seeded(seed):
        initialise_head(network.get_submodule(head))
    own = network.state_dict()
    found = dict(state)
    for name in (f"{head}.weight", f"{head}.bias"):
        if name not in own or name not in state:
            continue
        classes, *width = own[name].shape
        has_other_classes = len(state[name]) != classes
        has_same_width = list(state[name].shape[1:]) == width
        if has_other_classes and has_same_width:
            found[name] = own[name] if wider is None else wider[name][:classes].clone()
    return found


def without_prefix(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors of these names without a prefix of them all, such as ``module.``; without one all tensors."""
    first = min(names, default="")
    if first in state:
        return dict(state)
    for found in state:
        prefix = found.removesuffix(first)
        if prefix.endswith(".") and all(prefix + name in state for name in names):
            return {name: state[prefix + name] for name in names}
    return dict(state)


def read_checkpoint(path: Path, expected: Collection[str]) -> dict[str, Any]:
    """Return these parts of a Lightning checkpoint; a FileError where it has not all of them."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: content[name] for name in expected}
    except Exception as error:  # pickle's and zip's errors share no base class
        found = f"cannot read '{path}' as a checkpoint of a training ({first_line(error)[:160]})"
        raise FileError(f"{found}; check ckpt_path: give one that coin fit wrote") from error


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
        raise FileError(
            f"'{path}' is a web page (HTML), expected a network's weights; download the file itself"
        )
    try:
        if path.suffix == ".safetensors":
            return without_prefix(load_file(path), names)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if beginning.startswith((b"PK", b"\x80")):  # PyTorch's formats
            expected = "tensors by name; load it where its classes are, and save its state_dict()"
            raise FileError(
                f"'{path}' holds pickled objects, such as a whole network, expected {expected}"
            ) from error
        raise FileError(
            f"'{path}' is no checkpoint, expected a network's weights; save them again"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        found = f"cannot read '{path}' ({first_line(error)}), expected a checkpoint"
        raise FileError(f"{found}; {how_to_redo(path)}") from error
    state = content
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            state = content[key]
    has_tensors = isinstance(state, dict) and all(
        isinstance(value, Tensor) for value in state.values()
    )
    if not has_tensors:
        raise FileError(
            f"'{path}' holds no state dict, expected tensors by name; save the network's state_dict()"
        )
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
