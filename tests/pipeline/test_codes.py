"""Several coded models of an experiment."""

import pytest

from coin.coding import convex
from coin.files.safetensors import load_provenance
from coin.reporting import read_results

pytestmark = pytest.mark.slow

METHODS = [
    {"class_path": "Average"},
    {"class_path": "Distillation", "init_args": {"steps": 5, "batch_size": 16, "lr": 1e-3}},
]
LOSSES = {("a", "a"), ("b", "b"), ("c", "c")}
LOSSES |= {("a+b", "a"), ("a+b", "b"), ("a+c", "a"), ("a+c", "c"), ("b+c", "b"), ("b+c", "c")}


def glyphs(classes):
    options = {"classes": classes, "train_per_class": 30, "test_per_class": 9}
    return {"class_path": "Glyphs", "init_args": options}


@pytest.mark.usefixtures("no_reports")
def test_two_coded_models_decode_every_loss_of_one_and_of_two_experts(run_small):
    tasks = {"a": glyphs("A-F"), "b": glyphs("G-L"), "c": glyphs("M-P")}
    expert = {"epochs": 1, "lr": 0.1, "batch_size": 32}
    seed = run_small(tasks=tasks, expert=expert, code=2, base=None, methods=METHODS)
    for method in ("average", "distillation"):
        for row in (0, 1):
            made = load_provenance(seed / f"coded/{method}.row-{row}.safetensors")
            assert (made["row"], made["code"]) == (row, convex(3, 2).matrix.tolist())
    frame = read_results(seed)
    coded = frame[frame["method"].isin(["average", "distillation"])]
    assert set(coded["code_row"]) == {"0+1"}
    by_decoder = coded.groupby(["method", "decoder"])
    assert len(by_decoder) == 2 * 3
    for _, rows in by_decoder:
        assert set(zip(rows["erased"], rows["task"], strict=True)) == LOSSES
