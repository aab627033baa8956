import math

import pytest
import torch

from coin.coding.metrics import DecodingAccuracy, Residual
from coin.errors import DataError


def logits_for(predictions, classes=3):
    return torch.nn.functional.one_hot(torch.tensor(predictions), classes).float()


def random_batches(seed, sizes=(5, 1, 17)):
    generator = torch.Generator().manual_seed(seed)
    logits = [[torch.randn(size, 4, generator=generator) for _ in range(2)] for size in sizes]
    return [(*pair, torch.randint(4, pair[0].shape[:1], generator=generator)) for pair in logits]


def test_the_numbers_by_hand():
    metric = DecodingAccuracy()
    labels = torch.tensor([0, 1, 2, 0])
    metric.update(logits_for([0, 2, 2, 1]), logits_for([0, 1, 0, 1]), labels)
    scores = {name: float(value) for name, value in metric.compute().items()}
    assert math.isnan(scores.pop("found"))
    assert scores == {"expert_accuracy": 0.5, "decoded_accuracy": 0.5, "nda": 1.0, "agreement": 0.5, "coverage": 0.0}
    accepted = torch.tensor([True, True, False, True])
    metric.update(logits_for([0, 2, 2, 1]), logits_for([0, 1, 0, 1]), labels, accepted)
    assert float(metric.compute()["coverage"]) == 3 / 8
    assert float(metric.compute()["found"]) == pytest.approx(1 / 3)


def test_nda_is_a_ratio_of_totals_not_a_mean_of_ratios():
    metric = DecodingAccuracy()
    metric.update(logits_for([1]), logits_for([0]), torch.tensor([0]))
    metric.update(logits_for([0, 0, 0]), logits_for([0, 0, 1]), torch.tensor([0, 0, 0]))
    # Per batch the ratios are 0/1 and 3/2, with mean 0.75; the totals are 3 of 3.
    assert float(metric.compute()["nda"]) == 1.0


def test_padding_is_not_read():
    metric = DecodingAccuracy(num_classes=2)
    expert = torch.tensor([[1.0, 0.0, 9.0], [0.0, 1.0, 9.0]])
    metric.update(expert.flip(0) * 2, expert, torch.tensor([0, 1]))
    scores = metric.compute()
    assert (float(scores["expert_accuracy"]), float(scores["decoded_accuracy"])) == (1.0, 0.0)
    for label in (-1, 2):
        with pytest.raises(DataError, match=rf"found labels \[{label}\], expected 0 to 1"):
            metric.update(expert[:1], expert[:1], torch.tensor([label]))


def test_an_expert_that_is_never_right_has_no_nda_and_an_answer_of_nan_is_none():
    metric, nothing = DecodingAccuracy(), DecodingAccuracy()
    metric.update(logits_for([0]), logits_for([1]), torch.tensor([0]))
    assert math.isnan(metric.compute()["nda"])
    assert float(metric.compute()["decoded_accuracy"]) == 1.0
    nothing.update(torch.full((1, 3), torch.nan), logits_for([0]), torch.tensor([0]))
    assert [float(nothing.compute()[name]) for name in ("decoded_accuracy", "agreement")] == [0.0, 0.0]


def test_shapes_are_checked():
    with pytest.raises(DataError, match=r"expected \[B, C\], \[B, C\] and \[B\]"):
        DecodingAccuracy().update(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(DataError, match="expected the same"):
        Residual().update(torch.zeros(2, 3), torch.zeros(2, 4))


def test_residual_is_the_ratio_of_norms_over_all_samples():
    batches = random_batches(0)
    metric = Residual()
    for coded, target, _ in batches:
        metric.update(coded, target)
    coded, target = (torch.cat([batch[i] for batch in batches]).double() for i in (0, 1))
    torch.testing.assert_close(metric.compute(), (coded - target).norm() / target.norm())
    metric = Residual()  # against nothing it is not a number
    assert math.isnan(metric.compute())
    metric.update(torch.ones(2, 3), torch.zeros(2, 3))
    assert math.isnan(metric.compute())


def test_long_sums_do_not_lose_counts():
    metric = DecodingAccuracy()
    metric.counts += 2**25
    metric.update(logits_for([0]), logits_for([0]), torch.tensor([0]))
    assert metric.counts.tolist() == [2**25 + each for each in (1, 1, 1, 0, 0, 1)]
