"""The ensemble-distillation baseline: a coded model trained on the experts' weighted outputs."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Adam

from coin.choices import chosen
from coin.data import Augmentation
from coin.data.tasks import Tasks
from coin.errors import ConfigurationError
from coin.merging.method import check_label, check_row
from coin.modules.axes import plot_against_epochs
from coin.networks import (
    BatchNormPolicy,
    average_buffers,
    build_network,
    fill_network,
    full_precision,
    load_network,
    widen_network,
)
from coin.state import weighted_sum


class Distillation(LightningModule):
    """A network trained without labels on ½ E‖f_θ(x) − Σ_i β_i f_i(x)‖² over calibration data.

    It starts from the β-average of the experts and stays in eval mode throughout: BatchNorm keeps the β-average of
    the experts' running statistics (policy ``keep``) and dropout is off, since the outputs to be met are those of
    eval mode. Its data is a `coin.data.Tasks`.

    With an `augmentation` every epoch sees other views of the samples, and the experts answer to each of them; the
    samples that the choices are made on are never augmented.

    An experiment names it among its methods and fills in `experts` and `code_row`; with `lr` left open, the learning
    rate and the number of steps are those of the lowest loss on held-out calibration samples, over `learning_rates`
    and some ten points of `steps`, and the final run is on all of them. All of that counts as the method's cost.

    Source: the baseline of arXiv 2409.01420, after Lin et al., *Ensemble Distillation for Robust Model Fusion in
    Federated Learning*, NeurIPS 2020.

    Args:
        experts: The experts' safetensors files.
        code_row: β, one weight an expert, non-negative and summing to 1.
        lr: Adam's learning rate; none has it chosen from `learning_rates`.
        learning_rates: What to choose from.
        steps: The number of optimiser steps (the most, where they are chosen).
        batch_size: Samples a step and process.
        held_out: The share of the calibration samples held out to choose on.
        samples_per_task: P, at least 1; none takes the experiment's.
        augmentation: What happens to the samples in training: ``none``, ``crop``, ``crop_flip`` or ``shift``.
        label: What results and files call this variant.

    Raises:
        ConfigurationError: An option is out of its range.
    """

    name = "distillation"
    batchnorm = BatchNormPolicy.keep

    def __init__(
        self,
        experts: list[str] | None = None,
        code_row: list[float] | None = None,
        lr: float | None = None,
        learning_rates: list[float] | None = None,
        steps: int = 300,
        batch_size: int = 64,
        held_out: float = 0.2,
        samples_per_task: int | None = None,
        augmentation: Augmentation = Augmentation.none,
        label: str | None = None,
    ) -> None:
        super().__init__()
        rates = [3e-4, 1e-3] if learning_rates is None else learning_rates
        if not rates or not all(0 < rate < float("inf") for rate in [*rates, *([] if lr is None else [lr])]):
            raise ConfigurationError(f"found learning rates {rates} and lr={lr}, expected positive numbers")
        if steps < 1 or batch_size < 2:
            raise ConfigurationError(f"found steps={steps}, batch_size={batch_size}, expected at least 1 and 2")
        if samples_per_task is not None and samples_per_task < 1:
            raise ConfigurationError(f"found samples_per_task={samples_per_task}, expected at least 1, or none")
        if not 0 < held_out < 1:
            raise ConfigurationError(f"found held_out={held_out}, expected a share above 0 and below 1")
        chosen(Augmentation, "augmentation", augmentation)
        # Given by name: within LightningCLI, Lightning would take the command's own model options instead.
        self.save_hyperparameters(
            {
                "experts": experts,
                "code_row": code_row,
                "lr": lr,
                "learning_rates": list(rates),
                "steps": steps,
                "batch_size": batch_size,
                "held_out": held_out,
                "samples_per_task": samples_per_task,
                "augmentation": str(augmentation),
                "label": label,
            }
        )
        self.label = check_label(self.name if label is None else label)
        self.steps = steps
        self.student: nn.Module | None = None
        self.teachers = nn.ModuleList()
        self.passes = 0.0
        self.losses: list[float] = []
        self._outputs: Tensor | None = None

    def configure_model(self) -> None:
        """Read the experts and build their β-average."""
        if self.student is not None:
            return
        paths, row = self.hparams["experts"], self.hparams["code_row"]
        if not paths or row is None or len(row) != len(paths):
            raise ConfigurationError(
                f"found {len(paths or [])} experts and code_row={row}, expected one weight for each expert"
            )
        check_row(row, len(paths))
        files = [load_network(Path(path)) for path in paths]
        outputs = max(file.num_classes for file in files)
        networks = [widen_network(file, outputs).requires_grad_(False) for file in files]
        parameters = weighted_sum([dict(network.named_parameters()) for network in networks], row)
        buffers = average_buffers([dict(network.named_buffers()) for network in networks], row)
        student = build_network(files[0].config, outputs)
        fill_network(
            student, {**parameters, **{k: v for k, v in buffers.items() if k in student.state_dict()}}, "the average"
        )
        self.student = student.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.teachers = nn.ModuleList(networks)

    def setup(self, stage: str) -> None:
        """Have the data augmented as the options say."""
        if stage == "fit":
            self._data().augmentation = Augmentation(self.hparams["augmentation"])

    def train(self, mode: bool = True) -> "Distillation":
        """Set the mode, but leave all networks in eval mode."""
        super().train(mode)
        for network in (self.student, self.teachers):
            if network is not None:
                network.eval()
        return self

    def on_fit_start(self) -> None:
        """Choose the axes of the metrics, and run the experts over training samples that never change once."""
        plot_against_epochs(self, ["train/loss", "val/loss"])
        if self.hparams["augmentation"] != Augmentation.none:
            return
        calibration = self._data().training_calibration()
        with torch.no_grad():
            self._outputs = torch.cat([self.expert_outputs(batch.to(self.device)) for batch in calibration], dim=1)
        if self.trainer.ckpt_path is None:  # a method's cost is the same however often its training is interrupted
            self.passes += calibration.num_samples * len(self.teachers)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the training has cost so far, and the held-out losses."""
        checkpoint["distillation"] = {"passes": self.passes, "losses": list(self.losses)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting from there."""
        kept = checkpoint.get("distillation", {})
        self.passes, self.losses = kept.get("passes", self.passes), list(kept.get("losses", self.losses))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the coded model's logits ``[B, C]``."""
        assert self.student is not None
        return self.student(inputs)  # type: ignore[no-any-return]

    def expert_outputs(self, inputs: Tensor) -> Tensor:
        """Return the experts' logits ``[N, B, C]``."""
        return torch.stack([network(inputs) for network in self.teachers])

    def target(self, outputs: Tensor) -> Tensor:
        """Return Σ_i β_i f_i(x), logits ``[B, C]``, from the experts' ``[N, B, C]``."""
        row = torch.tensor(self.hparams["code_row"]).to(outputs)
        target: Tensor = torch.tensordot(row, outputs, dims=1)
        return target

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return ½ mean‖f_θ(x) − target‖² of one batch of positions and inputs."""
        return self._coding_loss(self(batch[1]), self.target(self._training_outputs(*batch)), "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the same on held-out samples."""
        _, inputs = batch
        self.passes += (1 + len(self.teachers)) * len(inputs) * self.trainer.world_size
        self._coding_loss(self(inputs), self.target(self.expert_outputs(inputs)), "val")

    def on_validation_epoch_end(self) -> None:
        """Keep the held-out loss, one number a validation."""
        if not self.trainer.sanity_checking:
            self.losses.append(float(self.trainer.callback_metrics["val/loss"]))

    def configure_optimizers(self) -> Adam | OptimizerLRSchedulerConfig:
        """Return Adam over the coded model's parameters alone."""
        return self._adam()

    def _adam(self) -> Adam:
        assert self.student is not None
        if self.hparams["lr"] is None:
            raise ConfigurationError("found no lr; give one, or let 'coin merge' or 'coin run' choose it")
        return Adam(self.student.parameters(), self.hparams["lr"])

    def _training_outputs(self, positions: Tensor, inputs: Tensor) -> Tensor:
        """Return the experts' logits ``[N, B, C]`` for a training batch, and count what the step costs."""
        self.passes += 3 * len(inputs) * self.trainer.world_size
        if self._outputs is not None:
            return self._outputs[:, positions]
        self.passes += len(self.teachers) * len(inputs) * self.trainer.world_size
        with torch.no_grad():
            return self.expert_outputs(inputs)

    def _coding_loss(self, output: Tensor, target: Tensor, stage: str) -> Tensor:
        loss: Tensor = 0.5 * (full_precision(output) - full_precision(target)).square().sum(1).mean()
        self.log(
            f"{stage}/loss", loss, on_step=False, on_epoch=True, batch_size=len(output), sync_dist=True, prog_bar=True
        )
        return loss

    def _data(self) -> Tasks:
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, Tasks):
            raise ConfigurationError(f"found data of {type(data).__name__}, expected Tasks; set data.class_path: Tasks")
        return data
