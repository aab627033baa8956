"""Packages whose modules are imported when one of their names is first used: a command then starts quickly."""

import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any


def importing(package: str, modules: Iterable[str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package, which imports all of its modules when a name is first used (PEP 562).

    Args:
        package: The package's ``__name__``; its ``__all__`` lists the names.
        modules: The names of the modules that define them.
    """

    def attribute(name: str) -> Any:
        names = vars(sys.modules[package])
        if name not in names["__all__"]:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        for each in modules:
            defined = vars(import_module(f"{package}.{each}"))
            names.update({known: defined[known] for known in names["__all__"] if known in defined})
        return names[name]

    return attribute
