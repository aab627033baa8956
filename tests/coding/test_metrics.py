"""Metrics of decoding, counted by hand."""

import math

import numpy as np
import pytest
import torch

from coin.coding.metrics import DecodingAccuracy, Residual
from coin.errors import DataError

NAN = math.nan
OF_CLASS = torch.cat(
    [torch.eye(3), torch.full((1, 3), NAN)]
)  # logits; the fourth row's are no class's
NAMES = ("expert_accuracy", "decoded_accuracy", "nda", "agreement", "coverage", "found")

# By batches the decoded classes, the expert's, the labels, whether the answer is accepted; then the six numbers.
FOUR = ([0, 2, 2, 1], [0, 1, 0, 1], [0, 1, 2, 0])
COUNTED = {
    "some are right": ([(*FOUR, None)], (0.5, 0.5, 1.0, 0.5, 0.0, NAN)),
    "of accepted ones": ([(*FOUR, [1, 1, 0, 1])], (0.5, 0.5, 1.0, 0.5, 0.75, 1 / 3)),
    # By batches the ratios are 0/1 and 3/2, with mean 0.75.
    "a ratio of totals": (
        [([1], [0], [0], None), ([0, 0, 0], [0, 0, 1], [0, 0, 0], None)],
        (0.75, 0.75, 1.0, 0.5, 0.0, NAN),
    ),
    "an expert never right": ([([0], [1], [0], None)], (0.0, 1.0, NAN, 0.0, 0.0, NAN)),
    "NaN is wrong": ([([3, 0], [0, 0], [0, 0], [1, 1])], (1.0, 0.5, 0.5, 0.5, 1.0, 0.5)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_numbers_by_hand(name):
    batches, expected = COUNTED[name]
    metric = DecodingAccuracy()
    for decoded, expert, labels, accepted in batches:
        accepted = None if accepted is None else torch.tensor(accepted, dtype=torch.bool)
        metric.update(OF_CLASS[decoded], OF_CLASS[expert], torch.tensor(labels), accepted)
    found = metric.compute()
    np.testing.assert_array_equal([float(found[name]) for name in NAMES], expected)


def test_classes_that_the_task_does_not_have_are_not_read():
    metric = DecodingAccuracy(num_classes=2)
    expert = torch.tensor([[1.0, 0.0, 9.0], [0.0, 1.0, 9.0]])
    metric.update(expert.flip(0), expert, torch.tensor([0, 1]))
    found = metric.compute()
    assert (found["expert_accuracy"], found["decoded_accuracy"]) == (1, 0)
    for label in (-1, 2):
        with pytest.raises(DataError, match=rf"found labels \[{label}\], expected 0 to 1"):
            metric.update(expert[:1], expert[:1], torch.tensor([label]))


def test_counts_are_whole_numbers_beyond_those_of_float32():
    metric = DecodingAccuracy()
    metric.counts += 2**25
    metric.update(torch.eye(3), torch.eye(3), torch.arange(3))
    counts = metric.counts - 2**25
    assert counts.tolist() == [3, 3, 3, 0, 0, 3]


def test_residual_is_the_ratio_of_norms_over_all_samples():
    coded, target = torch.randn(2, 23, 4, generator=torch.Generator().manual_seed(0))
    metric = Residual()
    for batch in (slice(0, 5), slice(5, 6), slice(6, 23)):
        metric.update(coded[batch], target[batch])
    wanted = target.double().numpy()
    error = coded.double().numpy() - wanted
    expected = np.linalg.norm(error) / np.linalg.norm(wanted)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_the_residual_of_nothing_is_no_number():
    metric = Residual()
    assert math.isnan(metric.compute())
    metric.update(torch.ones(2, 3), torch.zeros(2, 3))
    assert math.isnan(metric.compute())


def test_shapes_are_checked():
    three = torch.zeros(2, 3)
    with pytest.raises(DataError, match=r"expected \[B, C\], \[B, C\] and \[B\]"):
        DecodingAccuracy().update(three, three, torch.zeros(3))
    with pytest.raises(DataError, match="expected the same"):
        Residual().update(three, torch.zeros(2, 4))
