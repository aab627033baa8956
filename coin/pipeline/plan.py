"""The plan of an experiment: its steps as data, with their input and output files."""

from typing import Any

import pandas as pd

from coin.merging import Experts, Method
from coin.modules import DecodingEvaluator
from coin.networks import Compression
from coin.pipeline.experiment import Experiment
from coin.pipeline.plan_experts import code_step, expert_step, statistic_files, statistic_step
from coin.pipeline.seed_files import SeedFiles
from coin.pipeline.step import Artifacts, Context, JobConfig, Step, by_stem
from coin.pipeline.steps.code import AUTO
from coin.pipeline.steps.compress import compress_file
from coin.pipeline.steps.layers import compare_layers
from coin.pipeline.steps.merge import Training, coded_name, make_coded_models
from coin.pipeline.steps.trainer import make_trainer
from coin.reporting.results import COLUMNS, read_results, requested_policy
from coin.reporting.summary import summarise, variant_names
from coin.tracking.evaluation import best, log_method, log_summary


def plan(experiment: Experiment, seed: int) -> list[Step]:
    """Return all steps of one seed after `initial_steps`; each reads outputs of earlier ones."""
    files, methods = SeedFiles(experiment, seed), experiment.methods
    statistics = dict.fromkeys(which for method in methods for which in method.statistics())
    return [
        *(expert_step(files, name) for name in files.tasks),
        *([code_step(files)] if experiment.code is None else []),
        *(statistic_step(files, which, task) for which in statistics for task in files.tasks),
        *(merge_step(files, method) for method in methods),
        layers_step(files),
        *(replicas_step(files, compression) for compression in experiment.replicas),
        evaluate_step(files),
        *(log_step(files, method) for method in methods),
    ]


def merge_step(files: SeedFiles, method: Method) -> Step:
    """Return the step that makes a method's coded models."""
    experiment, statistics, name = files.experiment, files.statistics(method), coded_name(method)
    trainer = {"trainer": experiment.trainer} if method.is_trained else {}
    initial = [files.initial] if method.reads_initial else []

    def merge(context: Context) -> None:
        training = Training(files.data(files.tasks), files.layout.logs, files.seed, context.trainer, context.loggers)
        calibration = list(files.calibrations().values())
        experts = Experts(files.experts, statistics=statistics, calibration=calibration, train=training)
        samples = experiment.calibration.samples_per_task
        make_coded_models(method, files.code, experts, files.layout.coded, samples)

    return Step(
        f"coded-{name}",
        files.folder,
        name,
        "training" if method.is_trained else "merging",
        merge,
        options={
            "method": method,
            "code": _code(experiment),
            "calibration": experiment.calibration.merging,
            "tasks": files.tasks,
            "seed": files.seed,
            **trainer,
        },
        inputs=[
            *files.expert_paths,
            *(path for paths in statistics.values() for path in paths.values()),
            *initial,
            *files.code_files,
        ],
        outputs=files.coded_outputs(method),
        collective=method.is_trained,
        elsewhere=method.is_trained,
        job=_method_job(files, method),
        uses=[
            files.expert_artifacts,
            *(statistic_files(which, paths.values()) for which, paths in statistics.items()),
            Artifacts("initialisation", by_stem(initial)),
        ],
        logs=Artifacts("coded-model", by_stem(files.coded_paths(method))),
    )


def layers_step(files: SeedFiles) -> Step:
    """Return the step that compares coded models and experts layer by layer, or removes an earlier comparison."""
    coded = {
        path: files.statistics(method)
        for method in files.experiment.methods
        for path in files.coded_paths(method, compressed=False)
    }
    read = {path for statistics in coded.values() for paths in statistics.values() for path in paths.values()}
    return Step(
        "layers",
        files.folder,
        "layers",
        "comparing the coded models with the experts",
        lambda _: compare_layers(files.layout.layers, files.experts, coded),
        inputs=[*files.expert_paths, *coded, *sorted(read)],
        outputs=[files.layout.layers] if coded else [],
    )


