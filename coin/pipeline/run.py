"""Running the steps of an experiment that are not done yet."""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from coin.core.processes import on_rank_zero, rank_zero_info
from coin.errors import ConfigurationError
from coin.files.atomic import remove_leftovers
from coin.pipeline.experiment import Experiment
from coin.pipeline.plan import plan, publish
from coin.pipeline.pool import Launch, RunStep, check_launch, run_as_jobs
from coin.pipeline.step import Step
from coin.trainer import make_trainer

LONG = 10.0
"""Steps that take at least so many seconds say how long they took."""


def run_experiment(
    experiment: Experiment,
    launch: Launch,
    run_step: RunStep,
    only: str | None = None,
    show: bool = True,
) -> None:
    """Run every step that is not done, for every seed, and then show what was made in the experiment's folder.

    With a cluster `run_step` is what its jobs do; what is not worth a job runs here. With the name of a step, `only`,
    no more is run, and read, than it needs (`needed_for`). A job does not `show` what it made: its run does.
    """
    experiment.check()
    submits_jobs = launch.cluster is not None and only is None
    if submits_jobs:
        check_launch(experiment, launch)
    else:
        join_processes(experiment)
    on_rank_zero(experiment.fetch_experts)
    planned = plan(experiment)
    steps = planned if only is None else needed_for(planned, only)
    read = {task for step in steps for task in step.tasks}
    tasks = [task for task in experiment.tasks if task in read]
    on_rank_zero(partial(experiment.fetch_data, tasks))
    if on_rank_zero(lambda: not all(step.is_done for step in steps)):
        experiment.check_data(tasks)
    if submits_jobs:
        for step in steps:
            if not step.remote and all(need.is_done for need in step.needs):
                execute(step, step.what)
        run_as_jobs(experiment, steps, launch, run_step)
    for place, step in enumerate(steps, 1):
        execute(step, f"[{place}/{len(steps)}] {step.what}")
    if show:
        on_rank_zero(partial(publish, experiment, steps, planned))


def join_processes(experiment: Experiment) -> None:
    """Set up the process group for the experiment's Trainer options, before the first step.

    Under ``torchrun`` and ``srun`` all processes run already; a plain ``coin run`` starts the others on its machine.
    Raises ConfigurationError if the section does not fit the running processes.
    """
    trainer = make_trainer(experiment.folder, experiment.trainer)
    launcher = trainer.strategy.launcher
    running = int(os.environ.get("WORLD_SIZE", "1"))
    if trainer.world_size == 1 and running > 1:
        found = f"found WORLD_SIZE={running} and a trainer section for one process"
        raise ConfigurationError(f"{found}; lay configs/cluster/torchrun.yaml over the experiment")
    if trainer.world_size > 1:
        if not isinstance(launcher, _SubprocessScriptLauncher):
            found = f"found processes of the trainer section {experiment.trainer}"
            raise ConfigurationError(f"{found}; set trainer.strategy=ddp")
        launcher.launch(trainer.strategy.setup_environment)


def needed_for(steps: Sequence[Step], name: str) -> list[Step]:
    """Return the steps with a name (a task's: its expert) or the one in a folder, of all seeds, and what they need."""
    needed: set[str] = set()
    for step in steps:
        if name in (step.name, step.name.removeprefix("expert-"), step.folder.name):
            needed.update(step.closure)
    if not needed:
        known = dict.fromkeys(step.name.removeprefix("expert-") for step in steps)
        raise ConfigurationError(
            f"found no task or step '{name}', expected one of {', '.join(known)}"
        )
    return [step for step in steps if step.key in needed]


def execute(step: Step, title: str) -> None:
    """Run a step unless it is done, and say so; waits for another process that runs it."""
    with ExitStack() as locks:
        if not on_rank_zero(partial(_claim, step, locks)):
            rank_zero_info(f"{title}: up to date{on_rank_zero(step.made_by)}")
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
