"""A coded system as one safetensors file: its code, its coded models and its fitted decoders, without the experts."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coin.coding import Code, Decoder, DecoderKind, Promise
from coin.core.devices import device_of
from coin.errors import FileError
from coin.files.atomic import sha256_of
from coin.files.safetensors import load_state, save_state
from coin.files.tensors import State
from coin.networks import Adapted, Adapter
from coin.networks.batchnorm import folded_norms, mark_folded
from coin.networks.calling import clone
from coin.networks.delta import rounded_in
from coin.networks.kept import Change, Kept, keep, kept_parameters, tied_names
from coin.networks.weights import tensors_of

_SYSTEM = "coded system"
_KEPT = re.compile(r"body\.(?P<layer>.+\.)?kept_parameter_(?P<parameter>[^.]+)\.(?P<part>\w+)")
"""The names of the tensors that a body keeps in place of a parameter."""
# Those parts that belong to no expert.
_OF_BODY = ("original", "rows")


@dataclass(frozen=True)
class Body:
    """The description of an `Adapted` beside its tensors: its number of experts, and the bits of packed matrices."""

    num_experts: int
    bits: Mapping[str, int]  # by the parameters' names
    folded: Mapping[str, str]  # BatchNorms, and the weights that they are folded into

    @classmethod
    def of(cls, network: nn.Module) -> "Body | None":
        """Return the description of a network; None if it is not an `Adapted`."""
        if not isinstance(network, Adapted):
            return None
        bits = {name: kept.bits for name, _, kept in kept_parameters(network.body) if kept.bits}
        return cls(network.num_experts, bits, folded_norms(network.body))

    def network(self, like: nn.Module, state: State) -> Adapted:
        """Return a body of an expert's architecture that has tensors like these, not yet their values."""
        body = clone(like).eval()
        found = {
            name: state[f"body.{name}"] for name in body.state_dict() if f"body.{name}" in state
        }
        body.load_state_dict(found, strict=False)  # what is kept in parameters' places comes later
        mark_folded(body, self.folded)
        tied = tied_names(body)
        changes: list[dict[str, Change]] = [{} for _ in range(self.num_experts)]
        for name, parts in _kept_parts(state).items():
            if "rows" in parts:
                rounded = rounded_in(parts["rows"], self.bits[name])
                keep(body, tied[name], Kept(body.get_parameter(name), rounded))
            # Each [N, …].
            of_experts = {part: tensor for part, tensor in parts.items() if part not in _OF_BODY}
            for expert, own in enumerate(changes):
                own[name] = Change(**{part: each[expert] for part, each in of_experts.items()})
        adapters = [Adapter(own) for own in changes]
        return Adapted(body, adapters).to(device_of(like))


def _kept_parts(state: State) -> dict[str, dict[str, Tensor]]:
    """Return the tensors that a body keeps in place of parameters, by these parameters' names."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEPT.fullmatch(key)
        if match is not None:
            name = (match["layer"] or "") + match["parameter"]
            found.setdefault(name, {})[match["part"]] = tensor
    return found


@dataclass
class SystemFile:
    """What the file of a coded system holds."""

    code: Code
    names: Sequence[str]  # the experts' tasks
    classes: list[int] | None  # how many classes every expert has, if known
    decoders: Sequence[Decoder]  # all fitted decoders, of several kinds and erasures
    experts: Sequence[str]  # the fingerprints of the experts' states
    # Every coded model's parameters and buffers; none if they are in files of their own.
    coded: Sequence[State] = ()
    bodies: Sequence[Body | None] = ()  # of each coded model, its description if it is an `Adapted`
    # The coded models' own files, kept as SHA-256, path ``../coded/NAME`` of a run, and where they were.
    coded_files: Sequence[Path] = ()
    expert_files: Sequence[Path] = ()  # where they were; in a run's folder they are in ``experts/``
    told: Mapping[str, Any] = field(default_factory=dict)  # further metadata

    def save(self, path: Path) -> None:
        """Write the file."""
        state: dict[str, Tensor] = {}
        for row, own in enumerate(self.coded):
            for name, tensor in own.items():
                state[f"coded.{row}.{name}"] = tensor
        decoders: list[dict[str, Any]] = []
        for place, decoder in enumerate(self.decoders):
            for name, tensor in decoder.tensors.items():
                state[f"decoder.{place}.{name}"] = tensor
            promises = {
                str(expert): asdict(promise) for expert, promise in decoder.promises.items()
            }
            decoders.append(
                {
                    "kind": decoder.kind,
                    "erased": list(decoder.erased),
                    "promises": promises,
                }
            )
        coded_files = [
            {
                "paths": [f"../coded/{file.name}", os.path.relpath(file, path.parent)],
                "sha256": sha256_of(file),
            }
            for file in self.coded_files
        ]
        provenance = {
            **self.told,
            "what": _SYSTEM,
            "code": self.code.matrix.tolist(),
            "names": list(self.names),
            "classes": self.classes,
            "decoders": decoders,
            "experts": list(self.experts),
            "bodies": [None if body is None else asdict(body) for body in self.bodies],
            "coded_files": coded_files,
            "expert_files": [os.path.relpath(file, path.parent) for file in self.expert_files],
        }
        save_state(path, state, provenance)

    @classmethod
    def load(cls, path: Path) -> "SystemFile":
        """Read what `save` wrote; FileError where it, or a coded model's file, is not whole, StateError for tensors."""
        state, told = load_state(path)
        if told.get("what") != _SYSTEM:
            raise FileError(
                f"'{path}' holds no coded system, expected a file that Coded.save wrote"
            )
        code = Code(told["code"])
        files = []
        for each in told["coded_files"]:
            places = [_beside(path, place) for place in each["paths"]]
            found = [
                place for place in places if place.is_file() and sha256_of(place) == each["sha256"]
            ]
            if not found:
                raise FileError(
                    f"'{places[0]}' is not the coded model that '{path}' names; run the evaluation again"
                )
            files.append(found[0])
        decoders = []
        for place, each in enumerate(told["decoders"]):
            own = _below(f"decoder.{place}.", state)
            decoder = Decoder(DecoderKind(each["kind"]), code, each["erased"], own)
            for expert, promise in each["promises"].items():
                decoder.promises[int(expert)] = Promise(**promise)
            decoders.append(decoder)
        coded = []
        if not files:
            coded = [_below(f"coded.{row}.", state) for row in range(code.num_coded)]
        bodies = [None if body is None else Body(**body) for body in told["bodies"]]
        return cls(
            code=code,
            names=told["names"],
            classes=told["classes"],
            decoders=decoders,
            experts=told["experts"],
            coded=coded,
            bodies=bodies,
            coded_files=files,
            expert_files=[_beside(path, place) for place in told["expert_files"]],
            told=told,
        )


def _beside(path: Path, place: str) -> Path:
    """Return the path that is told relative to a file's folder, not through links."""
    return Path(os.path.normpath(path.parent / place))


def all_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters and buffers by name, tied ones once, non-persistent ones included."""
    parameters, buffers = tensors_of(network)
    return {**parameters, **buffers}


def _below(prefix: str, state: State) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, under the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
