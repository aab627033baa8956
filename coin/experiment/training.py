"""Training steps of an experiment: the base, the experts, and the distillation baseline."""

import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from coin.callbacks import ExpertExport, Weights
from coin.data import TaskData
from coin.data.tasks import Tasks, task_with
from coin.errors import ConfigurationError, NumericalError, first_line
from coin.experiment.codes import SeedCode
from coin.experiment.config import TrainingConfig
from coin.experiment.merge import Ingredients, coded_provenance
from coin.modules import Distillation, Expert
from coin.networks import NetworkConfig, save_network
from coin.processes import from_first, is_first
from coin.state import not_finite, write_text
from coin.trainer import Trainer, quieten


def make_trainer(folder: Path, options: dict[str, Any], **fixed: Any) -> Trainer:
    """Return a Trainer for one step of an experiment.

    Args:
        folder: Its ``default_root_dir``.
        options: The experiment's ``trainer`` section.
        **fixed: What the step decides.

    Raises:
        ConfigurationError: The Trainer has no such option, or refuses a value.
    """
    quieten()
    settings: dict[str, Any] = {
        "accelerator": "auto",
        "devices": 1,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
        **options,
        **fixed,
    }
    try:
        trainer = Trainer(default_root_dir=str(folder), **settings)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigurationError(
            f"the trainer section {options} does not fit: {first_line(error)}; see Lightning's Trainer"
        ) from error
    return trainer


def join_processes(folder: Path, options: dict[str, Any]) -> None:
    """Have the processes that the Trainer's options ask for find one another, before the first step.

    Under ``torchrun`` and ``srun`` they run already; a plain ``coin run`` starts the others of its machine itself.

    Args:
        folder: A ``default_root_dir``.
        options: The experiment's ``trainer`` section.

    Raises:
        ConfigurationError: The options do not fit the processes that run already.
    """
    trainer = make_trainer(folder, options)
    running = int(os.environ.get("WORLD_SIZE", "1"))
    if running > 1 and trainer.world_size == 1:
        raise ConfigurationError(
            f"found WORLD_SIZE={running} and a trainer section for one process; lay configs/cluster/torchrun.yaml "
            "over the experiment, or set trainer.devices and trainer.num_nodes"
        )
    if trainer.world_size == 1:
        return
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        raise ConfigurationError(
            f"found the trainer section {options}, whose processes share no steps; set trainer.strategy=ddp"
        )
    try:
        launcher.launch(trainer.strategy.setup_environment)
    except ValueError as error:
        raise ConfigurationError(f"the trainer section {options} does not fit: {first_line(error)}") from error


def train_network(
    config: TrainingConfig,
    network: NetworkConfig,
    task: TaskData,
    folder: Path,
    output: Path,
    *,
    key: str,
    seed: int,
    initial: Path | None,
    trainer_options: dict[str, Any],
    loggers: Sequence[Logger],
    weights: Weights = Weights.last,
) -> None:
    """Train one network on one task and write it as a safetensors file.

    A run that was interrupted goes on from its last whole epoch, if it was started with the same `key`.

    Args:
        config: How to train.
        network: What to train.
        task: On what.
        folder: For checkpoints and logs.
        output: The safetensors file.
        key: The step's key; see `coin.experiment.steps`.
        seed: Of the samples' order and of dropout.
        initial: The shared initialisation's file; none starts from the network's own weights.
        trainer_options: The experiment's ``trainer`` section.
        loggers: Where losses and accuracies go.
        weights: ``last`` or ``best``.
    """
    checkpoints = folder / "checkpoints"
    last = from_first(lambda: _begin(checkpoints, key, output))
    data = task_with(task, seed=seed, batch_size=config.batch_size, augmentation=config.augmentation)
    module = Expert(
        network=network.name,
        image_size=network.image_size,
        weights=None if initial is not None else network.weights,
        options=network.options,
        num_classes=data.num_classes,
        initial=None if initial is None else str(initial),
        optimizer=config.optimizer,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        label_smoothing=config.label_smoothing,
        seed=seed,
        compile_network=config.compile_network,
    )
    best: dict[str, Any] = (
        {"monitor": "val/accuracy", "mode": "max", "save_top_k": 1} if weights == Weights.best else {}
    )
    export = ExpertExport(str(output), weights)
    callbacks: list[Callback] = [
        export,
        ModelCheckpoint(checkpoints, save_last=True, **{"save_top_k": 0, **best}),
    ]
    trainer = make_trainer(
        checkpoints,
        trainer_options,
        max_epochs=config.epochs,
        callbacks=callbacks,
        logger=list(loggers) or False,
        enable_checkpointing=True,
        log_every_n_steps=10,
    )
    seed_everything(seed, workers=True, verbose=False)
    trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
    if not from_first(output.is_file):
        # The checkpoint was of a finished training, killed before the export: Lightning restores it and trains nothing.
        export.on_train_end(trainer, module)
    if trainer.requeue is not None:
        trainer.requeue.leave_if_asked(trainer)


def _begin(checkpoints: Path, key: str, output: Path) -> str | None:
    """Remove what is of another training, and return the checkpoint to go on from."""
    mark = checkpoints / "step-key"
    if not mark.is_file() or mark.read_text(encoding="utf-8", errors="replace") != key:
        if checkpoints.is_dir():
            shutil.rmtree(checkpoints)
        write_text(mark, key)
    output.unlink(missing_ok=True)
    last = checkpoints / "last.ckpt"
    if last.is_file() and not _is_whole(last):
        last.unlink()
    return str(last) if last.is_file() else None


def _is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint can be read: Lightning copies it across file systems, and may be killed at that."""
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # pickle's and zip's errors share no base class
        return False
    return True


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


_POINTS = 10
"""How often a tuning run looks at the held-out samples, and so how many numbers of steps there are to choose from."""
