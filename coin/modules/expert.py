"""The LightningModule that fine-tunes one expert on one task (or pretrains a base)."""

from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics.classification import MulticlassAccuracy

from coin.core.lightning import plot_against_epochs
from coin.errors import ConfigurationError
from coin.modules.recipe import OneCycle, Recipe, SchedulerCallable, parameter_groups, squared_distance, trainable_names
from coin.networks import NetworkConfig
from coin.networks.files import fill_head, initial_network
from coin.networks.heads import without_head


class Expert(LightningModule):
    """A classifier fine-tuned on one task with cross-entropy.

    Args:
        network: ``small_resnet``, ``small_vit``, ``minilm``; a classifier of torchvision; ``timm/NAME``;
            ``hf/FOLDER_OR_ID`` of Hugging Face's; or the import path of an `nn.Module` that takes ``num_classes``.
        image_size: Height and width of the images in pixels, or the number of tokens of a text.
        weights: The name of pretrained weights, or a file of the network's own tensors; None for random ones.
        options: Further arguments of the network's constructor.
        num_classes: The number of classes; by default the datamodule's, when training starts.
        initial: A base checkpoint to start from (the shared initialisation); by default `weights`.
        initial_seed: The seed of the shared initialisation; equal for all experts of an experiment.
        seed: The seed of dropout and the like, together with the epoch. None is 0, or ``--seed_everything``.
        optimizer: A class of `torch.optim`: its name, ``class_path`` and ``init_args``, or a `functools.partial` of it;
            by default SGD with momentum 0.9.
        lr_scheduler: A class of `torch.optim.lr_scheduler` likewise; None is a constant rate.
        **recipe: The other training options; see `coin.modules.recipe.Recipe`.
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
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: SchedulerCallable | None = OneCycle,  # type: ignore[assignment]
        **recipe: Any,
    ) -> None:
        super().__init__()
        options = options or {}
        self.recipe = Recipe(optimizer=optimizer, lr_scheduler=lr_scheduler, **recipe)  # type: ignore[arg-type]
        own = {name: value for name, value in locals().items() if name not in ("self", "__class__", "recipe")}
        self.save_hyperparameters(own | {each.name: getattr(self.recipe, each.name) for each in fields(Recipe)})
        self.config = NetworkConfig(network, image_size, weights, options)
        self.network: Any = None
        self._start: dict[str, Tensor] = {}
        self._begun: int | None = None
        if num_classes is not None:
            self._build(num_classes)

    def configure_model(self) -> None:
        """Build the network when training starts, if the class count was left to the datamodule; fill a frozen head."""
        trainer = self._trainer  # none where the class is used without one
        datamodule = getattr(trainer, "datamodule", None)
        if self.network is None:
            if datamodule is None:
                raise ConfigurationError("found no num_classes and no datamodule to ask, expected one of them")
            self.hparams["num_classes"] = datamodule.num_classes
            self._build(datamodule.num_classes)
        zero_shot = getattr(datamodule, "zero_shot", None)
        if zero_shot is not None or (trainer is not None and trainer.state.fn == "fit"):  # a checkpoint brings its head
            fill_head(self.network, self.config, zero_shot, type(datamodule).__name__)

    def on_fit_start(self) -> None:
        """Check the data against the network, and choose the axes of the metrics."""
        datamodule = getattr(self.trainer, "datamodule", None)
        content = getattr(datamodule, "content", self.config.reads)
        self.config.check_content(content, getattr(datamodule, "vocabulary", None))
        for name, own in (("image_size", self.config.image_size), ("num_classes", self.hparams["num_classes"])):
            if (given := getattr(datamodule, name, own)) != own:
                raise ConfigurationError(f"found {name}={own} of the model and {given} of the data; set them equal")
        plot_against_epochs(self, [f"{stage}/{what}" for stage in ("train", "val") for what in ("loss", "accuracy")])

    def train(self, mode: bool = True) -> Self:
        """Switch to training or evaluation mode; BatchNorm stays in eval mode with `freeze_batchnorm`."""
        super().train(mode)
        if self.recipe.freeze_batchnorm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def on_train_start(self) -> None:
        """Move the shared initialisation to the parameters' device."""
        self._start = {name: tensor.to(self.device) for name, tensor in self._start.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the shared initialisation, if the L²-SP penalty needs it."""
        if self._start:
            checkpoint["l2_sp_start"] = dict(self._start)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the shared initialisation of the checkpoint, even if the file `initial` has changed."""
        schedule: dict[str, Any] = next(iter(checkpoint.get("lr_schedulers", [])), {})
        self._begun = schedule.get("total_steps", schedule.get("T_max"))
        kept = checkpoint.get("l2_sp_start", {})
        self._start = {name: kept.get(name, tensor) for name, tensor in self._start.items()}

    def on_train_epoch_start(self) -> None:
        """Seed dropout by (seed, epoch), so that a run resumed at an epoch equals an uninterrupted one."""
        torch.manual_seed(int(self.hparams["seed"] or 0) * 100_003 + self.current_epoch * 1_009 + self.global_rank)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of images ``[B, 3, H, W]``."""
        return self.network(images)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the batch's cross-entropy, which is logged, plus the penalty ½·l2_sp·‖θ − θ₀‖²."""
        loss = self._step(batch, "train")
        if not self._start:
            return loss
        return loss + 0.5 * self.recipe.l2_sp * squared_distance(dict(self.network.named_parameters()), self._start)

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

    def configure_optimizers(self) -> Any:
        """Return the optimiser, and the schedule, which steps with it; ConfigurationError if it began with another."""
        optimizer = self.recipe.make_optimizer(parameter_groups(self.network, self.recipe.head_lr))
        steps = self.trainer.estimated_stepping_batches
        scheduler = self.recipe.make_scheduler(optimizer, steps)
        if scheduler is None:
            return optimizer
        if self._begun not in (None, steps):
            told = f"found a checkpoint of a schedule of {self._begun} steps, expected {steps}, as long as this run"
            raise ConfigurationError(f"{told}; give the trainer.max_epochs that it began with, or --model.initial")
        monitor = getattr(scheduler, "monitor", None)  # that of Lightning's ReduceLROnPlateau
        every = {"interval": "step"} if monitor is None else {"monitor": monitor}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **every}}

    def _build(self, num_classes: int) -> None:
        initial, seed = self.hparams["initial"], self.hparams["initial_seed"]
        network = initial_network(self.config, num_classes, None if initial is None else Path(initial), seed=seed)
        trained = trainable_names(network, self.recipe.trainable)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in trained)
        parameter_groups(network, self.recipe.head_lr)  # refuses a rate of a head that is not trained
        if self.recipe.l2_sp:
            state = network.state_dict()
            self._start = {name: state[name].clone() for name in without_head(network, trained)}
        # Convolutions run fastest on channels-last tensors, on CPUs and GPUs alike; elsewhere it changes nothing.
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train(self.training)
        stages = ("train_", "val_", "test_")
        self.accuracy = nn.ModuleDict({stage: MulticlassAccuracy(num_classes, average="micro") for stage in stages})

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        images, labels = batch
        logits, expected = self(images), (len(labels), self.hparams["num_classes"])
        if (shape := getattr(logits, "shape", None)) != expected:
            found = type(logits).__name__ if shape is None else f"a tensor {list(shape)}"
            told = f"found {found} from the network '{self.config.name}', expected logits [samples, classes] ="
            raise ConfigurationError(f"{told} {list(expected)}; mend its forward, or what it does with num_classes")
        smoothing = self.recipe.label_smoothing if stage == "train" else 0.0
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        accuracy: Any = self.accuracy[f"{stage}_"]  # a ModuleDict refuses the key "train"
        accuracy.update(logits, labels)
        shared: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(labels)}
        self.log(f"{stage}/loss", loss, sync_dist=stage != "train", **shared)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True, **shared)
        return loss
