"""Several coded models of an experiment."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from coin.coding import convex
from coin.files.safetensors import load_provenance
from coin.reporting import read_results

pytestmark = pytest.mark.slow

METHODS = [
    {"class_path": "Average"},
    {"class_path": "Distillation", "init_args": {"steps": 5, "batch_size": 16, "lr": 1e-3}},
]
DECODERS = ["linear", "ridge", "feature_ridge"]


def glyphs(classes: str) -> dict[str, Any]:
    options = {"classes": classes, "train_per_class": 30, "test_per_class": 9}
    return {"class_path": "Glyphs", "init_args": options}


@pytest.mark.usefixtures("no_reports")
def test_two_coded_models_decode_every_loss_of_one_and_of_two_experts(
    run_small: Callable[..., Path],
) -> None:
    tasks = {"letters": glyphs("A-F"), "more": glyphs("G-L"), "others": glyphs("M-P")}
    expert = {"epochs": 1, "lr": 0.1, "batch_size": 32}
    folder = run_small(
        tasks=tasks, expert=expert, code=2, base=None, methods=METHODS, decoders=DECODERS
    )
    losses = set()
    for size in (1, 2):
        for lost in combinations(tasks, size):
            losses |= {("+".join(lost), task) for task in lost}
    frame = read_results(folder)
    for method in ("average", "distillation"):
        for row in (0, 1):
            made = load_provenance(folder / f"coded/{method}.row-{row}.safetensors")
            assert (made["row"], made["code"]) == (row, convex(3, 2).matrix.tolist())
        for decoder in DECODERS:
            rows = frame[(frame["method"] == method) & (frame["decoder"] == decoder)]
            assert set(zip(rows["erased"], rows["task"], strict=True)) == losses
            assert set(rows["code_row"]) == {"0+1"}
    oracle = frame[frame["method"] == "oracle"]
    assert len(oracle) == len(losses)
    assert (oracle[["nda", "agreement"]] == 1).all(axis=None)
