"""Calibration samples: data, and an index that says which of them in which order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor

from coin.core.batches import Batch, joined, map_tensors, shapes_in, size_of, take
from coin.data.transform import View, augmented, to_input
from coin.errors import DataError

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Calibration:
    """Calibration samples in a fixed order; iterating yields batches of inputs, as often as one likes.

    Images stay uint8 and become inputs a batch at a time.

    Attributes:
        stored: Images, uint8 [N, C, H, W], or tokens, int64 [N, L], of one task or, after `pooled`, of several; or
            inputs, whose samples may differ in shape.
        indices: Which of all stored samples, counted through, are selected, int64 [P].
        image_size: S, the side of the inputs in pixels; None where inputs are stored.
        batch_size: Samples a batch when iterating.
        device: On which images become inputs.
    """

    stored: tuple[Batch, ...]
    indices: Tensor
    image_size: int | None = None
    batch_size: int = 64
    device: torch.device = _CPU

    @classmethod
    def of(cls, stored: Sequence[Batch], image_size: int | None = None, **options: Any) -> Self:
        """All samples of stored images, tokens or inputs, in their order."""
        count = sum(size_of(each) for each in stored)
        return cls(tuple(stored), torch.arange(count), image_size, **options)

    @property
    def num_samples(self) -> int:
        """P."""
        return len(self.indices)

    @cached_property
    def part(self) -> Tensor:
        """Which entry of `stored` each sample is from, int64 [P]."""
        return self._part_of(self.indices)

    @cached_property
    def _ends(self) -> Tensor:
        sizes = [size_of(each) for each in self.stored]
        return torch.tensor(sizes, dtype=torch.int64).cumsum(0)

    def _part_of(self, indices: Tensor) -> Tensor:
        return torch.bucketize(indices, self._ends, right=True)

    def __iter__(self) -> Iterator[Any]:
        """Yield inputs, float32 [B, 3, S, S], int64 [B, L] of texts, or as they are stored, each of one shape."""
        for _, places in groupby(range(self.num_samples), self._shape):
            chosen = torch.tensor(list(places))
            for batch in torch.split(chosen, self.batch_size):
                yield self.inputs(batch)

    def _shape(self, place: int) -> tuple[object, ...]:
        """What must be equal in a batch when iterating."""
        return () if self.image_size else shapes_in(self.stored[self.part[place]])

    def inputs(self, chosen: Tensor | None = None, view: View | None = None) -> Any:
        """The inputs at these places, int64 [B] (all P by default), augmented as in a view, in one batch."""
        indices = self.indices if chosen is None else self.indices[chosen]
        part = self._part_of(indices)
        places = []
        batches = []
        for number in torch.unique(part).tolist():
            own = (part == number).nonzero().flatten()
            places.append(own)
            first = self._ends[number] - size_of(self.stored[number])
            batches.append(self._inputs_of(self.stored[number], indices[own] - first, view))
        return take(joined(batches), torch.cat(places).argsort())

    def _inputs_of(self, stored: Batch, positions: Tensor, view: View | None) -> Batch:
        batch = take(stored, positions)
        if self.image_size is None or not isinstance(batch, Tensor):
            return map_tensors(lambda tensor: tensor.to(self.device), batch)
        images = augmented(batch, view, positions, size_of(stored))
        return to_input(images.to(self.device), self.image_size)

    def batch(self, positions: Tensor, view: View | None = None) -> tuple[Tensor, Any]:
        """Places, int64 [B], and the inputs there."""
        return positions, self.inputs(positions, view)

    def on(self, device: torch.device) -> Self:
        """The same samples, which become inputs on a device."""
        return replace(self, device=device)

    def subset(self, chosen: Tensor | Sequence[int]) -> Self:
        """The samples at these places, in this order; ``range(rank, P, world_size)`` gives a process its share."""
        return replace(self, indices=self.indices[torch.as_tensor(chosen, dtype=torch.int64)])

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
    sizes = sorted({each.image_size or 0 for each in calibrations})
    if len(sizes) != 1:
        raise DataError(
            f"calibration data to pool have the image sizes {sizes}; expected one common size"
        )
    stored: list[Batch] = []
    indices = []
    progress = []  # of each sample through its task's, in (0, 1)
    total = 0
    for each in calibrations:
        indices.append(each.indices + total)
        stored += each.stored
        total += sum(size_of(part) for part in each.stored)
        progress.append(
            (torch.arange(each.num_samples, dtype=torch.float64) + 0.5) / each.num_samples
        )
    order = torch.cat(progress).argsort(stable=True)
    return replace(
        calibrations[0],
        stored=tuple(stored),
        indices=torch.cat(indices)[order],
        batch_size=max(each.batch_size for each in calibrations),
    )
