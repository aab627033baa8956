"""Selections of samples: a task's splits, calibration data of one task or several, and whole batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from coin.core.batches import Batch, joined, map_tensors, samples_of, shapes_in, size_of, take
from coin.data.image_io import LazyImages, read_files
from coin.data.sampling import Draw, Stream, seeded, stratified_order
from coin.data.transform import Augmentation, View, augmented, to_input
from coin.errors import ConfigurationError, DataError

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Samples:
    """A selection of labelled samples, which copies indices, never images."""

    # All images that were selected from, uint8 [N, C, H, W], or tokens, int64 [N, L].
    store: Tensor | LazyImages
    labels: Tensor  # class indices of the whole store, int64 [N]
    index: Tensor  # positions in the store that are selected, int64 [P]

    @classmethod
    def of(cls, store: Tensor | LazyImages, labels: Tensor) -> Self:
        """All samples of a store; a `DataError` unless there are as many labels."""
        if len(store) != len(labels):
            raise DataError(
                f"{len(store)} images but {len(labels)} labels; expected one label for each image"
            )
        return cls(store, labels.long(), torch.arange(len(labels)))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def targets(self) -> Tensor:
        """The selected samples' class indices, int64 [P]."""
        return self.labels[self.index]

    def images(self, positions: Tensor | None = None, view: View | None = None) -> Tensor:
        """The images at these positions of the selection (all by default), as a view shows them, uint8 [B, C, H, W]."""
        if positions is None:
            positions = torch.arange(len(self))
        images = self.store[self.index[positions]]
        return images if view is None else augmented(images, view, positions, len(self))

    def subset(self, positions: Tensor | Sequence[int]) -> Self:
        """The samples at these positions of the selection, in this order."""
        chosen = torch.as_tensor(positions, dtype=torch.int64)
        return replace(self, index=self.index[chosen])

    def inputs(
        self,
        positions: Tensor,
        image_size: int,
        view: View | None = None,
        device: torch.device = _CPU,
    ) -> Tensor:
        """The inputs at these positions, int64 [B], made on the device: float32 [B, 3, S, S], or int64 [B, L]."""
        images = self.images(positions, view)
        return to_input(images.to(device), image_size)

    def held(self) -> Self:
        """The same samples, with their images in memory."""
        if isinstance(self.store, Tensor):
            return self
        return self.of(self.store.decoded(self.index), self.targets)

    def stratified(self, count: int, generator: torch.Generator) -> tuple[Self, Self]:
        """`count` samples in which the classes are in proportion, and the rest, both in their order."""
        order = stratified_order(self.targets, generator)
        chosen = order[:count].sort().values
        rest = order[count:].sort().values
        return self.subset(chosen), self.subset(rest)


@dataclass(frozen=True)
class Source:
    """The samples that a task reads; without validation samples, some are set aside from those to train on."""

    train: Samples
    test: Samples
    validation: Samples | None = None


def read_splits(
    splits: Sequence[Sequence[tuple[str, int]]], image_size: int, most: float
) -> list[Samples]:
    """Read every split's images, of these paths and labels, as `read_files` reads all of them together."""
    paths: list[str] = []
    labels: list[int] = []
    for split in splits:
        paths += [path for path, _ in split]
        labels += [label for _, label in split]
    store = read_files(paths, image_size, most)
    everything = Samples.of(store, torch.tensor(labels))
    sizes = [len(split) for split in splits]
    parts = torch.split(torch.arange(len(paths)), sizes)
    return [everything.subset(part) for part in parts]


def hold_out(samples: Samples, seed: int) -> Source:
    """Split a source that comes in one piece: a stratified fifth of it is left for testing."""
    fifth = round(0.2 * len(samples))
    test, train = samples.stratified(fifth, seeded(seed, Stream.TEST_SPLIT))
    return Source(train, test)


def split_source(
    source: Source,
    share: float,
    seed: int,
    max_train: int | None,
    max_test: int | None,
) -> Source:
    """Set validation samples aside where the source brings none, and limit the splits to stratified subsets."""
    test = source.test
    if max_test is not None:
        test, _ = test.stratified(max_test, seeded(seed, Stream.TEST_SPLIT))
    generator = seeded(seed, Stream.TRAIN_SPLIT)
    order = stratified_order(source.train.targets, generator)
    validation = source.validation
    train = order
    if validation is None and share > 0:
        count = max(1, round(share * len(order)))
        if count >= len(order):
            raise ConfigurationError(
                f"validation_share {share} of {len(order)} samples leaves none; lower it"
            )
        train = order[count:]
        if max_train is not None and max_train < len(train):
            # Validation shrinks in proportion.
            count = max(1, round(count * max_train / len(train)))
        validation = source.train.subset(order[:count].sort().values)
    limited = train[:max_train].sort().values
    return Source(source.train.subset(limited), test, validation)


@dataclass(frozen=True)
class MemorySamples:
    """Inputs in memory without labels, as batches of one ``[1, …]``, which may differ in shape."""

    samples: Sequence[Batch]

    def __len__(self) -> int:
        return len(self.samples)

    def inputs(
        self,
        positions: Tensor,
        image_size: int,
        view: View | None = None,
        device: torch.device = _CPU,
    ) -> Batch:
        """The samples at these positions, int64 [B], in one batch and as they are, on the device."""
        chosen = [self.samples[position] for position in positions.tolist()]
        return map_tensors(lambda tensor: tensor.to(device), joined(chosen))


