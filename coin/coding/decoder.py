"""The base class of decoders: lost experts, error moments, risks and promises."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from coin.coding.answers import Answers
from coin.coding.code import check_erasure
from coin.coding.decoder_config import DecoderConfig, FittedOn
from coin.coding.promise import Promise, promised_risk
from coin.coding.risk import decoding_risk
from coin.errors import DecodingError, NumericalError

Made = TypeVar("Made")


class FeatureCache:
    """Caches what decoders compute from features, for all decoders fitted on the same ones."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Tensor, Any]] = {}

    def of(self, source: Tensor, what: Hashable, make: Callable[[], Made]) -> Made:
        """Return the cached result for this tensor object; compute it on first use."""
        key = (id(source), what)
        if key not in self._made:
            self._made[key] = source, make()  # the source is held: no other tensor gets its id
        made: Made = self._made[key][1]
        return made


class Decoder(ABC):
    """Computes the outputs of a fixed set of lost experts, `erased`, in their order.

    Raises DecodingError where `erased` is empty, or names an expert twice or one that does not exist.
    """

    needs_fit = True
    """Whether `fit` must come before `decode`."""

    def __init__(self, num_experts: int, erased: Sequence[int], config: DecoderConfig) -> None:
        self.config = config
        self.erased = check_erasure(erased, num_experts)
        left = tuple(expert for expert in range(num_experts) if expert not in self.erased)
        self.survivors = left if config.reads_survivors else ()
        """The experts whose answers `decode` reads."""
        self.num_experts = num_experts
        self.samples_read: dict[int, int] = {}
        """How many of the calibration inputs `fit` has looked at for each lost expert."""
        self.moments: Tensor | None = None
        """`errors`, once they are known."""
        self.promises: dict[int, Promise] = {}
        """By lost expert, up to which risk its decoded answers are accepted."""

    def fit(self, calibration: Answers, kept: FeatureCache | None = None) -> Self:
        """Fit the decoder, if it has anything to fit; the targets are the lost experts' own logits.

        One `kept` saves work for the decoders of several systems and erasures that are fitted on the same answers.
        Here nothing is learnt but the errors that the decoder makes.

        Raises DecodingError where the answers come from another number of experts, nothing arrives to decode from, or
        the features, stages or tasks that the options ask for are missing; NumericalError where there are fewer than
        two samples, or a value is not finite.
        """
        errors = self.decode(calibration) - calibration.experts[list(self.erased)]
        if odd := (~torch.isfinite(errors).all(2).all(0)).nonzero().flatten().tolist():
            raise NumericalError(
                f"sample {odd[0]} of the calibration answers holds a NaN or an infinity ({len(odd)} of "
                f"{calibration.num_samples}), expected finite logits; leave it out"
            )
        self.moments = second_moments(errors)
        return self

    @abstractmethod
    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits ``[len(erased), B, C]``, whose own entries are not read, in their type.

        Raises DecodingError where the decoder was not fitted, or the answers do not fit it.
        """

    def rows(self, num_coded: int) -> tuple[int, ...]:
        """Return the coded models whose answers `decode` reads."""
        return tuple(range(num_coded))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What `decode` computes with, and so must be kept, by name."""
        return {}

    @property
    def nbytes(self) -> int:
        """How many bytes these are."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def passes(self, num_coded: int, erased: Sequence[int] | None = None) -> int:
        """Return how many forward passes the answers took that `fit` has looked at, for some of the lost experts."""
        lost = self.erased if erased is None else tuple(erased)
        read = [self.samples_read.get(expert, 0) for expert in lost]
        samples = sum(read) if self.config.fitted_on is FittedOn.own else max(read)
        return (len({*lost, *self.survivors}) + num_coded) * samples

    @property
    def errors(self) -> Tensor:
        """E e eᵀ of the errors e = f̂ − f of each lost expert ``[|erased|, C, C]``.

        The mean is over the calibration inputs of `fit`, each of them left out of the regression that decodes it.
        Raises DecodingError where there was no `fit`, which the linear decoder needs for this too.
        """
        if self.moments is None:
            raise DecodingError(f"the {self.config.name} decoder knows no errors; call fit with calibration answers")
        return self.moments

    def risk(self, expert: int, decoded: Tensor, num_classes: int | None = None) -> Tensor:
        """Return the risk of a lost expert's decoded logits ``[B, C]``, of which it has `num_classes`: `decoding_risk`.

        Raises as `errors`.
        """
        errors = self.errors[self.erased.index(expert)]
        return decoding_risk(decoded[:, :num_classes], errors[:num_classes, :num_classes])

    def accept(
        self, answers: Answers, alpha: float, confidence: float = 0.95, num_classes: Sequence[int] | None = None
    ) -> dict[int, Promise]:
        """Set and return the risk up to which each lost expert's decoded answers are accepted: `promised_risk`.

        Args:
            answers: Answers, including the lost experts' own, to inputs not used to fit networks or decoder. If they
                have tasks, every lost expert's promise uses its own task's inputs.
            alpha: α, the largest probability that an accepted answer differs, in (0, 1).
            confidence: In (0, 1).
            num_classes: Of every expert.

        Raises as `errors` and `promised_risk`.
        """
        for place, expert in enumerate(self.erased):
            own = answers if answers.tasks is None else answers.select(answers.tasks == expert)
            width = num_classes[expert] if num_classes else None
            decoded, wanted = self.decode(own)[place][:, :width], own.experts[expert][:, :width]
            differs = (decoded.argmax(1) != wanted.argmax(1)) | ~torch.isfinite(decoded).all(1)
            self.promises[expert] = promised_risk(self.risk(expert, decoded, width), differs, alpha, confidence)
        return self.promises

    def accepted(self, expert: int, risk: Tensor) -> Tensor:
        """Return which decoded answers with these risks ``[B]`` are accepted; DecodingError before `accept`."""
        if expert not in self.promises:
            raise DecodingError(f"the {self.config.name} decoder has promised nothing; call accept with new inputs")
        threshold = self.promises[expert].threshold
        return risk <= (-math.inf if threshold is None else threshold)

    def _check(self, answers: Answers, *, fitting: bool = False) -> None:
        """Raise DecodingError unless the answers are of the decoder's experts and, but for `fitting`, it is fitted."""
        if self.needs_fit and self.moments is None and not fitting:
            raise DecodingError(f"the {self.config.name} decoder is not fitted; call fit with calibration answers")
        if answers.num_experts != self.num_experts:
            raise DecodingError(
                f"found answers of {answers.num_experts} experts, the decoder is for {self.num_experts}; keep the lost "
                "ones' places"
            )

    def _own_samples(self, calibration: Answers) -> dict[int, Tensor]:
        """Return the positions of the inputs of every lost expert's own task."""
        if calibration.tasks is None:
            raise DecodingError(
                f"the {self.config.name} decoder found answers that do not tell their tasks; give it tasks"
            )
        own = {expert: (calibration.tasks == expert).nonzero().flatten() for expert in self.erased}
        for expert, samples in own.items():
            if len(samples) < 2:
                raise NumericalError(
                    f"found {len(samples)} calibration samples of expert {expert}'s own task, expected at least 2 for "
                    f"the {self.config.name} decoder; raise samples_per_task or use fitted_on: all"
                )
        return own

    def _without_features(self) -> DecodingError:
        return DecodingError(
            f"the {self.config.name} decoder found answers without features, expected features and logits"
        )


def second_moments(errors: Tensor) -> Tensor:
    """Return E e eᵀ ``[K, C, C]`` of errors ``[K, P, C]``."""
    return errors.double().mT @ errors.double() / errors.shape[1]
