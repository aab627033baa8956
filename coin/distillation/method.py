"""The ensemble-distillation baseline: a merge method that trains."""

import logging
import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from coin.core.batches import joined, take
from coin.core.choices import check_integer, check_number, parse_enum
from coin.core.lightning import silence_lightning
from coin.core.processes import rank_zero_info
from coin.data import Augmentation, Calibration, pooled
from coin.data.loading import Batches
from coin.errors import ConfigurationError, NumericalError
from coin.files.tensors import not_finite
from coin.merging import CodedModel, Experts, Method
from coin.merging.method import Adapters, Compress
from coin.modules.distillation import AUTO, STARTS, DistillationModule
from coin.networks import BatchNormPolicy
from coin.networks.calling import as_input, clear_caches, clone
from coin.networks.guard import differentiable, trainable

HELD_OUT = 0.2  # the share of the calibration samples on which learning rates are judged


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
        if samples_per_task is not None:
            check_integer("samples_per_task", samples_per_task, 1)
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
        with torch.inference_mode(False), torch.enable_grad():
            lr = self.lr
            trial = None
            chosen: dict[str, Any] = {}
            if lr is None:
                losses, trial = self._try_rates(experts, row)
                lr = min(losses, key=losses.__getitem__)
                chosen = {
                    "lr": lr,
                    "held_out_loss": {str(rate): loss for rate, loss in losses.items()},
                }
            module = self._run(experts, row, lr, trial)
        if not_finite(dict(module.named_parameters())) is not None:
            raise NumericalError(f"{self.label} diverged with lr={lr}; give a smaller one")
        clear_caches(module.student)
        return CodedModel(module.student, chosen | module.chosen)

    def module(
        self,
        row: Sequence[float],
        student: nn.Module,
        teachers: nn.ModuleList | list[nn.Module],
        **options: Any,
    ) -> DistillationModule:
        """Return a new training for one row of the code, with some options changed."""
        own = {
            "lr": self.learning_rates[0] if self.lr is None else self.lr,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "samples_per_task": self.samples_per_task,
            "augmentation": self.augmentation,
            "start": self.start,
            "seed": self.seed,
        }
        return DistillationModule(student, teachers, list(row), **own | options)

    def _try_rates(
        self, experts: Experts, row: Sequence[float]
    ) -> tuple[dict[float, float], DistillationModule]:
        """Return the held-out loss by learning rate, infinite where training diverged; and the last trial."""
        losses: dict[float, float] = {}
        trial: DistillationModule | None = None
        for lr in self.learning_rates:
            rank_zero_info(f"{self.label}: trial of lr={lr:.3g}")
            trial = self._run(experts, row, lr, trial, is_trial=True)
            loss = trial.held_out_loss
            losses[lr] = loss if math.isfinite(loss) else math.inf
        assert trial is not None
        if math.isinf(min(losses.values())):
            expected = f"every learning rate of {self.learning_rates}"
            raise NumericalError(f"{self.label} diverged with {expected}; give smaller ones")
        return losses, trial

    def _run(
        self,
        experts: Experts,
        row: Sequence[float],
        lr: float,
        last: DistillationModule | None = None,
        is_trial: bool = False,
    ) -> DistillationModule:
        """Train a module: on all samples, or as a trial on those that are not held out.

        It reuses the experts of the `last` trial, and its start and their outputs if it is a trial too.
        """
        in_memory = experts.train is None
        own = {"augmentation": "none"} if in_memory else experts.train.run_options(self)
        teachers: nn.ModuleList | list[nn.Module]
        if last is not None:
            student = clone(last.student)
            teachers = last.teachers
        elif in_memory:
            student = experts.empty_model().eval()
            teachers = [clone(network, shared=True).eval() for network in experts.networks]
        else:
            student = experts.empty_model().eval()
            student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            # Of its own, which go where the Trainer is.
            teachers = nn.ModuleList(experts.source.each_network()).requires_grad_(False)
        module = self.module(row, student, teachers, **own, lr=lr)
        if last is not None and is_trial:
            module.begun = last.begun
            module.outputs = last.outputs
            module.held_out_outputs = last.held_out_outputs
        options = {
            "max_steps": self.steps,
            "max_epochs": -1,
            "log_every_n_steps": max(1, self.steps // 10),
            "check_val_every_n_epoch": None if is_trial else 1,
            "val_check_interval": self.steps if is_trial else None,  # once, at the end
            "limit_val_batches": 1.0 if is_trial else 0,
            "num_sanity_val_steps": 0,
        }
        fit = fit_in_memory if in_memory else experts.train.fit
        fit(module, experts, HELD_OUT if is_trial else 0.0, options)
        experts.passes += module.passes
        return module


def fit_in_memory(
    module: DistillationModule,
    experts: Experts,
    held_out: float,
    options: dict[str, Any],
) -> None:
    """Run a Trainer with these options, silently, on the samples but a held-out share, on which it validates."""
    # A DataError where samples differ in shape.
    whole = as_input(joined(list(experts.pooled)), experts.networks[0])
    batches = []
    for task in range(experts.count):
        own = (experts.tasks == task).nonzero().flatten()
        batches.append(take(whole, own))
    size = module.hparams["batch_size"]
    seed = module.hparams["seed"] or 0
    samples = pooled([Calibration.of([batch]) for batch in batches])
    module.samples = replace(samples, batch_size=size)
    left_out: Calibration | None = None
    if held_out:
        module.samples, left_out = module.samples.split(held_out)
    parameters = list(trainable(module.student).values())
    device = parameters[0].device
    trainer_options = {
        **options,
        "accelerator": device.type,
        "devices": 1 if device.index is None else [device.index],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with ExitStack() as at_end, warnings.catch_warnings(), differentiable(parameters):
        for name in ("lightning.pytorch", "lightning.fabric"):
            logger = logging.getLogger(name)
            at_end.callback(logger.setLevel, logger.level)
        silence_lightning()
        trainer = Trainer(**trainer_options)
        train = Batches(module.samples, size, trainer, seed, Augmentation.none)
        validation: Any = [] if left_out is None else Batches(left_out, size, trainer)
        trainer.fit(module, train, validation)
    module.student.to(device).zero_grad()
