"""A step of an experiment as data: what it reads, what it writes, the function that does it, and its job.

A job is the W&B run and the CSV logs of one or several steps. Locks, ranks, keys, records and the start of W&B runs are
left to `coin.pipeline.runner`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from lightning.pytorch.loggers import Logger

from coin.tracking.runs import log_artifact, record_input, use_artifact
from coin.tracking.settings import logging_only

if TYPE_CHECKING:
    import wandb

Measures = Mapping[str, float]


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
        """Log files, but those too large for W&B, as artifacts named by experiment, kind and content.

        Each seed is a version of the artifact, with the alias ``seed-K``.
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


@dataclass(frozen=True)
class Context:
    """What a step is given when it runs: its key, its outputs and inputs, the ``trainer`` section and the open job."""

    key: str
    outputs: Sequence[Path] = ()
    inputs: Sequence[Path] = ()
    trainer: Mapping[str, Any] = field(default_factory=dict)
    job: Job | None = None

    @property
    def loggers(self) -> list[Logger]:
        """The loggers of the step's job."""
        return [] if self.job is None else self.job.loggers

    @property
    def wandb_run(self) -> "wandb.Run":
        """The job's W&B run, which a step that only logs has."""
        assert self.job is not None
        assert self.job.run is not None
        return self.job.run


@dataclass(frozen=True)
class Step:
    """One step of an experiment."""

    name: str  # unique in the folder
    folder: Path  # of its record and its outputs: ``base`` or ``seed-K`` of an experiment
    what: str  # what it makes, for its line of progress: "expert digits"
    doing: str  # what it does for that: "fine-tuning for 3 epochs"
    run: Callable[[Context], Measures | None]  # the work; measures are for its job's summary
    options: Mapping[str, Any] = field(default_factory=dict)  # everything but files that its outputs depend on
    inputs: Sequence[Path] = ()
    outputs: Sequence[Path] = ()
    collective: bool = False  # whether all processes run it; otherwise rank zero does, and the others wait
    shared: bool = False  # whether points of a sweep share it, where their options and inputs are the same
    elsewhere: bool = False  # whether it may run in a process of its own
    # The folder of a training with its checkpoints, locked while it runs; before the first one the data are checked.
    training: Path | None = None
    job: JobConfig | None = None
    job_alone: JobConfig | None = None  # that of a step in a process of its own: one process opens a W&B run
    opens_job: bool = True  # whether it starts its job; otherwise it logs to it if it is open
    uses: Sequence[Artifacts] = ()  # artifacts that it reads
    logs: Artifacts | None = None  # artifacts among its outputs
    only_logs: bool = False  # whether it only logs to W&B; without a W&B run it is not recorded, and tried again

    @property
    def of_seed(self) -> str:
        """The seed in a line of progress; '' for a step that all seeds share."""
        return f"{self.folder.name.replace('-', ' ')}: " if self.folder.name.startswith("seed-") else ""


def by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    """Return files by their names without the ending."""
    return {path.stem: path for path in paths}


def waves(steps: Sequence[Step]) -> list[list[Step]]:
    """Return the steps in groups that need outputs of earlier groups only; order is kept in a group."""
    level: dict[Path, int] = {}
    groups: dict[int, list[Step]] = {}
    for step in steps:
        place = max((level[path] + 1 for path in step.inputs if path in level), default=0)
        level.update(dict.fromkeys(step.outputs, place))
        groups.setdefault(place, []).append(step)
    return [groups[place] for place in sorted(groups)]


def needed_for(name: str, steps: Sequence[Step]) -> list[Step]:
    """Return the steps of a name and all that they depend on, in order."""
    wanted: set[Path] = set()
    found: list[Step] = []
    for step in reversed(steps):
        if step.name == name or wanted.intersection(step.outputs):
            wanted.update(step.inputs)
            found.append(step)
    return found[::-1]
