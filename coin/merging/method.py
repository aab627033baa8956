"""What all methods have in common: options, checks, and the choices that are made on held-out calibration samples."""

import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from coin.batches import Forward, plain, samples_of
from coin.choices import chosen
from coin.coding import Code
from coin.errors import CoinWarning, ConfigurationError, NumericalError, StateError
from coin.files.tensors import State, check_finite, check_same_layout, weighted_sum
from coin.merging.experts import Experts, Given, parameters_of
from coin.networks.batchnorm import BatchNormPolicy, recalibrate
from coin.networks.weights import fill_network
from coin.statistics import FisherKind
from coin.statistics.statistic import DataChoice, Statistic

Number = TypeVar("Number", bound=float)

_FEW = 10
"""With fewer held-out samples a choice is told of: it is little better than chance."""

_RESERVED = ("none", "oracle")
_LABEL = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class CodedModel:
    """What a method makes for one row of a code.

    Attributes:
        network: The coded model, in eval mode.
        chosen: What was chosen on the way, and how a solve ended: plain values for the record.
    """

    network: nn.Module
    chosen: dict[str, Any] = field(default_factory=dict)


class Method(ABC):
    """Makes coded models from experts and calibration data.

    Attributes:
        name: The name in result tables.
        label: What results and files call this variant; the name by default.
        batchnorm: What becomes of BatchNorm's running statistics.
        is_trained: Whether it trains with a Trainer, on all processes; others run on the first alone.
        reads_initial: Whether it needs the shared initialisation.
        samples_per_task: P of its own; none takes the experiment's.
        augmentation: What happens to calibration samples that it trains on.
    """

    name: ClassVar[str]
    is_trained: ClassVar[bool] = False
    reads_initial: bool = False
    samples_per_task: int | None = None
    augmentation: str = "none"
    label: str
    batchnorm: BatchNormPolicy

    @abstractmethod
    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row of the code.

        Args:
            experts: The experts, and what their calibration data tell.
            row: The code row β ``[N]``, non-negative with sum 1.

        Raises:
            ConfigurationError: The row is none, or something the method needs is not there.
            StateError: Experts or statistics differ in names or shapes, hold a NaN or an infinity, or a Fisher entry
                is negative; the message names the expert and the tensor.
            NumericalError: The method broke down on sound inputs.
        """

    def statistics(self) -> tuple[Statistic, ...]:
        """Return the statistics of the experts that it wants."""
        return ()

    def settled(self, fisher_kind: FisherKind, fisher_data: DataChoice) -> Self:
        """Return the method with the experiment's choice where its options leave the kind or the data open."""
        return self


def merge_networks(
    method: Method,
    networks: Sequence[nn.Module],
    code: Code,
    *,
    fishers: Given | None = None,
    grams: Given | None = None,
    initial: nn.Module | None = None,
    calibration: Sequence[Iterable[Any]] | None = None,
    forward: Forward | None = None,
) -> list[nn.Module]:
    """Merge N experts into coded models: R new networks in eval mode, one a row of the code, R×N.

    `Experts` says what the other arguments are. To learn what was chosen, use ``method.make(coin.Experts(…), row)``.
    The networks are of the experts' class and called as it says, whatever `forward`.

    Raises:
        ConfigurationError: Something the method or its BatchNorm policy wants is not there.
        StateError: The experts do not fit together, or the result is not finite.
    """
    experts = Experts(networks, fishers=fishers, grams=grams, initial=initial, calibration=calibration, forward=forward)
    return [plain(method.make(experts, row).network) for row in code.matrix.tolist()]


