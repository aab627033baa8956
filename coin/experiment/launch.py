"""The experts of an experiment trained side by side: as processes of this machine, or as an array of SLURM jobs.

Every expert is a ``coin run -c … --only TASK`` of its own that fills the experiment's folder, so that the experiment
finds it there as it would find its own of an earlier, killed run.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from coin.errors import ConfigurationError, first_line
from coin.experiment.process_pool import Command, CommandFailedError, child_environment, raise_for, run_side_by_side
from coin.processes import cores, say


class Executor(StrEnum):
    """What runs the experts: processes of this machine (``local``), or jobs of a cluster (``slurm``)."""

    local = "local"
    slurm = "slurm"


@dataclass(frozen=True)
class Launch:
    """How the experts of an experiment are trained: one after the other, or side by side.

    Args:
        executor: ``local``: processes of this machine, which share out its GPUs, or its cores where it has none.
            ``slurm``: one array of jobs, submitted by `submitit` (pip install 'coded-coin[slurm]'); the experiment
            waits for them, and goes on when it is started again if it was ended meanwhile.
        workers: How many experts at a time. 1 trains them one after the other, in the experiment's own process with
            ``local``.
        slurm: Options of the jobs, as of `submitit.AutoExecutor.update_parameters`: ``timeout_min``,
            ``gpus_per_node``, ``cpus_per_task``, ``slurm_partition``, …; and ``cluster``, which is ``slurm`` unless
            it says ``local`` or ``debug``, to try the jobs on this machine.
    """

    executor: Executor = Executor.local
    workers: int = 1
    slurm: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigurationError(f"found launch.workers {self.workers}, expected at least 1")
        if self.slurm and self.executor is not Executor.slurm:
            raise ConfigurationError("found launch.slurm and launch.executor local; set launch.executor=slurm")

    @property
    def side_by_side(self) -> bool:
        """Whether experts are trained outside the experiment's own process."""
        return self.executor is Executor.slurm or self.workers > 1


class ExpertJob(Command):
    """One expert's training, which submitit can call: of a task, with the resolved configuration of a seed."""

    def __init__(self, name: str, config: Path, task: str, log: Path) -> None:
        super().__init__(name, ("run", "-c", str(config), "--only", task), log)

    def __call__(self) -> None:
        """Train, within a job of the cluster."""
        if self.start(child_environment(cores())).wait() != 0:
            raise CommandFailedError(f"{self.name}: {self.last_line()}")

    def checkpoint(self) -> Any:
        """Return the job to queue when the cluster wants its machine back: the same, which goes on where this was."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def train_side_by_side(jobs: Sequence[ExpertJob], launch: Launch, folder: Path) -> None:
    """Train experts that are missing, several at a time, and wait for all of them.

    Args:
        jobs: The experts.
        launch: How.
        folder: For submitit's own files.

    Raises:
        CommandFailedError: Naming the experts that failed, after all have ended.
        ConfigurationError: submitit or SLURM is missing, or refuses an option.
    """
    if launch.executor is Executor.slurm:
        failed = _run_as_array(jobs, launch, folder)
    else:
        failed = run_side_by_side(jobs, worker_environments(launch.workers))
    raise_for(failed, len(jobs), "experts")


def worker_environments(workers: int) -> list[dict[str, str]]:
    """Return the environment of each worker on this machine: a GPU, which several share if need be, or some cores."""
    environment = child_environment(max(1, cores() // workers))
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    devices = given.split(",")[:count] if given else [str(index) for index in range(count)]
    if not devices:
        return [environment] * workers
    return [{**environment, "CUDA_VISIBLE_DEVICES": devices[place % len(devices)]} for place in range(workers)]


def _run_as_array(jobs: Sequence[ExpertJob], launch: Launch, folder: Path) -> list[ExpertJob]:
    """Run jobs as one array of a cluster, and return those that failed."""
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "launch.executor=slurm needs the package submitit: pip install 'coded-coin[slurm]'"
        ) from error
    options = {"cluster": "slurm", "name": "coin-expert", "slurm_array_parallelism": launch.workers, **launch.slurm}
    try:
        executor = submitit.AutoExecutor(folder, cluster=options.pop("cluster"))
        executor.update_parameters(**options)
        handles = executor.submit_array(jobs)
    except Exception as error:  # submitit's and sbatch's errors share no base class
        raise ConfigurationError(f"cannot submit the experts with {launch.slurm}: {first_line(error)}") from error
    for job, handle in zip(jobs, handles, strict=True):
        say(f"{job.name}: job {handle.job_id}")
    failed: list[ExpertJob] = []
    for job, handle in zip(jobs, handles, strict=True):
        ended = handle.exception()
        if ended is not None:
            failed.append(job)
        say(f"{job.name}: finished" if ended is None else f"{job.name}: failed ({first_line(ended)[:200]})")
    return failed
