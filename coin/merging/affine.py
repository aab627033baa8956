"""One affine unit of a network refitted in closed form: a weighted ridge regression for each group."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from coin.errors import NumericalError
from coin.merging.rounding import Rounding
from coin.merging.units import Unit
from coin.statistics.rules.call import Call
from coin.statistics.rules.convolution import ConvolutionCall
from coin.statistics.rules.elementwise import ElementwiseCall
from coin.statistics.rules.linear import LinearCall
from coin.statistics.sums import sum_type


def output_rows(call: Call, output: Tensor, samples: int, places: Tensor | None) -> Tensor:
    """Return a call's outputs at some positions of every sample, as rows [P·q, ·], sample by sample.

    Args:
        call: The call; its outputs have the samples along the leading dimension, or several rows of each.
        output: What it returned.
        samples: P.
        places: Which positions, int64 [P, q]; none for all.
    """
    if isinstance(call, ElementwiseCall):
        whole = (1,) * (output.ndim - 1 - len(call.shape)) + call.shape
        entries = [1 + place for place, size in enumerate(whole) if size > 1]
        positions = [place for place in range(1, output.ndim) if place not in entries]
        rows = _at(output.permute(0, *positions, *entries), len(positions), samples, places)
    else:
        last = output.movedim(1, -1) if isinstance(call, ConvolutionCall) else output
        rows = _at(last, output.ndim - 2, samples, places)
    return rows.flatten(1) if rows.ndim > 1 else rows[:, None]


def input_rows(call: Call, samples: int, places: Tensor | None) -> Tensor:
    """Return what a call's weight multiplies at the same positions [P·q, G, K], in a type to sum in."""
    if isinstance(call, ElementwiseCall):
        assert call.normalised is not None
        rows = output_rows(call, call.normalised(call.inputs), samples, places)[..., None]
    elif isinstance(call, ConvolutionCall):
        patches = call.geometry.patches(call.inputs)  # [N, *output, *kernel, C]
        rows = _at(patches, len(call.geometry.kernel), samples, places).movedim(-1, 1)
        rows = rows.reshape(len(rows), call.geometry.groups, -1).contiguous()
    else:
        rows = output_rows(call, call.inputs, samples, places)[:, None]
    return rows.to(sum_type(rows))


def _at(x: Tensor, dims: int, samples: int, places: Tensor | None) -> Tensor:
    """Return x [P·k, *positions, …], with so many dimensions of positions, at places [P, q] of these: [P·q, …]."""
    if places is None:
        return x.reshape(-1, *x.shape[1 + dims :])
    each = len(x) // samples
    row, *position = torch.unravel_index(places, (each, *x.shape[1 : 1 + dims]))
    first = each * torch.arange(samples, device=places.device)[:, None]
    return x[(first + row, *position)].flatten(0, 1)


def fit_unit(
    network: nn.Module,
    unit: Unit,
    call: Call,
    target: Tensor,
    places: Tensor | None,
    shares: Tensor,
    ridge: float,
    rounding: Rounding | None = None,
) -> None:
    """Refit a unit of a network in place, at its call in a forward pass of P samples.

    Args:
        network: The network.
        unit: The unit.
        call: The call of its map.
        target: What the unit shall return at the positions [P, q, ·].
        places: Which positions, as for `output_rows`.
        shares: The rows' weights [P, q].
        ridge: λ, relative.
        rounding: If given, the matrix is rounded, and the bias fitted to what that leaves.
    """
    weight = network.get_parameter(unit.weight)
    shift = None if unit.shift is None else network.get_parameter(unit.shift)
    turned = isinstance(call, LinearCall) and call.transposed  # the weight is [K, O]
    inputs = input_rows(call, len(shares), places)
    groups = inputs.shape[1]

    def predicted() -> Tensor:
        matrix = (weight.T if turned else weight).to(inputs).reshape(groups, -1, inputs.shape[2])
        outputs = (inputs.transpose(0, 1) @ matrix.mT).transpose(0, 1)
        added = call.bias if shift is None else shift  # the first was computed of other tensors
        return outputs if added is None else outputs + added.to(inputs).reshape(groups, -1)

    def rounded(step: Tensor, metric: Tensor) -> Tensor:
        assert rounding is not None
        return rounding.step(unit.weight, weight, step, metric, turned)

    rounds = rounding is not None and rounding.takes(unit.weight)
    residual = target.reshape(len(inputs), groups, -1).to(inputs) - predicted()
    step, constant = fit_affine(
        inputs, residual, shares.flatten(), ridge, intercept=shift is not None, change=rounded if rounds else None
    )
    if rounding is not None and rounds:
        weight.copy_(rounding.weight(unit.weight))
    else:
        flat = step.flatten(0, 1)
        weight.add_((flat.T if turned else flat).reshape(weight.shape))
    if shift is not None:
        shift.add_(constant.reshape(shift.shape))


