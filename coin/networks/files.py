"""Networks as safetensors files with their architecture and provenance, and those that were trained elsewhere."""

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coin.errors import ConfigurationError, FileError
from coin.files.atomic import sha256_of
from coin.files.safetensors import StateFile, save_state
from coin.files.tensors import State, check_finite, check_layout
from coin.networks.adapted import Adapted, tensor_nbytes, with_adapters
from coin.networks.adapter import Adapter, adapters_state, split_adapters
from coin.networks.batchnorm import folded_norms, mark_folded
from coin.networks.clip import zero_shot_head
from coin.networks.compressed import Base, Compressed, Compression, int8, stored
from coin.networks.heads import head_name
from coin.networks.hub import HuggingFace, local_place
from coin.networks.registry import NetworkConfig, build_network, empty_network
from coin.networks.weights import fill_network, read_weights, with_own_head

ZeroShot = tuple[Sequence[str], Sequence[str]]  # a task's prompts and class names, for a zero-shot head


@dataclass(frozen=True)
class NetworkFile:
    """A network's file: its tensors, of a whole network read on access, and its metadata (`provenance`)."""

    path: Path
    content: State | Compressed
    config: NetworkConfig
    num_classes: int
    provenance: dict[str, Any]
    adapters: Sequence[Adapter] = ()  # of a coded model that is a body with some

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors, tied ones once; for a compressed network those of the delta only."""
        own = self.provenance.get("nbytes") or sum(t.nbytes for t in stored(self.network).values())
        return int(own) + sum(each.nbytes for each in self.adapters)

    @property
    def state(self) -> State:
        """Its tensors, those of a compressed network unpacked."""
        return self.network.state_dict() if isinstance(self.content, Compressed) else self.content

    @cached_property
    def network(self) -> nn.Module:
        """The network, in eval mode; raises StateError if its tensors do not fit the architecture."""
        if isinstance(self.content, Compressed):
            return self.content.network()
        network = build_network(self.config, self.num_classes)
        fill_network(network, self.content, str(self.path))
        mark_folded(network, self.provenance.get("folded", {}))
        return network.eval()

    @property
    def kept(self) -> nn.Module | Compressed:
        """The network as it is kept, for `coin.Coded`: compressed, or whole, as a body where there are adapters."""
        return self.content if isinstance(self.content, Compressed) else with_adapters(self.network, self.adapters)

    def module(self, keep_mib: float = 0.0) -> nn.Module:
        """Return the network as it answers: packed where it is stored so, and as a body where there are adapters."""
        if isinstance(self.content, Compressed) and not self.content.base_bits:
            return Adapted(self.content.packed(), self.adapters, keep_mib)
        return with_adapters(self.network, self.adapters, keep_mib)

    def select(self, names: Iterable[str]) -> State:
        """Return these tensors alone, in this order; of a whole network read on access, too."""
        if isinstance(self.content, StateFile):
            return StateFile(self.path, names)
        state = self.state
        return {name: state[name] for name in names}


def nbytes_together(files: Iterable[NetworkFile]) -> int:
    """Return the total bytes of networks; a base shared by compressed ones counts once."""
    every = [(file.nbytes, int(file.provenance.get("base_nbytes", 0))) for file in files]
    return sum(own for own, _ in every) + max((base for _, base in every), default=0)


def resident_copies(files: Sequence[NetworkFile]) -> int:
    """Return the bytes of a process that keeps compressed copies: all as stored, and one of them whole to answer."""
    return nbytes_together(files) + max(tensor_nbytes(file.network) for file in files)


def save_network(
    path: Path, network: nn.Module, config: NetworkConfig, num_classes: int, provenance: Mapping[str, Any],
    adapters: Sequence[Adapter] = (),
) -> None:  # fmt: skip
    """Write a network, its architecture and provenance; a StateError for values not finite, but infinite buffers."""
    infinite = [name for name, buffer in network.named_buffers() if bool(torch.isinf(buffer).any())]  # causal masks
    described = {**provenance, "network": asdict(config), "num_classes": num_classes}
    described |= {"folded": folded_norms(network)}
    described |= {"infinite": infinite} if infinite else {}
    described |= {"adapters": len(adapters)} if adapters else {}
    save_state(path, network.state_dict() | adapters_state(adapters), described, infinite)


def kept_base(path: Path, base: Path | None, compression: Compression) -> tuple[Path | None, Base]:
    """Return the file that a compressed one names as its base, of 8 bits written beside it, and the base."""
    if not compression.base_bits:
        return None, None
    if base is None:
        raise ConfigurationError(f"found no base and base_bits={compression.base_bits}; name the base's file")
    file = load_network(base)
    if compression.base_bits != 8:
        return base, file.network
    kept_at = int8_path(path, base)  # which has the base's hash in its name
    if not kept_at.is_file():
        kept = int8(file.network)
        told = {"network": asdict(file.config), "num_classes": file.num_classes, "nbytes": kept.nbytes}
        kept.save(kept_at, {"made_by": "coin compress", **told})
    return kept_at, file.network


def save_compressed(
    path: Path,
    made: Compressed,
    config: NetworkConfig,
    num_classes: int,
    base: Path | None,
    compression: Compression,
    provenance: Mapping[str, Any],
) -> None:
    """Write a compressed network that names its base's file (`kept_base`); `open_network` reads it back."""
    described = {"network": asdict(config), "num_classes": num_classes, "compression": asdict(compression)}
    described |= {"nbytes": made.nbytes - sum(each.nbytes for each in made.adapters), "base_nbytes": made.base_nbytes}
    made.save(path, {**provenance, **described, "base_file": base and os.path.relpath(base, path.parent)})


