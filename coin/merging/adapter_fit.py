"""Adapters fitted in closed form, unit by unit, to the experts' outputs on the body's own inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coin.errors import ConfigurationError
from coin.files.tensors import State
from coin.merging.expert_sources import whole_state
from coin.merging.units import Unit, UnitRows, as_map, folded_unit
from coin.networks.adapter import Adapter, AdapterOptions, Change
from coin.networks.delta import balanced, byte_row, read_factor, round_factor
from coin.statistics.rules import Call
from coin.statistics.solvers import is_round_off, products, solve_ridge

_SHRUNK = 0.01  # of the mean variance of a unit's outputs: the ridge that draws their scales to 1
_MORE = 8  # directions beside the r wanted, in the search for singular vectors
_ITERATIONS = 4  # of this search


class AdapterFit:
    """Fits adapters while the body runs on all tasks' samples, each with the adapter of its own expert so far.

    Let a be a unit's input, y = W a + b the body's output and z expert i's, on its own task's samples. With W_i the
    expert's own map, and M = cov(a) + μI, the correction begins as the ridge regression of z − W a that is drawn to
    W_i − W,

        B = argmin E‖(W + B) a + c − z‖² + μ‖W + B − W_i‖²,

    and becomes the matrix of rank r that is closest in the norm tr(B M Bᵀ): V Vᵀ B, with V the first left singular
    vectors of B M^{1/2} (reduced-rank ridge regression). With few samples it is the singular value decomposition of
    W_i − W, weighted by the inputs, and with many the fit. V is rounded as `Adapter` keeps it, to V̂, and V̂⁺ B then. At
    last every output has a scale and a shift, by least squares, the scale drawn to 1 by 0.01 of the mean variance. A
    grouped convolution and a normalisation have these alone, a unit without a bias no shift.

    Args:
        network: The body.
        options: r (`rank`), μ (`ridge`), relative to the mean diagonal entry of cov(a), and whether there are scales
            and shifts.
        experts: The experts' parameters and buffers.
        tasks: Of which expert's task every sample is [P], in ascending order.
        row: β [N]; experts without a share have no adapters.
    """

    def __init__(
        self,
        network: nn.Module,
        options: AdapterOptions,
        experts: Sequence[tuple[State, State]],
        tasks: Tensor,
        row: Sequence[float],
    ) -> None:
        self._network = network
        self._options = options
        self._experts = [whole_state(tensors) for tensors in experts]
        self._row = row
        self.tasks = tasks
        self.adapters = [Adapter() for _ in experts]

    def fit(self, unit: Unit, call: Call, rows: UnitRows) -> Tensor:
        """Fit a unit of every expert, and return the output [P·k, …] of its call on all samples, with all adapters."""
        samples = len(rows.targets)
        rows_each = rows.inputs.shape[1] // samples  # of one sample's regression
        inputs_each = len(call.inputs) // samples  # k
        counts = torch.bincount(self.tasks, minlength=len(self._row))
        outputs = []
        first = 0
        for expert, count in enumerate(counts.tolist()):
            if count == 0:
                continue
            last = first + count
            changes: dict[str, Change] = {}
            if self._row[expert] > 0:
                moments = Moments(
                    inputs=rows.inputs[:, first * rows_each : last * rows_each],
                    wanted=rows.targets[first:last],
                    weights=rows.weights[first:last],
                    intercept=unit.shift is not None,
                )
                changes = self._changes(expert, unit, call, rows.entries, moments)
                self.adapters[expert].changes.update(changes)
            inputs = call.inputs[first * inputs_each : last * inputs_each]
            outputs.append(self._output(unit, call, inputs, changes))
            first = last
        return torch.cat(outputs)

    def _output(self, unit: Unit, call: Call, inputs: Tensor, changes: dict[str, Change]) -> Tensor:
        """Return the call's output for some of its inputs, its parameters changed as is stored."""
        weight: Tensor = self._network.get_parameter(unit.weight)
        if unit.weight in changes:
            weight = changes[unit.weight](weight)
        output = call.output(inputs, weight)
        if unit.shift is None or unit.shift not in changes:
            return output
        zeros = torch.zeros_like(self._network.get_parameter(unit.shift))
        shift = changes[unit.shift](zeros)
        return output + call.along(shift, output)

    def _changes(
        self, expert: int, unit: Unit, call: Call, entries: Tensor, moments: "Moments"
    ) -> dict[str, Change]:
        """Return an expert's changes of a unit's weight, and of the parameter that carries its bias, if there is one.

        Args:
            expert: The expert.
            unit: The unit.
            call: Its call.
            entries: The entries [K'] of the weight's rows that meet inputs.
            moments: Of the expert's own samples.
        """
        weight = self._network.get_parameter(unit.weight)
        # The body's map, then with the correction.
        fitted = columns_of(weight, unit, entries, moments)
        change = Change()
        if self._options.rank > 0 and unit.is_matrix:
            own = columns_of(self._own_weight(unit, expert), unit, entries, moments)
            damping = self._damping(unit, entries)
            outer, inner = _factors(fitted, own, damping, self._options.rank, moments)
            right = inner.new_zeros(len(inner), unit.unknowns).index_copy(1, entries, inner)
            change = Change(left=outer, right=round_factor(right, entries))
            left, right = change.factors(unit.outputs, unit.unknowns)
            fitted = fitted + right[:, entries].T.to(fitted) @ left.to(fitted)
        if not self._options.scales:
            return {unit.weight: change} if change.tensors else {}
        scale = moments.scale(fitted)  # [G·O]
        change = change._replace(scale=byte_row(scale))
        changes = {unit.weight: change}
        if unit.shift is not None:
            kept_scale = change.scales().to(scale).flatten()
            shift = moments.shift(fitted, kept_scale)
            before = self._network.get_parameter(unit.shift)
            changes[unit.shift] = Change.of(shift=shift.reshape(before.shape) - before)
        elif call.bias is not None:  # which is computed of other tensors
            raise ConfigurationError(
                f"the bias of '{unit.weight}' is no parameter, expected one for adapters"
            )
        return changes

    def _damping(self, unit: Unit, entries: Tensor) -> float:
        """Return μ relative to the mean over all inputs, zeros too, for the entries that meet inputs."""
        return self._options.ridge * len(entries) / unit.unknowns

    def _own_weight(self, unit: Unit, expert: int) -> Tensor:
        """Return an expert's own weight of a unit, the BatchNorm behind it folded in."""
        state = self._experts[expert]
        if unit.norm is not None:
            state = folded_unit(self._network, unit, state)
        return state[unit.weight]


