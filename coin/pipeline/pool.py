"""The ``launch`` section: steps side by side, in processes of this machine, jobs of SLURM, or tasks of Ray.

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
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from coin.core.choices import check_integer
from coin.core.processes import cores, rank_zero_info
from coin.core.ray_cluster import set_ray_variables, start_ray
from coin.errors import CoinError, ConfigurationError, first_line
from coin.files.atomic import write_text
from coin.files.packaged import extra_module

_STATUS = "# exit status "
_STOP_SECONDS = 10.0
_QUEUE_SECONDS = 5.0  # between two looks at SLURM's queue
# In a reason of SLURM's: what no end of another job changes.
_NO_NODE = ("DOWN", "DRAINED", "NotAvail")
_GONE_SECONDS = 15.0  # after which the result of a job that has left the queue is not waited for


class Executor(StrEnum):
    """Where steps are run: in processes of this machine, in jobs of a SLURM cluster, or in tasks of a Ray cluster."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


@dataclass(frozen=True)
class Launch:
    """How independent steps of an experiment are run: one after the other, or side by side.

    Args:
        executor: ``local``: processes of this machine, which divide its GPUs among them, or its cores if it has no GPU.
            ``slurm``: jobs that submitit (extra ``slurm``) submits, for which the command waits; started again it waits
            for those that are still alive. ``ray``: tasks of Ray (extra ``serve``), whose machines share this folder
            and this environment.
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
        check_integer("launch.workers", self.workers, 1)
        for executor in (Executor.slurm, Executor.ray):
            if getattr(self, executor) and self.executor is not executor:
                found = f"found launch.{executor} and launch.executor {self.executor}"
                raise ConfigurationError(f"{found}; set launch.executor={executor}")

    @property
    def side_by_side(self) -> bool:
        """Whether steps are run outside the experiment's own process."""
        return self.executor is not Executor.local or self.workers > 1


class CommandFailedError(CoinError):
    """Some steps have failed; all that do not need them have finished."""


