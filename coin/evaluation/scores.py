"""The evaluation of coded systems on the servers' answers: decoders are fitted, and what they decode is scored."""

import math
import time
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from coin.coding import Answers, Decoder, DecoderConfig, DecoderKind, Promise, answer_score, make_decoder
from coin.coding.decoder_config import REPLICA
from coin.coding.decoders import Head
from coin.coding.metrics import DecodingAccuracy, Residual
from coin.core.batches import Batch
from coin.core.devices import disable_tf32
from coin.core.progress import progress_bar
from coin.errors import CoinWarning, HeadError
from coin.evaluation.variants import NONE, Replica, Variant
from coin.networks import answering, linear_heads, run_network


def server_answers(
    experts: nn.ModuleList, coded: nn.ModuleList, inputs: Batch, features: bool, idle: Collection[int] = (),
    tasks: int | Tensor | None = None,
) -> Answers:  # fmt: skip
    """Run every server once but those in `idle`, numbered experts first, then coded models; see `Coded.answers`."""
    servers = enumerate((*experts, *coded))
    with answering(coded, tasks):
        runs = [None if index in idle else run_network(network, inputs, features) for index, network in servers]
    return Answers.of_servers(runs, len(experts))


def with_heads(
    decoders: list[DecoderConfig], experts: Sequence[nn.Module], inputs: Batch, needed: bool
) -> tuple[list[DecoderConfig], list[Head] | None]:
    """Return the decoders, and the heads if one needs these; expert_head, unless needed, only if heads are linear."""
    others = [config for config in decoders if config.kind is not DecoderKind.expert_head]
    if len(others) == len(decoders):
        return decoders, None
    try:
        return decoders, [(weight.cpu(), bias.cpu()) for weight, bias in linear_heads(experts, inputs)]
    except HeadError as error:
        if needed:
            raise
        warnings.warn(f"expert_head is left out: {error}", CoinWarning, stacklevel=3)
        return others, None


