"""What the steps of a seed do: each takes the seed's files and a context, and calls the step's function."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coin.core.processes import rank_zero_info
from coin.merging import Experts, Method
from coin.modules import DecodingEvaluator
from coin.networks import load_network
from coin.pipeline.job import Artifacts
from coin.pipeline.seed_files import SeedFiles
from coin.pipeline.step import Context, Measures
from coin.pipeline.steps.code import write_choice
from coin.pipeline.steps.distill import Training
from coin.pipeline.steps.merge import make_coded_models
from coin.pipeline.steps.statistics import estimate_over_tasks
from coin.pipeline.steps.trainer import make_trainer
from coin.reporting.results import read_results, requested_policy
from coin.reporting.summary import summarise, variant_names
from coin.statistics.statistic import DataChoice, Statistic
from coin.tracking.evaluation import best, log_method


def choose_seed_code(context: Context, files: SeedFiles) -> None:
    """Choose the code's weights from calibration data."""
    write_choice(context.outputs[0], files.experts.networks, list(files.calibrations().values()))
    rank_zero_info(f"code: chosen weights {', '.join(f'{w:.3g}' for w in files.code.code.matrix[0].tolist())}")


def estimate(context: Context, files: SeedFiles, which: Statistic, task: str) -> Measures:
    """Compute one statistic of one task's expert, and return its costs."""
    calibration = files.experiment.calibration
    costs = estimate_over_tasks(
        make_trainer(files.folder, context.trainer),
        load_network(files.layout.expert(task)).network,
        files.data(files.tasks if which.data is DataChoice.pooled else {task: files.tasks[task]}),
        calibration.options_of(which),
        context.outputs[0],
        task=task,
        data=str(which.data),
    )
    return {f"{which.name}/{task}/{what}": cost for what, cost in costs.items()}


def merge_method(context: Context, files: SeedFiles, method: Method) -> None:
    """Make a method's coded models."""
    training = Training(files.data(files.tasks), files.layout.logs, files.seed, context.trainer, context.loggers)
    statistics, calibration = files.statistics(method), list(files.calibrations().values())
    experts = Experts(files.experts, statistics=statistics, calibration=calibration, train=training)
    samples = files.experiment.calibration.samples_per_task
    make_coded_models(method, files.code, experts, files.layout.coded, samples)


def evaluate_seed(
    context: Context, files: SeedFiles, coded: Sequence[Path], replicas: Sequence[Path], options: Mapping[str, Any]
) -> None:
    """Measure every method with every decoder; `options` is what ``results.json`` says of the experiment."""
    files.experts.release()
    experiment = files.experiment
    model = DecodingEvaluator(
        experts={name: str(files.layout.expert(name)) for name in files.tasks},
        coded=[str(path) for path in coded],
        decoders=None if experiment.takes_all_decoders else list(experiment.decoders),
        code=files.code.code.matrix.tolist(),
        replicas=[str(path) for path in replicas],
        alpha=experiment.calibration.promise_alpha,
        confidence=experiment.calibration.promise_confidence,
    )
    trainer = make_trainer(files.folder, context.trainer, logger=context.loggers)
    trainer.evaluate(model, files.data(files.tasks), str(files.folder), experiment.name, dict(options))


def log_results(context: Context, files: SeedFiles, method: Method, coded: Artifacts) -> None:
    """Write a method's results to its W&B run, and mark the coded models of the best method."""
    rows = read_results(files.folder)
    policy = rows["batchnorm"].map(requested_policy)
    own = rows[(rows["method"] == method.label) & policy.isin(["", str(method.batchnorm)])]
    assert context.job is not None
    if variant_names(own).iloc[0] == best(summarise(rows)).get("best_method"):
        context.job.log_artifacts(coded, ["best"])
    log_method(context.wandb_run, own)
