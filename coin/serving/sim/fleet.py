"""What is known of N experts and of what may stand in for them: times, sizes and accuracies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coin.coding import Code
from coin.coding.ready import convex
from coin.errors import ConfigurationError
from coin.serving.decodings import coded_layout
from coin.serving.layout import Layout, spread_copies, spread_spares
from coin.serving.policies import Policy, PolicyKind
from coin.serving.sim.case import Case
from coin.serving.sim.redundancy import Precision, Redundancy
from coin.serving.sim.scenario import Conditions, require


@dataclass(frozen=True)
class Failover:
    """A small network for all tasks.

    Args:
        accuracy: Its mean accuracy over the tasks, from 0 to 1.
        mib: The size of its weights in MiB.
        seconds: What it takes for one input.

    Raises:
        ConfigurationError: An option is out of its range.
    """

    accuracy: float
    mib: float
    seconds: float

    def __post_init__(self) -> None:
        fine = 0 <= self.accuracy <= 1 and self.mib > 0 and self.seconds > 0
        require(fine, self, "an accuracy from 0 to 1, a positive size and time")


@dataclass(frozen=True)
class Fleet:
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

    def resized(self, experts: int, extras: int) -> "Fleet":
        """Return as many experts like these and as many coded models; decoding them was then not measured.

        Raises:
            ConfigurationError: There are no codes of that size.
        """
        if (experts, extras) == (self.code.num_experts, self.code.num_coded):
            return self
        return replace(
            self,
            code=convex(experts, extras),
            expert_seconds=tuple(islice(cycle(self.expert_seconds), experts)),
            coded_seconds=tuple(islice(cycle(self.coded_seconds), extras)),
            expert_bytes={kept: tuple(islice(cycle(sizes), experts)) for kept, sizes in self.expert_bytes.items()},
            coded_bytes=tuple(islice(cycle(self.coded_bytes), extras)),
            decoded_accuracy={},
        )

    def case(self, kind: Redundancy, conditions: Conditions, quantile: float = 0.9, **options: Any) -> Case:
        """Return a case of these experts with a redundancy; the options are the case's own.

        Raises:
            ConfigurationError: A failover network is asked for, and none is known.
        """
        count, extras = self.code.num_experts, self.code.num_coded
        samples, machines = list(self.expert_seconds), list(range(count))
        policy = Policy(PolicyKind.hedged, quantile)
        if kind in (Redundancy.coded_proactive, Redundancy.coded_hedged):
            layout, policy = coded_layout(self.code), Policy(PolicyKind(kind), quantile)
            samples += self.coded_seconds
            machines += range(count, count + extras)
        elif kind is Redundancy.uncoded:
            layout, policy = Layout(count), Policy(PolicyKind.uncoded)
        elif kind is Redundancy.copy:
            layout = spread_copies(count, extras)
            samples += [self.expert_seconds[expert] for expert in layout.copies]
            machines += range(count, count + extras)
        else:
            layout = spread_spares(count, extras)
            small = None if kind is not Redundancy.failover else np.array([self._failover.seconds])
            samples += [self.expert_seconds[expert] if small is None else small for expert in layout.copies]
            machines += [count + place // count for place in range(len(layout.copies))]
        return Case(
            layout, policy, tuple(samples), conditions, machines=tuple(machines), decoding=self.decoding, **options
        )

    def memory(self, kind: Redundancy) -> tuple[int, int]:
        """Return the bytes of weights of the largest server, and of all."""
        own, extras = self.expert_bytes[Precision.full], self.code.num_coded
        if kind.precision is not None:
            extra: Sequence[int] = [sum(self.expert_bytes[kind.precision])] * extras
        elif kind is Redundancy.failover:
            extra = [int(self._failover.mib * 2**20)] * extras
        elif kind is Redundancy.copy:
            extra = [own[expert] for expert in spread_copies(len(own), extras).copies]
        else:
            extra = () if kind is Redundancy.uncoded else self.coded_bytes
        return max(*own, *extra), sum(own) + sum(extra)

    def accuracy(self, kind: Redundancy) -> float:
        """Return the accuracy of the extra servers' own answers; NaN where it was not measured."""
        if kind is Redundancy.failover:
            return self._failover.accuracy
        if kind.precision not in (None, Precision.full):
            return self.rounded_accuracy.get(kind.precision, float("nan"))
        return self.expert_accuracy

    @property
    def _failover(self) -> Failover:
        if self.failover is None:
            raise ConfigurationError("found no failover network, give its failover.accuracy, .mib and .seconds")
        return self.failover
