"""Selections of labelled samples: a task's splits, whole batches of them, and calibration data drawn from them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from coin.data.augmentation import Augmentation, View, augmented, transform_images
from coin.data.decoding import LazyImages
from coin.data.sampling import Draw, Stream, seeded, stratified_order
from coin.data.transform import to_input
from coin.errors import ConfigurationError, DataError


@dataclass(frozen=True)
class Samples:
    """A selection of labelled samples, which copies indices, never images.

    Attributes:
        store: All images of the source's part that this was selected from, uint8 [N, C, H, W] (or tokens), or what
            reads them by position.
        labels: Class indices of the whole store, int64 [N].
        index: Positions in the store that are selected, int64 [P].
    """

    store: Tensor | LazyImages
    labels: Tensor
    index: Tensor

    @classmethod
    def of(cls, store: Tensor | LazyImages, labels: Tensor) -> Self:
        """All samples of a store; a `DataError` unless there are as many labels."""
        if len(store) != len(labels):
            raise DataError(f"{len(store)} images but {len(labels)} labels; expected one label for each image")
        return cls(store, labels.long(), torch.arange(len(labels)))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def targets(self) -> Tensor:
        """The selected samples' class indices, int64 [P]."""
        return self.labels[self.index]

    @property
    def in_memory(self) -> bool:
        """Whether the images are."""
        return isinstance(self.store, Tensor)

    def images(self, positions: Tensor | None = None) -> Tensor:
        """The images at these positions of the selection (all by default), uint8 [B, C, H, W]."""
        return self.store[self.index if positions is None else self.index[positions]]

    def subset(self, positions: Tensor | Sequence[int]) -> Self:
        """The samples at these positions of the selection, in this order."""
        return replace(self, index=self.index[torch.as_tensor(positions, dtype=torch.int64)])

    def held(self) -> Self:
        """The same samples, with their images in memory."""
        if not isinstance(self.store, LazyImages):
            return self
        return type(self).of(self.store.decoded(self.index), self.targets)

    def stratified(self, count: int, generator: torch.Generator) -> tuple[Self, Self]:
        """`count` samples in which the classes are in proportion, and the rest, both in their order."""
        order = stratified_order(self.targets, generator)
        return self.subset(order[:count].sort().values), self.subset(order[count:].sort().values)


@dataclass(frozen=True)
class Source:
    """The samples that a task reads; without validation samples, some are set aside from those to train on."""

    train: Samples
    test: Samples
    validation: Samples | None = None


def hold_out(samples: Samples, seed: int) -> Source:
    """Split a source that comes in one piece: a stratified fifth of it is left for testing."""
    test, train = samples.stratified(round(0.2 * len(samples)), seeded(seed, Stream.TEST_SPLIT))
    return Source(train, test)


def split_source(
    source: Source, validation_share: float, split_seed: int, max_train: int | None, max_test: int | None
) -> Source:
    """Set validation samples aside where the source brings none, and limit the splits; see `coin.data.TaskData`.

    All choices are stratified. Reducing a split keeps a subset of it.
    """
    test = source.test
    if max_test is not None:
        test, _ = test.stratified(max_test, seeded(split_seed, Stream.TEST_SPLIT))
    order = stratified_order(source.train.targets, seeded(split_seed, Stream.TRAIN_SPLIT))
    held_out = 0
    if source.validation is None and validation_share > 0:
        held_out = max(1, round(validation_share * len(order)))
        if held_out >= len(order):
            raise ConfigurationError(
                f"validation_share {validation_share} of {len(order)} samples leaves none to train on; expected at "
                "least one; lower it"
            )
    validation, train = order[:held_out], order[held_out:]
    if max_train is not None and max_train < len(train):
        validation = validation[: max(1, round(held_out * max_train / len(train)))]
        train = train[:max_train]
    return Source(
        source.train.subset(train.sort().values),
        test,
        source.train.subset(validation.sort().values) if held_out else source.validation,
    )


@dataclass
class BatchDataset(Dataset[tuple[Tensor, Tensor]]):
    """Whole batches of a selection, images and labels; draws that carry an epoch are augmented and transformed."""

    samples: Samples
    augmentation: Augmentation = Augmentation.none
    seed: int = 0
    transforms: Sequence[v2.Transform] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        if not isinstance(draw, Draw):
            raise ConfigurationError(
                "the loader's sampler was replaced (overfit_batches does that); use max_train for a small training set"
            )
        images = self.samples.images(draw.positions)
        if draw.epoch is not None:
            view = View(self.augmentation, self.seed, draw.epoch)
            images = augmented(images, view, draw.positions, len(self.samples))
            images = transform_images(images, self.transforms, view, draw.positions)
        return images, self.samples.targets[draw.positions]


