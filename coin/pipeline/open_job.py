"""Opening a job: its loggers, and its W&B run in the experiment's group."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from coin.core.processes import is_rank_zero
from coin.files.atomic import write_text
from coin.pipeline.experiment import Experiment
from coin.pipeline.job import Job, JobConfig
from coin.pipeline.steps.code import AUTO
from coin.tracking.runs import start_run
from coin.tracking.settings import in_sweep, logging_only


@contextmanager
def open_job(experiment: Experiment, config: JobConfig, *, again: bool = False) -> Iterator[Job]:
    """Yield a job with its loggers: CSV files in its ``logs`` folder, and a W&B run in the experiment's group.

    All W&B runs of a seed are in ``runs/NAME/seed-K/wandb``, so that one ``wandb sync`` uploads them. An interrupted
    job resumes its run, whose id is stored in its folder. Several jobs may run at once. An agent of a W&B sweep logs to
    one run, the evaluation's.

    Args:
        experiment: The experiment.
        config: What the job is.
        again: Whether a finished job resumes its run.
    """
    seed, name = config.seed, config.name
    home, folder = _folders(experiment, config)
    seeds = [] if seed is None else [f"seed-{seed}"]
    types = [] if config.type in ("method", "evaluate") or name.startswith(config.type) else [config.type]
    called = "-".join([experiment.name, *seeds, *types, name])  # quickstart-seed-0-expert-mnist
    folder.mkdir(parents=True, exist_ok=True)
    # CSV comes first: Lightning's log_dir is the first logger's, and W&B's is another for every run.
    loggers: list[Logger] = [CSVLogger(save_dir=folder, name="", version="logs")]
    run, kept, done = None, folder / f"wandb-run-id-{config.type}", folder / f"wandb-run-done-{config.type}"
    if is_rank_zero() and (config.type == "evaluate" or not in_sweep()):
        with logging_only(f"the start of the run '{called}'"):
            run = start_run(
                home,
                group=experiment.name,
                job_type=config.type,
                name=called,
                config=_run_config(experiment, seed) | dict(config.config),
                tags=[*config.tags, experiment.network.name, *experiment.wandb.tags],
                run_id=None if in_sweep() else _run_id(kept, done if again else kept),
            )
            loggers.append(WandbLogger(experiment=run))
    failed = True
    try:
        yield Job(experiment.name, seed, run, loggers, folder)
        failed = False
    finally:
        if run is not None:
            with logging_only(f"the end of the run '{called}'"):
                run.finish(exit_code=int(failed))
            if not failed:
                with suppress(FileNotFoundError):
                    kept.replace(done)


def _folders(experiment: Experiment, config: JobConfig) -> tuple[Path, Path]:
    """Return the folder of a job's W&B run, and that of its logs."""
    layout = experiment.layout
    if config.seed is not None:
        return layout.seed(config.seed).folder, layout.seed(config.seed).log(config.type, config.name)
    return (layout.base, layout.base) if config.name == "base" else (layout.folder, layout.logs)


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
