"""The loggers of an experiment's jobs: one W&B run a job, one group an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import wandb
from lightning.pytorch.loggers import Logger

from coin.reporting.wandb_logging import run_environment, training_loggers

if TYPE_CHECKING:
    from coin.experiment.experiment import Experiment


def job_loggers(experiment: Experiment, folder: Path, job_type: str, name: str, seed: int | None) -> list[Logger]:
    """Return the loggers of one job: CSV files in `folder`, and a W&B run in the seed's folder.

    Args:
        experiment: The experiment: the W&B group.
        folder: For the CSV files.
        job_type: ``expert``, ``fisher``, ``merge``, ``distill`` or ``evaluate``.
        name: What the job works on.
        seed: The seed; none for the base.
    """
    run_environment(folder if seed is None else experiment.folder / f"seed-{seed}")
    called = f"{experiment.name}-{name}" if seed is None else f"{experiment.name}-seed-{seed}-{name}"
    return training_loggers(folder, experiment.name, job_type, called)


def finish(loggers: Sequence[Logger]) -> None:
    """Close a job's loggers, so that the next one starts a W&B run of its own."""
    for logger in loggers:
        logger.finalize("success")
    wandb.finish()
