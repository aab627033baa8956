"""Runs and artifacts in W&B: one group per experiment, a job type per step, lineage from step to step."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from coin.errors import ConfigurationError, FileError
from coin.reporting.wandb_settings import PROJECT, check_connection, mode, run_environment, settings
from coin.state import sha256_of

JOB_TYPES = ("expert", "fisher", "merge", "distill", "evaluate")


def start_run(
    folder: Path,
    *,
    group: str,
    job_type: str,
    name: str,
    config: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
    project: str = PROJECT,
) -> wandb.Run:
    """Start a W&B run that keeps its files below ``folder/wandb``; a run that is still open is finished first.

    Args:
        folder: The run's folder.
        group: The experiment's name.
        job_type: One of `JOB_TYPES`.
        name: What the run is, for a person: ``coin fisher mnist seed 0``.
        config: The resolved configuration.
        tags: Short words to filter by.
        project: The W&B project.

    Raises:
        ConfigurationError: The job type is unknown.
        ConnectionFailedError: ``WANDB_MODE=online`` and there is no key or no network.
    """
    if job_type not in JOB_TYPES:
        raise ConfigurationError(f"found W&B job type '{job_type}', expected one of {', '.join(JOB_TYPES)}")
    check_connection()
    finish_run()
    with run_environment(folder):
        return wandb.init(
            project=project,
            group=group,
            job_type=job_type,
            name=name,
            config=dict(config or {}),
            tags=list(tags),
            dir=str(folder.absolute()),
            mode=mode(),  # type: ignore[arg-type]
            settings=settings(),
        )


def finish_run() -> None:
    """Finish the W&B run that is open in this process, if any.

    A `WandbLogger` would otherwise go on with it, whatever its own group and job type say.
    """
    if wandb.run is not None:
        wandb.run.finish()


def training_loggers(
    folder: Path,
    group: str,
    job_type: str,
    name: str,
    project: str = PROJECT,
    run_folder: Path | None = None,
    run_id: str | None = None,
) -> list[CSVLogger | WandbLogger]:
    """Return the loggers of a training run: CSV files in ``folder/logs``, and W&B in ``run_folder/wandb``.

    Without `run_folder` W&B goes to ``folder/wandb`` too. A `run_id` that W&B knows has it go on with that run.

    CSV comes first: the command line writes ``config.yaml`` into the first logger's folder, and W&B's, of which every
    run has another, would not let a second run find it. Call `finish_run` after the training.

    Raises:
        ConfigurationError: The job type is unknown.
        ConnectionFailedError: ``WANDB_MODE=online`` and there is no key or no network.
    """
    if job_type not in JOB_TYPES:
        raise ConfigurationError(f"found W&B job type '{job_type}', expected one of {', '.join(JOB_TYPES)}")
    check_connection()
    finish_run()
    folder.mkdir(parents=True, exist_ok=True)
    return [
        CSVLogger(save_dir=folder, name="", version="logs"),
        WandbLogger(
            name=name,
            id=run_id,
            save_dir=str((run_folder or folder).absolute()),
            project=project,
            group=group,
            job_type=job_type,
            mode=mode(),
            settings=settings(),
        ),
    ]


def log_artifact(run: wandb.Run, path: Path, name: str, type: str, metadata: Mapping[str, Any] | None = None) -> None:
    """Log a file as an artifact: an expert, a statistic, a coded model.

    The file is copied into the run's folder, so that a later step may write a new one without spoiling this.

    Args:
        run: An open run.
        path: The file.
        name: The artifact's name; characters that W&B does not allow become hyphens.
        type: ``expert``, ``statistics``, ``coded-model`` or ``results``.
        metadata: What made the file.

    Raises:
        FileError: There is no such file.
    """
    with run_environment(_folder_of(run)):
        run.log_artifact(_artifact(path, name, type, metadata))


def use_artifact(run: wandb.Run, path: Path, name: str, type: str) -> None:
    """Say that a run reads a file which an earlier run logged as an artifact.

    W&B takes lineage online only. Offline, the file's SHA-256 goes into the run's configuration under ``inputs``; the
    artifact that the earlier run logged has the same value as ``sha256`` in its metadata.

    Raises:
        FileError: There is no such file.
    """
    if run.offline:
        config: Any = run.config
        config.update({"inputs": {**config.get("inputs", {}), _allowed(name): _digest(path)}}, allow_val_change=True)
        return
    with run_environment(_folder_of(run)):
        run.use_artifact(_artifact(path, name, type, None))


def _artifact(path: Path, name: str, type: str, metadata: Mapping[str, Any] | None) -> wandb.Artifact:
    digest = _digest(path)
    artifact = wandb.Artifact(_allowed(name), type=type, metadata={**(metadata or {}), "sha256": digest})
    artifact.add_file(str(path))
    return artifact


def _digest(path: Path) -> str:
    if not path.is_file():
        raise FileError(f"found no file '{path}', expected an artifact to log; make it first")
    return sha256_of(path)


def _allowed(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:128]


def _folder_of(run: wandb.Run) -> Path:
    return Path(run.settings.root_dir)