def int8_path(path: Path, base: Path) -> Path:
    """Return the path of the 8-bit base of a compressed network's file: in the same folder, one per base."""
    return path.with_name(f"{base.stem}-{sha256_of(base)[:8]}-int8.safetensors")


def open_network(path: Path) -> NetworkFile:
    """Open a network's file, whole or compressed, and check its values and metadata.

    Raises FileError where it, or its base, is missing, damaged or no network's; StateError for tensors that are not
    finite, or not those of the architecture that the file names.
    """
    state = StateFile(path)
    if "compressed" in state.provenance:
        return _open_compressed(path, state.provenance)
    infinite = state.provenance.get("infinite", [])
    check_finite(state, f"the network in '{path}'", infinite if isinstance(infinite, list) else ())
    names, adapters = split_adapters(state, int(state.provenance.get("adapters", 0)))
    state = StateFile(path, names)
    config, num_classes = _described(path, state.provenance)
    check_layout(empty_network(config, num_classes).state_dict(), state, str(path))
    return NetworkFile(path, state, config, num_classes, state.provenance, adapters)


def _open_compressed(path: Path, provenance: dict[str, Any]) -> NetworkFile:
    config, num_classes = _described(path, provenance)
    if (named := provenance.get("base_file")) is None:
        base = build_network(config, num_classes)
    else:
        # A run's folder links to the steps' files, beside which the base is.
        places = [path.parent / named, path.resolve().parent / named, path.parent / Path(named).name]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise FileError(f"found no file '{places[0]}', the base that '{path}' is a delta from; put it there")
        base = open_network(found).network
    made = Compressed.load(path, base)
    return NetworkFile(path, made, config, num_classes, provenance, made.adapters)


def load_network(path: Path) -> NetworkFile:
    """Open a network as `open_network` does and read it."""
    file = open_network(path)
    file.network  # noqa: B018 (read now, so that what is wrong with it shows)
    return file


