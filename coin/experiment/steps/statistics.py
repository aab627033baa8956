"""The step that computes one statistic of a seed's experts."""

from pathlib import Path
from typing import Any

from coin.data import TaskData
from coin.experiment.jobs import FileKind, by_stem
from coin.experiment.seed_run import SeedRun
from coin.experiment.store import step_key
from coin.networks import load_network
from coin.processes import is_first
from coin.statistics import FisherKind
from coin.statistics.files import write_statistic
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind
from coin.steps.trainer import make_trainer


def estimate(run: SeedRun, which: Statistic) -> None:
    """Compute one statistic of every expert whose file is missing or of other inputs."""
    calibration = run.experiment.calibration
    cotangents = calibration.fisher_cotangents if which.kind == FisherKind.monte_carlo else None
    missing: dict[str, tuple[Path, str]] = {}
    for task in run.tasks:
        path = run.statistic_path(which, task)
        key = step_key(_key_options(run, task, which), [run.expert_path(task)], run.experts.sha256)
        if not run.steps.finished(path.stem, key, [path], shared=True):
            missing[task] = (path, key)
    if not missing:
        return
    run.say(f"{which} of {', '.join(missing)}")
    name = "-".join((str(which.name), *which.options.values()))
    with run.job("fisher", name, list(which.options.values()), statistic=str(which.name), **which.options) as work:
        work.reads(FileKind.expert, {task: run.expert_path(task) for task in missing})
        for task, (path, key) in missing.items():
            sums, seconds = make_trainer(run.folder, run.experiment.trainer).statistic_sums(
                load_network(run.expert_path(task)).network,
                run.data(_of(run, task, which)),
                statistic=which.name,
                kind=which.kind or FisherKind.exact,
                cotangents=cotangents,
                memory_mib=calibration.memory_mib,
            )
            fisher = {} if which.kind is None else {"cotangents": cotangents}
            if is_first():
                write_statistic(
                    path,
                    sums,
                    statistic=str(which.name),
                    weights=run.experts.marks[task],
                    seconds=seconds,
                    task=task,
                    samples_per_task=calibration.samples_per_task,
                    seed=run.seed,
                    **which.options,
                    **fisher,
                )
            run.steps.finish(path.stem, key, [path])
            costs = {"seconds": seconds, "passes": sums.passes}
            for logger in work.loggers:
                logger.log_metrics({f"{which.name}/{task}/{what}": cost for what, cost in costs.items()})
        if which.name is StatisticKind.fisher:  # Gram matrices are many times the size of the networks
            work.makes(FileKind.statistics, by_stem(path for path, _ in missing.values()))


def _of(run: SeedRun, task: str, which: Statistic) -> dict[str, TaskData]:
    return run.tasks if which.data is DataChoice.pooled else {task: run.tasks[task]}


def _key_options(run: SeedRun, task: str, which: Statistic) -> dict[str, Any]:
    calibration = run.experiment.calibration
    options = {
        "tasks": _of(run, task, which),
        "samples": calibration.samples_per_task,
        "batch_size": calibration.batch_size,
    }
    if which.kind is None:
        return options
    return options | {"kind": which.kind, "k": calibration.fisher_cotangents}
