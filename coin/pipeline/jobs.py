"""One job of an experiment, with its loggers and its W&B artifacts."""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from coin.core.processes import is_rank_zero
from coin.files.atomic import write_text
from coin.pipeline.experiment import Experiment
from coin.pipeline.steps.code import AUTO
from coin.reporting.wandb_runs import log_artifact, record_input, start_run, use_artifact
from coin.reporting.wandb_settings import in_sweep, logging_only, run_environment


@dataclass(frozen=True)
class Job:
    """A running job, of one seed or of all seeds; its W&B run exists on rank zero only, and if W&B is on."""

    experiment: str
    seed: int | None
    run: wandb.Run | None
    loggers: list[Logger]

    def log_artifacts(self, kind: str, files: Mapping[str, Path], aliases: Sequence[str] = ()) -> None:
        """Log files as W&B artifacts, named by experiment, kind and content.

        The kinds are initialisation, expert, statistics, coded-model and results. Each seed is a version of the
        artifact, with the alias ``seed-K``.
        """
        called = [*aliases, *([] if self.seed is None else [f"seed-{self.seed}"])]
        self._each(kind, files, lambda run, path, name, of: log_artifact(run, path, name, kind, called, {"of": of}))

    def use_artifacts(self, kind: str, files: Mapping[str, Path], *, logged: bool = True) -> None:
        """Record the job's input files: artifacts of other jobs or, if not `logged`, files too large for W&B."""
        if logged:
            self._each(kind, files, lambda run, path, name, _: use_artifact(run, path, name, kind))
        else:
            self._each(kind, files, lambda run, path, name, _: record_input(run, path, name))

    def measures(self, numbers: Mapping[str, float]) -> None:
        """Write final numbers to the run's summary."""
        if self.run is not None:
            with logging_only("the numbers of a job"):
                self.run.summary.update(dict(numbers))

    def repeat_curve(self, folder: Path) -> None:
        """Log again the training curve in ``logs/metrics.csv``, which an interrupted offline run may have lost."""
        path = folder / "logs" / "metrics.csv"
        if self.run is None or not self.run.offline or not path.is_file():
            return
        with logging_only("the curve of a training"):
            for row in pd.read_csv(path).to_dict("records"):
                numbers = {str(name): value for name, value in row.items() if pd.notna(value)}
                for name in numbers.keys() - {"epoch", "step"}:
                    self.run.define_metric(name, step_metric="epoch")
                self.run.log({"trainer/global_step": numbers.pop("step", None), **numbers})

    def _each(self, kind: str, files: Mapping[str, Path], tell: Callable[[wandb.Run, Path, str, str], None]) -> None:
        """Call `tell` for every file with its artifact's name and its content."""
        if self.run is not None and not self.run.disabled:
            with logging_only("the files of a job"):
                for of, path in files.items():
                    plain = kind == "initialisation" or of.startswith(kind)  # such files say what they are
                    tell(self.run, path, "-".join([self.experiment, *([] if plain else [kind]), of]), of)


def by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    """Return files by their names without the ending."""
    return {path.stem: path for path in paths}


@contextmanager
def job(
    experiment: Experiment,
    job_type: str,
    name: str,
    seed: int | None,
    tags: Sequence[str] = (),
    *,
    again: bool = False,
    **own: Any,
) -> Iterator[Job]:
    """Yield a job with its loggers: CSV files in its ``logs`` folder, and a W&B run in the experiment's group.

    All W&B runs of a seed are in ``runs/NAME/seed-K/wandb``, so that one ``wandb sync`` uploads them. An interrupted
    job resumes its run, whose id is stored in its folder. Several jobs may run at once. An agent of a W&B sweep logs to
    one run, the evaluation's.

    Args:
        experiment: The experiment.
        job_type: ``expert``, ``fisher``, ``method`` or ``evaluate``.
        name: The task, method or statistic.
        seed: The seed; None for a job that all seeds share.
        tags: Tags of the W&B run.
        again: Whether a finished job resumes its run.
        **own: Further entries of the run's configuration.
    """
    layout = experiment.layout
    if seed is not None:
        home, folder = layout.seed(seed).folder, layout.seed(seed).log(job_type, name)
    else:
        home, folder = (layout.base, layout.base) if name == "base" else (layout.folder, layout.logs)
    seeds = [] if seed is None else [f"seed-{seed}"]
    types = [] if job_type in ("method", "evaluate") or name.startswith(job_type) else [job_type]
    called = "-".join([experiment.name, *seeds, *types, name])  # quickstart-seed-0-expert-mnist
    folder.mkdir(parents=True, exist_ok=True)
    # CSV comes first: Lightning's log_dir is the first logger's, and W&B's is another for every run.
    loggers: list[Logger] = [CSVLogger(save_dir=folder, name="", version="logs")]
    run, kept, done = None, folder / f"wandb-run-id-{job_type}", folder / f"wandb-run-done-{job_type}"
    if is_rank_zero() and (job_type == "evaluate" or not in_sweep()):
        with logging_only(f"the start of the run '{called}'"):
            run = start_run(
                home,
                group=experiment.name,
                job_type=job_type,
                name=called,
                config=_run_config(experiment, seed) | own,
                tags=[*tags, experiment.network.name, *experiment.wandb.tags],
                run_id=None if in_sweep() else _run_id(kept, done if again else kept),
            )
            loggers.append(WandbLogger(experiment=run))
    failed = True
    try:
        with run_environment(home):
            yield Job(experiment.name, seed, run, loggers)
        failed = False
    finally:
        if run is not None:
            with logging_only(f"the end of the run '{called}'"):
                run.finish(exit_code=int(failed))
            if not failed and kept.exists():
                kept.replace(done)


def _run_id(kept: Path, done: Path) -> str:
    """Return the W&B run id stored in one of two files, or a new id, which is written to the first."""
    for path in (kept, done):
        if path.is_file():
            return path.read_text(encoding="utf-8").strip()
    found = secrets.token_hex(4)
    write_text(kept, found)
    return found


def _run_config(experiment: Experiment, seed: int | None) -> dict[str, Any]:
    """Return a run's configuration: all options under ``experiment``, and the values that runs are grouped by."""
    code = AUTO if experiment.code is None else experiment.code.matrix.tolist()
    return {
        "experiment": {**experiment.config_dict(seed), "code": code},
        "network": experiment.network.name,
        "seed": seed,
        "samples_per_task": experiment.calibration.samples_per_task,
        "num_experts": len(experiment.tasks),
        "num_coded": 1 if experiment.code is None else experiment.code.num_coded,
    }
