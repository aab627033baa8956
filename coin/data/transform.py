"""Stored samples to a network's input: random changes of training images, scaling and normalisation, and back."""

from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coin.core.batches import IMAGENET_MEAN, IMAGENET_STD
from coin.data.sampling import Stream, seeded
from coin.errors import DataError

_MEAN = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
_STD = torch.tensor(IMAGENET_STD).view(3, 1, 1)


class Augmentation(StrEnum):
    """How training images are augmented; evaluation, statistics and decoders use plain images.

    - ``none``: the images as they are;
    - ``crop``: a random crop of the full size after zero padding by an eighth of the side (4 pixels at 32×32);
    - ``crop_flip``: the crop, then a left-right mirror image half of the time; not for digits and letters;
    - ``shift``: the crop after padding with the border's own pixels.
    """

    none = "none"
    crop = "crop"
    crop_flip = "crop_flip"
    shift = "shift"


class View(NamedTuple):
    """One epoch's random augmentation of a selection."""

    augmentation: Augmentation
    seed: int
    epoch: int


def augmented(
    images: Tensor,
    view: View,
    positions: Tensor,
    samples: int,
) -> Tensor:
    """Return images, uint8 [B, C, H, W], as a view shows them, given their `positions`, int64 [B], among `samples`."""
    if view.augmentation is Augmentation.none:
        return images
    height, width = images.shape[-2:]
    vertical = _padding(height)
    horizontal = _padding(width)
    draws = draw_augmentation(samples, height, width, view.seed, view.epoch)[positions]
    top, left, flip = draws.unsqueeze(2).unbind(1)  # each [B, 1]
    rows = top + torch.arange(height)  # [B, H], of the padded image
    columns = left + torch.arange(width)  # [B, W]
    if view.augmentation is Augmentation.shift:
        rows = (rows - vertical).clamp(0, height - 1)
        columns = (columns - horizontal).clamp(0, width - 1)
    else:
        images = F.pad(images, (horizontal, horizontal, vertical, vertical))
    if view.augmentation is Augmentation.crop_flip:
        columns = torch.where(flip == 1, columns.flip(1), columns)
    sample = torch.arange(len(images))[:, None, None]  # [B, 1, 1]
    row = rows[:, :, None]  # [B, H, 1]
    column = columns[:, None, :]  # [B, 1, W]
    pixels = images[sample, :, row, column]  # [B, H, W, C]
    return pixels.permute(0, 3, 1, 2).contiguous()


@lru_cache(maxsize=2)  # it is needed for every batch
def draw_augmentation(
    samples: int,
    height: int,
    width: int,
    seed: int,
    epoch: int,
) -> Tensor:
    """Every sample's crop by (seed, epoch, sample), int64 [samples, 3]: top, left (in the padded image) and flip."""
    generator = seeded(seed, Stream.AUGMENTATION, epoch)
    top = torch.randint(2 * _padding(height) + 1, (samples,), generator=generator)
    left = torch.randint(2 * _padding(width) + 1, (samples,), generator=generator)
    flip = torch.randint(2, (samples,), generator=generator)
    return torch.stack([top, left, flip], 1)


def _padding(side: int) -> int:
    return max(1, side // 8)


def to_input(stored: Tensor, image_size: int) -> Tensor:
    """Turn stored samples into inputs: images, uint8 [B, 1 or 3, H, W], into float32 [B, 3, S, S]; tokens are inputs.

    Images are scaled to [0, 1], resized to S with antialiased bilinear interpolation where the size differs, repeated
    over three channels if grey, and normalised with ImageNet's mean and standard deviation.
    """
    if check_stored(stored) == "texts":
        return stored
    images = _resized(stored.float() / 255, image_size)
    return (images - _MEAN.to(stored.device)) / _STD.to(stored.device)


def to_image(inputs: Tensor, side: int | None = None) -> Tensor:
    """Turn inputs, float [B, 3, S, S], back into images, uint8 [B, 3, side, side], of side S by default."""
    images = inputs.float() * _STD.to(inputs.device) + _MEAN.to(inputs.device)
    pixels = 255 * _resized(images, side or inputs.shape[-1])
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _resized(images: Tensor, side: int) -> Tensor:
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(
        images,
        size=(side, side),
        mode="bilinear",
        antialias=True,
    )


def check_stored(stored: Tensor) -> str:
    """Return what samples are: ``images``, uint8 [B, 1 or 3, H, W], or ``texts``, int64 [B, L]; else a `DataError`."""
    if stored.ndim == 2 and stored.dtype == torch.int64:
        return "texts"
    has_channels = stored.ndim == 4 and stored.shape[1] in (1, 3)
    if has_channels and stored.dtype == torch.uint8:
        return "images"
    raise DataError(
        f"images are {stored.dtype} {list(stored.shape)}; expected torch.uint8 [B, 1 or 3, H, W]"
    )
