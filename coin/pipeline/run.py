"""A whole experiment: every step of every seed whose inputs have changed, the summary, and the reports."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import pandas as pd

from coin.core.processes import is_rank_zero, on_rank_zero, process_count, rank_zero_info
from coin.data.tasks import Tasks
from coin.errors import ConfigurationError
from coin.files.atomic import remove_leftovers, write_text
from coin.pipeline.coded_models import choose_code, compare_layers, estimate, evaluate, make_spares, merge
from coin.pipeline.executors import ExpertJob, Launch, train_side_by_side
from coin.pipeline.experiment import Experiment
from coin.pipeline.jobs import job
from coin.pipeline.records import Steps, folder_lock, step_key, sweep_of
from coin.pipeline.seed_run import SeedRun
from coin.pipeline.steps.trainer import join_processes
from coin.pipeline.training import make_expert, make_initial, needs_training
from coin.reporting import write_report
from coin.reporting.summary import write_summary
from coin.reporting.wandb_evaluation import SUMMARY_TAG, log_summary
from coin.reporting.wandb_settings import check_connection, logging_only


def run_experiment(experiment: Experiment, launch: Launch | None = None) -> pd.DataFrame:
    """Run every step whose inputs have changed, for every seed, report, and return the contents of ``summary.csv``."""
    _begin(experiment)
    if is_rank_zero():
        experiment.calibration.warn_of_too_few()
    with folder_lock(experiment.folder, patient=sweep_of(experiment.folder) is not None):
        on_rank_zero(lambda: remove_leftovers(experiment.folder))
        seeds = _seed_runs(experiment)
        for run in seeds:
            if is_rank_zero() and not run.layout.results.exists():
                write_text(run.layout.config, experiment.as_yaml(run.seed))
        if launch is not None and launch.side_by_side:
            _train_side_by_side(experiment, seeds, launch)
        for run in seeds:
            _run_seed(run)
            if is_rank_zero():  # until now it was that of the results that stood there
                write_text(run.layout.config, experiment.as_yaml(run.seed))
        return on_rank_zero(partial(_summarise, experiment))


def make_experts(experiment: Experiment, task: str) -> None:
    """Make one task's expert for every seed, and the shared initialisation; nothing else."""
    if task not in experiment.tasks:
        raise ConfigurationError(f"found no task '{task}', expected one of {', '.join(experiment.tasks)}")
    _begin(experiment)
    for run in _seed_runs(experiment):
        make_expert(run, task, patient=True)


def _begin(experiment: Experiment) -> None:
    """Validate the experiment early, and start all processes."""
    check_connection()
    experiment.check_fit()
    experiment.as_yaml(experiment.seeds[0])  # a task or method that it cannot say is better told of now
    join_processes(experiment.folder, experiment.trainer)


def _seed_runs(experiment: Experiment) -> list[SeedRun]:
    """Prepare what all seeds share, and return the seeds to run."""
    on_rank_zero(Tasks(experiment.tasks).prepare_data)
    for task in experiment.tasks.values():
        _ = task.num_classes  # a folder that is missing or has one class is better told of before the pretraining
    initial = make_initial(experiment)
    return [SeedRun(experiment, seed, initial) for seed in experiment.seeds]


def _run_seed(run: SeedRun) -> None:
    experiment = run.experiment
    promises = bool(experiment.calibration.promise_samples) and not run.layout.promise.exists()
    if promises or any(needs_training(run, name) for name in run.tasks):
        experiment.check_parts()
    for name in run.tasks:
        make_expert(run, name)
    choose_code(run)
    for which in dict.fromkeys(which for method in experiment.methods for which in method.statistics()):
        estimate(run, which)
    with ExitStack() as jobs:
        merge(run, jobs)
        compare_layers(run)
        make_spares(run)
        run.experts.release()
        evaluate(run)


def _train_side_by_side(experiment: Experiment, seeds: Sequence[SeedRun], launch: Launch) -> None:
    if process_count() > 1:
        raise ConfigurationError(
            f"found {process_count()} processes that share every training, and a launch section; leave out one"
        )
    jobs = []
    for run in seeds:
        write_text(run.layout.launch, experiment.as_yaml(run.seed))
        for task in experiment.tasks:
            if needs_training(run, task):
                log = run.layout.expert(task).with_name("launch.log")
                jobs.append(ExpertJob(f"seed {run.seed}: expert {task}", run.layout.launch, task, log))
    if jobs:
        experiment.check_parts()
        rank_zero_info(f"training {len(jobs)} experts, {launch.workers} at a time")
        train_side_by_side(jobs, launch, experiment.layout.submitit)


def _summarise(experiment: Experiment) -> pd.DataFrame:
    summary = write_summary(experiment.folder)
    _log_summary(experiment, summary)
    for seed in experiment.seeds:
        write_report([experiment.layout.seed(seed).folder])
    write_report([experiment.folder])
    return summary


def _log_summary(experiment: Experiment, summary: pd.DataFrame) -> None:
    """Log the summary over seeds to a W&B run of its own, if there are several seeds and it has changed.

    An agent of a W&B sweep logs to one run; there the means go to that run's summary.
    """
    steps, key = Steps(experiment.folder), step_key({}, [experiment.layout.summary])
    if len(experiment.seeds) < 2 or steps.finished("wandb-summary", key, []):
        return
    with logging_only("the summary over seeds"), job(experiment, "evaluate", "summary", None, [SUMMARY_TAG]) as work:
        if work.run is not None:
            log_summary(work.run, summary)
            steps.finish("wandb-summary", key, [])
