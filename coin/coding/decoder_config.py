"""Which decoder, and its options."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
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


class FittedOn(StrEnum):
    """Whose calibration samples a lost expert's regression is fitted on: those of ``all`` tasks or its ``own``."""

    all = "all"
    own = "own"


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder with its options.

    Args:
        kind: The decoder.
        fitted_on: Whose calibration samples the regression is fitted on; for ridge and feature_ridge.
        survivors: Whether the surviving experts' answers are read beside the coded models'; for ridge and
            feature_ridge. Without them any number of experts may be lost.

    Raises ConfigurationError where an option does not exist, has no such value, or does not apply to the kind.

    >>> coin.DecoderConfig.of({"kind": "ridge", "survivors": False}).name
    'ridge-alone'
    """

    kind: DecoderKind
    fitted_on: FittedOn = FittedOn.all
    survivors: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", parse_enum(DecoderKind, "decoder", self.kind))
        object.__setattr__(self, "fitted_on", parse_enum(FittedOn, "fitted_on", self.fitted_on))
        if not isinstance(self.survivors, bool):
            raise ConfigurationError(f"found survivors={self.survivors!r}, expected true or false")
        own = self.fitted_on is FittedOn.own
        if (own or not self.survivors) and self.kind not in (DecoderKind.ridge, DecoderKind.feature_ridge):
            found = f"fitted_on={self.fitted_on}" if own else f"survivors={self.survivors}"
            raise ConfigurationError(f"found {found} for {self.kind}, expected ridge or feature_ridge")

    @classmethod
    def of(cls, decoder: "DecoderKind | str | dict[str, Any] | DecoderConfig") -> "DecoderConfig":
        """Return the configuration itself, that of a kind with default options, or that of a section of a YAML file."""
        if isinstance(decoder, DecoderConfig):
            return decoder
        options = decoder if isinstance(decoder, dict) else {"kind": decoder}
        known = [option.name for option in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise ConfigurationError(f"found option '{unknown[0]}' of a decoder, expected {', '.join(known)}")
        return cls(**{"kind": None, **options})

    @classmethod
    def named(cls, name: str) -> "DecoderConfig":
        """Return the configuration that has this `name`."""
        kind, *suffixes = name.split("-")
        own = "own" if "own" in suffixes else "all"
        config = cls.of({"kind": kind, "fitted_on": own, "survivors": "alone" not in suffixes})
        if config.name != name:
            raise ConfigurationError(f"found decoder '{name}', expected '{config.name}' for these options")
        return config

    @property
    def name(self) -> str:
        """What results call the decoder: its kind, and the options that differ from the defaults."""
        own = "-own" if self.fitted_on is FittedOn.own else ""
        return f"{self.kind}{own}{'' if self.survivors else '-alone'}"

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
        return num_coded + (num_experts - num_lost) * self.reads_survivors

    def losses(self, num_experts: int, num_coded: int) -> int:
        """Return how many experts may be lost at once: with survivors what the code promises, without them all."""
        return min(num_experts, num_coded) if self.reads_survivors else num_experts


def distinct_decoders(
    decoders: Sequence[DecoderKind | str | dict[str, Any] | DecoderConfig] | None,
) -> list[DecoderConfig]:
    """Return the decoders' configurations, of all kinds for none; raises where the list is empty or has one twice."""
    if decoders is None:
        return [DecoderConfig(kind) for kind in DecoderKind]
    if not decoders:
        raise ConfigurationError(f"found no decoders, expected at least one of {', '.join(DecoderKind)}")
    configs = [DecoderConfig.of(decoder) for decoder in decoders]
    names = [config.name for config in configs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigurationError(f"found decoder {repeated[0]} twice, expected different ones; leave one out")
    return configs
