"""torchvision's transforms of training images, named by class path, and seeded image by image."""

from argparse import ArgumentError
from collections.abc import Sequence
from typing import TypeAlias

import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torchvision.transforms import v2

from coin.data.sampling import Stream, seeded
from coin.errors import ConfigurationError, first_line

# Of plain values, which a step's key holds; jsonargparse would make objects of `dict[str, Any]`.
TransformSpec: TypeAlias = dict | list[dict] | None  # type: ignore[type-arg]
"""``{class_path: …, init_args: {…}}``, or a list of such, applied one after the other."""

_ADVICE = "name a class of torchvision.transforms.v2 and its init_args"


def build_transforms(spec: TransformSpec) -> list[v2.Transform]:
    """Return the transforms that a configuration names.

    Raises:
        ConfigurationError: It names something else, or options that its class has not; or, with ``coin --safe``,
            anything at all: `coin.safe.ALLOWED` has no transforms.
    """
    if not spec:
        return []
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--transform", type=list[v2.Transform])
    try:
        parsed = parser.parse_object({"transform": spec if isinstance(spec, list) else [spec]})
        return list(parser.instantiate_classes(parsed).transform)
    except (ArgumentError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).removeprefix('Parser key "transform": ')
        raise ConfigurationError(
            f"found transform {spec!r:.200}, which cannot be made ({reason}); {_ADVICE}"
        ) from error


def transform_images(
    images: Tensor, transforms: Sequence[v2.Transform], seed: int, epoch: int, positions: Tensor
) -> Tensor:
    """Apply transforms to each image by itself.

    All that they draw from torch's generator is a function of (seed, epoch, position), and the generator is left as
    found: what becomes of a sample does not hang on its batch, its worker or its process, nor on what ran before.

    Args:
        images: uint8 [B, C, H, W].
        transforms: Applied one after the other.
        seed: The task's.
        epoch: The epoch that the batch belongs to.
        positions: The samples' positions in the training split, int64 [B].

    Returns:
        uint8 [B, C, H', W'].

    Raises:
        ConfigurationError: A transform fails, or its results are no images of one size.
    """
    changed = []
    with torch.random.fork_rng(devices=[]):
        for image, position in zip(images, positions.tolist(), strict=True):
            # Not torch.manual_seed, which would move the generators of GPUs as well.
            torch.default_generator.manual_seed(seeded(seed, Stream.TRANSFORM, epoch, position).initial_seed())
            for transform in transforms:
                try:
                    image = transform(image)
                except (TypeError, ValueError, RuntimeError) as error:
                    raise ConfigurationError(
                        f"the transform {type(transform).__name__} fails on an image of shape "
                        f"{list(images.shape[1:])}: {first_line(error)}; {_ADVICE}"
                    ) from error
            changed.append(image)
    for image in changed:
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.shape != changed[0].shape:
            found = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise ConfigurationError(
                f"the transforms give {found}, expected torch.uint8 images of one size; leave out what changes their "
                "type, and crop or resize them to one size"
            )
    return torch.stack(changed)
