"""The base class of merge methods."""

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from torch import nn

from coin.coding import Code
from coin.errors import ConfigurationError
from coin.files.tensors import check_finite
from coin.merging.body import FitOptions, Folded, fit_body
from coin.merging.experts import Experts
from coin.merging.rounding import Rounding
from coin.networks.adapter import Adapter, AdapterOptions
from coin.networks.batchnorm import BatchNormPolicy
from coin.networks.compressed import Compressed, Compression, compress
from coin.networks.delta import Rounded
from coin.networks.weights import parameters_of
from coin.statistics import FisherKind
from coin.statistics.statistic import DataChoice, Statistic

T = TypeVar("T")

Compress = dict[str, Any] | list[dict[str, Any]] | None
"""The option `compress` of methods: a section ``{bits: 4}``, or several."""

Adapters = AdapterOptions | dict[str, Any] | None
"""The option `adapters` of methods: a section of `AdapterOptions`."""


@dataclass(frozen=True)
class CodedModel:
    """A method's result for one row of a code: a network in eval mode, and the options that were chosen, plain values.

    `start` is what the network is fitted from (`fit_body`), if it is; `adapters` are what experts keep beside it.

    >>> made = coin.Average().make(coin.Experts(experts), [0.5, 0.5, 0])
    >>> type(made.network).__name__, made.chosen
    ('Linear', {})
    """

    network: nn.Module
    chosen: dict[str, Any] = field(default_factory=dict)
    start: Folded | None = None
    adapters: Sequence[Adapter] = ()


class Variant(NamedTuple):
    """A method's result for one row of a code, whole or compressed.

    Attributes:
        label: What results call it.
        row: Which of the code's rows it is for.
        made: The coded model.
        seconds, passes: What making it took, with the coded model that is compressed, and the statistics read for that.
        compression: How it is compressed, if it is.
        packed: The compressed coded model, if it is one.
    """

    label: str
    row: int
    made: CodedModel
    seconds: float
    passes: float
    compression: Compression | None = None
    packed: Compressed | None = None


