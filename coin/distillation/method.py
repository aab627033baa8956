"""The ensemble-distillation baseline: a merge method that trains."""

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from coin.coding import Code
from coin.core.batches import Forward, clear_caches, clone, twin
from coin.core.choices import check_integer, check_number, parse_enum
from coin.core.processes import rank_zero_info
from coin.data import Augmentation
from coin.distillation.search import POINTS, TRIALS, SearchResult, search_curves, search_grid
from coin.distillation.training import MemoryTraining
from coin.errors import CoinWarning, ConfigurationError, NumericalError
from coin.files.tensors import not_finite
from coin.merging import CodedModel, Experts, Method, merge_networks
from coin.merging.method import Compress, starting_method
from coin.modules.distillation import AUTO, DistillationModule, Schedule
from coin.networks import BatchNormPolicy


class Distillation(Method):
    """A network trained without labels on ½ E‖f_θ(x) − Σ_i β_i f_i(x)‖² over calibration data.

    It starts from a closed-form merge, and trains in eval mode throughout: BatchNorm keeps the running statistics of
    the start and dropout is off. With `augmentation` every epoch has new views of the samples, on which the experts run
    too; held-out samples are never augmented.

    Without `lr`, learning rate and number of steps are chosen by the loss on held-out calibration samples, and the
    final run is on all samples; the method's cost includes this search. The defaults are those of a fair baseline; the
    older, plain recipe is ``start: average, augmentation: none, schedule: constant``.

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
            fitted), a method's name, or its ``class_path`` and ``init_args`` (`coin.merging.method.starting_method`).
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
        start: str | dict[str, Any] = AUTO,
        label: str | None = None,
        seed: int | None = None,
        compress: Compress = None,
    ) -> None:
        learning_rates = [3e-4, 1e-3, 3e-3] if learning_rates is None else list(learning_rates)
        for name, rates in (("lr", [] if lr is None else [lr]), ("learning_rates", learning_rates)):
            for rate in rates:
                check_number(name, rate, low=0.0, strict=True)
        if not learning_rates or learning_rates != sorted(set(learning_rates)):
            raise ConfigurationError(f"found learning_rates={learning_rates}, expected at least one, rising")
        for name, number, least in (
            ("steps", steps, 1),
            ("batch_size", batch_size, 2),
            ("samples_per_task", samples_per_task, 1),
            ("seed", seed, 0),
        ):
            if number is not None:
                check_integer(name, number, least)
        check_number("held_out", held_out, low=0.0, high=1.0, strict=True)
        if start != AUTO:
            starting_method(start)
        self.lr, self.learning_rates, self.steps, self.batch_size = lr, learning_rates, steps, batch_size
        self.held_out, self.samples_per_task, self.start, self.seed = held_out, samples_per_task, start, seed
        self.augments = augmentation not in (None, Augmentation.none)
        given = Augmentation.shift if augmentation is None else augmentation
        self.augmentation = str(parse_enum(Augmentation, "augmentation", given))
        self.schedule = parse_enum(Schedule, "schedule", schedule)
        super().__init__(label, compress)

    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Train the coded model for one row of the code, and count its cost; NumericalError if all runs diverge."""
        lr, steps, described, trial = self.lr, self.steps, {}, None
        with torch.inference_mode(False), torch.enable_grad():
            if lr is None:
                choice, trial = self._search(experts, row)
                (lr, steps), described = choice.best, choice.config_dict
            module = self._run(experts, row, lr, steps, before=trial)
        if not_finite(dict(module.named_parameters())) is not None:
            raise NumericalError(f"{self.label} diverged with lr={lr}; give a smaller one")
        clear_caches(module.student)
        return CodedModel(module.student, described | module.chosen)

    def module(self, row: Sequence[float], experts: Sequence[str] | None = None, **options: Any) -> DistillationModule:
        """Return a new training for one row of the code, of experts in these files, with some options changed."""
        own = {
            "lr": self.learning_rates[0] if self.lr is None else self.lr,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "samples_per_task": self.samples_per_task,
            "augmentation": self.augmentation,
            "schedule": str(self.schedule),
            "start": self.start,
            "seed": self.seed,
        }
        return DistillationModule(list(row), None if experts is None else list(experts), **own | options)

    def _search(self, experts: Experts, row: Sequence[float]) -> tuple[SearchResult, DistillationModule | None]:
        """Choose the learning rate and the number of steps on held-out samples; return the last trial too."""
        rates, steps, share = self.learning_rates, self.steps, self.held_out
        samples = self._training(experts).num_samples(experts, self.samples_per_task)
        held_out = max(1, round(share * samples))
        if samples - held_out < 2:
            raise ConfigurationError(
                f"found {samples} pooled calibration samples for distillation, {held_out} of them held out to choose "
                "its learning rate on, expected at least 2 others to train on; raise samples_per_task or give it an lr"
            )
        trial: DistillationModule | None = None
        is_grid = self.schedule is Schedule.one_cycle
        most, tried = TRIALS if is_grid else len(rates), itertools.count(1)

        def losses(lr: float, steps: int, every: int) -> list[float]:
            nonlocal trial
            rank_zero_info(f"{self.label}: trial {next(tried)}, at most {most}: lr={lr:.3g}, {steps} steps")
            trial = self._run(experts, row, lr, steps, held_out=share, every=every, before=trial)
            return trial.losses

        def last_loss(lr: float, steps: int) -> float:
            found = losses(lr, steps, steps)
            return found[-1] if found and math.isfinite(found[-1]) else math.inf

        if is_grid:
            choice = search_grid(last_loss, rates, steps)
            if choice.at_edge:
                lr, steps = choice.best
                warnings.warn(
                    f"method '{self.label}' chose lr={lr:.3g} and {steps} steps after {TRIALS} trials, at the edge of "
                    "what it tried; begin nearer with learning_rates and steps",
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
        before: DistillationModule | None = None,
    ) -> DistillationModule:
        """Train a module with these options, validated at regular steps on the held-out share of the samples.

        It reuses the experts of a trial `before`, and their cached outputs if both are trials.
        """
        training = self._training(experts)
        module = self.module(row, **training.run_options(experts, self), lr=lr, steps=steps)
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

    def _training(self, experts: Experts) -> Any:
        """Return the training of the experts' source, or one on the samples in memory, which cannot be augmented."""
        if experts.train is not None:
            return experts.train
        if self.augments or self.samples_per_task is not None:
            found = f"{self.samples_per_task=}" if self.samples_per_task else f"{self.augmentation=!s}"
            raise ConfigurationError(
                f"found {found.removeprefix('self.')} for calibration batches in memory, which are taken as they are, "
                "expected none; leave it out"
            )
        return MemoryTraining()


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
