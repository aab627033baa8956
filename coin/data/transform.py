"""Stored samples to a network's input: random changes of training images, scaling and normalisation, and back."""

from argparse import ArgumentError
from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import Tensor
from torchvision.transforms import v2

from coin.core.batches import IMAGENET_MEAN, IMAGENET_STD
from coin.data.sampling import Stream, seeded
from coin.errors import ConfigurationError, DataError

_MEAN, _STD = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)

# {class_path: …, init_args: {…}}, or a list of such, applied one after the other: plain values, as in `ClassSpec`.
TransformSpec: TypeAlias = dict | list[dict] | None  # type: ignore[type-arg]


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


def augmented(images: Tensor, view: View, positions: Tensor, samples: int) -> Tensor:
    """Return images, uint8 [B, C, H, W], as a view shows them, given their `positions`, int64 [B], among `samples`."""
    if view.augmentation is Augmentation.none:
        return images
    height, width = images.shape[-2:]
    draws = draw_augmentation(samples, height, width, view.seed, view.epoch)[positions]
    vertical, horizontal = _padding(height), _padding(width)
    rows, columns = draws[:, 0, None] + torch.arange(height), draws[:, 1, None] + torch.arange(width)
    if view.augmentation is Augmentation.shift:
        rows = (rows - vertical).clamp(0, height - 1)
        columns = (columns - horizontal).clamp(0, width - 1)
    else:
        images = F.pad(images, (horizontal, horizontal, vertical, vertical))
    if view.augmentation is Augmentation.crop_flip:
        columns = torch.where(draws[:, 2, None] == 1, columns.flip(1), columns)
    sample = torch.arange(len(images))[:, None, None]
    return images[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@lru_cache(maxsize=2)  # asked for batch after batch
def draw_augmentation(samples: int, height: int, width: int, seed: int, epoch: int) -> Tensor:
    """Every sample's crop by (seed, epoch, sample), int64 [samples, 3]: top, left (in the padded image) and flip."""
    generator = seeded(seed, Stream.AUGMENTATION, epoch)
    top = torch.randint(2 * _padding(height) + 1, (samples,), generator=generator)
    left = torch.randint(2 * _padding(width) + 1, (samples,), generator=generator)
    flip = torch.randint(2, (samples,), generator=generator)
    return torch.stack([top, left, flip], 1)


def _padding(side: int) -> int:
    return max(1, side // 8)


def build_transforms(spec: TransformSpec) -> list[v2.Transform]:
    """Return the transforms that a configuration names."""
    if not spec:
        return []
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--transform", type=list[v2.Transform])
    try:
        parsed = parser.parse_object({"transform": spec if isinstance(spec, list) else [spec]})
        return list(parser.instantiate(parsed).transform)
    except (ArgumentError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).removeprefix('Parser key "transform": ')
        raise ConfigurationError(f"found transform {spec!r:.200} ({reason}); name a class of torchvision") from error


def transform_images(images: Tensor, transforms: Sequence[v2.Transform], view: View, positions: Tensor) -> Tensor:
    """Apply transforms to each image of uint8 [B, C, H, W] by itself; what they draw is by (seed, epoch, sample)."""
    if not transforms:
        return images
    changed, together = [], v2.Compose(transforms)
    with torch.random.fork_rng(devices=[]):
        for image, position in zip(images, positions.tolist(), strict=True):
            draw = seeded(view.seed, Stream.TRANSFORM, view.epoch, position)
            torch.default_generator.manual_seed(draw.initial_seed())  # torch.manual_seed would move GPUs' as well
            changed.append(together(image))
    for image in changed:
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.shape != changed[0].shape:
            found = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise ConfigurationError(f"the transforms give {found}, expected torch.uint8 images of one size")
    return torch.stack(changed)


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
