"""The step that computes one statistic of a seed's experts."""

from pathlib import Path
from typing import Any

from coin.data import TaskData
from coin.experiment.jobs import FileKind, by_stem
from coin.experiment.records import step_key
from coin.experiment.seed_run import SeedRun
from coin.experiment.trainers import make_trainer
from coin.experiment.wanted import Wanted
from coin.modules import StatisticKind
from coin.networks import load_network
from coin.processes import is_first
from coin.statistics import FisherKind
from coin.statistics.files import save_statistic


def estimate(run: SeedRun, wanted: Wanted) -> None:
    """Compute one statistic of every expert whose file is missing or of other inputs."""
    calibration = run.experiment.calibration
    cotangents = calibration.fisher_cotangents if wanted.kind == FisherKind.monte_carlo else None
    missing: dict[str, tuple[Path, str]] = {}
    for task in run.tasks:
        path = wanted.path(run.folder, task, calibration)
        key = step_key(_key_options(run, task, wanted), [run.expert_path(task)], run.experts.sha256)
        if not run.steps.finished(path.stem, key, [path]):
            missing[task] = (path, key)
    if not missing:
        return
    run.say(f"{wanted} of {', '.join(missing)}")
    name = "-".join((str(wanted.statistic), *wanted.options.values()))
    with run.job(
        "fisher", name, list(wanted.options.values()), statistic=str(wanted.statistic), **wanted.options
    ) as work:
        work.reads(FileKind.expert, {task: run.expert_path(task) for task in missing})
        for task, (path, key) in missing.items():
            sums, seconds = make_trainer(run.folder, run.experiment.trainer).statistic_sums(
                load_network(run.expert_path(task)).network,
                run.data(_of(run, task, wanted)),
                statistic=wanted.statistic,
                kind=wanted.kind or FisherKind.exact,
                cotangents=cotangents,
                memory_mib=calibration.memory_mib,
            )
            fisher = {} if wanted.kind is None else {"cotangents": cotangents}
            if is_first():
                save_statistic(
                    path,
                    sums,
                    statistic=str(wanted.statistic),
                    weights=run.experts.marks[task],
                    seconds=seconds,
                    task=task,
                    samples_per_task=calibration.samples_per_task,
                    seed=run.seed,
                    **wanted.options,
                    **fisher,
                )
            run.steps.finish(path.stem, key, [path])
            costs = {"seconds": seconds, "passes": sums.passes}
            for logger in work.loggers:
                logger.log_metrics({f"{wanted.statistic}/{task}/{what}": cost for what, cost in costs.items()})
        if wanted.statistic is StatisticKind.fisher:  # Gram matrices are many times the size of the networks
            work.makes(FileKind.statistics, by_stem(path for path, _ in missing.values()))


def _of(run: SeedRun, task: str, wanted: Wanted) -> dict[str, TaskData]:
    return run.tasks if wanted.data == "pooled" else {task: run.tasks[task]}


def _key_options(run: SeedRun, task: str, wanted: Wanted) -> dict[str, Any]:
    calibration = run.experiment.calibration
    options = {
        "tasks": _of(run, task, wanted),
        "samples": calibration.samples_per_task,
        "batch_size": calibration.batch_size,
    }
    if wanted.kind is None:
        return options
    return options | {"kind": wanted.kind, "k": calibration.fisher_cotangents}