class MergeMethod(Method):
    """A method in closed form: one or several candidates for the coded model's parameters.

    Where there is a choice, of candidates or of a BatchNorm policy, the smallest error of decoded answers on held-out
    calibration samples decides (`held_out_error`): no labels, and the passes count. No
    fixed policy is safe: ``average`` ruins networks whose statistics were trained along (NDA 17 where 81 is to be had),
    ``recalibrate`` those whose statistics were frozen (18 where 92 is).

    Args:
        batchnorm: Policy for BatchNorm statistics, as for every method.
        label: Name of this variant in results.

    Raises:
        ConfigurationError: The policy is unknown, or the label cannot be used (`check_label`).
    """

    def __init__(self, *, batchnorm: BatchNormPolicy = BatchNormPolicy.auto, label: str | None = None) -> None:
        self.batchnorm = chosen(BatchNormPolicy, "batchnorm", batchnorm)
        self.label = check_label(self.name if label is None else label)
        self.reads_initial = self.reads_initial or self.batchnorm is BatchNormPolicy.keep

    @abstractmethod
    def candidates(self, experts: Experts, row: Sequence[float]) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
        """Yield (what it is, parameters) of every candidate, in the experts' types; the experts have been checked."""

    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row of the code; see `Method.make`."""
        check_row(row, experts.count)
        check_each(experts.parameters, "expert")
        candidates = list(self.candidates(experts, row))
        trials = self.trials(experts, row) if len(candidates) > 1 and experts.is_calibrated else []
        policies = self._policies(experts)
        if not experts.is_calibrated and len(candidates) > 1:
            raise ConfigurationError(
                f"found no calibration inputs, by which method '{self.label}' chooses; give them, or set its options"
            )
        measured = len(candidates) * len(policies) > 1
        for _, parameters in (*candidates, *trials):
            check_finite(parameters, f"the coded model of method '{self.label}'")
        residuals = {
            (place, policy): held_out_error(experts, self._build(experts, row, parameters, policy, True), row)
            for place, (_, parameters) in enumerate(trials or candidates)
            for policy in policies
            if measured
        }
        place, policy = min(residuals, key=lambda each: residuals[each], default=(0, policies[0]))
        options, parameters = candidates[place]
        coded = self._build(experts, row, parameters, policy, False)
        taken = options | ({"batchnorm": policy} if policy else {})
        if measured:
            if (held_out := experts.held_out_outputs.shape[1]) < _FEW:
                warnings.warn(
                    f"method '{self.label}' chose by {held_out} held-out calibration samples, expected at least "
                    f"{_FEW}; raise samples_per_task, or set its options",
                    CoinWarning,
                    stacklevel=2,
                )
            check_residuals([residuals[place, policy]], self.label)
            taken["held_out_error"] = {
                "/".join(filter(None, [*_data(candidates[place][0]), policy])): residual
                for (place, policy), residual in residuals.items()
            }
        check_buffers(coded, experts.buffers, self.label)
        return CodedModel(coded, taken)

    def trials(self, experts: Experts, row: Sequence[float]) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
        """Return what the candidates are judged by, their like without held-out data; nothing for themselves."""
        return []

    def measure(self, experts: Experts, row: Sequence[float], parameters: State) -> float:
        """Return the held-out error of parameters, with the better of the BatchNorm policies."""
        networks = (self._build(experts, row, parameters, policy, True) for policy in self._policies(experts))
        return min(held_out_error(experts, network, row) for network in networks)

    def _policies(self, experts: Experts) -> list[str]:
        """Return the BatchNorm policies to choose from; an empty one where there is no BatchNorm."""
        if not experts.has_batchnorm:
            return [""]
        if self.batchnorm is not BatchNormPolicy.auto:
            return [str(self.batchnorm)]
        if _alike(experts.buffers):
            return [SAME]
        fitted = chain.from_iterable(map(samples_of, experts.split[0])) if experts.is_calibrated else ()
        if len(list(islice(fitted, 2))) < 2:
            found = "two calibration samples" if experts.is_calibrated else "no calibration inputs"
            warnings.warn(
                f"found {found}, by which method '{self.label}' chooses what becomes of BatchNorm's statistics: it "
                "averages them, which can be the worst choice; give the tasks' inputs, or set batchnorm",
                CoinWarning,
                stacklevel=3,
            )
            return [str(BatchNormPolicy.average)]
        return [str(BatchNormPolicy.average), str(BatchNormPolicy.recalibrate)]

    def _build(
        self, experts: Experts, row: Sequence[float], parameters: State, policy: str, measured: bool
    ) -> nn.Module:
        """Return the coded model with its buffers; recalibrated without the held-out samples if it is measured on."""
        buffers = weighted_sum(experts.buffers, row)
        if policy == BatchNormPolicy.keep:
            initial = experts.initial()[1]
            buffers = {name: initial.get(name, tensor) for name, tensor in buffers.items()}
        network = experts.blank().eval()
        fill(network, {**parameters, **buffers})
        if policy == BatchNormPolicy.recalibrate:
            experts.passes += recalibrate(network, experts.split[0] if measured else experts.pooled)
        return network


def fill(network: nn.Module, state: State) -> None:
    """Copy parameters and buffers into a network, which may name tied ones twice."""
    own = network.state_dict()  # tensors that share the network's memory
    state = {name: tensor for name, tensor in state.items() if name in own}
    fill_network(network, {**own, **state}, "the coded model")


def refined(start: CodedModel, label: str) -> CodedModel:
    """Return a coded model that was changed since it was made, after checking it; its residual was the start's."""
    check_finite(parameters_of(start.network), f"the coded model of method '{label}'")
    renamed = {"held_out_error": "held_out_error_of_start"}
    return CodedModel(start.network, {renamed.get(name, name): value for name, value in start.chosen.items()})


