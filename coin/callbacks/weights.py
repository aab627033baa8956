"""Which weights a callback takes when training ends: the last ones, or those of the best checkpoint."""

from copy import copy, deepcopy
from enum import StrEnum
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from coin.errors import ConfigurationError
from coin.networks import NetworkConfig, plain_network

_NO_BEST = "found no best checkpoint; add a ModelCheckpoint with a monitor, or set weights=last"


_DESCRIBED = {"network", "image_size", "weights", "options", "num_classes"}
"""The options of a module from which its network is built."""


class Weights(StrEnum):
    """``last``: as training left them; ``best``: of the checkpoint that ModelCheckpoint's monitor likes best."""

    last = "last"
    best = "best"


def check_weights(trainer: Trainer, module: LightningModule, weights: Weights) -> None:
    """Check, before a training, that there will be the chosen weights after it, of a module that can be written.

    Raises:
        ConfigurationError: Nothing looks for the best ones, or the module is not an expert.
    """
    if not isinstance(getattr(module, "network", None), nn.Module) or not module.hparams.keys() >= _DESCRIBED:
        raise ConfigurationError(
            f"found a {type(module).__name__}, expected an Expert, whose network can be built anew from its options; "
            "leave out ExpertExport and FisherEstimator, or set model to Expert"
        )
    if weights == Weights.best and not _monitored(trainer):
        raise ConfigurationError(_NO_BEST)


def trained_network(trainer: Trainer, module: LightningModule, weights: Weights) -> nn.Module:
    """Return the trained network with the chosen weights; with ``best`` a copy, so that the module stays as it is.

    It comes as its architecture has it: not compiled, adapters merged into the weights, every parameter trainable,
    whatever was trained. So files have the architecture's names, and a Fisher is of all parameters, as `coin fisher`
    estimates it of the expert's file: what an expert has left at the shared initialisation counts in a merge with
    others that have moved it.

    Raises:
        ConfigurationError: There is no best checkpoint.
    """
    network: Any = module.network
    if weights == Weights.last:
        return plain_network(copy(network))  # a copy leaves torch.compile's call behind
    monitored = _monitored(trainer)
    if not monitored or not monitored[0].best_model_path:
        raise ConfigurationError(_NO_BEST)
    checkpoint = torch.load(monitored[0].best_model_path, map_location=module.device, weights_only=True)
    best = deepcopy(network)
    prefix = "network."
    best.load_state_dict(
        {
            name.removeprefix(prefix): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith(prefix)
        }
    )
    return plain_network(best)


def _monitored(trainer: Trainer) -> list[ModelCheckpoint]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]


def description(module: LightningModule, trainer: Trainer) -> tuple[NetworkConfig, int, dict[str, Any]]:
    """Return an expert's architecture, its class count and its provenance."""
    options = dict(module.hparams)
    data = getattr(trainer, "datamodule", None)
    config = NetworkConfig(options["network"], options["image_size"], options["weights"], options["options"] or {})
    provenance = {
        "made_by": "coin fit",
        "task": None if data is None else type(data).__name__,
        "classes": None if data is None else list(data.classes),
        "options": {name: value for name, value in options.items() if not name.startswith("_")},
        "epochs": trainer.current_epoch,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }
    return config, int(options["num_classes"]), provenance
