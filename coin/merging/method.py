"""What all methods have in common, and the choices that closed forms make on held-out calibration samples."""

import math
import re
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from coin.batches import Forward, plain
from coin.choices import chosen
from coin.coding import Code, DecoderConfig, DecoderKind, distinct_decoders
from coin.errors import CoinWarning, ConfigurationError, StateError
from coin.files.tensors import State, check_finite, check_same_layout, weighted_sum
from coin.merging.experts import Experts, Given, parameters_of
from coin.merging.held_out import check_errors, held_out_error
from coin.networks.batchnorm import BatchNormPolicy, recalibrate
from coin.networks.compressed import Base, Compressed, compress_as
from coin.networks.compression import Compression, RoundingKind
from coin.networks.parametrised import renormalise
from coin.networks.weights import fill_network
from coin.statistics import FisherKind
from coin.statistics.statistic import DataChoice, Statistic

SAME = "same"
"""What `BatchNormPolicy.auto` is called where all experts have the same buffers."""

_FEW = 10
"""With fewer held-out samples a choice is told of: it is little better than chance."""

Number = TypeVar("Number", bound=float)

Compress = dict[str, Any] | list[dict[str, Any]] | None
"""The option `compress` of methods: a section of `Compression`'s options, or several."""

Candidate = tuple[dict[str, Any], dict[str, Tensor]]
"""What tells a candidate from others, and its parameters in the experts' types."""


@dataclass(frozen=True)
class CodedModel:
    """What a method makes for one row of a code.

    Attributes:
        network: The coded model, in eval mode.
        chosen: What was chosen on the way, and how a solve ended: plain values for the record.

    >>> import coin, torch
    >>> made = coin.Average().make(coin.Experts([torch.nn.Linear(4, 3) for _ in "ab"]), [0.5, 0.5])
    >>> type(made.network).__name__, made.chosen
    ('Linear', {})
    """

    network: nn.Module
    chosen: dict[str, Any] = field(default_factory=dict)


class Merged(list[nn.Module]):
    """Coded models, one a row of the code, and how they came about.

    Attributes:
        chosen: Of every one what its method chose, as plain values: the data of the Fisher, the BatchNorm policy, the
            held-out errors, under ``averaged`` what a `Refit` left at the average.
        compressed: Of every one what its method's `compress` asks for, by what results call it, such as ``refit-4bit``.
        passes: Forward-equivalents of one sample that all took together.
        seconds: Wall time.
    """

    def __init__(
        self, made: Sequence[CodedModel], passes: float, seconds: float, compressed: Sequence[dict[str, Compressed]]
    ) -> None:
        super().__init__(plain(each.network) for each in made)
        self.chosen, self.compressed = [each.chosen for each in made], list(compressed)
        self.passes, self.seconds = passes, seconds


