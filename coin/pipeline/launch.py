"""The ``launch`` section: where steps of an experiment, or points of a sweep, run."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from coin.errors import ConfigurationError


class Executor(StrEnum):
    """Where steps are run: in processes of this machine, in jobs of a SLURM cluster, or in tasks of a Ray cluster."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


@dataclass(frozen=True)
class Launch:
    """How independent steps of an experiment, or points of a sweep, are run: one after the other, or side by side.

    Independent are the experts, then the statistics, then the trained coded models; and all points of a sweep.

    Args:
        executor: ``local``: processes of this machine, which divide its GPUs among them, or its cores if it has no GPU.
            ``slurm``: one array of jobs, submitted by `submitit` (extra ``slurm``), for which the command waits;
            started again it resumes an interrupted one. ``ray``: tasks of Ray (extra ``serve``), whose machines share
            this folder and this environment.
        workers: How many run at a time. With 1 and ``local`` an experiment runs its steps itself.
        slurm: Options of `submitit.AutoExecutor.update_parameters`: ``timeout_min``, ``gpus_per_node``,
            ``slurm_partition``, …; and ``cluster``: ``slurm``, or ``local`` or ``debug`` to try jobs on this machine.
        ray: What every task needs, as in `ray.remote`: ``num_cpus`` (also its threads; by default the cores divided by
            `workers`), ``num_gpus`` (by default 0), ``resources``, …; and the ``address`` of a running cluster.
            Without one Ray is started on this machine.
    """

    executor: Executor = Executor.local
    workers: int = 1
    slurm: dict[str, Any] = field(default_factory=dict)
    ray: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigurationError(f"found launch.workers {self.workers}, expected at least 1")
        for executor, options in ((Executor.slurm, self.slurm), (Executor.ray, self.ray)):
            if options and self.executor is not executor:
                raise ConfigurationError(
                    f"found launch.{executor} and launch.executor {self.executor}; set launch.executor={executor}"
                )

    @property
    def side_by_side(self) -> bool:
        """Whether steps are run outside the experiment's own process."""
        return self.executor is not Executor.local or self.workers > 1

    def __str__(self) -> str:
        """What runs outside the command's own process, and what each gets: ``16 jobs of SLURM at a time, each …``."""
        kind = {Executor.local: "process", Executor.slurm: "SLURM job", Executor.ray: "task of Ray"}[self.executor]
        options = ", ".join(f"{name}={value}" for name, value in {**self.slurm, **self.ray}.items())
        each = f", each with {options}" if options else ""
        return f"each in a {kind} of its own, {self.workers} at a time{each}"
