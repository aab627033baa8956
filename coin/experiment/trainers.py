"""The Trainer of an experiment's steps, and the processes that it asks for."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from coin.errors import ConfigurationError, first_line
from coin.modules.shared import quieten
from coin.trainer import Trainer

_DECIDED = {
    "callbacks": "use coin fit for callbacks of your own",
    "default_root_dir": "set output",
    "enable_checkpointing": "leave it out",
    "logger": "set WANDB_MODE for W&B",
    "max_epochs": "set expert.epochs or base.epochs",
    "max_steps": "set expert.epochs, or steps of a distillation",
}
"""What to do in place of giving the option."""


def make_trainer(folder: Path, options: dict[str, Any], **fixed: Any) -> Trainer:
    """Return a Trainer for one step of an experiment.

    Args:
        folder: Its ``default_root_dir``.
        options: The experiment's ``trainer`` section.
        **fixed: What the step decides.

    Raises:
        ConfigurationError: The Trainer has no such option, or refuses a value.
    """
    quieten()
    settings: dict[str, Any] = {
        "accelerator": "auto",
        "devices": 1,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
        **options,
        **fixed,
    }
    try:
        trainer = Trainer(default_root_dir=str(folder), **settings)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigurationError(
            f"the trainer section {options} does not fit: {first_line(error)}; see Lightning's Trainer"
        ) from error
    return trainer


def check_trainer_options(options: Mapping[str, Any]) -> None:
    """Refuse options of the ``trainer`` section that the steps of an experiment decide themselves.

    Raises:
        ConfigurationError: There is such an option.
    """
    for name in options.keys() & _DECIDED.keys():
        raise ConfigurationError(
            f"found trainer.{name}, which the steps decide, expected other options; {_DECIDED[name]}"
        )


def join_processes(folder: Path, options: dict[str, Any]) -> None:
    """Have the processes that the Trainer's options ask for find one another, before the first step.

    Under ``torchrun`` and ``srun`` they run already; a plain ``coin run`` starts the others of its machine itself.

    Args:
        folder: A ``default_root_dir``.
        options: The experiment's ``trainer`` section.

    Raises:
        ConfigurationError: The options do not fit the processes that run already.
    """
    trainer = make_trainer(folder, options)
    running = int(os.environ.get("WORLD_SIZE", "1"))
    if running > 1 and trainer.world_size == 1:
        raise ConfigurationError(
            f"found WORLD_SIZE={running} and a trainer section for one process; lay configs/cluster/torchrun.yaml "
            "over the experiment, or set trainer.devices and trainer.num_nodes"
        )
    if trainer.world_size == 1:
        return
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        raise ConfigurationError(
            f"found the trainer section {options}, whose processes share no steps; set trainer.strategy=ddp"
        )
    try:
        launcher.launch(trainer.strategy.setup_environment)
    except ValueError as error:
        raise ConfigurationError(f"the trainer section {options} does not fit: {first_line(error)}") from error
