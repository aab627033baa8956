"""Adapters fitted in closed form, unit by unit, to the experts' outputs on the body's own inputs."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from coin.errors import ConfigurationError, NumericalError
from coin.files.tensors import State, not_finite
from coin.merging.corrections import Lacking, Moments, SharedBasis, low_rank
from coin.merging.expert_sources import whole_state
from coin.merging.units import Unit, UnitRows, as_map, folded_unit
from coin.networks.adapter import Adapter, AdapterOptions
from coin.networks.delta import Rounded, nearest
from coin.networks.kept import BITS, Change
from coin.statistics.rules import Call
from coin.statistics.rules.linear import LinearCall


def rank_of(options: AdapterOptions, units: Sequence[Unit], count: int) -> int:
    """Return the rank for the units of so many experts; a ConfigurationError where not even rank 0 fits."""
    if options.rank is not None:
        return options.rank
    assert options.memory_mib is not None
    highest = 0
    for unit in units:
        highest = max(highest, min(unit.outputs, unit.unknowns))
    mib = 0.0
    lowest = 0 if options.scales and not options.shared else 1
    least = "corrections of rank 1" if lowest else "scales and biases"
    for rank in range(highest, lowest - 1, -1):
        mib = sum(_nbytes(unit, rank, options, count) for unit in units) / 2**20
        if mib <= options.memory_mib:
            return rank
    raise ConfigurationError(
        f"found memory_mib={options.memory_mib:g} for the adapters of {count} experts, "
        f"expected at least {mib:.3g}, which {least} take"
    )


def _nbytes(unit: Unit, rank: int, options: AdapterOptions, count: int) -> int:
    """Return the bytes of so many experts' adapters of a unit."""
    scales = unit.channels + 4 if options.scales else 0  # a byte each and a step, as shifts take
    shifts = 0 if unit.shift is None else scales
    if not unit.is_matrix:
        return count * (scales + shifts)
    directions = min(rank, unit.outputs, unit.unknowns)
    left, right, core = (
        directions * (math.ceil(BITS * values / 8) + 2)  # with a scale in bfloat16
        for values in (unit.outputs, unit.unknowns, directions)
    )
    if options.shared:
        return count * (scales + shifts + core) + left + right
    return count * (scales + shifts + left + right)


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
    grouped convolution and a normalisation have these alone, a unit without a bias no shift. Where the options say so,
    all experts' corrections have one basis (`SharedBasis`).

    Args:
        network: The body.
        rank: r.
        options: μ (`ridge`), relative to the mean diagonal entry of cov(a), whether there are scales and shifts, and
            whether the basis is shared.
        experts: The experts' parameters and buffers.
        tasks: Of which expert's task every sample is [P], in ascending order.
        row: β [N]; experts without a share have no adapters.
    """

    def __init__(
        self,
        network: nn.Module,
        rank: int,
        options: AdapterOptions,
        experts: Sequence[tuple[State, State]],
        tasks: Tensor,
        row: Sequence[float],
    ) -> None:
        self._network = network
        self._rank = rank
        self._options = options
        self._experts = [whole_state(tensors) for tensors in experts]
        self._row = row
        self.tasks = tasks
        self.adapters = [Adapter() for _ in experts]

    def fit(self, unit: Unit, call: Call, rows: UnitRows) -> Tensor:
        """Fit a unit of every expert, and return the output [P·k, …] of its call on all samples, with all adapters."""
        inputs_each = len(call.inputs) // len(rows.targets)  # k
        basis = None
        if self._options.shared and unit.is_matrix:
            basis = self._shared_basis(unit, rows)
        outputs = []
        for expert, samples in self._samples_of_each():
            changes: dict[str, Change] = {}
            if self._row[expert] > 0:
                moments = _moments(unit, rows, samples)
                changes = self._changes(expert, unit, call, rows.entries, moments, basis)
                self.adapters[expert].changes.update(changes)
            own = slice(samples.start * inputs_each, samples.stop * inputs_each)
            outputs.append(self._output(unit, call, call.inputs[own], changes))
        return torch.cat(outputs)

    def _samples_of_each(self) -> Iterator[tuple[int, slice]]:
        """Yield the experts that have samples, and which these are."""
        counts = torch.bincount(self.tasks, minlength=len(self._row))
        first = 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                yield expert, slice(first, first + count)
            first += count

    def _shared_basis(self, unit: Unit, rows: UnitRows) -> SharedBasis:
        """Return the basis of all experts' corrections of a unit."""
        basis = SharedBasis(self._rank)
        # Moments are made again for each expert's core: those of all at once would take much memory.
        for expert, samples in self._samples_of_each():
            if self._row[expert] > 0:
                moments = _moments(unit, rows, samples)
                basis.add(expert, self._lacking(expert, unit, rows.entries, moments))
        basis.fit()
        return basis

    def _lacking(self, expert: int, unit: Unit, entries: Tensor, moments: Moments) -> Lacking:
        """Return what the body's map of a unit lacks of an expert's."""
        body = _columns(self._network.get_parameter(unit.weight), unit, entries, moments)
        own = _columns(self._own_weight(unit, expert), unit, entries, moments)
        # Relative to the mean over all inputs, zeros too.
        ridge = self._options.ridge * len(entries) / unit.unknowns
        return moments.lacking(body, own, ridge)

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

    def check(self) -> None:
        """Raise NumericalError where an adapter is not finite."""
        for adapter in self.adapters:
            name = not_finite(adapter.tensors)
            if name is not None:
                raise NumericalError(f"the adapter's '{name}' is not finite; check the experts")

    def _changes(
        self,
        expert: int,
        unit: Unit,
        call: Call,
        entries: Tensor,
        moments: Moments,
        basis: SharedBasis | None,
    ) -> dict[str, Change]:
        """Return an expert's changes of a unit's weight, and of the parameter that carries its bias, if there is one.

        Args:
            expert: The expert.
            unit: The unit.
            call: Its call.
            entries: The entries [K'] of the weight's rows that meet inputs.
            moments: Of the expert's own samples.
            basis: That of all experts' corrections, if they share one.
        """
        weight = self._network.get_parameter(unit.weight)
        # The body's map, then with the correction.
        fitted = _columns(weight, unit, entries, moments)
        left = right = core = None
        if self._rank > 0 and unit.is_matrix:
            if basis is None:
                lacking = self._lacking(expert, unit, entries, moments)
                factors = low_rank(lacking, self._rank)
            else:
                factors = basis.of_expert(expert, moments)
            fitted = fitted + factors.map(fitted)
            left = factors.outer
            right = _with_all_entries(factors.inner, entries, unit.unknowns)
            core = factors.core
        if not self._options.scales:
            return {} if left is None else {unit.weight: Change.of(left=left, right=right)}
        scale = moments.scale(fitted)  # [G·O]
        shape = _shape_of_scale(weight, call)
        change = Change.of(scale.reshape(shape), left=left, right=right, core=core)
        changes = {unit.weight: change}
        if unit.shift is not None:
            kept_scale = change.scales()
            assert kept_scale is not None
            shift = moments.shift(fitted, kept_scale.to(scale).flatten())
            before = self._network.get_parameter(unit.shift)
            changes[unit.shift] = Change.of(shift=shift.reshape(before.shape) - before)
        elif call.bias is not None:  # which is computed of other tensors
            raise ConfigurationError(
                f"the bias of '{unit.weight}' is no parameter, expected one for adapters"
            )
        return changes

    def _own_weight(self, unit: Unit, expert: int) -> Tensor:
        """Return an expert's own weight of a unit, the BatchNorm behind it folded in."""
        state = self._experts[expert]
        if unit.norm is not None:
            state = folded_unit(self._network, unit, state)
        return state[unit.weight]


