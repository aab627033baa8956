"""Calibration samples: data, and an index that says which of them in which order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
        indices: The selected samples, int64 [P, 2]: which entry of `stored`, and which sample of it.
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
        sizes = torch.tensor([size_of(each) for each in stored], dtype=torch.int64)
        part = torch.arange(len(stored)).repeat_interleave(sizes)
        first = sizes.cumsum(0) - sizes
        place = torch.arange(len(part)) - first[part]
        return cls(tuple(stored), torch.stack([part, place], 1), image_size, **options)

    @property
    def num_samples(self) -> int:
        """P."""
        return len(self.indices)

    @property
    def part(self) -> Tensor:
        """Which entry of `stored` each sample is from, int64 [P]."""
        return self.indices[:, 0]

    def __iter__(self) -> Iterator[Any]:
        """Yield inputs, float32 [B, 3, S, S], int64 [B, L] of texts, or as they are stored, each of one shape."""
        shapes = [() if self.image_size else shapes_in(each) for each in self.stored]
        parts = self.part.tolist()
        for _, places in groupby(range(self.num_samples), lambda place: shapes[parts[place]]):
            for batch in torch.split(torch.tensor([*places]), self.batch_size):
                yield self.inputs(batch)

    def inputs(self, chosen: Tensor | None = None, view: View | None = None) -> Any:
        """The inputs at these places, int64 [B] (all P by default), augmented as in a view, in one batch."""
        part, place = self.indices.T if chosen is None else self.indices[chosen].T
        parts = part.unique().tolist()
        batches = [self._inputs_of(self.stored[each], place[part == each], view) for each in parts]
        by_part = part.argsort(stable=True)  # the order of the batches' samples
        return take(joined(batches), by_part.argsort())

    def _inputs_of(self, stored: Batch, places: Tensor, view: View | None) -> Batch:
        batch: Any = take(stored, places)
        if self.image_size is None:
            return map_tensors(lambda tensor: tensor.to(self.device), batch)
        images = augmented(batch, view, places, size_of(stored))
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
        fitted = count - max(1, round(share * count))
        return self.subset(range(fitted)), self.subset(range(fitted, count))


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
    for each in calibrations:
        indices.append(each.indices + torch.tensor([len(stored), 0]))
        stored += each.stored
        count = each.num_samples
        progress.append((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    order = torch.cat(progress).argsort(stable=True)
    return replace(
        calibrations[0],
        stored=tuple(stored),
        indices=torch.cat(indices)[order],
        batch_size=max(each.batch_size for each in calibrations),
    )
