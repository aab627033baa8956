"""Image files to uint8 tensors."""

import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from coin.errors import DataError
from coin.processes import cores

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
    # The ends of a strip are cut off: resized as a whole, one of a single row of pixels would be enormous.
    short = min(image.size)
    rgb = _centre(image, min(image.width, _LONGEST * short), min(image.height, _LONGEST * short)).convert("RGB")
    scale = side / min(rgb.size)
    width, height = (max(side, round(length * scale)) for length in rgb.size)
    if (width, height) != rgb.size:
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(_centre(rgb, side, side)).transpose(2, 0, 1)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def read_file(path: str | Path, side: int, native: bool = False) -> NDArray[np.uint8]:
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


def in_parallel(read: Callable[[int], NDArray[np.uint8]], count: int, side: int) -> Tensor:
    """Fill a tensor from threads (PIL decodes outside Python's lock): for what is read once, as a whole.

    Args:
        read: Gives image ``i`` as uint8 [3, side, side].
        count: Number of images.
        side: Their side in pixels.

    Returns:
        uint8 [count, 3, side, side].
    """
    out = torch.empty(count, 3, side, side, dtype=torch.uint8)
    view = out.numpy()
    threads = min(32, cores())
    step = max(1, min(_CHUNK, count // threads))

    def fill(start: int) -> None:
        for i in range(start, min(start + step, count)):
            view[i] = read(i)

    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(fill, start) for start in range(0, count, step)]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return out


class LazyImages:
    """An image store that decodes files when they are asked for, in the process that asks: a loader's worker.

    Args:
        paths: The files.
        side: Side of the images in pixels.
    """

    def __init__(self, paths: Sequence[str], side: int) -> None:
        # One array instead of a million objects, whose reference counts would copy their pages into every worker.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.side = side

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, positions: Tensor, /) -> Tensor:
        """The images at these positions (int64 [B]), uint8 [B, 3, side, side].

        Raises:
            DataError: A file cannot be decoded.
        """
        images = torch.empty(len(positions), 3, self.side, self.side, dtype=torch.uint8)
        for image, position in zip(images.numpy(), positions.tolist(), strict=True):
            image[:] = self.read(position)
        return images

    def read(self, position: int) -> NDArray[np.uint8]:
        """One image, uint8 [3, side, side]."""
        return read_file(os.fsdecode(self._paths[position]), self.side)

    def decoded(self, positions: Tensor) -> Tensor:
        """The same as indexing, in parallel: for a selection that is to stay in memory."""
        places = positions.tolist()
        return in_parallel(lambda i: self.read(places[i]), len(places), self.side)


def read_files(paths: Sequence[str], image_size: int, most: float = math.inf) -> Tensor | LazyImages:
    """Read images into one tensor, uint8 [P, 3, S, S]; or lazily, if it took more than so many bytes.

    Square images that all have one size up to ``image_size`` keep it; all others, and those that are read lazily,
    become ``image_size`` by `to_square`.

    Raises:
        DataError: A file cannot be decoded.
    """
    try:
        with Image.open(paths[0]) as first:
            width, height = first.size
    except DAMAGE as error:
        raise DataError(f"{paths[0]} cannot be read as an image ({error}); replace or remove it") from error
    if width == height <= image_size and 3 * width**2 * len(paths) <= most:
        try:
            return in_parallel(lambda i: read_file(paths[i], width, native=True), len(paths), width)
        except OtherSizeError:
            pass
    lazy = LazyImages(paths, image_size)
    return lazy.decoded(torch.arange(len(paths))) if 3 * image_size**2 * len(paths) <= most else lazy
