"""What a configuration file says of objects, the options that would make them again; and what a record says."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from torch import Tensor

from coin.data import TaskData
from coin.errors import ConfigurationError
from coin.merging import Method

# Attributes that Lightning gives every datamodule: no options of ours.
_LIGHTNING = {"trainer", "prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices"}


def as_options(value: Any) -> Any:
    """Return what a configuration file says of a value: the constructor's options of tasks and methods by class path.

    Raises:
        ConfigurationError: An object does not keep one of its options under the option's name, or is of another kind.
    """
    return _plain(value, _constructed)


def _plain(value: Any, of_object: Callable[[Any], Any]) -> Any:
    """Return a value as plain JSON values, with what a function says of the objects in it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Namespace):  # what jsonargparse leaves of a class path within a plain dictionary
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {str(name): _plain(entry, of_object) for name, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        entries = [_plain(entry, of_object) for entry in value]
        return sorted(entries) if isinstance(value, set | frozenset) else entries
    if is_dataclass(value) and not isinstance(value, type):
        return {option.name: _plain(getattr(value, option.name), of_object) for option in fields(value)}
    return of_object(value)


def _constructed(value: Any) -> dict[str, Any]:
    """Return the class of a task or a method, and what its constructor was given."""
    if not isinstance(value, TaskData | Method):
        raise ConfigurationError(f"found an option of type {type(value).__name__}, expected plain values")
    hparams = value.hparams if isinstance(value, LightningModule) else {}
    options = {}
    for name in _constructor_options(type(value)):
        kept = name if hasattr(value, name) else f"_{name}"
        if name not in hparams and not hasattr(value, kept):
            raise ConfigurationError(
                f"found a {type(value).__name__} that does not keep its option {name}, which a configuration must "
                f"say, expected an attribute {name} or _{name}; set it in the constructor"
            )
        options[name] = as_options(hparams[name] if name in hparams else getattr(value, kept))
    return {"class_path": _import_path(type(value)), "init_args": options}


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
    homes = (each for each in packages if getattr(import_module(each), kind.__name__, None) is kind)
    home = next(homes, f"{kind.__module__}.{kind.__qualname__}".rpartition(".")[0])  # of a function, for one
    return f"{home}.{kind.__name__}"


def described(value: Any) -> Any:
    """Return options as plain JSON values: dataclasses, enums, tasks and methods become their public attributes.

    Raises:
        ConfigurationError: There is something among them whose changes nobody would notice.
    """
    return _plain(value, _attributes)


def _attributes(value: Any) -> dict[str, Any]:
    """Return an object's class and public attributes."""
    kind = type(value)
    if isinstance(value, LightningModule):
        options = dict(value.hparams)
    elif hasattr(value, "__dict__") and not callable(value):
        options = vars(value)
    else:
        raise ConfigurationError(
            f"found an option of type {kind.__name__}, whose changes an experiment cannot notice; expected plain "
            "values, or an attribute whose name begins with an underscore"
        )
    public = {name: entry for name, entry in options.items() if not name.startswith("_") and name not in _LIGHTNING}
    # A task that reads a folder of the user's says when its contents have changed.
    contents = getattr(value, "content_key", None)
    name = kind.__name__ if kind.__module__.startswith("coin.") else f"{kind.__module__}.{kind.__qualname__}"
    return {"class": name, **described(public), **({"contents": contents()} if contents else {})}
