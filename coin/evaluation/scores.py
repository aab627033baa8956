"""The evaluation of coded systems on the servers' answers: decoders are fitted, and what they decode is scored."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from coin.coding import Answers, Decoder, DecoderConfig, DecoderKind, Promise, answer_score, make_decoder
from coin.coding.decoders import Head
from coin.coding.metrics import DecodingAccuracy, Residual
from coin.core.progress import tracked
from coin.evaluation.variants import Variant
from coin.statistics.guard import disable_tf32


@dataclass(frozen=True)
class Outcome:
    """The results for one lost expert, under one erasure, with one variant and one decoder.

    Attributes:
        erased: The lost tasks; `task`, the one whose expert was decoded, on whose test set.
        expert_accuracy: See `DecodingAccuracy`, also for the next five.
        residual: See `Residual`, on the test set; NaN without coded models.
        decoder_seconds: The wall time of fitting the decoder, including its share of running the networks.
        decoder_passes: The same in forward-equivalents: every expert, lost ones too, and every coded model of the
            variant on every sample that the decoder reads.
        confusion: Counts ``[C_j, C_j]``, the expert's class by the decoded class.
        memory_mib: Kept beyond the experts' own servers, in MiB: coded models, and what all erasures' decoders keep.
        forwards: Networks run for one lost answer; `losses`, the most experts that may be lost at once.
        promise: The score up to which answers are accepted; None if no promise was requested.
    """

    variant: Variant
    decoder: str
    erased: tuple[str, ...]
    task: str
    expert_accuracy: float
    decoded_accuracy: float
    nda: float
    agreement: float
    coverage: float
    found: float
    residual: float
    decoder_seconds: float
    decoder_passes: float
    confusion: NDArray[np.int64]
    memory_mib: float
    forwards: float
    losses: float
    promise: Promise | None = None


class Scores:
    """The totals of a stand-in's answers for an expert of so many classes, on that expert's own test set."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.accuracy, self.confusion = DecodingAccuracy(num_classes), MulticlassConfusionMatrix(num_classes)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that hold the totals."""
        return self.accuracy, self.confusion

    def update(self, answer: Tensor, expert: Tensor, labels: Tensor, accepted: Tensor | None = None) -> Tensor:
        """Add a batch: the stand-in's and the expert's logits ``[B, C]``, the true classes and which are accepted.

        Returns the answered classes ``[B]``.
        """
        self.accuracy.update(answer, expert, labels, accepted)
        classes: Tensor = answer[:, : self.num_classes].argmax(1)
        self.confusion.update(classes, expert[:, : self.num_classes].argmax(1))
        return classes

    def results(self) -> dict[str, Any]:
        """Return the fields of an `Outcome` that are measured on the test set, but the residual."""
        numbers = {name: float(value) for name, value in self.accuracy.compute().items()}
        return {**numbers, "confusion": self.confusion.compute().cpu().numpy().astype(np.int64)}


@dataclass(eq=False)
class FittedDecoder:
    """A decoder of the coded system with the index `variant`, with the scores by lost expert.

    `fit_seconds` is the wall time of the fit for one erasure, `network_seconds` one network's on a sample.
    """

    decoder: Decoder
    scores: dict[int, Scores]
    variant: int
    fit_seconds: float = 0.0
    network_seconds: float = 0.0

    def decodes(self, erased: Sequence[int]) -> bool:
        """Return whether this is the decoder for the loss of these experts."""
        return tuple(erased) == self.decoder.erased or not self.decoder.config.reads_survivors


