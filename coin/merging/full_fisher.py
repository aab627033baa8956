"""The barycentre with the whole Fisher matrices, matrix-free."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from coin.errors import CoinWarning, NumericalError
from coin.files.tensors import State
from coin.merging.average import average_parameters
from coin.merging.checks import checked
from coin.merging.closed_form import Candidate
from coin.merging.coin import Coin, check_fishers, floored_diagonal
from coin.merging.experts import Experts
from coin.progress import progress
from coin.statistics.products import OutputMap
from coin.statistics.statistic import DataChoice


class FullFisher(Coin):
    """COIN without its diagonal approximation: the barycentre of the quadratic forms with the whole Fisher matrices.

    (Σ_i β_i F_i + λD) (θ − θ̄) = Σ_i β_i F_i (θ_i − θ̄) with θ̄ the β-average, F_i = E J_iᵀJ_i the whole Fisher matrix
    of expert i on its calibration inputs, and D = Σ_i β_i diag F_i plus 10⁻³ of its mean. It is solved by conjugate
    gradients preconditioned with D, from θ̄. Parameters that no calibration sample reaches, or that an expert's
    diagonal does not have, stay at θ̄.

    Running out of iterations is a warning with the remaining residual, not an error: stopping early damps. The record
    then says ``converged: false``, as the result depends on the number of iterations. With ``fisher_data: auto`` the
    data are those that are better for `Coin`, whose closed form is tried.

    Source: arXiv 2409.01420, the quadratic form before its diagonal approximation; Tam et al., *Merging by matching
    models in task parameter subspaces* (TMLR 2024), for conjugate gradients on merging objectives.

    Args:
        damping: λ, relative to the diagonal, dimensionless, at least 0.
        max_iterations: Conjugate-gradient steps at most, each one jvp and one vjp of every expert.
        tolerance: Relative residual at which the solve ends.
        **options: Those of `Coin`.
    """

    name = "full_fisher"

    def __init__(
        self, damping: float = 1e-2, max_iterations: int = 50, tolerance: float = 1e-3, **options: Any
    ) -> None:
        super().__init__(damping, **options)
        self.max_iterations = checked("max_iterations", max_iterations, max_iterations >= 1, "at least 1")
        self.tolerance = checked("tolerance", tolerance, 0 <= tolerance < 1, "a number from 0 to below 1")

    def candidates(self, experts: Experts, row: Sequence[float]) -> Iterator[Candidate]:
        """Yield the one solution."""
        data, *others = self.available(experts)
        if others:
            coin = Coin(fisher_kind=self.fisher_kind, batchnorm=self.batchnorm)
            data = DataChoice(coin.make(experts, row).chosen["fisher_data"])
        fishers = experts.statistic(self.fisher(data))
        check_fishers(fishers, experts.parameters[0])
        diagonal = floored_diagonal(fishers, row, 1e-3)
        whole = average_parameters(experts.parameters, row)
        average, *own = ({key: each[key] for key in diagonal} for each in (whole, *experts.parameters))
        maps = [OutputMap(*pair) for pair in zip(experts.networks, experts.samples(data), strict=True)]
        metric = flat(diagonal).to(flat(average))

        def product(tangents: Sequence[Tensor]) -> Tensor:
            """Return Σ_i β_i F_i v_i."""
            parts = zip(row, maps, own, tangents, strict=True)
            found = (weight * flat(f.fisher_product(at, shaped(v, at))) for weight, f, at, v in parts if weight)
            return sum(found, torch.zeros_like(metric))

        def operator(tangent: Tensor) -> Tensor:
            advance()
            return product([tangent] * len(maps)) + self.damping * metric * tangent

        pull = product([flat(parameters) - flat(average) for parameters in own])
        with progress(self.label, self.max_iterations) as advance:
            step, residuals = conjugate_gradient(operator, pull, metric, self.max_iterations, self.tolerance)
        experts.passes += sum(each.passes for each in maps)
        steps, residual, converged = len(residuals) - 1, residuals[-1], residuals[-1] <= self.tolerance
        if not converged:
            found = f"after {steps} conjugate-gradient steps at a relative residual of {residual:.2g}"
            expected = f"expected {self.tolerance:.2g}; raise max_iterations or damping"
            warnings.warn(f"full_fisher stopped {found}, {expected}", CoinWarning, stacklevel=3)
        chosen = {"fisher_data": str(data), "converged": converged, "cg_steps": steps, "cg_residual": residual}
        yield Candidate(chosen, whole | shaped(flat(average) + step, average))


def flat(state: State) -> Tensor:
    """Return all tensors' entries as one vector ``[K]``, in the type that holds them all."""
    return torch.cat([tensor.flatten() for tensor in state.values()])


def shaped(vector: Tensor, like: State) -> dict[str, Tensor]:
    """Return a vector of `flat` as tensors again, with the names, shapes and types of others."""
    pieces = iter(torch.split(vector, [tensor.numel() for tensor in like.values()]))
    return {name: next(pieces).view_as(tensor).to(tensor.dtype) for name, tensor in like.items()}


def conjugate_gradient(
    operator: Callable[[Tensor], Tensor], right: Tensor, metric: Tensor, max_steps: int, tolerance: float
) -> tuple[Tensor, list[float]]:
    """Return x with A x = b, and ‖b − A x‖ / ‖b‖ at the start and after every step, by the recursion.

    Conjugate gradients from x = 0 (Hestenes and Stiefel, 1952), preconditioned with `metric`, a positive diagonal near
    A's. They end when that ratio is at most `tolerance`, or after `max_steps`, each of which applies `operator`,
    v ↦ A v, once. All vectors are ``[K]``; A is symmetric and positive definite, or semidefinite with b in its range.
    Raises NumericalError where the curvature along a direction is not positive and finite.
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