def _described(path: Path, provenance: Mapping[str, Any]) -> tuple[NetworkConfig, int]:
    network, num_classes = provenance.get("network"), provenance.get("num_classes")
    if network is None:
        raise FileError(f"'{path}' holds no network (no 'network' in its metadata); give an expert or a coded model")
    try:
        # Pretrained weights are about to be overwritten: never download them to read a file.
        return NetworkConfig(**{**network, "weights": None}), operator.index(num_classes)  # type: ignore[arg-type]
    except (TypeError, AttributeError) as error:
        told = f"'{path}' has metadata that describe no network ({network!r:.120}, {num_classes!r:.20} classes)"
        raise FileError(f"{told}, expected name, image_size and options; make the file again") from error


def initial_network(
    config: NetworkConfig, num_classes: int, checkpoint: Path | None, *, seed: int = 0, wider: Path | None = None
) -> nn.Module:
    """Build the shared initialisation of all experts of one class count, from a base checkpoint or from the seed.

    The checkpoint's head is kept if its class count agrees, or has the first rows of that in the file `wider`.
    """
    source = checkpoint or wider
    if source is None:
        return build_network(config, num_classes, seed=seed)
    return import_checkpoint(config, num_classes, source, seed=seed, wider=wider)


def import_checkpoint(
    config: NetworkConfig, num_classes: int, path: Path, *, seed: int | None = None, wider: Path | None = None
) -> nn.Module:
    """Build a network that was trained elsewhere, from a state dict as safetensors or a checkpoint.

    Its head must have `num_classes` logits; with a seed it may have others, and a new one is drawn, or is the first
    rows of that in the file `wider`. Raises FileError for a file that cannot be used, StateError for another network.
    """
    network = build_network(replace(config, weights=None), num_classes)
    names = network.state_dict().keys()
    state = read_weights(path, names)
    if any(".lora_A." in name for name in state):
        raise FileError(f"'{path}' holds LoRA adapters apart; save what peft's merge_and_unload() returns")
    check_finite(state, f"the network in '{path}'", {name for name, _ in network.named_buffers()})
    if seed is not None:
        state = with_own_head(network, state, seed=seed, wider=None if wider is None else read_weights(wider, names))
    fill_network(network, state, str(path))
    return network


def check_heads(config: NetworkConfig, zero_shot: bool, task: str) -> None:
    """Refuse a task with a zero-shot head for a network that trains its own, and the reverse; a ConfigurationError."""
    if zero_shot != config.source.zero_shot:
        head, kind = ("with", "trained") if zero_shot else ("without", "computed from class names")
        told = f"found the task '{task}' {head} head.zero_shot and the network '{config.name}', whose head is {kind}"
        own = "{zero_shot: {prompts: ['a photo of a {}.'], classes: [...]}}"
        raise ConfigurationError(f"{told}; set network.options.head=zero_shot and every task's head: {own}, or neither")


@torch.no_grad()
def fill_head(network: nn.Module, config: NetworkConfig, zero_shot: ZeroShot | None, task: str = "task") -> None:
    """Compute a task's zero-shot head and write it into a network that has such a head; raises as `check_heads`."""
    check_heads(config, zero_shot is not None, task)
    if zero_shot is not None:
        head = zero_shot_head(local_place(config.name), *zero_shot)
        network.get_submodule(head_name(network)).get_parameter("weight").copy_(head)


def import_pretrained(
    config: NetworkConfig, place: str, initial: Path, zero_shot: ZeroShot | None, task: str
) -> nn.Module:
    """Return a task's expert with the weights of ``hf/PLACE``; a projection that a CLIP lacks is that of `initial`."""
    source = config.source
    if not isinstance(source, HuggingFace):
        told = f"found the expert '{place}' for the network '{config.name}', expected one of Hugging Face's (hf/…)"
        raise ConfigurationError(f"{told}; give a file of weights, or change network.name")
    network = load_network(initial).network
    source.load(network, local_place(place))
    fill_head(network, config, zero_shot, task)
    return network
