"""The tensors of a file, mapped into memory one at a time: what a merge reads when it has many experts."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coin.errors import FileError
from coin.state import missing_file, provenance_in

_MAPPED = 2**20
"""After so many bytes of tensors, in bytes, the file is mapped anew, so that what was read of it can go."""


class StateFile(Mapping[str, Tensor]):
    """The named tensors of a safetensors file that `coin.state.save_state` wrote, read when they are asked for.

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
        self.provenance = provenance_in(self._file.metadata(), path)
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
            raise missing_file(self.path)
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
