"""The LightningModule that fine-tunes one expert on one task (or pretrains a base)."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics.classification import MulticlassAccuracy

from coin.core.lightning import plot_against_epochs
from coin.data import TaskData
from coin.errors import ConfigurationError
from coin.modules.recipe import Recipe, trainable_names
from coin.networks import NetworkConfig
from coin.networks.calling import logits_of
from coin.networks.files import initial_network
from coin.networks.registry import empty_network

Labelled = tuple[Tensor, Tensor]
"""Images ``[B, 3, H, W]`` or tokens ``[B, L]``, and their classes ``[B]``."""


class Expert(LightningModule):
    """A classifier fine-tuned on one task with cross-entropy.

    Args:
        network: ``small_resnet``, ``small_vit``; a classifier of torchvision; ``timm/NAME``;
            ``hf/FOLDER_OR_ID`` of Hugging Face's; or the import path of an `nn.Module` that takes ``num_classes``.
        image_size: Height and width of the images in pixels.
        weights: The name of pretrained weights; None for random ones.
        options: Further arguments of the network's constructor.
        num_classes: The number of classes; by default the datamodule's, when training starts.
        initial: A base checkpoint to start from (the shared initialisation); by default `weights`.
        initial_seed: The seed of the shared initialisation; equal for all experts of an experiment.
        seed: The seed of dropout and the like, together with the epoch. None is 0, or ``--seed_everything``.
        mean, std: As `coin.networks.NetworkConfig`.
        **recipe: The training options; see `coin.modules.recipe.Recipe`.
    """

    def __init__(
        self,
        network: str = "resnet50",
        image_size: int = 32,
        weights: str | None = None,
        options: dict[str, Any] | None = None,
        num_classes: int | None = None,
        initial: str | None = None,
        initial_seed: int = 0,
        seed: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        **recipe: Any,
    ) -> None:
        super().__init__()
        self.recipe = Recipe(**recipe)
        self.config = NetworkConfig(network, image_size, weights, options or {}, mean, std)
        described = self.config.described()  # with the mean and deviation that `weights` may bring
        own = {
            "network": network,
            "image_size": image_size,
            "weights": weights,
            "options": self.config.options,
            "mean": described["mean"],
            "std": described["std"],
            "num_classes": num_classes,
            "initial": initial,
            "initial_seed": initial_seed,
            "seed": seed,
        }
        self.save_hyperparameters(own | asdict(self.recipe))
        self.network: Any = None
        if num_classes is None:
            empty_network(
                replace(self.config, weights=None), 2
            )  # which checks its name and options
        else:
            self._build(num_classes)

    def configure_model(self) -> None:
        """Build the network when training starts, if the class count was left to the datamodule."""
        if self.network is not None:
            return
        data = getattr(self.trainer, "datamodule", None)
        num_classes = getattr(data, "num_classes", None)
        if num_classes is None:
            raise ConfigurationError(
                "found no num_classes and no datamodule with one, expected one of them; give a task"
            )
        self.hparams["num_classes"] = num_classes
        self._build(num_classes)

    def on_fit_start(self) -> None:
        """Check the data against the network, and choose the axes of the metrics."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TaskData):
            self.config.check_content(data.content, data.vocabulary)
            for name in ("image_size", "num_classes"):
                own = self.hparams[name]
                given = getattr(data, name)
                if given != own:
                    raise ConfigurationError(
                        f"found {name}={own} of the model and {given} of the data; set them equal"
                    )
        plot_against_epochs(self, ["train/loss", "train/accuracy", "val/loss", "val/accuracy"])

    def train(self, mode: bool = True) -> Self:
        """Switch to training or evaluation mode; BatchNorm stays in eval mode with `freeze_batchnorm`."""
        super().train(mode)
        if self.recipe.freeze_batchnorm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def on_train_epoch_start(self) -> None:
        """Seed dropout by (seed, epoch, process), so that a run resumed at an epoch equals an uninterrupted one."""
        seed = int(self.hparams["seed"] or 0)
        torch.manual_seed(seed * 100_003 + self.current_epoch * 1_009 + self.global_rank)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of images ``[B, 3, H, W]`` or tokens ``[B, L]``."""
        return logits_of(self.network, inputs)

    def training_step(self, batch: Labelled, batch_idx: int) -> Tensor:
        """Return the batch's cross-entropy, which is logged."""
        return self._step(batch, "train")

    def validation_step(self, batch: Labelled, batch_idx: int) -> None:
        """Log loss and accuracy on the validation split."""
        self._step(batch, "val")

    def test_step(self, batch: Labelled, batch_idx: int) -> None:
        """Log loss and accuracy on the test set."""
        self._step(batch, "test")

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return class probabilities ``[B, C]``."""
        return self.forward(batch).softmax(1)

    def configure_optimizers(self) -> Any:
        """Return the optimiser, and the schedule, which steps with it."""
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = self.recipe.make_optimizer(trained)
        steps = self.trainer.estimated_stepping_batches
        scheduler = self.recipe.make_scheduler(optimizer, steps)
        if scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _build(self, num_classes: int) -> None:
        """Build the network, freeze what is not to be trained, and make the metrics."""
        initial = self.hparams["initial"]
        checkpoint = None if initial is None else Path(initial)
        network = initial_network(
            self.config, num_classes, checkpoint, seed=self.hparams["initial_seed"]
        )
        trained = trainable_names(network, self.recipe.trainable)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in trained)
        # Convolutions run fastest on channels-last tensors, on CPUs and GPUs alike; elsewhere it changes nothing.
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train(self.training)  # the mode of the new BatchNorms
        names = ("train/accuracy", "val/accuracy", "test/accuracy")
        self.accuracies = nn.ModuleDict(
            {name: MulticlassAccuracy(num_classes, average="micro") for name in names}
        )

    def _step(self, batch: Labelled, stage: str) -> Tensor:
        """Return the cross-entropy of a batch, and log it with the accuracy."""
        inputs, labels = batch
        logits = self(inputs)
        expected = (len(labels), self.hparams["num_classes"])
        found = getattr(logits, "shape", type(logits).__name__)
        if found != expected:
            raise ConfigurationError(
                f"found {found} from the network '{self.config.name}', expected logits [samples, classes] = "
                f"{list(expected)}; fix its forward, or what it does with num_classes"
            )
        loss = F.cross_entropy(logits, labels)
        accuracy: Any = self.accuracies[f"{stage}/accuracy"]
        accuracy.update(logits, labels)
        self.log_dict(
            {f"{stage}/loss": loss, f"{stage}/accuracy": accuracy},
            on_epoch=True,
            on_step=False,
            batch_size=len(labels),
            prog_bar=True,
            sync_dist=stage != "train",
        )
        return loss
