"""Closed-form methods, which choose among candidates and BatchNorm policies on held-out samples."""

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from coin.core.choices import parse_enum
from coin.errors import CoinWarning, ConfigurationError
from coin.files.tensors import State, weighted_sum
from coin.merging.experts import Experts
from coin.merging.held_out import choose
from coin.merging.method import CodedModel, Compress, Method, fill
from coin.networks.batchnorm import BatchNormPolicy, has_batchnorm, recalibrate

SAME = "same"  # what BatchNormPolicy.auto is called where all experts have the same buffers


class Candidate(NamedTuple):
    """One candidate for a coded model's parameters."""

    options: dict[str, Any]  # that distinguish it, plain values for the record
    parameters: State  # in the experts' types
    trial: State | None = None  # computed without the held-out samples, to judge it; by default `parameters`


class MergeMethod(Method):
    """A method in closed form: one or several candidates for the coded model's parameters.

    Of several candidates and BatchNorm policies the one with the smallest error of decoded answers on held-out
    calibration samples is taken (`choose`). No fixed policy is safe: ``average`` ruins networks whose statistics were
    trained along (NDA 17 where 81 is possible), ``recalibrate`` those whose statistics were frozen (18 where 92 is).

    Args:
        batchnorm: The BatchNorm merge policy.
        label: Name of this variant in results, a plain file name.
        compress: Compressed variants of the coded models, beside the whole ones: one section of `Compression`'s
            options, such as ``{bits: 4}``, or several. Their label in results is ``LABEL-4bit``.

    A user's own closed form:

    >>> class Median(coin.MergeMethod):
    ...     name = "median"
    ...     def candidates(self, experts, row):
    ...         every = experts.parameters
    ...         yield {}, {name: torch.stack([each[name] for each in every]).median(0).values for name in every[0]}
    >>> coded = coin.merge_networks(Median(), experts, code)[0]
    >>> torch.equal(coded.bias, torch.stack([each.bias for each in experts]).median(0).values)
    True
    """

    def __init__(
        self, *, batchnorm: BatchNormPolicy = BatchNormPolicy.auto, label: str | None = None, compress: Compress = None
    ) -> None:
        super().__init__(label, compress)
        self.batchnorm = parse_enum(BatchNormPolicy, "batchnorm", batchnorm)
        self.reads_initial = self.reads_initial or self.batchnorm is BatchNormPolicy.keep

    @abstractmethod
    def candidates(self, experts: Experts, row: Sequence[float]) -> Iterator[Candidate | tuple[dict[str, Any], State]]:
        """Yield every candidate, or its options and parameters; the experts have been checked."""

    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row of the code; see `Method.make`."""
        experts.check(row)
        candidates = [Candidate(*each) for each in self.candidates(experts, row)]
        best, policy, errors = self._best(experts, row, candidates)
        network = self._build(experts, row, best.parameters, policy, held_out=False)
        experts.check_coded(network, self.label)
        taken = best.options | ({"batchnorm": policy} if policy else {})
        return CodedModel(network, taken | ({"held_out_error": errors} if errors else {}))

    def _best(
        self, experts: Experts, row: Sequence[float], candidates: Sequence[Candidate]
    ) -> tuple[Candidate, str, dict[str, float]]:
        """Return the best candidate and BatchNorm policy, and all errors by the candidates' data and the policies."""
        if len(candidates) > 1 and not experts.is_calibrated:
            found = f"found no calibration inputs, by which method '{self.label}' chooses"
            raise ConfigurationError(f"{found}; give them, or set its options")
        options = list(product(candidates, self._policies(experts)))

        def trial(option: tuple[Candidate, str]) -> nn.Module:
            (_, parameters, without), policy = option
            return self._build(experts, row, parameters if without is None else without, policy, held_out=True)

        def name(option: tuple[Candidate, str]) -> str:
            data = [str(value) for name, value in option[0].options.items() if name.endswith("_data")]
            return "/".join(filter(None, [*data, option[1]]))

        (best, policy), errors = choose(options, trial, experts, row, self.label)
        return best, policy, dict(zip(map(name, options), errors, strict=False))

    def _policies(self, experts: Experts) -> list[str]:
        """Return the BatchNorm policies to choose from; an empty one without BatchNorm."""
        if not has_batchnorm(experts.source.skeleton):
            return [""]
        if self.batchnorm is not BatchNormPolicy.auto:
            return [str(self.batchnorm)]
        first, *others = experts.buffers
        floating = [name for name, buffer in first.items() if buffer.is_floating_point()]
        if all(torch.equal(first[name], other[name]) for other in others for name in floating):
            return [SAME]
        if not experts.is_calibrated or experts.split[0].num_samples < 2:
            found = "two calibration samples" if experts.is_calibrated else "no calibration inputs"
            warnings.warn(
                f"found {found}, needed by method '{self.label}' to choose its BatchNorm policy: it averages the "
                "statistics, which can be the worst choice; give the tasks' inputs, or set batchnorm",
                CoinWarning,
                stacklevel=4,
            )
            return [str(BatchNormPolicy.average)]
        return [str(BatchNormPolicy.average), str(BatchNormPolicy.recalibrate)]

    def _build(
        self, experts: Experts, row: Sequence[float], parameters: State, policy: str, *, held_out: bool
    ) -> nn.Module:
        """Return the coded model with its buffers; if `held_out`, recalibrated without the held-out samples."""
        buffers = weighted_sum(experts.buffers, row)
        if policy == BatchNormPolicy.keep:
            initial = experts.initial()[1]
            buffers = {name: initial.get(name, tensor) for name, tensor in buffers.items()}
        network = experts.empty_model().eval()
        fill(network, {**parameters, **buffers})
        if policy == BatchNormPolicy.recalibrate:
            experts.passes += recalibrate(network, experts.split[0] if held_out else experts.pooled)
        return network
