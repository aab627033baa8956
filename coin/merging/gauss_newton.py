"""Gauss–Newton on the coding objective itself."""

import math

import torch
from torch import Tensor

from coin.errors import ConfigurationError, NumericalError
from coin.merging.coin import check_damping, coin_parameters
from coin.merging.inputs import MergeInputs, Requirement
from coin.merging.method import MergeMethod, check_fisher_options, floored_diagonal
from coin.merging.sample_space import solve_damped
from coin.networks.batchnorm import BatchNormPolicy
from coin.progress import Bar, progress
from coin.state import State
from coin.statistics.products import OutputMap

DAMPINGS = tuple(10.0 ** (k / 2) for k in range(-12, 13))
"""The grid of λ, 10⁻⁶ … 10⁶: the choice is free, so the grid is wide."""

_HALVINGS = 3
_HELD_OUT = 0.2


class GaussNewton(MergeMethod):
    """A few Levenberg–Marquardt steps on ½E‖f_θ − Σ_i β_i f_i‖² from the COIN point.

    Each step solves (E JᵀJ + λD) δ = E Jᵀr with r = Σβ_if_i − f_θ on the calibration samples and
    D = Σ_i β_i F_i + ridge · mean(Σ_i β_i F_i), in sample space (`solve_damped`). Nothing is tuned by hand: the
    last fifth of the calibration samples is held out (`training_mask`); λ and the number of Krylov iterations are the
    pair whose linearised prediction is best on them; a step is halved until it lowers their actual error, and the steps
    end when it falls by less than `tolerance`, or at `max_steps`. No labels, no learning rate.

    BatchNorm statistics are those of the calibration map, frozen; recalibrating them afterwards undoes part of the fit,
    so the policy is ``keep``.

    Source: Levenberg (1944) and Marquardt (1963) for the damping by the diagonal; Martens, *Deep learning via
    Hessian-free optimization* (ICML 2010), section 4, for Jacobian products and truncated solves.

    Args:
        max_steps: Largest number of steps.
        max_iterations: Largest number of Krylov iterations per step, each one vjp and one jvp over all samples.
        tolerance: Relative fall of the held-out squared error below which the steps end.
        ridge: Relative to the mean Fisher entry: how freely parameters with no Fisher at the experts may move.
        damping: Of the COIN start, see `Coin`.
        fisher_kind: Which Fisher it wants; None for the experiment's.
        fisher_data: On which data, ``own`` or ``pooled``; None for the experiment's.
        batchnorm: Policy for BatchNorm statistics.
        label: Name of this variant in results.

    Raises:
        ConfigurationError: An option is out of its range.
    """

    name = "gauss_newton"
    requires = frozenset({Requirement.FISHER, Requirement.OUTPUTS})

    def __init__(
        self,
        max_steps: int = 4,
        max_iterations: int = 15,
        tolerance: float = 0.05,
        ridge: float = 1e-2,
        *,
        damping: float = 1e-6,
        fisher_kind: str | None = None,
        fisher_data: str | None = None,
        batchnorm: BatchNormPolicy = BatchNormPolicy.keep,
        label: str | None = None,
    ) -> None:
        super().__init__(batchnorm=batchnorm, label=label)
        if max_steps < 1 or max_iterations < 1:
            raise ConfigurationError(
                f"found max_steps {max_steps} and max_iterations {max_iterations}, expected at least 1 of each"
            )
        if not 0 <= tolerance < 1:
            raise ConfigurationError(f"found tolerance {tolerance}, expected a share from 0 to below 1")
        if not (math.isfinite(ridge) and ridge > 0):
            raise ConfigurationError(f"found ridge {ridge}, expected a positive number")
        self.max_steps = max_steps
        self.max_iterations = max_iterations
        self.tolerance = tolerance
        self.ridge = ridge
        self.damping = check_damping(damping)
        self.fisher_kind, self.fisher_data = check_fisher_options(fisher_kind, fisher_data)

    def _merge(self, inputs: MergeInputs, weights: tuple[float, ...]) -> dict[str, Tensor]:
        assert inputs.fishers is not None
        assert inputs.outputs is not None
        assert inputs.expert_outputs is not None
        outputs = inputs.outputs
        parameters = coin_parameters(inputs.experts, inputs.fishers, weights, self.damping)
        metric = floored_diagonal(inputs.fishers, weights, self.ridge)
        inverse_metric = {key: tensor.reciprocal().to(parameters[key].dtype) for key, tensor in metric.items()}
        beta = inputs.expert_outputs.new_tensor(weights)
        target = torch.tensordot(beta, inputs.expert_outputs, dims=1)
        training = training_mask(target.shape[0]).to(target.device)

        residual = target - outputs.outputs(parameters)
        error = _squared(residual[~training])
        with progress(self.label, self.max_steps * self.max_iterations) as bar:
            for count in range(self.max_steps):
                bar.reach(count * self.max_iterations, f"step {count + 1} of {self.max_steps} at most")
                step = self._step(outputs, parameters, residual, training, inverse_metric, bar)
                if step is None:
                    break
                for halving in range(_HALVINGS + 1):
                    moved = {key: tensor + 0.5**halving * step[key] for key, tensor in parameters.items()}
                    moved_residual = target - outputs.outputs(moved)
                    moved_error = _squared(moved_residual[~training])
                    if moved_error < error:
                        break
                else:
                    break
                fall = 1 - moved_error / error
                parameters, residual, error = moved, moved_residual, moved_error
                if fall < self.tolerance:
                    break
        return parameters

    def _step(
        self,
        outputs: OutputMap,
        parameters: State,
        residual: Tensor,
        training: Tensor,
        inverse_metric: State,
        bar: Bar,
    ) -> dict[str, Tensor] | None:
        """Return D⁻¹Jᵀu for the best u, or None if no u is predicted to help the held-out samples."""

        def step_for(cotangent: Tensor) -> dict[str, Tensor]:
            gradient = outputs.vjp(parameters, cotangent)
            return {key: tensor * inverse_metric[key] for key, tensor in gradient.items()}

        def product(cotangent: Tensor) -> Tensor:
            bar.advance()
            return outputs.jvp(parameters, step_for(cotangent))

        choice = solve_damped(product, residual, training, residual.new_tensor(DAMPINGS), self.max_iterations)
        return step_for(choice.solution) if choice.iterations else None


def training_mask(samples: int) -> Tensor:
    """Return which of the pooled calibration samples are fitted, bool ``[P]``; the last fifth is held out.

    Pooled samples are randomly drawn and interleave their tasks evenly (`coin.data.calibration.pooled`), so the last
    ones hold the tasks in proportion, as in `Calibration.split`. Every k-th would not: with as many tasks as k it
    would hold out one task whole. At least one sample is fitted and one held out.

    Raises:
        NumericalError: There are fewer than two samples.
    """
    if samples < 2:
        raise NumericalError(
            f"found {samples} pooled calibration samples, expected at least 2: one fits, one is held out"
        )
    held_out = max(1, round(_HELD_OUT * samples))
    return torch.arange(samples) < samples - held_out


def _squared(residual: Tensor) -> float:
    return float(residual.double().square().sum())
