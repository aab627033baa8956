"""Networks as safetensors files with their architecture and provenance, and those that were trained elsewhere."""

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from coin.errors import ConfigurationError, FileError
from coin.files.atomic import sha256_of
from coin.files.safetensors import StateFile, save_state
from coin.files.tensors import State, check_finite, fingerprint
from coin.networks.adapted import Adapted, stored_nbytes, with_adapters
from coin.networks.adapter import Adapter, adapters_state, split_adapters
from coin.networks.batchnorm import folded_norms, mark_folded
from coin.networks.compressed import Compressed, Compression, int8
from coin.networks.hub import HuggingFace, local_place
from coin.networks.registry import NetworkConfig, build_network, check_imported
from coin.networks.weights import fill_network, read_weights, with_own_head


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
        """The bytes of its tensors, tied ones once, and of adapters; for a delta its own only."""
        if isinstance(self.content, Compressed):
            return self.content.nbytes
        return stored_nbytes(self.network) + sum(adapter.nbytes for adapter in self.adapters)

    @property
    def base_nbytes(self) -> int:
        """The bytes of the base that a delta is from, as stored; 0 of others."""
        return self.content.base_nbytes if isinstance(self.content, Compressed) else 0

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
        if isinstance(self.content, Compressed):
            return self.content
        return with_adapters(self.network, self.adapters)

    def module(self) -> nn.Module:
        """Return the network as it answers: packed where it is stored so, and as a body where there are adapters."""
        if isinstance(self.content, Compressed) and not self.content.base_bits:
            return Adapted(self.content.packed(), self.adapters)
        return with_adapters(self.network, self.adapters)

    def select(self, names: Iterable[str]) -> State:
        """Return these tensors alone, in this order; of a whole network read on access, too."""
        if isinstance(self.content, StateFile):
            return StateFile(self.path, names)
        state = self.state
        return {name: state[name] for name in names}


def nbytes_together(files: Sequence[NetworkFile]) -> int:
    """Return the total bytes of networks; a base shared by compressed ones counts once."""
    bases = [file.base_nbytes for file in files]
    return sum(file.nbytes for file in files) + max(bases, default=0)


def save_network(
    path: Path,
    network: nn.Module,
    config: NetworkConfig,
    num_classes: int,
    provenance: Mapping[str, Any],
    adapters: Sequence[Adapter] = (),
) -> None:
    """Write a network, the adapters of a body, its architecture and provenance."""
    described = {**provenance, "network": config.described(), "num_classes": num_classes}
    if adapters:
        described["adapters"] = len(adapters)
        described["folded"] = folded_norms(network)
    save_state(path, network.state_dict() | adapters_state(adapters), described)


def save_compressed(
    path: Path,
    made: Compressed,
    config: NetworkConfig,
    num_classes: int,
    base: Path | None,
    compression: Compression,
    provenance: Mapping[str, Any],
) -> None:
    """Write a compressed network, which `open_network` reads back; it names the file of its base.

    A base in 8 bits is a file beside it, which is written if it is not there.
    """
    base_file = None
    if base is not None and made.base_bits:
        if made.base_bits == 8:
            base = _int8_file(path, base)
        base_file = os.path.relpath(base, path.parent)
    described = {
        "network": config.described(),
        "num_classes": num_classes,
        "compression": asdict(compression),
        "base_file": base_file,
    }
    made.save(path, {**provenance, **described})


def _int8_file(path: Path, base: Path) -> Path:
    """Return the file of a base in 8 bits in the folder of a compressed network's file, one for each base."""
    contents = sha256_of(base)[:8]
    place = path.with_name(f"{base.stem}-{contents}-int8.safetensors")
    if not place.is_file():
        file = load_network(base)
        own = {"made_by": "coin compress"}
        made = int8(file.network)
        save_compressed(place, made, file.config, file.num_classes, None, Compression(8, 0), own)
    return place


def open_network(path: Path) -> NetworkFile:
    """Open a network's file, whole or compressed; a FileError where it, or its base, is missing or no network's."""
    state = StateFile(path)
    provenance = state.provenance
    config, num_classes = _architecture(path, provenance)
    if "compressed" in provenance:
        base, hashed = _base_of(path, provenance, config, num_classes)
        made = Compressed.load(path, base, hashed)
        return NetworkFile(path, made, config, num_classes, provenance, made.adapters)
    names, adapters = split_adapters(state, int(provenance.get("adapters", 0)))
    return NetworkFile(path, StateFile(path, names), config, num_classes, provenance, adapters)


