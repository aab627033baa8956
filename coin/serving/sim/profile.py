"""What is known of N experts and of what may stand in for them: times, sizes and accuracies, and how they are measured.

Times are those of one processor core, as `coin serve` runs its servers unless it is told otherwise.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coin.choices import check_number
from coin.coding import Answers, Code, DecoderConfig, make_decoder
from coin.coding.ready import convex
from coin.data.transform import to_input
from coin.errors import ConfigurationError
from coin.networks import load_network
from coin.serving.decodings import Decodings, coded_layout
from coin.serving.layout import Layout, spread_copies, spread_spares
from coin.serving.model import NetworkServer
from coin.serving.policies import Policy, PolicyKind
from coin.serving.replies import Reply, ReplyFormat
from coin.serving.sim.conditions import Conditions
from coin.serving.sim.simulation import Simulation

T = TypeVar("T")
_WARM_UP, _REPEATS, _BATCH = 20, 200, 8


class Precision(StrEnum):
    """How a spare keeps its weights; it computes in float32."""

    full = "full"
    """As they are."""
    half = "half"
    """float16: two bytes a weight."""
    int8 = "int8"
    """One byte a weight, and a scale for every output: w ≈ scale·q, q from −127 to 127. Vectors stay as they are."""


class Redundancy(StrEnum):
    """What the extra servers hold, and how they are asked."""

    uncoded = "uncoded"
    """There are none."""
    copy = "copy"
    """A copy of one expert each, asked when that expert is late or lost."""
    spare = "spare"
    """All experts' weights each; one is asked for an expert that is late or lost. Its answers are exact."""
    spare_half = "spare_half"
    """The same, kept in float16 (`Precision`)."""
    spare_int8 = "spare_int8"
    """The same, kept in int8."""
    failover = "failover"
    """One small network for all tasks each, asked likewise; its accuracy, size and speed are the user's to give."""
    coded_proactive = "coded_proactive"
    """A coded model each; every query asks all servers at once."""
    coded_hedged = "coded_hedged"
    """A coded model each; all servers are asked when an expert is late or lost."""

    @property
    def precision(self) -> Precision | None:
        """How the experts' weights are kept on an extra server that holds all of them."""
        return {"spare": Precision.full, "spare_half": Precision.half, "spare_int8": Precision.int8}.get(self)

    @property
    def is_coded(self) -> bool:
        """Whether the extra servers hold coded models."""
        return self in (Redundancy.coded_proactive, Redundancy.coded_hedged)


@dataclass(frozen=True)
class Failover:
    """A small network for all tasks.

    Args:
        accuracy: Its mean accuracy over the tasks, from 0 to 1.
        mib: The size of its weights in MiB.
        seconds: What it takes for one input.
    """

    accuracy: float
    mib: float
    seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.accuracy <= 1:
            raise ConfigurationError(f"found failover.accuracy={self.accuracy}, expected a number from 0 to 1")
        check_number("failover.mib", self.mib, low=0, strict=True)
        check_number("failover.seconds", self.seconds, low=0, strict=True)


