"""The distillation baseline of an experiment: trained like an expert, tuned on held-out calibration samples."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import Logger

from coin.data.tasks import Tasks
from coin.errors import ConfigurationError, NumericalError
from coin.experiment.codes import SeedCode
from coin.experiment.merge import Ingredients, coded_provenance
from coin.experiment.trainers import make_trainer
from coin.modules import Distillation
from coin.networks import save_network
from coin.processes import is_first
from coin.state import not_finite

_POINTS = 10
"""How often a tuning run looks at the held-out samples, and so how many numbers of steps there are to choose from."""


def distill(
    method: Distillation,
    experts: Sequence[Path],
    row: Sequence[float],
    tasks: Tasks,
    folder: Path,
    *,
    seed: int,
    trainer_options: dict[str, Any],
    loggers: Sequence[Logger] = (),
) -> tuple[Distillation, float, float, dict[str, Any]]:
    """Train the distillation baseline, its learning rate and number of steps chosen on held-out calibration samples.

    Args:
        method: The options, as an experiment file gives them.
        experts: The experts' files.
        row: The code row β.
        tasks: The tasks with P calibration samples each.
        folder: For logs.
        seed: Of the order of the samples.
        trainer_options: The experiment's ``trainer`` section.
        loggers: Where the final run's losses go.

    Returns:
        The trained module, the seconds and the forward-equivalents that everything took, and what was chosen.
    """
    started = time.perf_counter()
    options: dict[str, Any] = dict(method.hparams) | {"experts": [str(path) for path in experts], "code_row": list(row)}
    samples = options["samples_per_task"] or tasks.samples_per_task
    passes = 0.0

    def run(lr: float, steps: int, held_out: float, logger: list[Logger] | bool) -> Distillation:
        data = Tasks(tasks.tasks, samples, options["batch_size"], held_out, seed)
        module = type(method)(**(options | {"lr": lr, "steps": steps, "samples_per_task": samples}))
        every = max(1, steps // _POINTS)
        trainer = make_trainer(
            folder,
            trainer_options,
            max_steps=steps,
            max_epochs=-1,
            logger=logger,
            log_every_n_steps=every,
            num_sanity_val_steps=0,
            val_check_interval=every if held_out else None,
            check_val_every_n_epoch=None if held_out else 1,
            limit_val_batches=1.0 if held_out else 0,
        )
        seed_everything(seed, workers=True, verbose=False)
        trainer.fit(module, datamodule=data)
        return module

    steps, lr = int(options["steps"]), options["lr"]
    chosen: dict[str, Any] = {}
    if lr is None:
        _check_held_out(samples * len(tasks.tasks), options["held_out"])
        every = max(1, steps // _POINTS)
        curves = {}
        for rate in options["learning_rates"]:
            trial = run(rate, steps, options["held_out"], False)
            passes += trial.passes
            curves[rate] = trial.losses
        points = [
            (loss, rate, point)
            for rate, losses in curves.items()
            for point, loss in enumerate(losses)
            if math.isfinite(loss)
        ]
        if not points:
            raise NumericalError(
                f"distillation diverged with every learning rate of {options['learning_rates']}; give smaller ones"
            )
        best = min(points)
        lr, steps = best[1], (best[2] + 1) * every
        chosen = {"lr": lr, "steps": steps, "held_out_loss": {str(rate): losses for rate, losses in curves.items()}}
    module = run(lr, steps, 0.0, list(loggers) or False)
    if not_finite(dict(module.named_parameters())) is not None:
        raise NumericalError(f"distillation diverged with lr={lr}; give a smaller one")
    return module, time.perf_counter() - started, passes + module.passes, chosen


def _check_held_out(samples: int, share: float) -> None:
    held_out = max(1, round(share * samples))
    if samples - held_out < 2:
        raise ConfigurationError(
            f"found {samples} pooled calibration samples for distillation, {held_out} of them held out to choose its "
            "learning rate on, expected at least 2 others to train on; raise samples_per_task or give it an lr"
        )


def distill_rows(
    method: Distillation,
    ingredients: Ingredients,
    choice: SeedCode,
    tasks: Tasks,
    paths: Sequence[Path],
    folder: Path,
    *,
    seed: int,
    trainer_options: dict[str, Any],
    loggers: Sequence[Logger] = (),
) -> None:
    """Train one distilled coded model a row of the code, and write them to `paths`; the rest as for `distill`."""
    code, experts = choice.code, ingredients.experts
    samples = method.hparams["samples_per_task"] or tasks.samples_per_task
    for index, (row, path) in enumerate(zip(code.matrix.tolist(), paths, strict=True)):
        module, seconds, passes, chosen = distill(
            method,
            list(experts.paths.values()),
            row,
            tasks,
            folder,
            seed=seed,
            trainer_options=trainer_options,
            loggers=loggers,
        )
        provenance = coded_provenance(method, code, index, ingredients, samples)
        provenance |= {"seconds": seconds, "passes": passes}
        provenance |= {"shared_seconds": choice.seconds, "shared_passes": choice.passes}
        if is_first():
            assert module.student is not None
            save_network(path, module.student, experts.config, experts.width, provenance | {"chosen": chosen})
