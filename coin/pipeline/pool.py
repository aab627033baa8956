"""The ``launch`` section: steps as jobs that submitit submits to SLURM, or starts on this machine.

Steps that do not need one another are a stage. On SLURM it is an array of jobs, and the next depends on it; here each
worker takes its share of a stage. A job does what ``coin run --only STEP`` does: it writes the step's folder, where the
experiment finds it.
"""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import yaml  # type: ignore[import-untyped]

from coin.core.choices import check_integer
from coin.core.processes import cores, rank_zero_info
from coin.errors import CoinError, ConfigurationError, first_line
from coin.files.atomic import write_text
from coin.files.packaged import extra_module
from coin.pipeline.experiment import Experiment
from coin.pipeline.step import JOB, STORE, Step

_LONG = 7 * 24 * 60  # minutes; submitit ends a job on this machine after two
_QUEUE_SECONDS = 5.0  # between two looks at SLURM's queue


@dataclass(frozen=True)
class Launch:
    """How independent steps of an experiment are run: in its own process one after the other, or as jobs side by side.

    Args:
        cluster: Where jobs run, which submitit (extra ``slurm``) starts. ``local``: on this machine, whose GPUs they
            divide among them, or its cores if it has no GPU; they end with the command. ``slurm``: on a SLURM cluster;
            the command waits for them, and started again for those that are still alive. Without it the experiment
            runs its steps itself.
        workers: How many jobs run at a time.
        slurm: Options of `submitit.AutoExecutor.update_parameters`: ``timeout_min``, ``gpus_per_node``,
            ``slurm_partition``, …
    """

    cluster: Literal["local", "slurm"] | None = None
    workers: int = 1
    slurm: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_integer("launch.workers", self.workers, 1)
        if self.workers > 1 and self.cluster is None:
            found = f"found launch.workers={self.workers} and no launch.cluster"
            raise ConfigurationError(f"{found}; set launch.cluster to local or slurm")
        if self.slurm and self.cluster != "slurm":
            found = f"found launch.slurm and launch.cluster={self.cluster}"
            raise ConfigurationError(f"{found}; set launch.cluster=slurm")


RunStep: TypeAlias = Callable[[Path, str], None]
"""Runs a step of an experiment's file, by the name of its folder, and what it needs: ``coin run --only``."""


@dataclass(frozen=True)
class Job:
    """What a job runs: steps of an experiment's file, one after the other."""

    run: RunStep
    file: Path
    steps: Sequence[str]

    def __call__(self) -> None:
        """Run the steps."""
        os.environ.pop("WANDB_SERVICE", None)  # of the process that has submitted it
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which submitit ignores
        for step in self.steps:
            self.run(self.file, step)

    def checkpoint(self) -> Any:
        """Return what submitit puts back in the queue where the time is up or SLURM preempts the job."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def stages(steps: Iterable[Step]) -> list[list[Step]]:
    """Return the remote steps that are to do, in stages: each needs no others than the earlier ones.

    What is not remote is made by the first job that needs it.
    """
    found: list[list[Step]] = []
    ready: dict[str, int] = {}  # after how many stages what needs a step can run
    for step in steps:
        if step.is_done or step.key in ready:
            continue
        stage = max((ready.get(need.key, 0) for need in step.needs), default=0)
        ready[step.key] = stage
        if step.remote:
            ready[step.key] = stage + 1
            found += [[] for _ in range(stage + 1 - len(found))]
            found[stage].append(step)
    return found


def run_as_jobs(
    experiment: Experiment, steps: Iterable[Step], launch: Launch, run: RunStep
) -> None:
    """Run the remote steps that are to do as jobs, and wait for these.

    Raises CoinError where some are not done then, ConfigurationError where submitit or SLURM refuses an option.
    """
    waiting = stages(steps)
    every = list(chain(*waiting))
    if not every:
        return
    jobs = _Jobs(experiment, launch, run)
    if launch.cluster == "slurm":
        jobs.submit(waiting)
    else:
        jobs.run_here(waiting)
    failed = [step for step in every if not step.is_done]
    if failed:
        why = jobs.why(failed[0])
        raise CoinError(
            f"{len(failed)} of {len(every)} steps are not done, the first of them {failed[0].what}: {why}; fix the "
            "cause and run the same command again"
        )


def check_launch(experiment: Experiment, launch: Launch) -> None:
    """Refuse, before anything is run, a launch section that submits nothing here, or jobs of several processes.

    The machine that submits jobs may have no accelerator: no Trainer is made here.
    """
    if launch.cluster is None:
        return
    trainer = experiment.trainer
    running = os.environ.get("WORLD_SIZE", "1")
    for processes in (running, trainer.get("devices", 1), trainer.get("num_nodes", 1)):
        if _is_several(processes):
            found = f"found {processes} processes that share every training"
            raise ConfigurationError(f"{found}, and a launch section; leave out one")
    _executor(launch, _folder(experiment))


def _is_several(processes: Any) -> bool:
    """Return whether an option of Trainer's names more than one device or node; ``auto`` is each job's own matter."""
    if isinstance(processes, list | tuple):
        return len(processes) > 1
    return processes != "auto" and int(processes) > 1


def _folder(experiment: Experiment) -> Path:
    """Return the folder of jobs' files and logs."""
    return experiment.folder.parent / STORE / ".jobs"


