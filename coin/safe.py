"""Configurations from strangers: what they may name under ``coin --safe``.

A configuration names classes by import paths; importing a module runs it, and a class may run anything it is given.
With ``--safe`` only names on an allow-list are imported, and of those only what configurations are for: no loaders of
files, no functions that others call, no commands for other programs. ``output`` is still the configuration's to choose.
"""

import os
from collections.abc import Mapping
from typing import Any

from jsonargparse import set_parsing_settings

import coin
from coin.errors import ConfigurationError

SAFE = "--safe"
VARIABLE = "COIN_SAFE"
"""Set to 1, the commands that an experiment or a sweep starts are as safe as itself."""

_ROOMS = ("callbacks", "coding", "data", "merging", "modules", "networks", "statistics")
_LIGHTNING = ("accelerators", "callbacks", "plugins.precision", "profilers", "strategies")
_LOGGERS = ("CSVLogger", "WandbLogger", "csv_logs.CSVLogger", "wandb.WandbLogger")
ALLOWED = (
    *(f"coin.{name}" for name in (*coin.__all__, *_ROOMS)),
    *(f"lightning.pytorch.{name}" for name in _LIGHTNING),
    *(f"lightning.pytorch.loggers.{name}" for name in _LOGGERS),
    "torch.optim",
)
"""What may be named; an entry stands for all that is below it."""

# What may not, although it is below an entry; `*` is everything else, and a LambdaCallback calls what it is given.
DENIED = ("*", "lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.callbacks.lambda_function")


def enforce() -> None:
    """Import from now on only what `ALLOWED` names, in this process and in those that it starts."""
    set_parsing_settings(import_path_denylist=list(DENIED), import_path_allowlist=list(ALLOWED))
    os.environ[VARIABLE] = "1"


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse, where that is asked for, options that hand commands to other programs or unpickle.

    Raises:
        ConfigurationError: There is such an option.
    """
    if os.environ.get(VARIABLE) != "1":
        return
    if (options.get("launch") or {}).get("slurm"):
        raise ConfigurationError(f"found launch.slurm with {SAFE}, expected none: it holds commands; leave it out")
    if options.get("weights_only") is False:
        raise ConfigurationError(f"found weights_only false with {SAFE}, expected true: it unpickles; leave it out")
