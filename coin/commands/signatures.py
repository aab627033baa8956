"""What commands, classes and functions of coin take, read from the source: importing them takes seconds."""

import ast
import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import coin
from coin.commands import ON_TRAINER
from coin.core.lazy import exported

ROOT = Path(coin.__file__).parent
_SYSTEM = [("commands/coded_system.py", "Choice")]
_MACHINES = [*_SYSTEM, ("serving/sim/conditions.py", "Conditions")]
_SOURCES = {
    "run": [("pipeline/experiment.py", "Experiment")],
    "merge": [("pipeline/steps/merge.py", "merge")],
    "compress": [("pipeline/steps/compress.py", "compress_network")],
    "export": [("pipeline/steps/export.py", "export")],
    "serve": [("commands/serve.py", "serve"), *_SYSTEM],
    "simulate": [("commands/simulate.py", "simulate"), *_MACHINES],
    "fisher": [("pipeline/steps/trainer.py", "Trainer.fisher")],
    "evaluate": [("pipeline/steps/trainer.py", "Trainer.evaluate")],
}
"""The functions and classes whose parameters are a command's options, by file; other commands start quickly."""
_OF_TRAINER = {"trainer", "model", "data", "seed_everything"}
_BESIDE = {"run": {"launch", "only", "dry-run", "dry_run"}, **dict.fromkeys(ON_TRAINER, _OF_TRAINER)}
"""Options beside these parameters."""
_LOADERS = {"datamodule", "train_dataloaders", "val_dataloaders", "dataloaders"}
_SUPPLIED = {*_LOADERS, "configuration", "conditions", "choice"}
"""Parameters that are no options themselves."""


def known_networks() -> list[str]:
    """Return the names of coin's own networks and of torchvision's classifiers, as the sources say."""
    (torchvision,) = find_spec("torchvision").submodule_search_locations  # type: ignore[union-attr, misc]
    texts = [path.read_text(encoding="utf-8") for path in Path(torchvision, "models").glob("*.py")]
    registered = re.compile(r"@register_model\(\)\n(?:@.*\n)*def (\w+)")
    return ["small_resnet", "small_vit", "minilm", *(name for text in texts for name in registered.findall(text))]


def known_options(command: str) -> set[str]:
    """Return the options of a command, or the sections that begin them; none where its parser starts quickly."""
    sources = [(ROOT / file, owner) for file, owner in _SOURCES.get(command, [])]
    if command in ("fit", "validate", "test", "predict"):
        (lightning,) = find_spec("lightning").submodule_search_locations  # type: ignore[union-attr, misc]
        sources = [(Path(lightning, "pytorch/trainer/trainer.py"), f"Trainer.{command}")]
    options = {name for file, owner in sources for name in annotated(definition(file, owner))}
    return (options | _BESIDE.get(command, set())) - _SUPPLIED


def known_classes() -> list[str]:
    """Return the names of coin's tasks, methods and modules."""
    rooms = "data", "merging", "distillation", "modules"
    return [name for room in rooms for name in exported(ROOT / room / "__init__.py")]


def section_classes(command: str) -> dict[str, str]:
    """Return the options of a command that are dataclasses, with their classes' names, as the source says."""
    found = {"launch": "Launch"} if command == "run" else {}
    for file, owner in _SOURCES.get(command, []):
        for name, annotation in annotated(definition(ROOT / file, owner)).items():
            kind = annotation.removesuffix(" | None")
            if (section := _class(kind)) and _is_dataclass(section):
                found[name] = kind
    return found


def annotated_options(name: str) -> dict[str, str]:
    """Return the options of one of coin's classes with their annotations; none where the source does not say them."""
    if (found := _class(name)) is None:
        return {}
    names = [ast.unparse(base) for base in found.bases]
    bases = [annotated_options(base) for base in names if base not in ("ABC", "Generic")]
    inherited: dict[str, str] = {}
    for base in bases:
        inherited |= {option: base[option] for option in base if option not in inherited}
    own = annotated(found)
    if _is_dataclass(found):
        return inherited | own if all(bases) else {}
    if (init := _init(found)) is None:
        return inherited
    if init.args.kwarg is None:
        return own
    return own | {name: inherited[name] for name in inherited if name not in own} if bases and all(bases) else {}


def choices_of(name: str) -> list[str]:
    """Return the names and values of one of coin's enumerations; none of what is none."""
    found = _class(name)
    if found is None or "StrEnum" not in map(ast.unparse, found.bases):
        return []
    pairs = [(each.targets[0], each.value) for each in found.body if isinstance(each, ast.Assign)]
    names = [place.id for place, _ in pairs if isinstance(place, ast.Name)]
    values = [value.value for _, value in pairs if isinstance(value, ast.Constant)]
    return [*names, *(str(value) for value in values if value not in names)]


def _class(name: str) -> ast.ClassDef | None:
    """Return the definition of one of coin's classes."""
    found = definition(file, name) if (file := _files_of_classes().get(name)) else None
    return found if isinstance(found, ast.ClassDef) else None


@cache
def _files_of_classes() -> dict[str, Path]:
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


def _is_dataclass(found: ast.ClassDef | ast.FunctionDef) -> bool:
    return any("dataclass" in ast.unparse(each) for each in found.decorator_list)


def _init(found: ast.ClassDef | ast.FunctionDef) -> ast.FunctionDef | None:
    """Return the function that takes the parameters; none where a class has none of its own."""
    if isinstance(found, ast.FunctionDef):
        return found
    return next((each for each in found.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)


def annotated(found: ast.ClassDef | ast.FunctionDef) -> dict[str, str]:
    """Return the parameters of a function or class with what they are annotated with."""
    pairs: list[tuple[str, ast.expr | None]] = []
    if _is_dataclass(found):
        fields = [each for each in found.body if isinstance(each, ast.AnnAssign)]
        pairs = [(each.target.id, each.annotation) for each in fields if isinstance(each.target, ast.Name)]
    elif (init := _init(found)) is not None:
        pairs = [(each.arg, each.annotation) for each in (*init.args.args, *init.args.kwonlyargs)]
    kept = [(name, annotation) for name, annotation in pairs if name != "self" and not name.startswith("_")]
    return {name: "" if annotation is None else ast.unparse(annotation) for name, annotation in kept}
