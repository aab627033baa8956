"""The score of an answer, by which it is accepted or not."""

import torch
from torch import Tensor


def answer_score(logits: Tensor) -> Tensor:
    """Return 1 − the largest softmax probability of logits over an expert's own classes, ``[..., C]`` → ``[...]``.

    In float64; 1 where a logit is not finite. It is no probability of an error: `promised_threshold` makes a promise of
    it. Source: Hendrycks and Gimpel, *A baseline for detecting misclassified examples* (ICLR 2017).

    >>> [round(score, 3) for score in coin.answer_score(torch.tensor([[3.0, 0.0, 0.0], [1.0, 0.0, 0.0]])).tolist()]
    [0.091, 0.424]
    """
    score: Tensor = 1 - torch.softmax(logits.double(), -1).amax(-1)
    return score.where(torch.isfinite(logits).all(-1), 1.0)
