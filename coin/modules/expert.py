"""The LightningModule that fine-tunes one expert on one task (or pretrains a base)."""

from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, OneCycleLR
from torchmetrics.classification import MulticlassAccuracy

from coin.choices import chosen
from coin.errors import ConfigurationError
from coin.modules.shared import plain_options, plot_against_epochs
from coin.networks import NetworkConfig, initial_network


class OptimizerKind(StrEnum):
    """The optimiser: ``sgd`` (with momentum) or ``adamw``."""

    sgd = "sgd"
    adamw = "adamw"


class Schedule(StrEnum):
    """The learning rate over the run: ``constant``, ``cosine`` to zero, or ``one_cycle`` (up, then to zero)."""

    constant = "constant"
    cosine = "cosine"
    one_cycle = "one_cycle"


class Expert(LightningModule):
    """A classifier fine-tuned on one task with cross-entropy.

    Args:
        network: ``small_resnet``, ``small_vit``, ``minilm`` or a classification architecture of torchvision.
        image_size: Height and width of the images in pixels, or the number of tokens of a text.
        weights: The name of pretrained weights, or none.
        options: Further arguments of the network's constructor.
        num_classes: The number of classes; none asks the datamodule when training starts.
        initial: A base checkpoint to start from (the shared initialisation), or none for `weights`.
        initial_seed: Of what is random in the shared initialisation; equal for all experts of an experiment.
        optimizer: ``sgd`` or ``adamw``.
        lr: The (peak) learning rate.
        momentum: Of ``sgd``.
        weight_decay: The L2 penalty's (``sgd``) or the decay's (``adamw``) factor.
        schedule: The learning rate's course, over all optimiser steps of the run.
        label_smoothing: The share of the target spread over all classes, in [0, 1).
        seed: Of dropout and the like; the state of the global generator is a function of this and the epoch alone.
        compile_network: Whether to run the network through `torch.compile`.

    Raises:
        ConfigurationError: An option is out of its range.
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
        optimizer: OptimizerKind = OptimizerKind.sgd,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = Schedule.one_cycle,
        label_smoothing: float = 0.0,
        seed: int = 0,
        compile_network: bool = False,
    ) -> None:
        super().__init__()
        options = options or {}
        optimizer = chosen(OptimizerKind, "optimizer", optimizer)
        schedule = chosen(Schedule, "schedule", schedule)
        self.save_hyperparameters(plain_options(locals()))
        _check("lr", lr, low=0.0, strict=True)
        _check("momentum", momentum, low=0.0, high=1.0)
        _check("weight_decay", weight_decay, low=0.0)
        _check("label_smoothing", label_smoothing, low=0.0, high=1.0)
        self.config = NetworkConfig(network, image_size, weights, options)
        self.network: nn.Module | None = None
        if num_classes is not None:
            self._build(num_classes)

    def configure_model(self) -> None:
        """Build the network when training starts, if the class count was left to the datamodule."""
        if self.network is None:
            datamodule = getattr(self.trainer, "datamodule", None)
            if datamodule is None:
                raise ConfigurationError("found no num_classes and no datamodule to ask, expected one of them")
            self.hparams["num_classes"] = datamodule.num_classes
            self._build(datamodule.num_classes)

    def on_fit_start(self) -> None:
        """Check the data against the network, and choose the axes of the metrics."""
        datamodule = getattr(self.trainer, "datamodule", None)
        self.config.check_content(getattr(datamodule, "content", self.config.reads))
        size = getattr(datamodule, "image_size", self.config.image_size)
        if size != self.config.image_size:
            raise ConfigurationError(
                f"found image_size={self.config.image_size} of the model and {size} of the data; set them equal"
            )
        own = self.hparams["num_classes"]
        if datamodule is not None and datamodule.num_classes != own:
            raise ConfigurationError(
                f"found num_classes={own} for a task of {datamodule.num_classes} classes; set them equal"
            )
        plot_against_epochs(self, [f"{stage}/{what}" for stage in ("train", "val") for what in ("loss", "accuracy")])

    def on_train_epoch_start(self) -> None:
        """Make dropout a function of (seed, epoch), so that a run resumed at an epoch equals an undisturbed one."""
        torch.manual_seed(int(self.hparams["seed"]) * 100_003 + self.current_epoch * 1_009 + self.global_rank)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of images ``[B, 3, H, W]``."""
        assert self.network is not None
        return self.network(images)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the batch's cross-entropy."""
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on the validation split."""
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on the test set."""
        self._step(batch, "test")

    def predict_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return class probabilities ``[B, C]``."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).softmax(1)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser and the schedule, which moves with every step.

        Raises:
            ConfigurationError: The run has no known length, as with ``max_time`` alone, and the schedule asks for one.
        """
        options = self.hparams
        lr, decay = options["lr"], options["weight_decay"]
        optimizer: Optimizer = AdamW(self.parameters(), lr, weight_decay=decay)
        if options["optimizer"] == OptimizerKind.sgd:
            optimizer = SGD(self.parameters(), lr, momentum=options["momentum"], weight_decay=decay)
        scheduler: LRScheduler
        if options["schedule"] == Schedule.one_cycle:
            scheduler = OneCycleLR(optimizer, lr, total_steps=self._steps(), cycle_momentum=False)
        elif options["schedule"] == Schedule.cosine:
            scheduler = CosineAnnealingLR(optimizer, self._steps())
        else:
            scheduler = ConstantLR(optimizer, factor=1.0, total_iters=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _steps(self) -> int:
        """Return the number of optimiser steps of the whole run, over which the learning rate moves."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ConfigurationError(
                f"found schedule='{self.hparams['schedule']}' for a run of no known length, expected its number of "
                "steps; set trainer.max_epochs or trainer.max_steps, or schedule=constant"
            )
        return int(steps)

    def _build(self, num_classes: int) -> None:
        initial = self.hparams["initial"]
        network = initial_network(
            self.config, num_classes, None if initial is None else Path(initial), seed=self.hparams["initial_seed"]
        )
        # Convolutions run fastest on channels-last tensors, on CPUs and GPUs alike; elsewhere it changes nothing.
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.hparams["compile_network"]:
            self.network.compile()
        self.accuracy = nn.ModuleDict(
            {f"{stage}_": MulticlassAccuracy(num_classes, average="micro") for stage in ("train", "val", "test")}
        )

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        smoothing = self.hparams["label_smoothing"] if stage == "train" else 0.0
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        accuracy = self.accuracy[f"{stage}_"]  # a ModuleDict refuses the key "train"
        assert isinstance(accuracy, MulticlassAccuracy)
        accuracy.update(logits, labels)
        shared: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(labels)}
        self.log(f"{stage}/loss", loss, sync_dist=stage != "train", **shared)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True, **shared)
        return loss


def _check(name: str, value: float, *, low: float, high: float | None = None, strict: bool = False) -> None:
    fits = (value > low if strict else value >= low) and (high is None or value < high)
    if not fits:
        bound = f"{'above' if strict else 'at least'} {low:g}" + ("" if high is None else f" and below {high:g}")
        raise ConfigurationError(f"found {name}={value}, expected a number {bound}")
