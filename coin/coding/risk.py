"""How far a decoded answer is to be trusted."""

import math

import torch
from torch import Tensor


def decoding_risk(decoded: Tensor, errors: Tensor) -> Tensor:
    """Return the estimated probability that the lost expert's own answer is another class ``[B]``, in float64.

    With a the decoded class, b any other and e the decoder's error, it is max_b Φ(−(f̂_a − f̂_b)/σ_ab): the margin
    between two decoded logits over the error of that margin, σ_ab² = E(e_a − e_b)², whose E is over calibration inputs
    that the decoder was not fitted on (`Decoder.errors`), with the normal distribution's tail. No label is needed; it
    holds as far as queries are like the calibration inputs, and falls short where the coded model was fitted on the
    same ones. 0 where the decoder makes no error, ½ at most: between two classes, as decoded is the likelier. 1 where
    what was decoded is not finite.

    Args:
        decoded: The decoded logits of one lost expert, without padding ``[B, C]``.
        errors: The second moments E e eᵀ of their errors ``[C, C]``.
    """
    logits, moments = decoded.double(), errors.to(decoded.device).double()
    answer = logits.argmax(1, keepdim=True)
    margins = logits.gather(1, answer) - logits
    squares = moments.diagonal()
    spread = (squares[answer] + squares - 2 * moments[answer.flatten()]).clamp_min(0).sqrt()
    # A margin of 0 in an exact decoder is a tie: either class.
    tails = torch.special.ndtr(-(margins / spread).nan_to_num(0.0, math.inf))
    risk: Tensor = tails.scatter(1, answer, 0.0).amax(1).where(torch.isfinite(logits).all(1), 1.0)
    return risk
