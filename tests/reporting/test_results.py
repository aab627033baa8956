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

ROW = Row(
    "x", 3, "coin", "average", "linear", "0", "a", "a", 200, 0.1 + 0.2, 1 / 3, (1 / 3) / (0.1 + 0.2), 0.5, 1e-17, 1.25,
    8400.0, 0.5, 1200.0,
)  # fmt: skip


def test_columns_are_the_design_s():
    design = "experiment seed method batchnorm decoder code_row erased task samples_per_task expert_accuracy "
    design += "decoded_accuracy nda agreement residual merge_seconds merge_passes decoder_seconds decoder_passes "
    assert tuple(f"{design}memory_mib resident_mib forwards losses chance".split()) == COLUMNS


def test_rows_read_back_exactly(tmp_path: Path):
    none = replace(ROW, method="none", batchnorm="", code_row="", residual=math.nan, nda=math.nan)
    rows = [ROW, none, replace(ROW, task="NA", erased="NA+null", method="nan", code_row="0+1")]
    write_results(tmp_path, rows, {})
    frame = read_results(tmp_path)
    pd.testing.assert_frame_equal(
        frame, pd.DataFrame(map(asdict, rows)), check_exact=True, check_dtype=False
    )
    assert frame["seed"].dtype.kind == "i"


def test_json_is_strict_and_holds_configuration_and_versions(tmp_path: Path):
    configuration = {
        "root": Path("data"),
        "lr": math.nan,
        "code": np.array([[0.5, np.inf]]),
        3: (True, np.int64(4)),
    }
    methods = [
        {"label": "coin", "batchnorm": "auto:average", "row": 0, "chosen": {"held_out": math.inf}}
    ]
    write_results(tmp_path, [replace(ROW, residual=math.nan)], configuration, methods=methods)
    document = json.loads(
        (tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=pytest.fail
    )
    assert document["rows"][0]["residual"] is None
    assert document["rows"][0]["nda"] == ROW.nda
    assert document["methods"] == [{**methods[0], "chosen": {"held_out": None}}]
    assert document["configuration"] == {
        "root": "data",
        "lr": None,
        "code": [[0.5, None]],
        "3": [True, 4],
    }
    assert "torch" in document["versions"]
    assert read_document(tmp_path) == document


def test_confusions_read_back_and_only_finished_files_are_left(tmp_path: Path):
    write_results(tmp_path, [ROW], {})
    counts = {
        confusion_key(ROW): np.array([[5, 1], [2, 7]]),
        "file|a/b|x+y|file": np.eye(3, dtype=np.int64),
    }
    write_results(tmp_path, [ROW], {}, counts)
    with np.load(tmp_path / "confusion.npz") as found:
        assert found.keys() == counts.keys()
        for key in counts:
            np.testing.assert_array_equal(found[key], counts[key])
    assert confusion_key(ROW) == "coin|linear|a|a"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "confusion.npz",
        "results.csv",
        "results.json",
    ]


def test_missing_or_damaged_files_are_one_clear_line(tmp_path: Path):
    for read, advice in (
        (read_results, "make it with `coin run`"),
        (read_document, "make it again"),
    ):
        with pytest.raises(FileError, match=advice):
            read(tmp_path)
    for content in (b"", b"\xff\xfe\x00bad", b"seed\n1"):
        (tmp_path / "results.csv").write_bytes(content)
        with pytest.raises(FileError, match=r"results\.csv[^\n]*`coin run`$"):
            read_results(tmp_path)
    write_results(tmp_path, [ROW], {})
    text = (tmp_path / "results.csv").read_text(encoding="utf-8")
    for old, new, said in (
        ("merge_seconds", "calibration_seconds", "not found: .'merge_seconds'"), (",200,", ",two,", "two"),
        ("8400.0", "many", "many"),
    ):  # fmt: skip
        (tmp_path / "results.csv").write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(FileError, match=said):
            read_results(tmp_path)


def test_promises_are_written_exactly_and_none_are_left_of_an_earlier_run(tmp_path: Path) -> None:
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
