"""The probability that a decoded answer differs from the lost expert's own."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from coin.errors import NumericalError

RIVALS = 32
"""Rivals of an answer whose errors are integrated together; what remains counts as independent, which errs upwards."""

POINTS = 256
"""Quasi-random points of the integral."""

_BLOCK = 256
"""Answers that are integrated at once."""

_SURE = 1e-3
"""Below it the sum over the rivals is the risk: that two win at once does not matter."""


def decoding_risk(decoded: Tensor, errors: Tensor) -> Tensor:
    """Return the estimated probability that the lost expert's own answer is another class ``[B]``, in float64.

    With a the decoded class and e the decoder's error, it is P(e_a − e_b > f̂_a − f̂_b for some b ≠ a), for normal errors
    with the second moments E e eᵀ: any of the rivals may win. They are from calibration inputs that the decoder was not
    fitted on (`Decoder.errors`), so no label is needed. It holds as far as queries are like the calibration inputs, and
    falls short where the coded model was fitted on these. 0 where the decoder makes no error, 1 where what was decoded
    is not finite.

    >>> import coin, torch
    >>> decoded, errors = torch.tensor([[3.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), 0.5 * torch.eye(3)
    >>> [round(risk, 3) for risk in coin.decoding_risk(decoded, errors).tolist()]
    [0.003, 0.254]

    Args:
        decoded: The decoded logits of one lost expert, without padding ``[B, C]``.
        errors: The second moments E e eᵀ of their errors ``[C, C]``.

    Raises:
        NumericalError: The moments are not finite.
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
    first = rivals.gather(1, order)[:, :RIVALS]
    every_unsure = (risk > _SURE).nonzero().flatten()
    for start in range(0, len(every_unsure), _BLOCK):
        unsure = every_unsure[start : start + _BLOCK]
        correlation = _correlation(moments, answer[unsure], first[unsure])
        risk[unsure] = _any_exceeds(margins[unsure], correlation)
    return risk.where(torch.isfinite(logits).all(1), 1.0)


def _correlation(moments: Tensor, answer: Tensor, rivals: Tensor) -> Tensor:
    """Return the correlation of the errors e_a − e_b of each sample's margins ``[B, K, K]``."""
    across = moments[answer, rivals]
    shared = moments[answer[:, 0], answer[:, 0], None, None] - across[:, :, None] - across[:, None]
    covariance = shared + moments[rivals[:, :, None], rivals[:, None]]
    scale = covariance.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    correlation = (covariance / (scale[:, :, None] * scale[:, None])).nan_to_num(0.0, 0.0, 0.0)
    correlation.diagonal(dim1=1, dim2=2).fill_(1 + 1e-9)  # a decoder may err in fewer directions than it has classes
    return correlation


def _any_exceeds(margins: Tensor, correlation: Tensor) -> Tensor:
    """Return P(some error exceeds its margin) for standard normal errors ``[B]``, to a bounded relative error.

    Draw a rival k by its own tail, and errors given that k's exceeds its margin; then the probability is the sum of the
    tails times E 1/S, with S the number of rivals whose errors do.

    Source: Owen, Maximov and Chertkov, *Importance sampling the union of rare events with an application to power
    systems analysis* (Electronic Journal of Statistics 2019), section 3; here with quasi-random points.

    Args:
        margins: In units of their errors ``[B, C − 1]``; those beyond the first K are taken as independent.
        correlation: Of the first K errors ``[B, K, K]``.
    """
    together = correlation.shape[1]
    first, tails = margins[:, None, :together], torch.special.ndtr(-margins)
    points = _points(2 + together).to(margins)  # [M, 2 + K]
    total = tails[:, :together].sum(1, keepdim=True)
    which = torch.searchsorted(
        tails[:, :together].cumsum(1) / total, points[:, 0].expand(len(margins), -1).contiguous()
    )
    which = which.clamp_max(together - 1)  # [B, M]
    drawn = torch.special.ndtri(points[:, 2:]) @ torch.linalg.cholesky(correlation).mT  # [B, M, K]
    beyond = -torch.special.ndtri((points[:, 1] * tails.gather(1, which)).clamp_min(1e-300))
    step = beyond - drawn.gather(2, which[:, :, None])[:, :, 0]
    rows = correlation.gather(1, which[:, :, None].expand(-1, -1, together))
    exceeding = (drawn + step[:, :, None] * rows > first).sum(2).clamp_min(1)
    any_of_first = (total[:, 0] * (1 / exceeding).mean(1)).clamp_max(1)
    safe = torch.log1p(-tails[:, together:]).sum(1)
    any_of_all: Tensor = 1 - (1 - any_of_first) * safe.exp()
    return any_of_all


@lru_cache
def _points(dimensions: int) -> Tensor:
    """Return points ``[M, K]`` that fill the unit cube evenly, always the same."""
    engine = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=0)  # type: ignore[no-untyped-call]
    return engine.draw(POINTS, dtype=torch.float64)
