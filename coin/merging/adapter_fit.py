"""Adapters fitted in closed form, unit by unit, to the experts' outputs on the body's own inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coin.errors import NumericalError
from coin.files.tensors import State
from coin.merging.regression import Regression
from coin.merging.units import Unit, folded_unit
from coin.networks.adapter import Adapter, AdapterOptions, Change
from coin.networks.delta import balanced, byte_row, read_factor, round_factor
from coin.statistics.rules import Call
from coin.statistics.solvers import is_round_off, products, solve_ridge

_SHRUNK = 0.01  # of the mean variance of a unit's outputs: the ridge that draws their scales to 1
_MORE = 8  # directions beside the r wanted, in the search for eigenvectors
_ITERATIONS = 4  # of this search


class AdapterFit:
    """Fits every expert's adapter, unit by unit, while the body runs on all tasks' samples.

    Each sample goes on with the adapter of its own expert so far. For one unit and one expert let a be the inputs in
    that pass, W a + b the body's outputs and z the expert's, on the expert's own samples. The adapter makes of W a + b

        s ⊙ ((W + V̂ U) a) + t,

    in three steps, each the least squares of what the steps before it leave:

    1. **The correction** V̂ U of rank r. Without a bound on the rank the best change of W would be B, the ridge
       regression of z − W a on a that is drawn to the expert's own map: with few samples B leads to the expert's
       weights, with many to the fit. Of rank r the best one is V Vᵀ B, for some V with orthonormal columns
       (`Moments.low_rank`). V is rounded as `Adapter` keeps it, to V̂. For the rounded V̂ the best right factor is no
       longer Vᵀ B but the least squares V̂⁺ B, which is U; it is rounded too.
    2. **The scales** s, one for each output of the corrected map, drawn to 1 (`Moments.scale`), then rounded.
    3. **The shifts** t, which make the means of outputs equal given the rounded scales (`Moments.shift`).

    A grouped convolution and a normalisation have s and t alone, a unit without a bias no t.

    Args:
        network: The body.
        options: r (`rank`), μ (`ridge`), and whether there are scales and shifts.
        experts: The experts' states.
        row: β [N]; experts without a share have no adapters.

    Attributes:
        adapters: The experts' adapters so far.
    """

    def __init__(
        self,
        network: nn.Module,
        options: AdapterOptions,
        experts: Sequence[State],
        row: Sequence[float],
    ) -> None:
        self._network = network
        self._options = options
        self._experts = experts
        self._row = row
        self.adapters = [Adapter() for _ in experts]

    def fit(self, unit: Unit, call: Call, regression: Regression) -> Tensor:
        """Fit a unit of every expert, and return its call's output on all samples, each with its own expert's adapter.

        The samples must lie task by task, in the order of the experts.
        """
        each = len(call.inputs) // len(regression.tasks)  # k
        first = 0
        outputs = []
        for expert, adapter in enumerate(self.adapters):
            count = int((regression.tasks == expert).sum())
            inputs = call.inputs[each * first : each * (first + count)]
            changes: dict[str, Change] = {}
            if self._row[expert] > 0:
                changes = self._changes(expert, unit, regression.part(first, count))
                adapter.changes.update(changes)
            outputs.append(self._output(unit, call, inputs, changes))
            first += count
        return torch.cat(outputs)

    def _output(self, unit: Unit, call: Call, inputs: Tensor, changes: dict[str, Change]) -> Tensor:
        """Return the call's output for some of its inputs, its parameters changed as is stored."""
        weight: Tensor = self._network.get_parameter(unit.weight)
        if unit.weight in changes:
            weight = changes[unit.weight](weight)
        output = call.output(inputs, weight)
        if unit.shift is None or unit.shift not in changes:
            return output
        nothing = torch.zeros_like(self._network.get_parameter(unit.shift))
        return output + call.along(changes[unit.shift](nothing), output)

    def _changes(self, expert: int, unit: Unit, regression: Regression) -> dict[str, Change]:
        """Return an expert's changes of a unit's weight, and of the parameter that carries its bias if there is one."""
        moments = Moments(regression, intercept=unit.shift is not None)
        weight = self._network.get_parameter(unit.weight)
        columns = unit.columns_of(weight).mT.to(moments.cross)  # Wᵀ [G, K', O]
        change = Change()
        if self._options.rank > 0 and unit.is_matrix:
            state = self._experts[expert]
            own_weight = (folded_unit(self._network, unit, state) or state)[unit.weight]
            own = unit.columns_of(own_weight).mT.to(moments.cross)
            ridge = self._options.ridge * unit.share
            vectors, best = moments.low_rank(columns, own, ridge, self._options.rank)
            change = self.correction(unit, vectors, best)
        if not self._options.scales:
            return {unit.weight: change} if change.tensors else {}
        if change.tensors:
            left, right = change.factors(unit.outputs, unit.unknowns)
            columns = columns + unit.columns_of(right).mT.to(columns) @ left.to(columns)
        scale = moments.scale(columns)
        change = change._replace(scale=byte_row(scale))
        changes = {unit.weight: change}
        if unit.shift is not None:
            shift = moments.shift(columns, change.scales().to(scale))
            before = self._network.get_parameter(unit.shift)
            changes[unit.shift] = Change.of(shift=shift - before.flatten())
        return changes

    def correction(self, unit: Unit, vectors: Tensor, best: Tensor) -> Change:
        """Return the correction V Vᵀ B as it is kept, V̂ V̂⁺ B, given V [O, r] and B [O, K']."""
        outer = vectors.T
        left = round_factor(outer * balanced(outer, outer @ best))
        rounded = read_factor(left, unit.outputs).to(best)  # V̂ᵀ [r, O]
        inner = torch.linalg.pinv(rounded.T) @ best  # V̂⁺ B [r, K']
        return Change(left=left, right=round_factor(unit.from_columns(inner), unit.columns))


