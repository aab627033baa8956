"""Mistakes that a command line and its files show by themselves, found before anything heavy is imported."""

import ast
import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import coin
from coin.errors import ConfigurationError
from coin.files.yaml import read_yaml

_ROOT = Path(coin.__file__).parent
_SHARED = {"c", "config", "h", "help", "print_config", "json"}
_OF_RUN = {"launch", "only"}
"""Options of ``coin run`` beside the experiment's."""
A_CLASS = "one of coin's or a dotted import path"
"""What is expected of the name of a class."""


def check_early(command: str, arguments: Sequence[str]) -> None:
    """Read the YAML files of a command, and for ``coin run`` look up its keys and class names.

    Raises:
        FileError: A file cannot be read.
        ConfigurationError: A file is no YAML, or holds a key or the name of a class that does not exist.
    """
    files = (config_file(arguments, place) for place in range(len(arguments)))
    documents = [read_yaml(path) for path in files if path is not None]
    if command != "run":
        return
    sections = [document for document in documents if isinstance(document, dict)]
    given = [argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")]
    known = {*_parameters("experiment/experiment.py", "Experiment"), *_OF_RUN}
    for key in (*(key for section in sections for key in section), *given):
        if (name := str(key).partition(".")[0].removesuffix("+")) not in known | _SHARED:
            raise ConfigurationError(unknown("option", name, sorted(known), f"one of {', '.join(sorted(known))}"))
    classes = known_classes()
    for name in _class_names(sections):
        if "." not in name and name not in classes:
            raise ConfigurationError(unknown("class", name, classes, A_CLASS))


def config_file(arguments: Sequence[str], place: int) -> Path | None:
    """Return the file that an argument names, if it is ``-c`` or ``--config``; none of options written out."""
    option, given, path = arguments[place].partition("=")
    if option not in ("-c", "--config"):
        return None
    path = path if given else next(iter(arguments[place + 1 :]), "")
    return Path(path) if path and not path.lstrip().startswith("{") else None


def unknown(what: str, name: str, known: Sequence[str], expected: str) -> str:
    """Return the line about a name that is none of those known, with the nearest of them."""
    lower = {each.lower(): each for each in known if each != name}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    meant = f" (did you mean {lower[near[0]]}?)" if near else ""
    return f"found {what} '{name}'{meant}, expected {expected}; check it"


def known_classes() -> list[str]:
    """Return the names of coin's tasks, methods and modules."""
    rooms = "data", "merging", "distillation", "modules"
    return [name for room in rooms for name in _exported(f"{room}/__init__.py")]


def _class_names(sections: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the class paths of the tasks and methods in experiments' files."""
    for section in sections:
        tasks, methods = section.get("tasks"), section.get("methods")
        for entry in (
            *(tasks.values() if isinstance(tasks, dict) else ()),
            *(methods if isinstance(methods, list) else ()),
        ):
            if isinstance(entry, dict) and isinstance(entry.get("class_path"), str):
                yield entry["class_path"]


def _parameters(file: str, name: str) -> list[str]:
    """Return the parameters of a class of ours, as its source says."""
    (made,) = (each for each in _source(file) if isinstance(each, ast.ClassDef) and each.name == name)
    (init,) = (each for each in made.body if isinstance(each, ast.FunctionDef) and each.name == "__init__")
    return [each.arg for each in (*init.args.args[1:], *init.args.kwonlyargs)]


def _exported(file: str) -> list[str]:
    """Return the names in ``__all__`` of a package of ours, as its source says."""
    for each in _source(file):
        if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name) and each.targets[0].id == "__all__":
            return list(ast.literal_eval(each.value))
    return []


def _source(file: str) -> list[ast.stmt]:
    return ast.parse((_ROOT / file).read_text(encoding="utf-8")).body