def fit_affine(
    inputs: Tensor,
    residuals: Tensor,
    shares: Tensor,
    ridge: float,
    *,
    intercept: bool = True,
    change: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the minimiser ΔW, Δb of Σ_n w_n ‖ΔW a_n + Δb − r_n‖² / Σ_n w_n + λ ‖ΔW‖², a regression for each group.

    λ = ridge × the mean diagonal entry of the covariance of a, a group's own. With more unknowns than rows the system
    is solved where the rows are, ΔW = Rᵀ(A Aᵀ + λ I)⁻¹A. Rows are centred before they are multiplied; products are
    taken in their own type, and the system is solved in float64.

    Args:
        inputs: a [n, G, K].
        residuals: r [n, G, O].
        shares: w [n].
        ridge: Above 0.
        intercept: Whether there is a Δb; without one nothing is centred and Δb is 0.
        change: Returns what ΔW is changed to, given it and the matrix M = cov(a) + λI [G, K, K] in which a change E of
            it costs tr(E M Eᵀ); the best Δb then is.

    Returns:
        ΔW [G, O, K] and Δb [G, O], in float64.

    Raises:
        NumericalError: A row is not finite, or too large to be squared.
    """
    count, unknowns, precision = len(inputs), inputs.shape[2], torch.finfo(inputs.dtype).eps
    weights = (shares / shares.sum()).to(inputs)
    (a, mean_a), (r, mean_r) = (_centred(each, weights, intercept) for each in (inputs, residuals))
    if not bool(torch.isfinite(mean_a).all() and torch.isfinite(mean_r).all()):
        raise NumericalError("a layer's inputs or outputs on calibration data are not finite; check the experts")
    is_dual = count < unknowns
    gram = (_products(a.mT) if is_dual else _products(a)).double()
    scale = gram.diagonal(dim1=1, dim2=2).sum(1) / unknowns
    # The round-off of centring is not signal: without this cut a constant input gets coefficients from noise.
    dead = scale <= count * precision**2 * mean_a.square().mean(1)
    if is_dual:
        step = _solve(gram, r.double(), ridge * scale, dead).mT @ a.double()
        gram = _products(a).double() if change is not None else gram
    else:
        step = _solve(gram, (a.mT @ r).double(), ridge * scale, dead).mT
    if change is not None:
        step = change(step, _damped(gram, ridge * scale, dead))
    return step, mean_r - (step @ mean_a[..., None])[..., 0]


def _centred(rows: Tensor, weights: Tensor, intercept: bool) -> tuple[Tensor, Tensor]:
    """Return rows [n, G, K] less their mean, times the roots of their weights, as [G, n, K]; the mean in float64.

    Without an intercept the mean is 0, or NaN where a row is not finite.
    """
    root = weights.sqrt()[:, None, None]
    if intercept:
        mean = torch.einsum("n,ngk->gk", weights, rows)
        return (rows - mean).mul_(root).transpose(0, 1), mean.double()
    zero = torch.zeros(rows.shape[1:], dtype=torch.float64, device=rows.device)
    return (rows * root).transpose(0, 1), zero.masked_fill(~torch.isfinite(rows).all(0), torch.nan)


_HALVES = 512
"""Columns from which on a symmetric product is taken by halves: two of four blocks are each other's transposes."""


def _products(a: Tensor) -> Tensor:
    """Return aᵀa [G, K, K] for a [G, n, K]."""
    width = a.shape[2]
    if width < _HALVES:
        return a.mT @ a
    first, second = a[..., : width // 2], a[..., width // 2 :]
    across = first.mT @ second
    top, bottom = torch.cat([_products(first), across], 2), torch.cat([across.mT, _products(second)], 2)
    return torch.cat([top, bottom], 1)


def _solve(gram: Tensor, right: Tensor, ridges: Tensor, dead: Tensor) -> Tensor:
    """Return (gram + λI)⁻¹ right for each group; zero where the inputs are constant."""
    if not bool(torch.isfinite(gram).all() and torch.isfinite(right).all()):
        raise NumericalError(
            "a layer's inputs on calibration data are so large that squares overflow; check the experts"
        )
    solved: Tensor = torch.cholesky_solve(right, torch.linalg.cholesky(_damped(gram, ridges, dead)))
    return solved.masked_fill_(dead[:, None, None], 0)


def _damped(gram: Tensor, ridges: Tensor, dead: Tensor) -> Tensor:
    """Return gram + λI for each group; with λ = 1 where the inputs are constant."""
    return gram + torch.diag_embed(torch.where(dead, torch.ones_like(ridges), ridges)[:, None].expand(gram.shape[:2]))
