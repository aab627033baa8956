"""Ridge regressions, from Gram matrices and from rows."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from coin.errors import NumericalError

_HALVES = 512  # columns from which on a symmetric product is taken by halves
Changed = Callable[[Tensor, Callable[[], Tensor]], Tensor]
"""(ΔW, what makes the metric M) → what ΔW becomes."""

_MISSED = (
    1.1  # times the square of the mean that is left in centred rows: what is less is round-off
)


def damped(gram: Tensor, ridges: Tensor) -> Tensor:
    """Return gram + λI ``[G, K, K]``, with a λ for each group ``[G]``."""
    found = gram.clone()
    _diagonal(found).add_(ridges[:, None])
    return found


def _diagonal(matrices: Tensor) -> Tensor:
    """Return the diagonals [G, K] of matrices [G, K, K], a view."""
    return matrices.diagonal(dim1=1, dim2=2)


def solve_damped(gram: Tensor, pull: Tensor, damping: float, key: str) -> Tensor:
    """Return pull (gram + λI)⁻¹ ``[G, C_out/G, K]`` with λ = damping × the mean diagonal entry, per group.

    Raises NumericalError, which names the layer, where the damped matrix is as good as singular.
    """
    ridges = damping * _diagonal(gram).mean(1)
    # A group whose inputs are always zero has no pull either: any matrix gives it the β-average.
    is_zero = gram.abs().amax((1, 2)) == 0
    matrix = damped(gram, ridges.masked_fill(is_zero, 1))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    # Rounding lets half of the singular matrices pass, with a last pivot that is noise.
    smallest = _diagonal(factor).square().amin(1)
    largest = _diagonal(matrix).amax(1)
    precision = torch.finfo(gram.dtype).eps
    noise = 100 * precision * gram.shape[-1] * largest
    is_singular = failed.bool() | (smallest <= noise)
    if bool(is_singular.any()):
        raise NumericalError(
            f"the Gram matrix of '{key}' is singular with a damping of {damping:.3g}; raise the method's damping"
        )
    return torch.cholesky_solve(pull.mT, factor).mT


def fit_affine(
    inputs: Tensor,
    residuals: Tensor,
    shares: Tensor,
    ridge: float,
    *,
    intercept: bool = True,
    change: Changed | None = None,
    tasks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the minimiser ΔW, Δb of Σ_n w_n ‖ΔW a_n + Δb − r_n‖² / Σ_n w_n + λ ‖ΔW‖², a regression for each group.

    λ = ridge × the mean diagonal entry of the covariance of a, a group's own. With more unknowns than rows the system
    is solved where the rows are, ΔW = Rᵀ(A Aᵀ + λ I)⁻¹A; in the rows' type, or where λ is lost in that in float64.

    Args:
        inputs: a [G, n, K].
        residuals: r [G, n, O].
        shares: w [n].
        ridge: Above 0.
        intercept: Whether there is a Δb; without one nothing is centred and Δb is 0.
        tasks: Of which task every row is [n]: each task then has an intercept of its own, and Δb is their mean.
        change: Returns what ΔW becomes, given it and what makes M = cov(a) + λI [G, K, K]: a change E costs tr(E M Eᵀ).

    Returns ΔW [G, O, K] and Δb [G, O], in float64. Raises NumericalError where a row is not finite, or too large to be
    squared, or the ridge is too small.
    """
    _, count, unknowns = inputs.shape
    weights = (shares / shares.sum()).to(inputs)
    a, mean_a, subtracted = _centred(inputs, weights, intercept, tasks)
    r, mean_r, _ = _centred(residuals, weights, intercept, tasks)
    means = torch.cat([mean_a, mean_r], 1)
    if not bool(torch.isfinite(means).all()):
        raise NumericalError(
            "a layer's inputs or outputs on calibration data are not finite; check the experts"
        )
    has_few_rows = count < unknowns
    gram = products(a.mT) if has_few_rows else products(a)
    scale = _diagonal(gram).sum(1) / unknowns
    is_dead = scale == 0
    if intercept:
        is_dead = is_round_off(scale, a, subtracted, by_task(weights, tasks))
    ridges = (ridge * scale).masked_fill(is_dead, 1)
    if has_few_rows:
        step = solve_ridge(gram, r, ridges, is_dead).mT @ a
    else:
        step = solve_ridge(gram, a.mT @ r, ridges, is_dead).mT
    step = step.double()
    if change is not None:

        def metric() -> Tensor:
            covariance = products(a) if has_few_rows else gram
            return damped(covariance.double(), ridges)

        step = change(step, metric)
    at_mean = step @ mean_a[..., None]
    return step, mean_r - at_mean[..., 0]


