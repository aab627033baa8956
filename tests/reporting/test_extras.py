import contextlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coin.errors import ConfigurationError, FileError
from coin.reporting import Examples, read_examples, read_layers, write_examples, write_layers
from coin.reporting.extras import EXAMPLES_NPZ


def test_examples_read_back(tmp_path: Path):
    images = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3)
    written = Examples(
        images, np.array([0, 1]), np.array([1, 1]), np.array([0, 2]), ("a", "ß"), ("t", "ü"), (7, 3), "m", "d", "why"
    )
    write_examples(tmp_path, written)
    read = read_examples(tmp_path)
    assert read is not None
    np.testing.assert_array_equal(read.images, images)
    np.testing.assert_array_equal(read.decoded, written.decoded)
    assert read.names == ("a", "ß")
    assert (read.task, read.position, read.method, read.decoder, read.choice) == (("t", "ü"), (7, 3), "m", "d", "why")
    assert read.by_task() == {"t": [0], "ü": [1]}
    assert [read.name_of(i) for i in (0, 1, 2, -1)] == ["a", "ß", "2", "-1"]


def test_no_examples_leave_none_of_an_earlier_run(tmp_path: Path):
    none = np.zeros(0, np.int64)
    write_examples(tmp_path, Examples(np.zeros((0, 3, 3, 3), np.uint8), none, none, none))
    assert read_examples(tmp_path) is not None
    write_examples(tmp_path, None)
    assert read_examples(tmp_path) is None


def test_wrong_shapes_are_refused():
    answers = np.array([0])
    with pytest.raises(ConfigurationError, match=r"expected \[n, H, W, 3\]"):
        Examples(np.zeros((1, 3, 3, 1), np.uint8), answers, answers, answers)
    with pytest.raises(ConfigurationError, match="found decoded"):
        Examples(np.zeros((1, 3, 3, 3), np.uint8), answers, np.array([0, 1]), answers)
    with pytest.raises(ConfigurationError, match="found task of 2 images"):
        Examples(np.zeros((1, 3, 3, 3), np.uint8), answers, answers, answers, task=("a", "b"))


def test_layers_read_back_with_gaps(tmp_path: Path):
    layers = pd.DataFrame(
        {
            "method": ["average", "coin"],
            "batchnorm": ["average", ""],
            "code_row": ["0", "1"],
            "layer": ["0", "0"],
            "fisher_share": [np.nan, 0.1 + 0.2],
            "distance": [0.5, 1],
        }
    )
    write_layers(tmp_path, layers)
    read = read_layers(tmp_path)
    assert read is not None
    pd.testing.assert_frame_equal(read, layers.astype({"distance": float}), check_exact=True, check_dtype=False)
    with pytest.raises(ConfigurationError, match="no column 'distance'"):
        write_layers(tmp_path, layers.drop(columns="distance"))


def test_absent_is_none_and_damaged_is_an_error(tmp_path: Path):
    assert read_examples(tmp_path) is None
    assert read_layers(tmp_path) is None
    (tmp_path / "examples.npz").write_bytes(b"nothing")
    (tmp_path / "layers.csv").write_text(
        "method,batchnorm,code_row,layer,fisher_share,distance\na,,0,b,x,1\n", encoding="utf-8"
    )
    with pytest.raises(FileError, match=r"examples\.npz"):
        read_examples(tmp_path)
    with pytest.raises(FileError, match="damaged in column 'fisher_share'"):
        read_layers(tmp_path)


def test_positions_and_answers_are_whole_numbers(tmp_path: Path) -> None:
    """Text among them would go into a page as it stands."""
    images, zero = np.zeros((1, 2, 2, 3), np.uint8), np.array([0])
    for wrong in ({"position": ("<script>",)}, {"label": np.array(["x"])}):
        with pytest.raises(ConfigurationError, match="whole numbers"):
            Examples(**{"images": images, "expert": zero, "decoded": zero, "label": zero, **wrong})


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    answers = np.arange(4000)
    write_examples(tmp_path, Examples(np.zeros((4000, 2, 2, 3), np.uint8), answers, answers, answers))
    path = tmp_path / EXAMPLES_NPZ
    whole = bytearray(path.read_bytes())
    for start in range(60, 2000, 97):
        damaged = whole.copy()
        damaged[start : start + 8] = b"\xff" * 8
        path.write_bytes(damaged)
        with contextlib.suppress(FileError):
            read_examples(tmp_path)