def replicas_step(files: SeedFiles, compression: Compression) -> Step:
    """Return the step that compresses every expert."""
    paths = files.replica_paths(compression)

    def compress(_: Context) -> None:
        for network, output in zip(files.expert_paths, paths, strict=False):  # after these may stand the 8-bit base
            compress_file(network, output, files.initial, compression)

    return Step(
        f"replicas-{compression.name}",
        files.folder,
        f"replicas of {compression.name}",
        "compressing",
        compress,
        options={"compression": compression},
        inputs=[*files.expert_paths, files.initial],
        outputs=paths,
        shared=True,
        elsewhere=True,
    )


def evaluate_step(files: SeedFiles) -> Step:
    """Return the step that measures every method with every decoder."""
    experiment, layout = files.experiment, files.layout
    coded = [path for method in experiment.methods for path in files.coded_paths(method)]
    replicas = [path for each in experiment.replicas for path in files.replica_paths(each)[: len(files.tasks)]]
    options = experiment.config_dict(files.seed)  # results.json says all of them

    def evaluate(context: Context) -> None:
        files.experts.release()
        model = DecodingEvaluator(
            experts={name: str(layout.expert(name)) for name in files.tasks},
            coded=[str(path) for path in coded],
            decoders=None if experiment.takes_all_decoders else list(experiment.decoders),
            code=files.code.code.matrix.tolist(),
            replicas=[str(path) for path in replicas],
            alpha=experiment.calibration.promise_alpha,
            confidence=experiment.calibration.promise_confidence,
        )
        trainer = make_trainer(files.folder, context.trainer, logger=context.loggers)
        trainer.evaluate(model, files.data(files.tasks), str(files.folder), experiment.name, options)

    return Step(
        "evaluate",
        files.folder,
        "evaluation",
        "every method with every decoder",
        evaluate,
        options={**options, "code": _code(experiment), "columns": COLUMNS},
        inputs=[*files.expert_paths, *coded, *replicas, *files.code_files],
        outputs=[
            *(layout.results, layout.results_json, layout.confusions, layout.risk, layout.risk_samples),
            *([layout.examples] if coded and experiment.network.reads == "images" else []),
            *([layout.promise] if experiment.calibration.promise_samples else []),
        ],
        collective=True,
        job=JobConfig("evaluate", "evaluate", files.seed),
        uses=[files.expert_artifacts, Artifacts("coded-model", by_stem(coded))],
        logs=Artifacts("results", {"rows": layout.results_json}),
    )


def log_step(files: SeedFiles, method: Method) -> Step:
    """Return the step that logs a method's results to its W&B run, and marks the coded models of the best method."""
    coded = Artifacts("coded-model", by_stem(files.coded_paths(method)))

    def log_results(context: Context) -> None:
        rows = read_results(files.folder)
        policy = rows["batchnorm"].map(requested_policy)
        own = rows[(rows["method"] == method.label) & policy.isin(["", str(method.batchnorm)])]
        assert context.job is not None
        if variant_names(own).iloc[0] == best(summarise(rows)).get("best_method"):
            context.job.log_artifacts(coded, ["best"])
        log_method(context.wandb_run, own)

    return Step(
        f"wandb-{coded_name(method)}",
        files.folder,
        coded_name(method),
        "logging its results to W&B",
        log_results,
        inputs=[files.layout.results],
        job=_method_job(files, method),
        only_logs=True,
    )


def summary_steps(experiment: Experiment, summary: pd.DataFrame) -> list[Step]:
    """Return the step that logs the summary over seeds to a W&B run of its own, if there are several seeds."""
    step = Step(
        "wandb-summary",
        experiment.folder,
        "summary",
        "logging it to W&B",
        lambda context: log_summary(context.wandb_run, summary),
        inputs=[experiment.layout.summary],
        job=JobConfig("evaluate", "summary", None, ("summary",)),
        only_logs=True,
    )
    return [step] if len(experiment.seeds) > 1 else []


def _code(experiment: Experiment) -> Any:
    """Return the code as an option of a step; one that a seed chooses is among the step's files."""
    return AUTO if experiment.code is None else experiment.code.matrix


def _method_job(files: SeedFiles, method: Method) -> JobConfig:
    config = {"method": method.label, "batchnorm": str(method.batchnorm)}
    return JobConfig("method", coded_name(method), files.seed, ("method", method.label), config)
