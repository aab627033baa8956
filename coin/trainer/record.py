"""Write the results of an evaluation: rows, confusion matrices and promises, as files and to W&B."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
from lightning.pytorch.loggers import WandbLogger

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
    trainer: pl.Trainer,
    model: DecodingEvaluator,
    tasks: Tasks,
    name: str,
    configuration: Mapping[str, Any],
) -> None:
    """Write what an evaluator has measured on tasks to the Trainer's folder, and log the same to its W&B loggers.

    `name` is the experiment's in the results; `configuration` is what ``results.json`` holds beside the code.
    """
    folder = Path(trainer.default_root_dir)
    rows = [_row(each, name, tasks) for each in model.measurements]
    pairs = list(zip(rows, model.measurements, strict=True))
    confusions = {confusion_key(row): each.confusion.numpy() for row, each in pairs}
    whole = model.experts.skeleton.state_dict()
    made = {
        "tasks": list(model.experts.paths),
        "code": model.code.matrix.tolist(),
        "network_mib": sum(tensor.nbytes for tensor in whole.values()) / 2**20,
        **configuration,
    }
    write_results(folder, rows, made, confusions, _methods(model))
    model.save_systems(folder / "systems")
    write_promises(folder, _promises(pairs))
    classes = {task: data.classes for task, data in tasks.tasks.items()}
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            from coin.tracking.evaluation import log_evaluation  # imports wandb

            with logging_only("the evaluation"):
                log_evaluation(logger.experiment, rows, confusions, classes)


def _row(measured: Measurement, experiment: str, tasks: Tasks) -> Row:
    columns = {name: value for name, value in measured.columns.items() if name in COLUMNS}
    columns["samples_per_task"] = columns["samples_per_task"] or tasks.samples_per_task
    chance = 1 / tasks.tasks[columns["task"]].num_classes
    return Row(experiment=experiment, seed=tasks.seed, chance=chance, **columns)


def _methods(model: DecodingEvaluator) -> list[dict[str, Any]]:
    """Return what ``results.json`` says of every coded model and of every kind of compressed copies."""
    by_label = {variant.method: variant for variant in model.variants}
    found = []
    for each in by_label.values():
        made = {"label": each.method, "method": each.kind, "batchnorm": each.batchnorm}
        for row, chosen in enumerate(each.chosen):
            found.append({**made, "row": row, "chosen": chosen})
    return found


def _promises(pairs: Sequence[tuple[Row, Measurement]]) -> pd.DataFrame:
    """Return the rows of ``promise.csv``."""
    found = []
    for row, measured in pairs:
        promise = measured.promise
        if promise is not None:
            on_tests = {name: measured.columns[name] for name in ("coverage", "found")}
            found.append({**vars(row), **vars(promise), "promised": promise.coverage, **on_tests})
    return pd.DataFrame(found, columns=list(PROMISE_COLUMNS))
