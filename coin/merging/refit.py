"""Refit: every layer of the average fitted anew, in the order of execution, on the coded network's own inputs."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from coin.choices import chosen
from coin.errors import ConfigurationError, NumericalError, StateError
from coin.inputs import as_input
from coin.merging.average import average_parameters
from coin.merging.experts import Experts, parameters_of
from coin.merging.head_fit import fit_head
from coin.merging.lockstep import Look, Walk
from coin.merging.method import (
    CodedModel,
    Method,
    check_buffers,
    check_each,
    check_label,
    check_residuals,
    check_row,
    fill,
    held_out_error,
)
from coin.networks.batchnorm import BatchNormPolicy
from coin.progress import progress
from coin.state import check_finite, weighted_sum
from coin.statistics.gram import patches_of
from coin.statistics.guard import evaluating
from coin.statistics.recognise import Interceptor
from coin.statistics.rules.call import Call
from coin.statistics.rules.convolution import ConvolutionCall
from coin.statistics.rules.elementwise import ElementwiseCall
from coin.statistics.rules.linear import LinearCall
from coin.statistics.sums import sum_type

RIDGES = (0.01, 0.03, 0.1, 0.3)
"""What the ridge is chosen from."""

_KEPT = 6
"""Tensors of the widest layer's size that a paused forward pass may hold."""


class Target(StrEnum):
    """What the layers of the coded network are fitted to."""

    own = "own"
    """On every task's samples, what that task's expert makes of them at this layer."""

    mix = "mix"
    """On all samples, the β-average of what all experts make of them."""

    auto = "auto"
    """Both are tried, and the error of decoded answers on held-out calibration samples decides."""


