"""Service times, sizes and accuracies of N experts and of their stand-ins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coin.coding import Code
from coin.coding.ready import convex
from coin.core.choices import check_number
from coin.reporting.latency import tail_intervals
from coin.serving.decodings import coded_layout, standin_layout
from coin.serving.layout import Layout, spread_copies, spread_replicas
from coin.serving.policies import Policy, PolicyKind
from coin.serving.sim.conditions import Conditions
from coin.serving.sim.run import SimulationOutcome
from coin.serving.sim.simulation import Simulation

_LEVELS = {"p50": 0.5, "p99": 0.99, "p999": 0.999}  # quantiles of the latency, by the names of their columns


class Redundancy(StrEnum):
    """The kind of stand-in for a late or lost expert, and when it is asked."""

    uncoded = "uncoded"
    """Nothing."""
    copy = "copy"
    """A copy of one expert on each extra server."""
    replica = "replica"
    """All experts' weights on each extra server, which runs the one that is missing. Its answers are exact."""
    replica_delta = "replica_delta"
    """The same from a base and the experts' compressed deltas (`coin.compress`), unpacked when it runs another one."""
    neighbours = "neighbours"
    """No extra server: every expert's keeps the base and the others' deltas, and answers for one of them."""
    failover = "failover"
    """One small network for all tasks on each extra server; its accuracy, size and speed are the user's to give."""
    standin = "standin"
    """A coded model on each extra server, which makes up for any expert without the others."""
    coded_proactive = "coded_proactive"
    """A coded model on each extra server; every query asks all servers at once."""
    coded_hedged = "coded_hedged"
    """A coded model on each extra server; all servers are asked when an expert is late or lost."""

    @property
    def is_coded(self) -> bool:
        """Whether the extra servers hold coded models."""
        return self in (Redundancy.standin, Redundancy.coded_proactive, Redundancy.coded_hedged)


@dataclass(frozen=True)
class Failover:
    """A small network for all tasks.

    Args:
        accuracy: Its mean accuracy over the tasks, from 0 to 1.
        mib: The size of its weights in MiB.
        seconds: Its service time for one input.
    """

    accuracy: float
    mib: float
    seconds: float

    def __post_init__(self) -> None:
        check_number("failover.accuracy", self.accuracy, low=0, most=1)
        for name in ("mib", "seconds"):
            check_number(f"failover.{name}", getattr(self, name), low=0, strict=True)


@dataclass(frozen=True)
class StandIn:
    """A stand-in for experts: an extra server keeps ``fixed + each · N`` bytes of weights.

    Args:
        kind: Its kind, and when it is asked; `variant`, its name in the results within its kind.
        fixed: Bytes that a server keeps, however many experts there are; `each`, those for each.
        accuracy: The accuracy of its answers, by the number of lost experts if it depends on it; empty if not measured.
        worst: The smallest NDA over tasks with one expert lost.
        every_row: Whether a coded answer needs all coded models, or one.
        unpacking: Seconds to unpack another expert.
        seconds: Its network's time for one input; by default the experts' times.
    """

    kind: Redundancy
    variant: str = ""
    fixed: float = 0.0
    each: float = 0.0
    accuracy: Mapping[int, float] = field(default_factory=dict)
    worst: float = float("nan")
    every_row: bool = False
    unpacking: float = 0.0
    seconds: float | None = None

    @property
    def reads_survivors(self) -> bool:
        """Whether decoding needs the other experts' answers."""
        return self.kind in (Redundancy.coded_proactive, Redundancy.coded_hedged)

    @property
    def elsewhere(self) -> "StandIn":
        """The same stand-in for another number of experts; a coded model's accuracy is then unknown."""
        return replace(self, accuracy={}, worst=float("nan")) if self.kind.is_coded else self

    def right(self, lost: int = 1) -> float:
        """Return the accuracy of its answers with this number of lost experts; NaN if it was not measured."""
        return self.accuracy.get(lost if self.reads_survivors else 1, float("nan"))


