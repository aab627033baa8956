"""Writes the trained network as a safetensors file when training ends."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from coin.callbacks.weights import Weights, check_weights, description, trained_network
from coin.choices import chosen
from coin.errors import NumericalError
from coin.files.tensors import not_finite
from coin.networks import save_network


class ExpertExport(Callback):
    """Writes ``expert.safetensors``: the network with its architecture, classes, options and metrics.

    Args:
        path: The file; none writes ``expert.safetensors`` into the trainer's ``default_root_dir``.
        weights: ``last`` or ``best``.

    Raises:
        ConfigurationError: `weights` is neither.
    """

    def __init__(self, path: str | None = None, weights: Weights = Weights.last) -> None:
        self.path = None if path is None else Path(path)
        self.weights = chosen(Weights, "weights", weights)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, before the training, what could not be written after it."""
        check_weights(trainer, pl_module, self.weights)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, on the first process.

        Raises:
            NumericalError: The training diverged; nothing is written.
        """
        network = trained_network(trainer, pl_module, self.weights)
        if trainer.is_global_zero:
            config, num_classes, provenance = description(pl_module, trainer)
            path = self.path or Path(trainer.default_root_dir) / "expert.safetensors"
            if not_finite(network.state_dict()) is not None:
                raise NumericalError(
                    f"training diverged: the weights for '{path}' are not finite; give a smaller learning rate"
                )
            save_network(path, network, config, num_classes, provenance)
