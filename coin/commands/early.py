"""Early checks of the command line and its files, before heavy imports."""

import ast
import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

import coin
from coin.core.lazy import exported
from coin.errors import ConfigurationError, FileError
from coin.files.yaml import read_yaml

_ROOT = Path(coin.__file__).parent
_SHARED = {"c", "config", "h", "help", "print_config", "json"}
_SYSTEM = [("commands/coded_system.py", "Choice")]
_MACHINES = [*_SYSTEM, ("serving/sim/conditions.py", "Conditions")]
_SOURCES = {
    "run": [("pipeline/experiment.py", "Experiment")],
    "merge": [("pipeline/steps/merge.py", "merge")],
    "compress": [("pipeline/steps/compress.py", "compress_network")],
    "export": [("pipeline/steps/export.py", "export")],
    "serve": [("commands/serve.py", "serve"), *_SYSTEM],
    "simulate": [("commands/simulate.py", "simulate"), *_MACHINES],
    "advise": [("commands/advise.py", "advise"), *_MACHINES],
    "fisher": [("pipeline/steps/trainer.py", "Trainer.fisher")],
    "evaluate": [("pipeline/steps/trainer.py", "Trainer.evaluate")],
}
"""The functions and classes whose parameters are a command's options, by file; other commands start quickly."""
_OF_TRAINER = {"trainer", "model", "data", "seed_everything"}
_BESIDE = {"run": {"launch", "only", "dry-run", "dry_run"}, "fisher": _OF_TRAINER, "evaluate": _OF_TRAINER}
"""Options beside these parameters."""
_DATA = {"datamodule", "train_dataloaders", "val_dataloaders", "dataloaders"}
_SUPPLIED = {*_DATA, "configuration", "conditions", "choice"}
"""Parameters that are no options themselves."""
_OLD_NAMES = ("spares", "fisher_cotangents", "cotangents")
_OF_A_FOLDER = ("report", "serve", "simulate", "advise")
_OF_A_CLASS = {"class_path", "init_args", "dict_kwargs"}
A_CLASS = "one of coin's or a dotted import path"
"""What is expected of the name of a class."""


