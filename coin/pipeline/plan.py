"""The plan of an experiment: what there is to do, from which files, into which files. Nothing is done here."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from coin.data.tasks import task_with
from coin.errors import ConfigurationError
from coin.merging import Method
from coin.networks import Compression
from coin.pipeline.experiment import Experiment
from coin.pipeline.seed_files import SeedFiles
from coin.pipeline.step import Artifacts, JobConfig, Step, by_stem
from coin.pipeline.steps.code import AUTO
from coin.pipeline.steps.compress import compress_files
from coin.pipeline.steps.layers import compare_layers
from coin.pipeline.steps.merge import coded_name
from coin.pipeline.steps.train import import_network, train_network, write_initial
from coin.pipeline.work import choose_code, estimate, evaluate, log_results, merge
from coin.reporting.results import COLUMNS
from coin.reporting.wandb_evaluation import METHOD_TAG, SUMMARY_TAG, log_summary
from coin.statistics import Precision
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind


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
        *(spares_step(files, compression) for compression in experiment.spares),
        evaluate_step(files),
        *(log_step(files, method) for method in methods),
    ]


def initial_steps(experiment: Experiment) -> list[Step]:
    """Return the steps to the shared initialisation: pretraining, where it is asked for, and one file a class count.

    Experts with equal class counts share the head, all experts share the other layers.
    """
    base, folder, network = experiment.base, experiment.layout.base, experiment.network
    pretrained = None if base is None or base.checkpoint is None else Path(base.checkpoint)
    job = JobConfig("expert", "base", None, ("base",), {"task": "base"})
    steps = []
    if base is not None and base.task is not None:
        pretrained, task = experiment.layout.pretrained, task_with(base.task, image_size=network.image_size)
        steps.append(
            Step(
                "base",
                folder,
                "base",
                f"pretraining {network.name} on {type(task).__name__}",
                partial(train_network, config=base, network=network, task=task, seed=base.seed),
                options={"network": network, "base": base, "task": task, "trainer": experiment.trainer},
                outputs=[pretrained],
                collective=True,
                shared=True,
                trains=True,
                lock=folder,
                job=job,
            )
        )
    counts = sorted({task.num_classes for task in experiment.tasks.values()}, reverse=True)
    for count in counts:
        path, largest = experiment.layout.initial(count), experiment.layout.initial(counts[0])
        # What a constructor draws depends on the class count, below the head too.
        wider = None if path == largest else largest
        steps.append(
            Step(
                f"initial-{count}",
                folder,
                f"initialisation for {count} classes",
                "writing",
                partial(write_initial, network=network, classes=count, wider=wider, checkpoint=pretrained),
                options={"network": network, "classes": count},
                inputs=[file for file in (pretrained, wider) if file is not None],
                outputs=[path],
                shared=True,
                job=job,
                opens_job=False,
                logs=Artifacts("initialisation", by_stem([path])),
            )
        )
    return steps


def expert_step(files: SeedFiles, name: str) -> Step:
    """Return the step that trains or imports a task's expert."""
    experiment, task, output = files.experiment, files.tasks[name], files.layout.expert(name)
    network, initial = experiment.network, experiment.layout.initial(task.num_classes)
    if name in experiment.expert.checkpoints:
        given = Path(experiment.expert.checkpoints[name])
        if not given.is_file():
            raise ConfigurationError(f"found no file '{given}', expected an expert's weights; check expert.checkpoints")
        return Step(
            f"expert-{name}",
            files.folder,
            f"expert {name}",
            f"importing '{given.name}'",
            partial(import_network, config=network, task=name, classes=task.classes, given=given),
            options={"network": network, "classes": list(task.classes)},
            inputs=[given],
            outputs=[output],
            shared=True,
        )
    config, options = experiment.expert.of(name), {"task": task, "trainer": experiment.trainer, "seed": files.seed}
    return Step(
        f"expert-{name}",
        files.folder,
        f"expert {name}",
        f"fine-tuning for {config.epochs} epochs",
        partial(train_network, config=config, network=network, task=task, seed=files.seed, initial=initial),
        options={"training": config, "network": network, **options},
        inputs=[initial],
        outputs=[output],
        collective=True,
        shared=True,
        trains=True,
        elsewhere=True,
        lock=output.parent,
        job=JobConfig("expert", name, files.seed, (name,), {"task": name}),
        uses=[Artifacts("initialisation", by_stem([initial]))],
        logs=Artifacts("expert", {name: output}),
    )