SAME = "same"
"""What `BatchNormPolicy.auto` is called where all experts have the same buffers."""


def held_out_error(experts: Experts, coded: nn.Module, row: Sequence[float]) -> float:
    """Return how far decoded answers point away from the experts' own on held-out calibration samples, from 0 to 2.

    With f̂_j = (f_c − Σ_{i≠j} β_i f_i) / β_j, the linear decoder's answer, it is the mean over tasks j of
    E_{x∈T_j} (1 − cos(f̂_j(x), f_j(x))), logits taken from their mean over the classes: what class an answer names does
    not change with its size or offset. The squared error ‖f_c − Σ_i β_i f_i‖ does, and prefers outputs that have
    shrunk. Infinite if it is no number.
    """
    logits, tasks = experts.held_out_outputs.double(), experts.tasks[-experts.held_out_outputs.shape[1] :]
    answer = experts.run(coded, experts.split[1]).double()
    own = {task: (tasks == task).nonzero().flatten().to(answer.device) for task, share in enumerate(row) if share > 0}
    if not any(len(samples) for samples in own.values()):  # few samples, all of tasks that have no share
        own = dict.fromkeys(own, torch.arange(len(answer), device=answer.device))
    errors = []
    for task, samples in own.items():
        if len(samples):
            others = sum((weight * logits[i, samples] for i, weight in enumerate(row) if i != task), torch.zeros(()))
            decoded, truth = (answer[samples] - others) / row[task], logits[task, samples]
            if answer.shape[1] > 1:
                decoded, truth = (each - each.mean(1, keepdim=True) for each in (decoded, truth))
            errors.append(1 - torch.cosine_similarity(decoded, truth).mean())
    error = float(torch.stack(errors).mean())
    return error if math.isfinite(error) else math.inf


def check_residuals(residuals: Iterable[float], label: str) -> None:
    """Raise NumericalError where no candidate of a method has a finite held-out error."""
    if not any(map(math.isfinite, residuals)):
        raise NumericalError(
            f"the outputs of method '{label}' on held-out calibration samples are not finite; check the experts' "
            "outputs"
        )


def check_each(states: Sequence[State], what: str) -> None:
    """Raise StateError, which names the expert and the tensor, where states differ in layout or are not finite."""
    names = [f"{what} {index}" for index in range(len(states))]
    check_same_layout(states, names)
    for state, name in zip(states, names, strict=True):
        check_finite(state, name)


def check_buffers(network: nn.Module, buffers: Sequence[State], label: str) -> None:
    """Raise StateError where a coded model's buffer is not finite, unless every expert's is the same infinity."""
    for name, buffer in network.named_buffers():
        if not (buffer.is_floating_point() or buffer.is_complex()) or bool(torch.isfinite(buffer).all()):
            continue
        wrong = ~torch.isfinite(buffer)
        theirs = [state[name].to(buffer)[wrong] for state in buffers if name in state]
        if not all(torch.equal(buffer[wrong], other) for other in theirs):  # as no NaN is
            raise StateError(
                f"the coded model of method '{label}' is not finite: buffer '{name}' holds a NaN, or an infinity that "
                "the experts do not share; check the experts' buffers"
            )


