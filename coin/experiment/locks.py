"""One process at a time in a folder: a lock that ends with the process that holds it, however that ends."""

import contextlib
import errno
import os
import platform
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from coin.errors import CoinWarning, ConfigurationError, FileError
from coin.processes import from_first

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""The file in a folder that is locked; it stays when the lock ends, and says who had it last."""

_POLL_SECONDS = 0.5
_INHERITED = "COIN_LOCK"
_held: set[IO[bytes]] = set()


def _let_go() -> None:
    """Close the locks in a forked worker: one that outlives a killed parent must not hold them."""
    for file in _held:
        with contextlib.suppress(OSError):
            file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[IO[bytes] | None]:
    """Yield a file that only this process holds, or none where another holds it.

    A process that is handed the file (`handed_on`) holds it as well. Where the system or the file system has no locks,
    a warning says so.

    Raises:
        FileError: The file cannot be opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except OSError as error:
        raise FileError(
            f"cannot write '{path}': {error.strerror or error}; choose a folder you can write to with output"
        ) from error
    with file:
        if not _acquired(file, path):
            yield None
            return
        _held.add(file)
        with contextlib.suppress(OSError):  # a full disk: nobody's name is in the file then
            file.truncate()
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
            file.flush()
        try:
            yield file
        finally:
            _held.discard(file)


@contextlib.contextmanager
def _waited_for(path: Path) -> Iterator[IO[bytes]]:
    """Yield what `locked` does, once no other process holds it."""
    told = False
    while True:
        with locked(path) as file:
            if file is not None:
                yield file
                return
        if not told:
            warnings.warn(
                f"waiting for another coin command at work in '{path.parent}'{_holder(path)}", CoinWarning, stacklevel=2
            )
            told = True
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def alone_in(folder: Path, *, patient: bool = False) -> Iterator[IO[bytes] | None]:
    """Hold a folder while the block runs; with several processes the first one holds it for all.

    A process that another one has started with `handed_on` shares the other's hold on the folder.

    Args:
        folder: The folder.
        patient: Whether to wait for another process that holds it.

    Yields:
        The lock to hand on; none on the other processes, and where it was handed to this one.

    Raises:
        ConfigurationError: Another process works in the folder.
        FileError: The folder cannot be written.
    """
    path = folder / LOCK
    with contextlib.ExitStack() as stack:
        taken: list[IO[bytes] | None] = [None]

        def take() -> None:
            if not _is_inherited(path):
                taken[0] = stack.enter_context(_waited_for(path) if patient else locked(path))
                if taken[0] is None:
                    raise ConfigurationError(
                        f"found another coin command at work in '{folder}'{_holder(path)}, expected none; wait for it "
                        "or stop it, or give this one another name or output"
                    )

        from_first(take)
        yield taken[0]


def handed_on(lock: IO[bytes] | None) -> tuple[dict[str, str], list[int]]:
    """Return what a child needs to share a lock: further environment variables, and the descriptors to pass.

    The child holds the lock as long as it lives, whatever becomes of its parent. None hands on what this process was
    handed itself.
    """
    number = os.environ.get(_INHERITED) if lock is None else str(lock.fileno())
    return ({_INHERITED: number}, [int(number)]) if number and _is_open(number) else ({}, [])


def _is_inherited(path: Path) -> bool:
    number = os.environ.get(_INHERITED, "")
    try:
        return _is_open(number) and os.path.samestat(os.fstat(int(number)), path.stat())
    except OSError:
        return False


def _is_open(number: str) -> bool:
    try:
        os.fstat(int(number))
    except (OSError, ValueError):
        return False
    return True


def _acquired(file: IO[bytes], path: Path) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        warnings.warn(
            f"the file system of '{path.parent}' has no locks: see to it that only one coin command works there",
            CoinWarning,
            stacklevel=2,
        )
    return True


def _holder(path: Path) -> str:
    try:
        name = path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
    return f" ({name})" if name else ""