@dataclass(frozen=True)
class Calibration:
    """Calibration samples in a fixed order; iterating yields input batches, as often as one likes.

    Images stay uint8 and become inputs a batch at a time. ``len`` is the number of batches; `num_samples` is P.
    """

    # The selections that the samples come from, after `pooled` one per task.
    parts: tuple[Samples | MemorySamples, ...]
    part: Tensor  # which part each sample comes from, int64 [P]
    position: Tensor  # its position in that part, int64 [P]
    image_size: int  # S, the side of the inputs in pixels
    batch_size: int = 64  # when iterating
    device: torch.device = _CPU  # on which images become inputs

    @classmethod
    def of(cls, samples: Samples | MemorySamples, image_size: int, batch_size: int = 64) -> Self:
        """All of a selection, in its order."""
        position = torch.arange(len(samples))
        return cls((samples,), torch.zeros_like(position), position, image_size, batch_size)

    @classmethod
    def of_batches(cls, batches: Sequence[Batch]) -> Self:
        """All samples of batches ``[B, …]`` in memory, in their order, in batches as large as the largest."""
        samples: list[Batch] = []
        batch_size = 1
        for batch in batches:
            samples += samples_of(batch)
            batch_size = max(batch_size, size_of(batch))
        return cls.of(MemorySamples(samples), image_size=0, batch_size=batch_size)

    @property
    def num_samples(self) -> int:
        """P."""
        return len(self.position)

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        """Yield inputs, float32 [B, 3, S, S], int64 [B, L] of texts, or batches in memory, each of one shape."""
        for _, places in groupby(range(self.num_samples), self._shape):
            chosen = torch.tensor(list(places))
            for batch in torch.split(chosen, self.batch_size):
                yield self.inputs(batch)

    def _shape(self, place: int) -> tuple[object, ...]:
        samples = self.parts[int(self.part[place])]
        if isinstance(samples, Samples):
            return ()
        position = int(self.position[place])
        return shapes_in(samples.samples[position])

    def inputs(self, chosen: Tensor | None = None, view: View | None = None) -> Any:
        """The inputs at these places, int64 [B] (all P by default), changed as a view says, in one batch."""
        part = self.part if chosen is None else self.part[chosen]
        position = self.position if chosen is None else self.position[chosen]
        places = []
        batches = []
        for number in torch.unique(part).tolist() or [0]:
            own = (part == number).nonzero().flatten()
            samples = self.parts[number]
            places.append(own)
            batches.append(samples.inputs(position[own], self.image_size, view, self.device))
        if len(batches) == 1:
            return batches[0]
        order = torch.cat(places).argsort()
        return take(joined(batches), order)

    def on(self, device: torch.device) -> Self:
        """The same samples, which become inputs on a device."""
        return replace(self, device=device)

    def subset(self, chosen: Tensor | Sequence[int]) -> Self:
        """The samples at these places, in this order; ``range(rank, P, world_size)`` gives a process its share."""
        places = torch.as_tensor(chosen, dtype=torch.int64)
        return replace(self, part=self.part[places], position=self.position[places])

    def split(self, share: float) -> tuple[Self, Self]:
        """Part of the samples to fit on, and the last ``share`` of them to tune on; pooled data stay in proportion."""
        count = self.num_samples
        if count < 2:
            raise DataError(
                f"found {count} calibration samples, expected at least 2: one to be held out"
            )
        held_out = max(1, round(share * count))
        border = count - min(held_out, count - 1)
        return self.subset(range(border)), self.subset(range(border, count))


def pooled(calibrations: Sequence[Calibration]) -> Calibration:
    """Several tasks' calibration data as one, evenly interleaved: every batch mixes the tasks, as BatchNorm needs."""
    sizes = sorted({each.image_size for each in calibrations})
    if len(sizes) != 1:
        raise DataError(
            f"calibration data to pool have the image sizes {sizes}; expected one common size"
        )
    parts: tuple[Samples | MemorySamples, ...] = ()
    part = []
    progress = []  # of each sample through its task's, in (0, 1)
    for each in calibrations:
        count = each.num_samples
        part.append(each.part + len(parts))
        parts += each.parts
        progress.append((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    order = torch.argsort(torch.cat(progress), stable=True)
    position = torch.cat([each.position for each in calibrations])
    return Calibration(
        parts=parts,
        part=torch.cat(part)[order],
        position=position[order],
        image_size=sizes[0],
        batch_size=max(each.batch_size for each in calibrations),
        device=calibrations[0].device,
    )


@dataclass
class BatchDataset(Dataset[tuple[Tensor, Tensor]]):
    """Whole batches: images and labels, or calibration samples' positions and inputs; draws of an epoch augmented."""

    samples: Samples | Calibration
    augmentation: Augmentation = Augmentation.none
    seed: int = 0

    def __len__(self) -> int:
        return (
            self.samples.num_samples if isinstance(self.samples, Calibration) else len(self.samples)
        )

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        view = None if draw.epoch is None else View(self.augmentation, self.seed, draw.epoch)
        positions = draw.positions
        if isinstance(self.samples, Calibration):
            return positions, self.samples.inputs(positions, view)
        return self.samples.images(positions, view), self.samples.targets[positions]
