"""A whole experiment: its steps for every seed, the summary over seeds, and the reports."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pandas as pd

from coin.core.processes import is_rank_zero, on_rank_zero, process_count, rank_zero_info
from coin.data import TaskData
from coin.data.tasks import Tasks
from coin.errors import ConfigurationError
from coin.files.atomic import remove_leftovers, write_text
from coin.files.downloads import Download, check_downloads, fetch_from_hub
from coin.networks.hub import PREFIX, HuggingFace, local_place
from coin.pipeline.command import step_command
from coin.pipeline.executors import check_launch, raise_for, run_commands
from coin.pipeline.experiment import Experiment
from coin.pipeline.launch import Launch
from coin.pipeline.locks import folder_lock
from coin.pipeline.plan import plan, summary_steps
from coin.pipeline.plan_experts import initial_steps
from coin.pipeline.records import Status, reused_status, status_of, sweep_of
from coin.pipeline.runner import Runner
from coin.pipeline.step import Step, needed_for, waves
from coin.pipeline.steps.trainer import join_processes
from coin.reporting import read_results, write_report
from coin.reporting.summary import stand_ins, summarise, write_summary
from coin.reporting.tables import IN_SHORT, finding
from coin.tracking.settings import check_connection


def run_experiment(experiment: Experiment, launch: Launch | None = None) -> pd.DataFrame:
    """Run every step whose inputs have changed, for every seed, report, and return the contents of ``summary.csv``."""
    _begin(experiment)
    elsewhere = launch if launch is not None and launch.side_by_side else None
    if elsewhere:
        if (count := process_count()) > 1:
            raise ConfigurationError(
                f"found {count} processes that share every training, and a launch section; leave out one"
            )
        check_launch(elsewhere, experiment.layout.submitit)
    if is_rank_zero():
        experiment.calibration.warn_of_too_few()
        experiment.warn_of_other_starts()
    with ExitStack() as locks:
        on_rank_zero(partial(_tidy, experiment.folder, locks))
        runner = Runner(experiment, total=len(_steps(experiment)))
        plans = _plans(experiment, runner)
        for seed in plans:
            layout = experiment.layout.seed(seed)
            if is_rank_zero() and not layout.results.exists():
                write_text(layout.config, experiment.as_yaml(seed))
            if elsewhere:
                write_text(layout.launch, experiment.as_yaml(seed))
        if elsewhere:
            _run_elsewhere(experiment, plans, elsewhere)
        for seed, steps in plans.items():
            if experiment.calibration.promise_samples and not experiment.layout.seed(seed).promise.exists():
                experiment.check_parts()
            runner.run(steps)
            _end_seed(experiment, seed)
            if len(plans) > 1:
                on_rank_zero(partial(_tell, experiment, seed))
        return on_rank_zero(partial(_summarise, experiment))


def planned(experiment: Experiment) -> list[tuple[Step, Status]]:
    """Return the steps of all seeds, and whether each has to run and why; nothing is run or written.

    Data that are here are checked as a run does.
    """
    _check_files(experiment)
    found: list[tuple[Step, Status]] = []
    made_anew: dict[Path, str] = {}
    for step in _steps(experiment):
        status = status_of(step)
        if before := next((made_anew[path] for path in step.inputs if path in made_anew), None):
            status = Status(f"after {before}", status.seconds)
        if not status.is_current:
            made_anew.update(dict.fromkeys(step.outputs, step.what))
        found.append((step, status))
    return found


def run_step(experiment: Experiment, name: str) -> None:
    """Run one step for every seed, and the steps that it depends on; wait for other commands that run them.

    `name` is the step's in the plan, or a task's, for the step of its expert; a ConfigurationError if there is none.
    """
    known = {step.name for step in _steps(experiment)}
    step = name if name in known else f"expert-{name}"
    if step not in known:
        expected = f"one of {', '.join(experiment.tasks)}, or a step of coin run --dry-run"
        raise ConfigurationError(f"found no task or step '{name}', expected {expected}")
    _begin(experiment)
    runner = Runner(experiment, patient=True)
    for seed, steps in _plans(experiment, runner).items():
        runner.run(needed_for(step, steps))
        if step == "evaluate":
            _end_seed(experiment, seed)


def _steps(experiment: Experiment) -> list[Step]:
    """Return the steps of all seeds, without those that only log."""
    steps = [*initial_steps(experiment), *(step for seed in experiment.seeds for step in plan(experiment, seed))]
    return [step for step in steps if not step.only_logs]


def _tidy(folder: Path, locks: ExitStack) -> None:
    """Lock an experiment's folder, and remove what an interrupted command has left there."""
    locks.enter_context(folder_lock(folder, patient=sweep_of(folder) is not None))
    remove_leftovers(folder)


