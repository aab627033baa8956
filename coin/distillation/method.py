"""The ensemble-distillation baseline: a merge method that trains."""

import itertools
import logging
import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from coin.coding import Code
from coin.core.batches import joined, take
from coin.core.choices import check_integer, check_number, parse_enum
from coin.core.lightning import silence_lightning
from coin.core.processes import rank_zero_info
from coin.data import Augmentation, Calibration, pooled
from coin.data.samples import BatchDataset
from coin.data.sampling import batch_loader
from coin.distillation.search import POINTS, TRIALS, SearchResult, search_curves, search_grid
from coin.errors import CoinWarning, ConfigurationError, NumericalError
from coin.files.tensors import not_finite
from coin.merging import CodedModel, Experts, Method, merge_networks
from coin.merging.method import Adapters, Compress, starting_method
from coin.modules.distillation import AUTO, DistillationModule, Schedule
from coin.networks import BatchNormPolicy
from coin.networks.calling import Forward, as_input, clear_caches, clone
from coin.networks.guard import differentiable, trainable


class Distillation(Method):
    """A network trained without labels on ½ E‖f_θ(x) − Σ_i β_i f_i(x)‖² over calibration data.

    It starts from a closed-form merge and trains in eval mode: BatchNorm keeps the running statistics of the start, and
    dropout is off. With `augmentation` every epoch has new views of the samples, on which the experts run too; held-out
    samples are never augmented.

    Without `lr`, learning rate and number of steps are chosen by the loss on held-out calibration samples, and the
    final run is on all samples; the method's cost includes this search. The older, plain recipe is ``start: average,
    augmentation: none, schedule: constant``.

    Source: the baseline of arXiv 2409.01420, after Lin et al., *Ensemble Distillation for Robust Model Fusion in
    Federated Learning*, NeurIPS 2020; the schedule: Smith and Topin, *Super-convergence* (2018).

    Args:
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
            fitted), or the name of a method that needs no shared initialisation, such as ``refit``.
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
        held_out: float = 0.2,
        samples_per_task: int | None = None,
        augmentation: Augmentation | None = None,
        schedule: Schedule = Schedule.one_cycle,
        start: str = AUTO,
        label: str | None = None,
        seed: int | None = None,
        compress: Compress = None,
        adapters: Adapters = None,
    ) -> None:
        learning_rates = [3e-4, 1e-3, 3e-3] if learning_rates is None else list(learning_rates)
        for name, rates in (("lr", [] if lr is None else [lr]), ("learning_rates", learning_rates)):
            for rate in rates:
                check_number(name, rate, low=0.0, strict=True)
        if not learning_rates or learning_rates != sorted(set(learning_rates)):
            raise ConfigurationError(f"found learning_rates={learning_rates}, expected at least one, rising")
        check_integer("steps", steps, 1)
        check_integer("batch_size", batch_size, 2)
        check_integer("samples_per_task", 1 if samples_per_task is None else samples_per_task, 1)
        check_integer("seed", seed or 0, 0)
        check_number("held_out", held_out, low=0.0, high=1.0, strict=True)
        if start != AUTO:
            starting_method(start)
        self.lr, self.learning_rates, self.steps, self.batch_size = lr, learning_rates, steps, batch_size
        self.held_out, self.samples_per_task, self.start, self.seed = held_out, samples_per_task, start, seed
        self.augments = augmentation not in (None, Augmentation.none)
        given = Augmentation.shift if augmentation is None else augmentation
        self.augmentation = str(parse_enum(Augmentation, "augmentation", given))
        self.schedule = parse_enum(Schedule, "schedule", schedule)
        super().__init__(label, compress, adapters=adapters)

    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Train the coded model for one row of the code, and count its cost; NumericalError if all runs diverge."""
        if experts.train is None and (self.augments or self.samples_per_task is not None):
            raise ConfigurationError("found augmentation or samples_per_task for batches in memory, taken as they are")
        lr, steps, described, trial = self.lr, self.steps, {}, None
        with torch.inference_mode(False), torch.enable_grad():
            if lr is None:
                choice, trial = self._search(experts, row)
                (lr, steps), described = choice.best, choice.config_dict
            module = self._run(experts, row, lr, steps, 0, trial)
        if not_finite(dict(module.named_parameters())) is not None:
            raise NumericalError(f"{self.label} diverged with lr={lr}; give a smaller one")
        clear_caches(module.student)
        return CodedModel(module.student, described | module.chosen)

    def module(self, row: Sequence[float], experts: Sequence[str] | None = None, **options: Any) -> DistillationModule:
        """Return a new training for one row of the code, of experts in these files, with some options changed."""
        same = ("steps", "batch_size", "samples_per_task", "augmentation", "start", "seed")
        own = {name: getattr(self, name) for name in same} | {"schedule": str(self.schedule)}
        own["lr"] = self.learning_rates[0] if self.lr is None else self.lr
        return DistillationModule(list(row), None if experts is None else list(experts), **own | options)

    def _search(self, experts: Experts, row: Sequence[float]) -> tuple[SearchResult, DistillationModule | None]:
        """Choose the learning rate and the number of steps on held-out samples; return the last trial too."""
        rates, steps = self.learning_rates, self.steps
        trial: DistillationModule | None = None
        is_grid = self.schedule is Schedule.one_cycle
        most, tried = TRIALS if is_grid else len(rates), itertools.count(1)

        def losses(lr: float, steps: int, every: int) -> list[float]:
            nonlocal trial
            rank_zero_info(f"{self.label}: trial {next(tried)}, at most {most}: lr={lr:.3g}, {steps} steps")
            trial = self._run(experts, row, lr, steps, every, trial)
            return [loss if math.isfinite(loss) else math.inf for loss in trial.losses or [math.inf]]

        if is_grid:
            choice = search_grid(lambda lr, steps: losses(lr, steps, steps)[-1], rates, steps)
        else:
            choice = search_curves(lambda lr, every: losses(lr, steps, every), rates, steps)
        if is_grid and choice.at_edge:
            lr, steps = choice.best
            told = f"chose lr={lr:.3g} and {steps} steps after {TRIALS} trials, at the edge of what it tried"
            mend = "begin nearer with learning_rates and steps"
            warnings.warn(f"method '{self.label}' {told}; {mend}", CoinWarning, stacklevel=2)
        if not any(map(math.isfinite, choice.losses.values())):
            raise NumericalError(f"{self.label} diverged with every learning rate of {rates}; give smaller ones")
        return choice, trial

    def _run(
        self, experts: Experts, row: Sequence[float], lr: float, steps: int, every: int, last: DistillationModule | None
    ) -> DistillationModule:
        """Train a module: on all samples, or as a trial that is validated every so many steps on the held-out ones.

        It reuses the experts of the `last` trial, and its start and their outputs if it is a trial too.
        """
        own = {"augmentation": "none"} if experts.train is None else experts.train.run_options(experts, self)
        module = self.module(row, **own, lr=lr, steps=steps)
        if last is not None:
            module.teachers, module.student = last.teachers, clone(last.student)
            if every:
                module.begun, module.known = last.begun, last.known
        elif experts.train is None:
            module.teachers = [clone(network, shared=True).eval() for network in experts.networks]
            module.student = experts.empty_model().eval()
        options: dict[str, Any] = {"max_steps": steps, "max_epochs": -1, "log_every_n_steps": max(1, steps // POINTS)}
        options |= {"val_check_interval": every or None, "check_val_every_n_epoch": None if every else 1}
        options |= {"limit_val_batches": 1.0 if every else 0, "num_sanity_val_steps": 0}
        fit = fit_in_memory if experts.train is None else experts.train.fit
        fit(module, experts, self.held_out if every else 0.0, options)
        experts.passes += module.passes
        return module


def distill(
    networks: Sequence[nn.Module],
    code: Code,
    calibration: Sequence[Iterable[Any]],
    *,
    forward: Forward | None = None,
    **options: Any,
) -> list[nn.Module]:
    """Distil N experts into coded models: R new networks in eval mode, one per row of the code, R×N.

    It is `coin.merge_networks` with `Distillation`, whose options are the others.

    >>> coin.distill(experts, code, inputs, lr=0.01, steps=1)
    [Linear(in_features=4, out_features=3, bias=True)]
    """
    return merge_networks(Distillation(**options), networks, code, calibration=calibration, forward=forward)


def fit_in_memory(module: DistillationModule, experts: Experts, held_out: float, options: dict[str, Any]) -> None:
    """Run a Trainer with these options, silently, on the samples but a held-out share, on which it validates."""
    whole = as_input(joined(list(experts.pooled)), experts.networks[0])  # a DataError where samples differ in shape
    own = [take(whole, (experts.tasks == task).nonzero().flatten()) for task in range(experts.count)]
    size, seed = module.hparams["batch_size"], module.hparams["seed"] or 0
    samples = replace(pooled([Calibration.of_batches([batch]) for batch in own]), batch_size=size)
    module.samples, left_out = samples.split(held_out) if held_out else (samples, None)
    train = batch_loader(BatchDataset(module.samples), size, seed, None, shuffle=True)
    validation: Any = batch_loader(BatchDataset(left_out), size, seed, None) if left_out else []
    parameters = trainable(module.student).values()
    device = next(iter(parameters)).device
    with ExitStack() as until_then, warnings.catch_warnings(), differentiable(parameters):
        for logger in (logging.getLogger("lightning.pytorch"), logging.getLogger("lightning.fabric")):
            until_then.callback(logger.setLevel, logger.level)
        silence_lightning()
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        options |= dict.fromkeys((*quiet, "use_distributed_sampler"), False)
        devices = 1 if device.index is None else [device.index]
        Trainer(accelerator=device.type, devices=devices, **options).fit(module, train, validation)
    module.student.to(device).zero_grad()