def check_fishers(fishers: Sequence[State], expert: State) -> None:
    """Raise StateError where Fisher diagonals do not fit an expert, are not finite or negative; warn of zero ones.

    They may lack parameters of the expert, as those of experts that were partly frozen do (`covered_by`).
    """
    names = [f"the Fisher of expert {index}" for index in range(len(fishers))]
    zero = []
    for index, (fisher, name) in enumerate(zip(fishers, names, strict=True)):
        if unknown := sorted(set(fisher) - set(expert)):
            raise StateError(
                f"{name} has a tensor '{unknown[0]}', which the experts have not ({len(unknown)} superfluous); compute "
                "the Fishers of these experts"
            )
        check_finite(fisher, name)
        largest = 0.0
        for key, tensor in fisher.items():
            if tensor.shape != expert[key].shape:
                raise StateError(
                    f"tensor '{key}' is {list(tensor.shape)} in {name} but {list(expert[key].shape)} in expert 0; "
                    "compute the Fishers of these experts"
                )
            if not tensor.numel():
                continue
            least, most = map(float, torch.aminmax(tensor))
            largest = max(largest, most)
            if least < 0:
                raise StateError(f"{name} is negative in '{key}' (least entry {least:.3g}), expected mean squares")
        if largest == 0:
            zero.append(str(index))
    if zero:
        warnings.warn(
            f"the Fisher of expert {', '.join(zero)} is zero everywhere, so that the expert has no say beyond the "
            "average; check its outputs on the calibration data",
            CoinWarning,
            stacklevel=4,
        )


def check_row(weights: Sequence[float], count: int) -> None:
    """Raise ConfigurationError where weights are no code row: one an expert, non-negative, with the sum 1."""
    if len(weights) != count:
        raise ConfigurationError(
            f"found {len(weights)} weights for {count} experts, expected one each; give a row of the code"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ConfigurationError(
            f"found weights {list(weights)}, expected non-negative numbers that sum to 1; give a row of the code"
        )


def check_label(label: str) -> str:
    """Return `label`; raise ConfigurationError where it is no plain file name, or results use it otherwise."""
    if label in _RESERVED:
        raise ConfigurationError(f"found label '{label}', which results use for something else; choose another")
    if not _LABEL.fullmatch(label):
        raise ConfigurationError(
            f"found label {label!r}, expected a plain file name: letters, digits, '_', '-', '+', and '.' not first"
        )
    return label


def checked(name: str, value: Number, is_sound: bool, expected: str) -> Number:
    """Return an option's value if it is sound, and raise ConfigurationError with what is expected otherwise."""
    if not is_sound:
        raise ConfigurationError(f"found {name} {value}, expected {expected}")
    return value


def data_of(choice: DataChoice | None) -> tuple[DataChoice, ...]:
    """Return the data that an option stands for."""
    return (choice,) if choice in (DataChoice.own, DataChoice.pooled) else (DataChoice.own, DataChoice.pooled)


def covered_by(statistics: Sequence[State]) -> list[str]:
    """Return the names that every expert's statistic has, in the first one's order; what else there is, is averaged."""
    shared = set(statistics[0]).intersection(*statistics[1:])
    return [name for name in statistics[0] if name in shared]


def weighted_mean(states: Sequence[State], weights: Sequence[float], key: str) -> Tensor:
    """Return Σ_i w_i · state_i[key] in float64, for weights that sum to 1; entries that agree in all stay as they are.

    So identical experts, and what was frozen in all of them, merge to themselves, to the last bit.
    """
    first = states[0][key].double()
    total, agree = first * weights[0], torch.ones_like(first, dtype=torch.bool)
    for state, weight in zip(states[1:], weights[1:], strict=True):
        tensor = state[key].double()
        agree &= tensor == first
        total.add_(tensor, alpha=weight)
    return torch.where(agree, first, total)


def floored_diagonal(fishers: Sequence[State], weights: Sequence[float], ridge: float) -> dict[str, Tensor]:
    """Return Σ_i β_i F_i + ridge × its mean over all entries, in float64; ones where every entry is zero.

    Of the parameters alone that all the Fishers have.

    Raises NumericalError where the mean is so small that dividing by its share overflows the type of the Fishers.
    """
    totals = {key: weighted_mean(fishers, weights, key) for key in covered_by(fishers)}
    mean = sum(float(total.sum()) for total in totals.values()) / max(sum(t.numel() for t in totals.values()), 1)
    floor = ridge * mean if mean > 0 else 1.0
    largest = torch.finfo(next(iter(fishers[0].values())).dtype).max
    if floor * largest < 1:
        raise NumericalError(
            f"the mean entry of the Fishers is {mean:.3g}, too small to divide by; check the experts' outputs on the "
            "calibration data"
        )
    return {key: total + floor for key, total in totals.items()}


def _data(options: dict[str, Any]) -> list[str]:
    return [str(value) for name, value in options.items() if name.endswith("_data")]


def _alike(states: Sequence[State]) -> bool:
    """Whether all experts have the same floating-point buffers."""
    return all(
        torch.equal(tensor, other[key])
        for other in states[1:]
        for key, tensor in states[0].items()
        if tensor.is_floating_point()
    )
