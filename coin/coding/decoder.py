"""Decoders: the servers' answers in, the lost experts' logits out; what a fitted one keeps is a dict of tensors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from coin.coding.answers import Answers
from coin.coding.code import Code, check_decodable, check_erasure, decode_linear
from coin.coding.decoder_config import DecoderKind
from coin.coding.promise import Promise, answer_score, promised_threshold
from coin.coding.ridge import fit_blocks
from coin.core.choices import parse_enum
from coin.core.devices import double
from coin.errors import DecodingError

Head = tuple[Tensor, Tensor]
"""A classifier head's weight ``[C, F]`` and bias ``[C]``."""

_REGRESSION = ("coefficients", "input_mean", "target_mean")
"""The tensors of a regression; see `RidgeFit`."""


@dataclass(eq=False)
class Decoder:
    """Computes the logits of a fixed set of lost experts, `erased`, in their order.

    - ``linear``: the paper's, by `decode_linear` over all rows of the code; exact where the coded outputs are.
    - ``ridge``: ridge regression in float64 from the logits of the coded models and of the surviving experts, side by
      side, to the lost experts' logits on the same calibration inputs. Both are centred, and each lost expert gets the
      ridge with the smallest leave-one-out error (`fit_ridge`). It reads any number of coded models, none included, and
      has no erasure budget: something must arrive, that is all.
    - ``feature_ridge``: the same from the features of every arriving network too. All logits together, and the features
      of each network, are blocks that are divided by their scale (`fit_blocks`): they differ in unit and size.
    - ``expert_head``: the lost experts' own heads on the penultimate features of the coded model with the largest β for
      each. Exact where these features are the expert's. No survivor is asked, so all experts may be lost.

    Attributes:
        tensors: What `decode` computes with, and a file has to hold. Of the regressions those of `RidgeFit`, with
            targets ``[|erased|·C]``; of heads their weights ``[ΣC_j, F]`` and biases ``[ΣC_j]``, one after another, and
            their class counts C_j.
        samples_read: How many of the calibration inputs `fit` has looked at.
        promises: By lost expert, up to which score its decoded answers are accepted.

    Raises DecodingError where `erased` is empty, or names an expert twice or one that does not exist, or where the
    code cannot decode it.
    """

    kind: DecoderKind
    code: Code
    erased: tuple[int, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    samples_read: int = 0
    promises: dict[int, Promise] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.erased = check_erasure(self.erased, self.code.num_experts)
        if self.kind is DecoderKind.linear:
            check_decodable(self.code.matrix, self.erased)

    @property
    def survivors(self) -> tuple[int, ...]:
        """The experts whose answers `decode` reads."""
        if not self.kind.reads_survivors:
            return ()
        experts = range(self.code.num_experts)
        return tuple(expert for expert in experts if expert not in self.erased)

    def decodes(self, lost: Sequence[int]) -> bool:
        """Return whether it is for the loss of these experts: those of `erased`, or some where no survivor is read."""
        if self.kind.reads_survivors:
            return set(lost) == set(self.erased)
        return set(lost) <= set(self.erased)

    @property
    def rows(self) -> list[int]:
        """Which coded model weighs each lost expert most, the first of equals."""
        largest: list[int] = self.code.matrix[:, list(self.erased)].argmax(0).tolist()
        return largest

    def servers(self, num_coded: int) -> set[int]:
        """Return the places of the servers whose answers `decode` reads: experts come first, then coded models."""
        rows = set(range(num_coded))
        if self.kind is DecoderKind.expert_head:
            rows = set(self.rows)
        return {*self.survivors, *(self.code.num_experts + row for row in rows)}

    @property
    def nbytes(self) -> int:
        """How many bytes must be kept for `decode`."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def passes(self, num_coded: int) -> int:
        """Return how many forward passes the answers took that `fit` has looked at: of all experts and coded models."""
        return (self.code.num_experts + num_coded) * self.samples_read

    def fit(self, calibration: Answers) -> Self:
        """Fit the decoder, if it has anything to fit; the targets are the lost experts' own logits.

        Raises DecodingError where the answers come from another number of experts, nothing arrives to decode from, or
        features are missing; NumericalError where there are fewer than two samples; StateError where a value is not
        finite.
        """
        self._check(calibration)
        if self.kind.needs_fit:
            targets = double(calibration.experts[list(self.erased)])  # [|erased|, P, C]
            fit = fit_blocks(self._blocks(calibration), targets)
            self.tensors = {name: getattr(fit, name) for name in _REGRESSION}
            self.samples_read = calibration.num_samples
        return self

    def take_heads(self, heads: Sequence[Head]) -> None:
        """Keep the lost experts' own heads, of the heads of all experts; for ``expert_head``."""
        own = [heads[expert] for expert in self.erased]
        self.tensors = {
            "weight": torch.cat([weight for weight, _ in own]),
            "bias": torch.cat([bias for _, bias in own]),
            "class_counts": torch.tensor([len(bias) for _, bias in own]),
        }

    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits ``[len(erased), B, C]``, whose own entries are not read, in their type.

        Raises DecodingError where the decoder was not fitted or has no heads, or the answers do not fit it.
        """
        self._check(answers)
        if self.kind is DecoderKind.linear:
            survivors = answers.experts[list(self.survivors)]
            return decode_linear(self.code.matrix, answers.coded, survivors, self.erased)
        if not self.tensors:
            advice = "make it with the lost experts' heads"
            if self.kind.needs_fit:
                advice = "call fit with calibration answers"
            raise DecodingError(
                f"the {self.kind.name} decoder has nothing to decode with yet; {advice}"
            )
        decoded = self._by_regression(answers) if self.kind.needs_fit else self._by_heads(answers)
        return decoded.to(answers.experts)

    def _by_regression(self, answers: Answers) -> Tensor:
        inputs = torch.cat(self._blocks(answers), 1)  # [B, D]
        coefficients, input_mean, target_mean = (
            self.tensors[name].to(inputs.device) for name in _REGRESSION
        )
        found = inputs.shape[1]
        fitted = len(input_mean)
        if found != fitted:
            expected = f"{fitted}, as fitted; fit it on answers of the same servers"
            raise DecodingError(f"found answers of {found} numbers, expected {expected}")
        decoded = (inputs - input_mean) @ coefficients + target_mean  # [B, |erased|·C]
        classes = decoded.shape[1] // len(self.erased)
        logits = decoded.reshape(len(decoded), len(self.erased), classes)
        return logits.transpose(0, 1)

    def _by_heads(self, answers: Answers) -> Tensor:
        counts = self.tensors["class_counts"].tolist()
        weights = torch.split(self.tensors["weight"], counts)
        biases = torch.split(self.tensors["bias"], counts)
        width = max(answers.coded.shape[2], *counts)
        decoded = []
        for row, weight, bias in zip(self.rows, weights, biases, strict=True):
            features = double(answers.coded_features[row])  # [B, F]
            if features.shape[1] == 0:  # the coded model is silent
                logits = features.new_full((len(features), len(bias)), torch.nan)
            else:
                logits = features @ weight.to(features).T + bias.to(features)
            decoded.append(pad(logits, (0, width - len(bias))))
        return torch.stack(decoded)

    def _blocks(self, answers: Answers) -> list[Tensor]:
        """Return the regressions' inputs ``[B, ·]`` in float64: all logits, then each network's features."""
        logits = [*answers.coded, *answers.experts[list(self.survivors)]]
        if not logits:
            raise DecodingError(
                "no survivor is read and no coded model answers; lose fewer or add models"
            )
        blocks = [torch.cat(logits, 1)]
        if self.kind.reads_features:
            blocks += answers.coded_features
            blocks += [answers.expert_features[expert] for expert in self.survivors]
        return [double(block) for block in blocks]

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
        if answers.num_experts != self.code.num_experts:
            raise DecodingError(
                f"found answers of {answers.num_experts} experts, the decoder is for {self.code.num_experts}; keep the "
                "lost ones' places"
            )
        if self.kind.reads_features and not answers.expert_features:
            raise DecodingError(
                f"the {self.kind.name} decoder found answers without features, expected both"
            )


def make_decoder(
    kind: DecoderKind | str,
    code: Code,
    erased: Sequence[int],
    heads: Sequence[Head] | None = None,
) -> Decoder:
    """Return an unfitted decoder of a kind.

    The calibrated kinds read only the number of experts from the code, and serve without coded answers too. For
    expert_head it takes the heads of all experts (`coin.networks.linear_heads`). Raises ConfigurationError where there
    is no such kind, DecodingError where it cannot decode the erasure.

    >>> answers = coin.Answers(torch.ones(3, 1, 2), coded=2 * torch.ones(1, 1, 2))
    >>> coin.make_decoder("linear", code, erased=[0]).decode(answers)
    tensor([[[4., 4.]]])
    """
    kind = parse_enum(DecoderKind, "decoder", kind)
    decoder = Decoder(kind, code, tuple(erased))
    if heads and kind is DecoderKind.expert_head:
        decoder.take_heads(heads)
    return decoder
