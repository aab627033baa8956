"""Several tasks side by side: one test loader each, and their calibration data pooled."""

import copy
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from coin.core.choices import check_integer
from coin.data.calibration import Calibration, pooled
from coin.data.loading import Batches
from coin.data.task import TaskData
from coin.errors import ConfigurationError, DataError

_READ_ALIKE = {"augmentation", "batch_size", "seed"}
"""The options that change nothing of what a task reads."""


class Tasks(LightningDataModule):
    """The tasks of an experiment: their calibration samples, and their test samples, a loader a task.

    Args:
        tasks: The tasks by name.
        samples_per_task: P, the number of calibration samples of each task.
        batch_size: Calibration samples a batch and process.
        seed: Draws the calibration samples and their order; by default every task's own seed.
        promise_samples: How many validation samples of each task set the promise.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskData],
        samples_per_task: int = 200,
        batch_size: int = 64,
        seed: int | None = None,
        promise_samples: int = 0,
    ) -> None:
        super().__init__()
        check_integer("samples_per_task", samples_per_task, 1)
        check_integer("batch_size", batch_size, 1)
        check_integer("seed", seed or 0, 0)
        check_integer("promise_samples", promise_samples, 0)
        if not tasks:
            raise DataError("found no tasks, expected at least one; name them under data.tasks")
        self.tasks = dict(tasks)
        if seed is not None:
            self.tasks = {name: task_with(task, seed=seed) for name, task in tasks.items()}
        self.samples_per_task = samples_per_task
        self.batch_size = batch_size
        self.promised = promise_samples
        self.seed = next(iter(self.tasks.values())).seed

    def resize(self, image_size: int) -> None:
        """Give every task the image size of the networks that are to look at it, in pixels."""
        self.tasks = {
            name: task_with(task, image_size=image_size) for name, task in self.tasks.items()
        }

    def prepare_data(self) -> None:
        """Download what is missing."""
        for task in self.tasks.values():
            task.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read every task's images."""
        for task in self.tasks.values():
            task.trainer = self.trainer
            task.setup(stage)

    def calibrations(self) -> dict[str, Calibration]:
        """Return each task's calibration samples."""
        return {
            name: task.calibration(self.samples_per_task, self.batch_size, name)
            for name, task in self.tasks.items()
        }

    def calibration(self) -> Calibration:
        """Return all tasks' calibration samples, interleaved."""
        return pooled(list(self.calibrations().values()))

    def promise_samples(self) -> Calibration | None:
        """Return all tasks' samples for the promise, interleaved; none where there are to be none."""
        if not self.promised:
            return None
        drawn = [
            task.promise_samples(self.promised, self.batch_size, name)
            for name, task in self.tasks.items()
        ]
        return pooled(drawn)

    def test_dataloader(self) -> list[Batches]:
        """One loader of stored images and labels a task."""
        return [task.test_dataloader() for task in self.tasks.values()]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn test images into inputs, as their task does."""
        task = list(self.tasks.values())[dataloader_idx]
        return task.on_after_batch_transfer(batch, dataloader_idx)


def task_with(task: TaskData, **options: Any) -> TaskData:
    """Return the same task with other values of some options; it shares what is read if that stays the same."""
    other = copy.copy(task)
    other.trainer = None
    if options.keys() - _READ_ALIKE:
        other._shared = {}
    for name, value in options.items():
        setattr(other, name, value)
    return other


def tasks_of(module: LightningModule) -> Tasks:
    """Return the datamodule of a module's trainer; raises ConfigurationError unless it is a `Tasks`."""
    data: Any = getattr(module.trainer, "datamodule", None)
    if not isinstance(data, Tasks):
        raise ConfigurationError(
            f"found data of {type(data).__name__}, expected Tasks; set data.class_path: Tasks"
        )
    return data
