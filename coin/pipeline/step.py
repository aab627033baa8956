"""A step of an experiment: a key that is known before it runs, and a folder that is finished or not.

The key is a digest of the step's class and version, of its fields, of the keys of the steps that it needs and of the
contents of files that a user named. The folder ``runs/.steps/NAME-KEY`` is finished when it has a ``done.json``; what
is finished is never written to again. So resuming is *the folder is there*, and whoever has the same key shares it.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout

from coin.core.versions import versions
from coin.errors import CoinWarning, FileError
from coin.files.atomic import sha256_of, write_text
from coin.pipeline.options import config_dict

STORE = ".steps"
"""The folder of all steps, in that of all experiments."""
DONE = "done.json"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def unkeyed(**options: Any) -> Any:
    """Return a dataclass field that does not change what a step makes, and so is not in its key."""
    return field(metadata={"keyed": lambda _: None}, **options)


def keyed_by(digest: Any, **options: Any) -> Any:
    """Return a dataclass field of which the key has what a function makes of its value."""
    return field(metadata={"keyed": digest}, **options)


@dataclass(frozen=True, eq=False, kw_only=True)
class Step(ABC):
    """One step: its fields are its options, the steps that it needs, and files that a user named (`Path`).

    `name` is unique in an experiment's seed; `store` is the folder of all steps. A class has a `version`, raised when
    the numbers that it makes change. A `collective` step is run by all processes together, another by rank zero alone;
    a `remote` one may run in a process or job of its own.
    """

    version: ClassVar[int] = 1
    file: ClassVar[str] = "out"
    collective: ClassVar[bool] = False
    remote: ClassVar[bool] = True

    name: str
    store: Path = unkeyed()
    doing: str = unkeyed(default="")  # in its line of progress: "fine-tuning for 3 epochs"

    @abstractmethod
    def run(self) -> None:
        """Do the work: read from the folders of `needs`, write to `folder`."""

    @cached_property
    def options(self) -> dict[str, Any]:
        """All that its results depend on, as plain values; a step that it needs is there by its key."""
        own = {entry.name: _keyed(self, entry) for entry in fields(self)}
        return {"step": type(self).__name__, "version": self.version} | {k: v for k, v in own.items() if v is not None}

    @cached_property
    def key(self) -> str:
        """The digest of `options`."""
        return hashlib.sha256(json.dumps(self.options, sort_keys=True).encode()).hexdigest()

    @cached_property
    def needs(self) -> "list[Step]":
        """The steps among its fields."""
        return [step for entry in fields(self) for step in _steps(getattr(self, entry.name))]

    @cached_property
    def folder(self) -> Path:
        """The folder of its files."""
        return self.store / f"{self.name}-{self.key[:12]}"

    @property
    def output(self) -> Path:
        """The file that it writes, of the name `file`."""
        return self.folder / self.file

    @property
    def is_done(self) -> bool:
        """Whether its folder is finished."""
        return (self.folder / DONE).is_file()

    def finish(self, seconds: float) -> None:
        """Mark its folder as finished, with what it was made from and the seconds that it took."""
        made = {"key": self.key, "seconds": seconds, "options": self.options, "versions": versions()}
        write_text(self.folder / DONE, json.dumps(made, indent=1))

    @contextlib.contextmanager
    def locked(self, *, wait: bool = True) -> Iterator[bool]:
        """Yield whether this process alone works on the step within the block; `wait` until it does.

        A lock ends with its process, even if that is killed. On a file system without locks there is a warning.
        """
        path = self.store / ".locks" / self.folder.name
        lock, held = FileLock(path, fallback_to_soft=False), True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
                with contextlib.suppress(OSError):  # a full disk: nobody's name is in the file then
                    path.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
            except Timeout:
                held = wait
                if wait:
                    holder = path.read_text(encoding="utf-8", errors="replace").strip()
                    warnings.warn(f"waiting for {self.name}: {holder} is at work on it", CoinWarning, stacklevel=3)
                    lock.acquire(poll_interval=0.5)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                told = f"cannot write '{path}': {error.strerror or error}"
                raise FileError(f"{told}; choose a folder you can write to with output") from error
            told = f"the file system of '{self.store}' has no locks: run only one coin command there"
            warnings.warn(told, CoinWarning, stacklevel=3)
        try:
            yield held
        finally:
            lock.release()

    def before(self) -> tuple[str, float | None]:
        """Return why the step has to run, and what its like took last time, in seconds, as far as that is known.

        Its like is the finished step of the same name with the fewest other options.
        """
        found = []
        for path in self.store.glob(f"{self.name}-*/{DONE}"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                made = json.loads(path.read_text(encoding="utf-8"))
                changed = _changed(made["options"], self.options)
                found.append((len(changed), -path.stat().st_mtime, changed, float(made["seconds"])))
        if not found:
            return ("was interrupted" if self.folder.is_dir() else "never done"), None
        *_, changed, seconds = min(found)
        return f"changed: {', '.join(changed)}", seconds


def closure(step: Step) -> list[Step]:
    """Return a step and all that it needs, in an order in which they can run."""
    found: dict[str, Step] = {}

    def visit(each: Step) -> None:
        if each.key not in found:
            for need in each.needs:
                visit(need)
            found[each.key] = each

    visit(step)
    return list(found.values())


def _keyed(step: Step, entry: "Field[Any]") -> Any:
    value = getattr(step, entry.name)
    return config_dict(_digested(entry.metadata["keyed"](value) if "keyed" in entry.metadata else value))


def _digested(value: Any) -> Any:
    """Return a value with steps replaced by their keys, and files by their contents' digests."""
    if isinstance(value, Step):
        return value.key
    if isinstance(value, Path):
        return sha256_of(value)
    if isinstance(value, Mapping):
        return {str(name): _digested(entry) for name, entry in value.items()}
    return [_digested(entry) for entry in value] if isinstance(value, list | tuple) else value


def _steps(value: Any) -> Iterator[Step]:
    """Yield the steps in nested lists and mappings."""
    if isinstance(value, Step):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _steps(entry)


def _changed(before: Any, current: Any, name: str = "") -> list[str]:
    """Return the dotted names of options that differ."""
    if isinstance(before, dict) and isinstance(current, dict):
        every = [*current, *(each for each in before if each not in current)]
        pairs = [(each, before.get(each, ...), current.get(each, ...)) for each in every]
        return [path for each, old, new in pairs for path in _changed(old, new, f"{name}.{each}" if name else each)]
    return [] if before == current else [name]