def check_early(command: str, arguments: Sequence[str]) -> None:
    """Look up what can be looked up before heavy imports: files, folders, options and names of classes.

    Raises:
        FileError: A file cannot be read, or a folder is missing.
        ConfigurationError: A file is no YAML, or there is an option or the name of a class that does not exist.
    """
    files = (config_file(arguments, place) for place in range(len(arguments)))
    documents = [read_yaml(path) for path in files if path is not None]
    first = next(iter(arguments), "-")
    if command in _OF_A_FOLDER and not first.startswith("-") and not Path(first).is_dir():
        raise FileError(f"found no folder '{first}', expected an experiment's; make it with `coin run`")
    if not (known := known_options(command)):
        return
    sections = [document for document in documents if isinstance(document, dict)]
    given = [argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")]
    above = {key: before for section in sections for before, key in pairwise(section) if section[before] is None}
    for key in (*(key for section in sections for key in section), *given):
        if (name := str(key).partition(".")[0].removesuffix("+")) not in known | _SHARED:
            indented = f", or is it to be indented under '{above[key]}'" if key in above else ""
            expected = f"one of {', '.join(sorted(known))}{indented}"
            raise ConfigurationError(unknown("option", name, sorted(known), expected))
    sections += _given_sections(command, arguments)
    _check_entries(sections)
    classes = known_classes()
    for name in _class_names(sections):
        if "." not in name and name not in (*classes, "Tasks"):
            raise ConfigurationError(unknown("class", name, classes, A_CLASS))


def _check_entries(sections: Sequence[dict[str, Any]]) -> None:
    """Raise ConfigurationError where the options of a task, a method, a model or data are not under init_args."""
    for tasks in (section.get("tasks") for section in sections):
        if stray := [key for key in tasks if key in _OF_A_CLASS] if isinstance(tasks, dict) else []:
            raise ConfigurationError(f"found '{stray[0]}' as the name of a task; indent it under its task")
    for entry in _entries(sections):
        if stray := [key for key in entry if key not in _OF_A_CLASS] if "class_path" in entry else []:
            raise ConfigurationError(
                f"found {', '.join(map(repr, stray))} beside class_path: {entry['class_path']}, expected options under "
                f"init_args; write {{class_path: {entry['class_path']}, init_args: {{{stray[0]}: …}}}}"
            )


def known_options(command: str) -> set[str]:
    """Return the options of a command, or the sections that begin them; none where its parser starts quickly."""
    options = {name for file, owner in _SOURCES.get(command, []) for name in _parameters(_ROOT / file, owner)}
    if command in ("fit", "validate", "test", "predict"):
        (lightning,) = find_spec("lightning").submodule_search_locations  # type: ignore[union-attr, misc]
        file = Path(lightning) / "pytorch/trainer/trainer.py"
        options = _OF_TRAINER.union(_parameters(file, f"Trainer.{command}"))
    return (options | _BESIDE.get(command, set())) - _SUPPLIED


def config_file(arguments: Sequence[str], place: int) -> Path | None:
    """Return the file that an argument names, if it is ``-c`` or ``--config``; none of options written out."""
    option, path = _option(arguments, place)
    written_out = path.lstrip().startswith("{")
    return Path(path) if option in ("-c", "--config") and path and not written_out else None


def _option(arguments: Sequence[str], place: int) -> tuple[str, str]:
    """Return the name and the value of an option, given as ``--name=value`` or in two arguments."""
    name, given, value = arguments[place].partition("=")
    return name, value if given else next(iter(arguments[place + 1 :]), "")


def unknown(what: str, name: str, known: Sequence[str], expected: str = "") -> str:
    """Return the line about a name that is none of those known, with the nearest of them; old names are left out."""
    current = [each for each in known if each.lstrip("-").rpartition(".")[2] not in _OLD_NAMES]
    expected = expected or f"one of {', '.join(current)}"
    lower = {each.lower(): each for each in current if each != name}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    meant = f" (did you mean {lower[near[0]]}?)" if near else ""
    return f"found {what} '{name}'{meant}, expected {expected}; check it"


def known_classes() -> list[str]:
    """Return the names of coin's tasks, methods and modules."""
    rooms = "data", "merging", "distillation", "modules"
    return [name for room in rooms for name in exported(_ROOT / room / "__init__.py")]


def _given_sections(command: str, arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield what a command line itself says of objects: classes by name, and sections that it writes out as YAML."""
    classes = ("--model", "--data", *(["--method"] if command == "merge" else []))
    for place in range(len(arguments)):
        name, value = _option(arguments, place)
        if name in classes:
            yield {name[2:]: value}
        elif name in ("--tasks", "--methods", "--methods+", "-c", "--config") and value.lstrip().startswith(("{", "[")):
            with suppress(yaml.YAMLError):
                given = yaml.safe_load(value)
                section = given if name in ("-c", "--config") else {name[2:]: given}
                yield section if isinstance(section, dict) else {}


def _class_names(sections: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the class paths of tasks, methods, models and data in files, or given by themselves."""
    for entry in _entries(sections):
        path = entry.get("class_path")
        if isinstance(path, str) and path.isidentifier():
            yield path


def _entries(sections: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the sections of objects; one that is given by its class alone, with its ``class_path`` only."""
    for section in sections:
        tasks, methods = section.get("tasks"), section.get("methods", section.get("methods+"))
        for entry in (
            *(tasks.values() if isinstance(tasks, dict) else ()),
            *(methods if isinstance(methods, list) else ()),
            *(section.get(name) for name in ("model", "data", "method")),
        ):
            if entry is not None:
                yield entry if isinstance(entry, dict) else {"class_path": entry}


def _parameters(file: Path, name: str) -> list[str]:
    """Return the parameters of a function, a method ``Class.method`` or a class, as the source says."""
    statements: Sequence[ast.stmt] = _source(file)
    for part in name.split("."):
        defined = [each for each in statements if isinstance(each, ast.ClassDef | ast.FunctionDef)]
        found = next(each for each in defined if each.name == part)
        statements = found.body
    if isinstance(found, ast.ClassDef):
        own = [each for each in found.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        if not own:  # a dataclass
            return [each.target.id for each in found.body if isinstance(each, ast.AnnAssign)]  # type: ignore[union-attr]
        found = own[0]
    names = [each.arg for each in (*found.args.args, *found.args.kwonlyargs)]
    return [name for name in names if name != "self"]


def _source(file: Path) -> list[ast.stmt]:
    return ast.parse(file.read_text(encoding="utf-8")).body
