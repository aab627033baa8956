"""Refit: every layer of the average fitted anew, in the order of execution, on the coded network's own inputs."""

import warnings
from collections import ChainMap
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from enum import StrEnum
from itertools import chain
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coin.batches import clone, joined, size_of
from coin.choices import check_integer, chosen
from coin.coding import DecoderConfig, distinct_decoders
from coin.errors import CoinWarning
from coin.files.tensors import State, check_finite, weighted_sum
from coin.merging.affine import fit_unit
from coin.merging.average import Average, average_parameters, fit_head
from coin.merging.experts import Experts, parameters_of
from coin.merging.held_out import LINEAR, check_errors, held_out_error
from coin.merging.lockstep import Walk
from coin.merging.method import CodedModel, Compress, Method, check_coded, check_experts, checked, fill, starting_method
from coin.merging.rounding import Rounding
from coin.merging.units import PROBES, Unit, affine_units
from coin.networks.batchnorm import BatchNormPolicy, folded
from coin.networks.compressed import Base, Compressed, Compression, RoundingKind, compress, reference_of
from coin.networks.parametrised import renormalise
from coin.progress import progress
from coin.statistics import FisherKind
from coin.statistics.statistic import DataChoice, Statistic

RIDGES = (0.01, 0.03, 0.1, 0.3)
"""What the ridge is chosen from."""

MOST_AVERAGED = 0.1
"""With a larger share of parameters that cannot be refitted a warning is given."""

OWN_SHARE = 0.3
"""The share of the experts' own targets in both."""


class Target(StrEnum):
    """What the layers of the coded network are fitted to."""

    own = "own"
    """On every task's samples, what that task's expert makes of them at this layer."""

    mix = "mix"
    """On all samples, the β-average of what all experts make of them."""

    both = "both"
    """On all samples, between the two: the sum of both objectives."""

    auto = "auto"
    """Own and both are tried, and the error of decoded answers on held-out calibration samples decides.

    For the expert_head decoder alone it is own, untried.
    """


