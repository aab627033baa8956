"""Labelled images held as uint8, and the dataset that hands them out a batch at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from coin.data.augmentation import Augmentation, augment, draw_augmentation
from coin.data.sampling import Draw
from coin.data.torchvision_transforms import TransformSpec, build_transforms, transform_images
from coin.errors import ConfigurationError, DataError


class ImageStore(Protocol):
    """A uint8 tensor [N, C, H, W], or anything that reads images of one shape by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: Tensor, /) -> Tensor:
        """The images at these positions (int64 [B]) as uint8 [B, C, H, W]."""
        ...


@dataclass(frozen=True)
class Samples:
    """A selection of labelled images.

    Selecting copies indices, never images, so that splits and calibration sets share one store.

    Attributes:
        store: All images of the source's part that this was selected from.
        labels: Class indices of the whole store, int64 [N].
        index: Positions in the store that are selected, int64 [P].
    """

    store: ImageStore
    labels: Tensor
    index: Tensor

    @classmethod
    def of(cls, store: ImageStore, labels: Tensor) -> Self:
        """All images of a store.

        Raises:
            DataError: There are not as many labels as images.
        """
        if len(store) != len(labels):
            raise DataError(f"{len(store)} images but {len(labels)} labels; expected one label for each image")
        return cls(store, labels.long(), torch.arange(len(labels)))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def targets(self) -> Tensor:
        """The selected samples' class indices, int64 [P]."""
        return self.labels[self.index]

    def images(self, positions: Tensor | None = None) -> Tensor:
        """The images at these positions of the selection (all by default), uint8 [B, C, H, W]."""
        return self.store[self.index if positions is None else self.index[positions]]

    def subset(self, positions: Tensor | Sequence[int]) -> Self:
        """The samples at these positions of the selection, in this order."""
        return replace(self, index=self.index[torch.as_tensor(positions, dtype=torch.int64)])


class BatchDataset(Dataset[tuple[Tensor, Tensor]]):
    """Whole batches of a selection, for a DataLoader with ``batch_size=None`` and a sampler of `Draw`.

    Args:
        samples: The images.
        augmentation: What happens to the images of draws that carry an epoch.
        seed: Decides, with the epoch and the sample, the augmentation and what `transform` draws.
        transform: What happens to them after that.
    """

    def __init__(
        self,
        samples: Samples,
        augmentation: Augmentation = Augmentation.none,
        seed: int = 0,
        transform: TransformSpec = None,
    ) -> None:
        self.samples = samples
        self.augmentation = augmentation
        self.seed = seed
        self._transforms = build_transforms(transform)
        self._epoch: int | None = None
        self._draws = torch.empty(0, 3, dtype=torch.int64)

    def __len__(self) -> int:
        """The number of samples (not of batches)."""
        return len(self.samples)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """One batch: images uint8 [B, C, H, W] and labels int64 [B]."""
        if not isinstance(draw, Draw):
            raise ConfigurationError(
                "the loader's sampler was replaced (overfit_batches does that); use max_train for a small training set"
            )
        images = self.samples.images(draw.positions)
        if draw.epoch is not None and self.augmentation is not Augmentation.none:
            if draw.epoch != self._epoch:
                height, width = images.shape[-2:]
                self._draws = draw_augmentation(len(self.samples), height, width, self.seed, draw.epoch)
                self._epoch = draw.epoch
            images = augment(images, self.augmentation, self._draws[draw.positions])
        if draw.epoch is not None and self._transforms:
            images = transform_images(images, self._transforms, self.seed, draw.epoch, draw.positions)
        return images, self.samples.targets[draw.positions]


class ImagesOnly(Dataset[Tensor]):
    """The same batches without their labels, for prediction."""

    def __init__(self, batches: BatchDataset) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, draw: Draw) -> Tensor:
        """One batch of images, uint8 [B, C, H, W]."""
        return self.batches[draw][0]