def code_step(files: SeedFiles) -> Step:
    """Return the step that chooses the code from calibration data."""
    return Step(
        "code",
        files.folder,
        "code",
        "choosing its weights",
        partial(choose_code, files=files),
        options={"tasks": files.tasks, "calibration": files.experiment.calibration.merging},
        inputs=files.expert_paths,
        outputs=[files.layout.code],
        shared=True,
        elsewhere=True,
    )


def statistic_step(files: SeedFiles, which: Statistic, task: str) -> Step:
    """Return the step that computes one statistic of one expert."""
    calibration, path = files.experiment.calibration, files.statistic_path(which, task)
    expert = files.layout.expert(task)
    tasks = files.tasks if which.data is DataChoice.pooled else {task: files.tasks[task]}
    options: dict[str, Any] = {"samples": calibration.samples_per_task, "batch_size": calibration.batch_size}
    if which.kind is not None:
        options |= {"kind": which.kind, "k": calibration.fisher_cotangents}
        if calibration.fisher_precision is not Precision.full:
            options["precision"] = calibration.fisher_precision
    parts = tuple(map(str, which.options.values()))
    return Step(
        path.stem,
        files.folder,
        f"{which} of {task}",
        "computing",
        partial(estimate, files=files, which=which, task=task),
        options={"tasks": tasks, **options},
        inputs=[expert],
        outputs=[path],
        collective=True,
        shared=True,
        elsewhere=True,
        job=JobConfig(
            "fisher", "-".join((which.name, *parts)), files.seed, parts, {"statistic": which.name, **which.options}
        ),
        uses=[Artifacts("expert", {task: expert})],
        logs=_statistics(which, [path]),
    )


def merge_step(files: SeedFiles, method: Method) -> Step:
    """Return the step that makes a method's coded models."""
    experiment, statistics, name = files.experiment, files.statistics(method), coded_name(method)
    trainer = {"trainer": experiment.trainer} if method.is_trained else {}
    initial = [files.initial] if method.reads_initial else []
    return Step(
        f"coded-{name}",
        files.folder,
        name,
        "training" if method.is_trained else "merging",
        partial(merge, files=files, method=method),
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
        elsewhere=True,
        job=_method_job(files, method),
        uses=[
            files.expert_artifacts,
            *(_statistics(which, paths.values()) for which, paths in statistics.items()),
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


def spares_step(files: SeedFiles, compression: Compression) -> Step:
    """Return the step that compresses every expert."""
    paths = files.spare_paths(compression)
    return Step(
        f"spares-{compression.name}",
        files.folder,
        f"spares of {compression.name}",
        "compressing",
        lambda _: compress_files(files.expert_paths, paths, files.initial, compression),
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
    spares = [path for each in experiment.spares for path in files.spare_paths(each)[: len(files.tasks)]]
    options = experiment.config_dict(files.seed)  # results.json says all of them
    return Step(
        "evaluate",
        files.folder,
        "evaluation",
        "every method with every decoder",
        partial(evaluate, files=files, coded=coded, spares=spares, options=options),
        options={**options, "code": _code(experiment), "columns": COLUMNS},
        inputs=[*files.expert_paths, *coded, *spares, *files.code_files],
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
    """Return the step that logs a method's results to its W&B run."""
    coded = Artifacts("coded-model", by_stem(files.coded_paths(method)))
    return Step(
        f"wandb-{coded_name(method)}",
        files.folder,
        coded_name(method),
        "logging its results to W&B",
        partial(log_results, files=files, method=method, coded=coded),
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
        job=JobConfig("evaluate", "summary", None, (SUMMARY_TAG,)),
        only_logs=True,
    )
    return [step] if len(experiment.seeds) > 1 else []


def _statistics(which: Statistic, paths: Iterable[Path]) -> Artifacts:
    """Return the files of a statistic as artifacts; Gram matrices are many times the size of the networks."""
    return Artifacts("statistics", by_stem(paths), logged=which.name is StatisticKind.fisher)


def _code(experiment: Experiment) -> Any:
    """Return the code as an option of a step; one that a seed chooses is among the step's files."""
    return AUTO if experiment.code is None else experiment.code.matrix


def _method_job(files: SeedFiles, method: Method) -> JobConfig:
    config = {"method": method.label, "batchnorm": str(method.batchnorm)}
    return JobConfig("method", coded_name(method), files.seed, (METHOD_TAG, method.label), config)
