"""A step of an experiment: a key that is known before it runs, and a folder that is finished or not.

The key is a digest of the step's class and version, of its configuration, of the contents of files that a user named
and of the keys of the steps that it needs. The folder ``runs/.steps/NAME-KEY`` is finished when it has a ``done.json``;
what is finished is never written to again. So resuming is *the folder is there*, and who has the same key shares it.
"""

import contextlib
import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout
from torch.utils._pytree import tree_leaves

from coin.core.versions import versions
from coin.data import TaskData
from coin.errors import CoinWarning, FileError
from coin.files.atomic import link, sha256_of, write_text
from coin.pipeline.options import with_sources

STORE = ".steps"
"""The folder of all steps, in that of all experiments."""
DONE = "done.json"
JOB = "job"
"""The file with the number of the job that was submitted for a step."""
_OWN = (DONE, JOB, "logs", "wandb-run-id")
_COMPARED = ("coded-coin", "torch")
_KEY_LENGTH = 12  # of a key's digits, in the name of a folder


@dataclass(frozen=True, eq=False, kw_only=True)
class Step(ABC):
    """One step. What decides its results is its `config`, as in the experiment's file, and the steps among its fields.

    `name` is unique in an experiment's seed. A class has a `version`, raised when the numbers that it makes change. A
    `collective` step is run by all processes together, another by the first one; a `remote` one is worth a job. A
    person reads `what` it makes, and finds it at `place`: a link to what its folder has of the name `linked` ("" is the
    folder), or with None a folder of links to all its files.
    """

    version: ClassVar[int] = 1
    file: ClassVar[str] = "out"
    doing: ClassVar[str] = ""  # in its line of progress
    collective: ClassVar[bool] = False
    remote: ClassVar[bool] = True

    name: str
    store: Path
    config: Mapping[str, Any] = field(default_factory=dict)  # a file that a user named is a `Path`
    what: str = ""
    place: Path = Path()
    linked: str | None = None
    tasks: Mapping[str, TaskData] = field(default_factory=dict)  # whose data it reads

    @abstractmethod
    def run(self) -> None:
        """Do the work: read from the folders of `needs`, write to `folder`."""

    @cached_property
    def options(self) -> dict[str, Any]:
        """All that its results depend on; a step that it needs is there by its key."""
        return {
            "step": type(self).__name__,
            "version": self.version,
            "name": self.name,
            "config": with_sources(self.config),
            "needs": [need.key for need in self.needs],
        }

    @cached_property
    def key(self) -> str:
        """The digest of `options`."""
        text = json.dumps(self.options, sort_keys=True, default=sha256_of)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def needs(self) -> "list[Step]":
        """The steps among its fields, in their order."""
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
        return self.store / f"{self.name}-{self.key[:_KEY_LENGTH]}"

    @property
    def output(self) -> Path:
        """The file that it writes, of the name `file`."""
        return self.folder / self.file

    @property
    def shown(self) -> list[Path]:
        """What is in its folder, but for what the store and the loggers keep there."""
        every = sorted(self.folder.iterdir())
        return [path for path in every if path.name not in _OWN and not path.name.startswith(".")]

    def publish(self) -> None:
        """Link the finished step's files."""
        if self.linked is not None:
            link(self.place, self.folder / self.linked)
            return
        for path in self.shown:
            link(self.place / path.name, path)

    @property
    def is_done(self) -> bool:
        """Whether its folder is finished."""
        return (self.folder / DONE).is_file()

    def made_by(self) -> str:
        """Return by which versions of coin and torch it was made, in brackets, if they are not those of now; or ""."""
        made = json.loads((self.folder / DONE).read_text(encoding="utf-8"))["versions"]
        current = versions()
        others = [f"{name} {made[name]}" for name in _COMPARED if made[name] != current[name]]
        return f" (made by {', '.join(others)})" if others else ""

    def finish(self, seconds: float) -> None:
        """Mark its folder as finished, with its options, the versions and the seconds that it took."""
        made = {
            "key": self.key,
            "seconds": seconds,
            "options": self.options,
            "versions": versions(),
        }
        write_text(self.folder / DONE, json.dumps(made, indent=1, default=sha256_of))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Wait for the step's lock, and hold it within the block.

        A lock ends with its process, even if that is killed. Raises FileError where the folder takes no lock.
        """
        path = self.store / ".locks" / self.folder.name
        lock = FileLock(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout:
            waiting = f"waiting for {self.name}: another process is at work on it"
            warnings.warn(waiting, CoinWarning, stacklevel=3)
            lock.acquire(poll_interval=0.5)
        except OSError as error:
            problem = f"cannot lock '{path}': {error.strerror or error}"
            raise FileError(
                f"{problem}; choose an output that you can write to, on a disk with locks"
            ) from error
        try:
            yield
        finally:
            lock.release()
