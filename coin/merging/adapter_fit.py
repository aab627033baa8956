"""Adapters fitted in closed form, unit by unit, to the experts' outputs on the body's own inputs."""

import math
from collections import ChainMap
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from coin.errors import ConfigurationError, NumericalError
from coin.files.tensors import State
from coin.merging.units import Unit, folded_unit
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
        self._rank, self._ridge, self._experts, self.tasks = rank, ridge, experts, tasks
        self._sound: list[Tensor] = []  # whether what was fitted is finite: a GPU is waited for once, in `check`
        self._fitted: list[str] = []
        self.adapters = [Adapter() for _ in experts]
        ends = [0, *torch.bincount(tasks, minlength=len(experts)).cumsum(0).tolist()]
        self._samples = list(map(slice, ends, ends[1:]))
        self._has_share = [beta > 0 and start < end for beta, start, end in zip(row, ends[:-1], ends[1:], strict=True)]

    def fit(
        self, network: nn.Module, unit: Unit, call: Call, rows: tuple[Tensor, Tensor], target: Tensor, shares: Tensor,
        function: Callable[[], Tensor],
    ) -> Tensor:  # fmt: skip
        """Fit the unit of every expert, and return the call's output [P·k, …] with all adapters.

        `rows` are its inputs and entries, of `input_rows`; targets and shares those of `fit_unit`; the function gives
        the output without adapters.
        """
        inputs, entries = rows
        row_count = inputs.shape[1] // len(shares)  # of one sample
        call_rows = len(call.inputs) // len(shares)
        weight = network.get_parameter(unit.weight)
        plain: Tensor | None = None  # the output without adapters, for experts that have none
        outputs = []
        for expert, samples in enumerate(self._samples):
            own = slice(samples.start * call_rows, samples.stop * call_rows)
            if not self._has_share[expert]:
                plain = function() if plain is None else plain
                outputs.append(plain[own])
                continue
            own_rows = slice(samples.start * row_count, samples.stop * row_count)
            moments = Moments(inputs[:, own_rows], target[samples], shares[samples], unit.shift is not None)
            change, shift = self._change(network, unit, call, entries, moments, expert)
            output = call.output(call.inputs[own], change(weight))  # as it is stored
            self.adapters[expert].changes[unit.weight] = change
            if unit.shift is not None:
                self.adapters[expert].changes[unit.shift] = shift
                output = output + call.along(shift(torch.zeros_like(network.get_parameter(unit.shift))), output)
            outputs.append(output)
        return torch.cat(outputs)

    def _change(
        self, network: nn.Module, unit: Unit, call: Call, entries: Tensor, moments: "Moments", expert: int
    ) -> tuple[Change, Change]:
        """Return the change of a unit's weight, and that of the parameter that carries its bias."""
        weight = network.get_parameter(unit.weight)
        turned = isinstance(call, LinearCall) and call.transposed  # the weight is [K, O]

        def columns(matrix: Tensor) -> Tensor:
            flat = (matrix.T if turned else matrix).reshape(len(moments.mean_a), -1, unit.unknowns)
            return flat[..., entries].mT.to(moments.cross)  # [G, K, O]

        fitted = columns(weight)
        factors = dict[str, Rounded]()
        if self._rank and unit.is_matrix:
            damping = self._ridge * len(entries) / unit.unknowns
            vectors, best = moments.low_rank(fitted, columns(self._own(network, unit, expert)), damping, self._rank)
            outer = quantise(vectors.T.contiguous(), BITS)  # V̂ᵀ [r, O]
            kept = outer.dense().to(best)
            inner = quantise((torch.linalg.pinv(kept.T) @ best).contiguous(), BITS)  # V̂⁺ B [r, K']
            fitted = fitted + inner.dense().to(best).T @ kept
            # Entries that meet no input have the code next to zero.
            codes = nearest(inner.scale.new_zeros(len(inner.codes), unit.unknowns).float(), inner.scale, BITS)
            inner = inner._replace(codes=codes.index_copy(1, entries, inner.codes))
            factors = {"left": inner, "right": outer} if turned else {"left": outer, "right": inner}
        scale, shift = moments.scaled(fitted)
        if not isinstance(call, LinearCall):
            scale = scale.reshape(weight.shape)
        elif turned:
            scale = scale.reshape(1, -1)
        else:
            scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
        if unit.shift is None:
            if call.bias is not None:  # which is computed of other tensors
                raise ConfigurationError(f"the bias of '{unit.weight}' is no parameter, expected one for adapters")
            carries = Change()
        else:
            before = network.get_parameter(unit.shift)
            carries = Change.of(shift=shift.reshape(before.shape) - before)
        change = Change.of(scale, left=factors.get("left"), right=factors.get("right"))
        kept_vectors = [each for each in (change.scale, carries.shift) if each is not None]
        self._sound.append(torch.stack([torch.isfinite(each).all() for each in (fitted, *kept_vectors)]).all())
        self._fitted.append(unit.weight)
        return change, carries

    def check(self) -> None:
        """Raise NumericalError where an adapter is not finite."""
        sound = torch.stack(self._sound).tolist() if self._sound else []
        for weight, is_sound in zip(self._fitted, sound, strict=True):
            if not is_sound:
                raise NumericalError(f"the adapter of '{weight}' is not finite; check the experts")

    def _own(self, network: nn.Module, unit: Unit, expert: int) -> Tensor:
        """Return an expert's own weight of a unit, the BatchNorm behind it folded in."""
        state: State = ChainMap(*cast(Any, self._experts[expert]))  # never written to
        return state[unit.weight] if unit.norm is None else folded_unit(network, unit, state)[unit.weight]


