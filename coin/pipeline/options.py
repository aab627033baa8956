"""Objects as plain values, for keys and records."""

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace
from torch import Tensor

from coin.data import TaskData
from coin.errors import ConfigurationError
from coin.files.user_code import source_of, source_of_path
from coin.merging import Method
from coin.trainer import make_trainer

_ON_PROCESSES = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
"""Options of how many processes a step runs on, and their defaults."""

_WITHOUT_EFFECT = (
    *(
        "accelerator",
        "barebones",
        "detect_anomaly",
        "enable_autolog_hparams",
        "enable_model_summary",
    ),
    *(
        "enable_progress_bar",
        "inference_mode",
        "log_every_n_steps",
        "num_sanity_val_steps",
        "profiler",
    ),
)
"""Options of the Trainer that change no result."""
_USUAL_PRECISION = (32, "32", "32-true")
_AS_MANY_AS_THERE_ARE = ("auto", -1, "-1")
"""Values of ``devices`` for which Lightning counts them."""


def result_options(trainer: Mapping[str, Any], *, training: bool) -> dict[str, Any]:
    """Return those of the Trainer's options that change a step's result, for its key.

    In a training the number of processes is among them: each of them takes batches of its own. All else gives the same
    numbers on one process and on many.
    """
    kept = {
        name: value
        for name, value in trainer.items()
        if name not in _WITHOUT_EFFECT and value is not None
    }
    if kept.get("precision") in _USUAL_PRECISION:
        del kept["precision"]
    if not training:
        return {name: value for name, value in kept.items() if name not in _ON_PROCESSES}
    if kept.get("devices") in _AS_MANY_AS_THERE_ARE:
        kept["devices"] = _device_count(trainer.get("accelerator", "auto"))
    return {name: value for name, value in kept.items() if value != _ON_PROCESSES.get(name)}


@cache
def _device_count(accelerator: str) -> int:
    return make_trainer(Path(), {"accelerator": accelerator, "devices": "auto"}).num_devices


def task_key(task: TaskData, *, with_tests: bool) -> dict[str, Any]:
    """Return what decides which samples a step reads of a task; of a step that tests nothing without the test samples.

    Where files lie decides nothing where their contents are known.
    """
    found = _object_dict(task)
    left_out = task.without_effect
    if not with_tests:
        left_out |= task.for_tests
        found["contents"].pop("test", None)
    return {name: value for name, value in found.items() if name not in left_out}


def tasks_key(tasks: Mapping[str, TaskData], *, with_tests: bool) -> list[Any]:
    """Return `task_key` of every task, in their order."""
    return [(name, task_key(task, with_tests=with_tests)) for name, task in tasks.items()]


def config_dict(value: Any) -> Any:
    """Return a value as plain JSON values: a task or method as its class, its options, and a hash of its files.

    What is not coin's has the hash of its source (`coin.files.user_code`), as has a ``class_path``.

    Raises ConfigurationError if an object does not store an option under its name, or is of an unsupported type.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, np.generic | Tensor):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [config_dict(entry) for entry in value]
    # What jsonargparse leaves of a class path within a plain dictionary.
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, Mapping):
        options = {str(name): config_dict(entry) for name, entry in value.items()}
        path = options.get("class_path")
        return options | _source(source_of_path(path) if isinstance(path, str) else None)
    if is_dataclass(value) and not isinstance(value, type):
        return {option.name: config_dict(getattr(value, option.name)) for option in fields(value)}
    if isinstance(value, TaskData | Method):
        return _object_dict(value)
    raise ConfigurationError(
        f"found an option of type {type(value).__name__}, expected plain values"
    )


def _object_dict(value: TaskData | Method) -> dict[str, Any]:
    kind = type(value)
    is_own = kind.__module__.startswith("coin.")
    found: dict[str, Any] = {
        "class": kind.__name__ if is_own else f"{kind.__module__}.{kind.__qualname__}"
    }
    for name in _option_names(kind):
        attribute = name if hasattr(value, name) else f"_{name}"
        if not hasattr(value, attribute):
            problem = f"found a {kind.__name__} that does not store its option {name}"
            raise ConfigurationError(
                f"{problem}, expected an attribute {name}; set it in the constructor"
            )
        found[name] = config_dict(getattr(value, attribute))
    if hasattr(value, "content_key"):
        found["contents"] = config_dict(value.content_key())
    return found | _source(source_of(kind))


def _option_names(kind: type) -> list[str]:
    """Return the names of a constructor's arguments, with those of base classes that it hands on."""
    names: list[str] = []
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        arguments = inspect.getfullargspec(base.__init__)  # type: ignore[misc]
        names += [*arguments.args[1:], *arguments.kwonlyargs]
        if arguments.varkw is None:
            break
    return names


def _source(digest: str | None) -> dict[str, str]:
    """Return the entry of the source of a user's class; none for coin's."""
    return {} if digest is None else {"source": digest}