@dataclass(frozen=True)
class Profile:
    """What is known of N experts and what may stand in for them.

    Args:
        code: The code of the coded models.
        expert_seconds: Every expert's service times ``[K]``.
        coded_seconds: Every coded model's.
        expert_bytes: Every expert's size by precision.
        coded_bytes: Every coded model's size.
        expert_accuracy: Mean over tasks.
        decoded_accuracy: Of decoded answers by the number of experts that are lost; empty where it was not measured.
        rounded_accuracy: Of experts by the precision that they are kept in, as far as it was measured.
        decoding: Seconds that it takes to decode.
        failover: A small network for all tasks.
    """

    code: Code
    expert_seconds: tuple[NDArray[np.float64], ...]
    coded_seconds: tuple[NDArray[np.float64], ...]
    expert_bytes: Mapping[Precision, tuple[int, ...]]
    coded_bytes: tuple[int, ...]
    expert_accuracy: float
    decoded_accuracy: Mapping[int, float]
    rounded_accuracy: Mapping[Precision, float] = field(default_factory=dict)
    decoding: float = 0.0
    failover: Failover | None = None

    def resized(self, experts: int, extras: int) -> "Profile":
        """Return as many experts like these and as many coded models; decoding them was then not measured."""
        if (experts, extras) == (self.code.num_experts, self.code.num_coded):
            return self

        def repeated(values: tuple[T, ...], number: int) -> tuple[T, ...]:
            return tuple(islice(cycle(values), number))

        return replace(
            self,
            code=convex(experts, extras),
            expert_seconds=repeated(self.expert_seconds, experts),
            coded_seconds=repeated(self.coded_seconds, extras),
            expert_bytes={kept: repeated(sizes, experts) for kept, sizes in self.expert_bytes.items()},
            coded_bytes=repeated(self.coded_bytes, extras),
            decoded_accuracy={},
        )

    def simulation(self, kind: Redundancy, conditions: Conditions, quantile: float = 0.9, **options: Any) -> Simulation:
        """Return the simulation of these experts with a redundancy; the options are the simulation's own."""
        count, (layout, seconds, _, _) = self.code.num_experts, self._extra(kind)
        own = PolicyKind.uncoded if kind is Redundancy.uncoded else PolicyKind.hedged
        policy = Policy(PolicyKind(kind) if kind.is_coded else own, quantile)
        networks = len(seconds) // self.code.num_coded or 1  # on one extra server
        machines = (*range(count), *(count + place // networks for place in range(len(seconds))))
        samples = (*self.expert_seconds, *seconds)
        return Simulation(layout, policy, samples, conditions, machines=machines, decoding=self.decoding, **options)

    def memory(self, kind: Redundancy) -> tuple[int, int]:
        """Return the bytes of weights of the largest server, and of all."""
        every = [*self.expert_bytes[Precision.full], *self._extra(kind)[2]]
        return max(every), sum(every)

    def accuracy(self, kind: Redundancy) -> float:
        """Return the accuracy of the extra servers' own answers; NaN where it was not measured, or there are none."""
        return self._extra(kind)[3]

    def _extra(self, kind: Redundancy) -> tuple[Layout, Sequence[NDArray[np.float64]], Sequence[int], float]:
        """Return the layout, the times of the extra servers' networks, their sizes, and how right they are."""
        count, extras, nan = self.code.num_experts, self.code.num_coded, float("nan")
        if kind is Redundancy.uncoded:
            return Layout(count), (), (), nan
        if kind.is_coded:
            return coded_layout(self.code), self.coded_seconds, self.coded_bytes, nan
        if kind is Redundancy.copy:
            layout, sizes = spread_copies(count, extras), self.expert_bytes[Precision.full]
            seconds = [self.expert_seconds[expert] for expert in layout.copies]
            return layout, seconds, [sizes[expert] for expert in layout.copies], self.expert_accuracy
        layout = spread_spares(count, extras)
        if kind.precision is not None:
            accuracy = {Precision.full: self.expert_accuracy, **self.rounded_accuracy}.get(kind.precision, nan)
            return layout, self.expert_seconds * extras, [sum(self.expert_bytes[kind.precision])] * extras, accuracy
        if self.failover is None:
            raise ConfigurationError("found no failover network, give its --failover.accuracy, .mib and .seconds")
        times, size = np.array([self.failover.seconds]), int(self.failover.mib * 2**20)
        return layout, [times] * (count * extras), [size] * extras, self.failover.accuracy


def rounded(values: Tensor, precision: Precision) -> tuple[Tensor, int]:
    """Return what a tensor is once it was kept in a precision, and the bytes that it took."""
    whole = precision is Precision.full or not values.is_floating_point()
    if whole or (precision is Precision.int8 and values.ndim < 2):
        return values, values.numel() * values.element_size()
    if precision is Precision.half:
        return values.half().to(values.dtype), 2 * values.numel()
    scale = values.flatten(1).abs().amax(1).clamp(min=torch.finfo(values.dtype).tiny) / 127
    scale = scale.view(-1, *[1] * (values.ndim - 1))
    return (values / scale).round() * scale, values.numel() + 4 * len(values)


def kept_bytes(path: Path, precision: Precision = Precision.full) -> int:
    """Return the bytes of a network's weights and buffers in a precision."""
    return sum(rounded(values, precision)[1] for values in load_network(path).network.state_dict().values())


@torch.no_grad()
def measure_accuracy(path: Path, batches: Iterable[tuple[Tensor, Tensor]], precision: Precision) -> float:
    """Return the accuracy of a network with rounded weights on a test set's inputs, as they are stored, and labels."""
    file = load_network(path)
    state = {name: rounded(values, precision)[0] for name, values in file.network.state_dict().items()}
    file.network.load_state_dict(state)
    right = count = 0
    for stored, labels in batches:
        logits = file.network(to_input(stored, file.config.image_size))
        right += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    return right / count


def measure_service(server: NetworkServer) -> tuple[NDArray[np.float64], float]:
    """Return the seconds that a server takes for one input ``[200]``, and what each further one of 8 adds, as a share.

    The share is of medians, and not negative.
    """
    draw = torch.Generator().manual_seed(0)
    one = server.probe
    if one.dtype == torch.uint8:
        one = torch.randint(256, tuple(one.shape), generator=draw, dtype=torch.uint8)
    several = one.repeat(_BATCH, *[1] * (one.ndim - 1))
    times = _times(lambda: server(one))
    more = _times(lambda: server(several), _REPEATS // _BATCH)
    return times, max(0.0, float(np.median(more) / np.median(times) - 1) / (_BATCH - 1))


def measure_decoding(
    code: Code, config: DecoderConfig, expects: ReplyFormat, feature_widths: Sequence[int] | None = None
) -> float:
    """Return the median seconds that it takes to decode one expert's answer to one input.

    The decoder is fitted on random numbers: what it takes does not depend on them.
    """
    draw = torch.Generator().manual_seed(0)
    count, servers, width = code.num_experts, code.num_experts + code.num_coded, expects.features
    samples = 64 + 2 * (config.components or 0)
    logits = torch.randn(servers, samples, expects.outputs, generator=draw)
    features = None if width is None else torch.randn(servers, samples, width, generator=draw).unbind()
    answers = Answers(
        experts=logits[:count],
        coded=logits[count:],
        expert_features=features and features[:count],
        coded_features=features and features[count:],
        feature_widths=feature_widths,
        tasks=torch.arange(samples) % count,
    )
    head = torch.randn(expects.outputs, width or 0, generator=draw), torch.zeros(expects.outputs)
    decodings = Decodings(code, [make_decoder(config, code, [0], {0: head}).fit(answers)], feature_widths)
    arrived = {
        server: Reply(logits[server, :1], None if features is None else features[server][:1])
        for server in range(1, servers)
    }
    return float(np.median(_times(lambda: decodings.decode(arrived))))


def _times(action: Callable[[], object], repeats: int = _REPEATS) -> NDArray[np.float64]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = np.empty(_WARM_UP + repeats)
        for place in range(len(times)):
            started = time.process_time()  # not a clock's: others may be at work on this machine
            action()
            times[place] = time.process_time() - started
        return times[_WARM_UP:]
    finally:
        torch.set_num_threads(threads)