class Scores(DecodingAccuracy):
    """`DecodingAccuracy`, with counts of the expert's class by the answered one, ``confusion`` ``[C_j, C_j]``."""

    confusion: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.classes = num_classes
        self.add_state("confusion", torch.zeros(num_classes**2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, decoded: Tensor, expert: Tensor, labels: Tensor, accepted: Tensor | None = None) -> None:
        """Add a batch; see `DecodingAccuracy`."""
        super().update(decoded, expert, labels, accepted)
        own, answered = (logits[:, : self.classes].argmax(1) for logits in (expert, decoded))
        counts = torch.bincount(own * self.classes + answered, minlength=self.classes**2)
        self.confusion += counts.to(self.confusion.device)

    def compute(self) -> dict[str, Tensor]:
        """Return all numbers, and the counts."""
        return {**super().compute(), "confusion": self.confusion.view(self.classes, self.classes)}


@dataclass(frozen=True)
class Outcome:
    """The results for one lost expert, with one variant and decoder.

    `columns` are those of ``results.csv`` but for the experiment's and the seed's, and ``coverage`` and ``found`` of a
    `promise`; `confusion` counts the expert's class by the decoded class ``[C_j, C_j]``.
    """

    columns: dict[str, Any]
    confusion: Tensor
    promise: Promise | None = None


@dataclass(eq=False)
class FittedDecoder:
    """A decoder of the variant with this index, its scores by lost expert, and the wall time of its fit."""

    decoder: Decoder
    scores: dict[int, Scores]
    variant: int
    seconds: float = 0.0

    def decodes(self, erased: Sequence[int]) -> bool:
        """Return whether this is the decoder for the loss of these experts."""
        return tuple(erased) == self.decoder.erased or not self.decoder.config.reads_survivors


class Evaluation:
    """Variants with the decoders that apply, one for every erasure; without survivors one for all experts at once."""

    def __init__(
        self,
        variants: Sequence[Variant],
        configs: Sequence[DecoderConfig],
        class_counts: Sequence[int],
        heads: Sequence[Head] | None = None,
        replicas: Sequence[Replica] = (),
    ) -> None:
        self.variants, self.configs, self.class_counts = list(variants), list(configs), list(class_counts)
        self.fitted: list[FittedDecoder] = []
        for index, variant in enumerate(self.variants):
            for config in variant.decoders(self.configs):
                for erased in variant.erasures() if config.reads_survivors else [tuple(range(len(class_counts)))]:
                    decoder = make_decoder(config, variant.code, erased, heads)
                    self.fitted.append(FittedDecoder(decoder, {j: Scores(class_counts[j]) for j in erased}, index))
        whole = [index for index, own in enumerate(variants) if own.method != NONE and not own.adapted]
        self.residuals = {index: [Residual() for _ in class_counts] for index in whole}
        self.replicas = [(replica, Scores(class_counts[replica.task])) for replica in replicas]
        self.network_seconds = 0.0

    def fit(self, answers: Answers, network_seconds: float = 0.0) -> None:
        """Fit every decoder on all servers' answers to calibration inputs; a network took so long for each of these."""
        self.network_seconds = network_seconds
        for each in progress_bar("fitting decoders", items=self.fitted):
            seen, started = self.variants[each.variant].seen(answers), time.perf_counter()
            each.decoder.fit(seen)
            losses = 1 if each.decoder.config.reads_survivors else len(each.decoder.erased)
            each.seconds = (time.perf_counter() - started) / losses

    def promise(self, answers: Answers, alpha: float, confidence: float) -> None:
        """Set up to which score answers are accepted, by all servers' answers to new inputs; see `Decoder.accept`."""
        with torch.autocast("cpu", enabled=False), disable_tf32():
            for each in self.fitted:
                each.decoder.accept(self.variants[each.variant].seen(answers), alpha, confidence, self.class_counts)

    def update(self, task: int, answers: Answers, labels: Tensor) -> dict[FittedDecoder, Tensor]:
        """Score what is decoded of a batch of one task's test set; return every decoder's classes ``[B]``."""
        with torch.autocast("cpu", enabled=False), disable_tf32():
            seen = [variant.seen(answers) for variant in self.variants]
            for index, residuals in self.residuals.items():
                target = self.variants[index].code.encode(answers.experts)
                residuals[task].update(seen[index].coded.flatten(0, 1), target.flatten(0, 1))
            classes, width = {}, self.class_counts[task]
            for each in (fitted for fitted in self.fitted if task in fitted.scores):
                decoded = each.decoder.decode(seen[each.variant])[each.decoder.erased.index(task)]
                score = answer_score(decoded[:, :width])
                accepted = each.decoder.accepted(task, score) if task in each.decoder.promises else None
                each.scores[task].update(decoded, answers.experts[task], labels, accepted)
                classes[each] = decoded[:, :width].argmax(1)
        return classes

    def alone(self, task: int) -> list[FittedDecoder]:
        """Return the decoders for the loss of one expert alone."""
        return [each for each in self.fitted if each.decodes((task,))]

    def outcomes(self, tasks: Sequence[str]) -> list[Outcome]:
        """Return the results, erasure by erasure and then the replicas', given the tasks' names."""
        residuals = {index: [float(each.compute()) for each in metrics] for index, metrics in self.residuals.items()}
        found = []
        for index, variant in enumerate(self.variants):
            for erased, config in product(variant.erasures(), variant.decoders(self.configs)):
                own = [e for e in self.fitted if (e.variant, e.decoder.config) == (index, config)]
                (fitted,) = (each for each in own if each.decodes(erased))
                passes = fitted.decoder.passes(len(variant.networks), erased)
                told = {
                    "decoder": config.name,
                    "erased": "+".join(tasks[lost] for lost in erased),
                    "decoder_seconds": fitted.seconds + self.network_seconds * passes if passes else 0.0,
                    "decoder_passes": float(passes),
                    **variant.costs(config, sum(each.decoder.nbytes for each in own), len(erased)),
                }
                for j in erased:
                    told |= {"task": tasks[j], "residual": residuals[index][j] if index in residuals else math.nan}
                    found.append(_outcome(variant, told, fitted.scores[j], fitted.decoder.promises.get(j)))
        for (variant, j, _), scores in self.replicas:  # one runs alone, and all experts may be lost
            told = {"decoder": REPLICA, "erased": tasks[j], "task": tasks[j], "residual": math.nan, "forwards": 1}
            told |= {"decoder_seconds": 0.0, "decoder_passes": 0.0, "losses": len(tasks)}
            told |= {"memory_mib": variant.memory / 2**20, "resident_mib": variant.resident / 2**20}
            found.append(_outcome(variant, told, scores))
        return found

    @property
    def metrics(self) -> list[Metric]:
        """All metrics that hold totals."""
        scores = [each.scores.values() for each in self.fitted]
        return [*chain(*self.residuals.values(), *scores), *(scores for _, scores in self.replicas)]


def _outcome(variant: Variant, told: dict[str, Any], scores: Scores, promise: Promise | None = None) -> Outcome:
    numbers = dict(scores.compute())
    confusion = numbers.pop("confusion").cpu()
    row = "+".join(map(str, range(len(variant.networks))))
    made = {"method": variant.method, "batchnorm": variant.batchnorm, "code_row": row, **variant.made}
    return Outcome({**made, **told, **{name: float(each) for name, each in numbers.items()}}, confusion, promise)