class Refit(Method):
    """Every layer of the β-average refitted on the coded network's own inputs, then the head.

    Let a be the coded network's input of a layer, all layers before it being refitted already, z_i expert i's output of
    the layer for the same sample, with the BatchNorm behind it, and W̄ the β-average of the experts' maps γ/σ·W with
    their BatchNorm folded in. The layer becomes the minimiser of

        own:  Σ_i β_i E_{x∈T_i} ‖W a(x) + b − z_i(x)‖²        + λ ‖W − W̄‖²
        mix:  E_x pooled        ‖W a(x) + b − Σ_i β_i z_i(x)‖² + λ ‖W − W̄‖²

    over the calibration samples and all positions, λ = ridge × the mean diagonal entry of the covariance of a. A
    grouped convolution is one regression a group, a normalisation layer that follows no linear map one a channel. The
    map is written back with its BatchNorm an identity that carries b. What cannot be refitted (an embedding, a weight
    that is used twice) keeps the average, and the result names it. At last the head is fitted to Σ_i β_i f_i
    (`fit_head`). No labels, no gradients, no learning rate.

    All networks go through their layers side by side: one refit takes one forward pass of every expert (``own``: on its
    own task's samples alone) and two of the coded network, however many layers there are. Only where the activations of
    all samples would need more than `memory_mib` are they computed anew for every layer.

    Source: this project's. Relatives, none of which codes: RegMean++ (inputs from the merged network), Chain of Merges,
    LOT (normalisation layers too).

    Args:
        target: ``own``, ``mix`` or ``auto``.
        ridge: λ, relative and dimensionless, above 0; none has it chosen.
        head: Whether the head is fitted at last.
        memory_mib: Bound on the activations that are kept, in MiB.
        label: Name of this variant in results.

    Raises:
        ConfigurationError: An option is out of its range.
    """

    name = "refit"
    batchnorm = BatchNormPolicy.keep

    def __init__(
        self,
        target: Target = Target.auto,
        ridge: float | None = 0.03,
        *,
        head: bool = True,
        memory_mib: int = 4096,
        label: str | None = None,
    ) -> None:
        self.target = chosen(Target, "target", target)
        if ridge is not None and not 0 < ridge < float("inf"):
            raise ConfigurationError(f"found ridge {ridge}, expected a positive number, or none")
        if memory_mib < 1:
            raise ConfigurationError(f"found memory_mib={memory_mib}, expected at least 1")
        self.ridge, self.head, self.memory_mib = ridge, head, memory_mib
        self.label = check_label(self.name if label is None else label)

    @torch.inference_mode(False)
    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row of the code; see `Method.make`."""
        check_row(row, experts.count)
        check_each(experts.parameters, "expert")
        targets = [Target.own, Target.mix] if self.target is Target.auto else [self.target]
        options = [(target, ridge) for target in targets for ridge in ([self.ridge] if self.ridge else RIDGES)]
        residuals = {}
        if len(options) > 1:
            for option in options:
                trial = self._refit(experts, row, *option, held_out=True)[0]
                residuals[option] = held_out_error(experts, trial, row)
            check_residuals(residuals.values(), self.label)
        best = min(options, key=lambda option: residuals.get(option, 0.0))
        network, averaged = self._refit(experts, row, *best, held_out=False)
        check_finite(parameters_of(network), f"the coded model of method '{self.label}'")
        check_buffers(network, experts.buffers, self.label)
        taken: dict[str, Any] = {"target": str(best[0]), "ridge": best[1], "averaged": averaged}
        if residuals:
            taken["held_out_error"] = {f"{target}/{ridge:g}": r for (target, ridge), r in residuals.items()}
        return CodedModel(network, taken)

    def _refit(
        self, experts: Experts, row: Sequence[float], target: Target, ridge: float, *, held_out: bool
    ) -> tuple[nn.Module, list[str]]:
        """Return a refitted network and the names of the parameters that keep the average.

        Args:
            experts: The experts.
            row: β.
            target: ``own`` or ``mix``.
            ridge: λ, relative.
            held_out: Whether the held-out samples are left out.
        """
        batches = list(experts.split[0] if held_out else experts.pooled)
        if unlike := next((each.shape for each in batches if each.shape[1:] != batches[0].shape[1:]), None):
            raise ConfigurationError(
                f"found calibration samples of shapes {list(batches[0].shape[1:])} and {list(unlike[1:])} for method "
                f"'{self.label}', which runs them together, expected one shape; pad them"
            )
        inputs = torch.cat(batches)
        task = experts.tasks[: len(inputs)]
        network = experts.blank().eval()
        average = average_parameters(experts.parameters, row)
        fill(network, {**average, **weighted_sum(experts.buffers, row)})
        units, floats = affine_units(network, inputs)
        _fold(network, units, experts, row)
        everything = torch.arange(len(inputs))
        parts = [everything[task == each] if target is Target.own else everything for each in range(experts.count)]
        sizes = torch.tensor([len(part) for part in parts], dtype=torch.float64)
        # Every task's samples weigh β_i together; with a mixture all samples weigh alike.
        shares = (torch.tensor(row, dtype=torch.float64) / sizes)[task] if target is Target.own else 1 / sizes[0]
        shares = shares.expand(len(inputs))
        each = floats * 4 * _KEPT * (experts.count + 1)
        piece = max(experts.count, (self.memory_mib << 20) // max(1, each))
        walk = Walk(network, list(experts.networks), inputs, parts, piece)
        with walk, torch.no_grad(), progress(self.label, len(units)) as bar:
            for unit in units:
                looks = walk.looks(unit.weight, unit.end)
                _fit(network, unit, looks, shares, None if target is Target.own else row, ridge)
                bar.advance()
        experts.passes += walk.passes
        if self.head:
            fit_head(network, experts, row, held_out=held_out)
        return network, sorted(average.keys() - {name for unit in units for name in unit.names})


@dataclass(frozen=True)
class Unit:
    """An affine map of a network, with the BatchNorm behind it.

    Attributes:
        weight: The name of its weight.
        bias: The name of its bias.
        norm: The BatchNorm's module.
    """

    weight: str
    bias: str | None
    norm: str | None

    @property
    def end(self) -> str:
        """The name of the weight of its last call."""
        return self.weight if self.norm is None else f"{self.norm}.weight"

    @property
    def shift(self) -> str | None:
        """The name of the parameter that carries its bias."""
        return self.bias if self.norm is None else f"{self.norm}.bias"

    @property
    def names(self) -> set[str | None]:
        """The names of all its parameters."""
        return {self.weight, self.bias, self.end, self.shift}


def affine_units(network: nn.Module, inputs: Tensor) -> tuple[list[Unit], int]:
    """Find a network's affine units in the order of execution, by running it on two and on three samples.

    A unit is a linear map, a normalisation or a scale, whose weight and bias nothing else reads in a forward pass, and
    whose output has the samples, or several rows of each, along its leading dimension. A BatchNorm over a linear map's
    outputs that alone reads them, and next, is part of it.

    Args:
        network: In eval mode.
        inputs: At least two samples [B, …].

    Returns:
        The units, and the floats of one sample in the widest call.

    Raises:
        StateError: The calls depend on the number of samples.
    """
    two, three = (_trace(network, inputs[torch.arange(count) % len(inputs)]) for count in (2, 3))
    if [seen.weight for seen in two] != [seen.weight for seen in three]:
        raise StateError(
            f"{type(network).__name__} makes other calls on two samples than on three, expected the same; give experts "
            "that make the same calls whatever their inputs"
        )
    units: list[Unit] = []
    for seen, other, following in zip(two, three, [*two[1:], None], strict=True):
        leading = seen.shape[1:] == other.shape[1:] and 3 * seen.shape[0] == 2 * other.shape[0]
        part = bool(units) and units[-1].end == seen.weight
        if seen.is_affine and seen.is_unshared and leading and not part:
            folds = following is not None and seen.precedes(following)
            norm = following.weight.rpartition(".")[0] if folds and following is not None else None
            units.append(Unit(seen.weight, seen.bias, norm))
    return units, max((seen.shape.numel() // 2 for seen in two), default=1)


@dataclass(frozen=True)
class _Seen:
    """A call of a trace: its parameters, where its input and output are in memory, and what it is.

    Attributes:
        is_affine: Whether it is linear in its weight and bias.
        is_unshared: Whether nothing else reads its weight or its bias.
        is_map: Whether a BatchNorm over its output has a channel for every row of the weight.
        is_batchnorm: Whether it is a BatchNorm that alone reads its input.
    """

    weight: str
    bias: str | None
    source: tuple[int, int]
    output: tuple[int, int]
    shape: torch.Size
    is_affine: bool
    is_unshared: bool
    is_map: bool
    is_batchnorm: bool

    def precedes(self, norm: "_Seen") -> bool:
        """Say whether the next call is a BatchNorm that can be folded into this one."""
        return self.is_map and norm.is_batchnorm and norm.is_unshared and norm.source == self.output


class _Readers(TorchFunctionMode):
    """Counts how many functions read each piece of memory, and keeps all tensors so that none is used twice.

    Attributes:
        times: Address → how many functions were given a tensor there and returned tensors.
        parameters: The same of parameters by id, as a view of one, read once, may be all that is made of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[int] = Counter()
        self.parameters: Counter[int] = Counter()
        self._kept: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = list(_tensors(result))
        self._kept += made
        for each in _tensors((args, kwargs)) if made else ():
            if isinstance(each, nn.Parameter):
                self.parameters[id(each)] += each is not result
            else:
                self.times[each.data_ptr()] += 1
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _trace(network: nn.Module, samples: Tensor) -> list[_Seen]:
    """Return the ruled calls with a weight of a forward pass, in their order."""
    seen: list[tuple[Call, Mapping[str, str], tuple[int, int], Tensor, tuple[int, int]]] = []

    def visit(call: Call, names: dict[str, str], function: Callable[[], Tensor]) -> Tensor:
        source = (call.inputs.data_ptr(), call.inputs._version)
        output = function()
        if "weight" in names:
            seen.append((call, names, source, output, (output.data_ptr(), output._version)))
        return output

    readers, named = _Readers(), dict(network.named_parameters())
    # The readers come last, and so see what the network calls but not what the interceptor does on the way.
    with evaluating(network, gradients=False), Interceptor(named, visit), readers:
        network(as_input(samples, network))
    times = Counter(names["weight"] for _, names, *_ in seen)
    return [
        _Seen(
            names["weight"],
            names.get("bias"),
            source,
            made,
            output.shape,
            isinstance(call, LinearCall) or (isinstance(call, ElementwiseCall) and call.normalised is not None),
            times[names["weight"]] == 1 and all(readers.parameters[id(named[name])] <= 1 for name in names.values()),
            isinstance(call, LinearCall)
            and not call.transposed
            and (isinstance(call, ConvolutionCall) or output.ndim == 2),
            isinstance(_owner(network, names["weight"]), _BatchNorm) and readers.times[source[0]] == 1,
        )
        for call, names, source, output, made in seen
    ]


