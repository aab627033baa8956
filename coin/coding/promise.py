"""Scores of answers, and promises: below a threshold at most a share α of decoded ones differ from the expert's."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import bdtr
from torch import Tensor

from coin.core.choices import check_number
from coin.core.devices import double
from coin.errors import DataError

_STEPS = 40  # numbers of accepted samples that are tried, from the least that can be enough to all


@dataclass(frozen=True)
class Promise:
    """What holds of decoded answers with a score of at most `threshold`.

    Attributes:
        threshold: None where nothing can be promised.
        alpha: The most of them that differ from the expert's, as a probability.
        confidence: The probability, over the draw of the samples, that this is so.
        coverage: The share of the samples that are accepted.
        samples: How many samples there were.
        needed: How many must be accepted without a single error.

    >>> coin.promised_threshold(torch.zeros(100), torch.zeros(100, dtype=torch.bool), alpha=0.05).needed
    59
    """

    threshold: float | None
    alpha: float
    confidence: float
    coverage: float
    samples: int
    needed: int

    def __str__(self) -> str:
        what = f"at most {self.alpha:.3g} of the accepted answers differ, at {self.confidence:.3g} confidence"
        if self.threshold is not None:
            return (
                f"{what}: {self.coverage:.1%} are accepted, of a score up to {self.threshold:.3g}"
            )
        if self.samples < self.needed:
            return f"cannot promise that {what}: found {self.samples} samples, expected at least {self.needed}"
        return f"cannot promise that {what}: too many of the {self.needed} of lowest score do"


def samples_needed(alpha: float, confidence: float) -> int:
    """Return how many samples must be accepted without one error for a promise of α in (0, 1): 59 for 5 % at 95 %."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-alpha))


def promised_threshold(
    scores: Tensor,
    differs: Tensor,
    alpha: float,
    confidence: float = 0.95,
) -> Promise:
    """Return the promise with the largest threshold for which P(differs | accepted) ≤ α at this confidence.

    The samples must be new, and like the queries: neither the networks nor the decoder may have learnt from them. With
    n accepted of which k differ, a threshold passes where the Clopper–Pearson bound of k of n is at most α, that is
    P(Bin(n, α) ≤ k) ≤ 1 − confidence. Thresholds are tested in a fixed order until the first fails, so that all
    together fail to hold with a probability of 1 − confidence at most: first the score of as many samples of lowest
    score as pass if none differs, then of more and more. As they are set by the ranks of the scores, this asks that the
    share that differs, once it is above α, stays there as higher scores are accepted.

    Source: Angelopoulos, Bates, Candès, Jordan and Lei, *Learn then Test* (arXiv 2110.01052), fixed sequence testing.

    >>> scores = torch.linspace(0, 1, 600)
    >>> print(coin.promised_threshold(scores, scores > 0.9, alpha=0.05))
    at most 0.05 of the accepted answers differ, at 0.95 confidence: 93.0% are accepted, of a score up to 0.93

    Args:
        scores: Of the decoded answers ``[P]``; those whose score is NaN are not accepted.
        differs: Whether they differ from the expert's ``[P]``, bool; DataError for another shape.
        alpha: In (0, 1), else a ConfigurationError.
        confidence: In (0, 1) too.
    """
    found = list(scores.shape)
    other = list(differs.shape)
    if len(found) != 1 or found != other:
        raise DataError(
            f"found scores {found} and differences {other}, expected [P] each: one an answer"
        )
    check_number("alpha", alpha, low=0, high=1, strict=True)
    check_number("confidence", confidence, low=0, high=1, strict=True)
    needed = samples_needed(alpha, confidence)
    ranked, order = scores.cpu().double().sort(stable=True)
    wrong = differs.cpu()[order].cumsum(0)  # how many differ up to each rank
    ranked = ranked[~ranked.isnan()]  # which are sorted to the end
    threshold = None
    accepted = 0
    steps: Any = np.unique(np.linspace(needed, len(ranked), _STEPS, dtype=int))
    for step in steps if len(ranked) >= needed else ():
        score = float(ranked[step - 1])
        number = int(torch.searchsorted(ranked, score, right=True))  # with those of the same score
        errors = float(wrong[number - 1])
        probability = bdtr(errors, number, alpha)  # of so few errors, if a share α differed
        if not probability <= 1 - confidence:
            break
        threshold = score
        accepted = number
    samples = len(scores)
    coverage = accepted / max(samples, 1)
    return Promise(
        threshold,
        alpha,
        confidence,
        coverage,
        samples,
        needed,
    )


def answer_score(logits: Tensor) -> Tensor:
    """Return 1 − the largest softmax probability of logits over an expert's own classes, ``[..., C]`` → ``[...]``.

    In float64; 1 where a logit is not finite. It is no probability of an error: `promised_threshold` makes a promise of
    it. A DataError for fewer than two logits, of which it says nothing.

    Source: Hendrycks and Gimpel, *A baseline for detecting misclassified examples* (ICLR 2017).

    >>> [round(score, 3) for score in coin.answer_score(torch.tensor([[3.0, 0.0, 0.0], [1.0, 0.0, 0.0]])).tolist()]
    [0.091, 0.424]
    """
    shape = list(logits.shape)
    if shape[-1] < 2:
        raise DataError(
            f"found logits {shape}, expected at least two classes to score; give a logit each"
        )
    logits = double(logits)
    largest = torch.softmax(logits, -1).amax(-1)
    is_finite = torch.isfinite(logits).all(-1)
    score: Tensor = (1 - largest).where(is_finite, 1.0)
    return score
