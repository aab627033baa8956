"""Which samples make up which batch: explicit generators, sharding by index, no padded duplicates."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from coin.data.calibration import Calibration
from coin.data.samples import Samples
from coin.data.sampling import Stream, make_generator
from coin.data.transform import Augmentation, View
from coin.errors import DataError


@dataclass
class Batches:
    """One process's batches, in a Trainer's place of a DataLoader: the samples are in memory. Without one, all batches.

    To evaluate, process `rank` takes ``range(rank, P, world_size)``: every sample is on exactly one process.

    To train, with an augmentation, a permutation drawn from ``(seed, epoch)`` is divided among the processes. Each gets
    equally many batches of equal sizes: the ``P % world_size`` last samples are left out. The last, partial batch is
    kept, unless it would hold a single sample: BatchNorm cannot train on one.
    """

    samples: Samples | Calibration
    batch_size: int
    trainer: Trainer | None = None
    seed: int = 0
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        self.rank = 0
        self.world_size = 1
        if self.trainer is not None:
            self.rank = self.trainer.global_rank
            self.world_size = self.trainer.world_size
        count = len(self.samples.indices)
        if self.augmentation is not None and count // self.world_size < 2:
            raise DataError(
                f"{count} training samples over {self.world_size} process(es); each needs at least 2 of them"
            )

    def _positions(self, epoch: int) -> Tensor:
        count = len(self.samples.indices)
        if self.augmentation is None:
            return torch.arange(count)[self.rank :: self.world_size]
        order = torch.randperm(count, generator=make_generator(self.seed, Stream.ORDER, epoch))
        share = count // self.world_size
        if share % self.batch_size == 1:
            share -= 1
        return order[self.rank :: self.world_size][:share]

    def __len__(self) -> int:
        """The number of batches."""
        return -(-len(self._positions(epoch=0)) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        """Yield images and labels, or calibration samples' places and inputs."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        view = None
        if self.augmentation is not None:
            view = View(self.augmentation, self.seed, epoch)
        for positions in torch.split(self._positions(epoch), self.batch_size):
            if len(positions):
                yield self.samples.batch(positions, view)