@dataclass(frozen=True)
class Calibration:
    """Calibration samples in a fixed order; iterating yields input batches, as often as one likes.

    The images stay uint8 and become inputs a batch at a time. ``len`` is the number of batches; `num_samples` is P.

    Attributes:
        parts: The selections that the samples come from; one, or one per task after `pooled`.
        part: Which part each sample comes from, int64 [P].
        position: The sample's position in its part, int64 [P].
        image_size: S, the side of the inputs in pixels, or the number of tokens.
        batch_size: Samples a batch when iterating.
    """

    parts: tuple[Samples, ...]
    part: Tensor
    position: Tensor
    image_size: int
    batch_size: int = 64

    @classmethod
    def of(cls, samples: Samples, image_size: int, batch_size: int = 64) -> Self:
        """All of a selection, in its order."""
        count = len(samples)
        return cls((samples,), torch.zeros(count, dtype=torch.int64), torch.arange(count), image_size, batch_size)

    @property
    def num_samples(self) -> int:
        """P."""
        return len(self.position)

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the inputs, float32 [B, 3, S, S], or int64 [B, S] of texts."""
        for start in range(0, self.num_samples, self.batch_size):
            yield self.inputs(torch.arange(start, min(start + self.batch_size, self.num_samples)))

    def inputs(self, chosen: Tensor | None = None, view: View | None = None) -> Tensor:
        """The inputs at these places, int64 [B] (all P by default), changed as a view says: float32 [B, 3, S, S]."""
        part = self.part if chosen is None else self.part[chosen]
        position = self.position if chosen is None else self.position[chosen]
        out: Tensor | None = None
        for number, samples in enumerate(self.parts):
            rows = (part == number).nonzero().flatten()
            if len(rows) == 0 and len(part):
                continue
            images = samples.images(position[rows])
            if view is not None:
                images = augmented(images, view, position[rows], len(samples))
            inputs = to_input(images, self.image_size)
            if out is None:
                out = inputs.new_empty(len(part), *inputs.shape[1:])
            if inputs.dtype != out.dtype:
                raise DataError("found images and texts among the calibration samples, expected tasks of one kind")
            out[rows] = inputs
        assert out is not None
        return out

    def subset(self, chosen: Tensor | Sequence[int]) -> Self:
        """The samples at these places, in this order; ``range(rank, P, world_size)`` gives a process its share."""
        places = torch.as_tensor(chosen, dtype=torch.int64)
        return replace(self, part=self.part[places], position=self.position[places])

    def split(self, share: float) -> tuple[Self, Self]:
        """Part of the samples to fit on, and the last ``share`` of them to tune on; pooled data stay in proportion."""
        if not 0 < share < 1:
            raise ConfigurationError(f"the held-out share is {share}; expected a number between 0 and 1")
        if self.num_samples < 2:
            raise DataError(f"{self.num_samples} calibration sample(s) cannot be split; at least 2 are needed")
        held_out = min(max(1, round(share * self.num_samples)), self.num_samples - 1)
        border = self.num_samples - held_out
        return self.subset(range(border)), self.subset(range(border, self.num_samples))

    @property
    def labels(self) -> Tensor:
        """Class indices within each sample's own task, int64 [P]. Only for the `empirical` Fisher ablation."""
        out = torch.empty(self.num_samples, dtype=torch.int64)
        for number, samples in enumerate(self.parts):
            rows = self.part == number
            out[rows] = samples.targets[self.position[rows]]
        return out


def pooled(calibrations: Sequence[Calibration]) -> Calibration:
    """Several tasks' calibration data as one, evenly interleaved: every batch mixes the tasks, as BatchNorm needs."""
    sizes = sorted({calibration.image_size for calibration in calibrations})
    if len(sizes) != 1:
        raise DataError(f"calibration data to pool have the image sizes {sizes}; expected one common size")
    parts: tuple[Samples, ...] = ()
    part, progress = [], []
    for each in calibrations:
        part.append(each.part + len(parts))
        parts += each.parts
        progress.append((torch.arange(each.num_samples, dtype=torch.float64) + 0.5) / each.num_samples)
    order = torch.argsort(torch.cat(progress), stable=True)
    position = torch.cat([each.position for each in calibrations])
    return Calibration(parts, torch.cat(part)[order], position[order], sizes[0], calibrations[0].batch_size)
