"""Commands as tasks of Ray: on this machine, or on a running cluster."""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from coin.core.processes import cores, rank_zero_info
from coin.core.ray_cluster import set_ray_variables, start_ray
from coin.errors import CoinWarning, ConfigurationError, first_line
from coin.files.packaged import extra_module
from coin.pipeline.command import Command, CommandFailedError
from coin.pipeline.launch import Launch

C = TypeVar("C", bound=Command)


def run_as_tasks(commands: Sequence[C], launch: Launch, on_success: Callable[[C], None]) -> list[C]:
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
                own = isinstance(getattr(error, "cause", None), CommandFailedError)
                rank_zero_info(f"{command.name}: failed: {command.last_line() if own else first_line(error)[:200]}")
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
