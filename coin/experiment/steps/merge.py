"""The step that makes every method's coded models."""

import re
from functools import partial
from pathlib import Path
from typing import Any

from coin.experiment.distillation import distill_rows
from coin.experiment.jobs import FileKind, Job, by_stem
from coin.experiment.merge import Ingredients, merge_experts
from coin.experiment.records import step_key
from coin.experiment.seed_run import SeedRun
from coin.merging import MergeMethod, Requirement
from coin.modules import Distillation, StatisticKind
from coin.networks import BatchNormPolicy
from coin.processes import from_first


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
        run.say(f"{name}: {'training' if isinstance(method, Distillation) else 'merging'}")
        job_type = "distill" if isinstance(method, Distillation) else "merge"
        with run.job(job_type, name, [method.label], method=method.label, batchnorm=str(method.batchnorm)) as work:
            _tell_inputs(run, work, method, statistics)
            ingredients = Ingredients(run.experts, statistics, run.calibrations(), run.initial)
            if isinstance(method, Distillation):
                distill_rows(
                    method,
                    ingredients,
                    run.code,
                    run.data(run.tasks),
                    paths,
                    run.folder / "logs",
                    seed=run.seed,
                    trainer_options=run.experiment.trainer,
                    loggers=work.loggers,
                )
            else:
                samples = run.experiment.calibration.samples_per_task
                merge = partial(merge_experts, method, run.code, ingredients, run.folder / "coded", samples)
                from_first(merge)
            work.makes(FileKind.coded_model, by_stem(paths))
        run.steps.finish(f"coded-{name}", key, paths)


def record_name(path: Path) -> str:
    """Return what a method's coded models are called together, from one of their files."""
    return re.sub(r"(\.row-\d+)?\.safetensors$", "", path.name)


def _merge_key(run: SeedRun, method: MergeMethod | Distillation, statistics: dict[str, dict[str, Path]]) -> str:
    options: dict[str, Any] = {
        "method": method,
        "code": run.code.code.matrix,
        "calibration": run.experiment.calibration,
        "tasks": run.tasks,
        "seed": run.seed,
    }
    if run.experiment.code is None:
        options["code_passes"] = run.code.passes  # they are part of what the coded models cost
    if isinstance(method, Distillation):
        options["trainer"] = run.experiment.trainer
    sources = [*run.experts.paths.values(), *(path for files in statistics.values() for path in files.values())]
    if _reads_initial(method):
        sources.append(run.initial)
    return step_key(options, sources, run.experts.sha256)


def _tell_inputs(
    run: SeedRun, work: Job, method: MergeMethod | Distillation, statistics: dict[str, dict[str, Path]]
) -> None:
    """Tell W&B which files a method reads."""
    work.reads(FileKind.expert, run.experts.paths)
    for statistic, files in statistics.items():
        logged = statistic == StatisticKind.fisher
        (work.reads if logged else work.reads_unlogged)(FileKind.statistics, by_stem(files.values()))
    if _reads_initial(method):
        work.reads(FileKind.initialisation, {run.initial.stem: run.initial})


def _reads_initial(method: MergeMethod | Distillation) -> bool:
    """Return whether a method, or its BatchNorm policy, needs the shared initialisation."""
    keeps = isinstance(method, MergeMethod) and method.batchnorm == BatchNormPolicy.keep
    return keeps or Requirement.INITIAL in getattr(method, "requires", ())
