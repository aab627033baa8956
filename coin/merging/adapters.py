"""Adapters fitted in closed form, unit by unit, to the experts' outputs on the body's own inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coin.core.choices import check_integer, check_number
from coin.errors import ConfigurationError, NumericalError
from coin.files.tensors import State
from coin.merging.adapted import with_change
from coin.merging.units import Unit
from coin.networks.adapters import Adapter
from coin.networks.batchnorm import folded
from coin.statistics.rules import Call
from coin.statistics.rules.linear import LinearCall
from coin.statistics.solvers import fit_affine

_SHRUNK = 0.01  # of the mean variance of a unit's outputs: the ridge that draws their scales to 1
_MORE = 8  # directions beside the r wanted, and iterations, of the search for the first singular vectors
_ITERATIONS = 4


@dataclass(frozen=True)
class AdapterOptions:
    """What every expert keeps beside the body; raises ConfigurationError for an option out of its range.

    Args:
        rank: r of the correction of every matrix; 0 for scales and biases alone.
        memory_mib: In place of a rank, the MiB of all adapters together; the largest rank is taken that fits.
        ridge: μ, relative to the mean diagonal entry of the inputs' covariance, above 0.
    """

    rank: int | None = None
    memory_mib: float | None = None
    ridge: float = 0.1

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.memory_mib is None):
            found = f"found rank={self.rank} and memory_mib={self.memory_mib} of adapters"
            raise ConfigurationError(f"{found}, expected one of them")
        if self.rank is not None:
            check_integer("rank", self.rank, 0)
        if self.memory_mib is not None:
            check_number("memory_mib", self.memory_mib, low=0, strict=True)
        check_number("ridge", self.ridge, low=0, strict=True)

    @classmethod
    def of(cls, options: "AdapterOptions | Mapping[str, Any] | None") -> Self | None:
        """Return a section of options as an object."""
        try:
            return cls(**options) if isinstance(options, Mapping) else cast("Self | None", options)
        except TypeError as error:
            raise ConfigurationError(f"found {options!r:.100} for adapters, expected rank or memory_mib") from error

    @property
    def name(self) -> str:
        """Their name in results and files: ``rank4``, ``1.5mib``."""
        return f"rank{self.rank}" if self.memory_mib is None else f"{self.memory_mib:g}mib"

    def rank_for(self, units: Sequence[Unit], count: int) -> int:
        """Return the rank for the units of so many experts; a ConfigurationError where not even rank 0 fits."""
        if self.rank is not None:
            return self.rank
        assert self.memory_mib is not None
        most = max((min(unit.outputs, unit.unknowns) for unit in units), default=0)
        sizes = [count * sum(_nbytes(unit, rank) for unit in units) / 2**20 for rank in range(most + 1)]
        if sizes[0] > self.memory_mib:
            found = f"found memory_mib={self.memory_mib:g} for the adapters of {count} experts"
            raise ConfigurationError(f"{found}, expected at least {sizes[0]:.3g}, which scales and biases take")
        return max(rank for rank, size in enumerate(sizes) if size <= self.memory_mib)


class AdapterFit:
    """Fits adapters while the body runs on all tasks' samples, each with the adapter of its own expert so far.

    Let a be a unit's input, y = W a + b the body's output and z expert i's, on its own task's samples. With W_i the
    expert's own map and M = cov(a) + μI, the correction begins as the ridge regression of z − W a that is drawn to
    W_i − W,

        B = argmin E‖(W + B) a + c − z‖² + μ‖W + B − W_i‖²,

    and is replaced by the closest matrix of rank r in the norm tr(B M Bᵀ): V Vᵀ B, with V the first left singular
    vectors of B M^{1/2} (reduced-rank ridge regression). With few samples it is the singular value decomposition of
    W_i − W, weighted by the inputs, and with many the fit. At last every output has a scale and a shift, by least
    squares, the scale drawn to 1 by 0.01 of the mean variance. A grouped convolution and a normalisation have these
    alone, a unit without a bias no shift.

    Args:
        rank: r.
        ridge: μ, relative.
        experts: The experts' parameters and buffers.
        tasks: Of which expert's task every sample is [P].
    """

    def __init__(
        self, rank: int, ridge: float, experts: Sequence[tuple[State, State]], tasks: Tensor
    ) -> None:
        self._rank, self._ridge, self._experts, self.tasks = rank, ridge, experts, tasks
        self.adapters = [Adapter() for _ in experts]
        self._samples = [(tasks == task).nonzero().flatten() for task in range(len(experts))]

    def fit(
        self, network: nn.Module, unit: Unit, call: Call, rows: tuple[Tensor, Tensor], target: Tensor, shares: Tensor,
        output: Tensor,
    ) -> Tensor:  # fmt: skip
        """Fit the unit of every expert, and return the call's output [P·k, …] with all adapters.

        `rows` are its inputs and entries, of `input_rows`; targets and shares those of `fit_unit`.
        """
        inputs, entries = rows
        weight = network.get_parameter(unit.weight)
        turned = isinstance(call, LinearCall) and call.transposed
        flat = _flat(weight, turned, unit, len(inputs))[..., entries].to(inputs)
        shift = None if unit.shift is None else network.get_parameter(unit.shift)
        each = inputs.shape[1] // len(shares)
        for expert, samples in enumerate(self._samples):
            if not len(samples) or not bool(shares[samples].any()):
                continue
            place = (each * samples[:, None] + torch.arange(each)).flatten().to(inputs.device)
            a, weights = inputs[:, place], shares[samples].flatten().to(inputs)
            wanted = target[samples].to(inputs).flatten(0, 1)
            left = right = None
            made = a @ flat.mT
            if self._rank and unit.is_matrix:
                own = self._own(network, unit, expert).to(inputs)
                left, right = self._low_rank(
                    a, wanted, flat, _flat(own, turned, unit, 1)[..., entries], weights, unit, shift is not None
                )
                made = made + (a @ right.mT) @ left.mT
            change = {"weight": self._scaled(made.transpose(0, 1).flatten(1), wanted, weights, shift)}
            scale = change["weight"]["scale"]
            if shift is not None:
                change["bias"] = {"shift": change["weight"].pop("shift")}
            if left is not None and right is not None:
                whole = right.new_zeros(len(right[0]), unit.unknowns)
                whole[:, entries] = right[0]
                left = left[0] * scale[:, None]
                change["weight"] |= {"left": whole.T, "right": left.T} if turned else {"left": left, "right": whole}
            change["weight"]["scale"] = scale[None] if turned else scale.view(-1, *[1] * (weight.ndim - 1))
            if isinstance(call, LinearCall) is False:
                change["weight"]["scale"] = scale.view(weight.shape)
            change = {role: {part: each_.half().float() for part, each_ in parts.items()} for role, parts in change.items()}
            if not all(bool(torch.isfinite(t).all()) for parts in change.values() for t in parts.values()):
                raise NumericalError(f"the adapter of '{unit.weight}' is not finite; check the experts")
            self.adapters[expert].add(unit.weight, change["weight"])
            if "bias" in change and unit.shift is not None:
                self.adapters[expert].add(unit.shift, change["bias"])
            output = with_change(call, output, change, samples.to(output.device), len(shares))
        return output

    def _own(self, network: nn.Module, unit: Unit, expert: int) -> Tensor:
        """Return an expert's own weight of a unit, the BatchNorm behind it folded in."""
        parameters, buffers = self._experts[expert]
        if unit.norm is None:
            return parameters[unit.weight]
        norm = network.get_submodule(unit.norm)
        assert isinstance(norm, _BatchNorm)
        names = [unit.weight, *([unit.bias] if unit.bias else []), *(f"{unit.norm}.{p}" for p in ("weight", "bias"))]
        state = {name: parameters[name] for name in names}
        state |= {name: buffers[name] for name in (f"{unit.norm}.running_mean", f"{unit.norm}.running_var")}
        return folded(state, unit.weight, unit.bias, unit.norm, norm.eps)[unit.weight]

    def _low_rank(
        self, a: Tensor, wanted: Tensor, flat: Tensor, own: Tensor, weights: Tensor, unit: Unit, intercept: bool
    ) -> tuple[Tensor, Tensor]:
        """Return left [1, O, r] and right [1, r, K] for inputs [1, n, K] and outputs [n, O]."""
        residual = wanted[None] - a @ own.mT
        ridge = self._ridge * a.shape[2] / unit.unknowns
        step, _ = fit_affine(a, residual, weights, ridge, intercept=intercept)
        best = own + step.to(a) - flat  # [1, O, K]
        share = (weights / weights.sum())[:, None]
        centred = (a - (share * a).sum(1, keepdim=True) if intercept else a) * share.sqrt()
        damping = ridge * centred.square().sum((1, 2), keepdim=True) / a.shape[2]
        stacked = torch.cat([centred @ best.mT, damping.sqrt() * best.mT], 1)[0]
        rank = min(self._rank, *best.shape[1:])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = torch.svd_lowrank(stacked, min(rank + _MORE, *stacked.shape), _ITERATIONS)[2][:, :rank]
        return found[None], found.T[None] @ best

    def _scaled(self, made: Tensor, wanted: Tensor, weights: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
        """Return the scale [O], and beside the given shift the one [O] that is added, for outputs [n, O]."""
        share = (weights / weights.sum())[:, None].double()
        y, z = made.double(), wanted.double()
        means = ((share * y).sum(0), (share * z).sum(0)) if shift is not None else (0.0, 0.0)
        y, z = y - means[0], z - means[1]
        variance = (share * y * y).sum(0)
        ridge = _SHRUNK * variance.mean()
        scale = ((share * y * z).sum(0) + ridge) / (variance + ridge).clamp(min=torch.finfo(torch.float64).tiny)
        scale = scale.where(variance + ridge > 0, torch.ones_like(scale))
        if shift is None:
            return {"scale": scale.float()}
        return {"scale": scale.float(), "shift": (means[1] - scale * means[0] - shift.double().flatten()).float()}


def _flat(weight: Tensor, turned: bool, unit: Unit, groups: int) -> Tensor:
    return (weight.T if turned else weight).reshape(groups, -1, unit.unknowns)


def _nbytes(unit: Unit, rank: int) -> int:
    """Return the bytes of one expert's adapter of a unit."""
    low = min(rank, unit.outputs, unit.unknowns) * (unit.outputs + unit.unknowns) if unit.is_matrix else 0
    return 2 * (unit.channels * (1 if unit.shift is None else 2) + low)
