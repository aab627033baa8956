"""The base class of decoders: lost experts, what is read of the answers, and promises."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from coin.coding.answers import Answers
from coin.coding.code import check_erasure
from coin.coding.decoder_config import DecoderKind
from coin.coding.promise import Promise, answer_score, promised_threshold
from coin.errors import DecodingError


class Decoder(nn.Module, ABC):
    """Computes the outputs of a fixed set of lost experts, `erased`, in their order.

    What `decode` computes with are its buffers, so that ``state_dict`` is what a file has to hold of it; a decoder that
    was not fitted takes the ``state_dict`` of a fitted one, whatever its shapes.

    Raises DecodingError where `erased` is empty, or names an expert twice or one that does not exist.
    """

    needs_fit = True
    """Whether `fit` must come before `decode`."""

    def __init__(
        self,
        num_experts: int,
        erased: Sequence[int],
        kind: DecoderKind,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.num_experts = num_experts
        self.erased = check_erasure(erased, num_experts)
        self.survivors: tuple[int, ...] = ()
        """The experts whose answers `decode` reads."""
        if kind.reads_survivors:
            self.survivors = tuple(
                expert for expert in range(num_experts) if expert not in self.erased
            )
        self.samples_read = 0
        """How many of the calibration inputs `fit` has looked at."""
        self.promises: dict[int, Promise] = {}
        """By lost expert, up to which score its decoded answers are accepted."""

    def fit(self, calibration: Answers) -> Self:
        """Fit the decoder, if it has anything to fit; the targets are the lost experts' own logits.

        Raises DecodingError where the answers come from another number of experts, nothing arrives to decode from, or
        features are missing; NumericalError where there are fewer than two
        samples; StateError where a value is not finite.
        """
        self._check(calibration)
        return self

    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits ``[len(erased), B, C]``, whose own entries are not read, in their type.

        Raises DecodingError where the decoder was not fitted or has no heads, or the answers do not fit it.
        """
        self._check(answers)
        is_ready = all(buffer is not None for buffer in self._buffers.values())
        if not is_ready:
            advice = (
                "call fit with calibration answers"
                if self.needs_fit
                else "make it with the lost experts' heads"
            )
            raise DecodingError(
                f"the {self.kind.name} decoder has nothing to decode with yet; {advice}"
            )
        return self._decode(answers)

    @abstractmethod
    def _decode(self, answers: Answers) -> Tensor:
        """Return what `decode` does, of answers that have been checked."""

    def rows(self, num_coded: int) -> tuple[int, ...]:
        """Return the coded models whose answers `decode` reads."""
        return tuple(range(num_coded))

    @property
    def nbytes(self) -> int:
        """How many bytes must be kept for `decode`."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def passes(self, num_coded: int, erased: Sequence[int] | None = None) -> int:
        """Return how many forward passes the answers took that `fit` has looked at, for some of the lost experts."""
        lost = self.erased if erased is None else tuple(erased)
        num_networks = len({*lost, *self.survivors}) + num_coded
        return num_networks * self.samples_read

    def accept(
        self,
        answers: Answers,
        alpha: float,
        confidence: float = 0.95,
        num_classes: Sequence[int] | None = None,
    ) -> dict[int, Promise]:
        """Set and return up to which score each lost expert's decoded answers are accepted: `promised_threshold`.

        Args:
            answers: Answers, including the lost experts' own, to inputs not used to fit networks or decoder. If they
                have tasks, every lost expert's promise uses its own task's inputs.
            alpha: α, the largest probability that an accepted answer differs, in (0, 1).
            confidence: In (0, 1).
            num_classes: Of every expert.
        """
        for place, expert in enumerate(self.erased):
            own = answers if answers.tasks is None else answers.select(answers.tasks == expert)
            width = num_classes[expert] if num_classes else None
            decoded = self.decode(own)[place][:, :width]
            wanted = own.experts[expert][:, :width]
            is_finite = torch.isfinite(decoded).all(1)
            agrees = decoded.argmax(1) == wanted.argmax(1)
            scores = answer_score(decoded)
            promise = promised_threshold(scores, ~(agrees & is_finite), alpha, confidence)
            self.promises[expert] = promise
        return self.promises

    def accepted(self, expert: int, score: Tensor) -> Tensor:
        """Return which decoded answers with these scores ``[B]`` are accepted; DecodingError before `accept`."""
        if expert not in self.promises:
            raise DecodingError(
                f"the {self.kind.name} decoder has promised nothing; call accept with new inputs"
            )
        threshold = self.promises[expert].threshold
        if threshold is None:
            threshold = -math.inf
        return score <= threshold

    def _check(self, answers: Answers) -> None:
        """Raise DecodingError unless the answers are of as many experts, and have features if they are read."""
        if answers.num_experts != self.num_experts:
            found = answers.num_experts
            expected = f"{self.num_experts}; keep the lost ones' places"
            raise DecodingError(f"found answers of {found} experts, the decoder is for {expected}")
        if self.kind.reads_features and answers.coded_features is None:
            raise DecodingError(
                f"the {self.kind.name} decoder found answers without features, expected both"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self._buffers:
            saved = state_dict.get(prefix + name)
            if saved is not None:  # a buffer's shape is that of the fit
                self._buffers[name] = torch.empty_like(saved)
        super()._load_from_state_dict(state_dict, prefix, *rest)
