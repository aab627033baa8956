"""Which servers stand in for an expert, and when they are asked."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import chain
from typing import Literal

import torch

from coin.coding import Code
from coin.coding.code import MAX_AMPLIFICATION
from coin.core.choices import check_number

Which = Literal["nobody", "replica", "coded", "everyone"]
"""Who stands in for an expert: nobody, a server that holds all experts, the coded model that makes up for it without
the other experts, or all other experts and coded models."""
Moment = Literal["at once", "late", "lost"]
"""When these are asked: with the expert, whose own answer is still preferred until it is late; when its answer is late
or lost; or when it is lost only."""

PolicyKind = StrEnum(
    "PolicyKind",
    "uncoded replica replica_proactive standin standin_lost coded_hedged coded_proactive",
)
POLICIES: dict[str, tuple[Which, Moment]] = {
    "uncoded": ("nobody", "lost"),
    "replica": ("replica", "late"),
    "replica_proactive": ("replica", "at once"),
    "standin": ("coded", "late"),
    "standin_lost": ("coded", "lost"),
    "coded_hedged": ("everyone", "late"),
    "coded_proactive": ("everyone", "at once"),
}


@dataclass(frozen=True)
class Policy:
    """A policy of the table, and the quantile of own answers' time after which one is late; 0 does not wait."""

    kind: PolicyKind
    quantile: float = 0.9

    def __post_init__(self) -> None:
        check_number("quantile", self.quantile, low=0, high=1)

    @property
    def which(self) -> Which:
        """Who stands in for an expert."""
        return POLICIES[self.kind][0]

    @property
    def moment(self) -> Moment:
        """When these are asked."""
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

    Attributes:
        experience: The number of queries observed.
    """

    def __init__(self, quantile: float, initial: float, longest: float = math.inf) -> None:
        self.quantile = quantile
        self.longest = longest
        self.experience = 0
        self._seconds = min(initial, longest)

    @property
    def seconds(self) -> float:
        """Seconds after which an answer is late."""
        return self._seconds if self.quantile > 0 else 0.0

    def observe(self, late: bool) -> None:
        """Update the estimate with whether a query's own answer was late."""
        self.experience += 1
        gain = max(0.005, 20.0 / (20.0 + self.experience))
        change = self.quantile if late else self.quantile - 1.0
        seconds = self._seconds * math.exp(gain * change)
        self._seconds = min(seconds, self.longest)


class StandIns:
    """The servers that stand in for N experts, by name: ``coded-ROW``, ``coded-ROW/EXPERT`` or ``replica-ROW/EXPERT``.

    Args:
        which: Who stands in; `experts`: the names of the experts' servers.
        code: The code; each of its rows is one server more, with a coded model or all experts.
        every_row: Whether an answer without survivors needs all coded models, or the one of largest weight.
        adapted: Whether coded models are bodies with adapters, which are asked for an expert's, ``coded-ROW/EXPERT``.
    """

    def __init__(
        self,
        which: Which,
        experts: Sequence[str],
        code: Code,
        every_row: bool = False,
        adapted: bool = False,
    ) -> None:
        self.which = which
        self.experts = tuple(experts)
        self.code = code
        self.coded = tuple(f"coded-{row}" for row in range(code.num_coded))
        # Those of each expert.
        self.of = [self._of(place, every_row, adapted) for place in range(len(experts))]
        stand_ins = chain.from_iterable(self.of)
        self.servers = tuple(dict.fromkeys([*self.experts, *stand_ins]))  # the experts' first

    @property
    def processes(self) -> dict[str, list[str]]:
        """The processes, and the servers that each of them is: a replica, or a body, is one for each expert."""
        found: dict[str, list[str]] = {}
        for name in self.servers:
            process = name.partition("/")[0]
            found.setdefault(process, []).append(name)
        return found

    def _of(self, place: int, every_row: bool, adapted: bool) -> tuple[str, ...]:
        expert = self.experts[place]
        if self.which == "nobody":
            return ()
        if self.which == "replica":
            return tuple(f"replica-{row}/{expert}" for row in range(self.code.num_coded))
        if self.which == "everyone":
            others = tuple(name for name in self.experts if name != expert)
            return others + self.coded
        if every_row:
            return self.coded
        rows = self.code.matrix.argmax(0)
        heaviest = self.coded[int(rows[place])]
        return (f"{heaviest}/{expert}" if adapted else heaviest,)

    def suffice(self, expert: int, arrived: Collection[str]) -> bool:
        """Return whether these servers' answers make up for an expert's own."""
        if self.which == "everyone":
            lost = {place for place, name in enumerate(self.experts) if name not in arrived}
            missing = sorted(lost | {expert})
            rows = [row for row, name in enumerate(self.coded) if name in arrived]
            return _solvable(self.code, tuple(rows), tuple(missing))
        stand_ins = self.of[expert]
        if self.which == "replica":
            return any(name in arrived for name in stand_ins)
        return bool(stand_ins) and all(name in arrived for name in stand_ins)


@lru_cache(maxsize=4096)
def _solvable(code: Code, rows: tuple[int, ...], missing: tuple[int, ...]) -> bool:
    """Return whether the equations of these coded models can be solved for the missing experts."""
    if len(rows) < len(missing):
        return False
    columns = code.matrix[list(rows)][:, list(missing)]
    smallest = float(torch.linalg.svdvals(columns)[-1])
    return smallest * MAX_AMPLIFICATION >= 1