def _end_seed(experiment: Experiment, seed: int) -> None:
    """Write the configuration of the results that are there now, the latest of the experiment's."""
    layout = experiment.layout.seed(seed)
    if is_rank_zero():
        layout.results_json.touch()  # of seeds with different options, the latest run's count
        write_text(layout.config, experiment.as_yaml(seed))


def _tell(experiment: Experiment, seed: int) -> None:
    """Print what a seed has found, before the others are done."""
    kept = stand_ins(summarise(read_results(experiment.layout.seed(seed).folder)))
    if len(kept):
        rank_zero_info(f"seed {seed}: {finding(kept).removeprefix(IN_SHORT)}")


def _begin(experiment: Experiment) -> None:
    """Validate the experiment early, and start all processes."""
    check_connection()
    experiment.check_fit()
    experiment.as_yaml(experiment.seeds[0])  # fail early on a task or method that it cannot say
    join_processes(experiment.folder, experiment.trainer)


def _plans(experiment: Experiment, runner: Runner) -> dict[int, list[Step]]:
    """Prepare the data and the shared initialisation, and return the steps of every seed."""
    on_rank_zero(partial(_fetch, experiment))
    _check_files(experiment)
    runner.run(initial_steps(experiment))
    return {seed: plan(experiment, seed) for seed in experiment.seeds}


def _check_files(experiment: Experiment) -> None:
    """Fail early on data that are here and lack something."""
    here = [task for task in _every_task(experiment) if all(each.there for each in task.downloads())]
    for task in here:
        task.check_files()
    for name, task in experiment.tasks.items():
        if task in here and (there := task.num_training()) is not None:
            task.check_calibration(experiment.most_samples, there, name)


def _run_elsewhere(experiment: Experiment, plans: dict[int, list[Step]], launch: Launch) -> None:
    """Run steps of all seeds that do not depend on one another in processes of their own, as far as that goes."""
    every = [step for steps in plans.values() for step in steps]
    read = {path for step in every if step.elsewhere for path in step.inputs}
    for wave in waves(every):
        Runner(experiment).run([step for step in wave if not step.elsewhere and read.intersection(step.outputs)])
        waiting = [step for step in wave if step.elsewhere and not reused_status(step).is_current]
        if any(step.training for step in waiting):
            experiment.check_parts()
        if waiting:
            rank_zero_info(f"running {len(waiting)} steps, {launch.workers} at a time")
            failed = run_commands([*map(step_command, waiting)], launch, experiment.layout.submitit)
            raise_for(failed, len(waiting), "steps")


def _summarise(experiment: Experiment) -> pd.DataFrame:
    summary = write_summary(experiment.folder)
    Runner(experiment).run(summary_steps(experiment, summary))
    for seed in experiment.seeds:
        write_report([experiment.layout.seed(seed).folder])
    write_report([experiment.folder])
    return summary


def downloads(experiment: Experiment) -> list[Download]:
    """Return the data sets, the network's weights and the experts that come from the network, here or not."""
    counts = {task.num_classes for task in experiment.tasks.values()}
    written = all(experiment.layout.initial(count).is_file() for count in counts)
    taken = experiment.base is not None or written  # then the network's own weights are not read again
    source = experiment.network.source
    of_network = [each for each in source.downloads(_experts(experiment)) if source.zero_shot or not taken]
    return [*(each for task in _every_task(experiment) for each in task.downloads()), *of_network]


def _fetch(experiment: Experiment) -> None:
    """Download what is missing: experts, CLIP and data; a FileError in one line names all that cannot be.

    Other weights are downloaded where they are read.
    """
    check_downloads(downloads(experiment))
    source = experiment.network.source
    own = [source.place] if isinstance(source, HuggingFace) and source.zero_shot and source.weights is not None else []
    for place in (*own, *_experts(experiment)):
        fetch_from_hub(place)
    Tasks(experiment.tasks).prepare_data()


def _every_task(experiment: Experiment) -> list[TaskData]:
    """Return the tasks of an experiment, that of its base among them."""
    base = experiment.base
    return [*experiment.tasks.values(), *([base.task] if base is not None and base.task is not None else [])]


def _experts(experiment: Experiment) -> list[str]:
    given = experiment.expert.checkpoints.values()
    return list(dict.fromkeys(local_place(place) for place in given if place.startswith(PREFIX)))
