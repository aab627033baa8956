"""Safetensors files of named tensors that say where they came from, read whole or a tensor at a time."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coin.core.versions import versions
from coin.errors import FileError
from coin.files.atomic import atomic_path, how_to_redo
from coin.files.tensors import State, check_finite

_METADATA_KEY = "coin"
_MAPPED = 2**20  # after so many bytes of tensors the file is mapped anew, so that what was read of it can go


def save_state(path: Path, state: State, provenance: Mapping[str, Any], infinite: Collection[str] = ()) -> None:
    """Write named tensors and their provenance, one JSON value to which `versions()` is added under ``versions``.

    Raises StateError where a tensor is not finite, but for infinities in those named in `infinite`.
    """
    check_finite(state, f"the state for '{path}'", infinite)
    metadata = {_METADATA_KEY: json.dumps({**provenance, "versions": versions()}, sort_keys=True)}
    tensors: dict[str, Tensor] = {}
    written: set[int] = set()
    for key, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        # safetensors takes no two tensors of one storage, as tied parameters are, nor a part of one.
        shared = place in written or plain.nbytes != plain.untyped_storage().nbytes()
        tensors[key] = plain.clone() if shared else plain
        written.add(place)
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


class StateFile(Mapping[str, Tensor]):
    """The named tensors of a safetensors file that `save_state` wrote, read on access.

    A tensor is the file's own memory, mapped: its values are read when something computes with them, and are let go
    with the tensor. It must not be written to. With `names` there are these tensors alone, in this order. Raises
    FileError where the file is missing, damaged or not written by ``coin``, and where it has changed since.
    """

    def __init__(self, path: Path, names: Iterable[str] | None = None) -> None:
        self.path = path
        self._mapped = 0
        self._version: tuple[int, ...] | None = None
        self._file: Any = self._opened()
        self.provenance = self._provenance()
        self._names = dict.fromkeys(self._file.keys() if names is None else names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        self._file = self._file or self._opened()
        tensor: Tensor = self._file.get_tensor(name)
        self._mapped += tensor.nbytes
        if self._mapped > _MAPPED:
            self._file, self._mapped = None, 0  # the tensor itself keeps what it needs
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _opened(self) -> Any:
        if not self.path.is_file():
            raise FileError(f"found no file '{self.path}', expected safetensors; check the path or make it first")
        try:
            file = safe_open(str(self.path), framework="pt")
            found = self.path.stat()
        except (SafetensorError, OSError) as error:
            if self.path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
                told = f"found '{self.path}', a checkpoint, expected a file of coin's (.safetensors)"
                advice = "import it by coin run with expert: {checkpoints: {TASK: FILE}}"
                raise FileError(f"{told}; {advice}, which writes experts/TASK/expert.safetensors") from error
            told = f"'{self.path}' is not a whole safetensors file ({error})"
            raise FileError(f"{told}; {how_to_redo(self.path)}") from error
        version = (found.st_ino, found.st_size, found.st_mtime_ns)
        if self._version not in (None, version):
            raise FileError(f"'{self.path}' has changed while it was read; run the command again, alone on its files")
        self._version = version
        return file

    def _provenance(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._file.metadata()[_METADATA_KEY]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            told = f"'{self.path}' does not say what made it (no '{_METADATA_KEY}' metadata); make it with coin fit"
            raise FileError(f"{told}, or import the weights by expert.checkpoints of coin run") from error


def load_provenance(path: Path) -> dict[str, Any]:
    """Return the JSON value that `save_state` wrote with the tensors; raises as `StateFile`."""
    return StateFile(path).provenance


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the provenance of a file that `save_state` wrote; raises as `StateFile`."""
    file = StateFile(path)
    return dict(file), file.provenance
