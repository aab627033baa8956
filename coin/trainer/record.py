"""Write the results of an evaluation: rows, confusion matrices and promises, as files and to W&B."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch.loggers import Logger, WandbLogger

from coin.data.tasks import Tasks
from coin.evaluation.scores import Measurement
from coin.modules import DecodingEvaluator
from coin.reporting.results import (
    COLUMNS,
    PROMISE_COLUMNS,
    Row,
    confusion_key,
    write_promises,
    write_results,
)
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
    rows = [_row(each, name, tasks) for each in model.measurements]
    pairs = list(zip(rows, model.measurements, strict=True))
    confusions = {confusion_key(row): each.confusion.numpy() for row, each in pairs}
    classes = {task: data.classes for task, data in tasks.tasks.items()}
    runs = [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]
    urls = [run.url for run in runs if isinstance(run.url, str)]
    made = {
        "tasks": list(model.tasks),
        "code": model.code.matrix.tolist(),
        "network_mib": model.network_nbytes / 2**20,
        **(configuration or {}),
    }
    url = urls[0] if urls else None
    write_results(folder, rows, made, confusions, _methods(model), classes, url)
    model.save_systems(folder / "systems")
    write_promises(folder, _promises(pairs))
    for run in runs:
        from coin.tracking.evaluation import log_evaluation  # imports wandb

        with logging_only("the evaluation"):
            log_evaluation(run, rows, confusions, classes)


def _row(measured: Measurement, experiment: str, tasks: Tasks) -> Row:
    columns = {name: value for name, value in measured.columns.items() if name in COLUMNS}
    if columns["samples_per_task"] is None:
        columns["samples_per_task"] = tasks.samples_per_task
    chance = 1 / tasks.tasks[columns["task"]].num_classes
    return Row(experiment=experiment, seed=tasks.seed, chance=chance, **columns)


def _methods(model: DecodingEvaluator) -> list[dict[str, Any]]:
    """Return what ``results.json`` says of every coded model and of every kind of compressed copies."""
    replicas = {replica.variant.method: replica.variant for replica in model.replicas}
    found = []
    for each in [*model.variants, *replicas.values()]:
        for row, chosen in enumerate(each.chosen):
            found.append(
                {
                    "label": each.method,
                    "method": each.kind,
                    "batchnorm": each.batchnorm,
                    "row": row,
                    "chosen": chosen,
                }
            )
    return found


def _promises(pairs: Sequence[tuple[Row, Measurement]]) -> pd.DataFrame:
    """Return the rows of ``promise.csv``."""
    found = []
    for row, measured in pairs:
        if measured.promise is not None:
            promise = {**vars(measured.promise), "promised": measured.promise.coverage}
            on_tests = {name: measured.columns[name] for name in ("coverage", "found")}
            found.append({**vars(row), **promise, **on_tests})
    return pd.DataFrame(found, columns=list(PROMISE_COLUMNS))