class Method(ABC):
    """Makes coded models from experts and calibration data.

    Attributes:
        name: The name in result tables.
        label: What results and files call this variant; the name by default.
        batchnorm: What becomes of BatchNorm's running statistics; empty where the method alone knows.
        is_trained: Whether it trains with a Trainer, on all processes; others run on the first alone.
        reads_initial: Whether it needs the shared initialisation.
        compress: How its coded models are compressed too, beside keeping them whole.
        rounds: Whether it can round a coded model while it makes it.
        samples_per_task: P of its own; none takes the experiment's.
        augmentation: What happens to calibration samples that it trains on.

    A method of one's own, which every table then has:

    >>> import coin
    >>> class First(coin.Method):
    ...     name = label = "first"
    ...     def make(self, experts, row):
    ...         network = experts.blank().eval()
    ...         network.load_state_dict(experts.networks[0].state_dict())
    ...         return coin.CodedModel(network)
    >>> import torch
    >>> experts = [torch.nn.Linear(4, 3) for _ in "ab"]
    >>> coded = coin.merge_networks(First(), experts, coin.Code([[0.5, 0.5]]))[0]
    >>> torch.equal(coded.weight, experts[0].weight)
    True
    """

    name: ClassVar[str]
    is_trained: ClassVar[bool] = False
    reads_initial: bool = False
    rounds: ClassVar[bool] = False
    compress: Sequence[Compression] = ()
    samples_per_task: int | None = None
    augmentation: str = "none"
    label: str
    batchnorm: BatchNormPolicy | str = BatchNormPolicy.auto

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

    def pack(
        self, experts: Experts, row: Sequence[float], made: CodedModel, base: Base, compression: Compression
    ) -> Compressed:
        """Return what `make` has made for one row of the code, compressed beside a base."""
        return compress_as(compression, made.network, base)

    def statistics(self) -> tuple[Statistic, ...]:
        """Return the statistics of the experts that it wants."""
        return ()

    def settled(self, fisher_kind: FisherKind, fisher_data: DataChoice, decoders: Sequence[DecoderConfig] = ()) -> Self:
        """Return the method with the experiment's choices where its options leave them open.

        These are the kind and data of Fishers, and for which decoders a choice is made; none leaves that open.
        """
        return self

    def compressed(self, compress: Compress) -> list[Compression]:
        """Return an option's compressions; a method whose coded models are deltas reads the shared initialisation."""
        sections = compress or [] if compress is None or isinstance(compress, list | tuple) else [compress]
        found = [Compression.of(each) for each in sections]
        if any(each.rounding is RoundingKind.refit and not self.rounds for each in found):
            raise ConfigurationError(
                f"found rounding: refit for method '{self.name}', expected nearest: only Refit rounds while it fits"
            )
        self.reads_initial = self.reads_initial or any(each.base_bits for each in found)
        return found

    def labelled(self, label: str | None) -> str:
        """Return the label that an option gives, or the name; a ConfigurationError unless results can be called it."""
        label = self.name if label is None else label
        if label in ("none", "oracle"):
            raise ConfigurationError(f"found label '{label}', which results use for something else; choose another")
        if not re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*", label):
            raise ConfigurationError(
                f"found label {label!r}, expected a plain file name: letters, digits, '_', '-', '+', and '.' not first"
            )
        return label


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
    decoders: Sequence[DecoderKind | str | DecoderConfig] = (DecoderKind.linear,),
) -> Merged:
    """Merge N experts into coded models: R new networks in eval mode, one a row of the code, R×N.

    `Experts` says what the other arguments are, but for `decoders`: what the coded models will be read by, for which
    `Refit` chooses. The networks are of the experts' class and called as it says, whatever
    `forward`. The list also tells what was chosen on the way and what it cost. Raises as `Method.make`.

    >>> import coin, torch
    >>> experts = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)) for _ in "ab"]
    >>> calibration = [[torch.randn(50, 4)] for _ in experts]
    >>> coded = coin.merge_networks(coin.Refit("own"), experts, coin.Code([[0.5, 0.5]]), calibration=calibration)
    >>> len(coded), coded.chosen[0]["averaged"]
    (1, [])
    >>> coded.passes > 200
    True
    """
    experts = Experts(networks, fishers=fishers, grams=grams, initial=initial, calibration=calibration, forward=forward)
    began = time.perf_counter()
    method = method.settled(FisherKind.exact, DataChoice.auto, distinct_decoders(decoders))
    if initial is None and any(each.base_bits for each in method.compress):
        raise ConfigurationError(
            f"found no initial, from which method '{method.label}' compresses deltas; give it, or base_bits: 0"
        )
    made, compressed = [], []
    for row in code.matrix.tolist():
        made.append(method.make(experts, row))
        packed = {how.name: method.pack(experts, row, made[-1], initial, how) for how in method.compress}
        compressed.append({f"{method.label}-{name}": each for name, each in packed.items()})
    return Merged(made, experts.passes, time.perf_counter() - began, compressed)


