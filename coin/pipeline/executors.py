"""``coin`` commands side by side: as processes of this machine, an array of SLURM jobs, or tasks of Ray.

A step of an experiment is then run by its own ``coin run -c … --only STEP``, which writes to the experiment's folder;
the experiment finds its outputs there, as after an interrupted run. A point of a sweep is a ``coin run``.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from coin.core.processes import cores, rank_zero_info
from coin.core.ray_cluster import set_ray_variables, start_ray
from coin.errors import CoinWarning, ConfigurationError, first_line
from coin.files.packaged import extra_module
from coin.pipeline.command import Command, CommandFailedError, child_environment
from coin.pipeline.launch import Executor, Launch

_POLL_SECONDS = 0.1
_STOP_SECONDS = 10.0

C = TypeVar("C", bound=Command)


def run_commands(
    commands: Sequence[C],
    launch: Launch,
    folder: Path,
    on_success: Callable[[C], None] = lambda _: None,
    *,
    share_gpus: bool = True,
) -> list[C]:
    """Run commands, several at a time, wait for all of them, and return those that failed.

    `folder` is for submitit's own files; with `share_gpus` each worker of this machine sees its share of the GPUs only.

    Raises:
        ConfigurationError: submitit, SLURM or Ray is missing, or refuses an option.
    """
    if launch.executor is Executor.slurm:
        return _run_as_array(commands, launch, folder, on_success)
    if launch.executor is Executor.ray:
        return _run_as_tasks(commands, launch, on_success)
    environments = worker_environments(launch.workers, share_gpus)
    return _run_side_by_side(commands, environments, on_success)


def worker_environments(workers: int, share_gpus: bool = True) -> list[dict[str, str]]:
    """Return the environment of each worker on this machine: its share of the cores, and of the GPUs if there are any.

    With more workers than GPUs, several share one.
    """
    environment = child_environment(max(1, cores() // workers))
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    devices = given.split(",")[:count] if given else [str(index) for index in range(count)]
    if not devices or not share_gpus:
        return [environment] * workers
    shares = [devices[place::workers] or [devices[place % len(devices)]] for place in range(workers)]
    return [{**environment, "CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]


def _run_side_by_side(
    commands: Sequence[C], environments: Sequence[Mapping[str, str]], on_success: Callable[[C], None]
) -> list[C]:
    """Run commands on this machine, one in each environment at a time; they end with this process.

    Call it from the main thread: Python delivers signals only there.
    """
    waiting, failed = list(commands), []
    running: dict[int, tuple[C, subprocess.Popen[bytes], float]] = {}
    # A scheduler sends SIGTERM before the end of an allocation.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        while waiting or running:
            for place, environment in enumerate(environments):
                if place in running and (status := running[place][1].poll()) is not None:
                    command, _, started = running.pop(place)
                    if status == 0:
                        on_success(command)
                        ended = len(commands) - len(waiting) - len(running)
                        seconds = time.monotonic() - started
                        rank_zero_info(f"{command.name}: finished in {seconds:.0f} s ({ended} of {len(commands)})")
                    else:
                        failed.append(command)
                        rank_zero_info(f"{command.name}: failed with exit status {status}: {command.last_line()}")
                if waiting and place not in running:
                    command = waiting.pop(0)
                    running[place] = command, command.start(environment), time.monotonic()
                    rank_zero_info(f"{command.name}: started")
            time.sleep(_POLL_SECONDS)
    finally:
        _stop([process for _, process, _ in running.values()])
        signal.signal(signal.SIGTERM, before)
    return failed


def _stop(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Terminate processes, and kill those that are still running after a few seconds."""
    for process in processes:
        process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        process.kill()  # does nothing to one that has ended
        process.wait()


def check_launch(launch: Launch, folder: Path) -> None:
    """Refuse a launch section that submits nothing here, before anything is run; for SLURM, with submitit's words."""
    if launch.executor is Executor.slurm:
        _submitit(launch, folder)


def _submitit(launch: Launch, folder: Path) -> Any:
    """Return submitit's executor with the options of the launch section."""
    submitit = extra_module("submitit", "slurm")
    options = {"cluster": "slurm", "name": "coin", "slurm_array_parallelism": launch.workers, **launch.slurm}
    if options["cluster"] == "slurm" and shutil.which("srun") is None:
        raise ConfigurationError(
            "found no srun on this machine, expected a SLURM cluster's login node; launch.slurm.cluster=debug tries "
            "the jobs here"
        )
    try:
        executor = submitit.AutoExecutor(folder, cluster=options.pop("cluster"))
        executor.update_parameters(**options)
    except Exception as error:  # submitit's errors share no base class
        raise ConfigurationError(f"cannot submit jobs with {launch.slurm}: {first_line(error)}") from error
    return executor


