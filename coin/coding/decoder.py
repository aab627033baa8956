"""What every decoder does: the outputs that did arrive → the outputs of the lost experts, without a label."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

from torch import Tensor

from coin.coding.answers import Answers
from coin.coding.code import check_erasure
from coin.coding.decoder_config import DecoderConfig, DecoderKind
from coin.errors import DecodingError


class Decoder(ABC):
    """Computes the outputs of a fixed set of lost experts.

    Args:
        num_experts: N.
        erased: Indices of the lost experts, in the order in which `decode` returns them.
        config: The options; none takes the defaults of the kind.

    Raises:
        DecodingError: `erased` is empty, or names an expert twice or one that does not exist.
    """

    kind: DecoderKind

    def __init__(self, num_experts: int, erased: Sequence[int], config: DecoderConfig | None = None) -> None:
        self.config = DecoderConfig(self.kind) if config is None else config
        self.erased = check_erasure(erased, num_experts)
        self.survivors = tuple(expert for expert in range(num_experts) if expert not in self.erased)
        self.num_experts = num_experts

    @property
    def name(self) -> str:
        """What results call the decoder: its kind, and the options that differ from the defaults."""
        return self.config.name

    @property
    def needs_fit(self) -> bool:
        """Whether `fit` must come before `decode`."""
        return True

    @abstractmethod
    def fit(self, calibration: Answers) -> Self:
        """Learn from answers to calibration inputs, the lost experts' own logits being the targets.

        Raises:
            DecodingError: The answers come from another number of experts, nothing arrives to decode from, or the
                answers lack the features, stages or tasks that the options ask for.
            NumericalError: There are fewer than two samples, or a value is not finite.
        """

    @abstractmethod
    def samples_read(self, calibration: Answers) -> int:
        """Return how many of the calibration inputs `fit` looks at."""

    @abstractmethod
    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits ``[len(erased), B, C]`` in the type of the answers.

        The lost experts' entries in `answers` are not read.

        Raises:
            DecodingError: The decoder was not fitted, or the answers do not fit it.
        """

    def _check(self, answers: Answers) -> None:
        if answers.num_experts != self.num_experts:
            raise DecodingError(
                f"found answers of {answers.num_experts} experts, the decoder is for {self.num_experts}; keep the lost "
                "ones' places"
            )
