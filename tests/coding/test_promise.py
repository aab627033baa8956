"""Promises on decoded answers: the known numbers of samples, and whether what is promised holds."""

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest

from coin.coding import Answers, answer_score, make_decoder, promised_threshold, uniform
from coin.errors import ConfigurationError, DataError, DecodingError


@pytest.mark.parametrize(("alpha", "needed"), [(0.05, 59), (0.02, 149), (0.01, 299)])
def test_so_many_samples_without_an_error_are_just_enough(alpha, needed):
    scores, right = torch.linspace(0, 1, needed), torch.zeros(needed, dtype=torch.bool)
    found = promised_threshold(scores, right, alpha)
    assert (found.threshold, found.coverage, found.samples, found.needed) == (1.0, 1.0, needed, needed)
    fewer = promised_threshold(scores[1:], right[1:], alpha)
    assert (fewer.threshold, fewer.coverage, fewer.needed) == (None, 0.0, needed)
    assert str(fewer) == (
        f"cannot promise that at most {alpha} of the accepted answers differ, at 0.95 confidence: found {needed - 1} "
        f"samples, expected at least {needed}"
    )
    wrong = right.clone()
    wrong[0] = True
    assert promised_threshold(scores, wrong, alpha).threshold is None
    assert str(promised_threshold(scores, wrong, alpha)).endswith(f"too many of the {needed} of lowest score do")


def test_the_bound_is_that_of_clopper_and_pearson():
    """Whatever is accepted passes SciPy's own exact interval, and more would not have."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.rand(500, generator=draw, dtype=torch.float64)
    differs = torch.rand(500, generator=draw, dtype=torch.float64) < scores**4
    found = promised_threshold(scores, differs, 0.05, 0.9)
    assert found.threshold is not None

    def bound(threshold):
        accepted = scores <= threshold
        test = binomtest(int(differs[accepted].sum()), int(accepted.sum()), alternative="less")
        return test.proportion_ci(0.9, method="exact").high

    assert bound(found.threshold) <= 0.05 < bound(scores.sort().values[round(500 * found.coverage) + 12])
    assert found.coverage == float((scores <= found.threshold).double().mean())


@pytest.mark.parametrize("shape", ["steep", "flat", "late"])
@pytest.mark.parametrize("alpha", [0.05, 0.02])
def test_what_is_promised_holds_as_often_as_promised(shape, alpha):
    """Over 1000 draws the true share of accepted answers that differ is above α in 5 %, but for the draws' own luck."""
    draw = np.random.default_rng(0)
    rate = {"steep": lambda r: r**6, "flat": lambda r: alpha * (1.02 + 0 * r), "late": lambda r: 3 * alpha * (r > 0.6)}
    grid = (np.arange(20000) + 0.5) / 20000
    truth = np.cumsum(rate[shape](grid)) / np.arange(1, 20001)
    broken, given, draws = 0, 0, 1000
    for _ in range(draws):
        scores = draw.random(300)
        differs = draw.random(300) < rate[shape](scores)
        found = promised_threshold(torch.from_numpy(scores), torch.from_numpy(differs), alpha)
        if found.threshold is not None:
            given += 1
            broken += truth[min(int(found.threshold * 20000), 19999)] > alpha
    assert broken <= binom.ppf(0.999, draws, 0.05)
    assert given > 0.2 * draws or shape == "flat"


def test_answers_of_one_score_are_accepted_together_or_not_at_all():
    scores = torch.tensor([0.1] * 80 + [0.2] * 220)
    wrong = torch.zeros(300, dtype=torch.bool)
    wrong[80:110] = True
    found = promised_threshold(scores, wrong, 0.05)
    assert found.threshold == pytest.approx(0.1)
    assert found.coverage == 80 / 300
    wrong[0] = True  # the lowest score of all is no lower than the others'
    assert promised_threshold(scores, wrong, 0.05).threshold is None


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"alpha": 1.0}, {"alpha": 0.1, "confidence": 1.0}])
def test_what_nobody_can_promise_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="expected a number above 0 and below 1"):
        promised_threshold(torch.rand(5), torch.zeros(5, dtype=torch.bool), **wrong)


def answers_of(samples, seed, experts=3):
    """Experts with random logits and a coded model that is wrong by noise; the first task's answers by far more."""
    draw = torch.Generator().manual_seed(seed)
    own = 2 * torch.randn(experts, samples, 4, generator=draw, dtype=torch.float64)
    tasks = torch.arange(samples) % experts
    noise = 0.02 + 0.2 * (tasks == 0)[:, None].double()
    coded = uniform(experts).encode(own) + noise * torch.randn(1, samples, 4, generator=draw, dtype=torch.float64)
    return Answers(own, coded, tasks=tasks)


def test_every_lost_expert_is_promised_for_on_its_own_task():
    decoder, new = make_decoder("linear", uniform(3), [0]).fit(answers_of(300, 0)), answers_of(900, 1)
    with pytest.raises(DecodingError, match="has promised nothing; call accept with new inputs"):
        decoder.accepted(0, torch.zeros(2))
    (own,) = decoder.accept(new, 0.05).values()
    decoded = decoder.decode(new)[0]
    mine = new.tasks == 0
    score, differs = answer_score(decoded), decoded.argmax(1) != new.experts[0].argmax(1)
    assert own == promised_threshold(score[mine], differs[mine], 0.05)
    assert own.samples == 300
    assert 0 < own.coverage < 1
    assert torch.equal(decoder.accepted(0, score), score <= own.threshold)
    other = make_decoder("linear", uniform(3), [1]).fit(answers_of(300, 0)).accept(new, 0.05)[1]
    assert other.coverage > own.coverage
    decoder.accept(new.select(new.tasks != 0), 0.05)  # no samples of its task promise nothing
    assert (decoder.promises[0].samples, decoder.promises[0].threshold) == (0, None)
    assert not decoder.accepted(0, torch.zeros(3)).any()


def test_a_score_that_is_nan_is_not_accepted_and_lengths_are_checked():
    scores, differs = torch.linspace(0, 1, 200), torch.zeros(200, dtype=torch.bool)
    scores[::2] = torch.nan
    promise = promised_threshold(scores, differs, 0.05)
    assert (promise.threshold, promise.coverage, promise.samples) == (1.0, 0.5, 200)
    assert promised_threshold(torch.full((200,), torch.nan), differs, 0.05).threshold is None
    with pytest.raises(DataError, match=r"found scores \[200\] and differences \[3\], expected \[P\] each"):
        promised_threshold(scores, differs[:3], 0.05)


def test_the_score_is_one_less_the_largest_probability():
    odds = torch.tensor([[[1.0, 2.0, 5.0], [3.0, 3.0, 3.0]]])
    torch.testing.assert_close(answer_score(odds.log()), torch.tensor([[3 / 8, 2 / 3]]).double(), rtol=1e-6, atol=0)
    wrong = torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, 0.0]])
    assert answer_score(wrong).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(DataError, match=r"found logits \[2, 1\], expected at least two classes to score"):
        answer_score(torch.ones(2, 1))
