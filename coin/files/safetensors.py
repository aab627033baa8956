"""Safetensors files of named tensors that say where they came from, read whole or a tensor at a time."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coin.core.versions import versions
from coin.errors import FileError
from coin.files.atomic import atomic_path, how_to_redo
from coin.files.tensors import State, check_tensors

_METADATA_KEY = "coin"
_CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin")


def save_state(path: Path, state: State, provenance: Mapping[str, Any]) -> None:
    """Write named tensors and their provenance, one JSON value to which `versions()` is added under ``versions``."""
    metadata = {_METADATA_KEY: json.dumps({**provenance, "versions": versions()}, sort_keys=True)}
    check_tensors(state)
    tensors = {}
    for name, tensor in state.items():
        # A copy: safetensors takes no two tensors of one storage, as tied parameters are, nor a part of one.
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


class StateFile(Mapping[str, Tensor]):
    """The named tensors of a safetensors file that `save_state` wrote, read on access.

    A tensor is the file's own memory, mapped: its values are read when something computes with them. It must not be
    written to. With `names` there are these tensors alone, in this order. Raises FileError where the file is missing,
    damaged or not written by ``coin``.
    """

    def __init__(self, path: Path, names: Iterable[str] | None = None) -> None:
        self.path = path
        self._file = _opened(path)
        self.provenance = _provenance(path, self._file.metadata())
        self._names = dict.fromkeys(self._file.keys() if names is None else names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _opened(path: Path) -> Any:
    """Open a safetensors file, or say in one line why it cannot be."""
    if not path.is_file():
        raise FileError(
            f"found no file '{path}', expected safetensors; check the path or make it first"
        )
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        if path.suffix in _CHECKPOINTS:
            raise FileError(
                f"found '{path}', a checkpoint, expected a file of coin's (.safetensors); import it by coin run with "
                "expert: {checkpoints: {TASK: FILE}}, which writes experts/TASK/expert.safetensors"
            ) from error
        raise FileError(
            f"'{path}' is not a whole safetensors file ({error}); {how_to_redo(path)}"
        ) from error


def _provenance(path: Path, metadata: Any) -> dict[str, Any]:
    """Return the JSON value among a file's metadata."""
    try:
        return dict(json.loads(metadata[_METADATA_KEY]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FileError(
            f"'{path}' does not say what made it (no '{_METADATA_KEY}' metadata); make it with coin fit, or import the "
            "weights by expert.checkpoints of coin run"
        ) from error


def load_provenance(path: Path) -> dict[str, Any]:
    """Return the JSON value that `save_state` wrote with the tensors; raises as `StateFile`."""
    return StateFile(path).provenance


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the provenance of a file that `save_state` wrote; raises as `StateFile`."""
    file = StateFile(path)
    return dict(file), file.provenance
