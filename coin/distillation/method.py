"""The ensemble-distillation baseline: a merge method that trains."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from coin.core.choices import check_integer, check_number, parse_enum
from coin.core.lightning import quiet_lightning
from coin.core.processes import rank_zero_info
from coin.data import Augmentation
from coin.data.loading import Batches
from coin.errors import ConfigurationError, HeadError, NumericalError
from coin.files.tensors import not_finite
from coin.merging import Average, CodedModel, Coin, Experts, HeadFit, Method, Refit, RegMean
from coin.merging.method import Adapters, Compress
from coin.modules.distillation import DistillationModule
from coin.networks import BatchNormPolicy
from coin.networks.calling import clear_caches, clone
from coin.networks.guard import differentiable, trainable
from coin.statistics.statistic import DataChoice

STARTS: dict[str, type[Method]] = {
    kind.name: kind for kind in (Average, HeadFit, Coin, RegMean, Refit)
}
AUTO = "auto"  # start with the head fitted, where there is one that can be: a fully connected layer with a bias


class Distillation(Method):
    """A network trained without labels on ½ E‖f_θ(x) − Σ_i β_i f_i(x)‖² over calibration data.

    It starts from a closed-form merge and trains in eval mode: BatchNorm keeps the running statistics of the start, and
    dropout is off. With `augmentation` every epoch has new views of the samples, on which the experts run too; held-out
    samples are never augmented.

    Without `lr`, the learning rate is chosen by the loss on held-out calibration samples, and the final run is on all
    samples; the method's cost includes these trials.

    Source: the baseline of arXiv 2409.01420, after Lin et al., *Ensemble Distillation for Robust Model Fusion in
    Federated Learning*, NeurIPS 2020; the schedule: Smith and Topin, *Super-convergence* (2018).

    Args:
        lr: Adam's peak learning rate; None chooses it.
        learning_rates: The learning rates to choose from; by default 3e-4, 1e-3 and 3e-3.
        steps: The number of optimiser steps.
        batch_size: Samples per step and process.
        samples_per_task: P, at least 1; by default the experiment's.
        augmentation: The augmentation in training: ``none``, ``crop``, ``crop_flip`` or ``shift``; by default ``shift``
            for stored images. Batches in memory are never augmented.
        start: The closed-form merge to start from: ``auto`` (``head_fit``, or ``average`` if the head cannot be
            fitted), ``average``, ``head_fit``, ``coin``, ``regmean`` or ``refit``.
        label: The name of this variant in results and files.
        seed: The seed of the samples' order; by default the experiment's, or 0 in memory.

    >>> coin.merge_networks(coin.Distillation(lr=0.01, steps=1), experts, code, calibration=inputs).chosen
    [{'start': 'head_fit'}]
    """

    name = "distillation"
    is_trained = True
    batchnorm = BatchNormPolicy.keep

    def __init__(
        self,
        lr: float | None = None,
        learning_rates: list[float] | None = None,
        steps: int = 150,
        batch_size: int = 64,
        samples_per_task: int | None = None,
        augmentation: Augmentation | None = None,
        start: str = AUTO,
        label: str | None = None,
        seed: int | None = None,
        compress: Compress = None,
        adapters: Adapters = None,
    ) -> None:
        rates = [3e-4, 1e-3, 3e-3] if learning_rates is None else list(learning_rates)
        for rate in rates:
            check_number("learning_rates", rate, low=0.0, strict=True)
        if not rates:
            raise ConfigurationError("found learning_rates=[], expected at least one")
        if lr is not None:
            check_number("lr", lr, low=0.0, strict=True)
        check_integer("steps", steps, 1)
        check_integer("batch_size", batch_size, 2)
        check_integer("samples_per_task", 1 if samples_per_task is None else samples_per_task, 1)
        check_integer("seed", seed or 0, 0)
        if start not in [AUTO, *STARTS]:
            raise ConfigurationError(
                f"found start={start!r}, expected one of {', '.join([AUTO, *STARTS])}"
            )
        self.lr = lr
        self.learning_rates = rates
        self.steps = steps
        self.batch_size = batch_size
        self.samples_per_task = samples_per_task
        self.start = start
        self.seed = seed
        self.augments = augmentation not in (None, Augmentation.none)
        self.augmentation = str(
            parse_enum(Augmentation, "augmentation", augmentation or Augmentation.shift)
        )
        super().__init__(label, compress, adapters=adapters)

    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Train the coded model for one row of the code, and count its cost; NumericalError if all runs diverge."""
        if experts.train is None and (self.augments or self.samples_per_task is not None):
            raise ConfigurationError(
                "found augmentation or samples_per_task for batches in memory, taken as they are"
            )
        chosen: dict[str, Any] = {}
        with torch.inference_mode(False), torch.enable_grad():
            own = self._in_memory(experts)
            lr = self.lr
            if lr is None:
                losses = self._held_out_losses(own, row)
                lr = min(losses, key=losses.__getitem__)
                chosen["lr"] = lr
                chosen["held_out_loss"] = {str(rate): loss for rate, loss in losses.items()}
            start = self._start(own, row)
            module = self._train(own, start.network, row, lr)
        experts.passes += own.passes
        if not_finite(dict(module.student.named_parameters())) is not None:
            raise NumericalError(f"{self.label} diverged with lr={lr}; give a smaller one")
        return CodedModel(module.student, chosen | start.chosen)

    def _in_memory(self, experts: Experts) -> Experts:
        """Return the experts in memory, in eval mode, with the samples that this method trains on."""
        networks = [clone(each, shared=True).eval() for each in experts.source.each_network()]
        if experts.train is None:
            given = experts.samples(DataChoice.own)
            calibration = [replace(each, batch_size=self.batch_size) for each in given]
        else:
            calibration = experts.train.calibration(self)
        return Experts(networks, calibration=calibration, train=experts.train)

    def _start(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Return the closed form that training starts from."""
        kind = STARTS.get(self.start, HeadFit)
        try:
            made = kind().coded_model(experts, row)
        except HeadError:
            if self.start != AUTO:
                raise
            kind = Average
            made = kind().coded_model(experts, row)
        chosen = {**made.chosen, "start": kind.name}
        chosen.pop("held_out_residual", None)
        return CodedModel(made.network, chosen)

    def _held_out_losses(self, experts: Experts, row: Sequence[float]) -> dict[float, float]:
        """Return the loss on the held-out samples by learning rate, infinite where training on the others diverged."""
        fitted, _ = experts.split
        tasks = experts.tasks[: fitted.num_samples]
        of_tasks = [(tasks == task).nonzero().flatten() for task in range(experts.count)]
        calibration = [fitted.subset(places) for places in of_tasks]
        without_held_out = Experts(experts.networks, calibration=calibration)
        start = self._start(without_held_out, row)
        experts.passes += without_held_out.passes
        losses = {}
        for lr in self.learning_rates:
            rank_zero_info(f"{self.label}: trial of lr={lr:.3g}")
            loss = self._train(experts, start.network, row, lr, is_trial=True).held_out_loss
            losses[lr] = loss if math.isfinite(loss) else math.inf
        if math.isinf(min(losses.values())):
            expected = f"every learning rate of {self.learning_rates}"
            raise NumericalError(f"{self.label} diverged with {expected}; give smaller ones")
        return losses

    def _train(
        self,
        experts: Experts,
        start: nn.Module,
        row: Sequence[float],
        lr: float,
        is_trial: bool = False,
    ) -> DistillationModule:
        """Train a copy of the start: on all samples, or as a trial on those that are not held out."""
        augmentation = Augmentation.none
        seed = self.seed
        if experts.train is not None:
            augmentation = Augmentation(self.augmentation)
            seed = experts.train.seed if seed is None else seed
        fitted, held_out = experts.split
        targets = None
        if augmentation is Augmentation.none:
            targets = experts.mixture(row, 0) if is_trial else experts.mixture(row, 0, 1)
        held_out_targets = experts.mixture(row, 1) if is_trial else None
        student = clone(start)
        if experts.train is not None:  # images: convolutions run fastest on channels-last tensors
            student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        module = DistillationModule(
            student, experts.networks, row, lr, self.steps, targets, held_out_targets
        )
        with quiet_lightning(), differentiable(trainable(student).values()):
            trainer = self._trainer(experts, is_trial)
            samples = fitted if is_trial else experts.pooled
            train = Batches(samples, self.batch_size, trainer, seed or 0, augmentation)
            trainer.fit(module, train, Batches(held_out, self.batch_size, trainer))
        for network in (student, *experts.networks):
            network.to(experts.source.device)
        student.zero_grad()
        clear_caches(student)
        experts.passes += module.passes
        return module

    def _trainer(self, experts: Experts, is_trial: bool) -> Trainer:
        """Return a Trainer of so many steps, which validates a trial once at the end; in memory it is silent."""
        options: dict[str, Any] = {
            "max_steps": self.steps,
            "max_epochs": -1,
            "log_every_n_steps": max(1, self.steps // 10),
            "check_val_every_n_epoch": None,
            "val_check_interval": self.steps,
            "limit_val_batches": 1.0 if is_trial else 0,
            "num_sanity_val_steps": 0,
        }
        if experts.train is not None:
            return experts.train.trainer(is_final=not is_trial, **options)  # type: ignore[no-any-return]
        device = experts.source.device
        return Trainer(
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
