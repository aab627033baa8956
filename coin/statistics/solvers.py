"""Linear solvers: ridge regression from Gram matrices, and conjugate gradients for operators such as Fishers."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from coin.errors import NumericalError

_PATIENCE = 5  # iterations without a better held-out prediction after which the Krylov space grows no further
# Columns from which on a symmetric product is taken by halves: two of four blocks are each other's transposes.
_HALVES = 512


def conjugate_gradient(
    operator: Callable[[Tensor], Tensor], right: Tensor, metric: Tensor, max_steps: int, tolerance: float
) -> tuple[Tensor, list[float]]:
    """Return x ``[K]`` with A x = b, and ‖b − A x‖ / ‖b‖ at the start and after every step, by the recursion.

    Conjugate gradients from x = 0 (Hestenes and Stiefel, 1952), preconditioned with `metric`, a positive diagonal near
    A's, until that ratio is at most `tolerance`, or for `max_steps` of `operator`, v ↦ A v. A is symmetric and positive
    definite, or semidefinite with b in its range. Raises NumericalError where a curvature is not positive and finite.
    """

    def dot(left: Tensor, right: Tensor) -> float:
        return float(torch.sum(left * right, dtype=torch.float64))

    x, residual, direction = torch.zeros_like(right), right.clone(), torch.zeros_like(right)
    size, rho = math.sqrt(dot(right, right)), 1.0
    residuals = [1.0 if size else 0.0]
    while not residuals[-1] <= tolerance and len(residuals) <= max_steps:
        scaled = residual / metric
        previous, rho = rho, dot(residual, scaled)
        direction.mul_(rho / previous).add_(scaled)
        product = operator(direction)
        curvature = dot(direction, product)
        if not 0 < curvature < math.inf:
            found = f"conjugate gradients met a curvature of {curvature:.3g} at step {len(residuals)}"
            raise NumericalError(f"{found}, expected it positive and finite; raise the damping")
        x.add_(direction, alpha=rho / curvature)
        residual.sub_(product, alpha=rho / curvature)
        residuals.append(math.sqrt(dot(residual, residual)) / size)
    return x, residuals


def solve_in_sample_space(
    product: Callable[[Tensor], Tensor], residual: Tensor, training: Tensor, dampings: Tensor, max_iterations: int
) -> Tensor | None:
    """Return damped least squares for many parameters and few outputs, solved where the outputs live.

    For a residual r over P samples with C outputs each, the step δ that minimises 1/(2P) ‖r − Jδ‖² + λ/2 δᵀDδ is
    δ = D⁻¹Jᵀu with (K + λP I) u = r and K = J D⁻¹ Jᵀ, of P·C rows and columns. One vjp and one jvp multiply by K. A
    Lanczos basis of K from r serves every λ, and J may cover samples that it does not train on, so λ and the number of
    iterations are chosen on held-out samples at no extra cost.

    Source: Golub and Van Loan, *Matrix Computations*, 4th ed., sections 10.1 (Lanczos) and 11.3.

    Args:
        product: u ``[P, C]`` ↦ J D⁻¹ Jᵀ u ``[P, C]``, symmetric and positive semi-definite.
        residual: r on all samples ``[P, C]``.
        training: Which samples the solution may use ``[P]``, bool; the others, at least one, are held out.
        dampings: λ ``[K]``, positive.
        max_iterations: Largest size of the Krylov space, which stops growing earlier where that no longer helps.

    Returns the u ``[P, C]``, zero outside the training samples, with the smallest predicted Σ‖r − Jδ‖² over the
    held-out samples, if any u is predicted to help them. Raises NumericalError where a product is not finite.
    """
    r, ridges = residual.double().flatten(), dampings.double() * int(training.sum())
    fitted = training[:, None].expand_as(residual).flatten().double()
    judged, size = 1 - fitted, (r * fitted).norm()
    best, least, found_at = None, (r * judged).square().sum(), 0
    basis, images = (r * fitted / size)[None], r.new_empty(0, len(r))
    while size > 0 and len(images) < max_iterations:
        image = product(basis[-1].view_as(residual).to(residual)).double().flatten()
        if not bool(torch.isfinite(image).all()):
            raise NumericalError("a Jacobian product on the calibration data is not finite; check the experts' outputs")
        images = torch.cat([images, image[None]])
        projected = basis @ images.T
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        # Coordinates in the basis of (T + λP)⁻¹ ‖r‖e₁, one column per damping.
        columns = vectors @ (vectors[0][:, None] * size / (values.clamp_min(0)[:, None] + ridges))
        errors = ((r[:, None] - images.T @ columns).square() * judged[:, None]).sum(0)
        index = int(errors.argmin())
        if errors[index] < least:
            best, least, found_at = basis.T @ columns[:, index], errors[index], len(images)
        elif len(images) - found_at >= _PATIENCE:
            break
        following = image * fitted
        for _ in range(2):  # which is enough: one pass of Gram–Schmidt leaves what rounding put back
            following = following - basis.T @ (basis @ following)
        if following.norm() <= 1e-10 * image.norm():
            break
        basis = torch.cat([basis, following[None] / following.norm()])
    return None if best is None else best.view_as(residual).to(residual)


def damped(gram: Tensor, ridges: Tensor) -> Tensor:
    """Return gram + λI ``[G, K, K]``, with a λ for each group ``[G]``."""
    found = gram.clone()
    found.diagonal(dim1=1, dim2=2).add_(ridges[:, None])
    return found


def solve_damped(gram: Tensor, pull: Tensor, damping: float, key: str) -> Tensor:
    """Return pull (gram + λI)⁻¹ ``[G, C_out/G, K]`` with λ = damping × the mean diagonal entry, per group.

    Raises NumericalError, which names the layer, where the damped matrix ``[G, K, K]`` is as good as singular.
    """
    ridge = damping * gram.diagonal(dim1=1, dim2=2).mean(1)
    # A group whose inputs are always zero has no pull either: any matrix gives it the β-average.
    dead = gram.abs().amax((1, 2)) == 0
    matrix = damped(gram, ridge.masked_fill(dead, 1))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    # Rounding lets half of the singular matrices pass, with a last pivot that is noise.
    pivots, largest = factor.diagonal(dim1=1, dim2=2).square().amin(1), matrix.diagonal(dim1=1, dim2=2).amax(1)
    noise = 100 * torch.finfo(gram.dtype).eps * gram.shape[-1] * largest
    if bool((failed.bool() | (pivots <= noise)).any()):
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
    change: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the minimiser ΔW, Δb of Σ_n w_n ‖ΔW a_n + Δb − r_n‖² / Σ_n w_n + λ ‖ΔW‖², a regression for each group.

    λ = ridge × the mean diagonal entry of the covariance of a, a group's own. With more unknowns than rows the system
    is solved where the rows are, ΔW = Rᵀ(A Aᵀ + λ I)⁻¹A. Rows are centred before they are multiplied. All is done in
    their own type; where λ is lost in that beside the largest eigenvalue, the matrix is factored in float64.

    Args:
        inputs: a [G, n, K].
        residuals: r [G, n, O].
        shares: w [n].
        ridge: Above 0.
        intercept: Whether there is a Δb; without one nothing is centred and Δb is 0.
        change: Returns what ΔW becomes, given it and M = cov(a) + λI [G, K, K], by which a change E costs tr(E M Eᵀ).

    Returns ΔW [G, O, K] and Δb [G, O], in float64. Raises NumericalError where a row is not finite, or too large to be
    squared, or the ridge is too small.
    """
    (_, count, unknowns), precision = inputs.shape, torch.finfo(inputs.dtype).eps
    weights = (shares / shares.sum()).to(inputs)
    (a, mean_a), (r, mean_r) = (_centred(each, weights, intercept) for each in (inputs, residuals))
    if not bool(torch.isfinite(mean_a).all() and torch.isfinite(mean_r).all()):
        raise NumericalError("a layer's inputs or outputs on calibration data are not finite; check the experts")
    is_dual = count < unknowns
    gram = _products(a.mT) if is_dual else _products(a)
    scale = gram.diagonal(dim1=1, dim2=2).sum(1) / unknowns
    # The round-off of centring is not signal: without this cut a constant input gets coefficients from noise.
    dead = scale <= count * precision**2 * mean_a.square().mean(1)
    ridges = (ridge * scale).masked_fill(dead, 1)
    if is_dual:
        step = (_solve(gram, r, ridges, dead).mT @ a).double()
        gram = _products(a) if change is not None else gram
    else:
        step = _solve(gram, a.mT @ r, ridges, dead).mT.double()
    if change is not None:
        step = change(step, damped(gram.double(), ridges))
    return step, mean_r - (step @ mean_a[..., None])[..., 0]


def _centred(rows: Tensor, weights: Tensor, intercept: bool) -> tuple[Tensor, Tensor]:
    """Return rows [G, n, K] less their mean, times the roots of their weights; the mean [G, K] in float64."""
    root = weights.sqrt()[:, None]
    if intercept:
        mean = weights @ rows
        return (rows - mean[:, None]).mul_(root), mean.double()
    zero = torch.zeros(len(rows), rows.shape[2], dtype=torch.float64, device=rows.device)
    return rows * root, zero.masked_fill(~torch.isfinite(rows).all(1), torch.nan)  # for the caller to refuse


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
    root, failed = torch.linalg.cholesky_ex(damped(gram, ridges))
    if bool(failed.any()):  # a ridge that is lost beside the largest eigenvalue
        root, failed = torch.linalg.cholesky_ex(damped(gram.double(), ridges))
    if bool(failed.any()):
        raise NumericalError(
            "a layer's inputs on calibration data are too nearly dependent for this ridge; give a larger ridge"
        )
    solved: Tensor = torch.cholesky_solve(right.to(root), root)
    return solved.masked_fill_(dead[:, None, None], 0)
