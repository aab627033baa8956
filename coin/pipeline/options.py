"""What decides the results of steps, of an experiment's resolved configuration."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from coin.data import TaskData
from coin.files.downloads import folder_contents
from coin.files.user_code import source_of_path
from coin.merging import Method
from coin.networks import NetworkConfig
from coin.networks.hub import HuggingFace
from coin.networks.sources import ImportPath
from coin.trainer import make_trainer

Config = Mapping[str, Any]
"""A section of the configuration, as jsonargparse writes it."""

_ON_PROCESSES = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
"""Options of how many processes a step runs on, and their defaults."""

_WITHOUT_EFFECT = {
    "accelerator",
    "barebones",
    "detect_anomaly",
    "enable_autolog_hparams",
    "enable_model_summary",
    "enable_progress_bar",
    "inference_mode",
    "log_every_n_steps",
    "num_sanity_val_steps",
    "profiler",
}
"""Options of the Trainer that change no result."""
_USUAL_PRECISION = (32, "32", "32-true")
_AS_MANY_AS_THERE_ARE = ("auto", -1, "-1")
"""Values of ``devices`` for which Lightning counts them."""


def result_options(trainer: Config, *, training: bool) -> dict[str, Any]:
    """Return those of the Trainer's options that change a step's result.

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
    if kept.get("devices") in _AS_MANY_AS_THERE_ARE:
        kept["devices"] = _device_count(trainer.get("accelerator", "auto"))
    for name, usual in _ON_PROCESSES.items():
        if not training or kept.get(name) == usual:
            kept.pop(name, None)
    return kept


@cache
def _device_count(accelerator: str) -> int:
    return make_trainer(Path(), {"accelerator": accelerator, "devices": "auto"}).num_devices


def task_config(config: Config, task: TaskData, *, with_tests: bool) -> dict[str, Any]:
    """Return what decides which samples a step reads of a task; of a step that tests nothing without the test samples.

    Where files lie decides nothing where their contents are known.
    """
    left_out = task.without_effect
    contents = dict(task.content_key())
    if not with_tests:
        left_out |= task.for_tests
        contents.pop("test", None)
    options = config.get("init_args", {})
    kept = {name: value for name, value in options.items() if name not in left_out}
    return {**config, "init_args": kept, "contents": contents}


def method_config(config: Config, method: Method) -> dict[str, Any]:
    """Return a method's configuration with the contents of what it names."""
    contents = method.content_key() if hasattr(method, "content_key") else None
    return {**config, "contents": contents}


def network_config(config: Config, network: NetworkConfig) -> dict[str, Any]:
    """Return a network's configuration with the source of a class of the user's, or a folder's contents."""
    found = dict(config)
    source = network.source
    if isinstance(source, ImportPath):
        found["class_path"] = network.name
    if isinstance(source, HuggingFace):
        found["contents"] = folder_contents(source.place, weights=network.weights is not None)
    return found


def with_sources(config: Any) -> Any:
    """Return a configuration with a digest of its source beside every ``class_path`` of a user's class."""
    if isinstance(config, list | tuple):
        return [with_sources(entry) for entry in config]
    if not isinstance(config, Mapping):
        return config
    found = {name: with_sources(entry) for name, entry in config.items()}
    if "class_path" in found:
        found["source"] = source_of_path(found["class_path"])
    return found