def _moments(unit: Unit, rows: UnitRows, samples: slice) -> Moments:
    """Return the moments of some samples of a unit's regression."""
    rows_each = rows.inputs.shape[1] // len(rows.targets)  # of one sample
    return Moments(
        inputs=rows.inputs[:, samples.start * rows_each : samples.stop * rows_each],
        wanted=rows.targets[samples],
        weights=rows.weights[samples],
        intercept=unit.shift is not None,
    )


def _columns(weight: Tensor, unit: Unit, entries: Tensor, moments: Moments) -> Tensor:
    """Return a weight's map, transposed, for the entries that meet inputs [G, K', O]."""
    matrix = as_map(weight, unit)
    return matrix[..., entries].mT.to(moments.cross)


def _with_all_entries(inner: Rounded, entries: Tensor, unknowns: int) -> Rounded:
    """Return a factor [r, K'] with all entries [r, K]: those that meet no input get the code nearest to 0."""
    rank = len(inner.codes)
    zeros = inner.scale.new_zeros(rank, unknowns).float()
    codes = nearest(zeros, inner.scale, BITS)
    codes.index_copy_(1, entries, inner.codes)
    return inner._replace(codes=codes)


def _shape_of_scale(weight: Tensor, call: Call) -> Sequence[int]:
    """Return the shape in which one scale for each output is multiplied with the weight."""
    if not isinstance(call, LinearCall):
        return weight.shape
    ones = [1] * (weight.ndim - 1)
    return (-1, *ones)