def _executor(launch: Launch, folder: Path) -> Any:
    """Return submitit's executor."""
    submitit = extra_module("submitit", "slurm")
    if launch.cluster == "local":
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(timeout_min=_LONG)
        return executor
    if shutil.which("srun") is None:
        found = "found no srun on this machine, expected a SLURM cluster's login node"
        raise ConfigurationError(f"{found}; launch.cluster=local runs jobs here")
    logging.getLogger("submitit").setLevel(logging.ERROR)  # of accounting, which is not everywhere
    with _refusals(launch):
        executor = submitit.AutoExecutor(folder, cluster="slurm")
        executor.update_parameters(
            **{"name": "coin", "slurm_array_parallelism": launch.workers, **launch.slurm}
        )
    return executor


@contextlib.contextmanager
def _refusals(launch: Launch) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # submitit's and sbatch's errors share no base class
        raise ConfigurationError(
            f"cannot submit jobs with {launch.slurm}: {first_line(error)}"
        ) from error


class _Jobs:
    """The jobs of an experiment; a step's folder has the number of its job."""

    def __init__(self, experiment: Experiment, launch: Launch, run: RunStep) -> None:
        text = yaml.safe_dump(experiment.of_seeds(experiment.seeds), sort_keys=False)
        digest = sha256(text.encode()).hexdigest()
        self.launch = launch
        self.folder = _folder(experiment)
        self.file = self.folder / f"{experiment.name}-{digest[:12]}.yaml"
        write_text(self.file, text)
        self.run = run
        self.executor = _executor(launch, self.folder)

    def run_here(self, waiting: Sequence[Sequence[Step]]) -> None:
        """Run stages on this machine, one after the other, until one has failed; jobs end with this process."""
        workers = self.launch.workers
        threads = max(1, cores() // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the jobs
        gpus = _gpus()
        if len(gpus) < workers:  # several jobs have one
            gpus = (gpus * workers)[:workers]
        jobs = []
        try:
            for stage in waiting:
                for worker in range(min(workers, len(stage))):
                    own = gpus[worker::workers]
                    self.executor.update_parameters(gpus_per_node=len(own), visible_gpus=own)
                    share = stage[worker::workers]
                    job = self.executor.submit(self._job(share))
                    jobs.append(job)
                    self._note(job, share)
                for job in jobs:
                    job.wait()
                if not all(step.is_done for step in stage):
                    return
        finally:
            for job in jobs:
                if not job.done():
                    # The SIGINT that its cancel() sends is ignored in a shell's background.
                    os.kill(int(job.job_id), signal.SIGTERM)

    def submit(self, waiting: Sequence[Sequence[Step]]) -> None:
        """Submit stages to SLURM, each as an array that depends on the earlier ones, and wait for all.

        A step whose job is still in the queue is not submitted again.
        """
        queued = _queued()
        jobs: list[str] = []
        given = self.launch.slurm.get("slurm_additional_parameters", {})
        for stage in waiting:
            if jobs:
                self.executor.update_parameters(
                    slurm_dependency=f"afterok:{':'.join(jobs)}",
                    # Otherwise it would wait for ever where an earlier one has failed.
                    slurm_additional_parameters={**given, "kill-on-invalid-dep": "yes"},
                )
            new = [step for step in stage if self._number(step) not in queued]
            if new:
                with _refusals(self.launch):
                    submitted = self.executor.submit_array([self._job([step]) for step in new])
                for job, step in zip(submitted, new, strict=True):
                    self._note(job, [step])
            jobs += map(self._number, stage)
        while not _queued().isdisjoint(jobs):
            time.sleep(_QUEUE_SECONDS)

    def why(self, step: Step) -> str:
        """Return the last line of a step's job, with its log; a job may be cancelled or killed before it writes."""
        job = self._number(step)
        log = self.folder / f"{job}_0_log.err"
        said = log.read_text(encoding="utf-8").strip() if log.is_file() else ""
        last = said.rpartition("\n")[2] or "cancelled or killed"
        return f"job {job}: {last} (see {log})"

    def _job(self, steps: Sequence[Step]) -> Job:
        return Job(self.run, self.file, [step.folder.name for step in steps])

    def _note(self, job: Any, steps: Sequence[Step]) -> None:
        for step in steps:
            write_text(step.folder / JOB, str(job.job_id))
            rank_zero_info(f"job {job.job_id}: {step.what}")

    def _number(self, step: Step) -> str:
        """Return the number of a step's job; "" without one."""
        file = step.folder / JOB
        return file.read_text(encoding="utf-8") if file.is_file() else ""


def _gpus() -> list[int]:
    """Return the numbers of the GPUs that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given:
        return [int(number) for number in given.split(",")]
    return list(range(torch.cuda.device_count()))


def _queued() -> set[str]:
    """Return the numbers of this user's jobs that wait or run; waits for a controller that does not answer."""
    command = ["squeue", "--me", "-h", "-r", "-o", "%i"]
    while True:
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if not asked.returncode:
            return set(asked.stdout.split())
        time.sleep(_QUEUE_SECONDS)
