"""Which servers stand in for an expert, and when they are asked."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import torch

from coin.coding import Code
from coin.coding.code import MAX_AMPLIFICATION
from coin.core.choices import check_number, parse_enum


class Which(StrEnum):
    """The servers that stand in for an expert."""

    nobody = "nobody"
    replicas = "replicas"
    """A server that holds all experts; the first answer counts."""
    coded = "coded"
    """The coded model that makes up for it without the other experts."""
    everyone = "everyone"
    """All other experts and all coded models."""


class Moment(StrEnum):
    """When these servers are asked."""

    at_once = "at_once"
    """With the expert; its own answer is still preferred until it is late."""
    late = "late"
    """When its answer is late, or lost."""
    lost = "lost"
    """When its answer is lost; one that is late is waited for."""


PolicyKind = StrEnum(
    "PolicyKind",
    ["uncoded", "replica", "replica_proactive", "standin", "standin_lost", "coded_hedged", "coded_proactive"],
)


POLICIES = {
    PolicyKind.uncoded: (Which.nobody, Moment.lost),
    PolicyKind.replica: (Which.replicas, Moment.late),
    PolicyKind.replica_proactive: (Which.replicas, Moment.at_once),
    PolicyKind.standin: (Which.coded, Moment.late),
    PolicyKind.standin_lost: (Which.coded, Moment.lost),
    PolicyKind.coded_hedged: (Which.everyone, Moment.late),
    PolicyKind.coded_proactive: (Which.everyone, Moment.at_once),
}
"""Which servers stand in for an expert, and when they are asked."""


@dataclass(frozen=True)
class Policy:
    """A policy of the table, and the quantile of own answers' time after which one is late; 0 does not wait."""

    kind: PolicyKind
    quantile: float = 0.9

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", parse_enum(PolicyKind, "policy", self.kind))
        check_number("quantile", self.quantile, low=0, high=1)

    @property
    def which(self) -> Which:
        """The servers that stand in."""
        return POLICIES[self.kind][0]

    @property
    def moment(self) -> Moment:
        """When they are asked."""
        return POLICIES[self.kind][1]


class Lateness:
    """The time after which a share of 1 − q of the queries are late.

    ln t rises by g·q when a query is late and falls by g·(1 − q) when its own answer came in time, so that in the long
    run the share 1 − q is late for any distribution, and answers that were not waited for cause no bias. The gain g
    falls from 1 as 20/(20 + k) to 0.005. Source: Robbins and Monro, *A stochastic approximation method* (1951), section
    4, on quantiles; on a logarithmic scale, so that it works in any unit.

    Args:
        quantile: q in [0, 1); with 0 every answer that is not immediate is late.
        initial: t at first, in seconds; `longest`, the largest t.
    """

    def __init__(self, quantile: float, initial: float, longest: float = math.inf) -> None:
        self.quantile, self.longest, self._seconds, self._count = quantile, longest, min(initial, longest), 0

    @property
    def seconds(self) -> float:
        """Seconds after which an answer is late."""
        return self._seconds if self.quantile > 0 else 0.0

    def observe(self, late: bool) -> None:
        """Update the estimate with whether a query's own answer was late."""
        self._count += 1
        gain = max(0.005, 20.0 / (20.0 + self._count))
        change = self.quantile if late else self.quantile - 1.0
        self._seconds = min(self._seconds * math.exp(gain * change), self.longest)


class StandIns:
    """The servers that stand in for N experts, by name: ``coded-ROW``, or ``replica-ROW/EXPERT``.

    Args:
        which: The servers that stand in.
        experts: The names of the experts' servers.
        code: The code; each of its rows is one server more, with a coded model or all experts.
        every_row: Whether an answer without survivors needs all coded models, or the one of largest weight.
    """

    def __init__(self, which: Which, experts: Sequence[str], code: Code, every_row: bool = False) -> None:
        self.which, self.experts, self.code = which, tuple(experts), code
        self.coded = tuple(f"coded-{row}" for row in range(code.num_coded))
        heaviest = code.matrix.argmax(0).tolist()
        self._of: dict[int, tuple[str, ...]] = {}
        for place, expert in enumerate(self.experts):
            others = tuple(name for name in self.experts if name != expert)
            self._of[place] = {
                Which.nobody: (),
                Which.replicas: tuple(f"replica-{row}/{expert}" for row in range(code.num_coded)),
                Which.coded: self.coded if every_row else (self.coded[heaviest[place]],),
                Which.everyone: (*others, *self.coded),
            }[which]

    def of(self, expert: int) -> tuple[str, ...]:
        """Return the servers that stand in for an expert."""
        return self._of[expert]

    @property
    def servers(self) -> list[str]:
        """All servers: the experts', then those that stand in."""
        return list(dict.fromkeys([*self.experts, *(name for own in self._of.values() for name in own)]))

    def suffice(self, expert: int, arrived: Collection[str]) -> bool:
        """Return whether these servers' answers make up for an expert's own."""
        if self.which is Which.everyone:
            missing = tuple(place for place, name in enumerate(self.experts) if place == expert or name not in arrived)
            rows = tuple(row for row, name in enumerate(self.coded) if name in arrived)
            return _solvable(self.code, rows, missing)
        found = [name in arrived for name in self._of[expert]]
        return any(found) if self.which is Which.replicas else bool(found) and all(found)


@lru_cache(maxsize=4096)
def _solvable(code: Code, rows: tuple[int, ...], missing: tuple[int, ...]) -> bool:
    """Return whether the equations of these coded models can be solved for the missing experts."""
    if len(rows) < len(missing):
        return False
    columns = code.matrix[list(rows)][:, list(missing)]
    return float(torch.linalg.svdvals(columns)[-1]) * MAX_AMPLIFICATION >= 1
