"""What the copies of one task share."""

from collections.abc import Callable, Hashable
from typing import Any, Self, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")


class Shared:
    """A cache shared by all copies of a task within one process."""

    def __init__(self) -> None:
        self.latest: object = None  # what was read last, kept as long as there is a copy
        self._facts: dict[Hashable, Any] = {}
        self._read: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()

    def fact(self, key: Hashable, find: Callable[[], T]) -> T:
        """Return something small, found out once."""
        if key not in self._facts:
            self._facts[key] = find()
        found: T = self._facts[key]
        return found

    def read(self, key: Hashable, read: Callable[[], T]) -> T:
        """Return samples, read unless they are cached."""
        found: T | None = self._read.get(key)
        if found is None:
            found = self._read[key] = read()
        return found

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()
