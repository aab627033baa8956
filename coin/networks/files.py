"""Networks as safetensors files that say what they are."""

import operator
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coin.errors import FileError
from coin.files.safetensors import StateFile, save_state
from coin.files.tensors import check_finite
from coin.networks.registry import NetworkConfig, build_network
from coin.networks.weights import check_layout, fill_network, read_weights, with_own_head


@dataclass(frozen=True)
class NetworkFile:
    """A network's file, its tensors read when they are asked for, and all that was written with it (`provenance`)."""

    state: StateFile
    config: NetworkConfig
    num_classes: int
    provenance: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors, as they are kept."""
        return sum(tensor.nbytes for tensor in self.state.values())

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

    A StateError where a parameter is not finite or a buffer holds a NaN, a FileError where it cannot be written.
    """
    # As a causal mask does.
    infinite = [name for name, buffer in network.named_buffers() if bool(torch.isinf(buffer).any())]
    described = {**provenance, "network": asdict(config), "num_classes": num_classes}
    save_state(path, network.state_dict(), described | ({"infinite": infinite} if infinite else {}), infinite)


def open_network(path: Path) -> NetworkFile:
    """Open a network that `save_network` wrote, and check that it is finite and what its metadata say.

    Raises:
        FileError: The file is missing or damaged, or does not hold a network.
        StateError: A tensor is not finite, or the tensors are not those of the architecture that the file names.
    """
    state = StateFile(path)
    infinite = state.provenance.get("infinite", [])
    check_finite(state, f"the network in '{path}'", infinite if isinstance(infinite, list) else ())
    config, num_classes = _described(path, state.provenance)
    with suppress(NotImplementedError), torch.device("meta"):  # raised by a constructor that looks at its weights
        described = build_network(config, num_classes).state_dict()
        check_layout({name: tensor.shape for name, tensor in described.items()}, state.shapes(), str(path))
    return NetworkFile(state, config, num_classes, state.provenance)


def load_network(path: Path) -> NetworkFile:
    """Open a network as `open_network` does and read it."""
    file = open_network(path)
    file.network  # noqa: B018 (read now, so that what is wrong with it shows)
    return file


def _described(path: Path, provenance: Mapping[str, Any]) -> tuple[NetworkConfig, int]:
    """Return the architecture and the number of classes that a file's metadata tell of."""
    network, num_classes = provenance.get("network"), provenance.get("num_classes")
    if network is None:
        raise FileError(f"'{path}' holds no network (no 'network' in its metadata); give an expert or a coded model")
    try:
        # Pretrained weights are about to be overwritten: never download them to read a file.
        return NetworkConfig(**{**network, "weights": None}), operator.index(num_classes)  # type: ignore[arg-type]
    except (TypeError, AttributeError) as error:
        raise FileError(
            f"'{path}' has metadata that describe no network (network {network!r:.120}, num_classes {num_classes!r:.20}"
            "), expected name, image_size and options; make the file again"
        ) from error


def initial_network(
    config: NetworkConfig, num_classes: int, checkpoint: Path | None, *, seed: int = 0, wider: Path | None = None
) -> nn.Module:
    """Build the shared initialisation that all experts of one class count start from.

    It comes from a base checkpoint, whose head is taken over when its class count agrees, or from the seed alone.
    Beside one of more classes, `wider`, it is the same but for the head, and that the first rows of the wider one's.
    """
    source = checkpoint or wider
    if source is None:
        return build_network(config, num_classes, seed=seed)
    return brought_network(config, num_classes, source, seed=seed, fresh_head=True, wider=wider)


def brought_network(
    config: NetworkConfig,
    num_classes: int,
    path: Path,
    *,
    seed: int = 0,
    fresh_head: bool = False,
    wider: Path | None = None,
) -> nn.Module:
    """Build a network that was trained elsewhere, from a state dict as safetensors or a checkpoint.

    Its head must be of `num_classes` logits, unless it may be replaced by a fresh one, drawn from the seed or of the
    first rows of the head in the file `wider`.

    A FileError where it cannot be used, a StateError where it is of another architecture or not finite.
    """
    network = build_network(replace(config, weights=None), num_classes, seed=seed)
    state = read_weights(path)
    if any(".lora_A." in name for name in state):
        raise FileError(
            f"'{path}' holds LoRA adapters beside the weights, expected them merged; give the expert.safetensors that "
            "was written at the end of that training"
        )
    check_finite(state, f"the network in '{path}'", {name for name, _ in network.named_buffers()})
    if fresh_head:
        state = with_own_head(network, state, seed=seed, wider=None if wider is None else read_weights(wider))
    fill_network(network, state, str(path))
    return network
