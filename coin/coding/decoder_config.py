"""Which decoder, and its options."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

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


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder with its options.

    Args:
        kind: The decoder.
        survivors: Whether the surviving experts' answers are read beside the coded models'; false for ridge and
            feature_ridge alone. Without them any number of experts may be lost.

    Raises ConfigurationError where an option does not exist, has no such value, or does not apply to the kind.

    >>> coin.DecoderConfig.of({"kind": "ridge", "survivors": False}).name
    'ridge-alone'
    """

    kind: DecoderKind
    survivors: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", parse_enum(DecoderKind, "decoder", self.kind))
        is_regression = self.kind in (DecoderKind.ridge, DecoderKind.feature_ridge)
        if not self.survivors and not is_regression:
            raise ConfigurationError(
                f"found survivors=False for {self.kind}, expected ridge or feature_ridge"
            )

    @classmethod
    def of(cls, decoder: "AnyDecoder") -> "DecoderConfig":
        """Return the configuration itself, that of a kind with default options, or that of a section of a YAML file."""
        if isinstance(decoder, DecoderConfig):
            return decoder
        if not isinstance(decoder, dict):
            return cls(decoder)  # type: ignore[arg-type]  # parsed there
        try:
            return cls(**decoder)
        except TypeError as error:
            raise ConfigurationError(
                f"found the decoder {decoder}, expected kind and survivors ({error})"
            ) from error

    @classmethod
    def named(cls, name: str) -> "DecoderConfig":
        """Return the configuration that has this `name`."""
        kind, dash, suffix = name.partition("-")
        if suffix not in ("", "alone"):
            raise ConfigurationError(f"found decoder '{name}', expected a kind, or one and -alone")
        return cls.of({"kind": kind, "survivors": not dash})

    @property
    def name(self) -> str:
        """What results call the decoder: its kind, and ``-alone`` without survivors."""
        return self.kind.value if self.survivors else f"{self.kind.value}-alone"

    @property
    def reads_features(self) -> bool:
        """Whether servers send features beside their logits."""
        return self.kind in (DecoderKind.feature_ridge, DecoderKind.expert_head)

    @property
    def reads_survivors(self) -> bool:
        """Whether the surviving experts are asked beside the coded models."""
        return self.survivors and self.kind is not DecoderKind.expert_head

    def forwards(self, num_experts: int, num_coded: int, num_lost: int = 1) -> int:
        """Return how many networks run for one lost answer, the survivors that are asked among them."""
        if self.kind is DecoderKind.expert_head:
            return 1
        num_survivors = num_experts - num_lost if self.reads_survivors else 0
        return num_coded + num_survivors

    def losses(self, num_experts: int, num_coded: int) -> int:
        """Return how many experts may be lost at once: with survivors what the code promises, without them all."""
        return min(num_experts, num_coded) if self.reads_survivors else num_experts


AnyDecoder = DecoderConfig | DecoderKind | str | dict[str, Any]
"""A decoder with its options, or as a user names it: by its kind, or as a section of a YAML file."""


def distinct_decoders(decoders: Sequence[AnyDecoder] | None) -> list[DecoderConfig]:
    """Return the decoders' configurations, of all kinds for none; raises where the list is empty or has one twice."""
    if decoders is None:
        return [DecoderConfig(kind) for kind in DecoderKind]
    configs = [DecoderConfig.of(decoder) for decoder in decoders]
    names = [config.name for config in configs]
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(f"found decoders {names}, expected at least one and each once")
    return configs