def _base_of(
    path: Path, provenance: Mapping[str, Any], config: NetworkConfig, num_classes: int
) -> tuple[nn.Module, str | None]:
    """Return the base that a compressed network's file names, with its fingerprint, or a new network without one."""
    named = provenance.get("base_file")
    if named is None:
        return build_network(config, num_classes), None
    # A run's folder links to the steps' files, beside which the base is; or both were copied to one folder.
    for place in (path.resolve().parent / named, path.parent / Path(named).name):
        if place.is_file():
            return _read_base(place.resolve(), sha256_of(place))
    raise FileError(
        f"found no file '{path.parent / named}', the base that '{path}' is a delta from; put it there"
    )


@lru_cache(maxsize=1)
def _read_base(place: Path, content: str) -> tuple[nn.Module, str]:
    """Return the network of a base's file, and its fingerprint: read once for all copies that are opened after another.

    Nobody changes it: a copy is made of it. `content` is the file's SHA-256.
    """
    network = open_network(place).network
    return network, fingerprint(network.state_dict())


def load_network(path: Path) -> NetworkFile:
    """Open a network as `open_network` does and read it; a StateError where tensors do not fit the architecture."""
    file = open_network(path)
    file.network  # noqa: B018 (read now, so that what is wrong with it shows)
    return file


def _architecture(path: Path, provenance: Mapping[str, Any]) -> tuple[NetworkConfig, int]:
    """Return the architecture and the number of classes that a file's metadata describe."""
    try:
        check_imported(provenance["network"]["name"], path)
        # Pretrained weights are about to be overwritten: never download them to read a file.
        config = NetworkConfig(**{**provenance["network"], "weights": None})
        return config, operator.index(provenance["num_classes"])
    except (KeyError, TypeError, AttributeError) as error:
        raise FileError(
            f"'{path}' holds no network ({error!r:.80}), expected metadata with name, image_size, options and "
            "num_classes; give an expert or a coded model"
        ) from error


def initial_network(
    config: NetworkConfig,
    num_classes: int,
    checkpoint: Path | None,
    *,
    seed: int = 0,
    wider: Path | None = None,
) -> nn.Module:
    """Build the shared initialisation of all experts of one class count, from a base checkpoint or from the seed.

    The checkpoint's head is kept if its class count agrees, or has the first rows of that in the file `wider`.
    """
    source = checkpoint or wider
    if source is None:
        return build_network(config, num_classes, seed=seed)
    return import_checkpoint(config, num_classes, source, seed=seed, wider=wider)


def import_checkpoint(
    config: NetworkConfig,
    num_classes: int,
    path: Path,
    *,
    seed: int | None = None,
    wider: Path | None = None,
) -> nn.Module:
    """Build a network that was trained elsewhere, from a state dict as safetensors or a checkpoint.

    Its head must have `num_classes` logits; with a seed it may have others, and a new one is drawn, or is the first
    rows of that in the file `wider`. Raises FileError for a file that cannot be used, StateError for another network.
    """
    network = build_network(replace(config, weights=None), num_classes)
    names = network.state_dict().keys()
    state = read_weights(path, names)
    if any(".lora_A." in name for name in state):
        raise FileError(
            f"'{path}' holds LoRA adapters apart; save what peft's merge_and_unload() returns"
        )
    buffers = {name for name, _ in network.named_buffers()}
    check_finite(state, f"the network in '{path}'", buffers)
    if seed is not None:
        wide_state = None if wider is None else read_weights(wider, names)
        state = with_own_head(network, state, seed=seed, wider=wide_state)
    fill_network(network, state, str(path))
    return network


def import_pretrained(config: NetworkConfig, place: str, network: nn.Module) -> nn.Module:
    """Return a network as a task's expert, with the weights of ``hf/PLACE``."""
    source = config.source
    if not isinstance(source, HuggingFace):
        raise ConfigurationError(
            f"found the expert '{place}' for the network '{config.name}', expected one of Hugging Face's (hf/…); give "
            "a file of weights, or change network.name"
        )
    source.load(network, local_place(place))
    return network
