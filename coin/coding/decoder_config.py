"""The kinds of decoders, and what each reads and costs."""

from collections.abc import Sequence
from enum import StrEnum

from coin.core.choices import parse_enum
from coin.errors import ConfigurationError

REPLICA = "replica"
"""What results have in place of a decoder where a compressed expert answers by itself; its kind among the methods."""


class DecoderKind(StrEnum):
    """How lost outputs are computed from the ones that arrived.

    >>> [kind.value for kind in coin.DecoderKind]
    ['linear', 'ridge', 'feature_ridge', 'expert_head']
    """

    linear = "linear"
    """The paper's: solve the code's equations for the lost outputs. Needs no calibration."""

    ridge = "ridge"
    """Ridge regression from all arriving logits to the lost logits, fitted on calibration data."""

    feature_ridge = "feature_ridge"
    """The same from the arriving logits and features."""

    expert_head = "expert_head"
    """The lost expert's own head on a coded model's features. Needs no survivors and no calibration."""

    @property
    def needs_fit(self) -> bool:
        """Whether it is fitted to calibration answers before it decodes."""
        return self in (DecoderKind.ridge, DecoderKind.feature_ridge)

    @property
    def reads_features(self) -> bool:
        """Whether servers send features beside their logits."""
        return self in (DecoderKind.feature_ridge, DecoderKind.expert_head)

    @property
    def reads_survivors(self) -> bool:
        """Whether the surviving experts are asked beside the coded models."""
        return self is not DecoderKind.expert_head

    def forwards(self, num_experts: int, num_coded: int, num_lost: int = 1) -> int:
        """Return how many networks run for one lost answer, the survivors that are asked among them."""
        if self is DecoderKind.expert_head:
            return 1
        return num_coded + num_experts - num_lost

    def losses(self, num_experts: int, num_coded: int) -> int:
        """Return how many experts may be lost at once: with survivors what the code promises, without them all."""
        return min(num_experts, num_coded) if self.reads_survivors else num_experts


def distinct_decoders(decoders: Sequence[DecoderKind | str] | None) -> list[DecoderKind]:
    """Return the decoders' kinds, all of them for none; a ConfigurationError for an empty list, or one kind twice."""
    if decoders is None:
        return list(DecoderKind)
    kinds = [parse_enum(DecoderKind, "decoder", decoder) for decoder in decoders]
    if not kinds or len(set(kinds)) < len(kinds):
        names = [kind.value for kind in kinds]
        raise ConfigurationError(f"found decoders {names}, expected at least one and each once")
    return kinds
