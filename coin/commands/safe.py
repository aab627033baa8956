"""``--safe`` for configurations from others: only classes on an allow-list are imported, since importing runs code."""

import os
from collections.abc import Mapping
from typing import Any

from jsonargparse import set_parsing_settings

import coin
from coin.errors import ConfigurationError

SAFE = "--safe"
VARIABLE = "COIN_SAFE"
"""Set to 1, the commands that an experiment or a sweep starts are as safe as itself."""

_OURS = (*coin.__all__, "callbacks", "coding", "data", "distillation", "merging", "modules", "networks", "statistics")
_LIGHTNING = ("accelerators", "callbacks", "plugins.precision", "profilers", "strategies")
_LOGGERS = ("CSVLogger", "WandbLogger", "csv_logs.CSVLogger", "wandb.WandbLogger")
_PYTORCH = (*_LIGHTNING, *(f"loggers.{name}" for name in _LOGGERS))
ALLOWED = (*(f"coin.{name}" for name in _OURS), *(f"lightning.pytorch.{name}" for name in _PYTORCH), "torch.optim")
"""What may be named; an entry stands for all that is below it."""
DENIED = ("*", "lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.callbacks.lambda_function")
"""What may not, although it is below an entry: a LambdaCallback calls what it is given."""


def enforce() -> None:
    """Restrict imports to `ALLOWED` from now on, in this process and in its subprocesses."""
    set_parsing_settings(import_path_denylist=list(DENIED), import_path_allowlist=list(ALLOWED))
    os.environ[VARIABLE] = "1"


def check_options(options: Mapping[str, Any]) -> None:
    """With ``--safe``, refuse options that run commands or unpickle."""
    if os.environ.get(VARIABLE) != "1":
        return
    for executor in ("slurm", "ray"):
        if (options.get("launch") or {}).get(executor):
            raise ConfigurationError(
                f"found launch.{executor} with {SAFE}, expected none: it can run commands; leave it out"
            )
    if options.get("weights_only") is False:
        raise ConfigurationError(f"found weights_only false with {SAFE}, expected true: it unpickles; leave it out")
