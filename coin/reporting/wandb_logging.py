"""Runs and artifacts in W&B: one group per experiment, a job type per step, lineage from step to step."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from coin.errors import ConfigurationError, FileError
from coin.files.atomic import sha256_of
from coin.reporting.wandb_connection import check_connection
from coin.reporting.wandb_settings import default_project, in_sweep, mode, run_environment, settings, user_tags

JOB_TYPES = ("expert", "fisher", "merge", "distill", "evaluate")
TAG_LENGTH = 64
"""W&B refuses longer tags, and empty ones."""


def start_run(
    folder: Path,
    *,
    group: str,
    job_type: str,
    name: str,
    config: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
) -> wandb.Run:
    """Start a W&B run that keeps its files below ``folder/wandb``; a run that is still open is finished first.

    Args:
        folder: The run's folder.
        group: The experiment's name.
        job_type: One of `JOB_TYPES`.
        name: What the run is, for a person: ``quickstart-seed-0-expert-mnist``.
        config: The resolved configuration.
        tags: Short words to filter by, beside those in ``WANDB_TAGS``.

    Raises:
        ConfigurationError: The job type is unknown.
        ConnectionFailedError: ``WANDB_MODE=online`` and there is no key or no network.
    """
    options = _options(group, job_type, name, config, tags)
    with run_environment(folder):
        return wandb.init(dir=str(folder.absolute()), **options)


def finish_run(*, failed: bool = False) -> None:
    """Finish the W&B run that is open in this process, if any, as one that went well or as one that failed.

    A `WandbLogger` would otherwise go on with it, whatever its own group and job type say.
    """
    if wandb.run is not None:
        wandb.run.finish(exit_code=int(failed))


def training_loggers(
    folder: Path,
    group: str,
    job_type: str,
    name: str,
    *,
    config: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
    run_folder: Path | None = None,
    run_id: str | None = None,
) -> list[Logger]:
    """Return the loggers of a job: CSV files in ``folder/logs``, and W&B in ``run_folder/wandb``.

    Without `run_folder` W&B goes to ``folder/wandb`` too. Under an agent of a W&B sweep only the evaluation is for
    W&B; see `coin.reporting.wandb_settings.in_sweep`.

    CSV comes first: the command line writes ``config.yaml`` into the first logger's folder, and W&B's, of which every
    run has another, would not let a second run find it. Call `finish_run` after the job.

    Args:
        folder: For the CSV files.
        group: The experiment's name.
        job_type: One of `JOB_TYPES`.
        name: What the run is, for a person.
        config: The resolved configuration; Lightning adds the options of what it trains.
        tags: Short words to filter by, beside those in ``WANDB_TAGS``.
        run_folder: For W&B's files.
        run_id: W&B's own name of the run; one that W&B knows has it go on with that run.

    Raises:
        ConfigurationError: The job type is unknown.
        ConnectionFailedError: ``WANDB_MODE=online`` and there is no key or no network.
    """
    options = _options(group, job_type, name, config, tags)
    folder.mkdir(parents=True, exist_ok=True)
    loggers: list[Logger] = [CSVLogger(save_dir=folder, name="", version="logs")]
    if job_type == "evaluate" or not in_sweep():
        logger = WandbLogger(save_dir=str((run_folder or folder).absolute()), id=run_id, **options)
        loggers.append(quiet(logger))
    return loggers


def quiet(logger: WandbLogger) -> WandbLogger:
    """Take from a logger that has not started what W&B warns of even where it is none; return the logger."""
    logger._wandb_init.pop("anonymous", None)
    return logger


def logger_mode(logger: WandbLogger) -> str | None:
    """Return the mode that a W&B logger was given, none where it goes by the environment."""
    if logger._offline:
        return "offline"
    given: str | None = logger._wandb_init.get("mode")
    return given


def _options(
    group: str, job_type: str, name: str, config: Mapping[str, Any] | None, tags: Sequence[str]
) -> dict[str, Any]:
    """Return the arguments of `wandb.init` that all runs share, once W&B can be reached and no run is open."""
    if job_type not in JOB_TYPES:
        raise ConfigurationError(f"found W&B job type '{job_type}', expected one of {', '.join(JOB_TYPES)}")
    check_connection()
    finish_run()
    return {
        "project": default_project(),
        "group": group,
        "job_type": job_type,
        "name": name,
        "config": dict(config or {}),
        "tags": list(dict.fromkeys(tag[:TAG_LENGTH] for tag in (*tags, *user_tags()))),
        "mode": mode(),
        "settings": settings(),
    }


def log_artifact(run: wandb.Run, path: Path, name: str, type: str, metadata: Mapping[str, Any] | None = None) -> None:
    """Log a file as an artifact: an expert, a statistic, a coded model.

    The file is copied into the run's folder, so that a later step may write a new one without spoiling this.

    Args:
        run: An open run.
        path: The file.
        name: The artifact's name; characters that W&B does not allow become hyphens.
        type: ``initialisation``, ``expert``, ``statistics``, ``coded-model`` or ``results``.
        metadata: What made the file.

    Raises:
        FileError: There is no such file.
    """
    with run_environment(_folder_of(run)):
        run.log_artifact(_artifact(path, name, type, metadata))


def use_artifact(run: wandb.Run, path: Path, name: str, type: str) -> None:
    """Say that a run reads a file which an earlier run logged as an artifact.

    W&B takes lineage online only. The file's SHA-256 goes into the run's configuration under ``inputs`` in any case;
    the artifact that the earlier run logged has the same value as ``sha256`` in its metadata.

    Raises:
        FileError: There is no such file.
    """
    record_input(run, path, name)
    if not (run.offline or run.disabled):
        with run_environment(_folder_of(run)):
            run.use_artifact(_artifact(path, name, type, None))


def record_input(run: wandb.Run, path: Path, name: str) -> None:
    """Write the SHA-256 of a file that a run reads into the run's configuration, under ``inputs``.

    Raises:
        FileError: There is no such file.
    """
    config: Any = run.config
    config.update({"inputs": {**config.get("inputs", {}), _allowed(name): _digest(path)}}, allow_val_change=True)


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
