"""The step that makes every method's coded models."""

import re
from functools import partial
from pathlib import Path
from typing import Any

from coin.experiment.jobs import FileKind, Job, by_stem
from coin.experiment.seed_run import SeedRun
from coin.experiment.store import step_key
from coin.merging import Method
from coin.processes import from_first
from coin.statistics.statistic import StatisticKind
from coin.steps.distill import Training
from coin.steps.experts import StatisticPaths, StoredExperts
from coin.steps.merge import make_coded_models


def merge(run: SeedRun) -> None:
    """Make every method's coded models."""
    for method in run.experiment.methods:
        paths = run.coded_paths(method)
        name = record_name(paths[0])
        statistics = run.statistics(method)
        key = _merge_key(run, method, statistics)
        if run.steps.finished(f"coded-{name}", key, paths):
            run.say(f"{name}: up to date")
            continue
        run.say(f"{name}: {'training' if method.is_trained else 'merging'}")
        job_type = "distill" if method.is_trained else "merge"
        with run.job(job_type, name, [method.label], method=method.label, batchnorm=str(method.batchnorm)) as work:
            _tell_inputs(run, work, method, statistics)
            folder, options = run.folder / "logs", run.experiment.trainer
            train = Training(run.data(run.tasks), folder, run.seed, options, work.loggers)
            experts = StoredExperts(run.experts, statistics, run.calibrations(), run.initial, train)
            samples = run.experiment.calibration.samples_per_task
            make = partial(make_coded_models, method, run.code, experts, run.folder / "coded", samples)
            make() if method.is_trained else from_first(make)
            work.makes(FileKind.coded_model, by_stem(paths))
        run.steps.finish(f"coded-{name}", key, paths)


def record_name(path: Path) -> str:
    """Return what a method's coded models are called together, from one of their files."""
    return re.sub(r"(\.row-\d+)?\.safetensors$", "", path.name)


def _merge_key(run: SeedRun, method: Method, statistics: StatisticPaths) -> str:
    options: dict[str, Any] = {
        "method": method,
        "code": run.code.code.matrix,
        "calibration": run.experiment.calibration,
        "tasks": run.tasks,
        "seed": run.seed,
    }
    if run.experiment.code is None:
        options["code_passes"] = run.code.passes  # they are part of what the coded models cost
    if method.is_trained:
        options["trainer"] = run.experiment.trainer
    sources = [*run.experts.paths.values(), *(path for files in statistics.values() for path in files.values())]
    if method.reads_initial:
        sources.append(run.initial)
    return step_key(options, sources, run.experts.sha256)


def _tell_inputs(run: SeedRun, work: Job, method: Method, statistics: StatisticPaths) -> None:
    """Tell W&B which files a method reads."""
    work.reads(FileKind.expert, run.experts.paths)
    for which, files in statistics.items():
        logged = which.name is StatisticKind.fisher
        (work.reads if logged else work.reads_unlogged)(FileKind.statistics, by_stem(files.values()))
    if method.reads_initial:
        work.reads(FileKind.initialisation, {run.initial.stem: run.initial})
