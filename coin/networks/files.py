"""Networks as safetensors files with their architecture and provenance."""

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coin.errors import ConfigurationError, FileError
from coin.files.atomic import sha256_of
from coin.files.safetensors import StateFile, save_state
from coin.files.tensors import State, check_finite, fingerprint
from coin.networks.compressed import Base, Compressed, int8
from coin.networks.compression import Compression
from coin.networks.registry import NetworkConfig, build_network
from coin.networks.weights import check_layout, fill_network, read_weights, with_own_head


class Unpacked(dict[str, Tensor]):
    """The tensors of a compressed network, with the interface of `StateFile`."""

    def __init__(self, path: Path, state: State) -> None:
        super().__init__(state)
        self.path = path

    def select(self, names: Iterable[str]) -> "Unpacked":
        """Return these tensors alone, in this order."""
        return Unpacked(self.path, {name: self[name] for name in names})

    def shapes(self) -> dict[str, torch.Size]:
        """Return the tensors' shapes."""
        return {name: tensor.shape for name, tensor in self.items()}


@dataclass(frozen=True)
class NetworkFile:
    """A network's file: its tensors, read on access, and its metadata (`provenance`)."""

    state: StateFile | Unpacked
    config: NetworkConfig
    num_classes: int
    provenance: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors as stored; for a compressed network those of the delta only."""
        return int(self.provenance.get("nbytes") or sum(tensor.nbytes for tensor in self.state.values()))

    @property
    def base_nbytes(self) -> int:
        """The bytes of its base; 0 for a whole network."""
        return int(self.provenance.get("base_nbytes", 0))

    @cached_property
    def network(self) -> nn.Module:
        """The network, in eval mode; raises StateError if its tensors do not fit the architecture."""
        network = build_network(self.config, self.num_classes)
        fill_network(network, self.state, str(self.state.path))
        return network.eval()


def nbytes_together(files: Iterable[NetworkFile]) -> int:
    """Return the total bytes of networks; a base shared by compressed ones counts once."""
    every = list(files)
    return sum(file.nbytes for file in every) + max((file.base_nbytes for file in every), default=0)


def save_network(
    path: Path, network: nn.Module, config: NetworkConfig, num_classes: int, provenance: Mapping[str, Any]
) -> None:
    """Write a network's parameters and buffers with its architecture and its provenance.

    Raises StateError if a parameter is not finite or a buffer holds a NaN, FileError if it cannot be written.
    """
    # As a causal mask does.
    infinite = [name for name, buffer in network.named_buffers() if bool(torch.isinf(buffer).any())]
    described = {**provenance, "network": asdict(config), "num_classes": num_classes}
    save_state(path, network.state_dict(), described | ({"infinite": infinite} if infinite else {}), infinite)


def kept_base(path: Path, base: Path | None, compression: Compression) -> tuple[Path | None, Base]:
    """Return the base's file, to be recorded in a compressed network's file, and the base as stored.

    An 8-bit base is written to the folder of `path` unless it exists (`int8_path`). Raises ConfigurationError if the
    compression needs a base and there is none.
    """
    if not compression.base_bits:
        return None, None
    if base is None:
        raise ConfigurationError(f"found no base and base_bits={compression.base_bits}; name the base's file")
    file = load_network(base)
    if compression.base_bits != 8:
        return base, file.network
    kept_at, mark = int8_path(path, base), fingerprint(file.state)
    if not kept_at.is_file() or StateFile(kept_at).provenance.get("rounded_from") != mark:
        kept = int8(file.network)
        told = {"network": asdict(file.config), "num_classes": file.num_classes, "nbytes": kept.nbytes}
        kept.save(kept_at, {"made_by": "coin compress", "rounded_from": mark, **told})
    return kept_at, Compressed.load(kept_at, file.network)


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
    described = {
        "network": asdict(config),
        "num_classes": num_classes,
        "compression": asdict(compression),
        "base_file": base and os.path.relpath(base, path.parent),
        "nbytes": made.nbytes,
        "base_nbytes": made.base_nbytes,
    }
    made.save(path, {**provenance, **described})


def int8_path(path: Path, base: Path) -> Path:
    """Return the path of the 8-bit base of a compressed network's file: in the same folder, one per base."""
    return path.with_name(f"{base.stem}-{sha256_of(base)[:8]}-int8.safetensors")


