"""Networks as safetensors files that say what they are, and state dicts from elsewhere, checked name by name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from coin.errors import FileError, StateError, first_line
from coin.networks.heads import head_name, padded_rows
from coin.networks.lora import holds_adapters
from coin.networks.registry import NetworkConfig, build_network
from coin.state import State, check_finite, save_state
from coin.state_file import StateFile


@dataclass(frozen=True)
class NetworkFile:
    """A network's file, its tensors (`state`) read when they are asked for, and what it says of itself.

    `provenance` is everything that was written with it, `config` and `num_classes` among it.
    """

    state: StateFile
    config: NetworkConfig
    num_classes: int
    provenance: dict[str, Any]

    @cached_property
    def network(self) -> nn.Module:
        """The network, in eval mode; a StateError where its tensors do not fit the architecture."""
        network = build_network(self.config, self.num_classes)
        fill_network(network, self.state, str(self.state.path))
        return network.eval()


def save_network(
    path: Path, network: nn.Module, config: NetworkConfig, num_classes: int, provenance: Mapping[str, Any]
) -> None:
    """Write a network's parameters and buffers with its architecture and its provenance.

    Raises:
        StateError: A parameter is not finite, or a buffer holds a NaN.
        FileError: The file cannot be written.
    """
    # As a causal mask does.
    infinite = [name for name, buffer in network.named_buffers() if bool(torch.isinf(buffer).any())]
    described = {**provenance, "network": asdict(config), "num_classes": num_classes}
    save_state(path, network.state_dict(), described | ({"infinite": infinite} if infinite else {}), infinite)


def open_network(path: Path) -> NetworkFile:
    """Open a network that `save_network` wrote, and check that it is finite. Whether it is whole is for `check_layout`.

    Raises:
        FileError: The file is missing or damaged, or does not hold a network.
        StateError: A tensor is not finite, or the tensors are too few for the architecture that the file names.
    """
    state = StateFile(path)
    provenance = state.provenance
    infinite = provenance.get("infinite", [])
    check_finite(state, f"the network in '{path}'", infinite if isinstance(infinite, list) else ())
    config, num_classes = _described(path, provenance)
    _check_size(path, config, num_classes, state.shapes())
    return NetworkFile(state, config, num_classes, provenance)


def load_network(path: Path) -> NetworkFile:
    """Open a network as `open_network` does, and read it.

    Raises:
        StateError: Its tensors do not fit the architecture that the file names.
    """
    file = open_network(path)
    file.network  # noqa: B018 (read now, so that what is wrong with it shows)
    return file


def _described(path: Path, provenance: Mapping[str, Any]) -> tuple[NetworkConfig, int]:
    """Return the architecture and the number of classes that a file's metadata tell of."""
    if "network" not in provenance or "num_classes" not in provenance:
        raise FileError(f"'{path}' holds no network (no 'network' in its metadata); give an expert or a coded model")
    network, num_classes = provenance["network"], provenance["num_classes"]
    kinds = {"name": str, "image_size": int, "options": dict}
    if (
        not isinstance(network, dict)
        or not isinstance(num_classes, int)
        or not all(isinstance(network.get(name), kind) for name, kind in kinds.items())
        or network.keys() - kinds.keys() - {"weights"}
    ):
        raise FileError(
            f"'{path}' has metadata that describe no network (network {network!r:.120}, num_classes {num_classes!r:.20}"
            "), expected name, image_size and options; make the file again"
        )
    # Pretrained weights are about to be overwritten: never download them to read a file.
    return NetworkConfig(**{**network, "weights": None}), num_classes