class Refit(Method):
    """Every layer of the β-average, or of another start, refitted on the coded network's own inputs, then the head.

    Let a be the coded network's input of a layer, all layers before it being refitted already, z_i expert i's output of
    the layer for the same sample, with the BatchNorm behind it, and W̄ the start's map with its BatchNorm folded in,
    γ/σ·W: of ``average`` the β-average of the experts' folded maps, of another start its own, with the statistics that
    its BatchNorm policy has given it. The layer becomes the minimiser of

        own:  Σ_i β_i E_{x∈T_i} ‖W a(x) + b − z_i(x)‖²        + λ ‖W − W̄‖²
        mix:  E_x pooled        ‖W a(x) + b − Σ_i β_i z_i(x)‖² + λ ‖W − W̄‖²
        both: their sum, `OWN_SHARE` of the first and the rest of the second

    over the calibration samples and all positions, λ = ridge × the mean diagonal entry of the covariance of a. A
    grouped convolution is one regression a group, a normalisation layer that follows no linear map one a channel. The
    map is written back with its BatchNorm an identity that carries b. What cannot be refitted (an embedding, a weight
    that is used twice) keeps the start, and the result names it. At last the head is fitted to Σ_i β_i f_i
    (`fit_head`). No labels, no gradients, no learning rate.

    All networks go through their layers side by side: one refit takes one forward pass of every expert (``own``: on its
    own task's samples alone) and two of the coded network, however many layers there are. Only up to the last layer at
    which the activations of all samples would need more than `memory_mib` do they begin anew for every layer.

    ``own`` is best where the experts are near a strong base, ``both`` where they are not; ``mix`` was behind ``both``
    on every set of tasks.

    Source: this project's. Relatives, none of which codes: RegMean++ (inputs from the merged network), Chain of Merges,
    LOT (normalisation layers too).

    Args:
        target: ``own``, ``mix``, ``both`` or ``auto``.
        start: ``average``; another closed form's name, such as ``wudi`` or ``coin``; or its ``class_path`` and
            ``init_args``. It is made of all samples, before any are held out.
        decoders: For which decoders target and ridge are chosen, by their mean error; none for the experiment's, or
            ``linear``.
        ridge: λ, relative and dimensionless, above 0; none has it chosen.
        head: Whether the head is fitted at last.
        memory_mib: Bound on the activations that are kept, in MiB.
        label: Name of this variant in results.
        compress: As for every method (`MergeMethod`); by default it is rounded while it is refitted (`pack`).
    """

    name = "refit"
    batchnorm = BatchNormPolicy.keep
    rounds = True

    def __init__(
        self,
        target: Target = Target.auto,
        ridge: float | None = 0.03,
        *,
        start: str | dict[str, Any] = Average.name,
        head: bool = True,
        decoders: list[str] | None = None,
        memory_mib: int = 4096,
        label: str | None = None,
        compress: Compress = None,
    ) -> None:
        self.target = chosen(Target, "target", target)
        if ridge is not None:
            checked("ridge", ridge, 0 < ridge < float("inf"), "a positive number, or none")
        check_integer("memory_mib", memory_mib, 1)
        self.ridge, self.head, self.memory_mib = ridge, head, memory_mib
        self.start = start
        self._start = None if start == Average.name else starting_method(start, reads_initial=True)
        self.reads_initial = self._start is not None and self._start.reads_initial
        self.compress = self.compressed(compress)
        self.decoders = None if decoders is None else [each.name for each in distinct_decoders(decoders)]
        self.label = self.labelled(label)

    def statistics(self) -> tuple[Statistic, ...]:
        """Return the statistics that the start wants."""
        return () if self._start is None else self._start.statistics()

    def settled(self, fisher_kind: FisherKind, fisher_data: DataChoice, decoders: Sequence[DecoderConfig] = ()) -> Self:
        """Return the method with the experiment's choices, its decoders only where there is something to choose."""
        settled = copy(self)
        if self._start is not None:
            settled._start = self._start.settled(fisher_kind, fisher_data, decoders)
        if self.decoders is None:
            settled.decoders = [each.name for each in decoders] or None
        if self.target is Target.auto and settled.decoders == ["expert_head"]:
            settled.target = Target.own
        if settled.target is not Target.auto and self.ridge is not None:
            settled.decoders = None
        return settled

    @torch.inference_mode(False)
    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row of the code; see `Method.make`."""
        check_experts(experts, row)
        targets = [Target.own, Target.both] if self.target is Target.auto else [self.target]
        options = [(target, ridge) for target in targets for ridge in ([self.ridge] if self.ridge else RIDGES)]
        residuals = {}
        start = None if self._start is None else self._start.make(experts, row)
        if len(options) > 1:
            decoders = [DecoderConfig.named(name) for name in self.decoders or [LINEAR.name]]
            for option in options:
                trial = self._refit(experts, row, start, *option, held_out=True)[0]
                residuals[option] = held_out_error(experts, trial, row, decoders)
            check_errors(residuals.values(), self.label)
        best = min(options, key=lambda option: residuals.get(option, 0.0))
        network, averaged, _ = self._refit(experts, row, start, *best)
        check_finite(parameters_of(network), f"the coded model of method '{self.label}'")
        check_coded(network, experts, self.label)
        self._warn_of(averaged, network)
        taken: dict[str, Any] = {"target": str(best[0]), "ridge": best[1], "averaged": averaged}
        if start is not None:
            taken |= {f"start_{name}": value for name, value in start.chosen.items()}
        if residuals:
            taken["held_out_error"] = {f"{target}/{ridge:g}": r for (target, ridge), r in residuals.items()}
        return CodedModel(network, taken)

    @torch.inference_mode(False)
    def pack(
        self, experts: Experts, row: Sequence[float], made: CodedModel, base: Base, compression: Compression
    ) -> Compressed:
        """Return the coded model of one row refitted once more, every matrix rounded when it has been fitted.

        A layer is rounded column by column, the later ones making up for the errors of those before, its bias is fitted
        to what that leaves, and the next layer to the inputs that the rounded ones give (`coin.merging.rounding`). What
        cannot be refitted is rounded to the nearest before all else. See `Method.pack`.
        """
        if compression.bits is None or compression.rounding is RoundingKind.nearest:
            return super().pack(experts, row, made, base, compression)
        bits, base_bits, start = (
            compression.bits,
            compression.base_bits,
            None if self._start is None else self._start.make(experts, row),
        )

        def against(network: nn.Module) -> Rounding:
            return Rounding(reference_of(network, base, base_bits), bits)

        options = Target(made.chosen["target"]), made.chosen["ridge"]
        network, _, rounding = self._refit(experts, row, start, *options, against=against)
        assert rounding is not None
        rounded, reference = rounding.rounded, rounding.reference
        return compress(network, reference, bits=bits, base_bits=base_bits, rounded=rounded)

    def _warn_of(self, averaged: Sequence[str], network: nn.Module) -> None:
        sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
        share = sum(sizes[name] for name in averaged) / sum(sizes.values())
        if share > MOST_AVERAGED:
            warnings.warn(
                f"method '{self.label}' kept the average of {share:.0%} of the parameters of {type(network).__name__} "
                f"({len(averaged)} tensors, such as '{averaged[0]}'), which are no affine map's that runs once, or "
                "whose rows cannot be told to be sample by sample; compare it with other methods on this network",
                CoinWarning,
                stacklevel=3,
            )

    def _refit(
        self,
        experts: Experts,
        row: Sequence[float],
        start: CodedModel | None,
        target: Target,
        ridge: float,
        *,
        held_out: bool = False,
        against: Callable[[nn.Module], Rounding] | None = None,
    ) -> tuple[nn.Module, list[str], Rounding | None]:
        """Return a network refitted without the held-out samples or with, and the parameters that keep the start.

        `against` makes what its matrices are rounded by of the network as it starts.
        """
        inputs = joined(list(experts.split[0] if held_out else experts.pooled))
        mixtures, shares = _objective(target, row, experts.tasks[: size_of(inputs)])
        if start is None:
            network, states = experts.blank().eval(), list(zip(experts.parameters, experts.buffers, strict=True))
            fill(network, {**average_parameters(experts.parameters, row), **weighted_sum(experts.buffers, row)})
            renormalise(network, experts.buffers)
        else:
            network = clone(start.network)
            states = [(parameters_of(start.network), dict(start.network.named_buffers()))]
        units = affine_units(network, inputs)
        experts.passes += PROBES
        _fold(network, units, states, [1.0] if start else row)
        rounding, kept = None, parameters_of(network).keys() - {name for unit in units for name in unit.names}
        if against is not None:
            rounding = against(network)
            for name in filter(rounding.takes, kept):
                network.get_parameter(name).data.copy_(rounding.round(name, network.get_parameter(name).data))
        parts = [mixture.nonzero().flatten() for mixture in mixtures]
        networks = 1 + sum(map(len, parts)) / size_of(inputs)  # own: every sample is one expert's

        def fitting(floats: int) -> int:
            return max(experts.count, int((self.memory_mib << 20) / max(1, floats * 4 * networks)))

        walk = Walk(
            network, list(experts.networks), inputs, parts, fitting, max((unit.floats for unit in units), default=1)
        )
        with walk, torch.no_grad(), progress(self.label, len(units)) as advance:
            for unit in units:
                fit_unit(network, unit, walk.looks(unit), shares, mixtures, ridge, rounding)
                advance()
        experts.passes += walk.passes
        if self.head:
            fit_head(network, experts, row, held_out=held_out, rounding=rounding)
        return network, sorted(kept), rounding


def _objective(target: Target, row: Sequence[float], task: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the units are fitted to: every sample's mixture of the experts [N, P], and its weight [P].

    A sum of squares whose targets differ is, up to a constant, one with the weighted mean of the targets.
    """
    beta = torch.tensor(row, dtype=torch.float64)
    own_share = {Target.own: 1.0, Target.both: OWN_SHARE, Target.mix: 0.0}[target]
    # Every task's own samples weigh β_i together; in the mixture all samples weigh alike.
    own = own_share * (beta / torch.bincount(task, minlength=len(row)))[task]
    mixed = torch.full_like(own, (1 - own_share) / len(task))
    shares = own + mixed
    mixtures = torch.outer(beta, mixed)
    mixtures[task, torch.arange(len(task))] += own
    return mixtures / shares.where(shares > 0, 1), shares


def _fold(
    network: nn.Module, units: Iterable[Unit], states: Sequence[tuple[State, State]], row: Sequence[float]
) -> None:
    """Write the β-average of other networks' folded maps into a network, whose BatchNorms become shifts."""
    every: list[State] = [ChainMap(*cast(Any, each)) for each in states]  # never written to
    tensors = dict(chain(network.named_parameters(), network.named_buffers()))
    for unit in units:
        if unit.norm is not None:
            eps = cast(_BatchNorm, network.get_submodule(unit.norm)).eps
            maps = [folded(state, unit.weight, unit.bias, unit.norm, eps) for state in every]
            with torch.no_grad():
                for name, tensor in weighted_sum(maps, row).items():
                    tensors[name].copy_(tensor)