def _run_as_array(commands: Sequence[C], launch: Launch, folder: Path, on_success: Callable[[C], None]) -> list[C]:
    """Run commands as one array of jobs of a cluster, and return those that failed."""
    executor = _submitit(launch, folder)
    try:
        jobs = executor.submit_array(commands)
    except Exception as error:  # submitit's and sbatch's errors share no base class
        raise ConfigurationError(f"cannot submit jobs with {launch.slurm}: {first_line(error)}") from error
    for command, job in zip(commands, jobs, strict=True):
        rank_zero_info(f"{command.name}: job {job.job_id}")
    failed: list[C] = []
    for command, job in zip(commands, jobs, strict=True):
        if ended := job.exception():
            failed.append(command)
            lost = f"job {job.job_id} ended without a result, in state {job.state}; see {job.paths.stderr}"
            _tell_failure(command, ended, lost)
        else:
            on_success(command)
            rank_zero_info(f"{command.name}: finished")
    return failed


def _tell_failure(command: Command, error: BaseException, otherwise: str) -> None:
    """Say that a command has failed, and why; `otherwise` is why where the command itself could not say it."""
    if CommandFailedError.__name__ not in f"{type(error).__name__}: {error}":
        command.note(otherwise)
    rank_zero_info(f"{command.name}: failed: {command.last_line()}")


def _run_as_tasks(commands: Sequence[C], launch: Launch, on_success: Callable[[C], None]) -> list[C]:
    """Run commands as tasks of Ray, and return those that failed. A task whose machine is lost is started again."""
    options = {"num_cpus": max(1, cores() // launch.workers), "name": "coin", **launch.ray}
    address = options.pop("address", None)
    set_ray_variables(address)
    ray = extra_module("ray", "serve")
    before = signal.getsignal(signal.SIGTERM)  # Ray's own handler would abort
    running: dict[Any, C] = {}
    try:
        try:
            task = ray.remote(**options)(_in_this_folder())
            start_ray(address)
        except (ConnectionError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigurationError(f"cannot start tasks with {launch.ray}: {first_line(error)}") from error
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        _check_resources(options, ray.cluster_resources(), address)
        waiting, failed = list(commands), []
        while waiting or running:
            while waiting and len(running) < launch.workers:
                command = waiting.pop(0)
                running[task.remote(command)] = command
                rank_zero_info(f"{command.name}: submitted")
            (ended, *_), _ = ray.wait(list(running))
            command = running.pop(ended)
            try:
                ray.get(ended)
                on_success(command)
                rank_zero_info(f"{command.name}: finished")
            except ray.exceptions.RayError as error:
                failed.append(command)
                _tell_failure(command, error, first_line(error)[:200])
        return failed
    finally:
        signal.signal(signal.SIGTERM, before)
        for unfinished in running:
            ray.cancel(unfinished, force=True)
        ray.shutdown()


def _in_this_folder() -> Callable[[Command], None]:
    """Return a function that runs a command in this folder, with this command's variables for coin and W&B."""
    folder = Path.cwd()
    variables = {name: value for name, value in os.environ.items() if name.startswith(("COIN_", "WANDB_"))}

    def run(command: Command) -> None:
        os.chdir(folder)
        os.environ.update(variables)
        command()

    return run


def _check_resources(options: Mapping[str, Any], there: Mapping[str, float], address: str | None) -> None:
    """Raise ConfigurationError for a task that this machine can never run; warn if a cluster cannot run it now."""
    needed = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus"), **(options.get("resources") or {})}
    lacking = {name: number for name, number in needed.items() if number and number > there.get(name, 0)}
    if lacking:
        most = {name: there.get(name, 0) for name in lacking}
        told = f"found launch.ray with {lacking}, expected no more than {most}"
        if address is None:
            raise ConfigurationError(f"{told} of this machine; take less")
        warnings.warn(f"{told} of the Ray cluster; tasks wait until a machine joins", CoinWarning, stacklevel=2)


def raise_for(failed: Sequence[Command], count: int, what: str) -> None:
    """Raise a `CommandFailedError` if any of `count` commands has failed."""
    if failed:
        raise CommandFailedError(
            f"{len(failed)} of {count} {what} failed, the first of them {failed[0].name}: {failed[0].last_line()} "
            f"(see {failed[0].log}); mend the cause and run the same command again"
        )