def by_task(weights: Tensor, tasks: Tensor | None) -> Tensor:
    """Return weights of rows [n] as a row for each task [T, n], zero for others' rows; a single row without tasks."""
    if tasks is None:
        return weights[None]
    belongs = F.one_hot(tasks).to(weights)
    return belongs.T * weights


def is_round_off(scale: Tensor, centred: Tensor, means: Tensor, weights: Tensor) -> Tensor:
    """Return for which groups centred rows are nothing but round-off [G]: a map of these would be fitted to noise.

    Args:
        scale: The mean square of the rows' entries [G].
        centred: The rows less their task's mean, times the roots of their weights [G, n, K].
        means: What was subtracted [G, T, K].
        weights: Those of `by_task` [T, n].
    """
    count = centred.shape[1]
    tiny = torch.finfo(weights.dtype).tiny
    shares = weights.sum(1, keepdim=True).clamp(min=tiny)  # [T, 1]
    # A mean of n numbers is off by up to n times the precision. What it is off by is the mean that is left.
    left = weights.sqrt() @ centred  # [G, T, K]
    missed = left.square() / shares
    squares = means.double().square() * shares
    size = squares.sum(1).mean(1)
    precision = torch.finfo(centred.dtype).eps
    rounding = count * precision**2 * size
    left_over = _MISSED * missed.sum(1).mean(1)
    return scale <= rounding + left_over


def _centred(
    rows: Tensor,
    weights: Tensor,
    intercept: bool,
    tasks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows [G, n, K] less their task's mean, times the roots of their weights; their mean; what was subtracted.

    The mean is [G, K] in float64, what was subtracted [G, T, K], a mean for each task.
    """
    root = weights.sqrt()[:, None]
    mean = weights @ rows  # not finite where a row is not
    if not intercept:
        nothing = 0 * mean
        return rows * root, nothing.double(), nothing[:, None]
    if tasks is None:
        means = mean[:, None]
        centred = rows - means
    else:
        own = by_task(weights, tasks)
        tiny = torch.finfo(rows.dtype).tiny
        shares = own.sum(1, keepdim=True).clamp(min=tiny)
        means = own @ rows / shares
        centred = rows - means[:, tasks]
    return centred.mul_(root), mean.double(), means


def products(a: Tensor) -> Tensor:
    """Return aᵀa [G, K, K] for a [G, n, K]; of a wide one two of four blocks are each other's transposes."""
    width = a.shape[2]
    if width < _HALVES:
        return a.mT @ a
    first = a[..., : width // 2]
    second = a[..., width // 2 :]
    across = first.mT @ second
    top = torch.cat([products(first), across], 2)
    bottom = torch.cat([across.mT, products(second)], 2)
    return torch.cat([top, bottom], 1)


def solve_ridge(gram: Tensor, right: Tensor, ridges: Tensor, is_dead: Tensor) -> Tensor:
    """Return (gram + λI)⁻¹ right for each group; zero where the inputs are constant."""
    finite = torch.isfinite(gram).all() & torch.isfinite(right).all()
    matrix = damped(gram, ridges)
    root, failed = torch.linalg.cholesky_ex(matrix)
    is_finite, has_failed = torch.stack([finite, failed.any()]).tolist()  # a GPU is waited for once
    if not is_finite:
        raise NumericalError(
            "a layer's inputs on calibration data are so large that squares overflow; check the experts"
        )
    if has_failed:  # in float64 the ridge is not lost beside the largest eigenvalue
        matrix = damped(gram.double(), ridges)
        root, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed.any()):
            raise NumericalError(
                "a layer's inputs on calibration data are too nearly dependent for this ridge; give a larger ridge"
            )
    solution = torch.cholesky_solve(right.to(root), root)
    return solution.masked_fill_(is_dead[:, None, None], 0)
