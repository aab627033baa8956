"""One job of an experiment: its loggers, which live as long as it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from coin.reporting.wandb_logging import finish_run, log_artifact, training_loggers
from coin.reporting.wandb_settings import run_environment

if TYPE_CHECKING:
    from coin.experiment.experiment import Experiment


@contextmanager
def job(experiment: Experiment, folder: Path, job_type: str, name: str, seed: int | None) -> Iterator[list[Logger]]:
    """Yield the loggers of one job: CSV files, and a W&B run in the experiment's group.

    The W&B runs of a seed lie side by side in ``runs/NAME/seed-K/wandb``, to be brought online by one ``wandb sync``.

    Args:
        experiment: The experiment.
        folder: For the logs.
        job_type: ``expert``, ``fisher``, ``merge``, ``distill`` or ``evaluate``.
        name: What the job works on.
        seed: The seed; none for the base.
    """
    run_folder = experiment.folder / ("base" if seed is None else f"seed-{seed}")
    called = f"{experiment.name}-{name}" if seed is None else f"{experiment.name}-seed-{seed}-{name}"
    with run_environment(run_folder):
        try:
            yield list(training_loggers(folder, experiment.name, job_type, called, run_folder=run_folder))
        finally:
            finish_run()


def log_files(loggers: list[Logger], files: Mapping[str, Path], kind: str, experiment: Experiment, seed: int) -> None:
    """Log files as W&B artifacts, named after experiment, seed, kind and what they are of."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and getattr(rank_zero_only, "rank", 0) == 0:
            for name, path in files.items():
                called = f"{experiment.name}-seed-{seed}-{kind}-{name}"
                log_artifact(logger.experiment, path, called, kind, {"of": name})
