"""The servers, and which experts a set of answers covers."""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache, reduce
from operator import or_


@dataclass(frozen=True)
class Layout:
    """The servers of a coded or replicated system: experts first, then coded models, then copies of experts.

    Sets of servers and of experts are bit masks, bit s for server s: the simulation uses them heavily.

    Args:
        num_experts: N, at least 1.
        num_coded: R, the number of coded models.
        copies: The expert of each copy.
        solvable: Pairs of a set of coded models (bit r for row r) and a set of missing experts that they replace, given
            all other experts; see `coin.serving.decodings.coded_layout`.
        alone: For every expert the coded models that replace it without survivors; empty if decoders need survivors.
    """

    num_experts: int
    num_coded: int = 0
    copies: tuple[int, ...] = ()
    solvable: frozenset[tuple[int, int]] = frozenset()
    alone: tuple[int, ...] = ()
    _read: dict[int, tuple[int, int]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _hosts: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def num_servers(self) -> int:
        """All servers: experts, coded models and copies."""
        return self.num_experts + self.num_coded + len(self.copies)

    @cached_property
    def everyone(self) -> int:
        """The set of all servers."""
        return (1 << self.num_servers) - 1

    @cached_property
    def every_expert(self) -> int:
        """The set of all experts, which is that of their own servers."""
        return (1 << self.num_experts) - 1

    def hosts(self, experts: int) -> int:
        """Return the servers that run any of these experts: their own and copies."""
        if experts not in self._hosts:
            copies = enumerate(self.copies, self.num_experts + self.num_coded)
            self._hosts[experts] = experts | sum(1 << place for place, expert in copies if experts >> expert & 1)
        return self._hosts[experts]

    def standins(self, experts: int) -> int:
        """Return the coded servers that replace these experts without survivors."""
        rows = (self.alone[expert] for expert in members(experts) if self.alone)
        return reduce(or_, rows, 0) << self.num_experts

    def read(self, arrived: int) -> tuple[int, int]:
        """Return the experts that these servers run, and those that can be decoded from their answers."""
        if arrived not in self._read:
            own = arrived & self.every_expert
            for place, expert in enumerate(self.copies, self.num_experts + self.num_coded):
                own |= (arrived >> place & 1) << expert
            missing, rows = self.every_expert & ~own, arrived >> self.num_experts & ((1 << self.num_coded) - 1)
            alone = sum(1 << expert for expert, needs in enumerate(self.alone) if not needs & ~rows)
            self._read[arrived] = own, missing if (rows, missing) in self.solvable else missing & alone
        return self._read[arrived]

    def covers(self, arrived: int, wanted: int) -> bool:
        """Whether the answers of these servers suffice for the wanted experts."""
        own, solved = self.read(arrived)
        return not wanted & ~(own | solved)


def spread_copies(num_experts: int, extras: int) -> Layout:
    """Return N experts with extra servers that are copies of the experts in turn."""
    return Layout(num_experts, copies=tuple(extra % num_experts for extra in range(extras)))


def spread_replicas(num_experts: int, extras: int) -> Layout:
    """Return N experts with replicas that each hold all experts: one server per network held."""
    return Layout(num_experts, copies=tuple(range(num_experts)) * extras)


@lru_cache(maxsize=4096)
def members(mask: int) -> tuple[int, ...]:
    """Return the members of a set in ascending order."""
    return tuple(place for place in range(mask.bit_length()) if mask >> place & 1)
