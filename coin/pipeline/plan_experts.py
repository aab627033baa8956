"""The first half of the plan: the shared initialisation, the experts, the code and the statistics."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from coin.core.processes import rank_zero_info
from coin.data.tasks import task_with
from coin.errors import ConfigurationError
from coin.files.downloads import hub_weights
from coin.networks import load_network
from coin.networks.hub import PREFIX, local_place
from coin.pipeline.experiment import Experiment
from coin.pipeline.seed_files import SeedFiles
from coin.pipeline.step import Artifacts, Context, JobConfig, Measures, Step, by_stem
from coin.pipeline.steps.code import write_choice
from coin.pipeline.steps.train import import_expert, train_network, write_initial
from coin.pipeline.steps.trainer import estimate_over_tasks, make_trainer
from coin.statistics import Precision
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind


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
                training=folder,
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
    called = f"expert-{name}", files.folder, f"expert {name}"
    if (place := experiment.expert.checkpoints.get(name)) is not None:
        options: dict[str, Any] = {"network": network, "classes": list(task.classes)}
        if place.startswith(PREFIX):
            shown, inputs = place, [*hub_weights(local_place(place)), initial]
            options |= {"place": place, "head": task.head}
        else:
            shown, inputs = Path(place).name, [Path(place)]
            options |= {} if task.head is None else {"head": task.head}
            if not inputs[0].is_file():
                raise ConfigurationError(
                    f"found no file '{inputs[0]}', expected an expert's weights; check expert.checkpoints"
                )
        work = partial(import_expert, config=network, name=name, task=task, place=place, initial=initial)
        doing = f"importing '{shown}'"
        return Step(*called, doing, work, options=options, inputs=inputs, outputs=[output], shared=True)
    config = experiment.expert.of(name)
    return Step(
        *called,
        f"fine-tuning for {config.epochs} epochs",
        partial(train_network, config=config, network=network, task=task, seed=files.seed, name=name, initial=initial),
        options={
            "training": config,
            "network": network,
            "task": task,
            "trainer": experiment.trainer,
            "seed": files.seed,
        },
        inputs=[initial],
        outputs=[output],
        collective=True,
        shared=True,
        elsewhere=True,
        training=output.parent,
        job=JobConfig("expert", name, files.seed, (name,), {"task": name}),
        uses=[Artifacts("initialisation", by_stem([initial]))],
        logs=Artifacts("expert", {name: output}),
    )


def code_step(files: SeedFiles) -> Step:
    """Return the step that chooses the code from calibration data."""

    def choose(context: Context) -> None:
        write_choice(context.outputs[0], files.experts.networks, list(files.calibrations().values()))
        rank_zero_info(f"code: chosen weights {', '.join(f'{w:.3g}' for w in files.code.code.matrix[0].tolist())}")

    return Step(
        "code",
        files.folder,
        "code",
        "choosing its weights",
        choose,
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
        options |= {"kind": which.kind, "k": calibration.fisher_mc_samples}
        if calibration.fisher_precision is not Precision.full:
            options["precision"] = calibration.fisher_precision
    parts = tuple(map(str, which.options.values()))
    called = "-".join((which.name, *parts))
    job = JobConfig("fisher", called, files.seed, parts, {"statistic": which.name, **which.options})

    def estimate(context: Context) -> Measures:
        costs = estimate_over_tasks(
            make_trainer(files.folder, context.trainer),
            load_network(expert).network,
            files.data(tasks),
            calibration.options_of(which),
            path,
            task=task,
            data=str(which.data),
        )
        return {f"{which.name}/{task}/{what}": cost for what, cost in costs.items()}

    return Step(
        path.stem,
        files.folder,
        f"{which} of {task}",
        "computing",
        estimate,
        options={"tasks": tasks, **options},
        inputs=[expert],
        outputs=[path],
        collective=True,
        shared=True,
        elsewhere=True,
        job=job,
        job_alone=replace(job, name=f"{called}-{task}"),
        uses=[Artifacts("expert", {task: expert})],
        logs=statistic_files(which, [path]),
    )


def statistic_files(which: Statistic, paths: Iterable[Path]) -> Artifacts:
    """Return the files of a statistic as artifacts; Gram matrices are many times the size of the networks."""
    return Artifacts("statistics", by_stem(paths), logged=which.name is StatisticKind.fisher)
