"""Selections of labelled samples: a task's splits, and whole batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from coin.data.image_io import LazyImages, read_files
from coin.data.sampling import Draw, Stream, seeded, stratified_order
from coin.data.transform import Augmentation, View, augmented, to_input, transform_images
from coin.errors import ConfigurationError, DataError


@dataclass(frozen=True)
class Samples:
    """A selection of labelled samples, which copies indices, never images."""

    store: Tensor | LazyImages  # all images that were selected from, uint8 [N, C, H, W], or tokens
    labels: Tensor  # class indices of the whole store, int64 [N]
    index: Tensor  # positions in the store that are selected, int64 [P]

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

    def images(self, positions: Tensor | None = None, view: View | None = None) -> Tensor:
        """The images at these positions of the selection (all by default), as a view shows them, uint8 [B, C, H, W]."""
        if positions is None:
            positions = torch.arange(len(self))
        images = self.store[self.index[positions]]
        return images if view is None else augmented(images, view, positions, len(self))

    def subset(self, positions: Tensor | Sequence[int]) -> Self:
        """The samples at these positions of the selection, in this order."""
        return replace(self, index=self.index[torch.as_tensor(positions, dtype=torch.int64)])

    def inputs(self, positions: Tensor, image_size: int, view: View | None = None) -> Tensor:
        """The inputs at these positions, int64 [B], as a view shows them: float32 [B, 3, S, S], or int64 [B, S]."""
        return to_input(self.images(positions, view), image_size)

    def held(self) -> Self:
        """The same samples, with their images in memory."""
        return self if isinstance(self.store, Tensor) else self.of(self.store.decoded(self.index), self.targets)

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


def read_splits(splits: Sequence[Sequence[tuple[str, int]]], image_size: int, most: float) -> list[Samples]:
    """Read every split's images, of these paths and labels, as `read_files` reads all of them together."""
    paths, labels = zip(*chain(*splits), strict=True)
    everything = Samples.of(read_files(paths, image_size, most), torch.tensor(labels))
    return [everything.subset(part) for part in torch.split(torch.arange(len(paths)), [*map(len, splits)])]


def hold_out(samples: Samples, seed: int) -> Source:
    """Split a source that comes in one piece: a stratified fifth of it is left for testing."""
    test, train = samples.stratified(round(0.2 * len(samples)), seeded(seed, Stream.TEST_SPLIT))
    return Source(train, test)


def split_source(
    source: Source, validation_share: float, split_seed: int, max_train: int | None, max_test: int | None
) -> Source:
    """Set validation samples aside where the source brings none, and limit the splits to stratified subsets."""
    test = source.test
    if max_test is not None:
        test, _ = test.stratified(max_test, seeded(split_seed, Stream.TEST_SPLIT))
    order = stratified_order(source.train.targets, seeded(split_seed, Stream.TRAIN_SPLIT))
    held_out, count = 0, len(order)
    if source.validation is None and validation_share > 0:
        held_out = max(1, round(validation_share * count))
        if held_out >= count:
            raise ConfigurationError(f"validation_share {validation_share} of {count} samples leaves none; lower it")
    validation, train = order[:held_out], order[held_out:]
    if max_train is not None and max_train < len(train):
        validation = validation[: max(1, round(held_out * max_train / len(train)))]
        train = train[:max_train]
    apart = source.train.subset(validation.sort().values) if held_out else source.validation
    return Source(source.train.subset(train.sort().values), test, apart)


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
            raise ConfigurationError("the loader's sampler was replaced, as by overfit_batches; use max_train instead")
        view = None if draw.epoch is None else View(self.augmentation, self.seed, draw.epoch)
        images = self.samples.images(draw.positions, view)
        if view is not None:
            images = transform_images(images, self.transforms, view, draw.positions)
        return images, self.samples.targets[draw.positions]
