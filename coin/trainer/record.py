"""Write the results of an evaluation: rows, confusion matrices and examples, as files and to W&B."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lightning.pytorch.loggers import Logger, WandbLogger

from coin.data.tasks import Tasks
from coin.errors import CoinWarning
from coin.modules import DecodingEvaluator
from coin.reporting.extras import PROMISE_COLUMNS, Examples, write_examples, write_promises
from coin.reporting.results import COLUMNS, Row, confusion_key, requested_policy, write_results
from coin.reporting.summary import is_weak
from coin.tracking.settings import logging_only


def record_evaluation(
    model: DecodingEvaluator,
    tasks: Tasks,
    folder: Path,
    name: str,
    configuration: Mapping[str, Any] | None,
    loggers: Sequence[Logger],
) -> None:
    """Write what an evaluator has measured on tasks to a folder, and log the same numbers to the W&B loggers.

    `name` is the experiment's in the results; `configuration` is what ``results.json`` holds beside the code.
    """
    same: dict[str, Any] = {"experiment": name, "seed": tasks.seed, "samples_per_task": tasks.samples_per_task}
    told = [{key: each.columns[key] for key in COLUMNS if each.columns.get(key) is not None} for each in model.outcomes]
    counts = {name: task.num_classes for name, task in tasks.tasks.items()}
    rows = [Row(**(same | each), chance=1 / counts[each["task"]]) for each in told]
    pairs = list(zip(rows, model.outcomes, strict=True))
    confusions = {confusion_key(row): outcome.confusion.numpy() for row, outcome in pairs}
    replicas = {replica.variant.method: replica.variant for replica in model.replicas}
    methods = [
        {"label": each.method, "method": each.kind, "batchnorm": each.batchnorm, "row": row, "chosen": chosen}
        for each in [*model.variants, *replicas.values()]
        for row, chosen in enumerate(each.chosen)
    ]
    size = sum(tensor.nbytes for tensor in model.experts[0].state_dict().values()) / 2**20
    made = {"tasks": list(model.tasks), "code": model.code.matrix.tolist(), "network_mib": size}
    runs = [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]
    url = next((run.url for run in runs if isinstance(run.url, str)), None)
    classes = {name: task.classes for name, task in tasks.tasks.items()}
    images = all(task.content == "images" for task in tasks.tasks.values())
    warn_of_weak_experts({row.task: row.expert_accuracy for row in rows}, counts, images=images)
    write_results(folder, rows, {**made, **(configuration or {})}, confusions, methods, classes, url)
    examples = examples_of(model, tasks)
    write_examples(folder, examples)
    model.save_systems(folder / "systems")
    kept = [
        {**vars(row), **vars(outcome.promise), "promised": outcome.promise.coverage}
        | {name: outcome.columns[name] for name in ("coverage", "found")}
        for row, outcome in pairs
        if outcome.promise
    ]
    write_promises(folder, pd.DataFrame(kept, columns=list(PROMISE_COLUMNS)))
    for run in runs:
        from coin.tracking.evaluation import log_evaluation  # imports wandb

        with logging_only("the evaluation"):
            log_evaluation(run, rows, confusions, examples, classes)


def warn_of_weak_experts(accuracies: Mapping[str, float], classes: Mapping[str, int], *, images: bool) -> None:
    """Warn where an expert is hardly more often right than chance: what is kept of that says nothing."""
    chance = {name: 1 / classes[name] for name in accuracies}
    if weak := [name for name, found in accuracies.items() if is_weak(found, chance[name])]:
        each = ", ".join(f"'{name}' {accuracies[name]:.1%} (chance is {chance[name]:.1%})" for name in weak)
        inputs = "images normalised as ImageNet's" if images else "texts as the tokenizer cuts them"
        warnings.warn(
            f"found experts that are hardly right: {each}, so that NDA says little; train them for longer, or see that "
            f"imported ones were trained on what networks get here, {inputs}",
            CoinWarning,
            stacklevel=2,
        )


def examples_of(model: DecodingEvaluator, tasks: Tasks) -> Examples | None:
    """Return the test images kept by an evaluation, with their tasks' class names; None if there are none."""
    if not any(len(kept.images) for kept in model.kept.values()):
        return None
    names: list[str] = []
    parts: dict[str, list[Any]] = {name: [] for name in ("images", "expert", "label", "task")}
    decoded: dict[str, list[Any]] = {}
    for task, kept in model.kept.items():
        alone = model.evaluation.alone(model.tasks.index(task))
        for each, answers in zip(alone, kept.decoded.T, strict=True):
            variant = model.variants[each.variant]
            key = "|".join((variant.method, requested_policy(variant.batchnorm), each.decoder.config.name))
            decoded.setdefault(key, []).append(answers.numpy() + len(names))
        for name in ("expert", "label"):
            parts[name].append(getattr(kept, name).numpy() + len(names))
        parts["images"].append(kept.images.permute(0, 2, 3, 1).numpy())
        parts["task"] += [task] * len(kept.images)
        names += tasks.tasks[task].classes
    images, expert, label = (np.concatenate(parts[name]) for name in ("images", "expert", "label"))
    joined = {key: np.concatenate(answers) for key, answers in decoded.items()}
    return Examples(images, expert, label, joined, tuple(names), tuple(parts["task"]))
