"""The barycentre with the whole Fisher matrices, matrix-free."""

import warnings

import torch
from torch import Tensor

from coin.errors import CoinWarning, ConfigurationError
from coin.merging.coin import check_damping
from coin.merging.inputs import MergeInputs, Requirement
from coin.merging.method import MergeMethod, check_fisher_options, floored_diagonal, weighted_mean
from coin.networks.batchnorm import BatchNormPolicy
from coin.progress import progress
from coin.state import State
from coin.statistics.conjugate_gradient import conjugate_gradient


class FullFisher(MergeMethod):
    """COIN without its diagonal approximation.

    (Σ_i β_i F_i + λD) (θ − θ̄) = Σ_i β_i F_i (θ_i − θ̄) with θ̄ the β-average, F_i = E J_iᵀJ_i the whole Fisher matrix
    of expert i on its calibration inputs, and D = Σ_i β_i diag F_i plus 10⁻³ of its mean. A product with F_i is one jvp
    and one vjp; the system is solved by conjugate gradients preconditioned with D, from θ̄. What is added to D keeps it
    from dividing by the Fisher of parameters that no calibration sample reaches; those stay at θ̄.

    Running out of iterations is a warning that states the remaining residual, not an error: stopping early damps.

    Source: arXiv 2409.01420, the quadratic form before its diagonal approximation; Tam et al., *Merging by matching
    models in task parameter subspaces* (TMLR 2024), for conjugate gradients on merging objectives.

    Args:
        damping: λ, relative to the diagonal, dimensionless, at least 0.
        max_iterations: Conjugate-gradient steps at most, each one jvp and one vjp of every expert.
        tolerance: Relative residual at which the solve ends.
        fisher_kind: Which diagonal it wants; None for the experiment's.
        fisher_data: On which data, ``own`` or ``pooled``; None for the experiment's.
        batchnorm: Policy for BatchNorm statistics.
        label: Name of this variant in results.

    Raises:
        ConfigurationError: An option is out of its range.
    """

    name = "full_fisher"
    requires = frozenset({Requirement.FISHER, Requirement.EXPERT_MAPS})

    def __init__(
        self,
        damping: float = 1e-2,
        max_iterations: int = 50,
        tolerance: float = 1e-3,
        *,
        fisher_kind: str | None = None,
        fisher_data: str | None = None,
        batchnorm: BatchNormPolicy = BatchNormPolicy.average,
        label: str | None = None,
    ) -> None:
        super().__init__(batchnorm=batchnorm, label=label)
        if max_iterations < 1:
            raise ConfigurationError(f"found max_iterations {max_iterations}, expected at least 1")
        if not 0 <= tolerance < 1:
            raise ConfigurationError(f"found tolerance {tolerance}, expected a number from 0 to below 1")
        self.damping = check_damping(damping)
        self.max_iterations = max_iterations
        self.tolerance = tolerance
        self.fisher_kind, self.fisher_data = check_fisher_options(fisher_kind, fisher_data)

    def _merge(self, inputs: MergeInputs, weights: tuple[float, ...]) -> dict[str, Tensor]:
        assert inputs.fishers is not None
        assert inputs.expert_maps is not None
        experts, maps = inputs.experts, inputs.expert_maps
        average = {key: weighted_mean(experts, weights, key).to(tensor.dtype) for key, tensor in experts[0].items()}
        diagonal = floored_diagonal(inputs.fishers, weights, 1e-3)
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
            bar.advance()
            return {key: product[key] + self.damping * metric[key] * tangent[key] for key in product}

        pull = weighted_products([{key: expert[key] - average[key] for key in average} for expert in experts])
        with progress(self.label, self.max_iterations) as bar:
            solved = conjugate_gradient(
                operator,
                pull,
                preconditioner=lambda residual: {key: tensor / metric[key] for key, tensor in residual.items()},
                max_steps=self.max_iterations,
                tolerance=self.tolerance,
            )
        if not solved.converged:
            warnings.warn(
                f"full_fisher stopped after {solved.steps} conjugate-gradient steps at a relative residual of "
                f"{solved.residuals[-1]:.2g}, expected {self.tolerance:.2g}; raise max_iterations or damping",
                CoinWarning,
                stacklevel=3,
            )
        return {key: tensor + solved.solution[key] for key, tensor in average.items()}
