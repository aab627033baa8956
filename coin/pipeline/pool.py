"""The ``launch`` section: steps side by side, as jobs that submitit starts on this machine or submits to SLURM.

A job is ``coin run -c EXPERIMENT.yaml --only STEP``: it writes the step's folder, where the experiment finds it.
"""

import contextlib
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from coin.core.choices import check_integer
from coin.core.processes import cores, rank_zero_info
from coin.errors import CoinError, ConfigurationError, first_line
from coin.files.atomic import write_text
from coin.files.packaged import extra_module

_STATUS = "# exit status "
# Of jobs on this machine, which submitit would end after two minutes.
_LOCAL = {"timeout_min": 7 * 24 * 60}
_QUEUE_SECONDS = 5.0  # between two looks at SLURM's queue
# In a reason of SLURM's: what no end of another job changes.
_NO_NODE = ("DOWN", "DRAINED", "NotAvail")
_GONE_SECONDS = 15.0  # after which the result of a job that has left the queue is not waited for


class Cluster(StrEnum):
    """Where jobs run: on this machine, or on the nodes of a SLURM cluster."""

    local = "local"
    slurm = "slurm"


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

    cluster: Cluster | None = None
    workers: int = 1
    slurm: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_integer("launch.workers", self.workers, 1)
        if self.workers > 1 and self.cluster is None:
            found = f"found launch.workers={self.workers} and no launch.cluster"
            raise ConfigurationError(f"{found}; set launch.cluster to local or slurm")
        if self.slurm and self.cluster is not Cluster.slurm:
            found = f"found launch.slurm and launch.cluster={self.cluster}"
            raise ConfigurationError(f"{found}; set launch.cluster=slurm")


class CommandFailedError(CoinError):
    """Some steps have failed; all that do not need them have finished."""


@dataclass(frozen=True)
class Command:
    """A ``coin`` command, called in a job, with environment variables; what it prints is appended to `log`."""

    arguments: Sequence[str]
    log: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    def start(self) -> "subprocess.Popen[bytes]":
        """Start it as a process."""
        command = [sys.executable, "-m", "coin", *self.arguments]
        environment = {**child_environment(cores()), **self.variables}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab", buffering=0) as log:
            log.write(f"# {' '.join(command)}\n".encode())
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def note_end(self, status: int) -> None:
        """Note the exit status of its process in its log."""
        with self.log.open("ab", buffering=0) as log:
            log.write(f"\n{_STATUS}{status}\n".encode())

    def __call__(self) -> None:
        """Run it to its end; CommandFailedError unless its exit status is 0. It ends with the job."""
        process = self.start()
        write_text(self.process, str(process.pid))
        try:
            status = process.wait()
        finally:
            process.terminate()  # does nothing to one that has ended
            self.process.unlink(missing_ok=True)
        self.note_end(status)
        if status:
            raise CommandFailedError(self.failure())

    def failure(self) -> str:
        """Return why it has failed: its exit status and the last line that it printed, if it came to its end.

        It names the job, and the log if there is one: a job may be cancelled or killed before it writes.
        """
        lines = []
        see = ""
        if self.log.is_file():
            text = self.log.read_text(encoding="utf-8", errors="replace")
            lines = [line for line in text.splitlines() if line.strip()]
            see = f" (see {self.log})"
        if lines and lines[-1].startswith(_STATUS):
            return f"{lines[-1].removeprefix('# ')}: {lines[-2]}{see}"
        job = f"job {self.job.read_text(encoding='utf-8')}" if self.job.is_file() else "it"
        return f"{job} ended without a result, cancelled or killed{see}"

    @property
    def job(self) -> Path:
        """The file with the number of its job."""
        return self.log.with_suffix(".job")

    @property
    def process(self) -> Path:
        """The file with the number of its process, while that runs."""
        return self.log.with_suffix(".pid")

    def checkpoint(self) -> Any:
        """Return what submitit requeues when the cluster preempts the job: the same, which goes on where it was."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


Submit: TypeAlias = Callable[[Command], Callable[[], bool]]
"""Starts a command, and returns what says whether it has ended, asked until it has."""


@contextlib.contextmanager
def open_pool(launch: Launch | None, store: Path) -> Iterator[Submit | None]:
    """Yield the function that submits commands as a launch section says, none without; jobs of SLURM outlive the block.

    Raises ConfigurationError where submitit or SLURM is missing, or refuses an option.
    """
    if launch is None or launch.cluster is None:
        yield None
        return
    jobs = _Jobs(launch, store)
    if launch.cluster is Cluster.slurm:
        yield jobs.submit
        return
    # SIGTERM ends the block too.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield jobs.submit
    finally:
        jobs.cancel()
        signal.signal(signal.SIGTERM, before)


def check_launch(launch: Launch, store: Path) -> None:
    """Refuse a launch section that submits nothing here, before anything is run, with submitit's words."""
    if launch.cluster is not None:
        _Jobs(launch, store)


