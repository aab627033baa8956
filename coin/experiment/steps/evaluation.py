"""The last step of a seed: every method measured with every decoder, and what of it goes to W&B."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from coin.experiment.jobs import FileKind, by_stem, common_tags, run_config
from coin.experiment.seed_run import SeedRun
from coin.experiment.store import step_key
from coin.modules import DecodingEvaluator
from coin.processes import from_first
from coin.reporting.extras import EXAMPLES_NPZ
from coin.reporting.results import COLUMNS, CONFUSION_NPZ, RESULTS_CSV, RESULTS_JSON, read_results
from coin.reporting.wandb_evaluation import code_axes, log_method_runs
from coin.reporting.wandb_settings import logging_only
from coin.steps.trainer import make_trainer


def evaluate(run: SeedRun) -> None:
    """Measure every method with every decoder, unless nothing that goes into it has changed."""
    experiment, code = run.experiment, run.code.code.matrix
    coded = [path for method in experiment.methods for path in run.coded_paths(method)]
    shown = coded and experiment.network.reads == "images"
    files = (RESULTS_CSV, RESULTS_JSON, CONFUSION_NPZ, *([EXAMPLES_NPZ] if shown else []))
    outputs = [run.folder / name for name in files]
    options = {**run.options, "tasks": run.tasks, "code": code}  # results.json says all of them
    key = step_key(options | {"columns": COLUMNS}, [*run.experts.paths.values(), *coded], run.experts.sha256)
    if run.steps.finished("evaluate", key, outputs):
        from_first((run.folder / RESULTS_JSON).touch)  # of seeds with different options, the latest run's count
        run.say("evaluation: up to date")
    else:
        _measure(run, coded)
        run.steps.finish("evaluate", key, outputs)
    if experiment.wandb.method_runs:
        from_first(partial(_log_methods, run))


def _measure(run: SeedRun, coded: Sequence[Path]) -> None:
    experiment = run.experiment
    run.say("evaluating every method with every decoder")
    model = DecodingEvaluator(
        experts={name: str(path) for name, path in run.experts.paths.items()},
        coded=[str(path) for path in coded],
        decoders=list(experiment.decoders),
        code=run.code.code.matrix.tolist(),
    )
    with run.job("evaluate", "evaluate") as work:
        work.reads(FileKind.expert, run.experts.paths)
        work.reads(FileKind.coded_model, by_stem(coded))
        trainer = make_trainer(run.folder, experiment.trainer, logger=work.loggers or False)
        trainer.evaluate(
            model,
            run.data(run.tasks),
            output=str(run.folder),
            name=experiment.name,
            configuration=run.options,
        )
        work.makes(FileKind.results, {"rows": run.folder / RESULTS_JSON})


def _log_methods(run: SeedRun) -> None:
    """Give every method a W&B run of its own, where its numbers are new."""
    key = step_key({}, [run.folder / RESULTS_CSV])
    if run.steps.finished("wandb-methods", key, []):
        return
    with logging_only("the runs of the methods"):
        log_method_runs(
            run.folder,
            read_results(run.folder),
            group=run.experiment.name,
            config=run_config(run.experiment, run.options),
            tags=common_tags(run.experiment),
            axes=code_axes(list(run.tasks), run.code.code.matrix.tolist()),
        )
        run.steps.finish("wandb-methods", key, [])
