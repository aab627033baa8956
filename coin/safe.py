"""Configurations from strangers: what they may name under ``coin --safe``.

A configuration names classes by their import paths; importing a module runs it, and instantiating a class or handing
over a function may run anything else. With ``--safe`` only names below an allow-list are imported at all, and of those
only what configurations are for: no loaders of files, no functions that others call, no commands for other programs.
It guards what is run, not where is written: ``output`` and the like are still the configuration's to choose.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import set_parsing_settings

import coin
from coin.errors import ConfigurationError

SAFE = "--safe"
VARIABLE = "COIN_SAFE"
"""Set to 1, the commands that an experiment or a sweep starts are as safe as itself."""

ALLOWED = (
    *(f"coin.{name}" for name in coin.__all__),
    "coin.callbacks",
    "coin.coding",
    "coin.data",
    "coin.merging",
    "coin.modules",
    "coin.networks",
    "coin.statistics",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.WandbLogger",
    "lightning.pytorch.loggers.csv_logs.CSVLogger",
    "lightning.pytorch.loggers.wandb.WandbLogger",
    "lightning.pytorch.plugins.precision",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "torch.optim",
)
"""What may be named; an entry stands for all that is below it."""

DENIED = (
    "*",
    "lightning.pytorch.callbacks.LambdaCallback",  # calls what it is given
    "lightning.pytorch.callbacks.lambda_function",
)
"""What may not, although it is below an entry of the allow-list; ``*`` is everything else."""


def wanted(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[bool, list[str]]:
    """Return whether a command line is to be safe, and the command line without the option.

    Raises:
        ConfigurationError: The environment variable is neither 0 nor 1.
    """
    if (given := environment.get(VARIABLE, "0")) not in ("", "0", "1"):
        raise ConfigurationError(f"found {VARIABLE}={given}, expected 0 or 1; set it to 1 to be safe")
    rest = [argument for argument in arguments if argument != SAFE]
    return len(rest) < len(arguments) or environment.get(VARIABLE) == "1", rest


def enforce() -> None:
    """Import from now on only what `ALLOWED` names, in this process and in those that it starts.

    Raises:
        ConfigurationError: The installed jsonargparse cannot be told.
    """
    options: dict[str, Any] = {"import_path_denylist": list(DENIED), "import_path_allowlist": list(ALLOWED)}
    if not options.keys() <= inspect.signature(set_parsing_settings).parameters.keys():
        raise ConfigurationError(
            f"found a jsonargparse without an allow-list of imports, which {SAFE} needs; pip install -U jsonargparse"
        )
    set_parsing_settings(**options)
    os.environ[VARIABLE] = "1"


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that hand commands to other programs, or unpickle.

    Args:
        options: A command's, as they were parsed; nested ones by dotted names.

    Raises:
        ConfigurationError: There is such an option.
    """
    if options.get("launch.slurm"):
        raise ConfigurationError(
            f"found launch.slurm with {SAFE}, expected none: its options are commands for other programs; leave it out"
        )
    if options.get("weights_only") is False:
        raise ConfigurationError(f"found weights_only false with {SAFE}, expected true: it unpickles; leave it out")
