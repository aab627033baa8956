"""Several coded models of an experiment."""

import pytest

from coin.coding import convex
from coin.files.safetensors import load_provenance
from coin.reporting import read_results

pytestmark = pytest.mark.slow

SECTIONS = """
tasks:
  a: {class_path: Glyphs, init_args: {classes: A-F, train_per_class: 30, test_per_class: 9}}
  b: {class_path: Glyphs, init_args: {classes: G-L, train_per_class: 30, test_per_class: 9}}
  c: {class_path: Glyphs, init_args: {classes: M-P, train_per_class: 30, test_per_class: 9}}
base: null
expert: {epochs: 1, lr: 0.1, batch_size: 32}
code: 2
methods:
  - {class_path: Average}
  - {class_path: Distillation, init_args: {steps: 5, batch_size: 16, lr: 1.0e-3}}
"""
LOSSES = {("a", "a"), ("b", "b"), ("c", "c")}
LOSSES |= {("a+b", "a"), ("a+b", "b"), ("a+c", "a"), ("a+c", "c"), ("b+c", "b"), ("b+c", "c")}


@pytest.mark.usefixtures("no_reports")
def test_two_coded_models_decode_every_loss_of_one_and_of_two_experts(run_small):
    seed = run_small(SECTIONS)
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
