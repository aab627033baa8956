"""Running the steps of an experiment that are not done yet."""

import os
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial

import pandas as pd
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from coin.core.processes import on_rank_zero, process_count, rank_zero_info
from coin.errors import CoinWarning, ConfigurationError
from coin.files.atomic import remove_leftovers
from coin.pipeline.experiment import Experiment
from coin.pipeline.plan import Planned, plan, remove_old_links
from coin.pipeline.pool import Launch, RunStep, check_launch, run_as_jobs
from coin.pipeline.step import Step
from coin.reporting import read_run, summarise
from coin.tracking.settings import check_connection
from coin.trainer import make_trainer

LONG = 10.0
"""Steps that take at least so many seconds say how long they took."""
_SET_BY_STEPS = {
    "callbacks",
    "default_root_dir",
    "enable_checkpointing",
    "logger",
    "max_epochs",
    "max_steps",
}


def run_experiment(experiment: Experiment, launch: Launch, run_step: RunStep) -> pd.DataFrame:
    """Run every step that is not done, for every seed, and return the contents of ``summary.csv``.

    With a cluster `run_step` is what its jobs do; what is not worth a job runs here.
    """
    steps = checked_plan(experiment)
    if launch.cluster is not None:
        if process_count() > 1:
            found = f"found {process_count()} processes that share every training"
            raise ConfigurationError(f"{found}, and a launch section; leave out one")
        check_launch(launch, steps[0].step.store)
        for planned in steps:
            if not planned.step.remote and all(need.is_done for need in planned.step.needs):
                execute(planned.step, planned.what)
        run_as_jobs(steps, launch, run_step)
    run_steps(steps)
    on_rank_zero(partial(remove_old_links, experiment, steps))
    _, frame = read_run(experiment.folder)
    return summarise(frame)


def check_options(experiment: Experiment) -> None:
    """Raise CoinError for what is wrong with an experiment, before anything is downloaded or run."""
    check_connection()
    experiment.check()


def checked_plan(experiment: Experiment, only: str | None = None) -> list[Planned]:
    """Return the plan of an experiment that can run: its options and data are checked, its downloads are there.

    With the name of a step, `only`, it is of what this needs alone (`needed_for`), and so are the data.
    """
    check_options(experiment)
    join_processes(experiment)
    on_rank_zero(experiment.fetch_experts)
    steps = plan(experiment)
    if only is not None:
        steps = needed_for(steps, only)
    read = {task for planned in steps for task in _tasks_of(planned.step)}
    tasks = [task for task in experiment.tasks if task in read]
    on_rank_zero(partial(experiment.fetch_data, tasks))
    on_rank_zero(partial(warn_of_versions, steps))
    if on_rank_zero(lambda: not all(planned.step.is_done for planned in steps)):
        experiment.check_data(tasks)
    return steps


def warn_of_versions(steps: Sequence[Planned]) -> None:
    """Warn of steps that another version of coin or torch has made: their numbers would stand beside those of this."""
    older = [planned.step for planned in steps if planned.step.other_versions]
    if older:
        warnings.warn(
            f"{len(older)} finished steps were made by other versions, the first of them {older[0].name} by "
            f"{older[0].other_versions}; they are used as they are: remove their folders in '{older[0].store}' to make "
            "them anew",
            CoinWarning,
            stacklevel=2,
        )


def join_processes(experiment: Experiment) -> None:
    """Set up the process group for the experiment's Trainer options, before the first step.

    Under ``torchrun`` and ``srun`` all processes run already; a plain ``coin run`` starts the others on its machine.
    Raises ConfigurationError if the section has an option fixed by the steps, or does not fit the running processes.
    """
    options = experiment.trainer
    for name in options.keys() & _SET_BY_STEPS:
        advice = "leave it out, and set output or expert.epochs"
        raise ConfigurationError(f"found trainer.{name}, which each step sets itself; {advice}")
    trainer = make_trainer(experiment.folder, options)
    launcher = trainer.strategy.launcher
    running = int(os.environ.get("WORLD_SIZE", "1"))
    if trainer.world_size == 1 and running > 1:
        found = f"found WORLD_SIZE={running} and a trainer section for one process"
        raise ConfigurationError(f"{found}; lay configs/cluster/torchrun.yaml over the experiment")
    if trainer.world_size > 1:
        if not isinstance(launcher, _SubprocessScriptLauncher):
            raise ConfigurationError(
                f"found processes of the trainer section {options}; set trainer.strategy=ddp"
            )
        launcher.launch(trainer.strategy.setup_environment)


def run_steps(steps: Sequence[Planned]) -> None:
    """Run the steps that are not done, one after the other, and publish all; several processes all call it."""
    for place, planned in enumerate(steps, 1):
        execute(planned.step, f"[{place}/{len(steps)}] {planned.what}")
        on_rank_zero(planned.publish)


def execute(step: Step, title: str) -> None:
    """Run a step unless it is done, and say so; waits for another process that runs it."""
    with ExitStack() as locks:
        if not on_rank_zero(partial(_claim, step, locks)):
            rank_zero_info(f"{title}: up to date")
            return
        rank_zero_info(f"{title}: {step.doing}")
        started = time.monotonic()
        if step.collective:
            step.run()
        else:
            on_rank_zero(step.run)
        seconds = time.monotonic() - started
        on_rank_zero(partial(step.finish, seconds))
        if seconds >= LONG:
            rank_zero_info(f"{title}: done in {seconds:.0f} s")


def _claim(step: Step, locks: ExitStack) -> bool:
    """Lock a step, and return whether it has to run."""
    if not step.is_done:
        locks.enter_context(step.locked())
    if step.is_done:
        return False
    step.folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(step.folder)
    return True


def run_only(experiment: Experiment, name: str) -> None:
    """Run the steps with a name (a task's: its expert) or the one in a folder, of all seeds, and what they need."""
    run_steps(checked_plan(experiment, only=name))


def needed_for(steps: Sequence[Planned], name: str) -> list[Planned]:
    """Return the steps with a name (a task's: its expert) or the one in a folder, of all seeds, and what they need."""
    needed: dict[str, Step] = {}
    for planned in steps:
        if planned.step.name in (name, f"expert-{name}") or planned.step.folder.name == name:
            needed |= planned.step.closure
    if not needed:
        tasks = ", ".join(steps[0].experiment.tasks)
        found = f"found no task or step '{name}'"
        raise ConfigurationError(
            f"{found}, expected one of {tasks}, or a step of coin run --dry-run"
        )
    return [planned for planned in steps if planned.step.key in needed]


def _tasks_of(step: Step) -> Iterable[str]:
    """Return the names of the tasks whose data a step reads."""
    several: Iterable[str] | None = getattr(step, "tasks", None)
    return several or [step.config.get("task_name", "")]
