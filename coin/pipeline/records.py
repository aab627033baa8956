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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from coin.core.processes import on_rank_zero
from coin.core.versions import versions
from coin.errors import CoinWarning, ConfigurationError, FileError
from coin.files.atomic import link_file, sha256_of, write_text
from coin.pipeline.options import config_dict
from coin.pipeline.step import Step
from coin.reporting.sweeps import SWEEP_YAML

LOCK = ".lock"
"""The file in a folder that is locked; it stays when the lock ends, and says who had it last."""

_POLL_SECONDS = 0.5
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def sweep_of(experiment: Path) -> Path | None:
    """Return the folder of the sweep that an experiment belongs to, or None."""
    return experiment.parent if (experiment.parent / SWEEP_YAML).is_file() else None


@dataclass(frozen=True)
class Status:
    """Whether a step has to run, and why: '' if it is up to date; `seconds` of its last run, if they are known."""

    why: str
    seconds: float | None = None

    @property
    def is_current(self) -> bool:
        """Whether the step's outputs are those of its options and inputs."""
        return not self.why


@dataclass(frozen=True)
class Inputs:
    """What a step's outputs depend on: its options as JSON, and the hashes of its input files by path."""

    options: Any
    files: Mapping[str, str]

    @property
    def key(self) -> str:
        """The hash of the options, of the files' contents in their order, and of coin's version."""
        value = [self.options, list(self.files.values()), versions()["coded-coin"]]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def inputs_of(step: Step) -> Inputs:
    """Return a step's inputs as they are now; paths are those from the experiment's folder.

    Raises FileError if a file is missing. With several processes, rank zero reads them and broadcasts the result.
    """
    experiment = step.folder.parent

    def read() -> Inputs:
        paths = {
            path: path.relative_to(experiment) if path.is_relative_to(experiment) else path for path in step.inputs
        }
        return Inputs(config_dict(step.options), {str(name): sha256_of(path) for path, name in paths.items()})

    return on_rank_zero(read)


def status_of(step: Step) -> Status:
    """Return whether the step's record has the key of its inputs, and its outputs are those recorded.

    With several processes, rank zero reads the record and broadcasts the result.
    """
    return on_rank_zero(lambda: _status(step))


def _status(step: Step) -> Status:
    record = _read(step.folder, step.name)
    seconds = record["seconds"] if isinstance(record.get("seconds"), float) else None
    if gone := next((path for path in step.inputs if not path.is_file()), None):
        return Status(f"'{gone.name}' is not there yet", seconds)
    if not record:
        return Status("never done", seconds)
    inputs = inputs_of(step)
    if record["key"] != inputs.key:
        return Status(_difference(record.get("inputs"), inputs), seconds)
    for path in step.outputs:
        found = sha256_of(path) if path.is_file() else None
        if record["outputs"].get(str(path.relative_to(step.folder))) != found or found is None:
            return Status(f"'{path.name}' is {'missing' if found is None else 'not what was written'}", seconds)
    return Status("", seconds)


def _difference(before: Any, now: Inputs) -> str:
    """Return which options and input files have changed since a record was written."""
    if not isinstance(before, dict):
        return "its options or inputs have changed"
    options, wanted = (dict(_flat(found)) for found in (before.get("options", {}), now.options))
    changed = [name for name in sorted({*options, *wanted}) if options.get(name, ...) != wanted.get(name, ...)]
    files = before.get("files", {})
    changed += [Path(path).name for path, digest in now.files.items() if files.get(path) != digest]
    left_out = [f"without {Path(path).name}" for path in files if path not in now.files]
    if changed or left_out:
        return f"changed: {', '.join([*changed, *left_out])}"
    return "another order of its inputs" if list(files) != list(now.files) else "another version of coin"


def _flat(options: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield options by dotted name."""
    if isinstance(options, dict) and options:
        for key, value in options.items():
            yield from _flat(value, f"{name}.{key}" if name else key)
    else:
        yield name, options


def reuse_from_sweep(step: Step) -> bool:
    """Link the outputs of another point of the sweep that has finished the step; return whether there is one.

    This is safe because the key is a hash of all inputs of the step.
    """
    sweep = sweep_of(step.folder.parent)
    if sweep is None or not step.shared or not all(path.is_file() for path in step.inputs):
        return False
    inputs = inputs_of(step)
    for path in sorted(sweep.glob(f"*/{glob.escape(step.folder.name)}/.steps/{glob.escape(step.name)}.json")):
        folder = path.parent.parent
        theirs = [folder / output.relative_to(step.folder) for output in step.outputs]
        record = _read(folder, step.name)
        there = record.get("key") == inputs.key and all(each.is_file() for each in theirs)
        if there and record["outputs"] == _contents(folder, theirs):
            with contextlib.suppress(OSError):  # it is just being made again: the step is done here
                for source, target in zip(theirs, step.outputs, strict=True):
                    link_file(source, target)
                record_step(step, inputs)
                return True
    return False


def record_step(step: Step, inputs: Inputs, seconds: float | None = None) -> None:
    """Record on rank zero that the step is finished.

    Args:
        step: The step; its outputs are there.
        inputs: Its inputs as they were when it began.
        seconds: How long it took.
    """

    def write() -> None:
        record = {
            "key": inputs.key,
            "outputs": _contents(step.folder, step.outputs),
            "inputs": {"options": inputs.options, "files": inputs.files},
            "seconds": seconds,
        }
        write_text(step.folder / ".steps" / f"{step.name}.json", json.dumps(record, indent=1))

    on_rank_zero(write)


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Return a step's record; empty if there is none, or it is damaged."""
    try:
        record = json.loads((folder / ".steps" / f"{name}.json").read_text(encoding="utf-8"))
        return record if isinstance(record["key"], str) and isinstance(record["outputs"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _contents(folder: Path, outputs: Sequence[Path]) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in outputs}


def alone(step: Step, key: str) -> AbstractContextManager[Any]:
    """Return a context that waits while another point of the sweep runs the same shared step."""
    sweep = on_rank_zero(lambda: sweep_of(step.folder.parent))
    if sweep is None or not step.shared:
        return contextlib.nullcontext()
    return folder_lock(sweep / ".locks" / f"{step.name}-{key[:16]}", patient=True)


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
