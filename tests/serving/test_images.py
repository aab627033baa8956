"""Images over the network: what is taken, and what is refused before it costs anything."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from coin.data.decoding import read_files
from coin.errors import ConfigurationError, DataError
from coin.serving.images import ARRAY, InputLimits, TooLargeError, read_images

LIMITS = InputLimits(bytes=200_000, pixels=64 * 64, images=3)


def encoded(array: np.ndarray, format: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(buffer, format)
    return buffer.getvalue()


def saved(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_png_is_exact_in_colour_and_grey() -> None:
    colour, grey = noise(20, 20, 3), noise(20, 20)
    found = read_images(encoded(colour), "image/png", 32, LIMITS)
    assert torch.equal(found, torch.from_numpy(colour).permute(2, 0, 1)[None])
    found = read_images(encoded(grey), "", 32, LIMITS)
    assert torch.equal(found, torch.from_numpy(grey).expand(1, 3, 20, 20))


@pytest.mark.parametrize("shape", [(20, 20, 3), (60, 60, 3), (30, 50, 3)])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_files_are_read_as_a_tasks_own_folder_is(shape: tuple[int, ...], format: str, tmp_path) -> None:
    body = encoded(noise(*shape), format)
    path = tmp_path / "image"
    path.write_bytes(body)
    assert torch.equal(read_images(body, "image/any", 32, LIMITS), read_files([str(path)], 32))


@pytest.mark.parametrize("shape", [(9, 7), (1, 9, 7), (3, 9, 7), (2, 3, 9, 7)])
def test_arrays(shape: tuple[int, ...]) -> None:
    array = noise(*shape)
    for each in (array, np.asfortranarray(array)):
        found = read_images(saved(each), f"{ARRAY}; charset=binary", 32, LIMITS)
        assert torch.equal(found, torch.from_numpy(array)[(None,) * (4 - array.ndim)])


BAD = {
    "nothing": (b"", "image/png", "neither PNG nor JPEG"),
    "text": (b"hello", "image/png", "neither PNG nor JPEG"),
    "cut off": (encoded(noise(20, 20, 3))[:200], "image/png", "no readable image"),
    "another format": (encoded(noise(20, 20, 3), "BMP"), "image/bmp", "expected PNG, JPEG"),
    "16 bits": (encoded(noise(20, 20).astype(np.uint16) * 200), "image/png", "8 bits"),
    "no array": (b"hello", ARRAY, "npy"),
    "an archive": (b"PK\x03\x04" + bytes(40), ARRAY, "npy"),
    "floats": (saved(np.zeros((9, 9), np.float32)), ARRAY, "float32"),
    "objects": (saved(np.array([{}], dtype=object), allow_pickle=True), ARRAY, "object"),
    "five dimensions": (saved(np.zeros((1, 1, 1, 2, 2), np.uint8)), ARRAY, "[1, 1, 1, 2, 2]"),
    "empty": (saved(np.zeros((0, 3, 2, 2), np.uint8)), ARRAY, "[0, 3, 2, 2]"),
    "channels last": (saved(noise(9, 9, 3)), ARRAY, "[1, 9, 9, 3]"),
    "less than it says": (saved(noise(9, 9))[:-1], ARRAY, "found 80 bytes for an array [9, 9], expected 81"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_image(case: str) -> None:
    body, kind, message = BAD[case]
    with pytest.raises(DataError, match=message.replace("[", r"\[")) as caught:
        read_images(body, kind, 32, LIMITS)
    assert not isinstance(caught.value, TooLargeError)
    assert "\n" not in str(caught.value)


def test_what_is_too_large_is_refused_unread() -> None:
    promise = saved(noise(2, 2)).replace(b"(2, 2), }" + b" " * 12, b"(999999999999, 2), }   "[:21])
    for body, kind, message in (
        (bytes(200_001), "image/png", "200001 bytes"),
        (encoded(np.zeros((80, 80), np.uint8)), "image/png", "6400 pixels"),
        (saved(np.zeros((80, 80), np.uint8)), ARRAY, "6400 pixels"),
        (saved(np.zeros((4, 1, 2, 2), np.uint8)), ARRAY, "4 images"),
    ):
        with pytest.raises(TooLargeError, match=message):
            read_images(body, kind, 32, LIMITS)
    with pytest.raises(DataError, match="found 4 bytes for an array"):
        read_images(promise, ARRAY, 32, LIMITS)
    with pytest.raises(ConfigurationError, match="pixels=0"):
        InputLimits(pixels=0)
