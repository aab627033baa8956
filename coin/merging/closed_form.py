"""Closed-form methods, and their choice among candidates and BatchNorm policies on held-out samples."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coin.coding import Answers, DecoderKind, make_decoder, uniform
from coin.core.choices import parse_enum
from coin.errors import CoinWarning, ConfigurationError, HeadError, NumericalError
from coin.files.tensors import State, weighted_sum
from coin.merging.experts import Experts
from coin.merging.method import CodedModel, Method, fill
from coin.networks.batchnorm import BatchNormPolicy, batchnorms, recalibrate
from coin.networks.running import centred


class Candidate(NamedTuple):
    """One candidate for a coded model's parameters."""

    options: dict[str, Any]  # that distinguish it, plain values for the record
    parameters: State  # in the experts' types
    trial: State | None = (
        None  # computed without the held-out samples, to judge it; by default `parameters`
    )


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

    def __init__(
        self, *, batchnorm: BatchNormPolicy = BatchNormPolicy.auto, **options: Any
    ) -> None:
        self.batchnorm = parse_enum(BatchNormPolicy, "batchnorm", batchnorm)
        super().__init__(**options)
        self.reads_initial = self.reads_initial or self.batchnorm is BatchNormPolicy.keep

    @abstractmethod
    def candidates(
        self, experts: Experts, row: Sequence[float]
    ) -> Iterator[Candidate | tuple[dict[str, Any], State]]:
        """Yield every candidate, or its options and parameters; the experts have been checked."""

    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row of the code; see `Method.make`.

        A single option is not tried, and has no error; of equally good ones the first is taken.
        """
        candidates = [Candidate(*each) for each in self.candidates(experts, row)]
        if len(candidates) > 1 and not experts.is_calibrated:
            raise ConfigurationError(
                f"found no calibration inputs, by which method '{self.label}' chooses; give them, or set its options"
            )
        choices = list(product(candidates, self._policies(experts)))
        best, policy = choices[0]
        errors: dict[str, float] = {}
        if len(choices) > 1:
            errors = self._held_out_errors(experts, row, choices)
            smallest = min(errors.values())
            best, policy = choices[list(errors.values()).index(smallest)]
        network = self._build(experts, row, best.parameters, policy, held_out=False)
        chosen = dict(best.options)
        if policy:
            chosen["batchnorm"] = policy
        if errors:
            chosen["held_out_error"] = errors
        return CodedModel(network, chosen)

    def _held_out_errors(
        self, experts: Experts, row: Sequence[float], choices: Sequence[tuple[Candidate, str]]
    ) -> dict[str, float]:
        """Return the `held_out_error` of candidates and BatchNorm policies, by the data and policy that they name."""
        judges = [DecoderKind(name) for name in self.decoders or ["linear"]]
        errors = {}
        for candidate, policy in choices:
            parameters = candidate.parameters if candidate.trial is None else candidate.trial
            coded = self._build(experts, row, parameters, policy, held_out=True)
            parts = [
                str(value) for name, value in candidate.options.items() if name.endswith("_data")
            ]
            if policy:
                parts.append(policy)
            errors["/".join(parts)] = held_out_error(experts, coded, row, judges)
        if not any(map(math.isfinite, errors.values())):
            raise NumericalError(
                f"the outputs of method '{self.label}' on held-out calibration samples are not finite"
            )
        return errors

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


def held_out_error(
    experts: Experts,
    coded: nn.Module,
    row: Sequence[float],
    decoders: Sequence[DecoderKind] = (DecoderKind.linear,),
) -> float:
    """Return the mean cosine distance of decoded answers to the experts' own on held-out samples, in [0, 2].

    That is the mean over tasks j and decoders of E_{x∈T_j} (1 − cos(f̂_j(x), f_j(x))), with f̂_j what is decoded when
    expert j is lost, and logits less their mean over the classes: unlike the squared error ‖f_c − Σ_i β_i f_i‖ it does
    not prefer outputs that have shrunk. Decoders are fitted on the other samples; with fewer than two of a task only
    linear judges, and expert_head only where heads give the logits, unless it is alone. Infinite if it is no number.
    """
    num_fitted = experts.split[0].num_samples
    fitted_tasks = experts.tasks[:num_fitted]
    held_out_tasks = experts.tasks[num_fitted:]
    decoders, heads = _usable(experts, decoders, fitted_tasks)
    features = any(each.reads_features for each in decoders)
    held_out = _answers(experts, coded, 1, held_out_tasks, features)
    fitted: Answers | None = None  # for decoders that need a fit
    errors = []
    for task, samples in _samples_of_tasks(row, held_out_tasks).items():
        own = held_out.select(samples)
        truth = centred(held_out.experts[task, samples])
        for kind in decoders:
            if kind is DecoderKind.linear:
                decoded = _subtracted(own, row, task)
            else:
                decoder = make_decoder(kind, uniform(experts.count), [task], heads)
                if decoder.needs_fit:
                    if fitted is None:
                        fitted = _answers(experts, coded, 0, fitted_tasks, features)
                    decoder.fit(fitted)
                decoded = decoder.decode(own)[0]
            cosines = torch.cosine_similarity(centred(decoded), truth)
            errors.append(1 - cosines.mean())
    error = float(torch.stack(errors).mean())
    return error if math.isfinite(error) else math.inf


def _subtracted(answers: Answers, row: Sequence[float], task: int) -> Tensor:
    """Return a task's logits as the linear decoder has them, (f_c − Σ_{i≠j} β_i f_i) / β_j [P, C]."""
    rest = torch.zeros(())
    for expert, weight in enumerate(row):
        if expert != task:
            rest = rest + weight * answers.experts[expert]
    return (answers.coded[0] - rest) / row[task]


def _usable(
    experts: Experts, decoders: Sequence[DecoderKind], fitted_tasks: Tensor
) -> tuple[Sequence[DecoderKind], Any]:
    """Return the decoders that can judge, and the experts' heads if one reads them."""
    counts = torch.bincount(fitted_tasks, minlength=experts.count)
    if int(counts.min()) < 2:
        decoders = [DecoderKind.linear]
    others = [each for each in decoders if each is not DecoderKind.expert_head]
    if len(others) == len(decoders):
        return decoders, None
    try:
        return decoders, experts.heads
    except HeadError:
        if not others:
            raise
        return others, None


def _answers(
    experts: Experts, coded: nn.Module, part: int, tasks: Tensor, features: bool
) -> Answers:
    """Return all networks' answers to the samples of a part of `Experts.split`."""
    runs = [*experts.runs(part, features), experts.run(coded, experts.split[part], features)]
    return Answers.of_servers(
        [(run.features, run.logits.double()) for run in runs], experts.count, tasks
    )


def _samples_of_tasks(row: Sequence[float], tasks: Tensor) -> dict[int, Tensor]:
    """Return by task with a share in the row its samples; where no such task has any, all samples for each."""
    shared = [task for task, share in enumerate(row) if share > 0]
    found = {}
    for task in shared:
        samples = (tasks == task).nonzero().flatten()
        if len(samples) > 0:
            found[task] = samples
    return found or dict.fromkeys(shared, torch.arange(len(tasks)))
