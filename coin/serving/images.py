"""A query's images: files or arrays of pixels, bounded before they are decoded."""

import io
import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from coin.data.decoding import DAMAGE, to_square
from coin.errors import DataError, first_line


class TooLargeError(DataError):
    """What came is larger than the limits allow."""


def read_files(files: Sequence[bytes], image_size: int, most_pixels: int) -> Tensor:
    """Read image files, as a task's own images are read.

    Args:
        files: PNG or JPEG.
        image_size: S, the side of the networks' inputs: larger images and those that are no squares are brought to it.
        most_pixels: Of one image.

    Returns:
        uint8 ``[B, 3, S, S]``, or of the one smaller size that all have.

    Raises:
        TooLargeError: There are too many pixels.
        DataError: One is no such image, or they are of different sizes.
    """
    images = [_read_file(file, image_size, most_pixels) for file in files]
    if len({image.shape for image in images}) > 1:
        raise DataError(f"found small images of different sizes, expected one; resize them to {image_size} pixels")
    return torch.stack(images)


def _read_file(file: bytes, image_size: int, most_pixels: int) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit on pixels is ours
            image = Image.open(io.BytesIO(file), formats=("PNG", "JPEG"))
        with image:
            width, height = image.size
            _check_pixels(width * height, most_pixels)
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"found pixels of type {image.mode}, expected 8 bits a channel; convert the image first"
                )
            side = width if width == height <= image_size else image_size
            return torch.from_numpy(to_square(image, side).copy())
    except DataError:
        raise
    except DAMAGE as error:
        why = "neither PNG nor JPEG" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise DataError(f"found no readable image ({why}), expected PNG or JPEG") from error


def read_array(values: bytes | Sequence[object], shape: Sequence[int], most_pixels: int) -> Tensor:
    """Read an array of pixels.

    Args:
        values: The pixels, as raw bytes or as numbers from 0 to 255, nested or not.
        shape: ``[B, 1 or 3, H, W]``.
        most_pixels: Of one image.

    Returns:
        uint8 of this shape.

    Raises:
        TooLargeError: There are too many pixels.
        DataError: The values are no such array.
    """
    if len(shape) != 4 or shape[1] not in (1, 3) or min(shape) < 1:
        raise DataError(f"found an array of shape {list(shape)}, expected [B, 1 or 3, H, W]")
    _check_pixels(shape[2] * shape[3], most_pixels)
    try:
        found = np.frombuffer(values, np.uint8) if isinstance(values, bytes) else np.asarray(values)
    except ValueError as error:
        raise DataError(f"found data that is no array ({first_line(error)}), expected whole numbers") from error
    if found.size != math.prod(shape):
        raise DataError(f"found {found.size} values for an array {list(shape)}, expected {math.prod(shape)}")
    if found.dtype.kind not in "iu" or found.min() < 0 or found.max() > 255:
        raise DataError("found values that are no pixels, expected whole numbers from 0 to 255")
    return torch.from_numpy(found.astype(np.uint8).reshape(shape))


def _check_pixels(pixels: int, most: int) -> None:
    if pixels > most:
        raise TooLargeError(f"found an image of {pixels} pixels, expected at most {most}; send a smaller one")
