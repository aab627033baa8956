"""What the modules ask of Lightning in one way: options that a checkpoint keeps, axes in W&B, tasks as their data."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import WandbLogger

from coin.data.tasks import Tasks
from coin.errors import ConfigurationError


def plain_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a constructor's arguments, its ``locals()``, for `save_hyperparameters`.

    They are given by name, since within LightningCLI Lightning would take the command's own model options instead; and
    as plain values, since a checkpoint must hold nothing that weights_only refuses.
    """
    own = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
    return {name: str(value) if isinstance(value, StrEnum) else value for name, value in own.items()}


def plot_against_epochs(module: LightningModule, names: Sequence[str]) -> None:
    """Have W&B plot metrics that are logged once an epoch against the epoch, which runs of other batch sizes share.

    Every name is defined by itself: W&B takes any of several patterns that fit, and Lightning's ``*``, which stands
    for the number of steps, fits all.
    """
    for logger in module.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.define_metric("epoch")
            for name in names:
                logger.experiment.define_metric(name, step_metric="epoch")


def tasks_of(module: LightningModule) -> Tasks:
    """Return the datamodule of a module's trainer.

    Raises:
        ConfigurationError: It is no `coin.data.Tasks`.
    """
    data: Any = getattr(module.trainer, "datamodule", None)
    if not isinstance(data, Tasks):
        raise ConfigurationError(f"found data of {type(data).__name__}, expected Tasks; set data.class_path: Tasks")
    return data
