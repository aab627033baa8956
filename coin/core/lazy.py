"""Packages whose modules are imported when one of their names is first used: a command then starts quickly."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def exported(init: str | Path) -> dict[str, str]:
    """Return the names that an ``__init__.py`` exports, imports of the form ``X as X``, each with its module's name.

    They are read from the source: under ``if TYPE_CHECKING`` they stand for type checkers alone, and are not imported.
    """
    statements = ast.walk(ast.parse(Path(init).read_text(encoding="utf-8")))
    imports = [each for each in statements if isinstance(each, ast.ImportFrom)]
    return {name.asname: each.module or "" for each in imports for name in each.names if name.asname}


def importing(package: str, init: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package, which imports all of its modules when a name is first used (PEP 562)."""
    modules = exported(init)

    def attribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        names = vars(sys.modules[package])
        names.update({known: getattr(import_module(module), known) for known, module in modules.items()})
        return names[name]

    return attribute