def _owner(network: nn.Module, parameter: str) -> nn.Module:
    return network.get_submodule(parameter.rpartition(".")[0])


def _fold(network: nn.Module, units: Iterable[Unit], experts: Experts, row: Sequence[float]) -> None:
    """Write the β-average of the folded maps into a network, whose BatchNorms become shifts."""
    parameters, buffers = experts.parameters, experts.buffers
    for unit in units:
        if unit.norm is None:
            continue
        norm = network.get_submodule(unit.norm)
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight, bias = network.get_parameter(unit.weight), network.get_parameter(f"{unit.norm}.bias")
        total, shift = torch.zeros_like(weight, dtype=torch.float64), torch.zeros_like(bias, dtype=torch.float64)
        for share, own, kept in zip(row, parameters, buffers, strict=True):
            mean, variance = (kept[f"{unit.norm}.running_{what}"].double() for what in ("mean", "var"))
            scale = own[f"{unit.norm}.weight"].double() / (variance + norm.eps).sqrt()
            total += share * scale.view(-1, *[1] * (weight.ndim - 1)) * own[unit.weight].double()
            before = own[unit.bias].double() if unit.bias is not None else 0.0
            shift += share * (own[f"{unit.norm}.bias"].double() + scale * (before - mean))
        with torch.no_grad():
            weight.copy_(total)
            bias.copy_(shift)
            if unit.bias is not None:
                network.get_parameter(unit.bias).zero_()
            network.get_parameter(f"{unit.norm}.weight").fill_(1)
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)


