"""From what is stored, uint8 images or tokens, to a network's input, and images back to be looked at."""

import torch
import torch.nn.functional as F
from torch import Tensor

from coin.core.batches import IMAGENET_MEAN, IMAGENET_STD
from coin.errors import DataError


def to_input(stored: Tensor, image_size: int) -> Tensor:
    """Turn stored samples into what every network of an experiment reads.

    Tokens are inputs already. Images: scales to [0, 1], resizes with antialiased bilinear interpolation where the size
    differs, repeats grey images over three channels, and normalises with ImageNet's mean and standard deviation.

    Args:
        stored: Images, uint8 [B, 1 or 3, H, W], or tokens, int64 [B, S]; a `DataError` if it is neither.
        image_size: S, the side of the result in pixels, or the number of tokens.

    Returns:
        float32 [B, 3, S, S], or int64 [B, S].
    """
    check_stored(stored, image_size)
    if stored.dtype == torch.int64:
        return stored
    x = _resized(stored.float() / 255, image_size)
    mean = x.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = x.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return (x - mean) / std


def to_image(inputs: Tensor, side: int | None = None) -> Tensor:
    """Turn inputs, float [B, 3, S, S], back into images, uint8 [B, 3, side, side]; no side keeps S.

    The inverse of `to_input`, but for what resizing has lost.
    """
    x = inputs.float()
    x = x * x.new_tensor(IMAGENET_STD).view(1, 3, 1, 1) + x.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    if side is not None:
        x = _resized(x, side)
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


def _resized(images: Tensor, side: int) -> Tensor:
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)


def check_stored(stored: Tensor, image_size: int) -> None:
    """Raise a `DataError` unless these are images, uint8 [B, 1 or 3, H, W], or tokens, int64 [B, image_size]."""
    if stored.dtype == torch.int64 and stored.ndim == 2:
        if stored.shape[1] != image_size:
            raise DataError(f"texts have {stored.shape[1]} tokens; expected {image_size}, the network's image_size")
    elif stored.dtype != torch.uint8 or stored.ndim != 4 or stored.shape[1] not in (1, 3):
        raise DataError(
            f"images are {stored.dtype} of shape {list(stored.shape)}; expected torch.uint8 [B, 1 or 3, H, W]"
        )
