"""The base class of merge methods, and `merge_networks`."""

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import nn

from coin.coding import Code
from coin.core.devices import device_of
from coin.errors import ConfigurationError
from coin.files.tensors import State, check_finite
from coin.merging.experts import Experts
from coin.merging.passes import Body, fit_body, folded_body
from coin.merging.rounding import Rounding
from coin.networks.adapted import with_adapters
from coin.networks.adapter import Adapter, AdapterOptions
from coin.networks.batchnorm import BatchNormPolicy
from coin.networks.compressed import Compressed, Compression, compress
from coin.networks.weights import fill_network, parameters_of, to_compute
from coin.statistics import FisherKind
from coin.statistics.statistic import DataChoice, Statistic

Compress = dict[str, Any] | list[dict[str, Any]] | None
"""The option `compress` of methods: a section ``{bits: 4}``, or several."""

Adapters = AdapterOptions | dict[str, Any] | None
"""The option `adapters` of methods: a section of `AdapterOptions`."""


@dataclass(frozen=True)
class CodedModel:
    """A method's result for one row of a code: a network in eval mode, and the options that were chosen, plain values.

    `adapters` are what experts keep beside it. `body` is what it and they were fitted from, if they were; `Method.pack`
    begins there again.

    >>> made = coin.Average().make(coin.Experts(experts), [0.5, 0.5, 0])
    >>> type(made.network).__name__, made.chosen
    ('Linear', {})
    """

    network: nn.Module
    chosen: dict[str, Any] = field(default_factory=dict)
    adapters: Sequence[Adapter] = ()
    body: Body | None = None


class Merged(list[nn.Module]):
    """Coded models, one per row of the code, and how they were made.

    `chosen` has the `CodedModel.chosen` of each; `compressed` the coded models of each compressed variant by its label,
    such as ``refit-4bit``; `passes` and `seconds` the total cost, in forward-equivalents of one sample and wall time.

    >>> merged = coin.merge_networks(coin.Average(), experts, code)
    >>> len(merged), merged.chosen, merged.passes
    (1, [{}], 0.0)
    """

    def __init__(
        self,
        made: Sequence[CodedModel],
        passes: float,
        seconds: float,
        compressed: dict[str, list[Compressed]],
    ) -> None:
        super().__init__(with_adapters(each.network, each.adapters) for each in made)
        self.chosen = [each.chosen for each in made]
        self.compressed = compressed
        self.passes = passes
        self.seconds = seconds


