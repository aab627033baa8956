"""Promises on decoded answers: the known numbers of samples, and whether what is promised holds."""

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest

from coin.coding import Answers, answer_score, make_decoder, promised_threshold, uniform
from coin.errors import ConfigurationError, DataError, DecodingError


@pytest.mark.parametrize(("alpha", "needed"), [(0.05, 59), (0.02, 149), (0.01, 299)])
def test_so_many_samples_without_an_error_are_just_enough(alpha, needed):
    what = f"at most {alpha} of the accepted answers differ, at 0.95 confidence"
    scores = torch.linspace(0, 1, needed)
    differs = torch.zeros(needed, dtype=torch.bool)
    enough = promised_threshold(scores, differs, alpha)
    assert (enough.threshold, enough.coverage) == (1, 1)
    assert (enough.alpha, enough.confidence) == (alpha, 0.95)
    assert (enough.samples, enough.needed) == (needed, needed)
    assert str(enough) == f"{what}: 100.0% are accepted, of a score up to 1"
    fewer = promised_threshold(scores[1:], differs[1:], alpha)
    assert (fewer.threshold, fewer.coverage) == (None, 0)
    found = f"found {needed - 1} samples, expected at least {needed}"
    assert str(fewer) == f"cannot promise that {what}: {found}"
    differs[0] = True
    wrong = promised_threshold(scores, differs, alpha)
    assert wrong.threshold is None
    assert str(wrong) == f"cannot promise that {what}: too many of the {needed} of lowest score do"


def test_the_bound_is_that_of_clopper_and_pearson():
    """Whatever is accepted passes SciPy's own exact interval, and more would not have."""
    draw = np.random.default_rng(0)
    scores = draw.random(500)
    differs = draw.random(500) < scores**4
    found = promised_threshold(torch.from_numpy(scores), torch.from_numpy(differs), 0.05, 0.9)

    def bound(threshold):
        accepted = scores <= threshold
        test = binomtest(differs[accepted].sum(), accepted.sum(), alternative="less")
        return test.proportion_ci(0.9, method="exact").high

    number = round(500 * found.coverage)
    next_step = np.sort(scores)[number + 12]  # of the 40 that are tried
    assert bound(found.threshold) <= 0.05 < bound(next_step)
    assert found.coverage == (scores <= found.threshold).mean()


RATES = {  # of answers that differ, by the score, for α
    "steep": lambda score, alpha: score**6,
    "flat": lambda score, alpha: alpha * (1.02 + 0 * score),
    "late": lambda score, alpha: 3 * alpha * (score > 0.6),
}


@pytest.mark.parametrize("shape", RATES)
@pytest.mark.parametrize("alpha", [0.05, 0.02])
def test_what_is_promised_holds_as_often_as_promised(shape, alpha):
    """Over 1000 draws the true share of accepted answers that differ is above α in 5 %, but for the draws' own luck."""
    draw = np.random.default_rng(0)
    rate = RATES[shape]
    places = 20_000
    grid = (np.arange(places) + 0.5) / places
    true_share = np.cumsum(rate(grid, alpha)) / np.arange(1, places + 1)
    broken = []
    for _ in range(1000):
        scores = draw.random(300)
        differs = draw.random(300) < rate(scores, alpha)
        found = promised_threshold(torch.from_numpy(scores), torch.from_numpy(differs), alpha)
        if found.threshold is not None:
            place = min(int(found.threshold * places), places - 1)
            broken.append(true_share[place] > alpha)
    assert sum(broken) <= binom.ppf(0.999, 1000, 0.05)
    assert len(broken) > 200 or shape == "flat"


def test_answers_of_one_score_are_accepted_together_or_not_at_all():
    scores = torch.tensor([0.1] * 80 + [0.2] * 220)
    wrong = torch.zeros(300, dtype=torch.bool)
    wrong[80:110] = True
    found = promised_threshold(scores, wrong, 0.05)
    assert found.threshold == pytest.approx(0.1)
    assert found.coverage == 80 / 300
    wrong[0] = True  # the lowest score of all is no lower than the others'
    assert promised_threshold(scores, wrong, 0.05).threshold is None


def test_a_score_that_is_nan_is_not_accepted():
    scores = torch.linspace(0, 1, 200)
    scores[::2] = torch.nan
    found = promised_threshold(scores, torch.zeros(200, dtype=torch.bool), 0.05)
    assert (found.threshold, found.coverage, found.samples) == (1.0, 0.5, 200)


REFUSED = {
    "alpha=0.0, expected a number above 0 and below 1": (ConfigurationError, 5, 0.0, 0.95),
    "alpha=1.0, expected a number above 0 and below 1": (ConfigurationError, 5, 1.0, 0.95),
    "confidence=1.0, expected a number": (ConfigurationError, 5, 0.1, 1.0),
    r"found scores \[3\] and differences \[5\]": (DataError, 3, 0.1, 0.95),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_nobody_can_promise_is_refused(message):
    error, scores, alpha, confidence = REFUSED[message]
    with pytest.raises(error, match=message):
        promised_threshold(torch.rand(scores), torch.zeros(5), alpha, confidence)


@pytest.fixture
def answers():
    """Three experts of 300 inputs each, and a coded model that is far noisier on the first one's task."""
    draw = torch.Generator().manual_seed(1)
    own = 2 * torch.randn(3, 900, 4, generator=draw, dtype=torch.float64)
    tasks = torch.arange(900) % 3
    noise = torch.randn(1, 900, 4, generator=draw, dtype=torch.float64)
    noise *= torch.where(tasks == 0, 0.22, 0.02)[:, None]
    return Answers(own, uniform(3).encode(own) + noise, tasks=tasks)


@pytest.mark.parametrize("expert", range(3))
def test_every_lost_expert_is_promised_for_on_its_own_task(expert, answers):
    decoder = make_decoder("linear", uniform(3), [expert])
    with pytest.raises(DecodingError, match="has promised nothing; call accept with new inputs"):
        decoder.accepted(expert, torch.zeros(2))
    found = decoder.accept(answers, 0.05)[expert]
    (decoded,) = decoder.decode(answers)
    scores = answer_score(decoded)
    differs = decoded.argmax(1) != answers.experts[expert].argmax(1)
    is_own = answers.tasks == expert
    assert found == promised_threshold(scores[is_own], differs[is_own], 0.05)
    assert found.samples == 300
    assert (found.coverage < 1) == (expert == 0)
    assert torch.equal(decoder.accepted(expert, scores), scores <= found.threshold)


def test_without_samples_of_its_task_nothing_is_promised(answers):
    decoder = make_decoder("linear", uniform(3), [0])
    decoder.accept(answers.select(answers.tasks != 0), 0.05)
    assert decoder.promises[0].samples == 0
    assert not decoder.accepted(0, torch.zeros(3)).any()


def test_the_score_is_one_less_the_largest_probability():
    odds = torch.tensor([[[1.0, 2.0, 5.0], [3.0, 3.0, 3.0]]])
    expected = torch.tensor([[3 / 8, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(answer_score(odds.log()), expected, rtol=1e-6, atol=0)
    not_finite = torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, 0.0]])
    assert answer_score(not_finite).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(DataError, match=r"found logits \[2, 1\], expected at least two classes"):
        answer_score(torch.ones(2, 1))
