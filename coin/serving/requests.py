"""Requests of the Open Inference Protocol and their images, read within limits; see `coin.serving.protocol`."""

import base64
import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from coin.data.image_io import DAMAGE, to_square
from coin.data.transform import tokenize
from coin.errors import DataError, first_line
from coin.serving.limits import InputLimits
from coin.serving.protocol import Description


class TooLargeError(DataError):
    """The input exceeds the limits."""


class EncodingError(DataError):
    """The content encoding of a body is not supported."""


class InferInput(BaseModel):
    """A request's input."""

    name: str
    shape: list[int] = Field(min_length=1)
    datatype: Literal["UINT8", "BYTES"]
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class InferOutput(BaseModel):
    """A requested output."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(BaseModel):
    """A request."""

    id: str | None = None
    inputs: list[InferInput] = Field(min_length=1, max_length=1)
    outputs: list[InferOutput] | None = None
    parameters: dict[str, Any] = {}


@dataclass(frozen=True)
class Parsed:
    """A request whose inputs have not been read yet.

    Its `outputs` say whether each uses the binary extension; `bytes` is the length of its uncompressed body, `pixels`
    the total of its image files. `read` returns its inputs in the servers' format, or raises `DataError`.
    """

    request: InferRequest
    outputs: Mapping[str, bool]
    bytes: int
    pixels: int
    read: Callable[[], Tensor]


def parse(
    body: bytes, encoding: str, header: int | None, model: str, about: Description, limits: InputLimits
) -> Parsed:
    """Parse a request for a model and check all but the inputs' values; raises `DataError` if it is invalid.

    The body is JSON, compressed by ``gzip``, ``deflate`` or not (``identity``). In the binary extension the input's
    bytes follow the JSON, whose length is in the header.
    """
    body = _unpacked(body, encoding, limits.bytes)
    if header is not None and header > len(body):
        raise DataError(f"found a body of {len(body)} bytes, expected JSON of {header} as its header says")
    text, raw = body[:header], b"" if header is None else body[header:]
    if (values := text.count(b",") + text.count(b"[")) > limits.values:
        raise TooLargeError(
            f"found some {values} values in JSON, expected at most {limits.values}; send them in the binary extension"
        )
    try:
        request = InferRequest.model_validate_json(text)
    except ValidationError as error:
        where, why = ".".join(map(str, (first := error.errors()[0])["loc"])) or "the body", first["msg"]
        raise DataError(f"found an inference request that is wrong at {where} ({why})") from error
    outputs, given = _asked(request, model, about), request.inputs[0]
    if given.name != about.reads:
        raise DataError(f"found an input '{given.name}', expected '{about.reads}'")
    if given.data is None and not raw:
        raise DataError("found an input without data, expected data, or bytes after the JSON")
    if raw and given.data is not None:
        raise DataError("found an input with data and bytes after the JSON, expected the one or the other")
    size = given.parameters.get("binary_data_size", len(raw))
    if raw and not isinstance(size, int):
        raise DataError(f"found {repr(size)[:40]} as binary_data_size, expected a number")
    if raw and size != len(raw):
        raise DataError(f"found {len(raw)} bytes after the JSON, expected {size} as binary_data_size says")
    made = partial(Parsed, request, outputs, len(body))
    if given.datatype == "UINT8":
        if about.reads != "images":
            raise DataError("found an input of UINT8, expected texts as BYTES")
        pixels = raw if given.data is None else given.data
        return made(0, partial(read_array, pixels, given.shape, about.image_size, limits))
    items = _split(raw, limits.samples) if given.data is None else given.data
    if not given.shape[0] == math.prod(given.shape) == len(items):
        raise DataError(f"found {len(items)} values for an input of shape {given.shape}, expected one a row")
    check_samples(len(items), limits)
    if about.reads == "texts":
        return made(0, partial(tokenize, [_text(item) for item in items], about.image_size, about.tokenizer))
    images = [open_file(_file(item), limits) for item in items]
    return made(sum(math.prod(image.size) for image in images), partial(to_squares, images, about.image_size))


def _unpacked(body: bytes, encoding: str, most: int) -> bytes:
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise EncodingError(f"found a body packed by {encoding[:40]}, expected gzip, deflate or none; send it unpacked")
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | (16 if encoding == "gzip" else 0))
    try:
        unpacked = unpacker.decompress(body, most + 1)
    except zlib.error as error:
        raise DataError(f"found a body that is not packed by {encoding} ({error}), expected {encoding}") from error
    if len(unpacked) > most:
        raise TooLargeError(f"found a body of more than {most} bytes, unpacked; send fewer or smaller inputs")
    if not unpacker.eof:
        raise DataError(f"found a body that ends before its {encoding} does, expected all of it")
    return unpacked


def _asked(request: InferRequest, model: str, about: Description) -> dict[str, bool]:
    """Return the requested outputs, and whether each is binary."""
    known = [output["name"] for task in about.tasks(model) for output in about.outputs(model, task)]
    default = bool(request.parameters.get("binary_data_output", False))
    if not request.outputs:
        return dict.fromkeys(known, default)
    asked = {output.name: bool(output.parameters.get("binary_data", default)) for output in request.outputs}
    if unknown := [name for name in asked if name not in known]:
        raise DataError(f"found output '{unknown[0]}', expected some of {', '.join(known)}")
    if any(output.parameters.get("classification") for output in request.outputs):
        raise DataError("found the parameter classification, which is not supported; ask for the probabilities")
    return asked


def _split(raw: bytes, most: int) -> list[bytes]:
    """Split a binary BYTES tensor into its values, each preceded by its length in four bytes; stop after `most` + 1."""
    found: list[bytes] = []
    place = 0
    while place < len(raw) and len(found) <= most:
        (length,) = struct.unpack_from("<I", raw, place) if place + 4 <= len(raw) else (len(raw),)
        if place + 4 + length > len(raw):
            raise DataError("found a BYTES input that ends before its last value does")
        found.append(raw[place + 4 : place + 4 + length])
        place += 4 + length
    return found


def _file(item: Any) -> bytes:
    try:
        return item if isinstance(item, bytes) else base64.b64decode(item, validate=True)
    except (TypeError, ValueError) as error:
        raise DataError("found a value that is not base64, expected a PNG or JPEG file in base64") from error


def _text(item: Any) -> str:
    try:
        return item.decode() if isinstance(item, bytes) else str(item)
    except UnicodeDecodeError as error:
        raise DataError("found bytes that are no UTF-8, expected a text") from error


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
