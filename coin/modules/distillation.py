"""The LightningModule that trains a coded model on the experts' weighted outputs."""

from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Adam

from coin.core.batches import Batch, as_input, clear_caches
from coin.core.lightning import plot_against_epochs
from coin.data import Augmentation, Calibration
from coin.data.tasks import tasks_of
from coin.errors import HeadError
from coin.merging import Average, Experts, HeadFit
from coin.merging.experts import check_row
from coin.merging.method import starting_method
from coin.networks import build_network, fill_network, load_network, pad_head
from coin.networks.heads import full_precision
from coin.networks.recipe import OneCycle


class Schedule(StrEnum):
    """The learning rate over the run: ``one_cycle`` (up, then to zero) or ``constant``."""

    one_cycle = "one_cycle"
    constant = "constant"


AUTO = "auto"
"""Start with the head fitted, where there is one that can be: a fully connected layer with a bias."""


class DistillationModule(LightningModule):
    """One training of a network, without labels, on ½ E‖f_θ(x) − Σ_i β_i f_i(x)‖².

    `coin.Distillation` makes it, and describes the other options. The data is a `coin.data.Tasks`, or loaders of its
    `samples`.

    Args:
        code_row: β, one weight per expert, non-negative and summing to 1.
        experts: The experts' safetensors files; None for networks in memory, set as `teachers` and `student`.
    """

    def __init__(
        self,
        code_row: list[float],
        experts: list[str] | None,
        lr: float,
        steps: int,
        augmentation: str,
        schedule: str,
        start: str | dict[str, Any],
        batch_size: int,
        samples_per_task: int | None,
        seed: int | None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.student: Any = None  # the network that is trained, in eval mode; its weights are replaced by the start
        self.teachers: nn.ModuleList | list[nn.Module] = []  # the experts, in eval mode
        self.samples: Calibration | None = None  # to train on, in the order of their positions; or the datamodule's
        self.passes = 0.0
        self.losses: list[float] = []
        self.chosen: dict[str, Any] = {}
        self.begun: dict[str, Tensor] | None = None  # the student's tensors at the start, where they are known already
        # The experts' logits [N, ·, C], by held-out batch; by None for training samples that never change.
        self.known: dict[int | None, Tensor] = {}

    def on_train_batch_start(self, *_: Any) -> None:
        """Clear what the student caches of its parameters in eval mode: they have changed."""
        clear_caches(self.student)

    def on_validation_batch_start(self, *_: Any) -> None:
        """Clear the student's cache, as before a training step."""
        clear_caches(self.student)

    def configure_model(self) -> None:
        """Load the experts and build the student; its weights are replaced when training starts."""
        if self.student is not None:
            return
        paths, row = self.hparams["experts"] or [], self.hparams["code_row"]
        check_row(row, len(paths))
        files = [load_network(Path(path)) for path in paths]
        outputs = max(file.num_classes for file in files)
        teachers = nn.ModuleList([pad_head(file.network, outputs).requires_grad_(False) for file in files])
        student = build_network(files[0].config, outputs)
        self.teachers, self.student = teachers, student.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    def setup(self, stage: str) -> None:
        """Take the samples of the datamodule, and set its augmentation."""
        if stage == "fit" and self.samples is None:
            data = tasks_of(self)
            data.augmentation = Augmentation(self.hparams["augmentation"])
            self.samples = data.training_calibration()

    def train(self, mode: bool = True) -> "DistillationModule":
        """Set the module's mode but keep all networks in eval mode."""
        super().train(mode)
        for network in self.children():
            network.eval()
        return self

    def on_fit_start(self) -> None:
        """Initialise the student unless a checkpoint did, and run the experts once on unaugmented samples."""
        plot_against_epochs(self, ["train/loss", "val/loss"])
        if self.trainer.ckpt_path is None:
            self._begin()
        if self.hparams["augmentation"] != Augmentation.none or None in self.known:
            return
        assert self.samples is not None
        with torch.no_grad():
            batches = [as_input(batch, self.student) for batch in self.samples]
            self.known[None] = torch.cat([self.expert_outputs(batch) for batch in batches], dim=1)
        self.passes += self.samples.num_samples * len(self.teachers)

    def _begin(self) -> None:
        """Initialise the student with the start, which is computed if necessary."""
        if self.begun is None:
            samples = self.samples
            assert samples is not None
            tasks = [samples.subset((samples.part == task).nonzero().flatten()) for task in range(len(samples.parts))]
            experts = Experts(list(self.teachers), calibration=tasks)
            start, row = self.hparams["start"], self.hparams["code_row"]
            if start == AUTO:
                try:
                    made, start = HeadFit().make(experts, row), HeadFit.name
                except HeadError:
                    made, start = Average().make(experts, row), Average.name
            else:
                made = starting_method(start).make(experts, row)
            self.begun = made.network.state_dict()
            self.passes += experts.passes
            self.chosen = {name: value for name, value in made.chosen.items() if name != "held_out_error"}
            self.chosen["start"] = start
            if self.trainer.world_size > 1:  # all processes must start alike, to the last bit
                here = {name: tensor.cpu() for name, tensor in self.begun.items()}
                self.begun = self.trainer.strategy.broadcast(here)
        fill_network(self.student, self.begun, "the start of the distillation")

    def expert_outputs(self, inputs: Batch) -> Tensor:
        """Return the experts' logits ``[N, B, C]``."""
        return torch.stack([network(inputs) for network in self.teachers])

    def target(self, outputs: Tensor) -> Tensor:
        """Return Σ_i β_i f_i(x), logits ``[B, C]``, from the experts' ``[N, B, C]``."""
        row = outputs.new_tensor(self.hparams["code_row"])
        return torch.tensordot(row, outputs, dims=1)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Batch], batch_idx: int) -> Tensor:
        """Return ½ mean‖f_θ(x) − target‖² of one batch of positions and inputs."""
        positions, inputs = batch
        together = len(positions) * self.trainer.world_size
        self.passes += 3 * together
        if None in self.known:
            return self._loss(inputs, self.known[None][:, positions], "train")
        self.passes += len(self.teachers) * together
        with torch.no_grad():
            outputs = self.expert_outputs(inputs)
        return self._loss(inputs, outputs, "train")

    def validation_step(self, batch: tuple[Tensor, Batch], batch_idx: int) -> None:
        """Log the same loss on held-out samples."""
        positions, inputs = batch
        together = len(positions) * self.trainer.world_size
        self.passes += together
        if batch_idx not in self.known:
            self.passes += len(self.teachers) * together
            self.known[batch_idx] = self.expert_outputs(inputs)
        self._loss(inputs, self.known[batch_idx], "val")

    def on_validation_epoch_end(self) -> None:
        """Store the held-out loss, one number per validation."""
        if not self.trainer.sanity_checking:
            self.losses.append(float(self.trainer.callback_metrics["val/loss"]))

    def configure_optimizers(self) -> Any:
        """Return Adam over the trained parameters, and the schedule, which advances every step."""
        lr, steps = self.hparams["lr"], self.hparams["steps"]
        optimizer = Adam(self.student.parameters(), lr)
        if self.hparams["schedule"] == Schedule.constant:
            return {"optimizer": optimizer}
        # A rise of exactly one step has no length, which OneCycleLR divides by; so it is a little longer.
        scheduler = OneCycle(optimizer, lr, steps, pct_start=0.11 if steps == 10 else 0.1, anneal_strategy="linear")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _loss(self, inputs: Batch, outputs: Tensor, stage: str) -> Tensor:
        """Return and log the loss on a batch, for which these are the experts' logits ``[N, B, C]``."""
        output, target = self.student(inputs), self.target(outputs)
        loss: Tensor = 0.5 * (full_precision(output) - full_precision(target)).square().sum(1).mean()
        shared: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "prog_bar": True}
        self.log(f"{stage}/loss", loss, batch_size=len(output), **shared)
        return loss
