"""The ensemble-distillation baseline: coded models trained on the experts' weighted outputs."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR

from coin.core.batches import Batch, as_input, clear_caches, clone, twin
from coin.core.choices import check_integer, check_number, parse_enum
from coin.data import Augmentation
from coin.errors import CoinWarning, ConfigurationError, HeadError, NumericalError
from coin.files.tensors import not_finite
from coin.merging import Average, CodedModel, Experts, HeadFit, Method
from coin.merging.checks import check_row
from coin.merging.method import Compress, starting_method
from coin.modules.recipe import Schedule
from coin.modules.search import POINTS, TRIALS, Choice, search_curves, search_grid
from coin.modules.shared import plain_options, plot_against_epochs, tasks_of
from coin.modules.training import MemoryTraining, Training
from coin.networks import BatchNormPolicy, build_network, fill_network, load_network, pad_head
from coin.networks.stages import full_precision

AUTO = "auto"
"""Start with the head fitted, where there is one that can be: a fully connected layer with a bias."""


class Distillation(LightningModule, Method):
    """A network trained without labels on ½ E‖f_θ(x) − Σ_i β_i f_i(x)‖² over calibration data.

    Training starts from a closed-form merge, in eval mode throughout: BatchNorm keeps the running statistics of the
    start (policy ``keep``) and dropout is off. The data is a `coin.data.Tasks`. With `augmentation` every epoch has new
    views of the samples, on which the experts run too; held-out samples are never augmented.

    In an experiment's list of methods, `experts` and `code_row` are set by the experiment. Without `lr`, learning rate
    and number of steps are chosen by the loss on held-out calibration samples, and the final run is on all samples; the
    method's cost includes this search. With `merge_networks` it trains in memory on the calibration batches, with a
    silent Trainer of its own.

    The defaults are those of a fair baseline. The older, plain recipe is ``start: average, augmentation: none,
    schedule: constant``.

    Source: the baseline of arXiv 2409.01420, after Lin et al., *Ensemble Distillation for Robust Model Fusion in
    Federated Learning*, NeurIPS 2020; the schedule: Smith and Topin, *Super-convergence* (2018).

    Args:
        experts: The experts' safetensors files.
        code_row: β, one weight per expert, non-negative and summing to 1.
        lr: Adam's (peak) learning rate; None chooses it together with the number of steps.
        learning_rates: The learning rates that the search starts with, ascending.
        steps: The number of optimiser steps; in a search the first number tried, or with a constant learning rate the
            largest.
        batch_size: Samples per step and process.
        held_out: The share of the calibration samples held out for the search.
        samples_per_task: P, at least 1; by default the experiment's.
        augmentation: The augmentation in training: ``none``, ``crop``, ``crop_flip`` or ``shift``; by default ``shift``
            for stored images. Batches in memory are never augmented.
        schedule: The learning-rate schedule: ``one_cycle`` or ``constant``.
        start: The closed-form merge to start from: ``auto`` (``head_fit``, or ``average`` if the head cannot be
            fitted), a method's name, or its ``class_path`` and ``init_args`` (`coin.merging.method.starting_method`).
        label: The name of this variant in results and files.
        seed: The seed of the samples' order; by default the experiment's, or 0 in memory.
    """

    name = "distillation"
    is_trained = True
    batchnorm = BatchNormPolicy.keep

    def __init__(
        self,
        experts: list[str] | None = None,
        code_row: list[float] | None = None,
        lr: float | None = None,
        learning_rates: list[float] | None = None,
        steps: int = 150,
        batch_size: int = 64,
        held_out: float = 0.2,
        samples_per_task: int | None = None,
        augmentation: Augmentation | None = None,
        schedule: Schedule = Schedule.one_cycle,
        start: str | dict[str, Any] = AUTO,
        label: str | None = None,
        seed: int | None = None,
        compress: Compress = None,
    ) -> None:
        super().__init__()
        self.augments = augmentation not in (None, Augmentation.none)
        augmentation = Augmentation.shift if augmentation is None else augmentation
        learning_rates = [3e-4, 1e-3, 3e-3] if learning_rates is None else list(learning_rates)
        augmentation = parse_enum(Augmentation, "augmentation", augmentation)
        schedule = parse_enum(Schedule, "schedule", schedule)
        self.save_hyperparameters(plain_options(locals()))
        if lr is not None:
            check_number("lr", lr, low=0.0, strict=True)
        for rate in learning_rates:
            check_number("learning_rates", rate, low=0.0, strict=True)
        if not learning_rates or learning_rates != sorted(set(learning_rates)):
            raise ConfigurationError(f"found learning_rates={learning_rates}, expected at least one, rising")
        check_integer("steps", steps, 1)
        check_integer("batch_size", batch_size, 2)
        check_number("held_out", held_out, low=0.0, high=1.0, strict=True)
        for name, number, least in (("samples_per_task", samples_per_task, 1), ("seed", seed, 0)):
            if number is not None:
                check_integer(name, number, least)
        if schedule is Schedule.cosine:
            raise ConfigurationError("found schedule=cosine, expected one_cycle or constant")
        if start != AUTO:
            starting_method(start)
        self.label, self.compress = self.validated_label(label), self.compressed(compress)
        self.samples_per_task = samples_per_task
        self.augmentation = str(augmentation)
        self.student: Any = None  # the network that is trained, once there is one
        self.teachers: nn.ModuleList | list[nn.Module] = []
        self.readouts = nn.ModuleList()
        self.passes = 0.0
        self.losses: list[float] = []
        self.chosen: dict[str, Any] = {}
        self.begun: dict[str, Tensor] | None = None
        """The student's tensors at the start, where they are known already; made when training starts otherwise."""
        self.known: dict[int | None, Tensor] = {}
        """The experts' logits ``[N, ·, C]``: for training samples that never change, and for each held-out batch."""

    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Train the coded model for one row of the code, and count its cost; see `coin.merging.Method.make`.

        Without `lr`, the pair of learning rate and number of steps with the smallest held-out loss is chosen; the final
        run is on all samples. Raises NumericalError if all runs diverge.
        """
        lr, steps, described, trial = self.hparams["lr"], self.hparams["steps"], {}, None
        with torch.inference_mode(False), torch.enable_grad():
            if lr is None:
                choice, trial = self._search(experts, row)
                (lr, steps), described = choice.best, choice.described
            module = self._run(experts, row, lr, steps, before=trial)
        if not_finite(dict(module.named_parameters())) is not None:
            raise NumericalError(f"{self.label} diverged with lr={lr}; give a smaller one")
        clear_caches(module.student)
        return CodedModel(module.student, described | module.chosen)

    def _search(self, experts: Experts, row: Sequence[float]) -> tuple[Choice, "Distillation | None"]:
        """Choose the learning rate and the number of steps on held-out samples; return the last trial too."""
        rates, steps, share = (self.hparams[name] for name in ("learning_rates", "steps", "held_out"))
        samples = self._training(experts).num_samples(experts, self.samples_per_task)
        held_out = max(1, round(share * samples))
        if samples - held_out < 2:
            raise ConfigurationError(
                f"found {samples} pooled calibration samples for distillation, {held_out} of them held out to choose "
                "its learning rate on, expected at least 2 others to train on; raise samples_per_task or give it an lr"
            )
        trial: Distillation | None = None

        def losses(lr: float, steps: int, every: int) -> list[float]:
            nonlocal trial
            trial = self._run(experts, row, lr, steps, held_out=share, every=every, before=trial)
            return trial.losses

        def last_loss(lr: float, steps: int) -> float:
            found = losses(lr, steps, steps)
            return found[-1] if found and math.isfinite(found[-1]) else math.inf

        if self.hparams["schedule"] == Schedule.one_cycle:
            choice = search_grid(last_loss, rates, steps)
            if choice.at_edge:
                lr, steps = choice.best
                warnings.warn(
                    f"method '{self.label}' chose lr={lr:.3g} and {steps} steps after {TRIALS} trials, at the "
                    "edge of what it tried; begin nearer with learning_rates and steps",
                    CoinWarning,
                    stacklevel=2,
                )
        else:
            choice = search_curves(lambda lr, every: losses(lr, steps, every), rates, steps)
        if not any(map(math.isfinite, choice.losses.values())):
            raise NumericalError(f"{self.label} diverged with every learning rate of {rates}; give smaller ones")
        return choice, trial

    def _run(
        self,
        experts: Experts,
        row: Sequence[float],
        lr: float,
        steps: int,
        *,
        held_out: float = 0.0,
        every: int | None = None,
        before: "Distillation | None" = None,
    ) -> "Distillation":
        """Train a module with these options, validated at regular steps on the held-out share of the samples.

        It reuses the experts of a trial `before`, and, if both are trials on the same samples, their cached outputs.
        """
        training = self._training(experts)
        options = dict(self.hparams) | training.run_options(experts, self.hparams)
        module = type(self)(**options | {"code_row": list(row), "lr": lr, "steps": steps})
        if before is not None:
            module.hold(before.teachers, clone(before.student))
            if held_out:
                module.begun, module.known = before.begun, before.known
        elif isinstance(training, MemoryTraining):
            module.hold([twin(network).eval() for network in experts.networks], experts.empty_model().eval())
        trainer_options = {
            "max_steps": steps,
            "max_epochs": -1,
            "log_every_n_steps": max(1, steps // POINTS),
            "num_sanity_val_steps": 0,
            "val_check_interval": every if held_out else None,
            "check_val_every_n_epoch": None if held_out else 1,
            "limit_val_batches": 1.0 if held_out else 0,
        }
        training.fit(module, experts, held_out, trainer_options)
        experts.passes += module.passes
        return module

    def _training(self, experts: Experts) -> Training:
        """Return the training of the experts' source, or one on the samples in memory, which cannot be augmented."""
        if experts.train is not None:
            training: Training = experts.train
            return training
        if self.augments or self.samples_per_task is not None:
            name = "augmentation" if self.samples_per_task is None else "samples_per_task"
            raise ConfigurationError(
                f"found {name}={self.hparams[name]} for calibration batches in memory, which are taken as they are, "
                "expected none; leave it out"
            )
        return MemoryTraining()

    def hold(self, teachers: nn.ModuleList | list[nn.Module], student: nn.Module) -> None:
        """Set the experts, in eval mode, and the student; its weights are replaced by the start."""
        self.teachers, self.student = teachers, student

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
        if not paths or row is None or len(row) != len(paths):
            raise ConfigurationError(
                f"found {len(paths)} experts and code_row={row}, expected one weight for each expert"
            )
        check_row(row, len(paths))
        files = [load_network(Path(path)) for path in paths]
        outputs = max(file.num_classes for file in files)
        teachers = nn.ModuleList([pad_head(file.network, outputs).requires_grad_(False) for file in files])
        student = build_network(files[0].config, outputs)
        self.hold(teachers, student.to(memory_format=torch.channels_last).eval())  # type: ignore[call-overload]

    def setup(self, stage: str) -> None:
        """Set the augmentation of the data."""
        if stage == "fit":
            tasks_of(self).augmentation = Augmentation(self.hparams["augmentation"])

    def train(self, mode: bool = True) -> "Distillation":
        """Set the module's mode but keep all networks in eval mode, in which the target outputs are computed."""
        super().train(mode)
        for network in self.children():
            network.eval()
        return self

    def on_fit_start(self) -> None:
        """Initialise the student unless a checkpoint did, and run the experts once on unaugmented samples."""
        plot_against_epochs(self, ["train/loss", "val/loss"])
        if fresh := self.trainer.ckpt_path is None:
            self._begin()
        if self.hparams["augmentation"] != Augmentation.none or None in self.known:
            return
        calibration = tasks_of(self).training_calibration()
        with torch.no_grad():
            batches = [as_input(batch, self.student) for batch in calibration]
            self.known[None] = torch.cat([self.expert_outputs(batch) for batch in batches], dim=1)
        if fresh:
            self.passes += calibration.num_samples * len(self.teachers)

    def _begin(self) -> None:
        """Initialise the student with the start, which is computed if necessary."""
        if self.begun is None:
            samples = tasks_of(self).training_calibration()
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
        fill_network(self.student, self.begun, f"the start of {self.name}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the cost so far and the held-out losses."""
        checkpoint["distillation"] = {"passes": self.passes, "losses": list(self.losses)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the cost and the held-out losses."""
        kept = checkpoint.get("distillation", {})
        self.passes, self.losses = kept.get("passes", self.passes), list(kept.get("losses", self.losses))

    def forward(self, inputs: Batch) -> Tensor:
        """Return the coded model's logits ``[B, C]``."""
        return self.student(inputs)  # type: ignore[no-any-return]

    def expert_outputs(self, inputs: Batch) -> Tensor:
        """Return the experts' logits ``[N, B, C]``."""
        return torch.stack([network(inputs) for network in self.teachers])

    def target(self, outputs: Tensor) -> Tensor:
        """Return Σ_i β_i f_i(x), logits ``[B, C]``, from the experts' ``[N, B, C]``."""
        row = outputs.new_tensor(self.hparams["code_row"])
        return torch.tensordot(row, outputs, dims=1)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Batch], batch_idx: int) -> Tensor:
        """Return ½ mean‖f_θ(x) − target‖² of one batch of positions and inputs."""
        return self._coding_loss(self(batch[1]), self.target(self._training_outputs(*batch)), "train")

    def validation_step(self, batch: tuple[Tensor, Batch], batch_idx: int) -> None:
        """Log the same loss on held-out samples."""
        positions, inputs = batch
        self.passes += len(positions) * self.trainer.world_size
        if batch_idx not in self.known:
            if not self.losses:  # a method's cost is the same however often its training is interrupted
                self.passes += len(self.teachers) * len(positions) * self.trainer.world_size
            self.known[batch_idx] = self.expert_outputs(inputs)
        self._coding_loss(self(inputs), self.target(self.known[batch_idx]), "val")

    def on_validation_epoch_end(self) -> None:
        """Store the held-out loss, one number per validation."""
        if not self.trainer.sanity_checking:
            self.losses.append(float(self.trainer.callback_metrics["val/loss"]))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return Adam over the trained parameters, and the schedule, which advances every step."""
        if (lr := self.hparams["lr"]) is None:
            raise ConfigurationError("found no lr; give one, or let 'coin merge' or 'coin run' choose it")
        optimizer = Adam([*self.student.parameters(), *self.readouts.parameters()], lr)
        scheduler: LRScheduler = ConstantLR(optimizer, factor=1.0, total_iters=0)
        if self.hparams["schedule"] == Schedule.one_cycle:
            # A rise of exactly one step has no length, which OneCycleLR divides by; so it is a little longer.
            steps = self.hparams["steps"]
            rise = 0.1 if 0.1 * steps != 1 else 0.11
            scheduler = _OneCycle(
                optimizer, lr, total_steps=steps, pct_start=rise, anneal_strategy="linear", cycle_momentum=False
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _training_outputs(self, positions: Tensor, inputs: Batch) -> Tensor:
        """Return the experts' logits ``[N, B, C]`` for a training batch, and count the step's cost."""
        self.passes += 3 * len(positions) * self.trainer.world_size
        if None in self.known:
            return self.known[None][:, positions]
        self.passes += len(self.teachers) * len(positions) * self.trainer.world_size
        with torch.no_grad():
            return self.expert_outputs(inputs)

    def _coding_loss(self, output: Tensor, target: Tensor, stage: str) -> Tensor:
        loss: Tensor = 0.5 * (full_precision(output) - full_precision(target)).square().sum(1).mean()
        self._log(f"{stage}/loss", loss, len(output), prog_bar=True)
        return loss

    def _log(self, name: str, loss: Tensor, samples: int, *, prog_bar: bool = False) -> None:
        self.log(name, loss, on_step=False, on_epoch=True, batch_size=samples, sync_dist=True, prog_bar=prog_bar)


class _OneCycle(OneCycleLR):
    """One cycle, and after its last step the learning rate that it ended with."""

    def get_lr(self) -> list[float | Tensor]:
        return self.get_last_lr() if self.last_epoch >= self.total_steps else super().get_lr()