def _check_size(path: Path, config: NetworkConfig, num_classes: int, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse metadata that describe a network of another size than the tensors', before memory is taken for it."""
    try:
        with torch.device("meta"):
            described = {name: each.shape for name, each in build_network(config, num_classes).state_dict().items()}
    except NotImplementedError:  # a constructor that looks at its weights
        return
    size, found = (sum(shape.numel() for shape in each.values()) for each in (described, shapes))
    if size > max(10**8, 4 * found):  # 400 MB may be taken for nothing, before names and shapes are compared
        raise StateError(
            f"'{path}' holds {found} numbers, expected {size} of {config.name} with {num_classes} classes and options "
            f"{config.options}, as its metadata say; make the file again"
        )


def fill_network(network: nn.Module, state: State, source: str) -> None:
    """Copy a state dict into a network, name by name and shape by shape; raises as `check_layout`."""
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    check_layout(shapes, {name: tensor.shape for name, tensor in state.items()}, source)
    network.load_state_dict(dict(state))


def check_layout(own: Mapping[str, torch.Size], shapes: Mapping[str, torch.Size], source: str) -> None:
    """Check that a state, from `source`, has the names and `shapes` of a network's `own`.

    Raises:
        StateError: A name is missing or superfluous or a shape differs; the message says which, and in what `source`.
    """
    advice = "it is of another architecture: give one of the same network.name and network.options"
    if missing := sorted(own.keys() - shapes.keys()):
        raise StateError(f"'{source}' has no tensor '{missing[0]}' ({len(missing)} missing); {advice}")
    if extra := sorted(shapes.keys() - own.keys()):
        raise StateError(f"'{source}' has a tensor '{extra[0]}' too many ({len(extra)} in all); {advice}")
    for name, shape in own.items():
        if shapes[name] != shape:
            raise StateError(
                f"'{source}' has tensor '{name}' of shape {list(shapes[name])}, expected {list(shape)}; "
                "it has another architecture or another number of classes: give one of the same"
            )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a network's tensors from a file of any of the kinds that people have.

    Understood are ``coin``'s own files, any flat safetensors state dict, and Lightning or plain PyTorch checkpoints
    (read with ``weights_only=True``; a Lightning checkpoint's ``network.`` prefix is dropped).

    Raises:
        FileError: The file is missing or damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise FileError(f"found no file '{path}', expected a network's weights; check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise FileError(
            f"cannot read '{path}' ({first_line(error)}); it is damaged or no checkpoint: save it again"
        ) from error
    except Exception as error:  # pickle's own errors share no base class
        raise FileError(
            f"cannot read '{path}' without unpickling objects; save its state_dict as safetensors"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FileError(f"'{path}' holds no state dict, expected tensors by name; save the network's state_dict()")
    if any(name.startswith("network.") for name in state):
        state = {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
    return state


def initial_network(config: NetworkConfig, num_classes: int, checkpoint: Path | None, *, seed: int = 0) -> nn.Module:
    """Build the shared initialisation that all experts of one class count start from; see `build_network`.

    Args:
        config: The architecture.
        num_classes: The number of logits.
        checkpoint: A base checkpoint to start from, or none for `config.weights` (or random weights). Its head is
            taken over when its class count agrees; otherwise the head is the one that `seed` gives.
        seed: Of whatever is random in the initialisation.
    """
    if checkpoint is None:
        return build_network(config, num_classes, seed=seed)
    return brought_network(config, num_classes, checkpoint, seed=seed, fresh_head=True)


def brought_network(
    config: NetworkConfig, num_classes: int, path: Path, *, seed: int = 0, fresh_head: bool = False
) -> nn.Module:
    """Build a network that was trained elsewhere.

    Args:
        config: The architecture.
        num_classes: The number of logits; the file's head must have as many unless it may be a fresh one.
        path: A state dict as safetensors, or a checkpoint.
        seed: Of a fresh head.
        fresh_head: Whether a head of another class count is replaced by a fresh one.

    Raises:
        FileError: The file is missing or damaged, or holds adapters beside the weights.
        StateError: It is of another architecture or number of classes, or a tensor is not finite.
    """
    network = build_network(replace(config, weights=None), num_classes, seed=seed)
    state = read_weights(path)
    if holds_adapters(list(state)):
        raise FileError(
            f"'{path}' holds LoRA adapters beside the weights, expected them merged; give the expert.safetensors that "
            "was written at the end of that training"
        )
    check_finite(state, f"the network in '{path}'", {name for name, _ in network.named_buffers()})
    if fresh_head:
        own, head = network.state_dict(), head_name(network)
        for name in {f"{head}.weight", f"{head}.bias"} & own.keys() & state.keys():
            if state[name].shape != own[name].shape and state[name].shape[1:] == own[name].shape[1:]:
                state[name] = own[name]
    fill_network(network, state, str(path))
    return network


def widen_network(file: NetworkFile, num_outputs: int) -> nn.Module:
    """Return a file's network with its head padded by zeros to `num_outputs` logits (the same one if it fits)."""
    if file.num_classes == num_outputs:
        return file.network
    network = build_network(file.config, num_outputs)
    state = file.network.state_dict()
    fill_network(network, {**state, **padded_rows(state, head_name(network), num_outputs)}, "the padded network")
    return network.eval()
