"""Runs and artifacts in W&B: one group an experiment, one run a job, lineage from job to job."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coin.files.atomic import link_file, sha256_of
from coin.tracking.settings import OFFLINE_MODES, TAG_LENGTH, mode, run_environment, user_tags

if TYPE_CHECKING:
    import wandb


def start_run(
    folder: Path,
    *,
    group: str,
    job_type: str,
    name: str,
    config: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
    run_id: str | None = None,
) -> "wandb.Run":
    """Start a W&B run of an experiment, the `group`, that keeps its files below ``folder/wandb``, beside open others.

    System metrics, git and the console are taken as W&B does by default. The job type is ``expert``, ``fisher``,
    ``method`` or ``evaluate``; the name is for a person: ``quickstart-seed-0-expert-mnist``; the tags are words to
    filter by, beside those in ``WANDB_TAGS``. With a `run_id` that W&B knows it goes on with that run.
    """
    import wandb

    wanted: Any = mode()
    with run_environment(folder):
        return wandb.init(
            dir=str(folder.absolute()),
            project=os.environ.get("WANDB_PROJECT") or "coin",
            group=group,
            job_type=job_type,
            name=name,
            config=dict(config or {}),
            tags=list(dict.fromkeys(tag[:TAG_LENGTH] for tag in (*tags, *user_tags()))),
            mode=wanted,
            id=run_id,
            resume=None if wanted in OFFLINE_MODES else "allow",
            reinit="create_new",
            settings=wandb.Settings(silent=wanted in OFFLINE_MODES),
        )


def folder_of(run: "wandb.Run") -> Path:
    """Return the folder that a run was started in."""
    return Path(run.settings.root_dir)


def log_artifact(
    run: "wandb.Run",
    path: Path,
    name: str,
    type: str,
    aliases: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Log a file as an artifact: an expert, a statistic, a coded model; FileError where there is no such file.

    The file is linked into the run's folder and not copied; since every file of an experiment is renamed into its place
    and never written to, a later step may write a new one without spoiling this. The name is the same for all seeds,
    told apart by aliases such as ``seed-0``; characters that W&B does not allow become hyphens. The type is
    ``initialisation``, ``expert``, ``statistics``, ``coded-model`` or ``results``; `metadata` is what made the file.
    """
    with run_environment(folder_of(run)):
        run.log_artifact(_artifact(run, path, name, type, metadata), aliases=["latest", *aliases])


def use_artifact(run: "wandb.Run", path: Path, name: str, type: str) -> None:
    """Say that a run reads a file which an earlier run logged as an artifact; FileError where there is no such file.

    W&B takes lineage online only. The file's SHA-256 goes into the run's configuration under ``inputs`` in any case;
    the artifact that the earlier run logged has the same value as ``sha256`` in its metadata.
    """
    record_input(run, path, name)
    if not (run.offline or run.disabled):
        with run_environment(folder_of(run)):
            run.use_artifact(_artifact(run, path, name, type))


def record_input(run: "wandb.Run", path: Path, name: str) -> None:
    """Write the SHA-256 of a file that a run reads into the run's configuration, under ``inputs``; else a FileError."""
    config: Any = run.config
    config.update({"inputs": {**config.get("inputs", {}), _allowed(name): sha256_of(path)}}, allow_val_change=True)


def _artifact(
    run: "wandb.Run", path: Path, name: str, type: str, metadata: Mapping[str, Any] | None = None
) -> "wandb.Artifact":
    digest = sha256_of(path)
    linked = folder_of(run) / "wandb" / "artifacts" / "linked" / f"{digest[:16]}{path.suffix}"
    if not linked.exists():
        link_file(path, linked)
    import wandb

    artifact = wandb.Artifact(_allowed(name), type=type, metadata={**(metadata or {}), "sha256": digest})
    artifact.add_file(str(linked), name=path.name, policy="immutable")
    return artifact


def _allowed(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:128]