class Moments:
    """The first two moments of a unit's inputs a [G, n, K] and wanted outputs z [P, q, G·O], of one expert's samples.

    Args:
        inputs: a.
        wanted: z, as many rows as a.
        shares: What the rows weigh [P, q].
        intercept: Whether means are subtracted.
    """

    def __init__(self, inputs: Tensor, wanted: Tensor, shares: Tensor, intercept: bool) -> None:
        groups, count, unknowns = inputs.shape
        weights = (shares / shares.sum()).flatten().to(inputs)
        z = wanted.to(inputs).reshape(count, groups, -1).transpose(0, 1)
        self.mean_a, self.mean_z = (weights @ each * float(intercept) for each in (inputs, z))  # [G, K], [G, O]
        root = weights.sqrt()[:, None]
        self._a, self._z = ((each - mean[:, None]) * root for each, mean in ((inputs, self.mean_a), (z, self.mean_z)))
        scale = self._a.square().sum((1, 2)) / unknowns
        if intercept:  # the round-off of constant inputs is no signal
            constant = is_round_off(scale, self._a, self.mean_a[:, None], weights[None])
            self._a.masked_fill_(constant[:, None, None], 0)
        self.cross = self._a.mT @ self._z
        self._gram = products(self._a) if count >= unknowns else None  # with fewer rows products go by these

    def _times(self, x: Tensor) -> Tensor:
        """Return cov(a) x for x [G, K, m]."""
        return self._a.mT @ (self._a @ x) if self._gram is None else self._gram @ x

    def low_rank(self, body: Tensor, own: Tensor, ridge: float, rank: int) -> tuple[Tensor, Tensor]:
        """Return V [O, r] and B [O, K] of what a body's map lacks of an expert's, Wᵀ of both [1, K, O]."""
        a, unknowns = self._a, len(body[0])
        mean = a.square().sum((1, 2)) / unknowns
        dead = mean == 0  # inputs that do not change: then the difference itself is cut
        damping = (ridge * mean).masked_fill(dead, 1)
        if self._gram is None:
            step = a.mT @ solve_ridge(products(a.mT), self._z - a @ own, damping, dead)
        else:
            step = solve_ridge(self._gram, self.cross - self._gram @ own, damping, dead)
        best = own + step - body  # Bᵀ
        rank = min(rank, *best.shape[1:])
        generator = torch.Generator().manual_seed(0)
        found = torch.randn(1, best.shape[2], min(rank + _MORE, *best.shape[1:]), generator=generator).to(best)

        def squared(x: Tensor) -> Tensor:  # B M Bᵀ x
            inner = best @ x
            return best.mT @ (self._times(inner) + damping[:, None, None] * inner)

        for _ in range(_ITERATIONS):
            found = torch.linalg.qr(squared(found)).Q
        _, vectors = torch.linalg.eigh(found.mT @ squared(found))
        return (found @ vectors[..., -rank:])[0], best[0].T

    def scaled(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the intercept [G·O] with which a map Wᵀ [G, K, O] gives the outputs wanted."""
        variance, covariance = (columns * self._times(columns)).sum(1), (columns * self.cross).sum(1)
        ridge = _SHRUNK * variance.mean()
        scale = ((covariance + ridge) / (variance + ridge)).where(variance + ridge > 0, 1.0)
        means = (self.mean_a[:, None] @ columns)[:, 0]
        return scale.flatten(), (self.mean_z - scale * means).flatten()


def _nbytes(unit: Unit, rank: int) -> int:
    """Return the bytes of one expert's adapter of a unit."""
    vectors = 2 * unit.channels * (1 if unit.shift is None else 2)
    if not unit.is_matrix:
        return vectors
    directions = min(rank, unit.outputs, unit.unknowns)
    each = math.ceil(BITS * unit.outputs / 8) + math.ceil(BITS * unit.unknowns / 8) + 4  # and two scales in bfloat16
    return vectors + directions * each
