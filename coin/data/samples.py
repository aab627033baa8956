"""Selections of samples: a task's splits, calibration data of one task or several, and whole batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from coin.core.batches import Batch, joined, map_tensors, samples_of, shapes_in, size_of, take, tensors_in
from coin.core.choices import check_number
from coin.data.image_io import LazyImages, read_files
from coin.data.sampling import Draw, Stream, seeded, stratified_order
from coin.data.transform import Augmentation, View, augmented, to_input, transform_images
from coin.errors import ConfigurationError, DataError

_CPU = torch.device("cpu")


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

    def inputs(
        self, positions: Tensor, image_size: int, view: View | None = None, device: torch.device = _CPU
    ) -> Tensor:
        """The inputs at these positions, int64 [B], as a view shows them: float32 [B, 3, S, S], or int64 [B, S].

        They are scaled, resized and normalised on the device.
        """
        return to_input(self.images(positions, view).to(device), image_size)

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


def split_source(source: Source, share: float, seed: int, max_train: int | None, max_test: int | None) -> Source:
    """Set validation samples aside where the source brings none, and limit the splits to stratified subsets."""
    test = source.test
    if max_test is not None:
        test, _ = test.stratified(max_test, seeded(seed, Stream.TEST_SPLIT))
    order = stratified_order(source.train.targets, seeded(seed, Stream.TRAIN_SPLIT))
    held_out = 0
    if source.validation is None and share > 0:
        held_out = max(1, round(share * len(order)))
        if held_out >= len(order):
            raise ConfigurationError(f"validation_share {share} of {len(order)} samples leaves none; lower it")
    validation, train = order[:held_out], order[held_out:]
    if max_train is not None and max_train < len(train):
        validation = validation[: max(1, round(held_out * max_train / len(train)))]
        train = train[:max_train]
    apart = source.train.subset(validation.sort().values) if held_out else source.validation
    return Source(source.train.subset(train.sort().values), test, apart)


@dataclass(frozen=True)
class MemorySamples:
    """Inputs in memory without labels, as batches of one ``[1, …]``, which may differ in shape."""

    samples: Sequence[Batch]

    def __len__(self) -> int:
        return len(self.samples)

    def inputs(
        self, positions: Tensor, image_size: int, view: View | None = None, device: torch.device = _CPU
    ) -> Batch:
        """The samples at these positions, int64 [B], in one batch and as they are, on the device."""
        batch = joined([self.samples[position] for position in positions.tolist()])
        return map_tensors(lambda tensor: tensor.to(device), batch)


@dataclass(frozen=True)
class Calibration:
    """Calibration samples in a fixed order; iterating yields input batches, as often as one likes.

    Images stay uint8 and become inputs a batch at a time. ``len`` is the number of batches; `num_samples` is P.
    """

    parts: tuple[Samples | MemorySamples, ...]  # the selections that the samples come from, after `pooled` one per task
    part: Tensor  # which part each sample comes from, int64 [P]
    position: Tensor  # its position in that part, int64 [P]
    image_size: int  # S, the side of the inputs in pixels, or the number of tokens; 0 of samples in memory
    batch_size: int = 64  # when iterating
    device: torch.device = _CPU  # on which images become inputs

    @classmethod
    def of(cls, samples: Samples | MemorySamples, image_size: int, batch_size: int = 64) -> Self:
        """All of a selection, in its order."""
        count = len(samples)
        return cls((samples,), torch.zeros(count, dtype=torch.int64), torch.arange(count), image_size, batch_size)

    @classmethod
    def of_batches(cls, batches: Sequence[Batch]) -> Self:
        """All samples of batches ``[B, …]`` in memory, in their order, in batches as large as the largest."""
        samples = MemorySamples([sample for batch in batches for sample in samples_of(batch)])
        return cls.of(samples, 0, max([1, *map(size_of, batches)]))

    @property
    def num_samples(self) -> int:
        """P."""
        return len(self.position)

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        """Yield inputs, float32 [B, 3, S, S], int64 [B, S] of texts, or batches in memory, each of one shape."""
        for _, places in groupby(range(self.num_samples), self._shape):
            while chosen := list(islice(places, self.batch_size)):
                yield self.inputs(torch.tensor(chosen))

    def _shape(self, place: int) -> tuple[object, ...]:
        samples = self.parts[int(self.part[place])]
        return () if isinstance(samples, Samples) else shapes_in(samples.samples[int(self.position[place])])

    def inputs(self, chosen: Tensor | None = None, view: View | None = None) -> Any:
        """The inputs at these places, int64 [B] (all P by default), changed as a view says, in one batch."""
        part = self.part if chosen is None else self.part[chosen]
        position = self.position if chosen is None else self.position[chosen]
        rows = {number: (part == number).nonzero().flatten() for number in sorted({*part.tolist()}) or [0]}
        found = [
            self.parts[number].inputs(position[own], self.image_size, view, self.device) for number, own in rows.items()
        ]
        if len({tensors_in(each)[0].is_floating_point() for each in found}) > 1:
            raise DataError("found images and texts among the calibration samples, expected tasks of one kind")
        return found[0] if len(found) == 1 else take(joined(found), torch.cat(list(rows.values())).argsort())

    def on(self, device: torch.device) -> Self:
        """The same samples, which become inputs on a device."""
        return replace(self, device=device)

    def subset(self, chosen: Tensor | Sequence[int]) -> Self:
        """The samples at these places, in this order; ``range(rank, P, world_size)`` gives a process its share."""
        places = torch.as_tensor(chosen, dtype=torch.int64)
        return replace(self, part=self.part[places], position=self.position[places])

    def split(self, share: float) -> tuple[Self, Self]:
        """Part of the samples to fit on, and the last ``share`` of them to tune on; pooled data stay in proportion."""
        check_number("the held-out share", share, low=0.0, high=1.0, strict=True)
        if self.num_samples < 2:
            raise DataError(f"found {self.num_samples} calibration samples, expected at least 2: one to be held out")
        held_out = min(max(1, round(share * self.num_samples)), self.num_samples - 1)
        border = self.num_samples - held_out
        return self.subset(range(border)), self.subset(range(border, self.num_samples))

    @property
    def labels(self) -> Tensor:
        """Class indices within each sample's own task, int64 [P]. Only for the `empirical` Fisher ablation."""
        targets = [samples.targets for samples in self.parts if isinstance(samples, Samples)]
        return torch.stack([targets[part][position] for part, position in zip(self.part, self.position, strict=True)])


