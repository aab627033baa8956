"""A coded system as one safetensors file: its code, its coded models and its fitted decoders, without the experts."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coin.coding import Code, Decoder, DecoderConfig, Promise, make_decoder
from coin.core.devices import device_of
from coin.errors import FileError, StateError
from coin.files.atomic import sha256_of
from coin.files.safetensors import load_state, save_state
from coin.files.tensors import State
from coin.networks import Adapted, Adapter
from coin.networks.calling import clone
from coin.networks.kept import Change, Kept, keep, kept_parameters, tied_names
from coin.networks.weights import tensors_of

_SYSTEM = "coded system"
_KEPT = r"body\.(?:(?P<layer>.+)\.)?kept_parameter_(?P<parameter>[^.]+)"  # what a body keeps in place of a parameter
_OF_BODY = ("original", "codes", "codes_first", "codes_scale")  # of that, what belongs to no expert


@dataclass(frozen=True)
class Body:
    """What a file tells of an `Adapted` beside its tensors: its experts, and the bits of its packed matrices."""

    num_experts: int
    bits: Mapping[str, int]  # by the parameters' names

    @classmethod
    def of(cls, network: nn.Module) -> "Body | None":
        """Return what is told of a network, if it is one."""
        if not isinstance(network, Adapted):
            return None
        bits = {name: kept.bits for name, _, kept in kept_parameters(network.body) if kept.bits}
        return cls(network.num_experts, bits)

    def network(self, like: nn.Module, state: State) -> Adapted:
        """Return a body of an expert's architecture that has tensors like these, not yet their values."""
        body = clone(like).eval()
        tied = tied_names(body)
        parts: dict[str, dict[str, Tensor]] = {}  # by the parameter's name
        for key, tensor in state.items():
            if found := re.fullmatch(rf"{_KEPT}\.(?P<part>\w+)", key):
                name = ".".join(filter(None, (found["layer"], found["parameter"])))
                parts.setdefault(name, {})[found["part"]] = tensor
        for name, held in parts.items():
            if "codes" in held:
                kept = Kept(body.get_parameter(name), held["codes"], held["codes_scale"], self.bits[name])
                keep(body, tied[name], kept)
        adapters = []
        for expert in range(self.num_experts):
            own = {
                name: Change.stored({part: tensor[expert] for part, tensor in held.items() if part not in _OF_BODY})
                for name, held in parts.items()
            }
            adapters.append(Adapter(own))
        return Adapted(body, adapters).to(device_of(like))


@dataclass
class SystemFile:
    """What the file of a coded system holds."""

    code: Code
    names: Sequence[str]  # the experts' tasks
    classes: list[int] | None  # how many classes every expert has, if known
    decoders: Sequence[Decoder]  # all fitted decoders, of several configurations and erasures
    experts: Sequence[str]  # the fingerprints of the experts' states
    coded: Sequence[State] = ()  # every coded model's parameters and buffers; none if they are in files of their own
    bodies: Sequence[Body | None] = ()  # of these, what tells that one is an `Adapted`
    coded_files: Sequence[Path] = ()  # these, named by SHA-256 and their path in a seed's folder, ``../coded/NAME``
    told: Mapping[str, Any] = field(default_factory=dict)  # further metadata

    def save(self, path: Path) -> None:
        """Write the file."""
        state: dict[str, Tensor] = {}
        for row, own in enumerate(self.coded):
            state |= {f"coded.{row}.{name}": tensor for name, tensor in own.items()}
        decoders = []
        for place, decoder in enumerate(self.decoders):
            state |= {f"decoder.{place}.{name}": tensor for name, tensor in decoder.state_dict().items()}
            promises = {str(expert): asdict(promise) for expert, promise in decoder.promises.items()}
            decoders.append({"name": decoder.config.name, "erased": list(decoder.erased), "promises": promises})
        provenance = {
            **self.told,
            "what": _SYSTEM,
            "code": self.code.matrix.tolist(),
            "names": list(self.names),
            "classes": self.classes,
            "decoders": decoders,
            "experts": list(self.experts),
            "bodies": [body and asdict(body) for body in self.bodies],
            "coded_files": [{"path": f"../coded/{each.name}", "sha256": sha256_of(each)} for each in self.coded_files],
        }
        infinite = [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.isinf().any()]
        save_state(path, state, provenance, infinite)

    @classmethod
    def load(cls, path: Path) -> "SystemFile":
        """Read what `save` wrote; FileError where it, or a coded model's file, is not whole, StateError for tensors."""
        state, told = load_state(path)
        if told.get("what") != _SYSTEM:
            raise FileError(f"'{path}' holds no coded system, expected a file that Coded.save wrote")
        code, files, decoders = Code(told["code"]), [], []
        for each in told["coded_files"]:
            files.append(Path(os.path.normpath(path.parent / each["path"])))  # not through links
            if not files[-1].is_file() or sha256_of(files[-1]) != each["sha256"]:
                raise FileError(f"'{files[-1]}' is not the coded model that '{path}' names; run the evaluation again")
        for place, each in enumerate(told["decoders"]):
            decoders.append(make_decoder(DecoderConfig.named(each["name"]), code, each["erased"]))
            try:
                decoders[-1].load_state_dict(_below(f"decoder.{place}.", state))
            except RuntimeError as error:
                raise StateError(f"'{path}' holds other tensors than its decoders have ({error})") from error
            decoders[-1].promises = {int(expert): Promise(**promise) for expert, promise in each["promises"].items()}
        coded = [] if files else [_below(f"coded.{row}.", state) for row in range(code.num_coded)]
        bodies = [body and Body(**body) for body in told["bodies"]]
        return cls(code, told["names"], told["classes"], decoders, told["experts"], coded, bodies, files, told)


def all_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters and buffers by name, tied ones once, non-persistent ones included."""
    parameters, buffers = tensors_of(network)
    return {**parameters, **buffers}


def _below(prefix: str, state: State) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
