"""The options of where steps of an experiment, or points of a sweep, run; `coin.pipeline.executors` runs them there."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from coin.errors import ConfigurationError


class Executor(StrEnum):
    """Where steps are run: in processes of this machine (``local``), or in jobs of a cluster (``slurm``)."""

    local = "local"
    slurm = "slurm"


@dataclass(frozen=True)
class Launch:
    """How independent steps of an experiment, or points of a sweep, are run: one after the other, or side by side.

    Independent are the experts, then the statistics, then the trained coded models; and all points of a sweep.

    Args:
        executor: ``local``: processes of this machine, which divide its GPUs among them, or its cores if it has no GPU.
            ``slurm``: one array of jobs, submitted by `submitit` (pip install 'coded-coin[slurm]'); the command waits
            for them, and an interrupted one resumes when it is started again.
        workers: How many run at a time. With 1 and ``local`` an experiment runs its steps itself.
        slurm: Options of `submitit.AutoExecutor.update_parameters`: ``timeout_min``, ``gpus_per_node``,
            ``cpus_per_task``, ``slurm_partition``, …; and ``cluster``, which is ``slurm`` unless it says ``local`` or
            ``debug``, to try the jobs on this machine.
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
        """Whether steps are run outside the experiment's own process."""
        return self.executor is Executor.slurm or self.workers > 1