def pooled(calibrations: Sequence[Calibration]) -> Calibration:
    """Several tasks' calibration data as one, evenly interleaved: every batch mixes the tasks, as BatchNorm needs."""
    sizes = sorted({calibration.image_size for calibration in calibrations})
    if len(sizes) != 1:
        raise DataError(f"calibration data to pool have the image sizes {sizes}; expected one common size")
    parts: tuple[Samples | MemorySamples, ...] = ()
    part = []
    for each in calibrations:
        part.append(each.part + len(parts))
        parts += each.parts
    progress = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (each.num_samples for each in calibrations)]
    order = torch.argsort(torch.cat(progress), stable=True)
    position = torch.cat([each.position for each in calibrations])
    batch_size = max(each.batch_size for each in calibrations)
    return Calibration(parts, torch.cat(part)[order], position[order], sizes[0], batch_size, calibrations[0].device)


@dataclass
class BatchDataset(Dataset[tuple[Tensor, Tensor]]):
    """Whole batches: images and labels, or calibration samples' positions and inputs; draws of an epoch augmented."""

    samples: Samples | Calibration
    augmentation: Augmentation = Augmentation.none
    seed: int = 0
    transforms: Sequence[v2.Transform] = ()

    def __len__(self) -> int:
        return self.samples.num_samples if isinstance(self.samples, Calibration) else len(self.samples)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        if not isinstance(draw, Draw):
            raise ConfigurationError("the loader's sampler was replaced, as by overfit_batches; use max_train instead")
        view = None if draw.epoch is None else View(self.augmentation, self.seed, draw.epoch)
        if isinstance(self.samples, Calibration):
            return draw.positions, self.samples.inputs(draw.positions, view)
        images = self.samples.images(draw.positions, view)
        if view is not None:
            images = transform_images(images, self.transforms, view, draw.positions)
        return images, self.samples.targets[draw.positions]
