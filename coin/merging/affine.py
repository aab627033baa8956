"""One affine unit of a network refitted in closed form: weighted ridge regressions, a group at a time."""

from collections.abc import Callable, Iterable, Iterator
from math import prod

import torch
from torch import Tensor, nn

from coin.errors import NumericalError
from coin.merging.lockstep import Look
from coin.merging.units import Unit
from coin.statistics.gram import patches_of
from coin.statistics.rules.call import Call
from coin.statistics.rules.convolution import ConvolutionCall
from coin.statistics.rules.elementwise import ElementwiseCall
from coin.statistics.rules.linear import LinearCall
from coin.statistics.sums import sum_type


def fit_unit(
    network: nn.Module,
    unit: Unit,
    looks: Callable[[], Iterator[Look]],
    shares: Tensor,
    mixtures: Tensor,
    ridge: float,
) -> None:
    """Refit one unit of a network in place, from what the networks make of the samples there.

    `mixtures` [N, P] are every sample's mixture of the experts, which is its target, and `shares` [P] its weight.
    """
    weight = network.get_parameter(unit.weight)
    shift = None if unit.shift is None else network.get_parameter(unit.shift)
    turned = False

    def rows() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        nonlocal turned
        for look in looks():
            turned = isinstance(look.call, LinearCall) and look.call.transposed
            # In a unit with a BatchNorm the shift comes behind the call.
            output = look.output
            if unit.norm is not None and shift is not None:
                convolved = isinstance(look.call, ConvolutionCall)
                output = output + (shift.view(-1, *[1] * (output.ndim - 2)) if convolved else shift)
            residual = _target(look, mixtures) - output
            yield from _rows(look.call, residual, shares[look.samples])

    step, constant = fit_affine(rows, ridge, intercept=shift is not None)
    flat = step.flatten(0, 1)
    weight.add_((flat.T if turned else flat).reshape(weight.shape))
    if shift is not None:
        shift.add_(constant.reshape(shift.shape))


def _target(look: Look, mixtures: Tensor) -> Tensor:
    """Return what the unit is to give, of the output's shape."""
    target = torch.zeros_like(look.output)
    count = look.samples.stop - look.samples.start
    by_sample = target.view(count, -1, *target.shape[1:])
    for each, place, mixture in zip(look.targets, look.places, mixtures[:, look.samples], strict=True):
        if each is not None:
            share = mixture[place].to(target).view(-1, *[1] * (by_sample.ndim - 1))
            by_sample[place] += share * each.reshape(len(place), *by_sample.shape[1:])
    return target


def _rows(call: Call, residual: Tensor, shares: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield a unit's inputs [n, G, K], residuals [n, G, O] and weights [n] at all positions, in blocks."""
    residual = residual.to(sum_type(residual))
    if isinstance(call, ElementwiseCall):
        assert call.normalised is not None
        inputs: Iterable[Tensor] = [_entries(call.normalised(call.inputs), call.shape)]
        residual = _entries(residual, call.shape)
    else:
        assert isinstance(call, LinearCall)
        inputs = patches_of(call)
        residual = residual.movedim(1, -1) if isinstance(call, ConvolutionCall) else residual
        groups = call.geometry.groups if isinstance(call, ConvolutionCall) else 1
        residual = residual.reshape(-1, groups, residual.shape[-1] // groups)
    weights = shares.to(residual.device).repeat_interleave(len(residual) // len(shares))
    start = 0
    for piece in inputs:
        end = start + len(piece)
        yield piece.to(residual), residual[start:end], weights[start:end]
        start = end


def _entries(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return x [N, …] as [N · positions, entries, 1] for a parameter that is broadcast over x[n] in this shape."""
    whole = (1,) * (x.ndim - 1 - len(shape)) + shape
    entries = [1 + place for place, size in enumerate(whole) if size > 1]
    positions = [place for place in range(1, x.ndim) if place not in entries]
    return x.permute(0, *positions, *entries).reshape(-1, max(1, prod(shape)), 1)


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
