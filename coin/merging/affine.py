"""One affine unit of a network refitted in closed form: weighted ridge regressions, a group at a time."""

from collections.abc import Callable, Iterable, Iterator
from math import prod

import torch
from torch import Tensor, nn

from coin.errors import NumericalError
from coin.merging.lockstep import Look
from coin.merging.rounding import Rounding
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
    looks: Iterable[Look],
    shares: Tensor,
    mixtures: Tensor,
    ridge: float,
    rounding: Rounding | None = None,
) -> None:
    """Refit one unit of a network in place, from what the networks make of the samples there.

    `mixtures` [N, P] are every sample's mixture of the experts, which is its target, and `shares` [P] its weight. With
    a `rounding` its matrix is rounded, and its bias fitted to what that leaves.
    """
    weight = network.get_parameter(unit.weight)
    shift = None if unit.shift is None else network.get_parameter(unit.shift)
    turned = False

    def rows() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        nonlocal turned
        for look in looks:
            turned = isinstance(look.call, LinearCall) and look.call.transposed
            # In a unit with a BatchNorm the shift comes behind the call.
            output = look.output
            if unit.norm is not None and shift is not None:
                convolved = isinstance(look.call, ConvolutionCall)
                output = output + (shift.view(-1, *[1] * (output.ndim - 2)) if convolved else shift)
            residual = _target(look, mixtures) - output
            yield from _rows(look.call, residual, shares[look.samples])

    def rounded(step: Tensor, metric: Tensor) -> Tensor:
        assert rounding is not None
        return rounding.step(unit.weight, weight, step, metric, turned)

    rounds = rounding is not None and rounding.takes(unit.weight)
    step, constant = fit_affine(rows(), ridge, intercept=shift is not None, change=rounded if rounds else None)
    if rounding is not None and rounds:
        weight.copy_(rounding.weight(unit.weight))
    else:
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
    rows: Iterable[tuple[Tensor, Tensor, Tensor]],
    ridge: float,
    *,
    intercept: bool = True,
    change: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the minimiser ΔW, Δb of Σ_n w_n ‖ΔW a_n + Δb − r_n‖² / Σ_n w_n + λ ‖ΔW‖², a regression a group.

    λ = ridge × the mean diagonal entry of the covariance of a, a group's own. With more unknowns than rows the system
    is solved where the rows are, ΔW = Rᵀ(A Aᵀ + λ I)⁻¹A. Rows are centred before they are multiplied; products are
    taken in their own type, added up and solved in float64.

    Args:
        rows: Inputs a [n, G, K], residuals r [n, G, O] and weights w [n], in blocks.
        ridge: Above 0.
        intercept: Whether there is a Δb; without one nothing is centred and Δb is 0.
        change: Returns what ΔW is changed to, given it and the matrix M = cov(a) + λI [G, K, K] in which a change E of
            it costs tr(E M Eᵀ); the best Δb then is.

    Returns:
        ΔW [G, O, K] and Δb [G, O], in float64.

    Raises:
        NumericalError: A row is not finite, or too large to be squared.
    """
    moments = _Moments(intercept)
    for block in rows:
        moments.add(*block)
    inputs = moments.inputs
    mean_a, mean_r = moments.mean[:, :inputs], moments.mean[:, inputs:]
    if not bool(torch.isfinite(moments.mean).all()):
        raise NumericalError("a layer's inputs or outputs on calibration data are not finite; check the experts")
    # The round-off of centring is not signal: without this cut a constant input gets coefficients from noise.
    noise = moments.count * moments.precision**2 * mean_a.square().mean(1)
    if moments.products is None:
        both = moments.centred_rows()
        a, r = both[..., :inputs], both[..., inputs:]
        gram = (a @ a.mT).double()
        scale = gram.diagonal(dim1=1, dim2=2).sum(1) / inputs
        step = _solve(gram, r.double(), ridge * scale, scale <= noise).mT @ a.double()
        gram = (a.mT @ a).double() if change is not None else gram
    else:
        covariance = moments.products / moments.mass
        gram = covariance[..., :inputs]
        scale = gram.diagonal(dim1=1, dim2=2).mean(1)
        step = _solve(gram, covariance[..., inputs:], ridge * scale, scale <= noise).mT
    if change is not None:
        step = change(step, _damped(gram, ridge * scale, scale <= noise))
    return step, mean_r - (step @ mean_a[..., None])[..., 0]


class _Moments:
    """Mean and centred products of weighted rows [a | r] that come in blocks, which may lie far apart.

    Attributes:
        count: The number of rows.
        mass: The sum of their weights.
        mean: Their mean [G, K + O], in float64; zero without an intercept.
        products: Σ w (a − mean)[a − mean | r − mean] [G, K, K + O], in float64, once there are K rows.
        kept: Until then the blocks: rows [G, n, K + O] less their own mean, times the roots [n] of their weights; that
            mean; the sum of their weights.
        inputs: K.
        precision: The relative round-off of the rows' type.
    """

    mean: Tensor
    inputs: int
    precision: float

    def __init__(self, intercept: bool) -> None:
        self._intercept = intercept
        self.count, self.mass = 0, 0.0
        self.kept: list[tuple[Tensor, Tensor, Tensor, float]] = []
        self.products: Tensor | None = None

    def add(self, a: Tensor, r: Tensor, w: Tensor) -> None:
        """Take a block: inputs [n, G, K], residuals [n, G, O], weights [n]."""
        rows, mass = torch.cat([a, r], 2), float(w.sum())
        if not self.count:
            self.inputs, self.precision = a.shape[2], torch.finfo(rows.dtype).eps
            self.mean = torch.zeros(rows.shape[1:], dtype=torch.float64, device=rows.device)
        mean = torch.zeros_like(rows[0])
        if self._intercept and mass > 0:
            mean = torch.einsum("n,ngk->gk", (w / mass).to(rows), rows)
        root = w.sqrt().to(rows)
        self.kept.append(((rows - mean).transpose(0, 1) * root[:, None], root, mean, mass))
        before, mass_before = self.mean, self.mass
        self.count += len(w)
        self.mass += mass
        if mass > 0:
            self.mean = before + mass / self.mass * (mean.double() - before)
        if self.count < self.inputs:
            return
        if self.products is None:
            self.products = self.mean.new_zeros(len(before), self.inputs, before.shape[1])
        else:
            self.products += mass_before * self._square(before)
        for block, _, mean, mass in self.kept:
            self.products += block[..., : self.inputs].mT @ block + mass * self._square(mean.double())
        self.kept = []

    def _square(self, mean: Tensor) -> Tensor:
        """Return the product of how far another mean is from the mean of all [G, K, K + O]."""
        apart = mean - self.mean
        return apart[:, : self.inputs, None] * apart[:, None]

    def centred_rows(self) -> Tensor:
        """Return the kept rows [G, n, K + O] less the mean of all, times the roots of their shares in the mass."""
        blocks = [rows + root[:, None] * (mean - self.mean.to(mean))[:, None] for rows, root, mean, _ in self.kept]
        rows: Tensor = torch.cat(blocks, 1) / self.mass**0.5
        return rows


def _solve(gram: Tensor, right: Tensor, ridges: Tensor, dead: Tensor) -> Tensor:
    """Return (gram + λI)⁻¹ right a group; zero where the inputs are constant."""
    if not bool(torch.isfinite(gram).all() and torch.isfinite(right).all()):
        raise NumericalError(
            "a layer's inputs on calibration data are so large that squares overflow; check the experts"
        )
    solved: Tensor = torch.cholesky_solve(right, torch.linalg.cholesky(_damped(gram, ridges, dead)))
    return solved.masked_fill_(dead[:, None, None], 0)


def _damped(gram: Tensor, ridges: Tensor, dead: Tensor) -> Tensor:
    """Return gram + λI a group; with λ = 1 where the inputs are constant."""
    return gram + torch.diag_embed(torch.where(dead, torch.ones_like(ridges), ridges)[:, None].expand(gram.shape[:2]))
