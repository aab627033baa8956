"""What `Refit` fits the layers of the coded network to."""

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor

OWN_SHARE = 0.6
"""N times the share of the experts' own targets in both: what N answers are decoded from must be right for all."""


class Target(StrEnum):
    """What the layers of the coded network are fitted to."""

    own = "own"
    """On every task's samples, what that task's expert makes of them at this layer."""

    mix = "mix"
    """On all samples, the β-average of what all experts make of them."""

    both = "both"
    """On all samples, between the two: the sum of both objectives."""

    auto = "auto"
    """Own and both are tried; both is taken where its error of decoded answers on held-out samples is `AHEAD` of own's.

    For the expert_head decoder alone it is own, untried.
    """


def objective(target: Target, row: Sequence[float], task: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the units are fitted to: every sample's mixture of the experts [N, P], and its weight [P].

    A sum of squares whose targets differ is, up to a constant, one with the weighted mean of the targets.
    """
    beta = torch.tensor(row, dtype=torch.float64)
    own_share = {Target.own: 1.0, Target.both: OWN_SHARE / len(row), Target.mix: 0.0}[target]
    # Every task's own samples weigh β_i together; in the mixture all samples weigh alike.
    own = own_share * (beta / torch.bincount(task, minlength=len(row)))[task]
    mixed = torch.full_like(own, (1 - own_share) / len(task))
    shares = own + mixed
    mixtures = torch.outer(beta, mixed)
    mixtures[task, torch.arange(len(task))] += own
    return mixtures / shares.where(shares > 0, 1), shares
