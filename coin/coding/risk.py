"""The probability that a decoded answer differs from the lost expert's own."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from coin.errors import NumericalError

POINTS = 512
"""Quasi-random points of the integral; the standard error of a risk r is √(r (T − r)/M) at most, T its tails' sum."""

FEW_POINTS = 64
"""Those with more than 256 classes."""
_FLOATS = 1 << 22  # what may be held of one kind for the answers that are integrated at once
_SURE = 1e-4  # below it the sum over the rivals is the risk: that two win at once does not matter


@torch.no_grad()
def decoding_risk(decoded: Tensor, errors: Tensor) -> Tensor:
    """Return the estimated probability that the lost expert's own answer is another class ``[B]``, in float64.

    With a the decoded class and e the decoder's error, it is P(e_a − e_b > f̂_a − f̂_b for some b ≠ a), for normal
    errors with the second moments E e eᵀ: any of the rivals may win. They are from calibration inputs that the decoder
    was not fitted on (`Decoder.errors`), so no label is needed. It holds as far as queries are like the calibration
    inputs, and falls short where the coded model was fitted on these, and where errors go with what is decoded, as
    large ones of the linear decoder do. 0 where the decoder makes no error, 1 where what was decoded is not finite.

    >>> decoded, errors = torch.tensor([[3.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), 0.5 * torch.eye(3)
    >>> [round(risk, 3) for risk in coin.decoding_risk(decoded, errors).tolist()]
    [0.003, 0.258]

    Args:
        decoded: The decoded logits of one lost expert, without padding ``[B, C]``.
        errors: The second moments E e eᵀ of their errors ``[C, C]``; a NumericalError where they are not finite.
    """
    logits, moments = decoded.double(), errors.to(decoded.device).double()
    if not bool(torch.isfinite(moments).all()):
        raise NumericalError("the decoder's errors on the calibration inputs are not finite; check these inputs")
    number, classes = logits.shape
    answer = logits.argmax(1, keepdim=True)
    every = torch.arange(classes, device=logits.device).expand(number, -1)
    rivals = every[every != answer].view(number, classes - 1)
    squares = moments.diagonal()
    spread = (squares[answer] + squares[rivals] - 2 * moments[answer, rivals]).clamp_min(0).sqrt()
    # The margin over its error; a margin of 0 in an exact decoder is a tie: either class.
    margins = (logits.gather(1, answer) - logits.gather(1, rivals)) / spread
    margins, order = margins.nan_to_num(0.0, math.inf).sort(1)
    risk: Tensor = torch.special.ndtr(-margins).sum(1)
    unsure = (risk > _SURE).nonzero().flatten()
    if len(unsure):
        rivals, spread = rivals.gather(1, order), spread.gather(1, order)
        drawn = _drawn(moments)
        size = max(1, _FLOATS // drawn.numel())
        for start in range(0, len(unsure), size):
            some = unsure[start : start + size]
            risk[some] = _any_exceeds(margins[some], spread[some], answer[some], rivals[some], moments, drawn)
    return risk.where(torch.isfinite(logits).all(1), 1.0)


def _drawn(moments: Tensor) -> Tensor:
    """Return errors at quasi-random points ``[M, C]``, normal with these second moments ``[C, C]``.

    An error that all classes share moves no margin, and is left out.
    """
    moments = moments - moments.mean(0) - moments.mean(1, keepdim=True) + moments.mean()
    scale = float(moments.diagonal().mean())
    points = torch.special.ndtri(_points(2 + len(moments)).to(moments)[:, 2:])
    identity = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    for jitter in (0.0, 1e-14, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4):  # the decoder may err in fewer directions
        factor, failed = torch.linalg.cholesky_ex(moments + jitter * scale * identity)
        if not int(failed):
            drawn: Tensor = points @ factor.mT
            return drawn
    return torch.zeros_like(points)  # there is no error


def _any_exceeds(
    margins: Tensor, scale: Tensor, answer: Tensor, rivals: Tensor, moments: Tensor, drawn: Tensor
) -> Tensor:
    """Return P(some rival's error exceeds its margin) ``[B]``, to a bounded relative error.

    Draw a rival k by its own tail, and errors given that k's exceeds its margin; then the probability is the sum of the
    tails times E 1/S, with S the number of rivals whose errors do. `margins` ``[B, K]`` are in units of their errors,
    `scale`; `answer` ``[B, 1]`` is the decoded class, `rivals` ``[B, K]`` the others in the margins' order; `moments`
    ``[C, C]`` and the errors `drawn` ``[M, C]`` belong together.

    Source: Owen, Maximov and Chertkov, *Importance sampling the union of rare events with an application to power
    systems analysis* (Electronic Journal of Statistics 2019), section 3; here with quasi-random points.
    """
    own, across = moments[answer, answer], moments[answer, rivals]
    tails, points = torch.special.ndtr(-margins), _points(2 + drawn.shape[1]).to(margins)
    total = tails.sum(1, keepdim=True)
    which = torch.searchsorted(tails.cumsum(1) / total, points[:, 0].expand(len(margins), -1).contiguous())
    which = which.clamp_max(margins.shape[1] - 1)  # [B, M]
    shared = own[:, :, None] - across[:, :, None] - across.gather(1, which)[:, None]
    covariance = shared + moments[rivals[:, :, None], rivals.gather(1, which)[:, None]]  # [B, K, M]
    correlation = covariance / (scale[:, :, None] * scale.gather(1, which)[:, None])
    apart = drawn.T[answer] - drawn.T[rivals]  # [B, K, M]
    apart = (apart / scale[:, :, None]).nan_to_num(0.0, 0.0, 0.0)
    beyond = -torch.special.ndtri((points[:, 1] * tails.gather(1, which)).clamp_min(1e-300))
    step = beyond - apart.gather(1, which[:, None])[:, 0]
    moved = apart + step[:, None] * correlation.nan_to_num(0.0, 0.0, 0.0)
    exceeding = (moved > margins[:, :, None]).sum(1).clamp_min(1)
    any_exceeds: Tensor = (total[:, 0] * (1 / exceeding).mean(1)).clamp_max(1)
    return any_exceeds


@lru_cache
def _points(dimensions: int) -> Tensor:
    """Return points ``[M, K]`` that fill the unit cube evenly, always the same."""
    with torch.inference_mode(False):
        engine = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=0)  # type: ignore[no-untyped-call]
        return engine.draw(POINTS if dimensions <= 258 else FEW_POINTS, dtype=torch.float64)
