"""Damped least squares for many parameters and few outputs, solved where the outputs live.

For a residual r over P samples with C outputs each, the step δ that minimises

    1/(2P) ‖r − Jδ‖² + λ/2 δᵀDδ

is δ = D⁻¹Jᵀu with (K + λP I) u = r and K = J D⁻¹ Jᵀ, a matrix of P·C rows and columns, however many parameters there
are. K is never formed: one vjp and one jvp multiply by it. A Lanczos basis of K from r is the Krylov space in which
conjugate gradients preconditioned with D would move, but it serves every λ, since a damped K has the same Krylov space,
and J may cover samples that the basis does not train on: their predicted change comes with the same product, so the
damping and the number of iterations are chosen on held-out samples at no extra cost.

Source: Golub and Van Loan, *Matrix Computations*, 4th ed., sections 10.1 (Lanczos) and 11.3 (its relation to
conjugate gradients).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coin.errors import ConfigurationError, NumericalError

_BREAKDOWN = 1e-10
_PATIENCE = 5
"""Iterations without a better held-out prediction after which the basis grows no further."""


@dataclass(frozen=True)
class Choice:
    """The best of a grid of dampings and numbers of iterations, in the type and on the device of the residual.

    Attributes:
        solution: u, zero outside the training samples ``[P, C]``.
        held_out: Predicted Σ‖r − Jδ‖² over the held-out samples.
        iterations: The size of the Krylov space.
    """

    solution: Tensor
    held_out: float
    iterations: int


def solve_in_sample_space(
    product: Callable[[Tensor], Tensor], residual: Tensor, training: Tensor, dampings: Tensor, max_iterations: int
) -> Choice:
    """Return the damped solution that predicts held-out residuals best.

    Args:
        product: u ``[P, C]`` ↦ J D⁻¹ Jᵀ u ``[P, C]``, symmetric and positive semi-definite.
        residual: r on all samples ``[P, C]``.
        training: Which samples the solution may use ``[P]``, bool; the others, at least one, are held out.
        dampings: λ ``[K]``, positive.
        max_iterations: Largest size of the Krylov space, which stops growing earlier where that no longer helps.

    Raises:
        ConfigurationError: No sample is held out.
        NumericalError: A product is not finite.
    """
    if bool(training.all()):
        raise ConfigurationError("no sample is held out, expected at least one to choose the damping by")
    r = residual.to(torch.float64)
    fitted = training[:, None].to(torch.float64).expand_as(r)
    judged = 1 - fitted
    start = r * fitted
    size = start.norm()
    best = Choice(torch.zeros_like(residual), float((r * judged).square().sum()), 0)
    if size == 0:
        return best

    ridges = dampings.to(torch.float64) * int(training.sum())
    basis: list[Tensor] = [start / size]
    images: list[Tensor] = []
    while len(images) < max_iterations:
        image = product(basis[-1].to(residual)).to(torch.float64)
        if not bool(torch.isfinite(image).all()):
            raise NumericalError("a Jacobian product on the calibration data is not finite; check the experts' outputs")
        images.append(image)
        q, kq = torch.stack(basis).flatten(1), torch.stack(images).flatten(1)
        projected = q @ kq.T
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        # Coordinates in the basis of (T + λP)⁻¹ ‖r‖e₁, one column per damping.
        columns = vectors @ (vectors[0][:, None] * size / (values.clamp_min(0)[:, None] + ridges))
        left = r.flatten()[:, None] - kq.T @ columns
        errors = (left.square() * judged.flatten()[:, None]).sum(0)
        index = int(errors.argmin())
        if float(errors[index]) < best.held_out:
            solution = (q.T @ columns[:, index]).reshape(r.shape).to(residual)
            best = Choice(solution, float(errors[index]), len(images))
        elif len(images) - best.iterations >= _PATIENCE:
            break
        following = (image * fitted).flatten()
        # Twice is enough: one pass of Gram–Schmidt leaves what rounding put back.
        for _ in range(2):
            following = following - q.T @ (q @ following)
        norm = following.norm()
        if norm <= _BREAKDOWN * image.norm():
            break
        basis.append((following / norm).reshape(r.shape))
    return best
