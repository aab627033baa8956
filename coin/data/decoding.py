"""Image files to uint8 tensors, decoded in parallel threads."""

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from coin.errors import DataError

# What PIL's decoders raise on files that are cut off, damaged, or something else altogether.
DAMAGE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
)

# Images per job: enough that handing jobs to threads costs nothing beside decoding.
_CHUNK = 64

# The longest side that is resized as a whole, in short sides: far from what the centre square needs.
_LONGEST = 8


class OtherSizeError(Exception):
    """An image is not of the size that all were expected to have."""


def to_square(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """The centre square of an image in RGB: its short side resized to ``side`` (bilinear, antialiased), then cropped.

    Returns:
        uint8 [3, side, side].
    """
    # JPEG decoders can halve an image while decoding; twice the final size leaves the rest to the antialiased resize.
    image.draft("RGB", (2 * side, 2 * side))
    rgb = _not_too_long(image).convert("RGB")
    scale = side / min(rgb.size)
    width, height = (max(side, round(length * scale)) for length in rgb.size)
    if (width, height) != rgb.size:
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return _channels_first(rgb.crop((left, top, left + side, top + side)))


def _not_too_long(image: Image.Image) -> Image.Image:
    """Cut the ends off a strip: resized as a whole, one of a single row of pixels would be enormous."""
    short = min(image.size)
    width, height = (min(length, _LONGEST * short) for length in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def read_file(path: Path, side: int, native: bool = False) -> NDArray[np.uint8]:
    """Read one image file.

    Args:
        path: The file.
        side: Side of the result in pixels.
        native: Require that the image is ``side`` × ``side`` already.

    Returns:
        uint8 [3, side, side].

    Raises:
        DataError: The file cannot be decoded, or has more than 8 bits a channel.
        OtherSizeError: ``native``, and the image has another size.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"{path} has pixels of type {image.mode!r}; expected 8 bits a channel, convert it first"
                )
            if native and image.size != (side, side):
                raise OtherSizeError
            return to_square(image, side)
    except DAMAGE as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as an image ({error}); replace or remove it") from error


def read_files(paths: Sequence[Path], image_size: int) -> Tensor:
    """Read images into one tensor.

    Square images that all have one size up to ``image_size`` keep it; all others become ``image_size`` by `to_square`.

    Returns:
        uint8 [P, 3, S, S].

    Raises:
        DataError: A file cannot be decoded.
    """
    try:
        with Image.open(paths[0]) as first:
            width, height = first.size
    except DAMAGE as error:
        raise DataError(f"{paths[0]} cannot be read as an image ({error}); replace or remove it") from error
    if width == height <= image_size:
        try:
            return in_parallel(lambda i: read_file(paths[i], width, native=True), len(paths), width)
        except OtherSizeError:
            pass
    return in_parallel(lambda i: read_file(paths[i], image_size), len(paths), image_size)


def in_parallel(read: Callable[[int], NDArray[np.uint8]], count: int, side: int) -> Tensor:
    """Fill a tensor from threads (PIL decodes outside Python's lock).

    Args:
        read: Gives image ``i`` as uint8 [3, side, side].
        count: Number of images.
        side: Their side in pixels.

    Returns:
        uint8 [count, 3, side, side].
    """
    out = torch.empty(count, 3, side, side, dtype=torch.uint8)
    view = out.numpy()

    def fill(start: int) -> None:
        for i in range(start, min(start + _CHUNK, count)):
            view[i] = read(i)

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(fill, start) for start in range(0, count, _CHUNK)]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return out


@dataclass(frozen=True)
class LazyImages:
    """An image store that decodes files when they are asked for.

    Attributes:
        paths: The files.
        side: Side of the images in pixels.
    """

    paths: tuple[Path, ...]
    side: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, positions: Tensor, /) -> Tensor:
        """The images at these positions (int64 [B]), uint8 [B, 3, side, side].

        Raises:
            DataError: A file cannot be decoded.
        """
        chosen = [self.paths[i] for i in positions.tolist()]
        return in_parallel(lambda i: read_file(chosen[i], self.side), len(chosen), self.side)


def _channels_first(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image).transpose(2, 0, 1)
