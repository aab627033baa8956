"""Stored samples to a network's input: random changes of training images, scaling and normalisation."""

from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from coin.core.batches import IMAGENET_MEAN, IMAGENET_STD
from coin.data.sampling import Stream, make_generator
from coin.errors import DataError


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
    view: View | None,
    positions: Tensor,
    samples: int,
) -> Tensor:
    """Return images, uint8 [B, C, H, W], as a view shows them, given their `positions`, int64 [B], among `samples`."""
    if view is None or view.augmentation is Augmentation.none:
        return images
    height, width = images.shape[-2:]
    is_shift = view.augmentation is Augmentation.shift
    padded = functional.pad(
        images,
        [_padding(width), _padding(height)],
        padding_mode="edge" if is_shift else "constant",
    )
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, top, left, H, W]
    draws = draw_augmentation(samples, height, width, view.seed, view.epoch)[positions]
    top, left, flip = draws.unbind(1)
    crops: Tensor = windows[torch.arange(len(images)), :, top, left]  # [B, C, H, W]
    if view.augmentation is Augmentation.crop_flip:
        is_flipped = flip.bool().view(-1, 1, 1, 1)
        crops = torch.where(is_flipped, crops.flip(3), crops)
    return crops


@lru_cache(maxsize=2)  # it is needed for every batch
def draw_augmentation(
    samples: int,
    height: int,
    width: int,
    seed: int,
    epoch: int,
) -> Tensor:
    """Every sample's crop by (seed, epoch, sample), int64 [samples, 3]: top, left (in the padded image) and flip."""
    generator = make_generator(seed, Stream.AUGMENTATION, epoch)
    choices = (2 * _padding(height) + 1, 2 * _padding(width) + 1, 2)
    draws = [torch.randint(count, (samples,), generator=generator) for count in choices]
    return torch.stack(draws, 1)


def _padding(side: int) -> int:
    return max(1, side // 8)


def to_input(stored: Tensor, image_size: int) -> Tensor:
    """Turn stored samples into inputs: images, uint8 [B, 1 or 3, H, W], into float32 [B, 3, S, S]; tokens are inputs.

    Images are scaled to [0, 1], resized to S with antialiased bilinear interpolation where the size differs, repeated
    over three channels if grey, and normalised with ImageNet's mean and standard deviation. A DataError for others.
    """
    if stored.ndim == 2 and stored.dtype == torch.int64:
        return stored
    if stored.ndim != 4 or stored.shape[1] not in (1, 3) or stored.dtype != torch.uint8:
        raise DataError(
            f"images are {stored.dtype} {list(stored.shape)}; expected torch.uint8 [B, 1 or 3, H, W]"
        )
    images = functional.resize(stored.float() / 255, [image_size, image_size])
    inputs: Tensor = functional.normalize(images, list(IMAGENET_MEAN), list(IMAGENET_STD))
    return inputs