def child_environment(threads: int) -> dict[str, str]:
    """Return a subprocess's environment with this number of threads, unless ``OMP_NUM_THREADS`` is set."""
    # W&B's service belongs to the process that started it: a child that inherits its address may find it gone.
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {"OMP_NUM_THREADS": str(threads), **inherited}


def worker_environments(workers: int) -> list[dict[str, str]]:
    """Return the variables of each worker on this machine: its share of the cores and GPUs; several may share one."""
    import torch  # which a job that only starts a command does not need

    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // workers)))
    shared = {"OMP_NUM_THREADS": threads}
    count = torch.cuda.device_count()
    if count == 0:
        return [shared] * workers
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",")[:count] if given else [str(index) for index in range(count)]
    environments = []
    for place in range(workers):
        own = devices[place::workers] or [devices[place % count]]
        environments.append({**shared, "CUDA_VISIBLE_DEVICES": ",".join(own)})
    return environments


class _Jobs:
    """Jobs that submitit submits to SLURM, which outlive this process, or starts on this machine.

    A job's number is kept beside its log: started again, the command waits for a job of SLURM's that is still alive.
    """

    def __init__(self, launch: Launch, store: Path) -> None:
        self.submitit = extra_module("submitit", "slurm")
        self.given = launch.slurm
        self.folder = store / ".jobs"
        self.reasons: dict[str, str] = {}  # why each job of this user waits, by its number
        self.asked_at = -math.inf  # when SLURM was asked for them
        self.own: dict[str, Any] = {}  # the jobs that are waited for, by their numbers
        self.commands: list[Command] = []
        self.told: set[str] = set()  # the reasons that were printed
        self.left_at: dict[str, float] = {}  # when a job without a result left the queue
        self.is_slurm = launch.cluster is Cluster.slurm
        # What distinguishes the workers of this machine; SLURM gives every job its own cores and GPUs.
        self.free = [] if self.is_slurm else worker_environments(launch.workers)
        options = {"name": "coin", **({} if self.is_slurm else _LOCAL), **launch.slurm}
        if self.is_slurm and shutil.which("srun") is None:
            found = "found no srun on this machine, expected a SLURM cluster's login node"
            raise ConfigurationError(f"{found}; launch.cluster=local runs jobs here")
        # Of accounting, which is not everywhere.
        logging.getLogger("submitit").setLevel(logging.ERROR)
        with self._refusals("use"):
            self.executor = self.submitit.AutoExecutor(self.folder, cluster=str(launch.cluster))
            self.executor.update_parameters(**options)

    @contextlib.contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # submitit's and sbatch's errors share no base class
            raise ConfigurationError(
                f"cannot {what} jobs with {self.given}: {first_line(error)}"
            ) from error

    def submit(self, command: Command) -> Callable[[], bool]:
        """Submit a command, unless its job is still alive."""
        variables = {} if self.is_slurm else self.free.pop()
        job_id = command.job.read_text(encoding="utf-8") if command.job.is_file() else ""
        if job_id in self._queued():
            job = self.submitit.SlurmJob(self.folder, job_id)
        else:
            command.process.unlink(missing_ok=True)  # of a job that was killed
            with self._refusals("submit"):
                job = self.executor.submit(replace(command, variables=variables))
            job_id = str(job.job_id)
            write_text(command.job, job_id)
            if self.is_slurm:
                self.reasons[job_id] = ""
        self.own[job_id] = job
        self.commands.append(command)
        return partial(self._has_ended, job, variables)

    def cancel(self) -> None:
        """End the jobs that have not ended."""
        for job in self.own.values():
            job.cancel()  # does nothing to one that has ended
        # Where the processor is busy submitit kills a job before it has ended its process.
        for command in self.commands:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                os.kill(int(command.process.read_text(encoding="utf-8")), signal.SIGTERM)

    def _has_ended(self, job: Any, variables: dict[str, str]) -> bool:
        if not self.is_slurm:
            has_ended = bool(job.done())
            if has_ended:
                self.free.append(variables)
            return has_ended
        if job.paths.result_pickle.exists():
            return True
        if job.job_id in self._queued():
            self.left_at.pop(job.job_id, None)
            return False
        now = time.monotonic()
        return now - self.left_at.setdefault(job.job_id, now) > _GONE_SECONDS

    def _queued(self) -> dict[str, str]:
        """Return this user's jobs and why they wait, asked for now and then; say once if no node takes one of them."""
        if not self.is_slurm or time.monotonic() - self.asked_at < _QUEUE_SECONDS:
            return self.reasons
        asked = subprocess.run(
            ["squeue", "--me", "-h", "-o", "%A %r"], capture_output=True, text=True, check=False
        )
        self.asked_at = time.monotonic()
        if asked.returncode == 0:  # otherwise the controller is busy: what it said last stands
            self.reasons = dict(line.partition(" ")[::2] for line in asked.stdout.splitlines())
        for job, reason in self.reasons.items():
            if (
                job in self.own
                and reason not in self.told
                and any(each in reason for each in _NO_NODE)
            ):
                self.told.add(reason)
                rank_zero_info(f"job {job} waits for a node: {reason}; sinfo -R says why")
        return self.reasons
