"""From stored uint8 images to a network's input, and back to be looked at."""

import torch
import torch.nn.functional as F
from torch import Tensor

from coin.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_input(images: Tensor, image_size: int) -> Tensor:
    """Turn stored images into what every network of an experiment reads.

    Scales to [0, 1], resizes with antialiased bilinear interpolation where the size differs, repeats grey images
    over three channels, and normalises with ImageNet's mean and standard deviation. Runs on the images' device.

    Args:
        images: uint8 [B, 1 or 3, H, W].
        image_size: Side of the result in pixels.

    Returns:
        float32 [B, 3, image_size, image_size].

    Raises:
        DataError: The images have another type or shape.
    """
    check_images(images)
    x = images.float() / 255
    if x.shape[-2:] != (image_size, image_size):
        x = F.interpolate(x, size=(image_size, image_size), mode="bilinear", antialias=True)
    mean = x.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = x.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return (x - mean) / std


def to_image(inputs: Tensor, side: int | None = None) -> Tensor:
    """Turn inputs back into images: the inverse of `to_input`, but for what resizing has lost.

    Args:
        inputs: float [B, 3, S, S], normalised with ImageNet's mean and standard deviation.
        side: The side of the result in pixels; none keeps S.

    Returns:
        uint8 [B, 3, side, side].
    """
    x = inputs.float()
    x = x * x.new_tensor(IMAGENET_STD).view(1, 3, 1, 1) + x.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    if side is not None and x.shape[-2:] != (side, side):
        x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


def check_images(images: Tensor) -> None:
    """Raise a `DataError` unless the images are uint8 [B, 1 or 3, H, W]."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(
            f"images are {images.dtype} of shape {list(images.shape)}; expected torch.uint8 [B, 1 or 3, H, W]"
        )
