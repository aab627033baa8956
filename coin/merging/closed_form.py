"""Closed-form methods, and their choice among candidates and BatchNorm policies on held-out samples."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from coin.coding import Answers, DecoderConfig, DecoderKind, make_decoder, uniform
from coin.core.choices import parse_enum
from coin.errors import CoinWarning, ConfigurationError, HeadError, NumericalError
from coin.files.tensors import State, weighted_sum
from coin.merging.experts import Experts
from coin.merging.method import CodedModel, Method, fill
from coin.networks.batchnorm import BatchNormPolicy, batchnorms, recalibrate

LINEAR = DecoderConfig(DecoderKind.linear)


class Candidate(NamedTuple):
    """One candidate for a coded model's parameters."""

    options: dict[str, Any]  # that distinguish it, plain values for the record
    parameters: State  # in the experts' types
    trial: State | None = None  # computed without the held-out samples, to judge it; by default `parameters`


class MergeMethod(Method):
    """A method in closed form: one or several candidates for the coded model's parameters.

    Of several candidates and BatchNorm policies the one with the smallest error of decoded answers on held-out
    calibration samples is taken (`held_out_error`).

    Args:
        batchnorm: The BatchNorm merge policy.
        decoders: For which decoders a choice is made, by their mean error; by default the experiment's, or linear.
        label: Name of this variant in results, a plain file name.
        compress: Compressed variants beside the whole ones: sections of `Compression`'s options, as ``{bits: 4}``.

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

    def __init__(self, *, batchnorm: BatchNormPolicy = BatchNormPolicy.auto, **options: Any) -> None:
        super().__init__(**options)
        self.batchnorm = parse_enum(BatchNormPolicy, "batchnorm", batchnorm)
        self.reads_initial = self.reads_initial or self.batchnorm is BatchNormPolicy.keep

    @abstractmethod
    def candidates(self, experts: Experts, row: Sequence[float]) -> Iterator[Candidate | tuple[dict[str, Any], State]]:
        """Yield every candidate, or its options and parameters; the experts have been checked."""

    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row of the code; see `Method.make`.

        A single option is not tried, and has no error; of equally good ones the first is taken.
        """
        experts.check(row)
        candidates = [Candidate(*each) for each in self.candidates(experts, row)]
        if len(candidates) > 1 and not experts.is_calibrated:
            found = f"found no calibration inputs, by which method '{self.label}' chooses"
            raise ConfigurationError(f"{found}; give them, or set its options")
        options = list(product(candidates, self._policies(experts)))
        judges = [DecoderConfig.named(name) for name in self.decoders or [LINEAR.name]]
        errors, names = list[float](), list[str]()
        for (chosen, parameters, trial), policy in options if len(options) > 1 else ():
            coded = self._build(experts, row, parameters if trial is None else trial, policy, held_out=True)
            errors.append(held_out_error(experts, coded, row, judges))
            data = [str(value) for name, value in chosen.items() if name.endswith("_data")]
            names.append("/".join(filter(None, [*data, policy])))
        if errors and not any(map(math.isfinite, errors)):
            raise NumericalError(f"the outputs of method '{self.label}' on held-out calibration samples are not finite")
        best, policy = options[errors.index(min(errors)) if errors else 0]
        network = self._build(experts, row, best.parameters, policy, held_out=False)
        experts.check_coded(network, self.label)
        taken = best.options | ({"batchnorm": policy} if policy else {})
        tried = {"held_out_error": dict(zip(names, errors, strict=True))} if errors else {}
        return CodedModel(network, taken | tried)

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
            told = f"found no calibration inputs, needed by method '{self.label}' to choose its BatchNorm policy: it"
            advice = "averages statistics, which can be the worst choice; give the tasks' inputs, or set batchnorm"
            warnings.warn(f"{told} {advice}", CoinWarning, stacklevel=3)
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


def held_out_error(
    experts: Experts, coded: nn.Module, row: Sequence[float], decoders: Sequence[DecoderConfig] = (LINEAR,)
) -> float:
    """Return the mean cosine distance of decoded answers to the experts' own on held-out samples, in [0, 2].

    That is the mean over tasks j and decoders of E_{x∈T_j} (1 − cos(f̂_j(x), f_j(x))), with f̂_j what is decoded when
    expert j is lost, and logits less their mean over the classes: unlike the squared error ‖f_c − Σ_i β_i f_i‖ it does
    not prefer outputs that have shrunk. Decoders are fitted on the other samples; with fewer than two of a task only
    linear judges, and expert_head only where heads give the logits, unless it is alone. Infinite if it is no number.
    """
    fitted = experts.tasks[: experts.split[0].num_samples]
    if int(torch.bincount(fitted, minlength=experts.count).min()) < 2:
        decoders = [LINEAR]
    others = [each for each in decoders if each.kind is not DecoderKind.expert_head]
    try:
        heads = experts.heads if len(others) < len(decoders) else None
    except HeadError:
        if not others:
            raise
        heads, decoders = None, others
    features = any(each.reads_features for each in decoders)

    def answers(part: int) -> Answers:
        tasks = experts.tasks[len(fitted) :] if part else fitted
        runs = [*experts.runs(part, features), experts.run(coded, experts.split[part], features)]
        return Answers.of_servers([(run.features, run.logits.double()) for run in runs], experts.count, tasks)

    judged, calibration = answers(1), None
    assert judged.tasks is not None
    own = {task: (judged.tasks == task).nonzero().flatten() for task, share in enumerate(row) if share > 0}
    every = torch.arange(judged.num_samples)  # of few samples, where all are of tasks without a share
    own = {task: samples for task, samples in own.items() if len(samples)} or dict.fromkeys(own, every)
    errors = []
    for task, samples in own.items():
        for config in decoders:
            mine, truth = judged.select(samples), judged.experts[task, samples]
            if config.kind is DecoderKind.linear:
                rest = (weight * mine.experts[i] for i, weight in enumerate(row) if i != task)
                decoded = (mine.coded[0] - sum(rest, torch.zeros(()))) / row[task]
            else:
                decoder = make_decoder(config, uniform(experts.count), [task], heads)
                if decoder.needs_fit:
                    calibration = calibration or answers(0)
                    decoder.fit(calibration)
                decoded = decoder.decode(mine)[0]
            if truth.shape[1] > 1:
                decoded, truth = (each - each.mean(1, keepdim=True) for each in (decoded, truth))
            errors.append(1 - torch.cosine_similarity(decoded, truth).mean())
    error = float(torch.stack(errors).mean())
    return error if math.isfinite(error) else math.inf