def _fit(
    network: nn.Module,
    unit: Unit,
    looks: Callable[[], Iterator[Look]],
    shares: Tensor,
    mixture: Sequence[float] | None,
    ridge: float,
) -> None:
    """Refit one unit of a network in place.

    Args:
        network: The coded network.
        unit: The unit.
        looks: What the networks make of the samples there.
        shares: Every sample's weight in the objective [P].
        mixture: β, to fit to the β-average; none to fit to each expert on its own samples.
        ridge: λ, relative.
    """
    weight = network.get_parameter(unit.weight)
    shift = None if unit.shift is None else network.get_parameter(unit.shift)
    turned = False

    def rows() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        nonlocal turned
        for look in looks():
            turned = isinstance(look.call, LinearCall) and look.call.transposed
            # In a unit with a BatchNorm the shift comes behind the call.
            output = look.output if unit.norm is None or shift is None else _shifted(look, shift)
            residual = _target(look, mixture) - output
            yield from _rows(look.call, residual, shares[look.samples])

    step, constant = fit_affine(rows, ridge, intercept=shift is not None)
    flat = step.flatten(0, 1)
    weight.add_((flat.T if turned else flat).reshape(weight.shape))
    if shift is not None:
        shift.add_(constant.reshape(shift.shape))


def _shifted(look: Look, shift: Tensor) -> Tensor:
    convolved = isinstance(look.call, ConvolutionCall)
    return look.output + (shift.view(-1, *[1] * (look.output.ndim - 2)) if convolved else shift)


def _target(look: Look, mixture: Sequence[float] | None) -> Tensor:
    """Return what the unit is to give, of the output's shape."""
    target = torch.zeros_like(look.output)
    if mixture is not None:
        for share, each in zip(mixture, look.targets, strict=True):
            assert each is not None
            target.add_(each, alpha=share)
        return target
    count = look.samples.stop - look.samples.start
    by_sample = target.view(count, -1, *target.shape[1:])
    for each, place in zip(look.targets, look.places, strict=True):
        if each is not None:
            by_sample[place] = each.reshape(len(place), *by_sample.shape[1:])
    return target