def starting_method(start: str | Mapping[str, Any], *, reads_initial: bool = False) -> Method:
    """Return the closed form that another method's option `start` stands for.

    It is the name that results give it, for its default options, or ``{class_path: …, init_args: {…}}`` as in an
    experiment's list of methods. Raises a ConfigurationError where it is none, it trains, it needs the shared
    initialisation unless that may be read, or an option is unknown or out of its range.
    """
    allowed = [
        kind for kind in _subclasses(Method) if not kind.is_trained and (reads_initial or not kind.reads_initial)
    ]
    kinds = {kind.name: kind for kind in allowed if "name" in vars(kind)}  # not one that inherits another's
    kind, options = None, {}
    if isinstance(start, str):
        kind = kinds.get(start)
    elif isinstance(start, Mapping) and set(start) <= {"class_path", "init_args"}:
        path = str(start.get("class_path")).rpartition(".")[2]
        kind = next((each for each in allowed if each.__name__ == path), None)
        options = dict(start.get("init_args") or {})
    if kind is None:
        expected = f"one of {', '.join(sorted(kinds))}, or class_path and init_args of one"
        raise ConfigurationError(f"found start={start!r}, expected {expected}")
    try:
        method = kind(**options)
    except TypeError as error:
        raise ConfigurationError(f"found start={start!r}, expected options of {kind.__name__} ({error})") from error
    if method.reads_initial and not reads_initial:
        raise ConfigurationError(f"found start={start!r}, which needs the shared initialisation; choose other options")
    return method


def _subclasses(kind: Any) -> Iterator[type[Method]]:
    """Yield all methods that can be made."""
    for each in kind.__subclasses__():
        if not each.__abstractmethods__:
            yield each
        yield from _subclasses(each)


class MergeMethod(Method):
    """A method in closed form: one or several candidates for the coded model's parameters.

    Where there is a choice, of candidates or of a BatchNorm policy, the smallest error of decoded answers on held-out
    calibration samples decides (`held_out_error`): no labels, and the passes count. No fixed policy is safe:
    ``average`` ruins networks whose statistics were trained along (NDA 17 where 81 is to be had), ``recalibrate`` those
    whose statistics were frozen (18 where 92 is).

    Args:
        batchnorm: Policy for BatchNorm statistics, as for every method.
        label: Name of this variant in results, a plain file name.
        compress: How the coded models are compressed too, beside keeping them whole: one section of `Compression`'s
            options, such as ``{bits: 4}``, or several. The results call such a variant ``LABEL-4bit``.

    A closed form of one's own:

    >>> import coin, torch
    >>> class Median(coin.MergeMethod):
    ...     name = "median"
    ...     def candidates(self, experts, row):
    ...         every = experts.parameters
    ...         yield {}, {name: torch.stack([each[name] for each in every]).median(0).values for name in every[0]}
    >>> experts = [torch.nn.Linear(4, 3) for _ in "abc"]
    >>> coded = coin.merge_networks(Median(), experts, coin.uniform(3))[0]
    >>> torch.equal(coded.bias, torch.stack([each.bias for each in experts]).median(0).values)
    True
    """

    def __init__(
        self,
        *,
        batchnorm: BatchNormPolicy = BatchNormPolicy.auto,
        label: str | None = None,
        compress: Compress = None,
    ) -> None:
        self.batchnorm = chosen(BatchNormPolicy, "batchnorm", batchnorm)
        self.label = self.labelled(label)
        self.reads_initial = self.reads_initial or self.batchnorm is BatchNormPolicy.keep
        self.compress = self.compressed(compress)

    @abstractmethod
    def candidates(self, experts: Experts, row: Sequence[float]) -> Iterator[Candidate]:
        """Yield what it is and the parameters of every candidate; the experts have been checked."""

    def trials(self, experts: Experts, row: Sequence[float]) -> list[Candidate]:
        """Return what the candidates are judged by, their like without held-out data; nothing for themselves."""
        return []

    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row of the code; see `Method.make`."""
        check_experts(experts, row)
        candidates = list(self.candidates(experts, row))
        if len(candidates) > 1 and not experts.is_calibrated:
            raise ConfigurationError(
                f"found no calibration inputs, by which method '{self.label}' chooses; give them, or set its options"
            )
        trials = self.trials(experts, row) if len(candidates) > 1 else []
        policies = self._policies(experts)
        for _, parameters in (*candidates, *trials):
            check_finite(parameters, f"the coded model of method '{self.label}'")
        errors = {}
        if len(candidates) * len(policies) > 1:
            errors = {
                (place, policy): self._error(experts, row, parameters, policy)
                for place, (_, parameters) in enumerate(trials or candidates)
                for policy in policies
            }
        place, policy = min(errors, key=lambda each: errors[each], default=(0, policies[0]))
        options, parameters = candidates[place]
        network = self._build(experts, row, parameters, policy, held_out=False)
        taken = options | ({"batchnorm": policy} if policy else {})
        if errors:
            if (held_out := experts.split[1].num_samples) < _FEW:
                warnings.warn(
                    f"method '{self.label}' chose by {held_out} held-out calibration samples, expected at least "
                    f"{_FEW}; raise samples_per_task, or set its options",
                    CoinWarning,
                    stacklevel=2,
                )
            check_errors(errors.values(), self.label)
            data = [[str(value) for name, value in each.items() if name.endswith("_data")] for each, _ in candidates]
            taken["held_out_error"] = {
                "/".join(filter(None, [*data[place], policy])): error for (place, policy), error in errors.items()
            }
        check_coded(network, experts, self.label)
        return CodedModel(network, taken)

    def measure(self, experts: Experts, row: Sequence[float], parameters: State) -> float:
        """Return the held-out error of parameters, with the better of the BatchNorm policies."""
        return min(self._error(experts, row, parameters, policy) for policy in self._policies(experts))

    def _error(self, experts: Experts, row: Sequence[float], parameters: State, policy: str) -> float:
        return held_out_error(experts, self._build(experts, row, parameters, policy, held_out=True), row)

    def _policies(self, experts: Experts) -> list[str]:
        """Return the BatchNorm policies to choose from; an empty one where there is no BatchNorm."""
        if not experts.has_batchnorm:
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
                f"found {found}, by which method '{self.label}' chooses what becomes of BatchNorm's statistics: it "
                "averages them, which can be the worst choice; give the tasks' inputs, or set batchnorm",
                CoinWarning,
                stacklevel=3,
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
        network = experts.blank().eval()
        fill(network, {**parameters, **buffers})
        renormalise(network, experts.buffers)
        if policy == BatchNormPolicy.recalibrate:
            experts.passes += recalibrate(network, experts.split[0] if held_out else experts.pooled)
        return network


def fill(network: nn.Module, state: State) -> None:
    """Copy parameters and buffers into a network, which may name tied ones twice."""
    own = network.state_dict()  # tensors that share the network's memory
    fill_network(network, own | {name: tensor for name, tensor in state.items() if name in own}, "the coded model")
    with torch.no_grad():
        for name, buffer in network.named_buffers():  # those that are not persistent are in no state dict
            if name in state and name not in own and not torch.equal(buffer, state[name]):
                buffer.copy_(state[name])


def refined(start: CodedModel, label: str) -> CodedModel:
    """Return a coded model that was changed since it was made, after checking it; its error was the start's."""
    check_finite(parameters_of(start.network), f"the coded model of method '{label}'")
    renamed = {"held_out_error": "held_out_error_of_start"}
    return CodedModel(start.network, {renamed.get(name, name): value for name, value in start.chosen.items()})


