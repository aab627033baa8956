"""Running the steps of an experiment that are not done yet."""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from hashlib import sha256

import pandas as pd
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from coin.core.processes import each_on_its_own, on_rank_zero, process_count, rank_zero_info
from coin.errors import CoinWarning, ConfigurationError
from coin.files.atomic import remove_leftovers, write_text
from coin.pipeline.experiment import Experiment
from coin.pipeline.plan import Planned, plan, remove_old_links
from coin.pipeline.pool import Command, CommandFailedError, Launch, Submit, open_pool
from coin.pipeline.step import Step
from coin.reporting import read_summary
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
_POLL_SECONDS = 0.2


def run_experiment(experiment: Experiment, launch: Launch | None = None) -> pd.DataFrame:
    """Run every step that is not done, for every seed, report, and return the contents of ``summary.csv``."""
    steps = prepared(experiment, launch)
    run_steps(steps, launch)
    on_rank_zero(partial(remove_old_links, experiment, steps))
    return read_summary(experiment.folder)


def check_options(experiment: Experiment) -> None:
    """Raise CoinError for what is wrong with an experiment, before anything is downloaded or run."""
    check_connection()
    experiment.check()


def prepared(
    experiment: Experiment, launch: Launch | None = None, only: str | None = None
) -> list[Planned]:
    """Return the plan of an experiment that can run: its options and data are checked, its downloads are there.

    With the name of a step, `only`, it is of what this needs alone (`needed_for`), and so are the data.
    """
    check_options(experiment)
    join_processes(experiment)
    if launch is not None and launch.cluster is not None and process_count() > 1:
        found = f"found {process_count()} processes that share every training, and a launch section"
        raise ConfigurationError(f"{found}; leave out one")
    tasks = list(experiment.tasks) if only is None else []
    on_rank_zero(partial(experiment.fetch, tasks))
    steps = plan(experiment)
    if only is not None:
        steps = needed_for(steps, only)
        read = {task for planned in steps for task in _tasks_of(planned.step)}
        tasks = [task for task in experiment.tasks if task in read]
        on_rank_zero(partial(experiment.fetch, tasks))
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


def run_steps(steps: Sequence[Planned], launch: Launch | None = None) -> None:
    """Run the steps that are not done, each when all that it needs is done, and publish all.

    Remote steps go to the pool of the launch section, if there is one; the others run here, one after the other. With
    several processes all of them call it with the same steps, and share the collective ones.

    Raises CommandFailedError if some that ran elsewhere have failed; all that do not need them have finished.
    """
    with open_pool(launch, steps[0].step.store) as submit:
        run = _Run(steps, submit, 1 if launch is None else launch.workers)
        while run.waiting:
            if not run.go_on():
                time.sleep(_POLL_SECONDS)
    if run.failed:
        failed = (
            f"{len(run.failed)} of {len(steps)} steps failed, the first of them {run.failed[0]}"
        )
        raise CommandFailedError(f"{failed}; fix the cause and run the same command again")


