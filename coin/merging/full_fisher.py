"""The barycentre with the whole Fisher matrices, matrix-free."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from coin.errors import CoinWarning
from coin.files.tensors import State
from coin.merging.average import average_parameters
from coin.merging.coin import Coin, check_fishers, floored_diagonal
from coin.merging.experts import Experts
from coin.merging.method import Candidate, checked
from coin.progress import progress
from coin.statistics.conjugate_gradient import Solution, conjugate_gradient
from coin.statistics.products import OutputMap
from coin.statistics.statistic import DataChoice


class FullFisher(Coin):
    """COIN without its diagonal approximation: the barycentre of the quadratic forms with the whole Fisher matrices.

    (Σ_i β_i F_i + λD) (θ − θ̄) = Σ_i β_i F_i (θ_i − θ̄) with θ̄ the β-average, F_i = E J_iᵀJ_i the whole Fisher matrix
    of expert i on its calibration inputs, and D = Σ_i β_i diag F_i plus 10⁻³ of its mean. A product with F_i is one jvp
    and one vjp; the system is solved by conjugate gradients preconditioned with D, from θ̄. What is added to D keeps it
    from dividing by the Fisher of parameters that no calibration sample reaches; those stay at θ̄, and so do
    parameters that an expert's diagonal does not have.

    Running out of iterations is a warning that states the remaining residual, not an error: stopping early damps. What
    was chosen then says ``converged: false``, since a result that depends on the number of iterations is not the
    barycentre's. With ``fisher_data: auto`` the data are those that are better for `Coin`, whose closed form is tried.

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
        pairs = zip(experts.networks, experts.samples(data), strict=True)
        maps = [OutputMap(network, samples) for network, samples in pairs]
        parameters, solved = self._solve(experts.parameters, fishers, maps, row)
        experts.passes += sum(each.passes for each in maps)
        if not solved.converged:
            warnings.warn(
                f"full_fisher stopped after {solved.steps} conjugate-gradient steps at a relative residual of "
                f"{solved.residuals[-1]:.2g}, expected {self.tolerance:.2g}; raise max_iterations or damping",
                CoinWarning,
                stacklevel=3,
            )
        solve = {"converged": solved.converged, "cg_steps": solved.steps, "cg_residual": solved.residuals[-1]}
        yield {"fisher_data": str(data)} | solve, parameters

    def _solve(
        self, experts: Sequence[State], fishers: Sequence[State], maps: Sequence[OutputMap], weights: Sequence[float]
    ) -> tuple[dict[str, Tensor], Solution]:
        """Return the barycentre of the quadratic forms with the whole Fisher matrices, and how its solve ended."""
        whole = average_parameters(experts, weights)
        diagonal = floored_diagonal(fishers, weights, 1e-3)
        average = {key: whole[key] for key in diagonal}
        experts = [{key: expert[key] for key in diagonal} for expert in experts]
        metric = {key: tensor.to(average[key].dtype) for key, tensor in diagonal.items()}

        def weighted_products(tangents: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            total = {key: torch.zeros_like(tensor) for key, tensor in average.items()}
            for expert, outputs, weight, tangent in zip(experts, maps, weights, tangents, strict=True):
                if weight > 0:
                    for key, product in outputs.fisher_product(expert, tangent).items():
                        total[key].add_(product, alpha=weight)
            return total

        def operator(tangent: dict[str, Tensor]) -> State:
            product = weighted_products([tangent] * len(experts))
            advance()
            return {key: product[key] + self.damping * metric[key] * tangent[key] for key in product}

        pull = weighted_products([{key: expert[key] - average[key] for key in average} for expert in experts])
        with progress(self.label, self.max_iterations) as advance:
            solved = conjugate_gradient(
                operator,
                pull,
                preconditioner=lambda residual: {key: tensor / metric[key] for key, tensor in residual.items()},
                max_steps=self.max_iterations,
                tolerance=self.tolerance,
            )
        return whole | {key: tensor + solved.solution[key] for key, tensor in average.items()}, solved
