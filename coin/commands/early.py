"""Early checks of the command line and its files, before heavy imports."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from coin.commands.signatures import (
    annotated_options,
    choices_of,
    known_classes,
    known_networks,
    known_options,
    section_classes,
)
from coin.core.choices import did_you_mean
from coin.errors import ConfigurationError, FileError
from coin.files.downloads import names_a_file
from coin.files.packaged import how_to_install
from coin.files.yaml import read_yaml

_SHARED = {"c", "config", "h", "help", "print_config", "json"}
_UNLISTED = ("spares", "fisher_cotangents", "cotangents", "dry_run")
"""Old names, and second spellings."""
_OF_A_FOLDER = ("report", "serve", "simulate", "choose")
_OF_DATA = ("fisher", "evaluate")
_OF_OPTIONS = ("run", "merge", "fit", "validate", "test", "predict", "fisher", "evaluate")
_OF_A_FILE = ("compress", "export")
_PACKAGES = {"serve": (("ray", "fastapi"), "serve")}
"""What a command needs beyond the installation, and the extra that brings it."""
_SCALARS = {"int": int, "float": float, "bool": bool, "None": type(None)}
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
    if command in _OF_OPTIONS and re.fullmatch(r"[^-].*\.ya?ml", first):
        raise ConfigurationError(f"found '{first}' without an option, expected -c {first}")
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
            expected = f"one of {', '.join(_listed(sorted(known)))}{indented}"
            raise ConfigurationError(unknown("option", name, sorted(known), expected))
    sections = _with_given(command, arguments, sections)
    _check_entries(sections, command)
    _check_sections(command, sections, given)
    classes = known_classes()
    for entry in _entries(sections, command):
        path = entry.get("class_path")
        if isinstance(path, str) and path.startswith("torchvision.") and (own := path.rpartition(".")[2]) in classes:
            raise ConfigurationError(f"found class '{path}', expected one of coin's; write class_path: {own}")
        if not isinstance(path, str) or not path.isidentifier() or path == "Tasks":
            continue
        if path not in classes:
            raise ConfigurationError(unknown("class", path, classes, A_CLASS))
        _check_options(path, entry.get("init_args"), annotated_options(path))
    _check_values(sections)
    names = {str(name).partition(".")[0] for name in (*given, *(key for section in sections for key in section))}
    if "-h" in arguments or names & {"help", "print_config"}:
        return
    _check_files(command, sections)
    if command in _OF_DATA and "data" not in names:
        raise ConfigurationError(f"found no data for coin {command}, expected tasks; give --data, or a file with data:")
    if sum("tasks" in section for section in sections) == 1 and not any(name.startswith("tasks") for name in given):
        _check_folders(sections)
    if command in _OF_A_FILE and not first.startswith("-") and not Path(first).is_file():
        raise FileError(f"found no file '{first}', expected a network's safetensors file; check the path")
    needed, extra = _PACKAGES.get(command, ((), ""))
    if lacking := [each for each in needed if find_spec(each) is None]:
        raise ConfigurationError(f"coin {command} needs the package {lacking[0]}: {how_to_install(extra)}")


def _check_entries(sections: Sequence[dict[str, Any]], command: str) -> None:
    """Raise ConfigurationError where methods are no list, or options of a class are not under init_args."""
    for methods in _given_at(sections, "methods"):
        if isinstance(methods, str | dict) and methods:
            raise ConfigurationError(f"found methods: {methods}, expected a list; write methods: [{methods}]")
    for tasks in _given_at(sections, "tasks"):
        if stray := [key for key in tasks if key in _OF_A_CLASS] if isinstance(tasks, dict) else []:
            raise ConfigurationError(f"found '{stray[0]}' as the name of a task; indent it under its task")
    for entry in _entries(sections, command):
        if stray := [key for key in entry if key not in _OF_A_CLASS] if "class_path" in entry else []:
            raise ConfigurationError(
                f"found {', '.join(map(repr, stray))} beside class_path: {entry['class_path']}, expected options under "
                f"init_args; write {{class_path: {entry['class_path']}, init_args: {{{stray[0]}: …}}}}"
            )


def _check_sections(command: str, sections: Sequence[dict[str, Any]], given: Sequence[str]) -> None:
    """Raise ConfigurationError for an option that a section lacks, in a file or as ``--section.option``."""
    for name, kind in section_classes(command).items():
        known = annotated_options(kind)
        for option in given:
            first, _, rest = option.partition(".")
            if known and first == name and rest and rest.partition(".")[0].removesuffix("+") not in (*known, "help"):
                every = [f"--{name}.{each}" for each in known]
                expected = f"one that coin {command} --help lists"
                raise ConfigurationError(unknown("option", f"--{option}", every, expected))
        for section in sections:
            _check_options(name, section.get(name), known)


def _check_options(what: str, options: Any, known: dict[str, str]) -> None:
    """Raise ConfigurationError for an option that is not known, or a number, truth value or choice that is none."""
    for key, value in options.items() if known and isinstance(options, dict) else ():
        if str(key).partition(".")[0].removesuffix("+") not in known:
            raise ConfigurationError(unknown(f"{what} option", str(key), [*known]))
        kinds = known.get(str(key), "").split(" | ")
        if all(kind in _SCALARS for kind in kinds) and not any(_is(value, _SCALARS[kind]) for kind in kinds):
            expected = " or ".join("nothing" if kind == "None" else kind for kind in kinds)
            raise ConfigurationError(f"found {what}.{key}={value!r}, expected {expected}; check it")
        choices = [choice for kind in kinds for choice in choices_of(kind)]
        if choices and isinstance(value, str) and value not in choices:
            raise ConfigurationError(unknown(f"{what}.{key}", value, choices))


def _is(value: Any, kind: type) -> bool:
    """Whether a value of a YAML file, where 1e-3 is a text, is of this kind."""
    if kind in (int, float) and not isinstance(value, bool):
        try:
            return kind(value) == float(value)
        except (TypeError, ValueError, OverflowError):
            return False
    return isinstance(value, kind)


def _check_folders(sections: Sequence[dict[str, Any]]) -> None:
    """Raise FileError where the images of a task are not where it says; with a zero-shot head they may come later."""
    for entry in _entries(sections, "run"):
        options = entry.get("init_args")
        if entry.get("class_path") != "ImageFolder" or not isinstance(options, dict) or "head" in options:
            continue
        if isinstance(root := options.get("root"), str) and not (train := Path(root).absolute() / "train").is_dir():
            other = f"the folder above, {train.parent.parent}" if train.parent.name == "train" else "another"
            raise FileError(f"{train} does not exist; expected images as {train}/CLASS/image.png; set root to {other}")


def _check_values(sections: Sequence[dict[str, Any]]) -> None:
    """Raise ConfigurationError for a decoder, network, task of an expert or row of the code that is none."""
    for decoders in _given_at(sections, "decoders"):
        if isinstance(decoders, list):
            from coin.coding.decoder_config import distinct_decoders

            distinct_decoders(decoders)
    name = _last(sections, "network", "name")
    if isinstance(name, str) and name and not set("./") & set(name) and name not in (known := known_networks()):
        expected = "small_resnet, small_vit, minilm, one of torchvision, timm/NAME, hf/FOLDER_OR_ID or a class's path"
        raise ConfigurationError(unknown("network.name", name, known, expected))
    tasks = {str(task) for each in _given_at(sections, "tasks") if isinstance(each, dict) for task in each}
    for option in ("overrides", "checkpoints"):
        given = _last(sections, "expert", option)
        stray = sorted(set(map(str, given)) - tasks) if isinstance(given, dict) else []
        if tasks and stray:
            raise ConfigurationError(unknown("an expert of task", stray[0], sorted(tasks)))
    code = _last(sections, "code")
    for row in code if isinstance(code, list) else ():
        numbers = isinstance(row, list) and all(isinstance(weight, int | float) for weight in row)
        if numbers and (min(row, default=-1) < 0 or abs(sum(row) - 1) > 1e-6):
            raise ConfigurationError(
                f"found code row {row}, whose sum is {sum(row):g}, expected non-negative weights that sum to 1"
            )


def _check_files(command: str, sections: Sequence[dict[str, Any]]) -> None:
    """Raise FileError where a file of weights is missing."""
    weights, base = _last(sections, "network", "weights"), _last(sections, "base")
    named = {"network.weights": weights if isinstance(weights, str) and names_a_file(weights) else None}
    named["base.checkpoint"] = base.get("checkpoint") if isinstance(base, dict) else None
    options = [("experts",), ("fisher",), ("gram",)] if command == "merge" else [("expert", "checkpoints")]
    for option in options:
        given = _last(sections, *option)
        for task, path in given.items() if isinstance(given, dict) else ():
            named[".".join((*option, str(task)))] = path
    for key, path in named.items():
        if isinstance(path, str) and not path.startswith("hf/") and not Path(path).is_file():
            raise FileError(f"found no file '{path}', expected {key}; check the path")


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
    current = _listed(known)
    expected = expected or f"one of {', '.join(current)}"
    return f"found {what} '{name}'{did_you_mean(name, current)}, expected {expected}; check it"


def _listed(known: Sequence[str]) -> list[str]:
    """Return the names that a person is told of."""
    return [each for each in known if each.lstrip("-").rpartition(".")[2] not in _UNLISTED]


def _with_given(command: str, arguments: Sequence[str], documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the documents and what a command line itself says: ``--expert.lr=1`` is a section ``{expert: {lr: 1}}``.

    Options of a class that is given before get its ``class_path``.
    """
    sections = [*documents]
    for place in range(len(arguments)):
        name, value = _option(arguments, place)
        given: Any = value
        with suppress(yaml.YAMLError, ValueError):  # which a text raises that is nearly a date
            given = yaml.safe_load(value)
        keys = name[2:].split(".") if name.startswith("--") and name != "--config" else []
        if name == "--methods+" and not isinstance(given, list):
            given = [given]
        for depth in range(len(keys), 0, -1):
            given = {keys[depth - 1]: given}
            if keys[depth - 1] == "init_args":
                before = _given_at(sections, *keys[: depth - 1])
                classes = [each.get("class_path") if isinstance(each, dict) else each for each in before]
                if known := [each for each in classes if isinstance(each, str)]:
                    given["class_path"] = known[-1]
        of_last = len(keys) > 1 and keys[0] in ("methods", "methods+")  # --methods.target is of the last method
        if isinstance(given, dict) and name.startswith("-") and not of_last:
            sections.append(given)
    return sections


def _given_at(sections: Iterable[Any], *names: str) -> list[Any]:
    """Return all that is given at a place, such as expert, checkpoints."""
    for name in names:
        sections = [section[name] for section in sections if isinstance(section, dict) and name in section]
    return list(sections)


def _last(sections: Iterable[Any], *names: str) -> Any:
    """Return what is given last at a place: it takes the place of what was before."""
    return next(reversed(_given_at(sections, *names)), None)


def _entries(sections: Iterable[dict[str, Any]], command: str) -> Iterator[dict[str, Any]]:
    """Yield the sections of objects; one that is given by its class alone, with its ``class_path`` only."""
    single = ("model", "data", *(["method"] if command == "merge" else []))  # elsewhere a method is a result's label
    for section in sections:
        tasks, methods = section.get("tasks"), section.get("methods", section.get("methods+"))
        base = section.get("base")
        for entry in (
            base.get("task") if isinstance(base, dict) else None,
            *(tasks.values() if isinstance(tasks, dict) else ()),
            *(methods if isinstance(methods, list) else ()),
            *(section.get(name) for name in single),
        ):
            if entry is not None:
                yield entry if isinstance(entry, dict) else {"class_path": entry}
