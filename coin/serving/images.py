"""A query's images: files or pixel arrays, checked for size before they are decoded."""

import io
import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from coin.data.image_io import DAMAGE, to_square
from coin.errors import DataError, first_line
from coin.serving.limits import InputLimits


class TooLargeError(DataError):
    """The input exceeds the limits."""


def check_samples(count: int, limits: InputLimits) -> None:
    """Raise `DataError` if a query is empty, `TooLargeError` if it has too many inputs."""
    if not 1 <= count <= limits.samples:
        kind = TooLargeError if count else DataError
        raise kind(f"found {count} images or texts, expected 1 to {limits.samples} at a time")


def open_file(file: bytes, limits: InputLimits) -> Image.Image:
    """Open a PNG or JPEG image without decoding it; raises `DataError` if it is invalid, too large or too thin."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit on pixels is ours
            image = Image.open(io.BytesIO(file), formats=("PNG", "JPEG"))
    except DAMAGE as error:
        raise _unreadable(error) from error
    _check_size(*image.size, limits)
    if image.mode.startswith(("I", "F")):
        raise DataError(f"found pixels of type {image.mode}, expected 8 bits a channel; convert the image first")
    return image


def to_squares(images: Sequence[Image.Image], image_size: int) -> Tensor:
    """Return images prepared like a task's own, once for all servers: uint8 ``[B, 3, S, S]``, S the input size.

    Square images of one smaller size keep that size; others are centre-cropped. Raises `DataError` if one is damaged,
    or small ones differ in size.
    """
    try:
        sides = [image.width if image.width == image.height <= image_size else image_size for image in images]
        squares = [torch.tensor(to_square(image, side)) for image, side in zip(images, sides, strict=True)]
    except DAMAGE as error:
        raise _unreadable(error) from error
    if len({square.shape for square in squares}) > 1:
        raise DataError(f"found small images of different sizes, expected one; resize them to {image_size} pixels")
    return torch.stack(squares)


def _unreadable(error: Exception) -> DataError:
    why = "neither PNG nor JPEG" if isinstance(error, UnidentifiedImageError) else first_line(error)
    return DataError(f"found no readable image ({why}), expected PNG or JPEG")


def read_array(values: bytes | Sequence[object], shape: Sequence[int], image_size: int, limits: InputLimits) -> Tensor:
    """Return pixels as uint8 in their shape, or ``[B, 3, S, S]`` by `to_squares`; DataError if they are invalid.

    The values are raw bytes or numbers from 0 to 255, nested or not, of shape ``[B, 1 or 3, H, W]``; S is `image_size`.
    """
    if len(shape) != 4 or shape[1] not in (1, 3) or min(shape) < 1:
        raise DataError(f"found an array of shape {list(shape)}, expected [B, 1 or 3, H, W]")
    check_samples(shape[0], limits)
    _check_size(shape[3], shape[2], limits)
    try:
        found = np.frombuffer(values, np.uint8) if isinstance(values, bytes) else np.asarray(values)
    except ValueError as error:
        raise DataError(f"found data that is no array ({first_line(error)}), expected whole numbers") from error
    if found.size != math.prod(shape):
        raise DataError(f"found {found.size} values for an array {list(shape)}, expected {math.prod(shape)}")
    if found.dtype.kind not in "iu" or found.min() < 0 or found.max() > 255:
        raise DataError("found values that are no pixels, expected whole numbers from 0 to 255")
    array = found.astype(np.uint8).reshape(shape)
    if shape[2] == shape[3] <= image_size:
        return torch.from_numpy(array)
    planes = array[:, 0] if shape[1] == 1 else array.transpose(0, 2, 3, 1)
    return to_squares([Image.fromarray(each) for each in planes], image_size)


def _check_size(width: int, height: int, limits: InputLimits) -> None:
    if width * height > limits.pixels:
        raise TooLargeError(
            f"found an image of {width * height} pixels, expected at most {limits.pixels}; send a smaller one"
        )
    if max(width, height) > limits.aspect * min(width, height):
        raise DataError(
            f"found an image of {width} × {height} pixels, expected sides of at most 1 : {limits.aspect:g}; cut it"
        )
