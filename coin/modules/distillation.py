"""The LightningModule that trains a coded model on the experts' weighted outputs."""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Adam

from coin.core.batches import Batch, map_tensors
from coin.core.lightning import plot_against_epochs
from coin.modules.recipe import OneCycle
from coin.networks.calling import as_input, clear_caches, logits_of
from coin.networks.running import full_precision


class DistillationModule(LightningModule):
    """Trains a student, without labels, on ½ E‖f_θ(x) − Σ_i β_i f_i(x)‖². `coin.Distillation` makes it.

    Batches are positions ``[B]`` of samples, and their inputs.

    Args:
        student: The network that is trained, in eval mode.
        teachers: The experts, in eval mode.
        row: β, one weight per expert, non-negative and summing to 1.
        lr: Adam's peak learning rate.
        steps: The number of optimiser steps.
        targets: Σ_i β_i f_i(x) of all training samples ``[P, C]``; None runs the teachers on every batch.
        held_out_targets: The same of the validation samples.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        row: Sequence[float],
        lr: float,
        steps: int,
        targets: Tensor | None = None,
        held_out_targets: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters("row", "lr", "steps")
        self.student = student
        self.teachers = list(teachers)  # not submodules, which would be trained and shared out
        self.row = list(row)
        self.lr = lr
        self.steps = steps
        self.targets: Tensor | None
        self.held_out_targets: Tensor
        self.register_buffer("targets", targets, persistent=False)
        self.register_buffer("held_out_targets", held_out_targets, persistent=False)
        self.passes = 0.0
        self.held_out_loss = math.inf

    def train(self, mode: bool = True) -> Self:
        """Set the module's mode but keep the student in eval mode."""
        super().train(mode)
        self.student.eval()
        return self

    def on_fit_start(self) -> None:
        """Move the teachers to the Trainer's device, and choose the axes of the metrics."""
        for teacher in self.teachers:
            teacher.to(self.device)
        plot_against_epochs(self, ["train/loss", "val/loss"])

    def training_step(self, batch: tuple[Tensor, Batch], batch_idx: int) -> Tensor:
        """Return ½ mean‖f_θ(x) − Σ_i β_i f_i(x)‖² of a batch."""
        positions, inputs = batch
        self._count(len(positions), passes=3)
        target = self._run_teachers(inputs) if self.targets is None else self.targets[positions]
        return self._loss(inputs, target, "train")

    def validation_step(self, batch: tuple[Tensor, Batch], batch_idx: int) -> None:
        """Log the same loss on held-out samples."""
        positions, inputs = batch
        self._count(len(positions), passes=1)
        self._loss(inputs, self.held_out_targets[positions], "val")

    def on_validation_epoch_end(self) -> None:
        """Keep the held-out loss."""
        self.held_out_loss = float(self.trainer.callback_metrics["val/loss"])

    def configure_optimizers(self) -> Any:
        """Return Adam over the student's parameters, and one cycle of its rate, which advances every step."""
        optimizer = Adam(self.student.parameters(), self.lr)
        # A rise of exactly one step has no length, which OneCycleLR divides by; so it is a little longer.
        rise = 0.11 if self.steps == 10 else 0.1
        scheduler = OneCycle(
            optimizer, self.lr, self.steps, pct_start=rise, anneal_strategy="linear"
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _count(self, samples: int, passes: int) -> None:
        """Count the passes of so many samples on every process."""
        self.passes += samples * self.trainer.world_size * passes

    def _run_teachers(self, inputs: Batch) -> Tensor:
        """Return Σ_i β_i f_i(x) ``[B, C]``."""
        logits = []
        for teacher in self.teachers:
            own = map_tensors(
                torch.clone, as_input(inputs, teacher)
            )  # it may change its own in place
            with torch.no_grad():
                logits.append(logits_of(teacher, own))
        self._count(len(logits[0]), passes=len(self.teachers))
        outputs = torch.stack(logits)  # [N, B, C]
        return torch.tensordot(outputs.new_tensor(self.row), outputs, dims=1)  # type: ignore[no-any-return]

    def _loss(self, inputs: Batch, target: Tensor, stage: str) -> Tensor:
        """Return and log the loss of a batch."""
        # What the student has kept of its parameters, in eval mode: they have changed.
        clear_caches(self.student)
        logits = logits_of(self.student, as_input(inputs, self.student))
        difference = full_precision(logits) - full_precision(target)
        loss: Tensor = 0.5 * difference.square().sum(1).mean()
        self.log(
            f"{stage}/loss",
            loss,
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            prog_bar=True,
            batch_size=len(target),
        )
        return loss
