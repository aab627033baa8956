"""What a configuration file says of objects: the options that would make them again."""

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from coin.data import TaskData
from coin.errors import ConfigurationError
from coin.merging import Method


def as_options(value: Any) -> Any:
    """Return what a configuration file says of a value: the constructor's options of tasks and methods by class path.

    Raises:
        ConfigurationError: An object does not keep one of its options under the option's name.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): as_options(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_options(entry) for entry in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {option.name: as_options(getattr(value, option.name)) for option in fields(value)}
    if isinstance(value, TaskData | Method):
        hparams = value.hparams if isinstance(value, LightningModule) else {}
        options = {}
        for name in _constructor_options(type(value)):
            if name not in hparams and not hasattr(value, name):
                raise ConfigurationError(
                    f"found a {type(value).__name__} that does not keep its option {name}, expected an attribute of "
                    "that name; set it in the constructor"
                )
            options[name] = as_options(hparams[name] if name in hparams else getattr(value, name))
        return {"class_path": _import_path(type(value)), "init_args": options}
    return value


def _constructor_options(kind: type) -> list[str]:
    """Return the names of a constructor's arguments, those that it hands on to its base class among them."""
    names: dict[str, None] = {}
    for each in kind.__mro__:
        if "__init__" in vars(each):
            arguments = list(inspect.signature(each.__init__).parameters.values())[1:]  # type: ignore[misc]
            names |= dict.fromkeys(a.name for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD))
            if not any(argument.kind is argument.VAR_KEYWORD for argument in arguments):
                break
    return list(names)


def _import_path(kind: type) -> str:
    """Return the shortest path that a class is imported by."""
    parts = kind.__module__.split(".")
    packages = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    home = next(each for each in packages if getattr(import_module(each), kind.__name__, None) is kind)
    return f"{home}.{kind.__name__}"
