"""Gauss–Newton on the coding objective itself."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from coin.errors import ConfigurationError
from coin.files.tensors import State
from coin.merging.coin import Coin
from coin.merging.experts import Experts, held_out_count, parameters_of
from coin.merging.method import CodedModel, Method, checked, fill, floored_diagonal, refined
from coin.merging.sample_space import solve_in_sample_space
from coin.merging.start import starting_method
from coin.networks.batchnorm import BatchNormPolicy
from coin.progress import progress
from coin.statistics import FisherKind, fisher_sums
from coin.statistics.products import OutputMap
from coin.statistics.statistic import DataChoice, Statistic

DAMPINGS = tuple(10.0 ** (k / 2) for k in range(-12, 13))
"""The grid of λ, 10⁻⁶ … 10⁶: the choice is free, so the grid is wide."""

_HALVINGS = 3


class GaussNewton(Coin):
    """A few Levenberg–Marquardt steps on ½E‖f_θ − Σ_i β_i f_i‖² from the COIN point, or from another closed form's.

    Each step solves (E JᵀJ + λD) δ = E Jᵀr with r = Σβ_if_i − f_θ on the calibration samples and
    D = F + ridge · mean(F), in sample space (`solve_in_sample_space`). F is Σ_i β_i F_i at the COIN point, whose
    Fishers are there already. Another start is made without the held-out samples, and F is its exact Fisher: what was
    refitted has other coordinates than the experts. Nothing is tuned by hand: λ and the number of Krylov iterations are
    the pair whose linearised prediction is best on the held-out fifth of the pooled calibration samples; a step is
    halved until it lowers their actual error, and the steps end when it falls by less than `tolerance`, or at
    `max_steps`. No labels, no learning rate.

    BatchNorm's statistics are those of the start, where its policy has settled them, and stay frozen: recalibrating
    them afterwards would undo part of the fit. Options that are not listed are those of `Coin`, for the COIN start.

    Source: Levenberg (1944) and Marquardt (1963) for the damping by the diagonal; Martens, *Deep learning via
    Hessian-free optimization* (ICML 2010), section 4, for Jacobian products and truncated solves.

    Args:
        max_steps: Largest number of steps.
        max_iterations: Largest number of Krylov iterations per step, each one vjp and one jvp over all samples.
        tolerance: Relative fall of the held-out squared error below which the steps end.
        ridge: Relative to the mean Fisher entry: how freely parameters with no Fisher at the experts may move.
        start: ``coin``, another closed form's name, or its ``class_path`` and ``init_args``; see `starting_method`.
        damping: Of the COIN start, see `Coin`.
    """

    name = "gauss_newton"

    def __init__(
        self,
        max_steps: int = 4,
        max_iterations: int = 15,
        tolerance: float = 0.05,
        ridge: float = 1e-2,
        *,
        start: str | dict[str, Any] = "coin",
        damping: float = 1e-6,
        fisher_kind: FisherKind | None = None,
        fisher_data: DataChoice | None = None,
        batchnorm: BatchNormPolicy = BatchNormPolicy.auto,
        label: str | None = None,
    ) -> None:
        super().__init__(damping, fisher_kind=fisher_kind, fisher_data=fisher_data, batchnorm=batchnorm, label=label)
        if max_steps < 1 or max_iterations < 1:
            raise ConfigurationError(
                f"found max_steps {max_steps} and max_iterations {max_iterations}, expected at least 1 of each"
            )
        self.max_steps, self.max_iterations = max_steps, max_iterations
        self.tolerance = checked("tolerance", tolerance, 0 <= tolerance < 1, "a share from 0 to below 1")
        self.ridge = checked("ridge", ridge, 0 < ridge < math.inf, "a positive number")
        self.start = start
        self._start: Method | None = None if start == Coin.name else starting_method(start)

    def statistics(self) -> tuple[Statistic, ...]:
        """Return the Fishers of the COIN start; another start computes its own."""
        return super().statistics() if self._start is None else ()

    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row of the code; see `Method.make`."""
        if self._start is None:
            made = super().make(experts, row)
            fishers = experts.statistic(self.fisher(DataChoice(made.chosen["fisher_data"])))
            metric = floored_diagonal(fishers, row, self.ridge)
        else:
            # What was fitted to the held-out samples would look best to them as it is.
            fitted = experts.without_held_out()
            made = self._start.make(fitted, row)
            sums = fisher_sums(made.network, fitted.pooled)
            experts.passes += fitted.passes + sums.passes
            metric = floored_diagonal([sums.mean()], [1.0], self.ridge)
        outputs = OutputMap(made.network, experts.pooled)
        begun = {key: tensor for key, tensor in parameters_of(made.network).items() if key in metric}
        parameters = self._steps(outputs, begun, experts.target(row), metric)
        experts.passes += outputs.passes
        fill(made.network, parameters)
        return refined(made, self.label)

    def _steps(self, outputs: OutputMap, parameters: State, target: Tensor, metric: State) -> State:
        """Return the parameters after all steps."""
        inverse_metric = {key: tensor.reciprocal().to(parameters[key].dtype) for key, tensor in metric.items()}
        training = training_mask(target.shape[0]).to(target.device)

        residual = target - outputs.outputs(parameters)
        error = _squared(residual[~training])
        with progress(self.label, self.max_steps * self.max_iterations) as advance:
            for _ in range(self.max_steps):
                step = self._step(outputs, parameters, residual, training, inverse_metric, advance)
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
        advance: Callable[[], None],
    ) -> dict[str, Tensor] | None:
        """Return D⁻¹Jᵀu for the best u, or None if no u is predicted to help the held-out samples."""

        def step_for(cotangent: Tensor) -> dict[str, Tensor]:
            gradient = outputs.vjp(parameters, cotangent)
            return {key: tensor * inverse_metric[key] for key, tensor in gradient.items()}

        def product(cotangent: Tensor) -> Tensor:
            advance()
            return outputs.jvp(parameters, step_for(cotangent))

        choice = solve_in_sample_space(product, residual, training, residual.new_tensor(DAMPINGS), self.max_iterations)
        return step_for(choice.solution) if choice.iterations else None


def training_mask(samples: int) -> Tensor:
    """Return which of the pooled calibration samples are fitted, bool ``[P]``: all but those of `held_out_count`."""
    return torch.arange(samples) < samples - held_out_count(samples)


def _squared(residual: Tensor) -> float:
    return float(residual.double().square().sum())
