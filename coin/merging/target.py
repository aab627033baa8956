"""What `Refit` fits the layers of the coded network to."""

import statistics
from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor

from coin.errors import DataError
from coin.files.tensors import State

# N times the share of the experts' own targets in both: what N answers are decoded from must be right for all.
OWN_SHARE = 0.6
# The spread above which experts are far apart: 0.005 to 0.008 near ImageNet weights, 0.016 to 0.25 tuned freely.
FAR = 0.0125


class Target(StrEnum):
    """What the layers of the coded network are fitted to."""

    own = "own"
    """On every task's samples, what that task's expert makes of them at this layer."""

    both = "both"
    """Beside that, on all samples, the β-average of what all experts make of them."""


def objective(target: Target, row: Sequence[float], task: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the units are fitted to: every sample's mixture of the experts [N, P], and its weight [P]."""
    # A sum of squares whose targets differ is, up to a constant, one with the weighted mean of the targets.
    beta = torch.tensor(row, dtype=torch.float64)
    own_share = OWN_SHARE / len(row) if target is Target.both else 1.0
    # Every task's own samples weigh β_i together; in the mixture all samples weigh alike.
    counts = torch.bincount(task, minlength=len(row))
    own = own_share * (beta / counts)[task]
    mixed = torch.full_like(own, (1 - own_share) / len(task))
    shares = own + mixed
    lost = ((beta > 0) & (counts == 0)).nonzero().flatten().tolist() if target is Target.own else []
    if lost:
        told = f"found no calibration samples of task {lost[0]}, which has a share in the code row {list(row)}"
        raise DataError(f"{told}, expected at least one; give some, raise memory_mib, or use target=both")
    mixtures = torch.outer(beta, mixed)
    mixtures[task, torch.arange(len(task))] += own
    return mixtures / shares.where(shares > 0, 1), shares


def spread(experts: Sequence[State], row: Sequence[float], without: tuple[str, ...] = ()) -> float:
    """Return how far experts are apart: the median over their matrices of √(Σ_i β_i ‖W_i − W̄‖²) / ‖W̄‖, W̄ = Σ_i β_i W_i.

    0 for networks without a matrix. Names that begin with one of those in `without` are left out.
    """
    found = [0.0]
    for name, first in experts[0].items():
        if first.ndim > 1 and first.is_floating_point() and not name.startswith(without):
            every = [expert[name].detach().double() for expert in experts]  # which may be read from files
            mean = sum((beta * each for beta, each in zip(row, every, strict=True)), torch.zeros_like(every[0]))
            apart = sum(beta * float((each - mean).square().sum()) for beta, each in zip(row, every, strict=True))
            found.append((apart / max(float(mean.square().sum()), torch.finfo(torch.float64).tiny)) ** 0.5)
    return statistics.median(found[1:] or found)
