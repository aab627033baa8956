"""Training on calibration batches in memory: no files, no logger, no checkpoints, nothing printed."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from coin.batches import Batch, as_input, joined, size_of, take, twin
from coin.data import Calibration
from coin.data.tasks import Tasks
from coin.errors import ConfigurationError
from coin.merging import Experts
from coin.modules.shared import quieten
from coin.modules.training import Training
from coin.statistics.guard import differentiable, trainable

if TYPE_CHECKING:
    from coin.modules.distillation import Distillation


@dataclass(frozen=True)
class BatchCalibration(Calibration):
    """Calibration samples in one batch in memory; what is not their own is as of `coin.data.Calibration`.

    Attributes:
        batch: All of them; `position` is a sample's place in it.
    """

    batch: Batch | None = None

    @classmethod
    def pooled(cls, experts: Experts, batch_size: int) -> "BatchCalibration":
        """Return the pooled samples of experts in memory, on their device and of their type.

        Raises:
            DataError: The samples differ in shape.
        """
        batch = as_input(joined(list(experts.pooled)), experts.networks[0])
        places = torch.arange(size_of(batch))
        return cls(cast(Any, (None,) * experts.count), experts.tasks, places, 0, batch_size, batch)

    def inputs(self, chosen: Tensor | None = None, view: Any = None) -> Any:
        """Return the inputs of these samples, all of them by default, in one batch; they are never changed."""
        assert self.batch is not None
        return take(self.batch, self.position if chosen is None else self.position[chosen])


class BatchTasks(Tasks):
    """Calibration samples in memory, as the data that a method trains on."""

    def __init__(self, samples: BatchCalibration, held_out: float, seed: int) -> None:
        LightningDataModule.__init__(self)
        self._samples, self.tasks = samples, {}
        self.batch_size, self.held_out, self.seed = samples.batch_size, held_out, seed

    def calibration(self) -> BatchCalibration:
        """Return all tasks' samples, interleaved."""
        return self._samples


class MemoryTraining(Training):
    """Trains on the calibration batches of experts in memory, on the device that the experts are on."""

    def num_samples(self, method: "Distillation", experts: Experts) -> int:
        """Return the number of pooled calibration samples."""
        return len(experts.tasks)

    def prepared(self, method: "Distillation", experts: Experts, options: dict[str, Any]) -> "Distillation":
        """Return the module of one run; the experts themselves keep their modes.

        Raises:
            ConfigurationError: The method asks for views of images, or for a number of samples.
        """
        if method.augments or method.samples_per_task is not None:
            found = "samples_per_task" if method.samples_per_task is not None else "augmentation"
            raise ConfigurationError(
                f"found {found}={method.hparams[found]} for calibration batches in memory, which are taken as they "
                "are, expected none; leave it out"
            )
        module = type(method)(**dict(method.hparams) | {"augmentation": "none"} | options)
        module.hold([twin(network).eval() for network in experts.networks], experts.blank().eval())
        self._samples = BatchCalibration.pooled(experts, module.hparams["batch_size"])
        return module

    def fit(self, module: "Distillation", held_out: float, options: dict[str, Any]) -> None:
        """Run a Trainer of which nothing is seen."""
        data = BatchTasks(self._samples, held_out, module.hparams["seed"] or 0)
        student = module.student
        assert student is not None
        parameters = trainable(student)
        device = next(iter(parameters.values())).device
        with _quietly(), differentiable(parameters.values()):
            trainer = Trainer(
                accelerator=device.type,
                devices=1 if device.index is None else [device.index],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                **options,
            )
            trainer.fit(module, datamodule=data)
        student.to(device).zero_grad()


@contextmanager
def _quietly() -> Iterator[None]:
    """Run a block in which Lightning neither prints nor warns of what is meant."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            quieten()
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
