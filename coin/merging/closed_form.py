"""Closed-form methods, and the choice of a BatchNorm policy on held-out samples."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from coin.core.choices import parse_enum
from coin.core.devices import double
from coin.errors import CoinWarning, ConfigurationError, NumericalError
from coin.files.tensors import State, weighted_sum
from coin.merging.experts import Experts, fill
from coin.merging.method import CodedModel, Method
from coin.networks.batchnorm import BatchNormPolicy, batchnorms, recalibrate


class MergeMethod(Method):
    """A method in closed form for the coded model's parameters.

    Of several BatchNorm policies the one with the smallest `coin.Residual` on held-out calibration samples is taken.

    Args:
        batchnorm: The BatchNorm merge policy.
        label: Name of this variant in results, a plain file name.
        compress: Compressed variants beside the whole ones: sections of `Compression`'s options, as ``{bits: 4}``.

    A user's own closed form:

    >>> class Median(coin.MergeMethod):
    ...     name = "median"
    ...     def parameters(self, experts, row):
    ...         every = experts.parameters
    ...         return {name: torch.stack([each[name] for each in every]).median(0).values for name in every[0]}
    >>> coded = coin.merge_networks(Median(), experts, code)[0]
    >>> torch.equal(coded.bias, torch.stack([each.bias for each in experts]).median(0).values)
    True
    """

    def __init__(
        self, *, batchnorm: BatchNormPolicy = BatchNormPolicy.auto, **options: Any
    ) -> None:
        self.batchnorm = parse_enum(BatchNormPolicy, "batchnorm", batchnorm)
        super().__init__(**options)
        self.reads_initial = self.reads_initial or self.batchnorm is BatchNormPolicy.keep

    @abstractmethod
    def parameters(self, experts: Experts, row: Sequence[float]) -> State:
        """Return the coded model's parameters, in the experts' types; the experts have been checked."""

    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row of the code; see `Method.make`.

        A single BatchNorm policy is not tried, and has no residual; of equally good ones the first is taken.
        """
        parameters = self.parameters(experts, row)
        policies = self._policies(experts)
        policy = policies[0]
        chosen: dict[str, Any] = {}
        if len(policies) > 1:
            residuals = self._held_out_residuals(experts, row, parameters, policies)
            policy = min(policies, key=residuals.__getitem__)
            chosen["held_out_residual"] = residuals
        if policy:
            chosen["batchnorm"] = policy
        network = self._build(experts, row, parameters, policy, held_out=False)
        return CodedModel(network, chosen)

    def _held_out_residuals(
        self, experts: Experts, row: Sequence[float], parameters: State, policies: Sequence[str]
    ) -> dict[str, float]:
        """Return by BatchNorm policy the residual on the held-out samples, infinite where it is not finite."""
        target = double(experts.mixture(row, 1))
        residuals = {}
        for policy in policies:
            coded = self._build(experts, row, parameters, policy, held_out=True)
            run = experts.run(coded, experts.split[1])
            # Not by a metric, which would wait for other processes: one alone merges.
            error = double(run.logits) - target
            residual = float(error.norm() / target.norm())
            residuals[policy] = residual if math.isfinite(residual) else math.inf
        if not any(map(math.isfinite, residuals.values())):
            raise NumericalError(
                f"the outputs of method '{self.label}' on held-out calibration samples are not finite"
            )
        return residuals

    def _policies(self, experts: Experts) -> list[str]:
        """Return the BatchNorm policies to choose from; an empty one without BatchNorm."""
        if not batchnorms(experts.source.skeleton):
            return [""]
        if self.batchnorm is not BatchNormPolicy.auto:
            return [str(self.batchnorm)]
        first, *others = experts.buffers
        floating = [name for name, buffer in first.items() if buffer.is_floating_point()]
        if all(torch.equal(first[name], other[name]) for other in others for name in floating):
            return ["same"]
        if not experts.is_calibrated:
            warnings.warn(
                f"found no calibration inputs, needed by method '{self.label}' to choose its BatchNorm policy: it "
                "averages statistics, which can be the worst choice; give the tasks' inputs, or set batchnorm",
                CoinWarning,
                stacklevel=3,
            )
            return [str(BatchNormPolicy.average)]
        if experts.split[0].num_samples < 2:
            raise ConfigurationError(
                f"found {experts.pooled.num_samples} calibration samples in all, "
                "expected at least 3 to choose a BatchNorm policy, of which one is held out; "
                "give more, or set the method's batchnorm"
            )
        return [str(BatchNormPolicy.average), str(BatchNormPolicy.recalibrate)]

    def _build(
        self,
        experts: Experts,
        row: Sequence[float],
        parameters: State,
        policy: str,
        *,
        held_out: bool,
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
