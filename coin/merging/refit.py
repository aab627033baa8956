"""Refit: every layer of the average fitted anew, in the order of execution, on the coded network's own inputs."""

import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from coin.coding import DecoderConfig, DecoderKind
from coin.core.batches import clone
from coin.core.choices import check_integer, check_number, parse_enum
from coin.core.progress import progress_bar
from coin.errors import CoinWarning
from coin.files.tensors import weighted_sum
from coin.merging.average import Average, average_parameters, fit_head
from coin.merging.closed_form import choose
from coin.merging.experts import Experts
from coin.merging.method import CodedModel, Compress, Method, fill, starting_method
from coin.merging.passes import ExpertOutputs, chosen_rows, fit_in_order
from coin.merging.target import AHEAD, FAR, Target, objective, spread
from coin.merging.units import PROBES, Trace, affine_units, fold_average
from coin.networks.batchnorm import BatchNormPolicy
from coin.networks.compressed import Base, Compressed, Rounding, compress, reference_of
from coin.networks.compression import Compression, RoundingKind
from coin.networks.experts import parameters_of, tensors_of
from coin.statistics import FisherKind
from coin.statistics.statistic import DataChoice, Statistic

MOST_AVERAGED = 0.1  # with a larger share of parameters that cannot be refitted a warning is given
FEWEST_MIB = 64  # of experts' outputs at once: with fewer, experts run too often
RIDGES = (0.01, 0.03, 0.1, 0.3)  # what the ridge is chosen from