class _Run:
    """The steps that wait, that run elsewhere and that are done, by key, and why some have failed."""

    def __init__(
        self,
        steps: Sequence[Planned],
        submit: Submit | None,
        workers: int,
    ) -> None:
        self.every = steps
        self.waiting = {planned.step.key: planned for planned in steps}
        self.places = {planned.step.key: place for place, planned in enumerate(steps, 1)}
        self.running: dict[str, Callable[[], bool]] = {}
        self.done: set[str] = set()
        self.failed: list[str] = []
        self.submit = submit
        self.workers = workers

    def go_on(self) -> bool:
        """Collect what has ended elsewhere, submit what can run there, or run one step here; False to wait."""
        moved = self.collect()
        ready = self.ready()
        for planned in ready:
            if self.submit is None or not planned.step.remote:
                beside = [planned]
                if planned.step.alone and process_count() > 1:
                    beside = [each for each in ready if each.step.alone][: process_count()]
                self.run_here(beside)
                return True
            if len(self.running) < self.workers and self.run_elsewhere(planned, self.submit):
                moved = True
        return moved

    def ready(self) -> list[Planned]:
        """Return the steps that can run now."""
        found = []
        for key, planned in self.waiting.items():
            if key not in self.running and all(
                need.key in self.done for need in planned.step.needs
            ):
                found.append(planned)
        return found

    def collect(self) -> bool:
        """Take what has ended elsewhere, and return whether something has."""
        ended = [key for key, has_ended in self.running.items() if has_ended()]
        for key in ended:
            del self.running[key]
            planned = self.waiting[key]
            if planned.step.is_done:
                self._finish(planned, "done")
            else:
                self._fail(planned, _command(planned).failure())
        return bool(ended)

    def run_elsewhere(self, planned: Planned, submit: Submit) -> bool:
        """Submit a step, and return whether it has been; a step that is done is finished at once.

        A step that another process is at work on is not submitted: the job would hold its allocation, and wait.
        """
        if planned.step.is_done:
            self._finish(planned, "up to date")
            return True
        with planned.step.locked(wait=False) as free:
            if not free:
                return False
        self.running[planned.step.key] = submit(_command(planned))
        self._say(planned, f"{planned.step.doing}, elsewhere")
        return True

    def run_here(self, every: Sequence[Planned]) -> None:
        """Run a step in this process, or in all of them; or several that are `alone`, each in one of the processes."""
        execute_beside(
            [planned.step for planned in every],
            [partial(self._say, planned) for planned in every],
        )
        for planned in every:
            self._finish(planned)

    def _finish(self, planned: Planned, what: str = "") -> None:
        self.done.add(planned.step.key)
        del self.waiting[planned.step.key]
        if what:
            self._say(planned, what)
        for each in self.every:
            if each.step.key == planned.step.key:
                on_rank_zero(each.publish)

    def _fail(self, planned: Planned, why: str) -> None:
        """Give up a step and all that need it."""
        self._say(planned, f"failed: {why}")
        self.failed.append(f"{planned.what}: {why}")
        key = planned.step.key
        self.waiting = {
            name: each for name, each in self.waiting.items() if key not in each.step.closure
        }

    def _say(self, planned: Planned, what: str) -> None:
        place = self.places[planned.step.key]
        rank_zero_info(f"[{place}/{len(self.places)}] {planned.what}: {what}")


def execute(step: Step, say: Callable[[str], None] = lambda _: None) -> None:
    """Run a step unless it is done, and report its progress; waits for another process that runs it."""
    execute_beside([step], [say])


def execute_beside(steps: Sequence[Step], says: Sequence[Callable[[str], None]]) -> None:
    """Run one step, or several that need one process each, unless they are done; `says` report their progress."""
    with ExitStack() as locks:
        waiting = []
        for step, say in zip(steps, says, strict=True):
            if on_rank_zero(partial(_claim, step, locks)):
                waiting.append((step, say))
                say(step.doing)
            else:
                say("up to date")
        if not waiting:
            return
        started = time.monotonic()
        first = waiting[0][0]
        if first.collective:
            first.run()
        elif len(waiting) == 1:
            on_rank_zero(first.run)
        else:
            each_on_its_own([step.run for step, _ in waiting])
        seconds = time.monotonic() - started
        for step, say in waiting:
            on_rank_zero(partial(step.finish, seconds))
            if seconds >= LONG:
                say(f"done in {seconds:.0f} s")


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
    run_steps(prepared(experiment, only=name))


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


def _command(planned: Planned) -> Command:
    """Return the command that runs a step in a job of its own."""
    step = planned.step
    text = planned.experiment.as_yaml()
    digest = sha256(text.encode()).hexdigest()
    file = step.store / ".jobs" / f"{planned.experiment.name}-{digest[:12]}.yaml"
    if not file.is_file():
        write_text(file, text)
    return Command(("run", "-c", str(file), "--only", step.folder.name), step.folder / "launch.log")
