"""A coded system as one safetensors file: its code, its coded models and its fitted decoders, without the experts."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coin.coding import Code, Decoder, DecoderConfig, Promise, make_decoder
from coin.errors import FileError, StateError
from coin.files.atomic import sha256_of
from coin.files.safetensors import load_state, save_state
from coin.files.tensors import State, fingerprint
from coin.networks.experts import tensors_of

_SYSTEM = "coded system"


@dataclass
class SystemFile:
    """What the file of a coded system holds.

    Attributes:
        path: The file.
        code: The code.
        names: The experts' tasks.
        classes: How many classes every expert has, if known.
        decoders: All fitted decoders, of several configurations and erasures.
        coded: Every coded model's tensors, parameters and buffers; empty if they are in files of their own.
        coded_files: These files.
        experts: The fingerprints of the experts' states.
    """

    path: Path
    code: Code
    names: tuple[str, ...]
    classes: list[int] | None
    decoders: list[Decoder]
    coded: Sequence[State]
    coded_files: list[Path]
    experts: list[str]

    def check_experts(self, experts: Sequence[nn.Module]) -> None:
        """Raise StateError unless these are the experts that the system was made of."""
        for place, (expert, expected) in enumerate(zip(experts, self.experts, strict=False)):
            if fingerprint(expert.state_dict()) != expected:
                raise StateError(
                    f"expert {place} is not the one that '{self.path}' was saved with; give those experts, or make the "
                    "system anew"
                )


def save_system(
    path: Path,
    code: Code,
    names: Sequence[str],
    classes: Sequence[int] | None,
    decoders: Sequence[Decoder],
    coded: Sequence[nn.Module | Path],
    experts: Sequence[str],
    told: Mapping[str, Any] | None = None,
) -> None:
    """Write a coded system, for `load_system`; its parts are those of `SystemFile`.

    Coded models given as files are named, by their SHA-256 and path in a run, ``../coded/NAME``. The metadata says what
    is `told` too.
    """
    state: dict[str, Tensor] = {}
    files = []
    for row, each in enumerate(coded):
        if isinstance(each, Path):
            files.append({"path": f"../coded/{each.name}", "sha256": sha256_of(each)})  # as in a seed's folder
        else:
            state |= {f"coded.{row}.{name}": tensor for name, tensor in all_tensors(each).items()}
    rests = []
    for index, decoder in enumerate(decoders):
        state |= {f"decoder.{index}.{name}": tensor for name, tensor in decoder.state_dict().items()}
        promises = {str(expert): asdict(promise) for expert, promise in decoder.promises.items()}
        rests.append({"name": decoder.config.name, "erased": list(decoder.erased), "promises": promises})
    provenance = {
        "what": _SYSTEM,
        "code": code.matrix.tolist(),
        "names": list(names),
        "classes": None if classes is None else list(classes),
        "decoders": rests,
        "coded_files": files,
        "experts": list(experts),
    }
    infinite = [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.isinf().any()]
    save_state(path, state, {**provenance, **(told or {})}, infinite)


def load_system(path: Path) -> SystemFile:
    """Read what `save_system` wrote.

    Raises FileError where the file, or that of a coded model, is missing, damaged, changed or holds something else,
    and StateError where a decoder's tensors are not whole.
    """
    state, told = load_state(path)
    if told.get("what") != _SYSTEM:
        raise FileError(f"'{path}' holds no coded system, expected a file that Coded.save wrote")
    code, files, decoders = Code(told["code"]), [], []
    for each in told["coded_files"]:
        files.append(Path(os.path.normpath(path.parent / each["path"])))  # not through links
        if not files[-1].is_file() or sha256_of(files[-1]) != each["sha256"]:
            raise FileError(f"'{files[-1]}' is not the coded model that '{path}' names; run the evaluation again")
    for place, rest in enumerate(told["decoders"]):
        decoders.append(make_decoder(DecoderConfig.named(rest["name"]), code, rest["erased"]))
        try:
            decoders[-1].load_state_dict(_below(f"decoder.{place}.", state))
        except RuntimeError as error:
            raise StateError(f"'{path}' holds other tensors than its decoders have ({error}); make it anew") from error
        decoders[-1].promises = {int(expert): Promise(**each) for expert, each in rest["promises"].items()}
    coded = [] if files else [_below(f"coded.{row}.", state) for row in range(code.num_coded)]
    return SystemFile(path, code, tuple(told["names"]), told["classes"], decoders, coded, files, told["experts"])


def all_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters and buffers by name, tied ones once, non-persistent ones included."""
    parameters, buffers = tensors_of(network)
    return {**parameters, **buffers}


def _below(prefix: str, state: State) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
