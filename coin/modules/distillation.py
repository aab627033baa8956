"""The LightningModule that trains a coded model on the experts' weighted outputs."""

import math
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Adam

from coin.core.batches import Batch, map_tensors
from coin.core.devices import device_of
from coin.core.lightning import plot_against_epochs
from coin.data import Augmentation
from coin.data.tasks import tasks_of
from coin.errors import HeadError
from coin.merging import Average, Coin, Experts, HeadFit, Refit, RegMean
from coin.merging.method import CodedModel, Method
from coin.modules.recipe import OneCycle
from coin.networks import fill_network
from coin.networks.calling import as_input, clear_caches, logits_of
from coin.networks.running import full_precision
from coin.networks.weights import to_compute

STARTS: dict[str, type[Method]] = {
    kind.name: kind for kind in (Average, HeadFit, Coin, RegMean, Refit)
}
AUTO = "auto"  # start with the head fitted, where there is one that can be: a fully connected layer with a bias


class DistillationModule(LightningModule):
    """One training of a network, without labels, on ½ E‖f_θ(x) − Σ_i β_i f_i(x)‖².

    `coin.Distillation` makes it, and describes the other options. The data is a `coin.data.Tasks`, or loaders of its
    `samples`.

    Args:
        student: The network that is trained, in eval mode; its weights are replaced by the start.
        teachers: The experts, in eval mode.
        code_row: β, one weight per expert, non-negative and summing to 1.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: nn.ModuleList | list[nn.Module],
        code_row: list[float],
        lr: float,
        steps: int,
        augmentation: str,
        start: str,
        batch_size: int,
        samples_per_task: int | None,
        seed: int | None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["student", "teachers"])
        self.student = student
        self.teachers = teachers
        self.samples: Any = None  # the Calibration to train on, in the order of their positions; or the datamodule's
        self.passes = 0.0
        self.held_out_loss = math.inf
        self.chosen: dict[str, Any] = {}
        # Computed once for all trials: the student's tensors at the start, and the experts' logits [N, ·, C]
        # of training samples that never change, and of each held-out batch.
        self.begun: dict[str, Tensor] | None = None
        self.outputs: Tensor | None = None
        self.held_out_outputs: dict[int, Tensor] = {}

    def setup(self, stage: str) -> None:
        """Take the samples of the datamodule, and set its augmentation."""
        if stage == "fit" and self.samples is None:
            data = tasks_of(self)
            data.augmentation = Augmentation(self.hparams["augmentation"])
            self.samples, _ = data.fitted_and_held_out()

    def train(self, mode: bool = True) -> Self:
        """Set the module's mode but keep all networks in eval mode."""
        super().train(mode)
        for network in self.children():
            network.eval()
        return self

    def on_fit_start(self) -> None:
        """Initialise the student, and run the experts once on unaugmented samples."""
        plot_against_epochs(self, ["train/loss", "val/loss"])
        if self.begun is None:
            self.begun = self._start()
        fill_network(self.student, self.begun, "the start of the distillation")
        if self.hparams["augmentation"] == Augmentation.none and self.outputs is None:
            with torch.no_grad():
                inputs = [as_input(batch, self.student) for batch in self.samples]
                outputs = [self.expert_outputs(batch) for batch in inputs]
            self.outputs = torch.cat(outputs, dim=1)
            self.passes += self.samples.num_samples * len(self.teachers)

    def _start(self) -> dict[str, Tensor]:
        """Make the merge that training starts from; return its tensors, the same on all processes."""
        tasks = []
        for task in range(len(self.samples.stored)):
            own = (self.samples.part == task).nonzero().flatten()
            tasks.append(self.samples.subset(own))
        teachers = to_compute(list(self.teachers), device_of(self.student))
        experts = Experts(teachers, calibration=tasks)
        name, made = self._merge(experts)
        self.passes += experts.passes
        self.chosen = made.chosen | {"start": name}
        self.chosen.pop("held_out_residual", None)
        state: dict[str, Tensor] = made.network.state_dict()
        if self.trainer.world_size > 1:
            on_cpu = {key: tensor.cpu() for key, tensor in state.items()}
            state = self.trainer.strategy.broadcast(on_cpu)
        return state

    def _merge(self, experts: Experts) -> tuple[str, CodedModel]:
        """Return the name of the closed form to start from, and its coded model."""
        row = self.hparams["code_row"]
        if self.hparams["start"] != AUTO:
            method = STARTS[self.hparams["start"]]()
            return method.name, method.coded_model(experts, row)
        try:
            return HeadFit.name, HeadFit().coded_model(experts, row)
        except HeadError:
            return Average.name, Average().coded_model(experts, row)

    def expert_outputs(self, inputs: Batch) -> Tensor:
        """Return the experts' logits ``[N, B, C]``."""
        logits = []
        for network in self.teachers:
            own = map_tensors(torch.clone, inputs)  # which it may change in place
            logits.append(logits_of(network, own))
        return torch.stack(logits)

    def training_step(self, batch: tuple[Tensor, Batch], batch_idx: int) -> Tensor:
        """Return ½ mean‖f_θ(x) − Σ_i β_i f_i(x)‖² of one batch of positions and inputs."""
        known = None if self.outputs is None else self.outputs[:, batch[0]]
        loss, _ = self._loss(batch, known, "train")
        return loss

    def validation_step(self, batch: tuple[Tensor, Batch], batch_idx: int) -> None:
        """Log the same loss on held-out samples."""
        known = self.held_out_outputs.get(batch_idx)
        _, self.held_out_outputs[batch_idx] = self._loss(batch, known, "val")

    def on_validation_epoch_end(self) -> None:
        """Keep the held-out loss."""
        self.held_out_loss = float(self.trainer.callback_metrics["val/loss"])

    def configure_optimizers(self) -> Any:
        """Return Adam over the trained parameters, and one cycle of its rate, which advances every step."""
        lr = self.hparams["lr"]
        steps = self.hparams["steps"]
        optimizer = Adam(self.student.parameters(), lr)
        # A rise of exactly one step has no length, which OneCycleLR divides by; so it is a little longer.
        rise = 0.11 if steps == 10 else 0.1
        scheduler = OneCycle(optimizer, lr, steps, pct_start=rise, anneal_strategy="linear")
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _loss(
        self, batch: tuple[Tensor, Batch], outputs: Tensor | None, stage: str
    ) -> tuple[Tensor, Tensor]:
        """Log the loss on a batch; return it and the experts' logits ``[N, B, C]``, computed unless they are known."""
        positions, inputs = batch
        count = len(positions)
        together = count * self.trainer.world_size
        self.passes += together * (3 if stage == "train" else 1)
        if outputs is None:
            self.passes += together * len(self.teachers)
            with torch.no_grad():
                outputs = self.expert_outputs(inputs)
        # What it keeps of its parameters in eval mode: they have changed.
        clear_caches(self.student)
        row = outputs.new_tensor(self.hparams["code_row"])
        target = torch.tensordot(row, outputs, dims=1)  # [B, C]
        difference = full_precision(logits_of(self.student, inputs)) - full_precision(target)
        loss: Tensor = 0.5 * difference.square().sum(1).mean()
        self.log(
            f"{stage}/loss",
            loss,
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            prog_bar=True,
            batch_size=count,
        )
        return loss, outputs
