"""Safetensors files of named tensors that say where they came from, read whole or a tensor at a time."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coin.errors import FileError
from coin.files.atomic import atomic_path
from coin.files.tensors import State, check_finite
from coin.versions import versions

_METADATA_KEY = "coin"
_MAPPED = 2**20
"""After so many bytes of tensors, in bytes, the file is mapped anew, so that what was read of it can go."""


def save_state(path: Path, state: State, provenance: Mapping[str, Any], infinite: Collection[str] = ()) -> None:
    """Write named tensors and one JSON value that says what made them.

    Args:
        path: The file, written under a temporary name and renamed.
        state: Tensors of any shape and type; they are copied to contiguous CPU memory.
        provenance: Anything that JSON holds; `versions()` is added under ``versions``.
        infinite: Names of tensors that may hold infinities.

    Raises:
        StateError: A tensor is not finite: such a file is never written.
        FileError: The file cannot be written.
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
            raise FileError(
                f"cannot write '{path}': {error}; free the space or choose a folder you can write to"
            ) from error


def load_provenance(path: Path) -> dict[str, Any]:
    """Return the JSON value that `save_state` wrote with a file, without reading its tensors.

    Raises:
        FileError: The file is missing, damaged, or was not written by ``coin``.
    """
    with _opened(path) as file:
        return _provenance(file.metadata(), path)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the provenance of a file that `save_state` wrote.

    Raises:
        FileError: The file is missing, damaged, or was not written by ``coin``.
    """
    with _opened(path) as file:
        provenance = _provenance(file.metadata(), path)
        return {key: file.get_tensor(key) for key in file.keys()}, provenance  # noqa: SIM118 (not a dict)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise _missing(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"'{path}' is not a whole safetensors file ({error}); make it again") from error


def _missing(path: Path) -> FileError:
    """Return the error for a file that is not there."""
    return FileError(f"found no file '{path}', expected a safetensors file; check the path or make it first")


def _provenance(metadata: Mapping[str, str] | None, path: Path) -> dict[str, Any]:
    """Return the JSON value in a file's metadata.

    Raises:
        FileError: There is none: the file was not written by ``coin``.
    """
    try:
        value = json.loads((metadata or {})[_METADATA_KEY])
    except (KeyError, ValueError, RecursionError) as error:
        raise FileError(
            f"'{path}' does not say what made it (no '{_METADATA_KEY}' metadata); make it with coin"
        ) from error
    if not isinstance(value, dict):
        raise FileError(f"'{path}' has '{_METADATA_KEY}' metadata of type {type(value).__name__}, expected an object")
    return value


class StateFile(Mapping[str, Tensor]):
    """The named tensors of a safetensors file that `save_state` wrote, read when they are asked for.

    None is kept. A tensor is the file's own memory, mapped: its values are read when something computes with them, and
    are let go with the tensor. It must not be written to.

    Args:
        path: The file.
        names: Which tensors, in what order; none takes all of them in the file's order.

    Raises:
        FileError: The file is missing, damaged, or was not written by ``coin``; later, that it has changed since.
    """

    def __init__(self, path: Path, names: Iterable[str] | None = None) -> None:
        self.path = path
        self._mapped = 0
        self._version: tuple[int, ...] | None = None
        self._file: Any = self._opened()
        self.provenance = _provenance(self._file.metadata(), path)
        self._names = dict.fromkeys(self._file.keys() if names is None else names)
        self._last = next(reversed(self._names), None)  # where a pass ends

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._file is None:
            self._file = self._opened()
        tensor: Tensor = self._file.get_tensor(name)
        self._mapped += tensor.nbytes
        if self._mapped > _MAPPED or name == self._last:
            self._file, self._mapped = None, 0  # the tensor itself keeps what it needs
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def select(self, names: Iterable[str]) -> "StateFile":
        """Return the same file with these tensors alone, in this order."""
        return StateFile(self.path, names)

    def shapes(self) -> dict[str, torch.Size]:
        """Return the tensors' shapes, which are read without the tensors."""
        file = self._opened()
        return {name: torch.Size(file.get_slice(name).get_shape()) for name in self}

    def _opened(self) -> Any:
        if not self.path.is_file():
            raise _missing(self.path)
        try:
            file = safe_open(str(self.path), framework="pt")
            found = self.path.stat()
        except (SafetensorError, OSError) as error:
            raise FileError(f"'{self.path}' is not a whole safetensors file ({error}); make it again") from error
        version = (found.st_ino, found.st_size, found.st_mtime_ns)
        if self._version is not None and version != self._version:
            raise FileError(f"'{self.path}' has changed while it was read; run the command again, alone on its files")
        self._version = version
        return file
