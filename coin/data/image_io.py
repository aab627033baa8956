"""Images to uint8 tensors: files, and torchvision's data sets."""

import struct
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from operator import attrgetter
from typing import Any, TypeVar

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from coin.core.processes import cores
from coin.data.samples import Samples
from coin.errors import DataError

T = TypeVar("T")

# What PIL's decoders raise on files that are cut off or damaged.
DAMAGE = (
    OSError,
    Image.DecompressionBombError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
)


def to_square(image: Image.Image, side: int) -> Tensor:
    """The centre square of an image in RGB, resized: uint8 [3, side, side]."""
    # JPEG decoders can halve an image while decoding; twice the final size leaves the rest to the antialiased resize.
    image.draft("RGB", (2 * side, 2 * side))
    square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
    pixels: Tensor = pil_to_tensor(square)
    return pixels


def read_image(path: str, use: Callable[[Image.Image], T]) -> T:
    """Return what a function makes of an image file; a `DataError` for a damaged one, or more than 8 bits a channel."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"{path} has pixels of type {image.mode!r}; expected 8 bits a channel: convert it"
                )
            return use(image)
    except DataError:  # which is a ValueError
        raise
    except DAMAGE as error:
        raise DataError(
            f"{path} cannot be read as an image ({error}); replace or remove it"
        ) from error


def square_in(path: str, side: int) -> Tensor:
    """The centre square of an image file; see `to_square` and `read_image`."""
    return read_image(path, partial(to_square, side=side))


def stored_side(paths: Sequence[str], image_size: int) -> int:
    """Return the side of square images that all have one size up to `image_size`, else that."""
    size = attrgetter("size")
    width, height = read_image(paths[0], size)
    is_small = width == height <= image_size
    if is_small and all(read_image(path, size) == (width, width) for path in paths):
        return int(width)
    return image_size


def read(dataset: Any) -> Samples:
    """Return all samples of one of torchvision's data sets, whose images, uint8 [C, H, W], have one size."""
    count = len(dataset)
    first, _ = dataset[0]
    images = first.new_empty(count, *first.shape)
    labels = torch.empty(count, dtype=torch.int64)
    with ThreadPool(cores()) as pool:  # PIL decodes outside Python's lock
        pairs = pool.imap(dataset.__getitem__, range(count), chunksize=64)
        for place, (image, label) in enumerate(pairs):
            images[place] = image
            labels[place] = label
    return Samples.of(images, labels)
