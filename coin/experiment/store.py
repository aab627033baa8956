"""What makes an experiment resumable: a step is done again only if what goes into it has changed.

The points of a sweep share steps by the same records: a step that another point has finished with the same key is
taken over by links to its outputs. That is sound, since the key stands for all that goes into a step.

One process at a time works in a folder: a lock ends with the process that holds it, however that ends.
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

from coin.errors import CoinWarning, ConfigurationError, FileError
from coin.files.atomic import link_file, sha256_of, write_text
from coin.options import config_dict
from coin.processes import on_rank_zero
from coin.reporting.sweeps import SWEEP_YAML
from coin.versions import versions

LOCK = ".lock"
"""The file in a folder that is locked; it stays when the lock ends, and says who had it last."""

_POLL_SECONDS = 0.5
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def sweep_of(experiment: Path) -> Path | None:
    """Return the folder of the sweep that an experiment's folder is a point of, None where it is of none."""
    return experiment.parent if (experiment.parent / SWEEP_YAML).is_file() else None


class Steps:
    """The record of finished steps of one folder, one small file a step.

    A step is finished when its record names the same key (see `step_key`) and every output has the contents it had
    then. With several processes the first one looks and writes, and all of them hear the same. A step that is `shared`
    may have been finished by another point of the same sweep, whose outputs are then linked here: for steps that cost
    much and whose outputs do not say which experiment they are of.

    Args:
        folder: Where the outputs are, ``base`` or ``seed-K`` of an experiment; the records go to ``folder/.steps``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def finished(self, name: str, key: str, outputs: Sequence[Path], *, shared: bool = False) -> bool:
        """Return whether the step `name` has been finished with this key and its outputs stand."""
        return on_rank_zero(
            lambda: self.is_cached(name, key, outputs) or (shared and self.reuse_from_sweep(name, key, outputs))
        )

    def finish(self, name: str, key: str, outputs: Sequence[Path]) -> None:
        """Record that the step `name` has been finished, once the first process has come to here."""
        on_rank_zero(lambda: self._write(name, {"key": key, "outputs": self._contents(outputs)}))

    def once(
        self, name: str, key: str, outputs: Sequence[Path], make: Callable[[], Any], *, shared: bool = False
    ) -> None:
        """Do a step on the first process and record it, unless it is finished."""
        if not self.finished(name, key, outputs, shared=shared):
            on_rank_zero(make)
            self.finish(name, key, outputs)

    def alone(self, name: str, key: str) -> AbstractContextManager[Any]:
        """Return a context for a shared step, which waits for another point of the sweep that is doing the same."""
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
        """Link the outputs of another point that has finished the step with this key, if one has."""
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
    """Return a hash of a step's options (as `config_dict`), of its input files' contents and of coin's version."""
    value = [config_dict(options), [sha256_of(path) for path in inputs], versions()["coded-coin"]]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def folder_lock(folder: Path, *, patient: bool = False) -> Iterator[None]:
    """Hold a folder while the block runs; with several processes the first one holds it for all.

    Processes that this one starts or forks do not hold it. Where the file system has no locks, a warning says so.

    Args:
        folder: The folder.
        patient: Whether to wait for another process that holds it.

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
