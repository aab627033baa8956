"""Which servers stand in for an expert, and when they are asked."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from itertools import chain
from typing import Literal

import torch

from coin.coding import Code
from coin.coding.code import MAX_AMPLIFICATION
from coin.core.choices import check_number, parse_enum

Which = Literal["nobody", "replica", "coded", "everyone"]
"""Who stands in for an expert: nobody, a server that holds all experts, the coded model that makes up for it without
the other experts, or all other experts and coded models."""
Moment = Literal["at once", "late", "lost"]
"""When these are asked: with the expert, whose own answer is still preferred until it is late; when its answer is late
or lost; or when it is lost only."""

PolicyKind = StrEnum(
    "PolicyKind", "uncoded replica replica_proactive standin standin_lost coded_hedged coded_proactive"
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
    which: Which = field(init=False)
    moment: Moment = field(init=False)

    def __post_init__(self) -> None:
        kind = parse_enum(PolicyKind, "policy", self.kind)
        for name, value in zip(("kind", "which", "moment"), (kind, *POLICIES[kind]), strict=True):
            object.__setattr__(self, name, value)
        check_number("quantile", self.quantile, low=0, high=1)


class Lateness:
    """The time after which a share of 1 − q of the queries are late.

    ln t rises by g·q when a query is late and falls by g·(1 − q) when its own answer came in time, so that in the long
    run the share 1 − q is late for any distribution, and answers that were not waited for cause no bias. The gain g
    falls from 1 as 20/(20 + k) to 0.005. Source: Robbins and Monro, *A stochastic approximation method* (1951), section
    4, on quantiles; on a logarithmic scale, so that it works in any unit.

    Args:
        quantile: q in [0, 1); with 0 every answer that is not immediate is late.
        initial: t at first, in seconds; `longest`, the largest t.
        experience: The number of queries from which `initial` was estimated.
    """

    def __init__(self, quantile: float, initial: float, longest: float = math.inf, experience: int = 0) -> None:
        self.quantile, self.longest, self._seconds = quantile, longest, min(initial, longest)
        self.experience = experience

    @property
    def seconds(self) -> float:
        """Seconds after which an answer is late."""
        return self._seconds if self.quantile > 0 else 0.0

    def observe(self, late: bool) -> None:
        """Update the estimate with whether a query's own answer was late."""
        self.experience += 1
        gain = max(0.005, 20.0 / (20.0 + self.experience))
        change = self.quantile if late else self.quantile - 1.0
        self._seconds = min(self._seconds * math.exp(gain * change), self.longest)


class Pace:
    """How many seconds a server takes for each reply while it has work, over the last seconds of work.

    Replies that come together, as of one batch, share its time; time without work does not count.
    """

    def __init__(self) -> None:
        self._work, self._replies, self._since = 0.0, 0.0, 0.0

    @property
    def seconds(self) -> float:
        """Seconds for each reply; 0 before the first."""
        return self._work / self._replies if self._replies > 0 else 0.0

    def begin(self, now: float) -> None:
        """Note that a server that had no work gets some."""
        self._since = now

    def observe(self, now: float, memory: float) -> None:
        """Count a reply; what is `memory` seconds of work ago weighs 1/e, and nothing takes more than twice as long."""
        work = min(now - self._since, 2 * memory)
        weight = math.exp(-work / memory)
        self._work = weight * self._work + work
        self._replies = weight * self._replies + 1.0
        self._since = now


class StandIns:
    """The servers that stand in for N experts, by name: ``coded-ROW``, ``coded-ROW/EXPERT`` or ``replica-ROW/EXPERT``.

    Args:
        which: Who stands in; `experts`: the names of the experts' servers.
        code: The code; each of its rows is one server more, with a coded model or all experts.
        every_row: Whether an answer without survivors needs all coded models, or the one of largest weight.
        adapted: Whether coded models are bodies with adapters, which are asked for an expert's, ``coded-ROW/EXPERT``.
    """

    def __init__(
        self, which: Which, experts: Sequence[str], code: Code, every_row: bool = False, adapted: bool = False
    ) -> None:
        self.which, self.experts, self.code = which, tuple(experts), code
        self.coded = tuple(f"coded-{row}" for row in range(code.num_coded))
        self.of: list[tuple[str, ...]] = []  # those of each expert
        for expert, heaviest in zip(self.experts, code.matrix.argmax(0).tolist(), strict=True):
            kinds: dict[Which, tuple[str, ...]] = {
                "nobody": (),
                "replica": tuple(f"replica-{row}/{expert}" for row in range(code.num_coded)),
                "coded": self.coded if every_row else (self.coded[heaviest] + (f"/{expert}" if adapted else ""),),
                "everyone": (*(name for name in self.experts if name != expert), *self.coded),
            }
            self.of.append(kinds[which])
        self.servers = tuple(dict.fromkeys([*self.experts, *chain.from_iterable(self.of)]))  # the experts' first

    def suffice(self, expert: int, arrived: Collection[str]) -> bool:
        """Return whether these servers' answers make up for an expert's own."""
        if self.which == "everyone":
            missing = tuple(place for place, name in enumerate(self.experts) if place == expert or name not in arrived)
            rows = tuple(row for row, name in enumerate(self.coded) if name in arrived)
            return _solvable(self.code, rows, missing)
        found = [name in arrived for name in self.of[expert]]
        return any(found) if self.which == "replica" else bool(found) and all(found)


@lru_cache(maxsize=4096)
def _solvable(code: Code, rows: tuple[int, ...], missing: tuple[int, ...]) -> bool:
    """Return whether the equations of these coded models can be solved for the missing experts."""
    columns = code.matrix[list(rows)][:, list(missing)]
    return len(rows) >= len(missing) and float(torch.linalg.svdvals(columns)[-1]) * MAX_AMPLIFICATION >= 1