class Moments:
    """The first two moments of a unit's inputs a and of the outputs z that are wanted, and what is fitted from them.

    With A the rows of a less their mean, times the roots of their weights w_n / Σw, cov(a) = AᵀA and cov(a, z) = AᵀZ.
    Where there are fewer rows than inputs K, AᵀA is not formed.

    Args:
        regression: a [G, n, K], z [G, n, O] and w.
        intercept: Whether there is a constant; without one means are taken for zero.

    Attributes:
        cross: cov(a, z) [G, K, O].

    Raises NumericalError where a or z is not finite.
    """

    def __init__(self, regression: Regression, intercept: bool) -> None:
        a = regression.inputs
        z = regression.targets.to(a)
        weights = (regression.weights / regression.weights.sum()).flatten().to(a)
        _, count, unknowns = a.shape
        self._mean_a = weights @ a  # [G, K]
        self._mean_z = weights @ z  # [G, O]
        if not intercept:
            self._mean_a.zero_()
            self._mean_z.zero_()
        root = weights.sqrt()[:, None]
        self._a = (a - self._mean_a[:, None]) * root
        self._z = (z - self._mean_z[:, None]) * root
        if intercept:  # the round-off of constant inputs is no signal
            scale = self._a.square().sum((1, 2)) / unknowns
            is_constant = is_round_off(scale, self._a, self._mean_a[:, None], weights[None])
            self._a.masked_fill_(is_constant[:, None, None], 0)
        self.cross = self._a.mT @ self._z
        if not bool(self.cross.isfinite().all()):
            raise NumericalError(
                "a layer's inputs or outputs on calibration data are not finite; check the experts"
            )
        self._gram = products(self._a) if count >= unknowns else None

    def _times(self, x: Tensor) -> Tensor:
        """Return cov(a) x for x [G, K, m]."""
        if self._gram is None:
            return self._a.mT @ (self._a @ x)
        return self._gram @ x

    def low_rank(self, body: Tensor, own: Tensor, ridge: float, rank: int) -> tuple[Tensor, Tensor]:
        """Return V [O, r] and B [O, K] of what a body's map W lacks, given Wᵀ of it and of the expert's own [1, K, O].

        B is the change of W by ridge regression of z − W a, drawn to the expert's own map W_i,

            B = argmin E‖(W + B) a + c − z‖² + μ‖W + B − W_i‖²
              = W_i − W + cov(z − W_i a, a) M⁻¹    with M = cov(a) + μI,

        by the substitution B = W_i − W + D: D minimises E‖D a + c − (z − W_i a)‖² + μ‖D‖². The objective is quadratic
        with the Hessian M, so another change B' costs

            tr((B' − B) M (B' − B)ᵀ) = ‖(B' − B) M^½‖²

        more. Among those of rank r that is least where B' M^½ is the singular value decomposition of B M^½ cut to rank
        r (Eckart and Young), which is V Vᵀ B M^½ with V the first r left singular vectors, the eigenvectors of B M Bᵀ.

        μ = ridge × the mean diagonal entry of cov(a).
        """
        a = self._a
        _, unknowns, outputs = body.shape
        mean = a.square().sum((1, 2)) / unknowns
        is_constant = mean == 0  # then the difference itself is cut
        damping = (ridge * mean).masked_fill(is_constant, 1)  # μ
        if self._gram is None:
            residual = self._z - a @ own
            step = a.mT @ solve_ridge(products(a.mT), residual, damping, is_constant)
        else:
            residual = self.cross - self._gram @ own
            step = solve_ridge(self._gram, residual, damping, is_constant)
        lacking = own + step - body  # Bᵀ [1, K, O]

        def squared(x: Tensor) -> Tensor:
            """Return B M Bᵀ x for x [1, O, m]."""
            inner = lacking @ x
            damped = self._times(inner) + damping[:, None, None] * inner
            return lacking.mT @ damped

        # By subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4).
        highest = min(unknowns, outputs)
        wanted = min(rank, highest)
        generator = torch.Generator().manual_seed(0)
        directions = min(wanted + _MORE, highest)
        basis = torch.randn(1, outputs, directions, generator=generator).to(lacking)
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(squared(basis)).Q
        _, rotation = torch.linalg.eigh(basis.mT @ squared(basis))  # ascending
        vectors = basis @ rotation[..., -wanted:]
        return vectors[0], lacking[0].T

    def scale(self, columns: Tensor) -> Tensor:
        """Return the scales s [G·O] of the outputs y = W a of a map Wᵀ [G, K, O], drawn to 1.

        s = argmin E(s y + t − z)² + ρ (s − 1)² = (cov(y, z) + ρ) / (var(y) + ρ), with ρ = 0.01 of the mean of var(y).
        """
        variance = (columns * self._times(columns)).sum(1)  # [G, O]
        covariance = (columns * self.cross).sum(1)
        ridge = _SHRUNK * variance.mean()
        damped = variance + ridge
        ratio = (covariance + ridge) / damped
        return ratio.where(damped > 0, 1.0).flatten()

    def shift(self, columns: Tensor, scale: Tensor) -> Tensor:
        """Return the shifts t = E z − s ⊙ E y [G·O] of these outputs with scales s."""
        means = (self._mean_a[:, None] @ columns).flatten()
        return self._mean_z.flatten() - scale * means