def open_network(path: Path, above: Sequence[Path] = ()) -> NetworkFile:
    """Open a network's file, whole or compressed, and check its values and metadata.

    Args:
        path: The file.
        above: The compressed files that it is the base of.

    Raises:
        FileError: The file, or a compressed one's base, is missing or damaged, or does not hold a network.
        StateError: A tensor is not finite, or the tensors are not those of the architecture that the file names.
    """
    state = StateFile(path)
    if "compressed" in state.provenance:
        return _open_compressed(path, state.provenance, [*above, path.resolve()])
    infinite = state.provenance.get("infinite", [])
    check_finite(state, f"the network in '{path}'", infinite if isinstance(infinite, list) else ())
    config, num_classes = _described(path, state.provenance)
    with suppress(NotImplementedError), torch.device("meta"):  # raised by a constructor that looks at its weights
        described = build_network(config, num_classes).state_dict()
        check_layout({name: tensor.shape for name, tensor in described.items()}, state.shapes(), str(path))
    return NetworkFile(state, config, num_classes, state.provenance)


def _open_compressed(path: Path, provenance: dict[str, Any], above: Sequence[Path]) -> NetworkFile:
    """Unpack a compressed network, with its base if it has one."""
    config, num_classes = _described(path, provenance)
    if (named := provenance.get("base_file")) is None and provenance["compressed"].get("base"):
        raise FileError(f"'{path}' does not name the file of its base; read it with coin.Compressed.load and the base")
    if named is None:
        base = build_network(config, num_classes)
    else:
        places = [path.parent / named, path.parent / Path(named).name]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise FileError(f"found no file '{places[0]}', the base that '{path}' is a delta from; put it there")
        if found.resolve() in above:
            raise FileError(f"'{path}' is a delta from itself, by way of its base '{found}'; put the base there")
        base = open_network(found, above).network
    network = Compressed.load(path, base).network()
    check_finite(network.state_dict(), f"the network in '{path}'", {name for name, _ in network.named_buffers()})
    return NetworkFile(Unpacked(path, network.state_dict()), config, num_classes, provenance)


def load_network(path: Path) -> NetworkFile:
    """Open a network as `open_network` does and read it."""
    file = open_network(path)
    file.network  # noqa: B018 (read now, so that what is wrong with it shows)
    return file


def _described(path: Path, provenance: Mapping[str, Any]) -> tuple[NetworkConfig, int]:
    """Return the architecture and the number of classes in a file's metadata."""
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

    It comes from a base checkpoint, whose head is kept if its class count agrees, or from the seed. Given the file
    `wider` of an initialisation with more classes, only the head differs: it has the first rows of the wider head.
    """
    source = checkpoint or wider
    if source is None:
        return build_network(config, num_classes, seed=seed)
    return import_checkpoint(config, num_classes, source, seed=seed, fresh_head=True, wider=wider)


def import_checkpoint(
    config: NetworkConfig,
    num_classes: int,
    path: Path,
    *,
    seed: int = 0,
    fresh_head: bool = False,
    wider: Path | None = None,
) -> nn.Module:
    """Build a network that was trained elsewhere, from a state dict as safetensors or a checkpoint.

    Its head must have `num_classes` logits, unless `fresh_head` allows a new one, drawn from the seed or taken from the
    first rows of the head in the file `wider`.

    Raises FileError if the file cannot be used, StateError if it is of another architecture or not finite.
    """
    network = build_network(replace(config, weights=None), num_classes, seed=seed)
    names = network.state_dict().keys()
    state = read_weights(path, names)
    if any(".lora_A." in name for name in state):
        raise FileError(
            f"'{path}' holds LoRA adapters beside the weights, expected them merged; give the expert.safetensors that "
            "was written at the end of that training"
        )
    check_finite(state, f"the network in '{path}'", {name for name, _ in network.named_buffers()})
    if fresh_head:
        state = with_own_head(network, state, seed=seed, wider=None if wider is None else read_weights(wider, names))
    fill_network(network, state, str(path))
    return network
