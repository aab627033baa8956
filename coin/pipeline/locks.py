"""Locks: one process at a time works in a folder. A lock is released when its process ends, even if it is killed."""

import contextlib
import errno
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from coin.errors import CoinWarning, ConfigurationError, FileError
from coin.pipeline.records import sweep_of
from coin.pipeline.step import Step

LOCK = ".lock"
"""The file in a folder that is locked; it stays when the lock ends, and says who had it last."""

_POLL_SECONDS = 0.5
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def shared_step_lock(step: Step, key: str) -> AbstractContextManager[Any]:
    """Return a context that waits while another point of the sweep runs the same shared step."""
    sweep = sweep_of(step.folder.parent)
    if sweep is None or not step.shared:
        return contextlib.nullcontext()
    return folder_lock(sweep / ".locks" / f"{step.name}-{key[:16]}", patient=True)


@contextlib.contextmanager
def folder_lock(folder: Path, *, patient: bool = False) -> Iterator[None]:
    """Lock a folder during the block; on a file system without locks there is a warning instead.

    If another process holds the lock, wait if `patient`, else raise ConfigurationError. Children do not inherit it.
    Raises FileError if the folder cannot be written.
    """
    lock = FileLock(folder / LOCK, fallback_to_soft=False)  # a file whose mere existence is the lock survives a kill
    try:
        _acquire(lock, folder, patient)
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, folder: Path, patient: bool) -> None:
    path, holder = folder / LOCK, ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            with contextlib.suppress(OSError):
                holder = path.read_text(encoding="utf-8", errors="replace").strip()
            at_work = f"another coin command at work in '{folder}' ({holder or 'its process is unknown'})"
            if not patient:
                raise ConfigurationError(
                    f"found {at_work}, expected none; wait for it or stop it, or give this one another name or output"
                ) from None
            warnings.warn(f"waiting for {at_work}", CoinWarning, stacklevel=2)
            lock.acquire(poll_interval=_POLL_SECONDS)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise FileError(
                f"cannot write '{path}': {error.strerror or error}; choose a folder you can write to with output"
            ) from error
        warnings.warn(
            f"the file system of '{folder}' has no locks: run only one coin command there",
            CoinWarning,
            stacklevel=2,
        )
    with contextlib.suppress(OSError):  # a full disk: nobody's name is in the file then
        path.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
