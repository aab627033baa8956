"""Which samples make up which batch: explicit generators, sharding by index, no padded duplicates."""

from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from coin.errors import ConfigurationError, DataError


class Stream(IntEnum):
    """The uses of a seed, each with random numbers of its own."""

    TRAIN_SPLIT = 0
    TEST_SPLIT = 1
    ORDER = 2
    AUGMENTATION = 3
    CALIBRATION = 4
    RENDER_TRAIN = 5
    RENDER_TEST = 6
    WORKERS = 7
    PROMISE = 9


def seeded(seed: int, *keys: int) -> torch.Generator:
    """A CPU generator that depends on ``(seed, *keys)`` alone."""
    state = np.random.SeedSequence(seed, spawn_key=keys).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A shuffle of ``range(P)``, int64 [P], of which every prefix holds the classes in proportion, or nearly."""
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = torch.argsort(labels[shuffled], stable=True)
    sorted_labels = labels[shuffled][by_class]
    counts = torch.bincount(labels)
    first = torch.cumsum(counts, 0) - counts  # where each class begins in `sorted_labels`
    rank = torch.arange(len(labels)) - first[sorted_labels]  # within the class
    progress = torch.empty(len(labels), dtype=torch.float64)  # through the class, in (0, 1)
    progress[by_class] = (rank.double() + 0.5) / counts[sorted_labels]
    return shuffled[torch.argsort(progress, stable=True)]


class Draw(NamedTuple):
    """One batch to fetch: positions in the split, int64 [B], and a training batch's epoch, for its augmentation."""

    positions: Tensor
    epoch: int | None


def evaluation_batches(
    samples: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[Draw]:
    """The positions ``range(rank, samples, world_size)`` in batches: every sample on exactly one process."""
    positions = torch.arange(rank, max(rank, samples), world_size)
    if not len(positions):
        return []
    return [Draw(batch, None) for batch in torch.split(positions, batch_size)]


class TrainingBatches(Sampler[Draw]):
    """A permutation drawn from ``(seed, epoch)``, divided among the processes.

    Every process gets equally many batches of equal sizes: the ``samples % world_size`` last samples are left out. The
    last, partial batch is kept, unless it would hold a single sample: BatchNorm cannot train on one.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        seed: int,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        share = samples // world_size
        if share < 2:
            raise DataError(
                f"{samples} training samples over {world_size} process(es); each needs at least 2 of them"
            )
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size
        self._share = share - 1 if share % batch_size == 1 else share

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next iteration; Lightning does before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The number of batches on this process, equal on all of them."""
        return -(-self._share // self.batch_size)

    def __iter__(self) -> Iterator[Draw]:
        epoch = self.epoch
        order = torch.randperm(self.samples, generator=seeded(self.seed, Stream.ORDER, epoch))
        mine = order[self.rank :: self.world_size][: self._share]
        for positions in torch.split(mine, self.batch_size):
            yield Draw(positions, epoch)


def batch_loader(
    dataset: Any,
    batch_size: int,
    seed: int,
    trainer: Trainer | None,
    *,
    shuffle: bool = False,
    **options: Any,
) -> DataLoader[Any]:
    """A DataLoader of this process's batches of a data set that takes a `Draw`; without a Trainer, of all."""
    rank = 0
    world_size = 1
    epoch = 0
    if trainer is not None:
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ConfigurationError(
                "the Trainer shards the data again; set trainer.use_distributed_sampler=false"
            )
        rank = trainer.global_rank
        world_size = trainer.world_size
        # A resumed Trainer makes the iterator before it calls set_epoch.
        epoch = trainer.current_epoch
    sampler: Iterable[Draw] = evaluation_batches(len(dataset), batch_size, rank, world_size)
    if shuffle:
        sampler = TrainingBatches(len(dataset), batch_size, seed, epoch, rank, world_size)
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        generator=seeded(seed, Stream.WORKERS),
        **options,
    )
