"""What classes and functions of coin take, read from the source: importing them takes seconds."""

import ast
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import coin

ROOT = Path(coin.__file__).parent


def annotated_options(name: str) -> dict[str, str]:
    """Return the options of one of coin's classes, those of its bases too, and their annotations, as the source says.

    None if the source does not say it.
    """
    if name not in (files := files_of_classes()):
        return {}
    found = definition(files[name], name)
    assert isinstance(found, ast.ClassDef)
    names = [ast.unparse(base) for base in found.bases]
    bases = [annotated_options(base) for base in names if base not in ("ABC", "Generic")]
    inherited: dict[str, str] = {}
    for base in bases:
        inherited |= {option: base[option] for option in base if option not in inherited}
    own = annotated(found)
    if is_dataclass(found):
        return inherited | own if all(bases) else {}
    if (init := _init(found)) is None:
        return inherited
    if init.args.kwarg is None:
        return own
    return own | {name: inherited[name] for name in inherited if name not in own} if bases and all(bases) else {}


def choices_of(name: str) -> list[str]:
    """Return the names and values of one of coin's enumerations; none of what is none."""
    if name not in (files := files_of_classes()):
        return []
    found = definition(files[name], name)
    if not isinstance(found, ast.ClassDef) or "StrEnum" not in map(ast.unparse, found.bases):
        return []
    pairs = [(each.targets[0], each.value) for each in found.body if isinstance(each, ast.Assign)]
    names = [place.id for place, _ in pairs if isinstance(place, ast.Name)]
    values = [value.value for _, value in pairs if isinstance(value, ast.Constant)]
    return [*names, *(str(value) for value in values if value not in names)]


@cache
def files_of_classes() -> dict[str, Path]:
    """Return where coin's classes are defined, by name."""
    texts = ((path, path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py"))
    return {name: path for path, text in texts for name in re.findall(r"^class (\w+)", text, re.MULTILINE)}


@cache
def _source(file: Path) -> Sequence[ast.stmt]:
    return ast.parse(file.read_text(encoding="utf-8")).body


def definition(file: Path, name: str) -> ast.ClassDef | ast.FunctionDef:
    """Return a function, a method ``Class.method`` or a class in a file."""
    statements = _source(file)
    for part in name.split("."):
        defined = [each for each in statements if isinstance(each, ast.ClassDef | ast.FunctionDef)]
        found = next(each for each in defined if each.name == part)
        statements = found.body
    return found


def is_dataclass(found: ast.ClassDef | ast.FunctionDef) -> bool:
    """Whether a definition is that of a dataclass."""
    return any("dataclass" in ast.unparse(each) for each in found.decorator_list)


def _init(found: ast.ClassDef | ast.FunctionDef) -> ast.FunctionDef | None:
    """Return the function that takes the parameters; none where a class has none of its own."""
    if isinstance(found, ast.FunctionDef):
        return found
    return next((each for each in found.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)


def annotated(found: ast.ClassDef | ast.FunctionDef) -> dict[str, str]:
    """Return the parameters of a function or class with what they are annotated with."""
    pairs: list[tuple[str, ast.expr | None]] = []
    if is_dataclass(found):
        fields = [each for each in found.body if isinstance(each, ast.AnnAssign)]
        pairs = [(each.target.id, each.annotation) for each in fields if isinstance(each.target, ast.Name)]
    elif (init := _init(found)) is not None:
        pairs = [(each.arg, each.annotation) for each in (*init.args.args, *init.args.kwonlyargs)]
    kept = [(name, annotation) for name, annotation in pairs if name != "self" and not name.startswith("_")]
    return {name: "" if annotation is None else ast.unparse(annotation) for name, annotation in kept}


def parameters(file: Path, name: str) -> list[str]:
    """Return the parameters of a function, a method ``Class.method`` or a class, as the source says."""
    return list(annotated(definition(file, name)))
