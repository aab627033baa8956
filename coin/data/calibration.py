"""Calibration data: P unlabelled, unaugmented training samples, all that merging and decoding may use."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from coin.data.augmentation import View, augmented
from coin.data.samples import Samples
from coin.data.transform import to_input
from coin.errors import ConfigurationError, DataError


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
