"""A loader of training batches that goes on within an epoch."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from coin.data.sampling import TrainingBatches


class ResumableLoader(DataLoader[tuple[Tensor, Tensor]]):
    """A DataLoader that leaves out the batches of an epoch which its trainer has had before.

    A training that goes on from a checkpoint of the middle of an epoch then sees the rest of that epoch, where
    Lightning alone would begin the epoch anew and stop before its end.

    Args:
        dataset: Hands out whole batches.
        sampler: Says which.
        trainer: The trainer; none begins every iteration at the beginning.
        **options: As of a DataLoader.
    """

    def __init__(
        self, dataset: Dataset[tuple[Tensor, Tensor]], sampler: TrainingBatches, trainer: Trainer | None, **options: Any
    ) -> None:
        super().__init__(dataset, sampler=sampler, **options)
        self._batches = sampler
        self._trainer = trainer

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # All of this runs when the first batch is asked for: iterators are made before a checkpoint is looked at.
        if self._trainer is not None and self._trainer.training:
            self._batches.skip(self._trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        yield from super().__iter__()
