"""Results and promises read back exactly, and damaged files are one clear line."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coin.errors import FileError
from coin.reporting import read_results
from coin.reporting.results import (
    COLUMNS,
    PROMISE_COLUMNS,
    PROMISE_CSV,
    Row,
    confusion_key,
    read_document,
    write_promises,
    write_results,
)

# fmt: off
ROW = Row(
    "x", 3, "coin", "average", "linear", "0", "a", "a", 200,
    0.1 + 0.2, 1 / 3, (1 / 3) / (0.1 + 0.2), 0.5, 1e-17, 1.25, 8400.0, 0.5, 1200.0,
)
# fmt: on


def test_columns_are_the_design_s():
    design = "experiment seed method batchnorm decoder code_row erased task samples_per_task expert_accuracy "
    design += "decoded_accuracy nda agreement residual merge_seconds merge_passes decoder_seconds decoder_passes "
    assert tuple(f"{design}memory_mib resident_mib forwards losses chance".split()) == COLUMNS


def test_rows_read_back_exactly(tmp_path):
    none = replace(ROW, method="none", batchnorm="", code_row="", residual=math.nan, nda=math.nan)
    rows = [ROW, none, replace(ROW, task="NA", erased="NA+null", method="nan", code_row="0+1")]
    write_results(tmp_path, rows, {})
    found = read_results(tmp_path)
    expected = pd.DataFrame(map(asdict, rows))
    pd.testing.assert_frame_equal(found, expected, check_exact=True, check_dtype=False)
    assert found["seed"].dtype.kind == "i"


def test_json_is_strict_and_holds_configuration_and_versions(tmp_path):
    code = np.array([[0.5, np.inf]])
    configuration = {"root": Path("data"), "lr": math.nan, "code": code, 3: (True, np.int64(4))}
    method = {"label": "coin", "row": 0, "chosen": {"held_out": math.inf}}
    write_results(tmp_path, [replace(ROW, residual=math.nan)], configuration, methods=[method])
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    document = json.loads(text, parse_constant=pytest.fail)
    (stored,) = document["rows"]
    assert stored["residual"] is None
    assert stored["nda"] == ROW.nda
    assert document["methods"] == [{**method, "chosen": {"held_out": None}}]
    expected = {"root": "data", "lr": None, "code": [[0.5, None]], "3": [True, 4]}
    assert document["configuration"] == expected
    assert "torch" in document["versions"]
    assert read_document(tmp_path) == document


def test_confusions_read_back_and_only_finished_files_are_left(tmp_path):
    write_results(tmp_path, [ROW], {})
    counts = {
        confusion_key(ROW): np.array([[5, 1], [2, 7]]),
        "file|a/b|x+y|file": np.eye(3, dtype=np.int64),
    }
    write_results(tmp_path, [ROW], {}, counts)
    with np.load(tmp_path / "confusion.npz") as found:
        np.testing.assert_equal(dict(found), counts)
    assert confusion_key(ROW) == "coin|linear|a|a"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["confusion.npz", "results.csv", "results.json"]


@pytest.mark.parametrize(
    ("read", "advice"),
    [(read_results, "make it with `coin run`"), (read_document, "make it again")],
)
def test_missing_files_are_one_clear_line(read, advice, tmp_path):
    with pytest.raises(FileError, match=advice):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00bad", b"seed\n1"])
def test_damaged_files_are_one_clear_line(content, tmp_path):
    (tmp_path / "results.csv").write_bytes(content)
    with pytest.raises(FileError, match=r"results\.csv[^\n]*`coin run`$"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("merge_seconds", "calibration_seconds", "not found: .'merge_seconds'"),
        (",200,", ",two,", "two"),
        ("8400.0", "many", "many"),
    ],
)
def test_another_column_or_value_is_named(old, new, said, tmp_path):
    write_results(tmp_path, [ROW], {})
    file = tmp_path / "results.csv"
    file.write_text(file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(FileError, match=said):
        read_results(tmp_path)


def test_promises_are_written_exactly_and_none_are_left_of_an_earlier_run(tmp_path):
    key = ["x", 0, "coin", "auto:keep", "linear", "0", "a", "a", 200]
    lines = [
        [*key, 0.02, 0.95, 400, 149, 0.1 + 0.2, 1 / 3, 0.5, np.nan],
        [*key, 0.02, 0.95, 9, 149, np.nan, 0, 0, 0],
    ]
    promises = pd.DataFrame(lines, columns=list(PROMISE_COLUMNS))
    write_promises(tmp_path, promises)
    read = pd.read_csv(tmp_path / PROMISE_CSV, dtype={"code_row": str})
    pd.testing.assert_frame_equal(read, promises, check_exact=True, check_dtype=False)
    write_promises(tmp_path, promises[:0])
    assert not (tmp_path / PROMISE_CSV).exists()
