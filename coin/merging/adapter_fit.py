"""Adapters fitted in closed form, unit by unit, to the experts' outputs on the body's own inputs."""

import math
from collections import ChainMap
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from coin.errors import ConfigurationError, NumericalError
from coin.files.tensors import State
from coin.merging.units import Unit, UnitRows, folded_unit
from coin.networks.adapter import Adapter, AdapterOptions
from coin.networks.delta import Rounded, nearest, quantise
from coin.networks.kept import BITS, Change
from coin.statistics.rules import Call
from coin.statistics.rules.linear import LinearCall
from coin.statistics.solvers import is_round_off, products, solve_ridge

_SHRUNK = 0.01  # of the mean variance of a unit's outputs: the ridge that draws their scales to 1
_MORE, _ITERATIONS = 8, 4  # directions beside the r wanted, and iterations, of the search for singular vectors


def rank_of(options: AdapterOptions, units: Sequence[Unit], count: int) -> int:
    """Return the rank for the units of so many experts; a ConfigurationError where not even rank 0 fits."""
    if options.rank is not None:
        return options.rank
    assert options.memory_mib is not None
    most = max((min(unit.outputs, unit.unknowns) for unit in units), default=0)
    sizes = [count * sum(_nbytes(unit, rank) for unit in units) / 2**20 for rank in range(most + 1)]
    if sizes[0] > options.memory_mib:
        found = f"found memory_mib={options.memory_mib:g} for the adapters of {count} experts"
        raise ConfigurationError(f"{found}, expected at least {sizes[0]:.3g}, which scales and biases take")
    return max(rank for rank, size in enumerate(sizes) if size <= options.memory_mib)


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
        rank: r.
        ridge: μ, relative to the mean diagonal entry of cov(a).
        experts: The experts' parameters and buffers.
        tasks: Of which expert's task every sample is [P], in ascending order.
        row: β [N]; experts without a share have no adapters.
    """

    def __init__(
        self, rank: int, ridge: float, experts: Sequence[tuple[State, State]], tasks: Tensor, row: Sequence[float]
    ) -> None:
        self._rank, self._ridge = rank, ridge
        self._experts, self.tasks = experts, tasks
        self._sound: list[Tensor] = []  # whether what was fitted is finite: a GPU is waited for once, in `check`
        self._fitted: list[str] = []
        self.adapters = [Adapter() for _ in experts]
        ends = torch.bincount(tasks, minlength=len(experts)).cumsum(0).tolist()
        self._samples = [slice(start, end) for start, end in pairwise([0, *ends])]  # of every task
        self._has_share = [beta > 0 and own.start < own.stop for beta, own in zip(row, self._samples, strict=True)]

    def fit(
        self,
        network: nn.Module,
        unit: Unit,
        call: Call,
        rows: UnitRows,
        function: Callable[[], Tensor],
    ) -> Tensor:
        """Fit the unit of every expert, and return the call's output [P·k, …] with all adapters.

        Args:
            network: The body.
            unit: One of its units.
            call: The unit's call on all samples.
            rows: Inputs and wanted outputs of the unit.
            function: Returns the output without adapters.
        """
        samples = len(rows.targets)
        rows_each = rows.inputs.shape[1] // samples  # of one sample's regression
        inputs_each = len(call.inputs) // samples  # k
        weight = network.get_parameter(unit.weight)
        plain: Tensor | None = None  # the output without adapters
        outputs = []
        for expert, own in enumerate(self._samples):
            own_inputs = slice(own.start * inputs_each, own.stop * inputs_each)
            if not self._has_share[expert]:
                plain = function() if plain is None else plain
                outputs.append(plain[own_inputs])
                continue
            own_rows = slice(own.start * rows_each, own.stop * rows_each)
            moments = Moments(rows.inputs[:, own_rows], rows.targets[own], rows.weights[own], unit.shift is not None)
            fitted = _UnitFit(network, unit, call, rows.entries, moments)
            change, shift = fitted.changes(self._own(network, unit, expert), self._rank, self._ridge)
            self._sound.append(fitted.is_finite)
            self._fitted.append(unit.weight)
            output = call.output(call.inputs[own_inputs], change(weight))  # with factors as they are stored
            self.adapters[expert].changes[unit.weight] = change
            if unit.shift is not None:
                self.adapters[expert].changes[unit.shift] = shift
                zeros = torch.zeros_like(network.get_parameter(unit.shift))
                output = output + call.along(shift(zeros), output)
            outputs.append(output)
        return torch.cat(outputs)

    def check(self) -> None:
        """Raise NumericalError where an adapter is not finite."""
        if not self._sound:
            return
        for weight, is_sound in zip(self._fitted, torch.stack(self._sound).tolist(), strict=True):
            if not is_sound:
                raise NumericalError(f"the adapter of '{weight}' is not finite; check the experts")

    def _own(self, network: nn.Module, unit: Unit, expert: int) -> Tensor:
        """Return an expert's own weight of a unit, the BatchNorm behind it folded in."""
        state: State = ChainMap(*cast(Any, self._experts[expert]))  # never written to
        return state[unit.weight] if unit.norm is None else folded_unit(network, unit, state)[unit.weight]


