"""The files of a coded system: its code and fitted decoders in one, each coded model in its own."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coin.coding import Code, Decoder, DecoderKind, Promise
from coin.core.devices import device_of
from coin.errors import ConfigurationError, FileError, StateError
from coin.files.atomic import sha256_of
from coin.files.safetensors import StateFile, load_state, save_state
from coin.files.tensors import check_layout, fingerprint
from coin.merging.experts import fill
from coin.networks import Adapted, Compressed
from coin.networks.calling import clone
from coin.networks.delta import Rounded
from coin.networks.files import open_network
from coin.networks.heads import of_one_width
from coin.networks.kept import kept_parameters, unpacked
from coin.networks.weights import stored, tensors_of

_SYSTEM = "coded system"


@dataclass
class SystemFile:
    """What the file of a coded system holds.

    Args:
        code: The code.
        names: The experts' tasks.
        classes: How many classes every expert has, if known.
        decoders: All fitted decoders, of several kinds and erasures.
        experts: The fingerprints of the experts' states.
        coded_files: The coded models' files, by row; kept by their hashes, and their places beside this file, or in
            ``../coded`` of a run's folder.
        expert_files: Where the experts' files were; in a run's folder they are in ``experts/``.
    """

    code: Code
    names: Sequence[str]
    classes: list[int] | None
    decoders: Sequence[Decoder]
    experts: Sequence[str]
    coded_files: Sequence[Path]
    expert_files: Sequence[Path] = ()

    def save(self, path: Path) -> None:
        """Write the file."""
        tensors: dict[str, Tensor] = {}
        decoders: list[dict[str, Any]] = []
        for place, decoder in enumerate(self.decoders):
            for name, tensor in decoder.tensors.items():
                tensors[f"decoder.{place}.{name}"] = tensor
            promises = {str(expert): asdict(each) for expert, each in decoder.promises.items()}
            told = {"kind": decoder.kind, "erased": list(decoder.erased), "promises": promises}
            decoders.append({**told, "tensors": list(decoder.tensors)})
        coded_files = []
        for file in self.coded_files:
            paths = [f"../coded/{file.name}", os.path.relpath(file, path.parent)]
            coded_files.append({"paths": paths, "sha256": sha256_of(file)})
        provenance = {
            "what": _SYSTEM,
            "code": self.code.matrix.tolist(),
            "names": list(self.names),
            "classes": self.classes,
            "decoders": decoders,
            "experts": list(self.experts),
            "coded_files": coded_files,
            "expert_files": [os.path.relpath(file, path.parent) for file in self.expert_files],
        }
        save_state(path, tensors, provenance)

    @classmethod
    def load(cls, path: Path) -> "SystemFile":
        """Read what `save` wrote; FileError where it, or a coded model's file, is not whole."""
        tensors, told = load_state(path)
        if told.get("what") != _SYSTEM:
            raise FileError(
                f"'{path}' holds no coded system, expected a file that Coded.save wrote"
            )
        code = Code(told["code"])
        decoders = []
        for place, each in enumerate(told["decoders"]):
            own = {name: tensors[f"decoder.{place}.{name}"] for name in each["tensors"]}
            decoder = Decoder(DecoderKind(each["kind"]), code, each["erased"], own)
            for expert, promise in each["promises"].items():
                decoder.promises[int(expert)] = Promise(**promise)
            decoders.append(decoder)
        return cls(
            code=code,
            names=told["names"],
            classes=told["classes"],
            decoders=decoders,
            experts=told["experts"],
            coded_files=[_found(path, **each) for each in told["coded_files"]],
            expert_files=[_beside(path, place) for place in told["expert_files"]],
        )

    def coded_models(self, experts: Sequence[nn.Module]) -> list[nn.Module | Compressed]:
        """Return the coded models, of these experts; StateError where they are others, or tensors do not fit."""
        if len(experts) != len(self.experts):
            raise ConfigurationError(
                f"found {len(experts)} experts, expected the {len(self.experts)} that the system was saved with"
            )
        for place, expert in enumerate(experts):
            if fingerprint(expert.state_dict()) != self.experts[place]:
                raise StateError(
                    f"expert {place} is not the one that the system was saved with; give those experts"
                )
        like = of_one_width(experts)[0]
        return [load_coded(path, like) for path in self.coded_files]


def _found(path: Path, paths: Sequence[str], sha256: str) -> Path:
    """Return the first of the places relative to a system's file that has the coded model with this hash."""
    places = [_beside(path, place) for place in paths]
    for place in places:
        if place.is_file() and sha256_of(place) == sha256:
            return place
    raise FileError(
        f"'{places[0]}' is not the coded model that '{path}' names; put it there, or run the evaluation again"
    )


def _beside(path: Path, place: str) -> Path:
    """Return the path that is told relative to a file's folder, not through links."""
    return Path(os.path.normpath(path.parent / place))


def save_coded(path: Path, networks: Iterable[nn.Module]) -> list[Path]:
    """Write coded models in memory to files beside a system's, and return these.

    A body is written as it runs, packed; another network with all its parameters and buffers.
    """
    files = []
    for row, network in enumerate(networks):
        file = path.with_name(f"{path.stem}.row-{row}.safetensors")
        if isinstance(network, Adapted):
            _compressed(network).save(file)
        else:
            save_state(file, _all_tensors(network), {})
        files.append(file)
    return files


def _compressed(adapted: Adapted) -> Compressed:
    """Return a body as it is stored: matrices in few bits, other tensors whole, and the adapters."""
    whole = unpacked(adapted.body)
    others = stored(whole)
    rounded = {}
    for name, _, kept in kept_parameters(adapted.body):
        if kept.rows is not None and others.pop(name, None) is not None:
            rounded[name] = Rounded(kept.rows, kept.bits)
    return Compressed(whole, 0, 0, rounded, others, None, adapted.adapters)


def load_coded(path: Path, like: nn.Module) -> nn.Module | Compressed:
    """Return the coded model in a file of a run or of `save_coded`, the latter of another network's architecture."""
    file = StateFile(path)
    if "network" in file.provenance:
        return open_network(path).kept
    if "compressed" in file.provenance:
        made = Compressed.load(path, like)
        return Adapted(made.packed(), made.adapters).to(device_of(like))
    network = clone(like).eval()
    state = dict(file)
    check_layout(_all_tensors(network), state, str(path))
    fill(network, state)
    return network


def _all_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters and buffers by name, tied ones once, non-persistent ones included."""
    parameters, buffers = tensors_of(network)
    return {**parameters, **buffers}
