"""Which servers stand in for an expert, and when they are asked."""

from collections.abc import Collection, Sequence
from enum import StrEnum
from functools import lru_cache
from itertools import chain
from typing import Literal

from coin.coding import Code
from coin.coding.code import check_decodable
from coin.errors import DecodingError

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


class StandIns:
    """The servers that stand in for N experts, by name: ``coded-ROW``, ``replica-ROW`` or the other experts' own.

    Args:
        policy: Who stands in, and when.
        experts: The names of the experts' servers.
        code: The code; each of its rows is one server more, with a coded model or all experts.
        adapted: Whether coded models are bodies with adapters, which answer as one of the experts.
    """

    def __init__(
        self, policy: PolicyKind, experts: Sequence[str], code: Code, adapted: bool = False
    ) -> None:
        self.policy = policy
        self.which, self.moment = POLICIES[policy]
        self.experts = list(experts)
        self.code = code
        rows = range(code.num_coded)
        self.coded = [f"coded-{row}" for row in rows]
        self.of = [self._of(expert) for expert in range(len(experts))]  # those of each expert
        self.servers = list(dict.fromkeys(chain(experts, *self.of)))  # the experts' own first
        self._answers_as_one = adapted or self.which == "replica"

    def _of(self, expert: int) -> list[str]:
        match self.which:
            case "nobody":
                return []
            case "replica":
                return [f"replica-{row}" for row in range(self.code.num_coded)]
            case "coded":
                heaviest = int(self.code.matrix[:, expert].argmax())
                return [self.coded[heaviest]]
            case "everyone":
                return [*self.experts[:expert], *self.experts[expert + 1 :], *self.coded]

    def asked_as(self, server: str, expert: int) -> int:
        """Return as which expert a server is asked for an expert's answer; 0 where it answers all alike."""
        return expert if self._answers_as_one and server not in self.experts else 0

    def suffice(self, expert: int, arrived: Collection[str]) -> bool:
        """Return whether these servers' answers make up for an expert's own."""
        found = [name for name in self.of[expert] if name in arrived]
        if self.which != "everyone":
            return len(found) > 0  # each of them does alone
        lost = [place for place, name in enumerate(self.experts) if name not in found]
        rows = [row for row, name in enumerate(self.coded) if name in found]
        return _decodable(self.code, tuple(rows), tuple(lost))


@lru_cache(maxsize=4096)
def _decodable(code: Code, rows: tuple[int, ...], lost: tuple[int, ...]) -> bool:
    """Return whether the equations of these coded models can be solved for the lost experts."""
    try:
        check_decodable(code.matrix[list(rows)], lost)
    except DecodingError:
        return False
    return True
