"""A coded system as one safetensors file: its code, its coded models and its fitted decoders, without the experts."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coin.coding import Code, Decoder
from coin.coding.decoder_state import decoders_state, restore_decoders
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
        code: The code; `names`, the experts' tasks.
        classes: How many classes every expert has, None if the system did not know.
        decoders: All fitted decoders.
        coded: Every coded model's tensors, parameters and buffers; empty if they are in files of their own.
        coded_files: These files; `experts`, the fingerprints of the experts' states.
        provenance: The rest of the metadata.
    """

    path: Path
    code: Code
    names: tuple[str, ...]
    classes: list[int] | None
    decoders: list[Decoder]
    coded: list[State]
    coded_files: list[Path]
    experts: list[str]
    provenance: dict[str, Any]

    def check_experts(self, experts: Sequence[nn.Module]) -> None:
        """Raise StateError unless these are the experts that the system was made of."""
        found = [fingerprint(expert.state_dict()) for expert in experts]
        if other := [place for place, pair in enumerate(zip(found, self.experts, strict=False)) if len({*pair}) > 1]:
            raise StateError(
                f"expert {other[0]} is not the one that '{self.path}' was saved with; give those experts, or make the "
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
    """Write a coded system, for `load_system`.

    Args:
        path: The file.
        code: The code.
        names: The experts' tasks.
        classes: How many classes every expert has, if known.
        decoders: The fitted decoders.
        coded: The coded models, or their files, which are then named by their path from the new one and SHA-256.
        experts: The fingerprints of the experts' states.
        told: What else the metadata shall say.
    """
    fitted, rests = decoders_state(decoders)
    state: dict[str, Tensor] = {f"decoder.{name}": tensor for name, tensor in fitted.items()}
    files = []
    for row, each in enumerate(coded):
        if isinstance(each, Path):
            # A run's steps write to folders of their own, in which all lies as beside the experts in the end.
            is_of_run = each.parent.name == "coded" and path.parent.name == "systems"
            place = f"../coded/{each.name}" if is_of_run else os.path.relpath(each, path.parent)
            files.append({"path": place, "sha256": sha256_of(each)})
        else:
            state |= {f"coded.{row}.{name}": tensor for name, tensor in all_tensors(each).items()}
    provenance = {
        "what": _SYSTEM,
        "code": code.matrix.tolist(),
        "names": list(names),
        "classes": None if classes is None else list(classes),
        "decoders": rests,
        "coded_files": files,
        "experts": list(experts),
        **(told or {}),
    }
    infinite = [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.isinf().any()]
    save_state(path, state, provenance, infinite)


def load_system(path: Path) -> SystemFile:
    """Read what `save_system` wrote.

    Raises FileError where the file, or that of a coded model, is missing, damaged, changed or holds something else,
    and StateError where the decoders do not fit the code.
    """
    state, told = load_state(path)
    if told.get("what") != _SYSTEM:
        raise FileError(f"'{path}' holds no coded system, expected a file that Coded.save wrote")
    code, files = Code(told["code"]), []
    for each in told["coded_files"]:
        # By its name: the folder may be a link to where a step has written.
        files.append(Path(os.path.normpath(path.parent / each["path"])))
        if not files[-1].is_file() or sha256_of(files[-1]) != each["sha256"]:
            raise FileError(
                f"'{files[-1]}' is not the coded model that '{path}' was made with; run the evaluation again"
            )
    return SystemFile(
        path=path,
        code=code,
        names=tuple(told["names"]),
        classes=told["classes"],
        decoders=restore_decoders(_below("decoder.", state), told["decoders"], code),
        coded=[] if files else [_below(f"coded.{row}.", state) for row in range(code.num_coded)],
        coded_files=files,
        experts=told["experts"],
        provenance=told,
    )


def all_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters and buffers by name, tied ones once, non-persistent ones included."""
    parameters, buffers = tensors_of(network)
    return {**parameters, **buffers}


def _below(prefix: str, state: State) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