class Refit(Method):
    """Every layer of the β-average, or of another start, refitted on the coded network's own inputs, then the head.

    Let a be the coded network's input of a layer, all layers before it being refitted already, z_i expert i's output of
    the layer for the same sample, with the BatchNorm behind it, and W̄ the start's map with its BatchNorm folded in,
    γ/σ·W (of ``average`` the β-average of the experts' folded maps). The layer becomes the minimiser of

        own:  Σ_i β_i E_{x∈T_i} ‖W a(x) + b − z_i(x)‖²        + λ ‖W − W̄‖²
        both: `OWN_SHARE` / N (0.6 / N) of that sum, and the rest of E_{x pooled} ‖W a(x) + b − Σ_i β_i z_i(x)‖²

    over the calibration samples and their positions, λ = ridge × the mean diagonal entry of the covariance of a. A
    grouped convolution is a regression for each group, a normalisation that follows no linear map one for each channel.
    A BatchNorm becomes an identity that carries b. What cannot be refitted (an embedding, a weight that is used twice)
    keeps the start, and is named. At last the head is fitted to Σ_i β_i f_i (`fit_head`). No labels, no training.

    It takes one forward pass of every expert (``own``: on its own task's samples alone), and one of the coded network,
    in which every layer is fitted just before it is called: to `ROWS` rows for each unknown (more or fewer by what they
    cost beside the layer's calls), at positions drawn evenly, but tokens as often as the outputs depend on them. Where
    activations do not fit `memory_mib`, it takes as many samples as fit, with a warning; where experts' outputs do not
    fit a quarter of it, experts run several times.

    ``own`` is best near a strong base, ``both`` elsewhere and for many experts. Transformers that were fine-tuned far
    want ``both`` with ``start: coin`` and ``last: 0.5``.

    Source: this project's. Related, none of which codes: RegMean++ (the merged network's inputs), Chain of Merges, LOT.

    Args:
        target: ``own``, ``both`` or ``auto``.
        start: ``average``, another closed form's name, or its ``class_path`` and ``init_args``; made of all samples.
        last: Which share of the layers is refitted, the last ones, in (0, 1]; the others keep the start.
        decoders: For which decoders target and ridge are chosen, by their mean error; by default the experiment's.
        ridge: λ, relative and dimensionless, above 0; none has it chosen.
        head: Whether the head is fitted at last.
        memory_mib: Bound on the coded network's activations, in MiB; a quarter of it is one on the experts' outputs.
        label: Name of this variant in results.
        compress: As for every method (`MergeMethod`); by default it is rounded while it is refitted (`pack`).

    >>> coin.merge_networks(coin.Refit("own"), experts, code, calibration=inputs).chosen[0]["averaged"]
    []
    """

    name = "refit"
    batchnorm = BatchNormPolicy.keep
    rounds = True

    def __init__(
        self,
        target: Target = Target.auto,
        ridge: float | None = 0.1,
        *,
        start: str | dict[str, Any] = Average.name,
        last: float = 1.0,
        head: bool = True,
        decoders: list[str] | None = None,
        memory_mib: int = 8192,
        label: str | None = None,
        compress: Compress = None,
    ) -> None:
        self.target = parse_enum(Target, "target", target)
        if ridge is not None:
            check_number("ridge", ridge, low=0, strict=True)
        check_number("last", last, low=0, most=1, strict=True)
        check_integer("memory_mib", memory_mib, 1)
        self.ridge, self.last, self.head, self.memory_mib = ridge, last, head, memory_mib
        self.start = start
        self._start = None if start == Average.name else starting_method(start, reads_initial=True)
        self.reads_initial = self._start is not None and self._start.reads_initial
        super().__init__(label, compress, decoders)

    def statistics(self) -> tuple[Statistic, ...]:
        """Return the statistics that the start wants."""
        return () if self._start is None else self._start.statistics()

    def with_defaults(
        self, fisher_kind: FisherKind, fisher_data: DataChoice, decoders: Sequence[DecoderConfig] = ()
    ) -> Self:
        """Return the method with the experiment's choices, its decoders only where there is something to choose."""
        method = super().with_defaults(fisher_kind, fisher_data, decoders)
        if self._start is not None:
            method._start = self._start.with_defaults(fisher_kind, fisher_data, decoders)
        if self.target is Target.auto and method.decoders == [str(DecoderKind.expert_head)]:
            method.target = Target.own
        if method.target is not Target.auto and self.ridge is not None and self._start is None:
            method.decoders = None
        return method

    @torch.inference_mode(False)
    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row of the code; see `Method.make`."""
        experts.check(row)
        targets, apart = [self.target], None
        if self.target is Target.auto:
            apart = spread(experts.parameters, row)
            targets = [Target.both] if apart > FAR else [Target.own, Target.both]
        options = [(target, ridge) for target in targets for ridge in ([self.ridge] if self.ridge else RIDGES)]
        made = None if self._start is None else self._start.make(experts, row)
        start = self._started(experts, row, made)
        trial = partial(self._refit, experts, row, start, held_out=True)
        handicaps = [1 / AHEAD if target is Target.both else 1.0 for target, _ in options]
        by = experts, row, self.label, self.decoders
        (target, ridge), errors = choose(options, lambda of: trial(*of), *by, handicaps)
        network = self._refit(experts, row, start, target, ridge)
        experts.check_coded(network, self.label)
        self._warn_of_averaged(start)
        chosen: dict[str, Any] = {"target": str(target), "ridge": ridge, "averaged": start.averaged}
        if apart is not None:
            chosen["spread"] = apart
        if made is not None:
            chosen |= {f"start_{name}": value for name, value in made.chosen.items()}
        if errors:
            chosen["held_out_error"] = {f"{t}/{r:g}": error for (t, r), error in zip(options, errors, strict=True)}
        return CodedModel(network, chosen, start)

    @torch.inference_mode(False)
    def pack(
        self, experts: Experts, row: Sequence[float], made: CodedModel, base: Base, compression: Compression
    ) -> Compressed:
        """Return the coded model of one row refitted once more, every matrix rounded when it has been fitted.

        It is rounded column by column (`coin.networks.delta`), its bias fitted to the rest, and the next layer to the
        inputs that follow. What cannot be refitted is rounded to the nearest first.
        """
        if compression.bits is None or compression.rounding is RoundingKind.nearest:
            return super().pack(experts, row, made, base, compression)
        bits, base_bits = compression.bits, compression.base_bits
        rounding = Rounding(reference_of(made.start.network, base, base_bits), bits)
        target, ridge = Target(made.chosen["target"]), made.chosen["ridge"]
        network = self._refit(experts, row, made.start, target, ridge, rounding=rounding)
        return compress(network, rounding.reference, bits=bits, base_bits=base_bits, rounded=rounding.rounded)

    def _started(self, experts: Experts, row: Sequence[float], made: CodedModel | None) -> "_Start":
        """Return the β-average, or another method's coded model, with its BatchNorms folded in and its units found."""
        if made is None:
            network, states = experts.empty_model().eval(), list(experts.source.tensors)
            fill(network, {**average_parameters(experts.parameters, row), **weighted_sum(experts.buffers, row)})
        else:
            network, states, row = clone(made.network), [tensors_of(made.network)], [1.0]
        trace = affine_units(network, experts.pooled.inputs(torch.arange(min(3, experts.pooled.num_samples))))
        experts.passes += PROBES
        units = trace.units
        fold_average(network, units, states, row)
        averaged = parameters_of(network).keys() - {name for unit in units for name in unit.names}
        last = units[len(units) - math.ceil(self.last * len(units)) :]
        return _Start(network, trace._replace(units=last), sorted(averaged))

    def _warn_of_averaged(self, start: "_Start") -> None:
        """Warn where the parameters that cannot be refitted are more than `MOST_AVERAGED` of the network's."""
        sizes = {name: parameter.numel() for name, parameter in start.network.named_parameters()}
        share = sum(sizes[name] for name in start.averaged) / sum(sizes.values())
        if share > MOST_AVERAGED:
            count = f"{len(start.averaged)} tensors, such as '{start.averaged[0]}'"
            told = f"method '{self.label}' kept the average of {share:.0%} of the parameters of"
            told = f"{told} {type(start.network).__name__} ({count}), which are no affine map's that runs once, one row"
            why = "per sample, outside checkpoints and before any comparison or choice by activations"
            warnings.warn(f"{told} {why}; compare it with other methods on this network", CoinWarning, stacklevel=3)

    def _refit(
        self,
        experts: Experts,
        row: Sequence[float],
        start: "_Start",
        target: Target,
        ridge: float,
        *,
        held_out: bool = False,
        rounding: Rounding | None = None,
    ) -> nn.Module:
        """Return a network refitted without the held-out samples or with; its matrices rounded, if so."""
        network, trace = clone(start.network), start.trace
        if rounding is not None:
            fitted = {name for unit in trace.units for name in unit.names}
            for name in filter(rounding.takes, parameters_of(network).keys() - fitted):
                network.get_parameter(name).data.copy_(rounding.round(name, network.get_parameter(name).data))
        every = experts.split[0].num_samples if held_out else experts.pooled.num_samples
        samples = min(every, max(experts.count, (self.memory_mib << 20) // (4 * trace.floats)))
        if samples < every:
            needed = math.ceil(4 * trace.floats * every / 2**20)
            told = f"method '{self.label}' fits its layers on {samples} of {every} calibration samples, which need"
            warnings.warn(f"{told} memory_mib={needed}; found {self.memory_mib}", CoinWarning, stacklevel=4)
        inputs, task = experts.pooled.inputs(torch.arange(samples)), experts.tasks[:samples]
        budget = max(self.memory_mib // 4, FEWEST_MIB) << 20
        rows = chosen_rows(network, trace, inputs, task, *objective(target, row, task, held_out), budget)
        targets = ExpertOutputs(experts.source.each_network, trace, rows, experts.pooled.batch_size, budget)
        with progress_bar(f"{self.label}, layers", targets.total) as bar:
            targets.advance = bar.update
            fit_in_order(network, trace, rows, targets, ridge, rounding)
        experts.passes += rows.passes + targets.passes + samples
        if self.head:
            fit_head(network, experts, row, held_out=held_out, rounding=rounding)
        return network


class _Start(NamedTuple):
    """What is refitted: the start, its pass with the units to refit, and the parameters that stay."""

    network: nn.Module
    trace: Trace
    averaged: list[str]