class Evaluation:
    """Variants with their decoders, one for every erasure; one that reads no survivor is for all experts at once.

    Args:
        variants: The coded systems and references.
        configs: The decoders, for the variants that they apply to.
        class_counts: Every expert's number of classes.
        heads: The experts' heads, if a decoder needs them.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        configs: Sequence[DecoderConfig],
        class_counts: Sequence[int],
        heads: Sequence[Head] | None = None,
    ) -> None:
        self.variants, self.configs, self.class_counts = list(variants), list(configs), list(class_counts)
        self.fitted: list[FittedDecoder] = []
        for index, variant in enumerate(self.variants):
            for config in variant.decoders(self.configs):
                for erased in variant.erasures() if config.reads_survivors else [tuple(range(len(class_counts)))]:
                    decoder = make_decoder(config, variant.code, erased, heads)
                    self.fitted.append(FittedDecoder(decoder, {j: Scores(class_counts[j]) for j in erased}, index))
        self.residuals = {
            index: [Residual() for _ in class_counts] for index, each in enumerate(self.variants) if not each.is_none
        }

    def fit(self, answers: Answers, network_seconds: float = 0.0) -> None:
        """Fit every decoder on all servers' answers to calibration inputs, for each of which a network took so long."""
        if any(each.decoder.config.kind is DecoderKind.feature_ridge for each in self.fitted):
            answers = answers.with_kernels()
        for each in tracked(self.fitted, "fitting decoders"):
            seen, started = self.variants[each.variant].seen(answers), time.perf_counter()
            each.decoder.fit(seen)
            losses = 1 if each.decoder.config.reads_survivors else len(each.decoder.erased)
            each.fit_seconds, each.network_seconds = (time.perf_counter() - started) / losses, network_seconds

    def promise(self, answers: Answers, alpha: float, confidence: float) -> None:
        """Set up to which score answers are accepted, by all servers' answers to new inputs; see `Decoder.accept`."""
        with torch.autocast("cpu", enabled=False), disable_tf32():
            for each in tracked(self.fitted, "promising"):
                each.decoder.accept(self.variants[each.variant].seen(answers), alpha, confidence, self.class_counts)

    def update(self, task: int, answers: Answers, labels: Tensor) -> dict[FittedDecoder, Tensor]:
        """Score what is decoded of a batch of one task's test set; return every decoder's classes ``[B]``."""
        classes, width = {}, self.class_counts[task]
        with torch.autocast("cpu", enabled=False), disable_tf32():
            seen = [variant.seen(answers) for variant in self.variants]
            for index, residuals in self.residuals.items():
                target = self.variants[index].code.encode(answers.experts)
                residuals[task].update(seen[index].coded.flatten(0, 1), target.flatten(0, 1))
            for each in self.fitted:
                if task in each.scores:
                    decoded = each.decoder.decode(seen[each.variant])[each.decoder.erased.index(task)]
                    is_promised = task in each.decoder.promises
                    accepted = each.decoder.accepted(task, answer_score(decoded[:, :width])) if is_promised else None
                    classes[each] = each.scores[task].update(decoded, answers.experts[task], labels, accepted)
        return classes

    def alone(self, task: int) -> list[FittedDecoder]:
        """Return the decoders for the loss of one expert alone."""
        return [each for each in self.fitted if each.decodes((task,))]

    def outcomes(self, tasks: Sequence[str]) -> list[Outcome]:
        """Return the results, erasure by erasure, given the tasks' names."""
        residuals = {index: [float(each.compute()) for each in metrics] for index, metrics in self.residuals.items()}
        return [
            Outcome(
                variant=variant,
                decoder=config.name,
                erased=tuple(tasks[lost] for lost in erased),
                task=tasks[expert],
                residual=residuals[index][expert] if index in residuals else math.nan,
                promise=each.decoder.promises.get(expert),
                **each.scores[expert].results(),
                **self._costs(each, erased),
            )
            for index, variant in enumerate(self.variants)
            for erased in variant.erasures()
            for config in variant.decoders(self.configs)
            for each in self.fitted
            if (each.variant, each.decoder.config) == (index, config) and each.decodes(erased)
            for expert in erased
        ]

    def _costs(self, fitted: FittedDecoder, erased: Sequence[int]) -> dict[str, Any]:
        """Return what the fit took, and what must be kept with the decoders for all erasures."""
        variant, decoder = self.variants[fitted.variant], fitted.decoder
        passes = float(decoder.passes(len(variant.networks), erased)) if decoder.needs_fit else 0.0
        seconds = fitted.fit_seconds + fitted.network_seconds * passes if decoder.needs_fit else 0.0
        same = [each.decoder for each in self.fitted if each.variant == fitted.variant]
        kept = sum(each.nbytes for each in same if each.config == decoder.config)
        return {
            "decoder_seconds": seconds,
            "decoder_passes": passes,
            **variant.costs(decoder.config, kept, len(erased)),
        }

    @property
    def metrics(self) -> list[Metric]:
        """All metrics that hold totals."""
        residuals = [metric for metrics in self.residuals.values() for metric in metrics]
        return [*residuals, *(m for each in self.fitted for scores in each.scores.values() for m in scores.metrics)]
