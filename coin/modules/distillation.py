"""The LightningModule that trains a coded model on the experts' weighted outputs."""

from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Adam

from coin.core.batches import Batch
from coin.core.devices import device_of
from coin.core.lightning import plot_against_epochs
from coin.data import Augmentation
from coin.data.tasks import tasks_of
from coin.errors import HeadError
from coin.merging import Average, Experts, HeadFit
from coin.merging.experts import check_row
from coin.merging.method import starting_method
from coin.modules.recipe import OneCycle
from coin.networks import build_network, fill_network, load_network, pad_head
from coin.networks.calling import as_input, clear_caches
from coin.networks.running import full_precision
from coin.networks.weights import to_compute


class Schedule(StrEnum):
    """The learning rate over the run: ``one_cycle`` (up, then to zero) or ``constant``."""

    one_cycle = "one_cycle"
    constant = "constant"


AUTO = "auto"  # start with the head fitted, where there is one that can be: a fully connected layer with a bias


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
        start: str,
        batch_size: int,
        samples_per_task: int | None,
        seed: int | None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.student: Any = None  # the network that is trained, in eval mode; its weights are replaced by the start
        self.teachers: nn.ModuleList | list[nn.Module] = []  # the experts, in eval mode
        self.samples: Any = None  # the Calibration to train on, in the order of their positions; or the datamodule's
        self.passes = 0.0
        self.losses: list[float] = []  # held out, one a validation
        self.chosen: dict[str, Any] = {}
        self.begun: dict[str, Tensor] | None = None  # the student's tensors at the start, where they are known already
        # The experts' logits [N, ·, C], by held-out batch; by None for training samples that never change.
        self.known: dict[int | None, Tensor] = {}

    def configure_model(self) -> None:
        """Load the experts and build the student; its weights are replaced when training starts."""
        if self.student is not None:
            return
        paths, row = self.hparams["experts"] or [], self.hparams["code_row"]
        check_row(row, len(paths))
        files = [load_network(Path(path)) for path in paths]
        outputs = max(file.num_classes for file in files)
        self.teachers = nn.ModuleList([pad_head(file.network, outputs).requires_grad_(False) for file in files])
        self.student = build_network(files[0].config, outputs).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

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
        if self.hparams["augmentation"] == Augmentation.none and None not in self.known:
            with torch.no_grad():
                outputs = [self.expert_outputs(as_input(batch, self.student)) for batch in self.samples]
            self.known[None] = torch.cat(outputs, dim=1)
            self.passes += self.samples.num_samples * len(self.teachers)

    def _begin(self) -> None:
        """Initialise the student with the start, which is computed if necessary."""
        if self.begun is None:
            samples = self.samples
            tasks = [samples.subset((samples.part == task).nonzero().flatten()) for task in range(len(samples.parts))]
            experts = Experts(to_compute(list(self.teachers), device_of(self.student)), calibration=tasks)
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

    def training_step(self, batch: tuple[Tensor, Batch], batch_idx: int) -> Tensor:
        """Return ½ mean‖f_θ(x) − Σ_i β_i f_i(x)‖² of one batch of positions and inputs."""
        known = self.known[None][:, batch[0]] if None in self.known else None
        return self._loss(batch, known, "train")[0]

    def validation_step(self, batch: tuple[Tensor, Batch], batch_idx: int) -> None:
        """Log the same loss on held-out samples."""
        _, self.known[batch_idx] = self._loss(batch, self.known.get(batch_idx), "val")

    def on_validation_epoch_end(self) -> None:
        """Keep the held-out loss."""
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

    def _loss(self, batch: tuple[Tensor, Batch], outputs: Tensor | None, stage: str) -> tuple[Tensor, Tensor]:
        """Log the loss on a batch; return it and the experts' logits ``[N, B, C]``, computed unless they are known."""
        (positions, inputs), together = batch, len(batch[0]) * self.trainer.world_size
        self.passes += together * (3 if stage == "train" else 1)
        if outputs is None:
            self.passes += together * len(self.teachers)
            with torch.no_grad():
                outputs = self.expert_outputs(inputs)
        clear_caches(self.student)  # what it keeps of its parameters in eval mode: they have changed
        target = torch.tensordot(outputs.new_tensor(self.hparams["code_row"]), outputs, dims=1)
        loss: Tensor = 0.5 * (full_precision(self.student(inputs)) - full_precision(target)).square().sum(1).mean()
        shared: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "prog_bar": True}
        self.log(f"{stage}/loss", loss, batch_size=len(positions), **shared)
        return loss, outputs
