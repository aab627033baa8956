"""Preconditioned conjugate gradients on named tensors, for symmetric positive (semi)definite operators."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coin.errors import ConfigurationError, NumericalError
from coin.files.tensors import State

Operator = Callable[[dict[str, Tensor]], State]


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients found.

    Attributes:
        solution: x.
        residuals: ‖b − A x‖ / ‖b‖ at the start and after every step, by the recursion.
        converged: Whether the last residual is at most the tolerance.
    """

    solution: dict[str, Tensor]
    residuals: list[float]
    converged: bool

    @property
    def steps(self) -> int:
        """The number of steps taken, each of which applied the operator once."""
        return len(self.residuals) - 1


def conjugate_gradient(
    operator: Operator,
    right: State,
    *,
    preconditioner: Operator | None = None,
    max_steps: int = 100,
    tolerance: float = 1e-6,
) -> Solution:
    """Solve A x = b by preconditioned conjugate gradients from x = 0 (Hestenes and Stiefel, 1952).

    Args:
        operator: v → A v, A symmetric and positive definite (semidefinite is enough for a consistent b).
        right: b.
        preconditioner: r → M⁻¹ r with M symmetric positive definite and near A; the identity if None.
        max_steps: Steps at most.
        tolerance: Stop when ‖b − A x‖ ≤ tolerance · ‖b‖.

    Raises:
        ConfigurationError: A negative number of steps or tolerance.
        NumericalError: A direction of no or negative curvature that is not yet solved, or a value that is not finite.
    """
    if max_steps < 0 or not tolerance >= 0:
        raise ConfigurationError(f"found max_steps={max_steps}, tolerance={tolerance}; expected neither to be negative")
    precondition = preconditioner or dict
    x = {name: torch.zeros_like(value) for name, value in right.items()}
    residual = {name: value.clone() for name, value in right.items()}
    scale = math.sqrt(_dot(right, right)) or 1.0
    residuals = [_finite(math.sqrt(_dot(residual, residual)) / scale, 0)]
    z = precondition(residual)
    direction = {name: value.clone() for name, value in z.items()}
    rho = _dot(residual, z)
    while residuals[-1] > tolerance and len(residuals) <= max_steps:
        product = operator(direction)
        curvature = _dot(direction, product)
        if not math.isfinite(curvature) or curvature <= 0:
            raise NumericalError(
                f"conjugate gradients met a curvature of {curvature:.3g} at step {len(residuals)}, expected it to be "
                "positive; raise the damping"
            )
        step = rho / curvature
        for name in x:
            x[name].add_(direction[name], alpha=step)
            residual[name].sub_(product[name], alpha=step)
        residuals.append(_finite(math.sqrt(_dot(residual, residual)) / scale, len(residuals)))
        z = precondition(residual)
        previous, rho = rho, _dot(residual, z)
        for name in direction:
            direction[name].mul_(rho / previous).add_(z[name])
    return Solution(x, residuals, residuals[-1] <= tolerance)


def _finite(residual: float, step: int) -> float:
    if not math.isfinite(residual):
        raise NumericalError(
            f"conjugate gradients found a residual of {residual} at step {step}, expected a finite one; check the "
            "system's right-hand side, or raise the damping"
        )
    return residual


def _dot(left: State, right: State) -> float:
    """Return the inner product, summed in float64."""
    return sum(float(torch.sum(value * right[name], dtype=torch.float64)) for name, value in left.items())
