import contextlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coin.errors import ConfigurationError, FileError
from coin.reporting.extras import (
    EXAMPLES_NPZ,
    RISK_COLUMNS,
    Examples,
    read_examples,
    read_layers,
    read_risk,
    write_examples,
    write_layers,
    write_risk,
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


@pytest.mark.parametrize(
    "changes",
    [
        {"images": np.zeros((2, 3, 3, 1), np.uint8)},
        {"images": IMAGES.astype(float)},
        {"decoded": {"m||d": np.array([0])}},
        {"label": np.array(["x", "y"])},
        {"task": ("a",)},
    ],
)
def test_wrong_shapes_and_types_are_refused(changes: dict):
    with pytest.raises(ConfigurationError, match=r"expected \[n, H, W, 3\] of uint8, and n whole numbers"):
        Examples(**{"images": IMAGES, "expert": ONE, "label": ONE, **changes})


def test_layers_read_back_with_gaps(tmp_path: Path):
    assert read_layers(tmp_path) is None
    columns = {"method": ["average", "coin"], "batchnorm": ["average", ""], "code_row": ["0", "1"], "layer": ["0", "0"]}
    layers = pd.DataFrame({**columns, "fisher_share": [np.nan, 0.1 + 0.2], "distance": [0.5, 1]})
    write_layers(tmp_path, layers)
    read = read_layers(tmp_path)
    assert read is not None
    pd.testing.assert_frame_equal(read, layers.astype({"distance": float}), check_exact=True, check_dtype=False)


def test_damaged_files_are_one_clear_line(tmp_path: Path):
    head = "method,batchnorm,code_row,layer,fisher_share,distance"
    (tmp_path / "layers.csv").write_text(f"{head}\na,,0,b,x,1\n", encoding="utf-8")
    with pytest.raises(FileError, match="damaged in column 'fisher_share'"):
        read_layers(tmp_path)
    for content in (b"nothing", b""):
        (tmp_path / EXAMPLES_NPZ).write_bytes(content)
        with pytest.raises(FileError, match=r"examples\.npz"):
            read_examples(tmp_path)
    np.savez(tmp_path / EXAMPLES_NPZ, images=IMAGES)
    with pytest.raises(FileError, match="holds no example images"):
        read_examples(tmp_path)


def test_an_archive_damaged_anywhere_is_an_error_of_ours(tmp_path: Path) -> None:
    answers = np.arange(4000)
    write_examples(tmp_path, Examples(np.zeros((4000, 2, 2, 3), np.uint8), answers, answers, {"m||d": answers}))
    path = tmp_path / EXAMPLES_NPZ
    whole = bytearray(path.read_bytes())
    for start in range(60, 2000, 97):
        damaged = whole.copy()
        damaged[start : start + 8] = b"\xff" * 8
        path.write_bytes(damaged)
        with contextlib.suppress(FileError):
            read_examples(tmp_path)


def test_risks_read_back_exactly_and_a_damaged_file_is_one_clear_line(tmp_path: Path) -> None:
    assert read_risk(tmp_path) is None
    key = ["x", 0, "coin", "auto:keep", "linear", "0", "a", "a", 200]
    lines = [[*key, "coverage", 0.95, 19, 0.1 + 0.2, 1 / 3, 0.5, 1.0], [*key, "calibration", 0.0, 20, 0.0, 1, 1, 1]]
    risk = pd.DataFrame(lines, columns=list(RISK_COLUMNS))
    write_risk(tmp_path, risk)
    read = read_risk(tmp_path)
    assert read is not None
    pd.testing.assert_frame_equal(read, risk, check_exact=True, check_dtype=False)
    (tmp_path / "risk.csv").write_text((tmp_path / "risk.csv").read_text().replace("0.95", "most"))
    with pytest.raises(FileError, match="damaged in column 'at'"):
        read_risk(tmp_path)
