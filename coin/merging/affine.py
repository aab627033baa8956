"""Weighted ridge regressions of affine maps, a group at a time, from rows that are passed over twice."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from coin.errors import NumericalError


def fit_affine(
    rows: Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]], ridge: float, *, intercept: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the minimiser ΔW, Δb of Σ_n w_n ‖ΔW a_n + Δb − r_n‖² / Σ_n w_n + λ ‖ΔW‖², a regression a group.

    λ = ridge × the mean diagonal entry of the covariance of a, a group's own. With more unknowns than rows the system
    is solved where the rows are, ΔW = Rᵀ(A Aᵀ + λ I)⁻¹A. Rows are centred first; products are taken in their own type,
    added up and solved in float64.

    Args:
        rows: Iterated twice: inputs a [n, G, K], residuals r [n, G, O] and weights w [n], in blocks.
        ridge: Above 0.
        intercept: Whether there is a Δb; without one nothing is centred and Δb is 0.

    Returns:
        ΔW [G, O, K] and Δb [G, O], in float64.

    Raises:
        NumericalError: A row is not finite, or too large to be squared.
    """
    count, mass, sums = 0, 0.0, []
    for a, r, w in rows():
        count += len(a)
        mass += float(w.sum())
        sums.append([torch.einsum("n,ngk->gk", w.to(x), x).double() for x in (a, r)])
    mean_a, mean_r = (torch.stack(each).sum(0) / mass for each in zip(*sums, strict=True))
    if not intercept:
        mean_a, mean_r = torch.zeros_like(mean_a), torch.zeros_like(mean_r)
    if not bool(torch.isfinite(mean_a).all() and torch.isfinite(mean_r).all()):
        raise NumericalError("a layer's inputs or outputs on calibration data are not finite; check the experts")

    def centred() -> Iterator[tuple[Tensor, Tensor]]:
        """Yield [G, n, K] and [G, n, O], every row times the root of its weight."""
        for a, r, w in rows():
            root = (w / mass).sqrt().to(a)[:, None, None]
            yield ((a - mean_a.to(a)) * root).transpose(0, 1), ((r - mean_r.to(r)) * root).transpose(0, 1)

    groups, unknowns = mean_a.shape
    # The round-off of centring is not signal: without this cut a constant input gets coefficients from noise.
    noise = count * torch.finfo(a.dtype).eps ** 2 * mean_a.square().mean(1)
    if count < unknowns:
        blocks = list(centred())
        a, r = (torch.cat([block[i] for block in blocks], 1) for i in (0, 1))
        gram = (a @ a.mT).double()
        scale = gram.diagonal(dim1=1, dim2=2).sum(1) / unknowns
        step = _solve(gram, r.double(), ridge * scale, scale <= noise).mT @ a.double()
    else:
        gram = mean_a.new_zeros(groups, unknowns, unknowns)
        cross = mean_a.new_zeros(groups, unknowns, mean_r.shape[1])
        for a, r in centred():
            gram += a.mT @ a
            cross += a.mT @ r
        scale = gram.diagonal(dim1=1, dim2=2).mean(1)
        step = _solve(gram, cross, ridge * scale, scale <= noise).mT
    return step, mean_r - (step @ mean_a[..., None])[..., 0]


def _solve(gram: Tensor, right: Tensor, ridges: Tensor, dead: Tensor) -> Tensor:
    """Return (gram + λI)⁻¹ right a group; zero where the inputs are constant."""
    if not bool(torch.isfinite(gram).all() and torch.isfinite(right).all()):
        raise NumericalError(
            "a layer's inputs on calibration data are so large that squares overflow; check the experts"
        )
    damped = gram + torch.diag_embed(torch.where(dead, torch.ones_like(ridges), ridges)[:, None].expand(gram.shape[:2]))
    solved: Tensor = torch.cholesky_solve(right, torch.linalg.cholesky(damped))
    return solved.masked_fill_(dead[:, None, None], 0)
