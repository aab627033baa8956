"""Stored uint8 images or tokens to a network's input, and inputs back to images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from coin.core.batches import IMAGENET_MEAN, IMAGENET_STD
from coin.errors import DataError

_MEAN, _STD = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)


def to_input(stored: Tensor, image_size: int) -> Tensor:
    """Turn stored samples, uint8 [B, 1 or 3, H, W] or int64 [B, S], into inputs, float32 [B, 3, S, S] or int64 [B, S].

    Tokens are inputs already. Images are scaled to [0, 1], resized to S with antialiased bilinear interpolation where
    the size differs, repeated over three channels if grey, and normalised with ImageNet's mean and standard deviation.
    """
    check_stored(stored, image_size)
    if stored.dtype == torch.int64:
        return stored
    return (_resized(stored.float() / 255, image_size) - _MEAN.to(stored.device)) / _STD.to(stored.device)


def to_image(inputs: Tensor, side: int | None = None) -> Tensor:
    """Turn inputs, float [B, 3, S, S], back into images, uint8 [B, 3, side, side], of side S by default."""
    images = inputs.float() * _STD.to(inputs.device) + _MEAN.to(inputs.device)
    return (_resized(images, side or inputs.shape[-1]) * 255).round().clamp(0, 255).to(torch.uint8)


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
        raise DataError(f"images are {stored.dtype} {list(stored.shape)}; expected torch.uint8 [B, 1 or 3, H, W]")
