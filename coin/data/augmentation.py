"""Random changes of training images: crops and flips of whole batches, and torchvision's own, image by image."""

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

from coin.data.sampling import Stream, seeded
from coin.errors import ConfigurationError

# {class_path: …, init_args: {…}}, or a list of such, applied one after the other. Of plain values, which a step's key
# holds; jsonargparse would make objects of `dict[str, Any]`.
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
        raise ConfigurationError(
            f"found transform {spec!r:.200} ({reason}); name a class of torchvision.transforms.v2 and its init_args"
        ) from error


def transform_images(images: Tensor, transforms: Sequence[v2.Transform], view: View, positions: Tensor) -> Tensor:
    """Apply transforms, one after the other, to each image of uint8 [B, C, H, W] by itself.

    What they draw from torch's generator is a function of (seed, epoch, position). Raises ConfigurationError where the
    results are no images of one size.
    """
    if not transforms:
        return images
    changed, together = [], v2.Compose(transforms)
    with torch.random.fork_rng(devices=[]):
        for image, position in zip(images, positions.tolist(), strict=True):
            draw = seeded(view.seed, Stream.TRANSFORM, view.epoch, position)
            # Not torch.manual_seed, which would move the generators of GPUs as well.
            torch.default_generator.manual_seed(draw.initial_seed())
            changed.append(together(image))
    for image in changed:
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.shape != changed[0].shape:
            found = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise ConfigurationError(f"the transforms give {found}, expected torch.uint8 images of one size")
    return torch.stack(changed)
