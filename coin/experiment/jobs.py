"""One job of an experiment: its loggers, which live as long as it does, and the files it reads and makes."""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import Logger, WandbLogger

from coin.data import TaskData
from coin.experiment.experiment import Experiment
from coin.files.atomic import write_text
from coin.options import described
from coin.processes import from_first, is_first
from coin.reporting.wandb_logging import finish_run, log_artifact, record_input, training_loggers, use_artifact
from coin.reporting.wandb_settings import logging_only, run_environment
from coin.steps.code import AUTO


class FileKind(StrEnum):
    """The types of W&B artifacts that pass from job to job."""

    initialisation = "initialisation"
    expert = "expert"
    statistics = "statistics"
    coded_model = "coded-model"
    results = "results"


@dataclass(frozen=True)
class Job:
    """A job at work.

    Args:
        experiment: The experiment's name.
        seed: The seed; none for the base.
        loggers: CSV files, and a W&B run in the experiment's group.
    """

    experiment: str
    seed: int | None
    loggers: list[Logger]

    def makes(self, kind: FileKind, files: Mapping[str, Path]) -> None:
        """Log files as W&B artifacts, named after the experiment, the seed, their kind and what they are of."""
        self._each(files, lambda run, name, path: log_artifact(run, path, self._called(kind, name), kind, {"of": name}))

    def reads(self, kind: FileKind, files: Mapping[str, Path]) -> None:
        """Say that the job reads files that other jobs have logged."""
        self._each(files, lambda run, name, path: use_artifact(run, path, self._called(kind, name), kind))

    def reads_unlogged(self, kind: FileKind, files: Mapping[str, Path]) -> None:
        """Write down the hashes of files that the job reads and that are too large for W&B."""
        self._each(files, lambda run, name, path: record_input(run, path, self._called(kind, name)))

    def _each(self, files: Mapping[str, Path], tell: Callable[[wandb.Run, str, Path], None]) -> None:
        for logger in self.loggers:
            if isinstance(logger, WandbLogger):
                with logging_only("the files of a job"):
                    for name, path in files.items():
                        if not logger.experiment.disabled:
                            tell(logger.experiment, name, path)

    def _called(self, kind: FileKind, name: str) -> str:
        if kind is FileKind.initialisation:  # all seeds share it, and its files say what they are
            return f"{self.experiment}-{name}"
        return run_name(self.experiment, self.seed, str(kind), name)


@contextmanager
def job(
    experiment: Experiment,
    folder: Path,
    job_type: str,
    name: str,
    seed: int | None,
    config: Mapping[str, Any],
    tags: Sequence[str] = (),
) -> Iterator[Job]:
    """Yield one job with its loggers: CSV files, and a W&B run in the experiment's group.

    The W&B runs of a seed lie side by side in ``runs/NAME/seed-K/wandb``, to be brought online by one ``wandb sync``. A
    job that was interrupted goes on with its run: the run's name is kept in ``folder/wandb-run-id`` until it is done.

    Args:
        experiment: The experiment.
        folder: For the logs.
        job_type: ``expert``, ``fisher``, ``merge``, ``distill`` or ``evaluate``.
        name: What the job works on.
        seed: The seed; none for the base.
        config: The W&B run's configuration; see `run_config`.
        tags: Short words to filter by.
    """
    run_folder = experiment.layout.base if seed is None else experiment.layout.seed(seed).folder
    kept = folder / "wandb-run-id"
    with run_environment(run_folder):
        try:
            loggers = training_loggers(
                folder,
                experiment.name,
                job_type,
                run_name(experiment.name, seed, job_type, name),
                config=config,
                tags=[*tags, *common_tags(experiment)],
                run_folder=run_folder,
                run_id=from_first(lambda: _run_id(kept)),
            )
            yield Job(experiment.name, seed, loggers)
            if is_first():
                kept.unlink(missing_ok=True)
        except BaseException:
            with logging_only("the end of a run"):
                finish_run(failed=True)
            raise
        with logging_only("the end of a run"):
            finish_run()


def _run_id(kept: Path) -> str:
    """Return the W&B run that a file names, or a new one's name, which goes into the file."""
    if kept.is_file():
        return kept.read_text(encoding="utf-8").strip()
    found = secrets.token_hex(4)
    write_text(kept, found)
    return found


def by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    """Return files by their names without the ending."""
    return {path.stem: path for path in paths}


def common_tags(experiment: Experiment) -> list[str]:
    """Return the tags that all runs of an experiment have."""
    return [experiment.network.name, *experiment.wandb.tags]


def run_name(experiment: str, seed: int | None, job_type: str, name: str) -> str:
    """Return what a job's run is called, and likewise the files it makes: ``quickstart-seed-0-expert-mnist``."""
    seeds = [] if seed is None else [f"seed-{seed}"]
    return "-".join([experiment, *seeds, *([] if name.startswith(job_type) else [job_type]), name])


def resolved(experiment: Experiment, tasks: Mapping[str, TaskData], seed: int | None) -> dict[str, Any]:
    """Return an experiment's options with all defaults filled in, but for its code.

    Args:
        experiment: The experiment.
        tasks: Its tasks, as the seed has them.
        seed: The seed; none for what is the same for all.
    """
    names = ("network", "base", "expert", "calibration", "methods", "trainer")
    chosen = {"code_choice": AUTO} if experiment.code is None else {}
    return {name: described(getattr(experiment, name)) for name in names} | {
        **chosen,
        "name": experiment.name,
        "decoders": [decoder.name for decoder in experiment.decoders],
        "tasks": described(tasks),
        "seed": seed,
    }


def run_config(experiment: Experiment, options: Mapping[str, Any], **own: Any) -> dict[str, Any]:
    """Return a run's configuration: everything under ``experiment``, and beside it what runs are grouped by.

    Args:
        experiment: The experiment.
        options: What `resolved` returns.
        **own: What tells the run from others of its job type.
    """
    code = AUTO if experiment.code is None else experiment.code.matrix.tolist()
    return {
        "experiment": {**options, "code": code},
        "network": experiment.network.name,
        "seed": options["seed"],
        "samples_per_task": experiment.calibration.samples_per_task,
        "num_experts": len(experiment.tasks),
        "num_coded": 1 if experiment.code is None else experiment.code.num_coded,
        **own,
    }
