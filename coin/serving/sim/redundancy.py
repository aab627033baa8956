"""What R extra servers may hold."""

from enum import StrEnum


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
        kept = {Redundancy.spare: Precision.full, Redundancy.spare_half: Precision.half}
        return {**kept, Redundancy.spare_int8: Precision.int8}.get(self)
