"""Callbacks that write a file when training ends: the trained network itself."""

from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from coin.core.choices import parse_enum
from coin.errors import ConfigurationError, NumericalError
from coin.files.atomic import hashes
from coin.files.tensors import not_finite
from coin.networks import NetworkConfig, fill_network, read_weights, save_network, without_frozen
from coin.networks.calling import clone


class Weights(StrEnum):
    """``last``: the weights at the end of training; ``best``: those of ModelCheckpoint's best checkpoint."""

    last = "last"
    best = "best"


class FileOfTrained(Callback):
    """Writes a file of the trained network when training ends, by default to the trainer's ``default_root_dir``."""

    name: ClassVar[str]

    def __init__(self, path: str | None, weights: Weights) -> None:
        self.path = path
        self.weights = parse_enum(Weights, "weights", weights)

    def file(self, trainer: Trainer) -> Path:
        """Return the file that it writes."""
        return Path(self.path or Path(trainer.default_root_dir, self.name))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, before training, that the file can be written after it."""
        if not isinstance(getattr(pl_module, "config", None), NetworkConfig):
            found = type(pl_module).__name__
            own = type(self).__name__
            raise ConfigurationError(
                f"found a {found}, expected an Expert; leave out {own}, or set model to Expert"
            )
        if self.weights is Weights.best and _monitored(trainer) is None:
            raise ConfigurationError(
                "found no best checkpoint; add a ModelCheckpoint with a monitor, or take the last"
            )

    def trained_network(self, trainer: Trainer, module: Any) -> nn.Module:
        """Return the network with the chosen weights, none frozen: what one expert did not train another may have."""
        network: nn.Module = module.network
        monitored = _monitored(trainer)
        if self.weights is Weights.best and monitored is not None:
            network = clone(network)
            path = monitored.best_model_path
            fill_network(network, read_weights(Path(path), network.state_dict().keys()), path)
        return without_frozen(network)


def _monitored(trainer: Trainer) -> ModelCheckpoint | None:
    """Return the trainer's ModelCheckpoint that keeps the best weights, if it has one."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            return callback
    return None


class ExpertExport(FileOfTrained):
    """Writes ``expert.safetensors``: the network with its architecture, classes, options and metrics.

    Args:
        path: The file; by default ``expert.safetensors`` in the trainer's ``default_root_dir``.
        weights: ``last`` or ``best``.
        task: The task's name, for the file; by default the class of the data.
    """

    name = "expert.safetensors"

    def __init__(
        self, path: str | None = None, weights: Weights = Weights.last, task: str | None = None
    ) -> None:
        super().__init__(path, weights)
        self.task = task

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file on rank zero; raises NumericalError, without a file, if training diverged."""
        network = self.trained_network(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        path = self.file(trainer)
        if not_finite(network.state_dict()) is not None:
            raise NumericalError(
                f"training diverged: the weights for '{path}' are not finite; give a smaller rate"
            )
        config: Any = pl_module.config
        given = dict(pl_module.hparams)
        options = {name: value for name, value in given.items() if not name.startswith("_")}
        initial = options.get("initial")
        provenance: dict[str, Any] = {
            "made_by": "coin fit",
            "task": self.task,
            "classes": None,
            "sha256": hashes([Path(initial)] if initial else []),
            "options": options,
            "epochs": trainer.current_epoch,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        }
        data = getattr(trainer, "datamodule", None)
        if data is not None:
            provenance["classes"] = list(data.classes)
            provenance["task"] = self.task or type(data).__name__
        save_network(path, network, config, int(options["num_classes"]), provenance)