def checked(name: str, value: Number, is_sound: bool, expected: str) -> Number:
    """Return an option's value if it is sound, and raise ConfigurationError with what is expected otherwise."""
    if not is_sound:
        raise ConfigurationError(f"found {name} {value}, expected {expected}")
    return value


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


def check_each(states: Sequence[State], what: str) -> None:
    """Raise StateError, which names the expert and the tensor, where states differ in layout or are not finite."""
    names = [f"{what} {index}" for index in range(len(states))]
    check_same_layout(states, names)
    for state, name in zip(states, names, strict=True):
        check_finite(state, name)


def check_experts(experts: Experts, row: Sequence[float]) -> None:
    """Raise as `check_row` and `check_each`, of the experts' parameters."""
    check_row(row, experts.count)
    check_each(experts.parameters, "expert")


def check_coded(network: nn.Module, experts: Experts, label: str) -> None:
    """Raise StateError where a coded model's buffer is not finite, unless every expert's is the same infinity."""
    for name, buffer in network.named_buffers():
        if not (buffer.is_floating_point() or buffer.is_complex()) or bool(torch.isfinite(buffer).all()):
            continue
        wrong = ~torch.isfinite(buffer)
        theirs = [state[name].to(buffer)[wrong] for state in experts.buffers if name in state]
        if not all(torch.equal(buffer[wrong], other) for other in theirs):  # as no NaN is
            raise StateError(
                f"the coded model of method '{label}' is not finite: buffer '{name}' holds a NaN, or an infinity that "
                "the experts do not share; check the experts' buffers"
            )
