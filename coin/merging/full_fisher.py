"""The barycentre with the whole Fisher matrices, matrix-free."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from coin.core.choices import check_integer, check_number
from coin.core.progress import progress
from coin.errors import CoinWarning
from coin.files.tensors import flat, shaped
from coin.merging.average import average_parameters
from coin.merging.closed_form import Candidate
from coin.merging.coin import Coin, check_fishers, floored_diagonal
from coin.merging.experts import Experts
from coin.statistics.products import OutputMap
from coin.statistics.solvers import conjugate_gradient
from coin.statistics.statistic import DataChoice


class FullFisher(Coin):
    """COIN without its diagonal approximation: the barycentre of the quadratic forms with the whole Fisher matrices.

    (Σ_i β_i F_i + λD) (θ − θ̄) = Σ_i β_i F_i (θ_i − θ̄) with θ̄ the β-average, F_i = E J_iᵀJ_i the whole Fisher matrix
    of expert i on its calibration inputs, and D = Σ_i β_i diag F_i plus 10⁻³ of its mean. It is solved by conjugate
    gradients preconditioned with D, from θ̄. What no sample reaches, or an expert's diagonal lacks, stays there.

    Running out of iterations is a warning, not an error: stopping early damps. The record then says
    ``converged: false``. With ``fisher_data: auto`` the data are those that are better for `Coin`.

    Source: arXiv 2409.01420, the quadratic form before its diagonal approximation; Tam et al., *Merging by matching
    models in task parameter subspaces* (TMLR 2024), for conjugate gradients on merging objectives.

    Args:
        damping: λ, relative to the diagonal, dimensionless, at least 0.
        max_iterations: Conjugate-gradient steps at most, each one jvp and one vjp of every expert.
        tolerance: Relative residual at which the solve ends.
        **options: Those of `Coin`.

    >>> coin.merge_networks(coin.FullFisher(), experts, code, calibration=inputs).chosen[0]["converged"]
    True
    """

    name = "full_fisher"

    def __init__(
        self, damping: float = 1e-2, max_iterations: int = 50, tolerance: float = 1e-3, **options: Any
    ) -> None:
        super().__init__(damping, **options)
        check_integer("max_iterations", max_iterations, 1)
        check_number("tolerance", tolerance, low=0, high=1)
        self.max_iterations, self.tolerance = max_iterations, tolerance

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
