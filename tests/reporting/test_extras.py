"""Example images and promises read back, and damaged files are one clear line."""

import contextlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coin.errors import ConfigurationError, FileError
from coin.reporting.extras import (
    EXAMPLES_NPZ,
    PROMISE_COLUMNS,
    PROMISE_CSV,
    Examples,
    read_examples,
    read_promises,
    write_examples,
    write_promises,
)

IMAGES = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3)
ONE = np.array([0, 1])


def test_examples_read_back_and_none_are_left_of_an_earlier_run(tmp_path: Path):
    assert read_examples(tmp_path) is None
    written = Examples(IMAGES, ONE, np.array([0, 2]), {"ü||ridge": np.array([1, 1])}, ("a", "ß"), ("t", "ü"))
    write_examples(tmp_path, written)
    read = read_examples(tmp_path)
    assert read is not None
    np.testing.assert_array_equal(read.images, IMAGES)
    assert {name: answers.tolist() for name, answers in read.decoded.items()} == {"ü||ridge": [1, 1]}
    assert (read.label.tolist(), read.names, read.by_task()) == ([0, 2], ("a", "ß"), {"t": [0], "ü": [1]})
    assert [read.name_of(i) for i in (0, 1, 2, -1)] == ["a", "ß", "2", "-1"]
    write_examples(tmp_path, None)
    assert read_examples(tmp_path) is None


def test_wrong_shapes_and_types_are_refused():
    for changes in (
        {"images": np.zeros((2, 3, 3, 1), np.uint8)}, {"images": IMAGES.astype(float)}, {"task": ("a",)},
        {"decoded": {"m||d": np.array([0])}}, {"label": np.array(["x", "y"])},
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match=r"expected \[n, H, W, 3\] of uint8, and n whole numbers"):
            Examples(**{"images": IMAGES, "expert": ONE, "label": ONE, **changes})


def test_damaged_examples_are_one_clear_line_wherever_they_are_damaged(tmp_path: Path):
    path = tmp_path / EXAMPLES_NPZ
    for content in (b"nothing", b""):
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"examples\.npz"):
            read_examples(tmp_path)
    np.savez(path, images=IMAGES)
    with pytest.raises(FileError, match="holds no example images"):
        read_examples(tmp_path)
    answers = np.arange(4000)
    write_examples(tmp_path, Examples(np.zeros((4000, 2, 2, 3), np.uint8), answers, answers, {"m||d": answers}))
    whole = bytearray(path.read_bytes())
    for start in range(60, 2000, 97):
        damaged = whole.copy()
        damaged[start : start + 8] = b"\xff" * 8
        path.write_bytes(damaged)
        with contextlib.suppress(FileError):
            read_examples(tmp_path)


def test_promises_read_back_exactly_and_none_are_left_of_an_earlier_run(tmp_path: Path) -> None:
    assert read_promises(tmp_path) is None
    key = ["x", 0, "coin", "auto:keep", "linear", "0", "a", "a", 200]
    lines = [[*key, 0.02, 0.95, 400, 149, 0.1 + 0.2, 1 / 3, 0.5, np.nan], [*key, 0.02, 0.95, 9, 149, np.nan, 0, 0, 0]]
    promises = pd.DataFrame(lines, columns=list(PROMISE_COLUMNS))
    write_promises(tmp_path, promises)
    read = read_promises(tmp_path)
    assert read is not None
    pd.testing.assert_frame_equal(read, promises, check_exact=True, check_dtype=False)
    (tmp_path / PROMISE_CSV).write_text((tmp_path / PROMISE_CSV).read_text().replace("0.95", "most"))
    with pytest.raises(FileError, match=r"promise\.csv' has no number"):
        read_promises(tmp_path)
    write_promises(tmp_path, promises[:0])
    assert read_promises(tmp_path) is None
