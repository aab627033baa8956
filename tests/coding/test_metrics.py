"""Metrics of decoding, counted by hand."""

import math

import numpy as np
import pytest
import torch

from coin.coding.metrics import DecodingAccuracy, Residual
from coin.errors import DataError

NAN = [math.nan] * 3


def logits(*classes):
    """Return logits whose largest is that of these classes; of None all are NaN."""
    rows = [
        NAN if each is None else [float(each == place) for place in range(3)] for each in classes
    ]
    return torch.tensor(rows)


# By batches: the decoded classes, the expert's, the labels, whether the answer is accepted; then the six numbers.
COUNTED = {
    "some are right": (
        [([0, 2, 2, 1], [0, 1, 0, 1], [0, 1, 2, 0], None)],
        (0.5, 0.5, 1.0, 0.5, 0.0, math.nan),
    ),
    "of accepted ones": (
        [([0, 2, 2, 1], [0, 1, 0, 1], [0, 1, 2, 0], [True, True, False, True])],
        (0.5, 0.5, 1.0, 0.5, 0.75, 1 / 3),
    ),
    # By batches the ratios are 0/1 and 3/2, with mean 0.75.
    "a ratio of totals": (
        [([1], [0], [0], None), ([0, 0, 0], [0, 0, 1], [0, 0, 0], None)],
        (0.75, 0.75, 1.0, 0.5, 0.0, math.nan),
    ),
    "an expert never right": ([([0], [1], [0], None)], (0.0, 1.0, math.nan, 0.0, 0.0, math.nan)),
    "NaN is wrong": ([([None, 0], [0, 0], [0, 0], [True, True])], (1.0, 0.5, 0.5, 0.5, 1.0, 0.5)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_numbers_by_hand(name):
    batches, expected = COUNTED[name]
    metric = DecodingAccuracy()
    for decoded, expert, labels, accepted in batches:
        accepted = None if accepted is None else torch.tensor(accepted)
        metric.update(logits(*decoded), logits(*expert), torch.tensor(labels), accepted)
    found = metric.compute()
    names = ("expert_accuracy", "decoded_accuracy", "nda", "agreement", "coverage", "found")
    np.testing.assert_array_equal([float(found[each]) for each in names], expected)


def test_classes_that_the_task_does_not_have_are_not_read():
    metric = DecodingAccuracy(num_classes=2)
    expert = torch.tensor([[1.0, 0.0, 9.0], [0.0, 1.0, 9.0]])
    metric.update(expert.flip(0), expert, torch.tensor([0, 1]))
    found = metric.compute()
    assert float(found["expert_accuracy"]) == 1.0
    assert float(found["decoded_accuracy"]) == 0.0
    for label in (-1, 2):
        with pytest.raises(DataError, match=rf"found labels \[{label}\], expected 0 to 1"):
            metric.update(expert[:1], expert[:1], torch.tensor([label]))


def test_counts_are_whole_numbers_beyond_those_of_float32():
    metric = DecodingAccuracy()
    metric.counts += 2**25
    metric.update(logits(0), logits(0), torch.tensor([0]))
    assert metric.counts.tolist() == [2**25 + each for each in (1, 1, 1, 0, 0, 1)]


def test_residual_is_the_ratio_of_norms_over_all_samples():
    draw = torch.Generator().manual_seed(0)
    coded = torch.randn(23, 4, generator=draw)
    target = torch.randn(23, 4, generator=draw)
    metric = Residual()
    for part in (slice(0, 5), slice(5, 6), slice(6, 23)):
        metric.update(coded[part], target[part])
    error = np.linalg.norm(coded.double().numpy() - target.double().numpy())
    expected = error / np.linalg.norm(target.double().numpy())
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_the_residual_of_nothing_is_no_number():
    metric = Residual()
    assert math.isnan(metric.compute())
    metric.update(torch.ones(2, 3), torch.zeros(2, 3))
    assert math.isnan(metric.compute())


def test_shapes_are_checked():
    with pytest.raises(DataError, match=r"expected \[B, C\], \[B, C\] and \[B\]"):
        DecodingAccuracy().update(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(DataError, match="expected the same"):
        Residual().update(torch.zeros(2, 3), torch.zeros(2, 4))
