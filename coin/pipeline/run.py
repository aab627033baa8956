"""Running the steps of an experiment, or of the points of a sweep, that are not done yet."""

import os
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from coin.core.processes import each_on_its_own, on_rank_zero, process_count, rank_zero_info
from coin.errors import CoinError, CoinWarning, ConfigurationError, first_line
from coin.files.atomic import remove_leftovers, write_text
from coin.pipeline.experiment import Experiment
from coin.pipeline.plan import Planned, plan
from coin.pipeline.pool import Command, CommandFailedError, Launch, Submit, open_pool
from coin.pipeline.step import Step
from coin.pipeline.steps.evaluation import Evaluate
from coin.reporting import write_report
from coin.reporting.report import REPORT_HTML
from coin.reporting.summary import write_seeds, write_summary
from coin.tracking.settings import check_connection
from coin.trainer import make_trainer

LONG = 10.0
"""Steps that take at least so many seconds say how long they took."""
_DECIDED = {"callbacks", "default_root_dir", "enable_checkpointing", "logger", "max_epochs", "max_steps"}
_POLL_SECONDS = 0.2


def run_experiment(experiment: Experiment, launch: Launch | None = None) -> pd.DataFrame:
    """Run every step that is not done, for every seed, report, and return the contents of ``summary.csv``."""
    run_steps(prepared(experiment, launch), launch, report_seed)
    return on_rank_zero(partial(summarise_experiment, experiment))


def check_options(experiment: Experiment) -> None:
    """Raise CoinError for what is wrong with an experiment, before anything is downloaded or run."""
    check_connection()
    experiment.check()


def prepared(experiment: Experiment, launch: Launch | None = None) -> list[Planned]:
    """Return the plan of an experiment that can run: its options and data are checked, its downloads are there."""
    check_options(experiment)
    join_processes(experiment.folder, experiment.trainer)
    if launch is not None and launch.side_by_side and (count := process_count()) > 1:
        told = f"found {count} processes that share every training, and a launch section"
        raise ConfigurationError(f"{told}; leave out one")
    on_rank_zero(experiment.fetch)
    steps = plan(experiment)
    on_rank_zero(partial(warn_of_versions, steps))
    if on_rank_zero(lambda: not all(each.step.is_done for each in steps)):
        experiment.check_parts()
    return steps


def warn_of_versions(steps: Sequence[Planned]) -> None:
    """Warn of steps that another version of coin or torch has made: their numbers would stand beside those of this."""
    made = {each.step.name: each.step.other_versions for each in steps if each.step.other_versions}
    if made:
        name, first = next(iter(made.items()))
        told = f"{len(made)} finished steps were made by other versions, the first of them {name} by {first}"
        advice = f"remove their folders in '{steps[0].step.store}' to make them anew"
        warnings.warn(f"{told}; they are used as they are: {advice}", CoinWarning, stacklevel=2)