@dataclass(frozen=True)
class Profile:
    """The profile of N experts and R extra servers.

    Args:
        code: The code of the coded models, or of as many extra servers.
        seconds: Every expert's service times ``[K]``; `sizes`: its bytes.
        accuracy: The experts' mean accuracy over tasks.
        decoding: Seconds to decode an answer.
    """

    code: Code
    seconds: tuple[NDArray[np.float64], ...]
    sizes: tuple[int, ...]
    accuracy: float
    decoding: float = 0.0

    def resized(self, experts: int, extras: int) -> "Profile":
        """Return a profile with this number of such experts and of extra servers."""
        if (experts, extras) == (self.code.num_experts, self.code.num_coded):
            return self
        places = [place % len(self.sizes) for place in range(experts)]
        times, sizes = tuple(self.seconds[each] for each in places), tuple(self.sizes[each] for each in places)
        return replace(self, code=convex(experts, extras), seconds=times, sizes=sizes)

    def extras(self, what: StandIn) -> int:
        """Return the number of servers beside the experts' own."""
        return 0 if what.kind in (Redundancy.uncoded, Redundancy.neighbours) else self.code.num_coded

    def losses(self, what: StandIn) -> int:
        """Return how many experts, any of them, may be lost at once."""
        count, extras = self.code.num_experts, self.code.num_coded
        if what.kind is Redundancy.uncoded or (what.kind is Redundancy.copy and extras < count):
            return 0
        return min(extras, count) if what.reads_survivors else count - (what.kind is Redundancy.neighbours)

    def memory(self, what: StandIn) -> tuple[float, float]:
        """Return the bytes of weights of the largest server, and of all."""
        is_extra = what.kind is not Redundancy.neighbours
        kept = what.fixed + what.each * (len(self.sizes) - (not is_extra))
        every = [*self.sizes, *[kept] * self.extras(what)] if is_extra else [size + kept for size in self.sizes]
        return max(every), sum(every)

    def simulation(
        self, what: StandIn, conditions: Conditions, quantile: float = 0.9, memory: float | None = None, **options: Any
    ) -> Simulation:
        """Return the simulation of these experts with a stand-in; the options are those of `Simulation`.

        A server keeps one expert unpacked, or as many as fit beside its weights into `memory` bytes.
        """
        layout, machines = self._servers(what)
        own = PolicyKind.uncoded if what.kind is Redundancy.uncoded else PolicyKind.hedged
        policy = Policy(PolicyKind(what.kind) if what.kind.is_coded else own, quantile)
        holds = layout.copies or range(layout.num_coded)
        if what.seconds is None:
            samples = [self.seconds[each % len(self.seconds)] for each in holds]
        else:
            samples = [np.array([what.seconds])] * len(holds)
        kept = self.memory(what)[0] if what.kind is Redundancy.neighbours else what.fixed + what.each * len(self.sizes)
        room = 1 if memory is None else max(0, int((memory - kept) // max(self.sizes)))
        return Simulation(
            layout, policy, (*self.seconds, *samples), conditions,
            machines=machines, decoding=self.decoding, unpacking=what.unpacking, unpacked=room, **options,
        )  # fmt: skip

    def _servers(self, what: StandIn) -> tuple[Layout, tuple[int, ...]]:
        """Return the servers, and the machine of each."""
        count, extras = self.code.num_experts, self.code.num_coded
        experts = range(count)
        if what.kind is Redundancy.neighbours:
            pairs = [(machine, expert) for machine in experts for expert in experts if expert != machine]
            return Layout(count, copies=tuple(each for _, each in pairs)), (*experts, *(each for each, _ in pairs))
        if what.kind is Redundancy.uncoded:
            layout = Layout(count)
        elif what.kind is Redundancy.standin:
            layout = standin_layout(self.code, what.every_row)
        elif what.reads_survivors:
            layout = coded_layout(self.code)
        else:
            layout = (spread_copies if what.kind is Redundancy.copy else spread_replicas)(count, extras)
        more = layout.num_servers - count
        return layout, (*experts, *(count + place * extras // more for place in range(more)))

    def row(self, what: StandIn, simulation: Simulation, outcomes: Sequence[SimulationOutcome]) -> dict[str, object]:
        """Return the summary of one simulation over its seeds: a row of ``simulation.csv``.

        Latencies are in seconds, memory in bytes of weights: of the largest server, and of all. ``share_replicated``
        are answers of experts on other servers than their own; ``standing_in_accuracy`` is that of these and of decoded
        ones, and ``worst_nda`` the share of the expert's that they keep on the worst task. ``unanswered`` are the
        queries that nobody can answer while machines are broken down.
        """
        answers, nan = sum(outcome.answers for outcome in outcomes), float("nan")
        sizes = sorted({size for outcome in outcomes for size in outcome.decoded})
        shares = {size: sum(outcome.decoded.get(size, 0) for outcome in outcomes) / answers for size in sizes}
        replicated = sum(it.replicated for it in outcomes) / answers
        failed = sum(it.failed for it in outcomes) / answers
        decoded, right = sum(shares.values()), replicated * what.right() if replicated else 0.0
        right += sum(share * what.right(size) for size, share in shares.items())
        memory_server, memory = self.memory(what)
        intervals = tail_intervals([it.latencies for it in outcomes], list(_LEVELS.values()))
        named = zip(_LEVELS, intervals, strict=True)
        latencies = {f"{name}{end}": k for name, it in named for end, k in zip(("", "_low", "_high"), it, strict=True)}
        policy, conditions = simulation.policy, simulation.conditions
        return {
            "want": str(simulation.want), "redundancy": str(what.kind), "variant": what.variant,
            "experts": self.code.num_experts, "extras": self.extras(what), "queries": simulation.queries,
            "seeds": len(outcomes), "memory_server": memory_server, "memory": memory, "losses": self.losses(what),
            "quantile": policy.quantile if policy.hedges else nan, "load": simulation.load, **latencies,
            "share_decoded": decoded, "share_replicated": replicated, "share_failed": failed,
            "unanswered": simulation.unanswered(conditions.failures.broken),
            "forwards": float(np.mean([it.forwards for it in outcomes])),
            "utilisation": float(np.mean([it.utilisation for it in outcomes])), "expert_accuracy": self.accuracy,
            "standing_in_accuracy": right / (decoded + replicated) if decoded + replicated else nan,
            "worst_nda": what.worst,
            "effective_accuracy": (1 - decoded - replicated - failed) * self.accuracy + right,
            "service_seconds": simulation.unit * (1 + conditions.service.tail),
            "decoding_seconds": simulation.decoding, "unpacking_seconds": what.unpacking,
        }  # fmt: skip
