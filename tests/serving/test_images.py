"""Images that come over the network: what is taken, and what is refused before it costs anything."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coin.data.image_io import read_files as read_from_disk
from coin.errors import DataError
from coin.serving.limits import InputLimits
from coin.serving.requests import TooLargeError, open_file, read_array, to_squares

LIMITS = InputLimits(pixels=64 * 64)


def read_files(files: list[bytes], image_size: int) -> torch.Tensor:
    return to_squares([open_file(file, LIMITS) for file in files], image_size)


def encoded(array: np.ndarray, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format)
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_png_is_exact_in_colour_and_grey() -> None:
    colour, grey = noise(20, 20, 3), noise(20, 20)
    found = read_files([encoded(colour), encoded(grey)], 32)
    assert torch.equal(found[0], torch.from_numpy(colour).permute(2, 0, 1))
    assert torch.equal(found[1], torch.from_numpy(grey).expand(3, 20, 20))


@pytest.mark.parametrize("shape", [(20, 20, 3), (60, 60, 3), (30, 50, 3)])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_files_are_read_as_a_tasks_own_folder_is(shape: tuple[int, ...], format: str, tmp_path: Path) -> None:
    body = encoded(noise(*shape), format)
    path = tmp_path / "image"
    path.write_bytes(body)
    assert torch.equal(read_files([body], 32), read_from_disk([str(path)], 32))


@pytest.mark.parametrize("shape", [(20, 20), (60, 60), (30, 50), (50, 30)])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_array_becomes_what_the_same_image_in_a_file_does(shape: tuple[int, int], channels: int) -> None:
    image = noise(*shape, channels)
    found = read_array(image.transpose(2, 0, 1).tobytes(), (1, channels, *shape), 32, LIMITS)
    assert torch.equal(found.expand(1, 3, -1, -1), read_files([encoded(image.squeeze())], 32))
    assert max(found.shape[2:]) <= 32  # whatever comes, servers get no more


def test_arrays_of_bytes_and_of_numbers_from_many_threads() -> None:
    array = noise(2, 3, 9, 9)
    given = [array.tobytes(), array.tolist(), array.flatten().tolist()] * 200
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda values: read_array(values, array.shape, 32, LIMITS), given))
    assert all(torch.equal(each, torch.from_numpy(array)) for each in found)


BAD_FILES = {
    "nothing": (b"", "neither PNG nor JPEG"),
    "text": (b"hello", "neither PNG nor JPEG"),
    "cut off": (encoded(noise(20, 20, 3))[:200], "no readable image"),
    "another format": (encoded(noise(20, 20, 3), "BMP"), "expected PNG or JPEG"),
    "16 bits": (encoded(noise(20, 20).astype(np.uint16) * 200), "8 bits"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_what_is_no_image(case: str) -> None:
    body, message = BAD_FILES[case]
    with pytest.raises(DataError, match=message) as caught:
        read_files([body], 32)
    assert not isinstance(caught.value, TooLargeError)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_together_or_is_too_large_is_refused() -> None:
    with pytest.raises(DataError, match="different sizes"):
        read_files([encoded(noise(20, 20)), encoded(noise(10, 10))], 32)
    with pytest.raises(TooLargeError, match="6400 pixels"):
        read_files([encoded(np.zeros((80, 80), np.uint8))], 32)
    with pytest.raises(TooLargeError, match="6400 pixels"):
        read_array(bytes(6400), (1, 1, 80, 80), 32, LIMITS)
    for width, height in ((41, 2), (2, 41)):
        with pytest.raises(DataError, match=f"{width} × {height} pixels, expected sides of at most 1 : 20"):
            read_array(bytes(82), (1, 1, height, width), 32, LIMITS)
        with pytest.raises(DataError, match="at most 1 : 20"):
            read_files([encoded(noise(height, width))], 32)
    with pytest.raises(DataError, match="found 4 values for an array"):
        read_array(bytes(4), (1, 1, 60, 60), 32, LIMITS)
    with pytest.raises(DataError, match="no pixels"):
        read_array([0.5] * 4, (1, 1, 2, 2), 32, LIMITS)
