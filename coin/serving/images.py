"""Images as they come over the network: PNG, JPEG or arrays, bounded before they are decoded."""

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.lib.format as npy
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from coin.data.decoding import DAMAGE, to_square
from coin.data.transform import check_images
from coin.errors import ConfigurationError, DataError, first_line

ARRAY = "application/x-npy"
"""The content type of arrays in NumPy's .npy format."""

_FORMATS = ("PNG", "JPEG")


class TooLargeError(DataError):
    """What came is larger than the limits allow."""


@dataclass(frozen=True)
class InputLimits:
    """What a query may bring.

    Args:
        bytes: The largest body.
        pixels: The most pixels of one image.
        images: The most images of an array.

    Raises:
        ConfigurationError: One of them is not positive.
    """

    bytes: int = 8 * 2**20
    pixels: int = 4096 * 4096
    images: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigurationError(f"found {name}={value}, expected at least 1")


def read_images(body: bytes, content_type: str, image_size: int, limits: InputLimits) -> Tensor:
    """Read the images of one query.

    Args:
        body: A PNG or JPEG file; or with the content type `ARRAY` a .npy file of uint8 ``[H, W]``,
            ``[1 or 3, H, W]`` or ``[B, 1 or 3, H, W]``.
        content_type: What it is said to be.
        image_size: The side of the networks' inputs: larger images and those that are no squares become squares of
            this side, as a task's own images do.
        limits: What is too large.

    Returns:
        uint8 ``[B, 3, S, S]``; ``[B, 1 or 3, H, W]`` as it is for an array.

    Raises:
        TooLargeError: There are too many bytes, pixels or images.
        DataError: The body is no such image or array.
    """
    if len(body) > limits.bytes:
        raise TooLargeError(f"found {len(body)} bytes, expected at most {limits.bytes}; send fewer or smaller images")
    if content_type.split(";")[0].strip().lower() == ARRAY:
        return _read_array(body, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit on pixels is ours
            image = Image.open(io.BytesIO(body), formats=_FORMATS)
        with image:
            width, height = image.size
            _check_pixels(width * height, limits)
            side = width if width == height <= image_size else image_size
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"found pixels of type {image.mode}, expected 8 bits a channel; convert the image first"
                )
            return torch.from_numpy(to_square(image, side).copy())[None]
    except DAMAGE as error:
        if isinstance(error, DataError):
            raise
        why = "neither PNG nor JPEG" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise DataError(f"found no readable image ({why}), expected PNG, JPEG or {ARRAY}") from error


def _read_array(body: bytes, limits: InputLimits) -> Tensor:
    # The header alone first: it may promise more than there is.
    stream = io.BytesIO(body)
    try:
        version = npy.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"version {version} of the format")
        shape, fortran, dtype = _HEADERS[version](stream)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"found no readable array ({error}), expected one in the .npy format") from error
    if dtype != np.uint8 or len(shape) not in (2, 3, 4) or 0 in shape:
        raise DataError(
            f"found an array {list(shape)} of {dtype}, expected uint8 [H, W], [1 or 3, H, W] or [B, 1 or 3, H, W]"
        )
    values = np.frombuffer(body, np.uint8, offset=stream.tell())
    if math.prod(shape) != len(values):
        raise DataError(f"found {len(values)} bytes for an array {list(shape)}, expected {math.prod(shape)}")
    array = values.reshape(shape, order="F" if fortran else "C")
    array = array[(None,) * (4 - array.ndim)]
    if len(array) > limits.images:
        raise TooLargeError(f"found {len(array)} images, expected at most {limits.images}; send fewer at a time")
    _check_pixels(array.shape[2] * array.shape[3], limits)
    images = torch.from_numpy(np.array(array, order="C"))
    check_images(images)
    return images


_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def _check_pixels(pixels: int, limits: InputLimits) -> None:
    if pixels > limits.pixels:
        raise TooLargeError(f"found an image of {pixels} pixels, expected at most {limits.pixels}; send a smaller one")