class Method(ABC):
    """Makes coded models from experts and calibration data.

    Attributes:
        name: The name in result tables.
        label: The name of this variant in results and files; by default `name`, with adapters and with a BatchNorm
            policy that is not the class's own (``coin-recalibrate``).
        batchnorm: The BatchNorm merge policy; empty if the method handles the statistics itself.
        reads_initial: Whether it needs the shared initialisation.
        compress: The compressed variants of its coded models, beside the whole ones.
        adapters: What experts keep beside its coded models, which are bodies then.

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
    is_trained: ClassVar[bool] = (
        False  # with a Trainer, on all processes; other methods run on rank zero only
    )
    reads_initial: bool = False
    compress: Sequence[Compression] = ()
    adapters: AdapterOptions | None = None
    samples_per_task: int | None = None  # its own P; by default the experiment's
    augmentation: str = "none"  # of calibration samples in its training
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

    @abstractmethod
    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row of the code, β ``[N]``, non-negative with sum 1 (`coded_model` checks that).

        Raises ConfigurationError where an input is missing; StateError, which names expert and tensor, where statistics
        differ in names or shapes, are not finite, or a Fisher entry is negative; NumericalError where the method broke
        down on sound inputs.
        """

    def pack(
        self,
        experts: Experts,
        row: Sequence[float],
        made: CodedModel,
        bits: int,
    ) -> Compressed:
        """Return the coded model of one row in so many bits a value.

        What has a `body` is fitted once more, in order: a matrix is rounded column by column (`coin.merging.rounding`),
        its bias and the adapters are fitted to the rest, and the next layer to the inputs that follow. What is in no
        unit of the body, and what has none, is rounded to the nearest.
        """
        if made.body is None:
            packed = compress(made.network, None, bits=bits, base_bits=0)
            packed.adapters = made.adapters
            experts.check_as_plain(packed.packed(), made.adapters)
            return packed
        rounding = Rounding(made.body.network, bits)
        network, adapters = self.fit(experts, row, made.body, rounding)
        packed = compress(network, None, bits=bits, base_bits=0, rounded=rounding.rounded)
        packed.adapters = adapters
        experts.check_as_plain(packed.packed(), adapters)
        return packed

    @torch.inference_mode(False)
    def fit(
        self, experts: Experts, row: Sequence[float], body: Body, rounding: Rounding | None = None
    ) -> tuple[nn.Module, list[Adapter]]:
        """Return a copy of a body, its matrices rounded if there is a rounding, and the adapters fitted to it."""
        return fit_body(
            body, experts, row, self.label, ridge=None, rounding=rounding, adapters=self.adapters
        )

    def coded_model(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the coded model of one row, and its adapters unless the method has fitted them beside it.

        Raises as `make`; ConfigurationError for another row than a code's, and StateError, which names the tensor,
        where experts differ in names or shapes, or they or the coded model are not finite.
        """
        experts.check(row)
        made = self.make(experts, row)
        made.network.to(experts.source.device)  # one that was trained is where its Trainer left it
        check_coded(made.network, experts, self.label)
        if self.adapters is None or made.adapters:
            return made
        with torch.inference_mode(False):
            body = folded_body(made.network, experts, self.label)
        network, adapters = self.fit(experts, row, body)
        experts.check_as_plain(network, adapters)
        return replace(made, network=network, adapters=adapters, body=body)

    def statistics(self) -> tuple[Statistic, ...]:
        """Return the statistics of the experts that it needs."""
        return ()

    def with_defaults(self, fisher_kind: FisherKind, fisher_data: DataChoice) -> Self:
        """Return the method with the experiment's statistics where an option is None."""
        method = copy(self)
        if getattr(self, "fisher_kind", fisher_kind) is None:
            method.fisher_kind = fisher_kind  # type: ignore[attr-defined]
        for name in ("fisher_data", "gram_data"):
            if getattr(self, name, fisher_data) is None:
                setattr(method, name, fisher_data)
        return method


def merge_networks(
    method: Method,
    networks: Sequence[nn.Module],
    code: Code | Sequence[Sequence[float]],
    *,
    fishers: Sequence[State] | None = None,
    grams: Sequence[State] | None = None,
    initial: nn.Module | None = None,
    calibration: Sequence[Iterable[Any]] | None = None,
) -> Merged:
    """Merge N experts into coded models: R new networks in eval mode, one per row of the code, R×N.

    See `Experts` for the other arguments. The networks are made, and left, on the experts' device; where that has no
    float64, as Apple's MPS, they are made on the CPU. Raises as `Method.coded_model`.

    >>> coded = coin.merge_networks(coin.Refit(), experts, code, calibration=inputs)
    >>> len(coded), coded.chosen[0]["averaged"], coded.passes > 360
    (1, [], True)
    """
    code = Code(code) if not isinstance(code, Code) else code
    if not isinstance(method, Method):
        raise ConfigurationError(
            f"found method {method!r}, expected an object of a method's class; give coin.Refit()"
        )
    if len(networks) < 2:
        raise ConfigurationError(
            f"found {len(networks)} experts, expected at least two; give those of two tasks"
        )
    home = device_of(networks[0])
    networks = to_compute([*networks], home)
    if initial is not None:
        initial = to_compute([initial], home)[0]
    experts = Experts(
        networks,
        fishers=fishers,
        grams=grams,
        initial=initial,
        calibration=calibration,
    )
    began = time.perf_counter()
    made = []
    compressed: dict[str, list[Compressed]] = {}
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        for row in code.matrix.tolist():
            coded = method.coded_model(experts, row)
            made.append(coded)
            for each in method.compress:
                variants = compressed.setdefault(f"{method.label}-{each.name}", [])
                variants.append(method.pack(experts, row, coded, each.bits))
    merged = Merged(made, experts.passes, time.perf_counter() - began, compressed)
    for network in merged:
        network.to(home)
    return merged


def check_coded(network: nn.Module, experts: Experts, label: str) -> None:
    """Raise StateError where a method's coded model is not finite, but for buffers that are infinite in experts."""
    infinite = [
        name for name, buffer in experts.buffers[0].items() if bool(torch.isinf(buffer).any())
    ]
    tensors = {**parameters_of(network), **dict(network.named_buffers())}
    check_finite(tensors, f"the coded model of method '{label}'", infinite)


def fill(network: nn.Module, state: State) -> None:
    """Copy parameters and buffers into a network; tied ones may have two names."""
    tensors = network.state_dict()  # which share the network's memory
    tensors.update({name: tensor for name, tensor in state.items() if name in tensors})
    fill_network(network, tensors, "the coded model")
    kept = network.state_dict()
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name not in state or name in kept:
                continue
            value = state[name].to(buffer.device)  # of a buffer that is not persistent
            if not torch.equal(buffer, value):  # an expanded buffer cannot be written to
                buffer.copy_(value)