def columns_of(weight: Tensor, unit: Unit, entries: Tensor, moments: "Moments") -> Tensor:
    """Return a weight's map, transposed, for the entries that meet inputs [G, K', O]."""
    matrix = as_map(weight, unit)
    return matrix[..., entries].mT.to(moments.cross)


def _factors(
    body: Tensor, own: Tensor, damping: float, rank: int, moments: "Moments"
) -> tuple[Tensor, Tensor]:
    """Return V̂ᵀ, the bytes of [r, O], and V̂⁺ B [r, K'], of maps that are transposed [1, K', O]."""
    vectors, best = moments.low_rank(body, own, damping, rank)  # V [O, r], B [O, K']
    outer = vectors.T
    rounded = round_factor(outer * balanced(outer, outer @ best))
    outer = read_factor(rounded, len(vectors)).to(best)
    return rounded, torch.linalg.pinv(outer.T) @ best


class Moments:
    """The first two moments of a unit's inputs a [G, n, K] and wanted outputs z [P, q, G·O], of one expert's samples.

    Args:
        inputs: a.
        wanted: z, as many rows as a.
        weights: Of the rows [P, q].
        intercept: Whether means are subtracted.
    """

    def __init__(self, inputs: Tensor, wanted: Tensor, weights: Tensor, intercept: bool) -> None:
        groups, count, unknowns = inputs.shape
        shares = (weights / weights.sum()).flatten().to(inputs)  # [n]
        flat = wanted.to(inputs).reshape(count, groups, -1)
        z = flat.transpose(0, 1)  # [G, n, O]
        self.mean_a = shares @ inputs  # [G, K]
        self.mean_z = shares @ z  # [G, O]
        if not intercept:
            self.mean_a.zero_()
            self.mean_z.zero_()
        root = shares.sqrt()[:, None]
        self._a = (inputs - self.mean_a[:, None]) * root
        self._z = (z - self.mean_z[:, None]) * root
        if intercept:  # the round-off of constant inputs is no signal
            scale = self._a.square().sum((1, 2)) / unknowns
            is_constant = is_round_off(scale, self._a, self.mean_a[:, None], shares[None])
            self._a.masked_fill_(is_constant[:, None, None], 0)
        self.cross = self._a.mT @ self._z  # [G, K, O]
        # With fewer rows products go by these.
        self._gram = products(self._a) if count >= unknowns else None

    def _times(self, x: Tensor) -> Tensor:
        """Return cov(a) x for x [G, K, m]."""
        if self._gram is None:
            return self._a.mT @ (self._a @ x)
        return self._gram @ x

    def low_rank(self, body: Tensor, own: Tensor, ridge: float, rank: int) -> tuple[Tensor, Tensor]:
        """Return V [O, r] and B [O, K] of what a body's map lacks of an expert's, Wᵀ of both [1, K, O]."""
        a = self._a
        _, unknowns, outputs = body.shape
        mean = a.square().sum((1, 2)) / unknowns
        is_constant = mean == 0  # then the difference itself is cut
        damping = (ridge * mean).masked_fill(is_constant, 1)
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
            damped = self._times(inner) + damping[:, None, None] * inner  # M Bᵀ x
            return lacking.mT @ damped

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
        """Return the scale [G·O] with which a map Wᵀ [G, K, O] gives the outputs wanted."""
        variance = (columns * self._times(columns)).sum(1)  # [G, O]
        covariance = (columns * self.cross).sum(1)
        ridge = _SHRUNK * variance.mean()
        damped = variance + ridge
        ratio = (covariance + ridge) / damped
        return ratio.where(damped > 0, 1.0).flatten()

    def shift(self, columns: Tensor, scale: Tensor) -> Tensor:
        """Return the intercept [G·O] with which a map Wᵀ [G, K, O] and these scales [G·O] give the outputs wanted."""
        means = (self.mean_a[:, None] @ columns).flatten()
        return self.mean_z.flatten() - scale * means