def _rows(call: Call, residual: Tensor, shares: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield a unit's inputs [n, G, K], residuals [n, G, O] and weights [n] at all positions, in blocks."""
    residual = residual.to(sum_type(residual))
    if isinstance(call, ElementwiseCall):
        assert call.normalised is not None
        inputs: Iterable[Tensor] = [_entries(call.normalised(call.inputs), call.shape)]
        residual = _entries(residual, call.shape)
    else:
        assert isinstance(call, LinearCall)
        inputs = patches_of(call)
        residual = residual.movedim(1, -1) if isinstance(call, ConvolutionCall) else residual
        groups = call.geometry.groups if isinstance(call, ConvolutionCall) else 1
        residual = residual.reshape(-1, groups, residual.shape[-1] // groups)
    weights = shares.to(residual.device).repeat_interleave(len(residual) // len(shares))
    start = 0
    for piece in inputs:
        end = start + len(piece)
        yield piece.to(residual), residual[start:end], weights[start:end]
        start = end


def _entries(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return x [N, …] as [N · positions, entries, 1] for a parameter that is broadcast over x[n] in this shape."""
    whole = (1,) * (x.ndim - 1 - len(shape)) + shape
    entries = [1 + place for place, size in enumerate(whole) if size > 1]
    positions = [place for place in range(1, x.ndim) if place not in entries]
    return x.permute(0, *positions, *entries).reshape(-1, max(1, prod(shape)), 1)


def fit_affine(
    rows: Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]], ridge: float, *, intercept: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the minimiser ΔW, Δb of Σ_n w_n ‖ΔW a_n + Δb − r_n‖² / Σ_n w_n + λ ‖ΔW‖², a regression a group.

    λ = ridge × the mean diagonal entry of the covariance of a, a group's own. With more unknowns than rows the system
    is solved where the rows are, ΔW = Rᵀ(A Aᵀ + λ I)⁻¹A. Rows are centred first; products are taken in their own type,
    added up and solved in float64.

    Args:
        rows: Iterated twice: inputs a [n, G, K], residuals r [n, G, O] and weights w [n], in blocks.
        ridge: Above 0.
        intercept: Whether there is a Δb; without one nothing is centred and Δb is 0.

    Returns:
        ΔW [G, O, K] and Δb [G, O], in float64.

    Raises:
        NumericalError: A row is not finite, or too large to be squared.
    """
    count, mass, sums = 0, 0.0, []
    for a, r, w in rows():
        count += len(a)
        mass += float(w.sum())
        sums.append([torch.einsum("n,ngk->gk", w.to(x), x).double() for x in (a, r)])
    mean_a, mean_r = (torch.stack(each).sum(0) / mass for each in zip(*sums, strict=True))
    if not intercept:
        mean_a, mean_r = torch.zeros_like(mean_a), torch.zeros_like(mean_r)
    if not bool(torch.isfinite(mean_a).all() and torch.isfinite(mean_r).all()):
        raise NumericalError("a layer's inputs or outputs on calibration data are not finite; check the experts")

    def centred() -> Iterator[tuple[Tensor, Tensor]]:
        """Yield [G, n, K] and [G, n, O], every row times the root of its weight."""
        for a, r, w in rows():
            root = (w / mass).sqrt().to(a)[:, None, None]
            yield ((a - mean_a.to(a)) * root).transpose(0, 1), ((r - mean_r.to(r)) * root).transpose(0, 1)

    groups, unknowns = mean_a.shape
    # The round-off of centring is not signal: without this cut a constant input gets coefficients from noise.
    noise = count * torch.finfo(a.dtype).eps ** 2 * mean_a.square().mean(1)
    if count < unknowns:
        blocks = list(centred())
        a, r = (torch.cat([block[i] for block in blocks], 1) for i in (0, 1))
        gram = (a @ a.mT).double()
        scale = gram.diagonal(dim1=1, dim2=2).sum(1) / unknowns
        step = _solve(gram, r.double(), ridge * scale, scale <= noise).mT @ a.double()
    else:
        gram = mean_a.new_zeros(groups, unknowns, unknowns)
        cross = mean_a.new_zeros(groups, unknowns, mean_r.shape[1])
        for a, r in centred():
            gram += a.mT @ a
            cross += a.mT @ r
        scale = gram.diagonal(dim1=1, dim2=2).mean(1)
        step = _solve(gram, cross, ridge * scale, scale <= noise).mT
    return step, mean_r - (step @ mean_a[..., None])[..., 0]


def _solve(gram: Tensor, right: Tensor, ridges: Tensor, dead: Tensor) -> Tensor:
    """Return (gram + λI)⁻¹ right a group; zero where the inputs are constant."""
    if not bool(torch.isfinite(gram).all() and torch.isfinite(right).all()):
        raise NumericalError(
            "a layer's inputs on calibration data are so large that squares overflow; check the experts"
        )
    damped = gram + torch.diag_embed(torch.where(dead, torch.ones_like(ridges), ridges)[:, None].expand(gram.shape[:2]))
    solved: Tensor = torch.cholesky_solve(right, torch.linalg.cholesky(damped))
    return solved.masked_fill_(dead[:, None, None], 0)
