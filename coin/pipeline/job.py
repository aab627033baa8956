"""A job: the W&B run and the CSV logs of one or several steps, and the files that it logs as artifacts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from lightning.pytorch.loggers import Logger

from coin.tracking.runs import log_artifact, record_input, use_artifact
from coin.tracking.settings import logging_only

if TYPE_CHECKING:
    import wandb


@dataclass(frozen=True)
class Artifacts:
    """Files of one kind as W&B knows them; `logged` says whether they are logged, or too large for that."""

    kind: str
    files: Mapping[str, Path]
    logged: bool = True


@dataclass(frozen=True)
class JobConfig:
    """The W&B run and the CSV logs of one or several steps; equal ones are one run.

    `type` is ``expert``, ``fisher``, ``method`` or ``evaluate``, `name` the task, method or statistic; the seed is None
    for a run that all seeds share. `config` adds to the run's configuration.
    """

    type: str
    name: str
    seed: int | None
    tags: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Job:
    """A running job, of one seed or of all seeds; its W&B run exists on rank zero only, and if W&B is on."""

    experiment: str
    seed: int | None
    run: "wandb.Run | None"
    loggers: list[Logger]
    folder: Path

    def log_artifacts(self, artifacts: Artifacts | None, aliases: Sequence[str] = ()) -> None:
        """Log files as W&B artifacts, named by experiment, kind and content.

        The kinds are initialisation, expert, statistics, coded-model and results. Each seed is a version of the
        artifact, with the alias ``seed-K``. Files that are too large for W&B are left out.
        """
        called = [*aliases, *([] if self.seed is None else [f"seed-{self.seed}"])]
        if artifacts is not None and artifacts.logged:
            with logging_only("the files of a job"):
                for run, path, name, of in self._each(artifacts):
                    log_artifact(run, path, name, artifacts.kind, called, {"of": of})

    def use_artifacts(self, artifacts: Sequence[Artifacts]) -> None:
        """Record the job's input files: artifacts of other jobs or, of those too large for W&B, their hashes."""
        with logging_only("the files of a job"):
            for each in artifacts:
                for run, path, name, _ in self._each(each):
                    if each.logged:
                        use_artifact(run, path, name, each.kind)
                    else:
                        record_input(run, path, name)

    def measures(self, numbers: Mapping[str, float]) -> None:
        """Write final numbers to the run's summary."""
        if self.run is not None:
            with logging_only("the numbers of a job"):
                self.run.summary.update(dict(numbers))

    def repeat_curve(self) -> None:
        """Log again the training curve in ``logs/metrics.csv``, which an interrupted offline run may have lost."""
        path = self.folder / "logs" / "metrics.csv"
        if self.run is None or not self.run.offline or not path.is_file():
            return
        with logging_only("the curve of a training"):
            for row in pd.read_csv(path).to_dict("records"):
                numbers = {str(name): value for name, value in row.items() if pd.notna(value)}
                for name in numbers.keys() - {"epoch", "step"}:
                    self.run.define_metric(name, step_metric="epoch")
                self.run.log({"trainer/global_step": numbers.pop("step", None), **numbers})

    def _each(self, artifacts: Artifacts) -> "Iterator[tuple[wandb.Run, Path, str, str]]":
        """Yield the run and, of every file, its path, its artifact's name and its content."""
        if self.run is not None and not self.run.disabled:
            for of, path in artifacts.files.items():
                plain = artifacts.kind == "initialisation" or of.startswith(artifacts.kind)  # it says what it is
                yield self.run, path, "-".join([self.experiment, *([] if plain else [artifacts.kind]), of]), of