@dataclass(frozen=True)
class Command:
    """A ``coin`` command, called in a process, job or task of its own; what it prints is appended to `log`."""

    arguments: Sequence[str]
    log: Path

    def start(self, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        """Start it as a process."""
        command = [sys.executable, "-m", "coin", *self.arguments]
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
        """Run it to its end, in a job or task; CommandFailedError unless its exit status is 0."""
        status = self.start(child_environment(cores())).wait()
        self.note_end(status)
        if status:
            raise CommandFailedError(self.failure())

    def failure(self) -> str:
        """Return why it has failed: its exit status and the last line that it printed, if it came to its end.

        It names a job of SLURM's, and the log if there is one: a job may be cancelled or killed before it writes.
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
        """The file with the number of its job of SLURM's."""
        return self.log.with_suffix(".job")

    def checkpoint(self) -> Any:
        """Return what submitit requeues when the cluster preempts the job: the same, which goes on where it was."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


Submit: TypeAlias = Callable[[Command], Callable[[], bool]]
"""Starts a command, and returns what says whether it has ended, asked until it has."""


@contextlib.contextmanager
def open_pool(launch: Launch | None, store: Path) -> Iterator[Submit | None]:
    """Yield the function that starts commands as a launch section says, none without; jobs of SLURM outlive the block.

    Raises ConfigurationError where submitit, SLURM or Ray is missing, or refuses an option.
    """
    if launch is None or not launch.side_by_side:
        yield None
    elif launch.executor is Executor.slurm:
        yield _Slurm(launch, store).submit
    else:
        with (
            _ray(launch)
            if launch.executor is Executor.ray
            else _processes(launch.workers) as submit
        ):
            # A scheduler sends SIGTERM before the end of an allocation, and Ray's own handler would abort.
            before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
            try:
                yield submit
            finally:
                signal.signal(signal.SIGTERM, before)


def check_launch(launch: Launch, store: Path) -> None:
    """Refuse a launch section that submits nothing here, before anything is run; for SLURM, with submitit's words."""
    if launch.executor is Executor.slurm:
        _Slurm(launch, store)


def child_environment(threads: int) -> dict[str, str]:
    """Return a subprocess's environment with this number of threads, unless ``OMP_NUM_THREADS`` is set."""
    # W&B's service belongs to the process that started it: a child that inherits its address may find it gone.
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {"OMP_NUM_THREADS": str(threads), **inherited}


def worker_environments(workers: int) -> list[dict[str, str]]:
    """Return the environment of each worker on this machine: its share of the cores and GPUs; several may share one."""
    import torch  # which a job that only starts a command does not need

    shared = child_environment(max(1, cores() // workers))
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


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[Submit]:
    """Yield what starts a command in a process of this machine, which ends with this one."""
    free = worker_environments(workers)
    running: list[subprocess.Popen[bytes]] = []

    def submit(command: Command) -> Callable[[], bool]:
        environment = free.pop()
        process = command.start(environment)
        running.append(process)

        def has_ended() -> bool:
            status = process.poll()
            if status is None:
                return False
            command.note_end(status)
            free.append(environment)
            return True

        return has_ended

    try:
        yield submit
    finally:
        for process in running:
            process.terminate()  # does nothing to one that has ended
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
            process.kill()


class _Slurm:
    """Jobs that submitit submits, to SLURM or, to try them, on this machine; they outlive this process.

    A job's number is kept beside its log: started again, the command waits for a job that is still alive.
    """

    def __init__(self, launch: Launch, store: Path) -> None:
        self.submitit = extra_module("submitit", "slurm")
        self.given = launch.slurm
        self.folder = store / ".jobs"
        self.reasons: dict[str, str] = {}  # why each job of this user waits, by its number
        self.asked_at = -math.inf  # when SLURM was asked for them
        self.own: set[str] = set()  # the jobs that are waited for
        self.told: set[str] = set()  # the reasons that were printed
        self.left_at: dict[str, float] = {}  # when a job without a result left the queue
        options: dict[str, Any] = {"cluster": "slurm", "name": "coin", **launch.slurm}
        cluster = options.pop("cluster")
        self.is_cluster = cluster == "slurm"
        if self.is_cluster and shutil.which("srun") is None:
            found = "found no srun on this machine, expected a SLURM cluster's login node"
            raise ConfigurationError(f"{found}; launch.slurm.cluster=debug tries the jobs here")
        # Of accounting, which is not everywhere.
        logging.getLogger("submitit").setLevel(logging.ERROR)
        with self._refusals("use"):
            self.executor = self.submitit.AutoExecutor(self.folder, cluster=cluster)
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
        job_id = command.job.read_text(encoding="utf-8") if command.job.is_file() else ""
        if job_id in self._queued():
            job = self.submitit.SlurmJob(self.folder, job_id)
        else:
            with self._refusals("submit"):
                job = self.executor.submit(command)
            job_id = str(job.job_id)
            write_text(command.job, job_id)
            self.reasons[job_id] = ""
        self.own.add(job_id)
        return partial(self._has_ended, job)

    def _has_ended(self, job: Any) -> bool:
        if job.paths.result_pickle.exists():
            return True
        if not self.is_cluster:
            return bool(job.done())
        if job.job_id in self._queued():
            self.left_at.pop(job.job_id, None)
            return False
        now = time.monotonic()
        return now - self.left_at.setdefault(job.job_id, now) > _GONE_SECONDS

    def _queued(self) -> dict[str, str]:
        """Return this user's jobs and why they wait, asked for now and then; say once if no node takes one of them."""
        if not self.is_cluster or time.monotonic() - self.asked_at < _QUEUE_SECONDS:
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


@contextlib.contextmanager
def _ray(launch: Launch) -> Iterator[Submit]:
    """Yield what starts a command as a task of Ray; a task whose machine is lost is started again."""
    options = {"num_cpus": max(1, cores() // launch.workers), "name": "coin", **launch.ray}
    address = options.pop("address", None)
    set_ray_variables(address)
    ray = extra_module("ray", "serve")
    folder = Path.cwd()
    variables = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    running: list[Any] = []

    def run(command: Command) -> None:  # in this folder, with this command's variables for W&B
        os.chdir(folder)
        os.environ.update(variables)
        command()

    def submit(command: Command) -> Callable[[], bool]:
        reference = task.remote(command)
        running.append(reference)
        done: Callable[[], bool] = reference.future().done
        return done

    try:
        task = ray.remote(**options)(run)
        start_ray(address)
    except (ConnectionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"cannot start tasks with {launch.ray}: {first_line(error)}"
        ) from error
    try:
        yield submit
    finally:
        for each in running:
            ray.cancel(each, force=True)  # does nothing to one that has ended
        ray.shutdown()