class _UnitFit:
    """The fit of one expert's adapter of one unit."""

    def __init__(self, network: nn.Module, unit: Unit, call: Call, entries: Tensor, moments: "Moments") -> None:
        self._network, self._unit, self._call = network, unit, call
        self._entries, self._moments = entries, moments
        self._weight = network.get_parameter(unit.weight)
        self._is_turned = isinstance(call, LinearCall) and call.transposed  # the weight is [K, O]
        self.is_finite = torch.tensor(True)

    def changes(self, own: Tensor, rank: int, ridge: float) -> tuple[Change, Change]:
        """Return the change of a unit's weight, and that of the parameter that carries its bias.

        Args:
            own: The expert's own weight.
            rank: r.
            ridge: μ, relative.
        """
        fitted = self._columns(self._weight)  # the adapted map, transposed [G, K', O]
        outer = inner = None
        if rank and self._unit.is_matrix:
            outer, inner = self._factors(fitted, self._columns(own), rank, ridge)
            fitted = fitted + inner.dense().to(fitted).T @ outer.dense().to(fitted)
            inner = self._with_all_entries(inner)
        scale, shift = self._moments.scaled(fitted)  # [G·O] both
        scale = scale.reshape(self._shape_of_scale())
        left, right = (inner, outer) if self._is_turned else (outer, inner)
        change = Change.of(scale, left=left, right=right)
        carries = self._change_of_bias(shift)
        kept = [each for each in (fitted, change.scale, carries.shift) if each is not None]
        self.is_finite = torch.stack([torch.isfinite(each).all() for each in kept]).all()
        return change, carries

    def _columns(self, weight: Tensor) -> Tensor:
        """Return a weight's map, transposed, for the inputs that are not always zero [G, K', O]."""
        groups = len(self._moments.mean_a)
        flat = (weight.T if self._is_turned else weight).reshape(groups, -1, self._unit.unknowns)
        return flat[..., self._entries].mT.to(self._moments.cross)

    def _factors(self, body: Tensor, own: Tensor, rank: int, ridge: float) -> tuple[Rounded, Rounded]:
        """Return V̂ᵀ [r, O] and V̂⁺ B [r, K'] in few bits, of maps that are transposed [1, K', O]."""
        damping = ridge * len(self._entries) / self._unit.unknowns
        vectors, best = self._moments.low_rank(body, own, damping, rank)  # V [O, r], B [O, K']
        outer = quantise(vectors.T.contiguous(), BITS)
        inverse = torch.linalg.pinv(outer.dense().to(best).T)  # of what V became [r, O]
        return outer, quantise((inverse @ best).contiguous(), BITS)

    def _with_all_entries(self, inner: Rounded) -> Rounded:
        """Return a factor [r, K'] with all entries [r, K]: those that meet no input get the code next to zero."""
        zeros = inner.scale.new_zeros(len(inner.codes), self._unit.unknowns).float()
        codes = nearest(zeros, inner.scale, BITS)
        return inner._replace(codes=codes.index_copy(1, self._entries, inner.codes))

    def _shape_of_scale(self) -> Sequence[int]:
        """Return the shape in which one scale for each output is multiplied with the weight."""
        if not isinstance(self._call, LinearCall):
            return self._weight.shape
        if self._is_turned:
            return (1, -1)
        return (-1, *[1] * (self._weight.ndim - 1))

    def _change_of_bias(self, shift: Tensor) -> Change:
        """Return the change of the parameter that carries the bias, which becomes a shift [G·O]; none without one."""
        if self._unit.shift is not None:
            before = self._network.get_parameter(self._unit.shift)
            return Change.of(shift=shift.reshape(before.shape) - before)
        if self._call.bias is not None:  # which is computed of other tensors
            raise ConfigurationError(f"the bias of '{self._unit.weight}' is no parameter, expected one for adapters")
        return Change()


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
        weights = (weights / weights.sum()).flatten().to(inputs)  # [n]
        z = wanted.to(inputs).reshape(count, groups, -1).transpose(0, 1)  # [G, n, O]
        self.mean_a = weights @ inputs * float(intercept)  # [G, K]
        self.mean_z = weights @ z * float(intercept)  # [G, O]
        root = weights.sqrt()[:, None]
        self._a = (inputs - self.mean_a[:, None]) * root
        self._z = (z - self.mean_z[:, None]) * root
        if intercept:  # the round-off of constant inputs is no signal
            scale = self._a.square().sum((1, 2)) / unknowns
            constant = is_round_off(scale, self._a, self.mean_a[:, None], weights[None])
            self._a.masked_fill_(constant[:, None, None], 0)
        self.cross = self._a.mT @ self._z  # [G, K, O]
        self._gram = products(self._a) if count >= unknowns else None  # with fewer rows products go by these

    def _times(self, x: Tensor) -> Tensor:
        """Return cov(a) x for x [G, K, m]."""
        if self._gram is None:
            return self._a.mT @ (self._a @ x)
        return self._gram @ x

    def low_rank(self, body: Tensor, own: Tensor, ridge: float, rank: int) -> tuple[Tensor, Tensor]:
        """Return V [O, r] and B [O, K] of what a body's map lacks of an expert's, Wᵀ of both [1, K, O]."""
        a = self._a
        unknowns, outputs = body.shape[1:]
        mean = a.square().sum((1, 2)) / unknowns
        dead = mean == 0  # inputs that do not change: then the difference itself is cut
        damping = (ridge * mean).masked_fill(dead, 1)
        if self._gram is None:
            step = a.mT @ solve_ridge(products(a.mT), self._z - a @ own, damping, dead)
        else:
            step = solve_ridge(self._gram, self.cross - self._gram @ own, damping, dead)
        best = own + step - body  # Bᵀ [1, K, O]
        most = min(unknowns, outputs)
        generator = torch.Generator().manual_seed(0)
        found = torch.randn(1, outputs, min(min(rank, most) + _MORE, most), generator=generator).to(best)

        def squared(x: Tensor) -> Tensor:  # B M Bᵀ x
            inner = best @ x
            return best.mT @ (self._times(inner) + damping[:, None, None] * inner)

        for _ in range(_ITERATIONS):
            found = torch.linalg.qr(squared(found)).Q
        _, vectors = torch.linalg.eigh(found.mT @ squared(found))
        return (found @ vectors[..., -min(rank, most) :])[0], best[0].T

    def scaled(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the intercept [G·O] with which a map Wᵀ [G, K, O] gives the outputs wanted."""
        variance = (columns * self._times(columns)).sum(1)  # [G, O]
        covariance = (columns * self.cross).sum(1)
        ridge = _SHRUNK * variance.mean()
        scale = ((covariance + ridge) / (variance + ridge)).where(variance + ridge > 0, 1.0)
        means = (self.mean_a[:, None] @ columns)[:, 0]
        shift = self.mean_z - scale * means
        return scale.flatten(), shift.flatten()


def _nbytes(unit: Unit, rank: int) -> int:
    """Return the bytes of one expert's adapter of a unit."""
    num_vectors = 1 if unit.shift is None else 2
    vectors = 2 * unit.channels * num_vectors
    if not unit.is_matrix:
        return vectors
    directions = min(rank, unit.outputs, unit.unknowns)
    scales = 4  # two in bfloat16
    each = math.ceil(BITS * unit.outputs / 8) + math.ceil(BITS * unit.unknowns / 8) + scales
    return vectors + directions * each
