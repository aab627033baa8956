"""Resumable steps: a step is repeated only if its inputs have changed.

The points of a sweep share steps: a step that another point has finished with the same key is reused by linking its
outputs. This is safe because the key is a hash of all inputs of the step.

One process at a time works in a folder. The lock is released when its process ends, even if it is killed.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from coin.core.processes import on_rank_zero
from coin.core.versions import versions
from coin.errors import CoinWarning, ConfigurationError, FileError
from coin.files.atomic import link_file, sha256_of, write_text
from coin.pipeline.options import config_dict
from coin.reporting.sweeps import SWEEP_YAML

LOCK = ".lock"
"""The file in a folder that is locked; it stays when the lock ends, and says who had it last."""

_POLL_SECONDS = 0.5
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def sweep_of(experiment: Path) -> Path | None:
    """Return the folder of the sweep that an experiment belongs to, or None."""
    return experiment.parent if (experiment.parent / SWEEP_YAML).is_file() else None


class Steps:
    """The record of the finished steps of one folder, one small file per step.

    A step is finished if its record has the same key (see `step_key`) and its outputs have not changed since. With
    several processes, rank zero reads and writes the records and broadcasts the result. A `shared` step may have been
    finished by another point of the same sweep, whose outputs are then linked here: for expensive steps whose outputs
    do not depend on the experiment's name.

    Args:
        folder: The folder of the outputs, ``base`` or ``seed-K`` of an experiment; the records are in
            ``folder/.steps``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def finished(self, name: str, key: str, outputs: Sequence[Path], *, shared: bool = False) -> bool:
        """Return whether the step `name` is finished with this key and its outputs are unchanged."""
        return on_rank_zero(
            lambda: self.is_cached(name, key, outputs) or (shared and self.reuse_from_sweep(name, key, outputs))
        )

    def finish(self, name: str, key: str, outputs: Sequence[Path]) -> None:
        """Record on rank zero that the step `name` is finished."""
        on_rank_zero(lambda: self._write(name, {"key": key, "outputs": self._contents(outputs)}))

    def once(
        self, name: str, key: str, outputs: Sequence[Path], make: Callable[[], Any], *, shared: bool = False
    ) -> None:
        """Run a step on rank zero and record it, unless it is finished."""
        if not self.finished(name, key, outputs, shared=shared):
            on_rank_zero(make)
            self.finish(name, key, outputs)

    def alone(self, name: str, key: str) -> AbstractContextManager[Any]:
        """Return a context that waits while another point of the sweep runs the same shared step."""
        sweep = on_rank_zero(lambda: sweep_of(self.folder.parent))
        if sweep is None:
            return contextlib.nullcontext()
        return folder_lock(sweep / ".locks" / f"{name}-{key[:16]}", patient=True)

    def is_cached(self, name: str, key: str, outputs: Sequence[Path]) -> bool:
        """Return whether this folder's record of the step has this key and its outputs' contents."""
        try:
            record = json.loads(self._record(name).read_text(encoding="utf-8"))
            return bool(record["key"] == key and record["outputs"] == self._contents(outputs))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def reuse_from_sweep(self, name: str, key: str, outputs: Sequence[Path]) -> bool:
        """Link the outputs of another point that has finished the step; return whether there is one."""
        sweep = sweep_of(self.folder.parent)
        if sweep is None:
            return False
        for record in sorted(sweep.glob(f"*/{glob.escape(self.folder.name)}/.steps/{glob.escape(name)}.json")):
            other = Steps(record.parent.parent)
            theirs = [other.folder / path.relative_to(self.folder) for path in outputs]
            if other.is_cached(name, key, theirs):
                with contextlib.suppress(OSError):  # it is just being made again: the step is done here
                    for source, target in zip(theirs, outputs, strict=True):
                        link_file(source, target)
                    self.finish(name, key, outputs)
                    return True
        return False

    def _write(self, name: str, record: dict[str, Any]) -> None:
        write_text(self._record(name), json.dumps(record, indent=1))

    def _record(self, name: str) -> Path:
        return self.folder / ".steps" / f"{name}.json"

    def _contents(self, outputs: Sequence[Path]) -> dict[str, str]:
        return {str(path.relative_to(self.folder)): sha256_of(path) for path in outputs}


def step_key(options: Any, inputs: Sequence[Path] = ()) -> str:
    """Return a hash of a step's options (`config_dict`), its input files' contents and coin's version."""
    value = [config_dict(options), [sha256_of(path) for path in inputs], versions()["coded-coin"]]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def folder_lock(folder: Path, *, patient: bool = False) -> Iterator[None]:
    """Lock a folder during the block; with several processes, rank zero locks it for all.

    Child processes do not inherit the lock. On a file system without locks there is a warning instead.

    Args:
        folder: The folder.
        patient: Whether to wait while another process holds the lock.

    Raises:
        ConfigurationError: Another process works in the folder.
        FileError: The folder cannot be written.
    """
    lock = FileLock(folder / LOCK, fallback_to_soft=False)  # a file whose mere existence is the lock survives a kill
    try:
        on_rank_zero(lambda: _acquire(lock, folder, patient))
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, folder: Path, patient: bool) -> None:
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            at_work = f"another coin command at work in '{folder}' ({_text(path) or 'it does not say who'})"
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
            f"the file system of '{folder}' has no locks: see to it that only one coin command works there",
            CoinWarning,
            stacklevel=2,
        )
    with contextlib.suppress(OSError):  # a full disk: nobody's name is in the file then
        path.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""
