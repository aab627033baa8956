"""The source of a user's classes, for keys: a step is made anew when the code that it runs has changed."""

import ast
import sys
from hashlib import sha256
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from coin.errors import ConfigurationError
from coin.files.atomic import sha256_of
from coin.files.packaged import imported

_VERSIONED = ("coin", "torch", "torchvision", "lightning")
"""Packages whose changes are known by their versions (`coin.core.versions`), or by a step's."""
_INSTALLED = ("site-packages", "dist-packages")


def source_of_path(path: str) -> str | None:
    """Return `source_of` of a class by its import path; None for one that cannot be imported, refused elsewhere."""
    try:
        return source_of(imported("class_path", path, "a class"))
    except ConfigurationError:
        return None


def source_of(named: Any) -> str | None:
    """Return the SHA-256 of a class's or function's file and of the modules beside it that this imports, but comments.

    It is None for coin's own and torch's, and for what was typed in, which has no file.

    Beside it are the modules and packages of the folder that its own import path begins in. Of an installed package the
    file alone counts. What is imported by other means than an import statement is not seen.
    """
    name = named.__module__
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None or _is_versioned(name):
        return None
    path = Path(file).resolve()
    if name == "__main__":
        # Of ``python -m package.module`` relative imports go from the package.
        spec = sys.modules[name].__spec__
        name = path.stem if spec is None else spec.name
    depth = name.count(".") + (path.name == "__init__.py")
    root = path.parents[depth]
    if root.name in _INSTALLED:
        return sha256_of(path)
    digest = sha256()
    for module, source in sorted(_with_imports(name, root).items()):
        digest.update(f"{module}:{_code_of(source)};".encode())
    return digest.hexdigest()


def _code_of(path: Path) -> str:
    """Return a file's code without comments and spacing, as this version of Python writes it."""
    return ast.unparse(ast.parse(path.read_bytes()))


def _is_versioned(module: str) -> bool:
    return module.partition(".")[0] in _VERSIONED


def _with_imports(name: str, root: Path) -> dict[str, Path]:
    """Return the files below a folder of a module and of all that it imports, by their names."""
    found: dict[str, Path] = {}
    waiting = [name]
    while waiting:
        module = waiting.pop()
        path = _file_of(module, root)
        if path is None or module in found or _is_versioned(module):
            continue
        found[module] = path
        parent = module.rpartition(".")[0]
        waiting.append(parent)  # its package is run before it
        waiting += _imports(path, module if path.name == "__init__.py" else parent)
    return found


def _file_of(module: str, root: Path) -> Path | None:
    """Return a module's file below a folder, if it is there."""
    place = root.joinpath(*module.split("."))
    for path in (place / "__init__.py", place.with_name(f"{place.name}.py")):
        if module and path.is_file():
            return path
    return None


def _imports(path: Path, package: str) -> list[str]:
    """Return the names of what a file imports; what is imported from a package may be a module of it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = resolve_name("." * node.level + (node.module or ""), package)
            names.append(home)
            names += [f"{home}.{alias.name}" for alias in node.names]
    return names