def join_processes(folder: Path, options: dict[str, Any]) -> None:
    """Set up the process group for the Trainer's options, before the first step.

    Under ``torchrun`` and ``srun`` all processes run already; a plain ``coin run`` starts the others on its machine.
    Raises ConfigurationError if the section has an option fixed by the steps, or does not fit the running processes.
    """
    if taken := next(iter(options.keys() & _DECIDED), None):
        told = f"found trainer.{taken}, which each step sets itself"
        raise ConfigurationError(f"{told}; leave it out, and set output or expert.epochs")
    trainer = make_trainer(folder, options)
    if trainer.world_size == 1:
        if (running := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            told = f"found WORLD_SIZE={running} and a trainer section for one process"
            raise ConfigurationError(f"{told}; lay configs/cluster/torchrun.yaml over the experiment")
        return
    if not isinstance(launcher := trainer.strategy.launcher, _SubprocessScriptLauncher):
        raise ConfigurationError(f"found processes of the trainer section {options}; set trainer.strategy=ddp")
    launcher.launch(trainer.strategy.setup_environment)


def run_steps(
    steps: Sequence[Planned],
    launch: Launch | None = None,
    on_done: Callable[[Planned, bool], None] = lambda planned, changed: None,
    *,
    keep_going: bool = False,
) -> None:
    """Run the steps that are not done, each when all that it needs is done, and publish all.

    Remote steps go to the pool of the launch section, if there is one; the others run here, one after the other. With
    several processes all of them call it with the same steps, and share the collective ones.

    `on_done` is called on rank zero with every step that is done, and whether its publication has changed anything.
    With `keep_going` the error of a step that runs here ends only those that need it. Raises CommandFailedError if some
    have failed; all that do not need them have finished.
    """
    with open_pool(launch, steps[0].step.store) as submit:
        run, workers = _Run(steps, on_done, keep_going), 1 if launch is None else launch.workers
        while run.waiting:
            moved = run.collect()
            ready = run.ready()
            for planned in ready:
                if submit is None or not planned.step.remote:
                    beside = [each for each in ready if each.step.alone] if planned.step.alone else []
                    run.here([planned] if len(beside) < 2 else beside[: process_count()])
                    moved = True
                    break
                moved |= len(run.running) < workers and run.elsewhere(planned, submit)
            if not moved:
                time.sleep(_POLL_SECONDS)
    if run.failed:
        told = f"{len(run.failed)} of {len(steps)} steps failed, the first of them {min(run.failed)[1]}"
        raise CommandFailedError(f"{told}; mend the cause and run the same command again")


class _Run:
    """The steps that wait, that run elsewhere and that are done, by key, and why some have failed."""

    def __init__(self, steps: Sequence[Planned], on_done: Callable[[Planned, bool], None], keep_going: bool) -> None:
        self.waiting = {each.step.key: each for each in steps}
        self.places = {each.step.key: place for place, each in enumerate(steps, 1)}
        self.running: dict[str, Callable[[], bool]] = {}
        self.done: set[str] = set()
        self.failed: list[tuple[int, str]] = []
        self._on_done, self._keep_going = on_done, keep_going

    def ready(self) -> list[Planned]:
        """Return the steps that can run now."""
        able = (each for key, each in self.waiting.items() if key not in self.running)
        return [each for each in able if all(need.key in self.done for need in each.step.needs)]

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

    def elsewhere(self, planned: Planned, submit: Submit) -> bool:
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

    def here(self, every: Sequence[Planned]) -> None:
        """Run a step in this process, or all processes; or several, each in one of the processes."""
        try:
            execute_beside([each.step for each in every], [partial(self._say, each) for each in every])
        except Exception as error:
            if not self._keep_going:
                raise
            if not isinstance(error, CoinError):
                traceback.print_exc()
            for planned in every:
                self._fail(planned, first_line(error))
        else:
            for planned in every:
                self._finish(planned)

    def _finish(self, planned: Planned, what: str = "") -> None:
        self.done.add(planned.step.key)
        del self.waiting[planned.step.key]
        if what:
            self._say(planned, what)
        changed = on_rank_zero(planned.publish)
        on_rank_zero(partial(self._on_done, planned, changed))

    def _fail(self, planned: Planned, why: str) -> None:
        """Give up a step and all that need it."""
        self._say(planned, f"failed: {why}")
        key = planned.step.key
        self.failed.append((self.places[key], f"{planned.what}: {why}"))
        self.waiting = {name: each for name, each in self.waiting.items() if key not in each.step.closure}

    def _say(self, planned: Planned, what: str) -> None:
        rank_zero_info(f"[{self.places[planned.step.key]}/{len(self.places)}] {planned.what}: {what}")


def outlook(steps: Sequence[Planned]) -> list[tuple[Planned, str, float | None]]:
    """Return of every step why it has to run, '' where it is done, and what its like took last time, in seconds."""
    found = []
    for planned in steps:
        step = planned.step
        why, seconds = ("", None) if step.is_done else step.before()
        if missing := [] if step.is_done else [need.name for need in step.needs if not need.is_done]:
            names = list(dict.fromkeys(missing))
            why = f"after {', '.join(names if len(names) < 6 else [*names[:4], f'{len(names) - 4} more'])}"
        found.append((planned, why, seconds))
    return found


def execute(step: Step, say: Callable[[str], None] = lambda _: None) -> None:
    """Run one step unless it is done; another process that is at work on it is waited for."""
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
        started = time.monotonic()
        if len(waiting) > 1:
            each_on_its_own([step.run for step, _ in waiting])
        elif waiting:
            ((step, _),) = waiting
            if step.collective:
                step.run()
            else:
                on_rank_zero(step.run)
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
    steps, called = prepared(experiment), {name, f"expert-{name}"}
    chosen = [each.step for each in steps if called & {each.step.name, each.step.folder.name}]
    if not chosen:
        expected = f"one of {', '.join(experiment.tasks)}, or a step of coin run --dry-run"
        raise ConfigurationError(f"found no task or step '{name}', expected {expected}")
    needed = {key for step in chosen for key in step.closure}
    run_steps([each for each in steps if each.step.key in needed], on_done=report_seed)


def _command(planned: Planned) -> Command:
    """Return the command that runs a step in a process of its own."""
    step, text = planned.step, planned.experiment.as_yaml()
    file = step.store / ".jobs" / f"{planned.experiment.name}-{sha256(text.encode()).hexdigest()[:12]}.yaml"
    if not file.is_file():
        write_text(file, text)
    return Command(("run", "-c", str(file), "--only", step.folder.name), step.folder / "launch.log")


def report_seed(planned: Planned, changed: bool) -> None:
    """Draw the report of a seed whose results are new."""
    if changed and isinstance(planned.step, Evaluate):
        for folder in planned.copies:
            write_report(folder)


def summarise_experiment(experiment: Experiment) -> pd.DataFrame:
    """Write the summary over the experiment's seeds, and draw the reports that are missing or show another."""
    write_seeds(experiment.folder, experiment.seeds)
    path = experiment.folder / "summary.csv"
    before = path.read_bytes() if path.is_file() else b""
    summary = write_summary(experiment.folder)
    is_changed = before != path.read_bytes()
    if before and is_changed:
        told = f"'{path}' and the report now show this run's seeds and options in place of the earlier ones"
        rank_zero_info(f"{told}; to get those back run with them again: no step is repeated")
    for folder in (experiment.folder / f"seed-{seed}" for seed in experiment.seeds):
        if not (folder / REPORT_HTML).is_file():
            write_report(folder)
    if is_changed or not (experiment.folder / REPORT_HTML).is_file():
        write_report(experiment.folder)
    return summary
