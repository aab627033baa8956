"""Gauss–Newton on the coding objective itself, each step solved in the space of the samples' outputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coin.core.choices import check_integer, check_number
from coin.core.progress import progress
from coin.files.tensors import State
from coin.merging.closed_form import refined
from coin.merging.coin import Coin, floored_diagonal
from coin.merging.experts import Experts
from coin.merging.method import CodedModel, Method, fill, starting_method
from coin.networks.experts import parameters_of
from coin.statistics import fisher_sums
from coin.statistics.products import OutputMap
from coin.statistics.solvers import solve_in_sample_space
from coin.statistics.statistic import DataChoice, Statistic

DAMPINGS = tuple(10.0 ** (k / 2) for k in range(-12, 13))  # λ, 10⁻⁶ … 10⁶: trying more costs nothing


class GaussNewton(Coin):
    """A few Levenberg–Marquardt steps on ½E‖f_θ − Σ_i β_i f_i‖² from the COIN point, or from another closed form's.

    Each step solves (E JᵀJ + λD) δ = E Jᵀr with r = Σβ_if_i − f_θ on the calibration samples and
    D = F + ridge · mean(F), in sample space (`solve_in_sample_space`). F is Σ_i β_i F_i at the COIN point; another
    start is made without the held-out samples, and F is its exact Fisher. λ and the number of Krylov iterations are the
    pair whose linearised prediction is best on the held-out fifth of the pooled calibration samples; a step is halved
    until it lowers their actual error, and the steps end when it falls by less than `tolerance`, or at `max_steps`. No
    labels, no learning rate. BatchNorm's statistics stay the start's.

    Source: Levenberg (1944) and Marquardt (1963) for the damping by the diagonal; Martens, *Deep learning via
    Hessian-free optimization* (ICML 2010), section 4, for Jacobian products and truncated solves.

    Args:
        max_steps: Largest number of steps.
        max_iterations: Largest number of Krylov iterations per step, each one vjp and one jvp over all samples.
        tolerance: Relative fall of the held-out squared error below which the steps end.
        ridge: Relative to the mean Fisher entry: how freely parameters with no Fisher at the experts may move.
        start: ``coin``, another closed form's name, or its ``class_path`` and ``init_args``; see `starting_method`.
        **options: Those of `Coin`, for the COIN start.

    >>> coin.merge_networks(coin.GaussNewton(), experts, code, calibration=inputs)
    [Linear(in_features=4, out_features=3, bias=True)]
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
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_integer("max_steps", max_steps, 1)
        check_integer("max_iterations", max_iterations, 1)
        check_number("tolerance", tolerance, low=0, high=1)
        check_number("ridge", ridge, low=0, strict=True)
        self.max_steps, self.max_iterations, self.tolerance = max_steps, max_iterations, tolerance
        self.ridge, self.start = ridge, start
        self._start: Method | None = None if start == Coin.name else starting_method(start)

    def statistics(self) -> tuple[Statistic, ...]:
        """Return the Fishers of the COIN start; another start computes its own."""
        return super().statistics() if self._start is None else ()

    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row of the code; see `Method.make`."""
        if self._start is None:
            made = super().make(experts, row)
            fishers, weights = experts.statistic(self.fisher(DataChoice(made.chosen["fisher_data"]))), row
        else:
            # What was fitted to the held-out samples would look best to them as it is.
            without = Experts(experts.networks, calibration=experts.fitted(DataChoice.own))
            made = self._start.make(without, row)
            sums = fisher_sums(made.network, without.pooled)
            experts.passes += without.passes + sums.passes
            fishers, weights = [sums.mean()], [1.0]
        metric = floored_diagonal(fishers, weights, self.ridge)
        outputs = OutputMap(made.network, experts.pooled)
        begun = {key: tensor for key, tensor in parameters_of(made.network).items() if key in metric}
        fitted = experts.split[0].num_samples
        parameters = self._steps(outputs, begun, experts.target(row), fitted, metric)
        experts.passes += outputs.passes
        fill(made.network, parameters)
        return refined(made, self.label)

    def _steps(self, outputs: OutputMap, parameters: State, target: Tensor, fitted: int, metric: State) -> State:
        """Return the parameters after all steps, which are fitted to the first so many samples."""
        metric = {key: metric[key].to(tensor.dtype) for key, tensor in parameters.items()}

        def step_for(cotangent: Tensor) -> dict[str, Tensor]:
            """Return D⁻¹Jᵀu where the parameters are by then."""
            return {key: tensor / metric[key] for key, tensor in outputs.vjp(parameters, cotangent).items()}

        def product(cotangent: Tensor) -> Tensor:
            advance()
            return outputs.jvp(parameters, step_for(cotangent))

        def squared(residual: Tensor) -> float:
            return float(residual[~training].double().square().sum())

        training = torch.arange(len(target), device=target.device) < fitted
        residual, dampings = target - outputs.outputs(parameters), target.new_tensor(DAMPINGS)
        error = squared(residual)
        with progress(self.label, self.max_steps * self.max_iterations) as advance:
            for _ in range(self.max_steps):
                best = solve_in_sample_space(product, residual, training, dampings, self.max_iterations)
                step = {} if best is None else step_for(best)
                for length in (1, 0.5, 0.25, 0.125) if step else ():
                    moved = {key: tensor + length * step[key] for key, tensor in parameters.items()}
                    left = target - outputs.outputs(moved)
                    if squared(left) < error:
                        break
                else:
                    break
                before, error, parameters, residual = error, squared(left), moved, left
                if 1 - error / before < self.tolerance:
                    break
        return parameters