class Method(ABC):
    """Makes coded models from experts and calibration data.

    Attributes:
        name: The name in result tables.
        label: The name of this variant in results and files; by default `name`, with adapters and with a BatchNorm
            policy that is not the class's own (``coin-recalibrate``).
        batchnorm: The BatchNorm merge policy, which `MergeMethod` applies; empty if the method has its own.
        reads_initial: Whether it needs the shared initialisation.
        compress: The compressed variants of its coded models, beside the whole ones.
        adapters: What experts keep beside its coded models, which are bodies then.
        is_trained: Whether it trains, with a Trainer and on all processes; other methods run on rank zero only.
        samples_per_task: Its own P; by default the experiment's.
        augmentation: Of calibration samples in its training.

    A user's own method:

    >>> class First(coin.Method):
    ...     name = label = "first"
    ...     def make(self, experts, row):
    ...         network = experts.empty_model().eval()
    ...         network.load_state_dict(experts.networks[0].state_dict())
    ...         return coin.CodedModel(network)
    >>> coded = coin.merge_networks(First(), experts, code)[0]
    >>> torch.equal(coded.weight, experts[0].weight)
    True
    """

    name: ClassVar[str]
    is_trained: ClassVar[bool] = False
    reads_initial: bool = False
    compress: Sequence[Compression] = ()
    adapters: AdapterOptions | None = None
    samples_per_task: int | None = None
    augmentation: str = "none"
    label: str
    batchnorm: BatchNormPolicy | str = BatchNormPolicy.auto

    def __init__(
        self, label: str | None = None, compress: Compress = None, adapters: Adapters = None
    ) -> None:
        """Set the options that every method has; raises ConfigurationError where results cannot have the label."""
        self.adapters = AdapterOptions.of(adapters)
        if label is not None:
            self.label = label
        else:
            self.label = getattr(self, "label", self.name)
            if self.adapters is not None:
                self.label = f"{self.label}+{self.adapters.name}"
            if self.batchnorm != type(self).batchnorm:
                self.label = f"{self.label}-{self.batchnorm}"
        is_file_name = re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*", self.label)
        if not is_file_name or self.label in ("none", "oracle"):
            raise ConfigurationError(
                f"found label {self.label!r}, expected a plain file name: letters, digits, '_', '-', '+', and '.' not "
                "first; and not none or oracle, other results' names"
            )
        sections = compress if isinstance(compress, list | tuple) else [compress]
        self.compress = [Compression.of(each, base_bits=0) for each in sections if each is not None]
        if len(set(self.compress)) < len(self.compress):
            raise ConfigurationError(f"found compress={compress}, expected each section once")

    @property
    def compressed_labels(self) -> list[str]:
        """What results call its compressed variants."""
        return [f"{self.label}-{each.name}" for each in self.compress]

    @property
    def fit_options(self) -> FitOptions:
        """How a body is fitted: its adapters alone, if there are any."""
        return FitOptions(adapters=self.adapters)

    @abstractmethod
    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row of the code, β ``[N]``, non-negative with sum 1, or the start to fit it from.

        Raises ConfigurationError where an input is missing; StateError, which names expert and tensor, where statistics
        differ in names or shapes, are not finite, or a Fisher entry is negative; NumericalError where the method broke
        down on sound inputs.
        """

    def coded_model(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row, or the body, and fit this (`fit_body`).

        Raises as `make` and `fit_body`; ConfigurationError for another row than a code's, and StateError, which names
        the tensor, where experts differ in names or shapes, or they or the coded model are not finite.
        """
        experts.check(row)
        made = self.make(experts, row)
        made.network.to(experts.source.device)  # one that was trained is where its Trainer left it
        check_coded(made.network, self.label)
        start = made.start
        if start is None and self.adapters is not None:
            start = Folded.of(made.network, experts, self.label)
        if start is None:
            return made
        network, adapters = fit_body(start, experts, row, self.fit_options, self.label)
        check_coded(network, self.label)
        if adapters:
            experts.check_as_plain(network, adapters)
        return CodedModel(network, made.chosen, start, adapters)

    def pack(
        self, experts: Experts, row: Sequence[float], made: CodedModel, bits: int
    ) -> Compressed:
        """Return the coded model of one row in so many bits a value.

        A body is fitted once more, in order: a matrix is rounded column by column (`coin.merging.rounding`), its bias
        and the adapters are fitted to the rest, and the next layer to the inputs that follow. What is in no unit of the
        body, and a network without one, is rounded to the nearest.
        """
        network = made.network
        adapters = made.adapters
        rounded: Mapping[str, Rounded] = {}
        if made.start is not None:
            rounding = Rounding(made.start.network, bits)
            network, adapters = fit_body(
                made.start, experts, row, self.fit_options, self.label, rounding
            )
            rounded = rounding.rounded
        packed = compress(network, None, bits=bits, base_bits=0, rounded=rounded)
        packed.adapters = adapters
        experts.check_as_plain(packed.packed(), adapters)
        return packed

    def coded_models(
        self, experts: Experts, code: Code, *, whole_only: bool = False
    ) -> Iterator[Variant]:
        """Make the coded model of every row of a code, each followed by its compressed variants; see `coded_model`."""
        for row, weights in enumerate(code.matrix.tolist()):
            make = partial(self.coded_model, experts, weights)
            made, seconds, passes = _measured(experts, make)
            yield Variant(self.label, row, made, seconds, passes)
            if whole_only:
                continue
            for label, how in zip(self.compressed_labels, self.compress, strict=True):
                pack = partial(self.pack, experts, weights, made, how.bits)
                packed, more, more_passes = _measured(experts, pack)
                cost = (seconds + more, passes + more_passes)
                yield Variant(label, row, made, *cost, how, packed)

    def statistics(self) -> tuple[Statistic, ...]:
        """Return the statistics of the experts that it needs."""
        return ()

    def with_defaults(self, fisher_kind: FisherKind, data: DataChoice) -> Self:
        """Return the method with the experiment's statistics where its own options are None."""
        return self


def _measured(experts: Experts, make: Callable[[], T]) -> tuple[T, float, float]:
    """Return what is made of experts, and the seconds and passes that it took, with those of the statistics it read."""
    started = time.perf_counter() - experts.seconds
    passes = experts.passes
    made = make()
    return made, time.perf_counter() - started + experts.seconds, experts.passes - passes


def check_coded(network: nn.Module, label: str) -> None:
    """Raise StateError where a method's coded model is not finite; buffers, such as masks, may be infinite."""
    buffers = dict(network.named_buffers())
    tensors = {**parameters_of(network), **buffers}
    check_finite(tensors, f"the coded model of method '{label}'", buffers)
