"""A step of an experiment: a key that is known before it runs, and a folder that is finished or not.

The key is a digest of the step's class and version, of its fields, of the keys of the steps that it needs and of the
contents of files that a user named. The folder ``runs/.steps/NAME-KEY`` is finished when it has a ``done.json``; what
is finished is never written to again. So resuming is *the folder is there*, and whoever has the same key shares it.
"""

import contextlib
import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout
from torch.utils._pytree import tree_leaves, tree_map

from coin.core.versions import versions
from coin.errors import CoinWarning, FileError
from coin.files.atomic import sha256_of, write_text
from coin.pipeline.options import config_dict

STORE = ".steps"
"""The folder of all steps, in that of all experiments."""
DONE = "done.json"
_COMPARED = ("coded-coin", "torch")


def keyed_by(digest: Callable[[Any], Any], **options: Any) -> Any:
    """Return a dataclass field of which the key has what a function makes of its value."""
    return field(metadata={"keyed": digest}, **options)


def unkeyed(**options: Any) -> Any:
    """Return a dataclass field that does not change what a step makes, and so is not in its key."""
    return keyed_by(lambda _: None, **options)


@dataclass(frozen=True, eq=False, kw_only=True)
class Step(ABC):
    """One step: its fields are its options, the steps that it needs, and files that a user named (`Path`).

    `name` is unique in an experiment's seed. A class has a `version`, raised when the numbers that it makes change. A
    `collective` step is run by all processes together, one that is `alone` by any one of them while others run others;
    a `remote` one may run in a process or job of its own.
    """

    version: ClassVar[int] = 1
    file: ClassVar[str] = "out"
    collective: ClassVar[bool] = False
    alone: ClassVar[bool] = False
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
        keyed = {entry.name: entry.metadata.get("keyed", lambda value: value) for entry in fields(self)}
        own = {name: config_dict(tree_map(_digest, take(getattr(self, name)))) for name, take in keyed.items()}
        return {"step": type(self).__name__, "version": self.version} | {k: v for k, v in own.items() if v is not None}

    @cached_property
    def key(self) -> str:
        """The digest of `options`."""
        return hashlib.sha256(json.dumps(self.options, sort_keys=True).encode()).hexdigest()

    @cached_property
    def needs(self) -> "list[Step]":
        """The steps among its fields."""
        leaves = tree_leaves([getattr(self, entry.name) for entry in fields(self)])
        return [leaf for leaf in leaves if isinstance(leaf, Step)]

    @cached_property
    def closure(self) -> "dict[str, Step]":
        """It and all that it needs, by key, in an order in which they can run."""
        found: dict[str, Step] = {}
        for need in self.needs:
            found |= need.closure
        return found | {self.key: self}

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

    @property
    def other_versions(self) -> str:
        """The versions of coin and torch that have made a finished step, where they are not those of now; or ''."""
        try:
            made = json.loads((self.folder / DONE).read_text(encoding="utf-8"))["versions"]
            return ", ".join(f"{name} {made[name]}" for name in _COMPARED if made[name] != versions()[name])
        except (OSError, ValueError, KeyError, TypeError):  # not finished, or a record of no use
            return ""

    def finish(self, seconds: float) -> None:
        """Mark its folder as finished, with what it was made from and the seconds that it took."""
        made = {"key": self.key, "seconds": seconds, "options": self.options, "versions": versions()}
        write_text(self.folder / DONE, json.dumps(made, indent=1))

    @contextlib.contextmanager
    def locked(self, *, wait: bool = True) -> Iterator[bool]:
        """Yield whether this process alone works on the step within the block; `wait` until it does.

        A lock ends with its process, even if that is killed. Raises FileError where the folder takes no lock.
        """
        path = self.store / ".locks" / self.folder.name
        lock, held = FileLock(path), True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout:
            held = wait
            if wait:
                warnings.warn(f"waiting for {self.name}: another process is at work on it", CoinWarning, stacklevel=3)
                lock.acquire(poll_interval=0.5)
        except OSError as error:
            told = f"cannot lock '{path}': {error.strerror or error}"
            raise FileError(f"{told}; choose an output that you can write to, on a file system with locks") from error
        try:
            yield held
        finally:
            lock.release()

    def before(self) -> tuple[str, float | None]:
        """Return why the step has to run, and the seconds that the most similar finished one of its name took."""
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


def _digest(value: Any) -> Any:
    """Return a step's key, a file's digest, or the value."""
    return value.key if isinstance(value, Step) else sha256_of(value) if isinstance(value, Path) else value


def _changed(before: Any, current: Any, name: str = "") -> list[str]:
    """Return the dotted names of options that differ."""
    if isinstance(before, dict) and isinstance(current, dict):
        names = dict.fromkeys([*current, *before])
        pairs = [(each, before.get(each, ...), current.get(each, ...)) for each in names]
        return [path for each, old, new in pairs for path in _changed(old, new, f"{name}.{each}" if name else each)]
    return [] if before == current else [name]
