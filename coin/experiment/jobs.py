"""One job of an experiment: its loggers, which live as long as it does."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from coin.processes import from_first, is_first
from coin.reporting.wandb_logging import finish_run, log_artifact, training_loggers
from coin.reporting.wandb_settings import run_environment
from coin.state import write_text

if TYPE_CHECKING:
    from coin.experiment.experiment import Experiment


@contextmanager
def job(experiment: Experiment, folder: Path, job_type: str, name: str, seed: int | None) -> Iterator[list[Logger]]:
    """Yield the loggers of one job: CSV files, and a W&B run in the experiment's group.

    The W&B runs of a seed lie side by side in ``runs/NAME/seed-K/wandb``, to be brought online by one ``wandb sync``. A
    job that was interrupted goes on with its run: the run's name is kept in ``folder/wandb-run-id`` until it is done.

    Args:
        experiment: The experiment.
        folder: For the logs.
        job_type: ``expert``, ``fisher``, ``merge``, ``distill`` or ``evaluate``.
        name: What the job works on.
        seed: The seed; none for the base.
    """
    run_folder = experiment.folder / ("base" if seed is None else f"seed-{seed}")
    called = f"{experiment.name}-{name}" if seed is None else f"{experiment.name}-seed-{seed}-{name}"
    kept = folder / "wandb-run-id"
    with run_environment(run_folder):
        try:
            run_id = from_first(lambda: _run_id(kept))
            loggers = training_loggers(folder, experiment.name, job_type, called, run_folder=run_folder, run_id=run_id)
            yield list(loggers)
            if is_first():
                kept.unlink(missing_ok=True)
        finally:
            finish_run()


def _run_id(kept: Path) -> str:
    """Return the W&B run that a file names, or a new one's name, which goes into the file."""
    if kept.is_file():
        return kept.read_text(encoding="utf-8").strip()
    found = secrets.token_hex(4)
    write_text(kept, found)
    return found


def log_files(loggers: list[Logger], files: Mapping[str, Path], kind: str, experiment: Experiment, seed: int) -> None:
    """Log files as W&B artifacts, named after experiment, seed, kind and what they are of."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and getattr(rank_zero_only, "rank", 0) == 0:
            for name, path in files.items():
                called = f"{experiment.name}-seed-{seed}-{kind}-{name}"
                log_artifact(logger.experiment, path, called, kind, {"of": name})
