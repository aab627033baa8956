"""A stand-in's scores: accuracy, agreement, confusion matrix and risk curves, the same in every evaluation."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from coin.coding import Answers, Decoder
from coin.coding.decoders import kept_bytes
from coin.coding.metrics import DecodingAccuracy, RiskCurves
from coin.evaluation.variants import Variant


class Scores:
    """The totals of a stand-in's answers for one lost expert, on that expert's own test set.

    Args:
        num_classes: C_j, the number of the expert's own classes.
        samples: The size of the test set; in one process it may be left out.
    """

    def __init__(self, num_classes: int, samples: int = 0) -> None:
        self.num_classes = num_classes
        self.accuracy, self.curves = DecodingAccuracy(num_classes), RiskCurves(samples)
        self.confusion = MulticlassConfusionMatrix(num_classes)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that hold the totals."""
        return self.accuracy, self.confusion, self.curves

    def update(
        self, answer: Tensor, expert: Tensor, labels: Tensor, risk: Tensor | None = None, positions: Any = None
    ) -> Tensor:
        """Add a batch, and return the answered classes ``[B]``.

        `answer` and `expert` are the stand-in's and the expert's logits ``[B, C]``, `labels` the true classes ``[B]``;
        the answers' risks ``[B]``, if there are any, come with the samples' `positions` in the test set ``[B]``.
        """
        self.accuracy.update(answer, expert, labels)
        answer, expert = answer[:, : self.num_classes], expert[:, : self.num_classes]
        self.confusion.update(answer.argmax(1), expert.argmax(1))
        if risk is not None:
            self.curves.update(positions, risk, answer, expert, labels)
        return answer.argmax(1)

    def results(self) -> dict[str, Any]:
        """Return the fields of an `Outcome` that are measured on the test set, but the residual."""
        with warnings.catch_warnings():  # answers without a risk have empty curves
            warnings.filterwarnings("ignore", ".*RiskCurves was called before the ``update``.*", UserWarning)
            points, samples = self.curves.compute()
        return {
            **{name: float(value) for name, value in self.accuracy.compute().items()},
            "confusion": self.confusion.compute().cpu().numpy().astype(np.int64),
            "risk": tuple(points),
            "samples": samples.numpy(),
        }


@dataclass(frozen=True, eq=False)
class FittedDecoder:
    """A fitted decoder for one erasure of the coded system with the index `variant`, with the scores by lost expert.

    `seconds` is the wall time of the fit, `passes` its cost: networks run on a sample.
    """

    decoder: Decoder
    scores: dict[int, Scores] = field(default_factory=dict)
    variant: int = 0
    seconds: float = 0.0
    passes: float = 0.0

    def update(self, task: int, answers: Answers, labels: Tensor, positions: Tensor) -> Tensor:
        """Decode one lost expert's answers to a batch of its task, score them, and return the classes ``[B]``."""
        scores = self.scores[task]
        decoded = self.decoder.decode(answers)[self.decoder.erased.index(task)]
        risk = None if self.decoder.moments is None else self.decoder.risk(task, decoded, scores.num_classes)
        return scores.update(decoded, answers.experts[task], labels, risk, positions)

    def costs(self, system: Variant, fitted: Iterable["FittedDecoder"]) -> dict[str, Any]:
        """Return `Variant.costs`, with the bytes of all fitted decoders of this variant and configuration."""
        own = self.variant, self.decoder.config
        kept = kept_bytes(each.decoder for each in fitted if (each.variant, each.decoder.config) == own)
        return system.costs(self.decoder.config, kept, len(self.decoder.erased))
