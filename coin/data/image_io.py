"""Image files to uint8 tensors."""

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from coin.core.processes import cores
from coin.errors import DataError

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

_LONGEST = 8  # the longest side that is resized as a whole, in short sides: far from what the centre square needs
_CHUNK = 64  # files that a thread reads at a time


def to_square(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """The centre square of an image in RGB, uint8 [3, side, side]: its short side resized, then its centre cropped."""
    # JPEG decoders can halve an image while decoding; twice the final size leaves the rest to the antialiased resize.
    image.draft("RGB", (2 * side, 2 * side))
    # The ends of a strip are cut off: resized as a whole, one of a single row of pixels would be enormous.
    longest = _LONGEST * min(image.size)
    middle = _centre(image, min(image.width, longest), min(image.height, longest))
    rgb = middle.convert("RGB")
    scale = side / min(rgb.size)
    width = max(side, round(rgb.width * scale))
    height = max(side, round(rgb.height * scale))
    if (width, height) != rgb.size:
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    square = np.asarray(_centre(rgb, side, side))
    return square.transpose(2, 0, 1)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """Open an image file; a `DataError` if it cannot be decoded, or has more than 8 bits a channel."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"{path} has pixels of type {image.mode!r}; expected 8 bits a channel: convert it"
                )
            yield image
    except DataError:  # which is a ValueError
        raise
    except DAMAGE as error:
        raise DataError(
            f"{path} cannot be read as an image ({error}); replace or remove it"
        ) from error


def read_file(path: str, side: int, native: bool = False) -> NDArray[np.uint8]:
    """Read one image file as `to_square` does; a `DataError` if ``native`` and it is not ``side`` × ``side``."""
    with open_image(path) as image:
        if native and image.size != (side, side):
            width, height = image.size
            raise DataError(f"{path} is {width} × {height} pixels; expected {side} × {side}")
        return to_square(image, side)


def read_in_parallel(paths: Sequence[str], side: int, native: bool = False) -> Tensor:
    """Read files as `read_file` does, by threads (PIL decodes outside Python's lock): uint8 [P, 3, side, side]."""
    images = np.empty((len(paths), 3, side, side), dtype=np.uint8)

    def fill(start: int) -> None:
        chunk = paths[start : start + _CHUNK]
        for place, path in enumerate(chunk, start):
            images[place] = read_file(path, side, native)

    starts = range(0, len(paths), _CHUNK)
    with ThreadPoolExecutor(min(32, cores())) as pool:
        list(pool.map(fill, starts))  # raises the first error
    return torch.from_numpy(images)


class LazyImages:
    """The images of files, decoded on access, in the accessing process (a loader's worker)."""

    def __init__(self, paths: Sequence[str], side: int) -> None:
        # One array instead of a million objects, whose reference counts would copy their pages into every worker.
        self._paths = np.array(paths)
        self.side = side

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, positions: Tensor, /) -> Tensor:
        """The images at these positions (int64 [B]), uint8 [B, 3, side, side]."""
        paths = self._paths[positions.numpy()].tolist()
        images = [read_file(path, self.side) for path in paths]
        return torch.from_numpy(np.stack(images))

    def decoded(self, positions: Tensor) -> Tensor:
        """The same as indexing, in parallel: for a selection that is to stay in memory."""
        paths = self._paths[positions.numpy()].tolist()
        return read_in_parallel(paths, self.side)


def read_files(
    paths: Sequence[str], image_size: int, most: float = math.inf
) -> Tensor | LazyImages:
    """Read images into one tensor, uint8 [P, 3, S, S]; or lazily, if it would exceed the byte limit.

    Square images that all have one size up to ``image_size`` keep it, unless read lazily; others go by `to_square`.
    """
    with open_image(paths[0]) as first:
        width, height = first.size
    bytes_as_they_are = 3 * width**2 * len(paths)
    bytes_resized = 3 * image_size**2 * len(paths)
    is_small_square = width == height and width <= image_size
    if is_small_square and bytes_as_they_are <= most:
        with suppress(DataError):  # one of another size; a damaged one is refused below
            return read_in_parallel(paths, width, native=True)
    if bytes_resized <= most:
        return read_in_parallel(paths, image_size)
    return LazyImages(paths, image_size)
