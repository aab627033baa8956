"""The code of an experiment: its option, and several coded models."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from coin.coding import convex
from coin.errors import ConfigurationError, DecodingError
from coin.files.safetensors import load_provenance
from coin.pipeline.steps.merge import read_code
from coin.reporting import read_results

pytestmark = pytest.mark.slow

METHODS = [
    {"class_path": "Average"},
    {"class_path": "Coin"},
    {"class_path": "Distillation", "init_args": {"steps": 5, "batch_size": 16, "lr": 1e-3}},
]


def glyphs(classes: str) -> dict[str, Any]:
    return {
        "class_path": "Glyphs",
        "init_args": {"classes": classes, "train_per_class": 30, "test_per_class": 9},
    }


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        (3, ConfigurationError, "found 3 coded models for 2 experts, expected 1 to 2"),
        (0, ConfigurationError, "found 0 coded models for 2 experts"),
        ([0.5, 0.5], ConfigurationError, r"the code has shape \[2\], expected R rows of N weights"),
        ([[0.2, 0.3, 0.5]], ConfigurationError, "found a code for 3 experts, expected 2"),
        ([[1.0, 0.0]], DecodingError, "the code cannot decode the loss of experts 1"),
    ],
)
def test_anything_else_is_refused(option: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_code(option, 2)


@pytest.mark.usefixtures("no_reports")
def test_two_coded_models_decode_every_loss_of_one_and_of_two_experts(
    run_small: Callable[..., Path],
) -> None:
    tasks = {"digits": {"class_path": "Digits", "init_args": {"max_train": 120, "max_test": 77}}}
    tasks |= {"letters": glyphs("A-F"), "bars": glyphs("G-L")}
    expert = {"epochs": 2, "lr": 0.1, "batch_size": 32}
    folder = run_small(tasks=tasks, expert=expert, code=2, base=None, methods=METHODS)
    erasures = {"+".join(lost) for size in (1, 2) for lost in combinations(tasks, size)}
    frame = read_results(folder)
    for method in ("average", "coin", "distillation"):
        files = sorted(path.name for path in (folder / "coded").glob(f"{method}.*"))
        assert files == [f"{method}.row-{row}.safetensors" for row in (0, 1)]
        for row, name in enumerate(files):
            made = load_provenance(folder / "coded" / name)
            assert (made["row"], made["code"]) == (row, convex(3, 2).matrix.tolist())
        for decoder in ("linear", "ridge", "feature_ridge"):
            rows = frame[(frame.method == method) & (frame.decoder == decoder)]
            found = {(row.erased, row.task) for row in rows.itertuples()}
            assert found == {(erased, task) for erased in erasures for task in erased.split("+")}
            assert set(rows.code_row) == {"0+1"}
    oracle = frame[frame.method == "oracle"]
    assert set(oracle.erased) == erasures
    assert len(oracle) == 3 + 2 * 3
    assert (oracle[["nda", "agreement"]] == 1).all(axis=None)


@pytest.mark.usefixtures("no_reports")
def test_swapped_tasks_are_measured_anew_each_with_the_weight_of_its_place(
    run_small: Callable[..., Path],
) -> None:
    tasks = {"one": glyphs("A-F"), "two": glyphs("G-L")}
    sections: dict[str, Any] = {
        "base": None,
        "expert": {"epochs": 1},
        "code": [[0.2, 0.8]],
        "decoders": ["linear"],
    }
    sections["methods"] = [{"class_path": "Average"}]
    swapped = dict(reversed(tasks.items()))
    run_small(tasks=tasks, **sections)
    again = read_results(run_small(tasks=swapped, **sections))
    run_small("--output=fresh", tasks=swapped, **sections)
    fresh = read_results(Path("fresh/tiny/seed-0"))
    columns = ["method", "task", "decoded_accuracy", "agreement", "residual"]
    pd.testing.assert_frame_equal(again[columns], fresh[columns], check_exact=True)
