"""Random changes of training images, on whole batches of uint8 tensors."""

from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from coin.data.sampling import Stream, seeded


class Augmentation(StrEnum):
    """What happens to images that are trained on; evaluation, statistics and decoders never see it."""

    none = "none"
    """The images as they are."""

    crop = "crop"
    """A random crop of the full size after zero padding by an eighth of the side (4 pixels at 32×32)."""

    crop_flip = "crop_flip"
    """The crop, then a left-right mirror image half of the time. Not for digits and letters."""

    shift = "shift"
    """The crop after padding with the border's own pixels: no black edges on images whose ground is not black."""


def draw_augmentation(samples: int, height: int, width: int, seed: int, epoch: int) -> Tensor:
    """Every sample's random crop and flip in one epoch.

    Drawn for the whole epoch at once, so that a sample's augmentation depends on (seed, epoch, sample) alone and not
    on the batch, the worker or the process that it lands on.

    Returns:
        int64 [samples, 3]: the crop's top and left in the padded image, and 1 where the image is mirrored.
    """
    generator = seeded(seed, Stream.AUGMENTATION, epoch)
    top = torch.randint(2 * _padding(height) + 1, (samples,), generator=generator)
    left = torch.randint(2 * _padding(width) + 1, (samples,), generator=generator)
    flip = torch.randint(2, (samples,), generator=generator)
    return torch.stack([top, left, flip], 1)


def augment(images: Tensor, kind: Augmentation, draws: Tensor) -> Tensor:
    """Apply drawn augmentations.

    Args:
        images: uint8 [B, C, H, W].
        kind: Which of the drawn changes are made.
        draws: The samples' rows of `draw_augmentation`, int64 [B, 3].

    Returns:
        uint8 [B, C, H, W]; the input itself for `Augmentation.none`.
    """
    if kind is Augmentation.none:
        return images
    height, width = images.shape[-2:]
    vertical, horizontal = _padding(height), _padding(width)
    rows = draws[:, 0, None] + torch.arange(height)
    columns = draws[:, 1, None] + torch.arange(width)
    if kind is Augmentation.shift:
        padded = images
        rows = (rows - vertical).clamp(0, height - 1)
        columns = (columns - horizontal).clamp(0, width - 1)
    else:
        padded = F.pad(images, (horizontal, horizontal, vertical, vertical))
    if kind is Augmentation.crop_flip:
        columns = torch.where(draws[:, 2, None] == 1, columns.flip(1), columns)
    sample = torch.arange(len(images))[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _padding(side: int) -> int:
    return max(1, side // 8)
