"""Scores of decoders and of replicas: accuracy, agreement, confusion matrix and risk curves."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from coin.coding import Answers, Code, Decoder
from coin.coding.decoder_config import REPLICA
from coin.coding.decoders import kept_bytes
from coin.coding.metrics import DecodingAccuracy, RiskCurves
from coin.errors import FileError
from coin.evaluation.variants import Outcome, Variant
from coin.networks import load_network, nbytes_together, pad_head


class Scores:
    """The totals of a stand-in's answers for an expert of so many classes, on that expert's own test set.

    In one process its size, `samples`, may be left out.
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

    `fit_seconds` is the wall time of the fit for one erasure, `network_seconds` one network's on a sample.
    """

    decoder: Decoder
    scores: dict[int, Scores] = field(default_factory=dict)
    variant: int = 0
    fit_seconds: float = 0.0
    network_seconds: float = 0.0

    def decodes(self, erased: Sequence[int]) -> bool:
        """Return whether this is the decoder for the loss of these experts."""
        return tuple(erased) == self.decoder.erased or not self.decoder.config.reads_survivors

    def passes(self, erased: Sequence[int], num_coded: int) -> float:
        """Return the cost of the fit for the loss of these experts: networks run on a sample."""
        return float(self.decoder.passes(num_coded, erased)) if self.decoder.needs_fit else 0.0

    def seconds(self, erased: Sequence[int], num_coded: int) -> float:
        """Return the wall time of the fit, the networks' included that it needs."""
        if not self.decoder.needs_fit:
            return 0.0
        return self.fit_seconds + self.network_seconds * self.passes(erased, num_coded)

    def update(self, task: int, answers: Answers, labels: Tensor, positions: Tensor) -> Tensor:
        """Decode one lost expert's answers to a batch of its task, score them, and return the classes ``[B]``."""
        scores = self.scores[task]
        decoded = self.decoder.decode(answers)[self.decoder.erased.index(task)]
        risk = None if self.decoder.moments is None else self.decoder.risk(task, decoded, scores.num_classes)
        return scores.update(decoded, answers.experts[task], labels, risk, positions)

    def costs(self, system: Variant, num_lost: int, fitted: Iterable["FittedDecoder"]) -> dict[str, Any]:
        """Return `Variant.costs`, with the bytes of all fitted decoders of this variant and configuration."""
        own = self.variant, self.decoder.config
        kept = kept_bytes(each.decoder for each in fitted if (each.variant, each.decoder.config) == own)
        return system.costs(self.decoder.config, kept, num_lost)


@dataclass(frozen=True)
class Replica:
    """The compressed copy of one expert, with its results on that task's test set."""

    variant: Variant
    task: int
    network: nn.Module
    scores: Scores

    def outcome(self, task: str) -> Outcome:
        """Return the results; a replica runs alone, and all experts may be lost at once."""
        return Outcome(
            variant=self.variant,
            decoder=REPLICA,
            erased=(task,),
            task=task,
            residual=math.nan,
            decoder_seconds=0.0,
            decoder_passes=0.0,
            memory_mib=self.variant.memory / 2**20,
            forwards=1,
            losses=self.variant.code.num_experts,
            **self.scores.results(),
        )


def read_replicas(
    paths: Sequence[Path], fingerprints: Sequence[str], counts: Sequence[int], code: Code
) -> list[Replica]:
    """Read files of ``coin run`` or ``coin compress``, with the total cost and memory of each label.

    `fingerprints` are the experts', `counts` their class counts, `code` that of the evaluation. Raises FileError where
    a file is missing or damaged, or not a copy of one of these experts.
    """
    files = [load_network(path) for path in paths]
    for path, file in zip(paths, files, strict=True):
        if file.provenance.get("of") not in fingerprints:
            raise FileError(f"'{path}' is not a compressed copy of these experts; compress them again")
    found = []
    for label in dict.fromkeys(str(file.provenance.get("label", REPLICA)) for file in files):
        own = [file for file in files if file.provenance.get("label", REPLICA) == label]
        variant = Variant(
            label,
            code,
            seconds=sum(float(file.provenance["seconds"]) for file in own),
            chosen=(own[0].provenance["compression"],),
            kind=REPLICA,
            memory=nbytes_together(own),
        )
        for file in own:
            task = fingerprints.index(file.provenance["of"])
            network = pad_head(file.network, max(counts))
            found.append(Replica(variant, task, network, Scores(counts[task])))
    return found
