"""The evaluation of coded systems on the servers' answers: decoders are fitted, and what they decode is scored."""

import math
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from coin.coding import (
    Answers,
    Decoder,
    DecoderKind,
    Promise,
    answer_score,
    make_decoder,
)
from coin.coding.decoder import Head
from coin.coding.decoder_config import REPLICA
from coin.coding.metrics import DecodingAccuracy, Residual
from coin.core.batches import Batch
from coin.core.devices import disable_tf32
from coin.core.progress import progress_bar
from coin.errors import CoinWarning, HeadError
from coin.evaluation.variants import NONE, ORACLE, Replica, Variant
from coin.networks import linear_heads, run_network


def server_answers(
    servers: Sequence[nn.Module | None],
    num_experts: int,
    inputs: Batch,
    features: bool,
    tasks: int | Tensor | None = None,
) -> Answers:
    """Run every server once, experts first, then coded models; None is one that does not answer (`Coded.answers`)."""
    outputs = [
        None if server is None else run_network(server, inputs, features, tasks)
        for server in servers
    ]
    return Answers.of_servers(outputs, num_experts)


def with_heads(
    decoders: list[DecoderKind], experts: Iterable[nn.Module], inputs: Batch, needed: bool
) -> tuple[list[DecoderKind], list[Head] | None]:
    """Return the decoders, and the heads if one needs these; expert_head, unless needed, only if heads are linear."""
    others: list[DecoderKind] = [kind for kind in decoders if kind is not DecoderKind.expert_head]
    if len(others) == len(decoders):
        return decoders, None
    try:
        heads = linear_heads(experts, inputs)
    except HeadError as error:
        if needed:
            raise
        warnings.warn(f"expert_head is left out: {error}", CoinWarning, stacklevel=3)
        return others, None
    return decoders, [(weight.cpu(), bias.cpu()) for weight, bias in heads]


class Scores:
    """`DecodingAccuracy` of one lost expert, and counts of its own class by the answered one."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.accuracy = DecodingAccuracy(num_classes)
        self.confusion = MulticlassConfusionMatrix(num_classes, validate_args=False)  # [C_j, C_j]

    def update(
        self, decoded: Tensor, expert: Tensor, labels: Tensor, accepted: Tensor | None = None
    ) -> None:
        """Add a batch of logits ``[B, C]`` with C ≥ C_j (`DecodingAccuracy`); NaN is counted for no class."""
        self.accuracy.update(decoded, expert, labels, accepted)
        answered = decoded[:, : self.num_classes]
        own = expert[:, : self.num_classes]
        is_finite = torch.isfinite(answered).all(1)
        self.confusion.update(answered[is_finite].argmax(1), own[is_finite].argmax(1))


@dataclass(eq=False)
class FittedDecoder:
    """A decoder of a variant, its scores by lost expert, and the wall time of its fit."""

    variant: Variant
    decoder: Decoder
    scores: dict[int, Scores]
    seconds: float = 0.0

    def decodes(self, erased: Sequence[int]) -> bool:
        """Return whether this is the decoder for the loss of these experts."""
        if self.decoder.kind.reads_survivors:
            return self.decoder.erased == tuple(erased)
        return True

    def decode(self, task: int, seen: Answers, num_classes: int) -> Tensor:
        """Return a lost expert's logits of its own classes ``[B, C_j]`` from the answers in the variant's system."""
        place = self.decoder.erased.index(task)
        decoded = self.decoder.decode(seen)  # [|erased|, B, C]
        return decoded[place, :, :num_classes]


@dataclass(frozen=True)
class Measurement:
    """What was measured for one lost expert, with one variant and decoder.

    `columns` are those of ``results.csv`` but for the experiment's and the seed's, and ``coverage`` and ``found`` of a
    `promise`; `confusion` counts the expert's class by the decoded class ``[C_j, C_j]``.
    """

    columns: dict[str, Any]
    confusion: Tensor
    promise: Promise | None = None


class Evaluation:
    """Variants with the decoders that apply, one for every erasure; without survivors one for all experts at once."""

    def __init__(
        self,
        variants: Sequence[Variant],
        kinds: Sequence[DecoderKind],
        class_counts: Sequence[int],
        heads: Sequence[Head] | None = None,
        replicas: Sequence[Replica] = (),
    ) -> None:
        self.variants = list(variants)
        self.kinds = list(kinds)
        self.class_counts = list(class_counts)
        everyone = tuple(range(len(class_counts)))
        self.fitted: list[FittedDecoder] = []
        for variant in variants:
            for kind in variant.decoders(kinds):
                erasures = variant.erasures() if kind.reads_survivors else [everyone]
                for erased in erasures:
                    decoder = make_decoder(kind, variant.code, erased, heads)
                    scores = {expert: Scores(class_counts[expert]) for expert in erased}
                    self.fitted.append(FittedDecoder(variant, decoder, scores))
        self.residuals: dict[Variant, list[Residual]] = {}
        for variant in variants:
            # A body with adapters has no one output for all experts, and the survivors alone have no coded model.
            has_output = variant.method != NONE and not variant.adapted
            of_sum = [
                kind for kind in variant.decoders(kinds) if kind is not DecoderKind.expert_head
            ]
            if has_output and of_sum:  # the sum takes every expert's answers
                self.residuals[variant] = [Residual() for _ in class_counts]
        self.replicas = [(replica, Scores(class_counts[replica.task])) for replica in replicas]
        self.network_seconds = 0.0

    def to_fit(self) -> list[FittedDecoder]:
        """Return the decoders that need a fit."""
        return [each for each in self.fitted if each.decoder.kind.needs_fit]

    def read_by_fit(self) -> set[int]:
        """Return the places of the servers whose answers to calibration inputs `fit` reads (`server_answers`)."""
        places: set[int] = set()
        for each in self.to_fit():
            places |= {*each.decoder.erased, *self._read(each)}
        return places

    def read_of_task(self, task: int) -> set[int]:
        """Return the places of the servers whose answers to a task's test set `update` reads (`server_answers`)."""
        places = {task}
        for each in self.fitted:
            if task in each.scores:
                places |= self._read(each)
        if self.residuals:  # of Σ_i β_i f_i
            places |= self._everyone()
        for variant in self.residuals:
            places |= self._places(variant)
        return places

    def _read(self, fitted: FittedDecoder) -> set[int]:
        """Return the places of the servers that a decoder reads."""
        if fitted.variant.method == ORACLE:
            return self._everyone()
        return {*fitted.decoder.survivors, *self._places(fitted.variant)}

    def _everyone(self) -> set[int]:
        """Return the experts' places."""
        return set(range(len(self.class_counts)))

    def _places(self, variant: Variant) -> set[int]:
        """Return the places of a variant's coded models."""
        return {len(self.class_counts) + network for network in variant.networks}

    def fit(self, answers: Answers, network_seconds: float = 0.0) -> None:
        """Fit the decoders that need it on calibration inputs' answers; a network took so long for each of these."""
        self.network_seconds = network_seconds
        for each in progress_bar("fitting decoders", items=self.to_fit()):
            seen = each.variant.seen(answers)
            started = time.perf_counter()
            each.decoder.fit(seen)
            losses = 1 if each.decoder.kind.reads_survivors else len(each.decoder.erased)
            each.seconds = (time.perf_counter() - started) / losses

    def promise(self, answers: Answers, alpha: float, confidence: float) -> None:
        """Set up to which score answers are accepted, by all servers' answers to new inputs; see `Decoder.accept`."""
        with torch.autocast("cpu", enabled=False), disable_tf32():
            for each in self.fitted:
                seen = each.variant.seen(answers)
                each.decoder.accept(seen, alpha, confidence, self.class_counts)

    def update(self, task: int, answers: Answers, labels: Tensor) -> None:
        """Score what is decoded of a batch of one task's test set."""
        width = self.class_counts[task]
        with torch.autocast("cpu", enabled=False), disable_tf32():
            seen = {variant: variant.seen(answers) for variant in self.variants}
            for variant, residuals in self.residuals.items():
                target = variant.code.encode(answers.experts)  # [R, B, C]
                coded = seen[variant].coded
                residuals[task].update(coded.flatten(0, 1), target.flatten(0, 1))
            expert = answers.experts[task, :, :width]
            for each in self.fitted:
                if task not in each.scores:
                    continue
                decoded = each.decode(task, seen[each.variant], width)
                accepted = None
                if task in each.decoder.promises:
                    accepted = each.decoder.accepted(task, answer_score(decoded))
                each.scores[task].update(decoded, expert, labels, accepted)

    def measurements(self, tasks: Sequence[str]) -> list[Measurement]:
        """Return the results, erasure by erasure and then the replicas', given the tasks' names."""
        found = []
        for variant in self.variants:
            for erased in variant.erasures():
                for kind in variant.decoders(self.kinds):
                    found += self._of_decoder(variant, erased, kind, tasks)
        for (variant, task, _), scores in self.replicas:
            columns = {
                "decoder": REPLICA,
                "erased": tasks[task],
                "task": tasks[task],
                "residual": math.nan,
                "decoder_seconds": 0.0,
                "decoder_passes": 0.0,
                "memory_mib": variant.memory / 2**20,
                "resident_mib": variant.resident / 2**20,
                "forwards": 1,
                "losses": len(tasks),
            }
            found.append(_measurement(variant, columns, scores))
        return found

    def _of_decoder(
        self, variant: Variant, erased: tuple[int, ...], kind: DecoderKind, tasks: Sequence[str]
    ) -> list[Measurement]:
        """Return the results of a decoder for the loss of these experts, one for each of them."""
        of_variant = [each for each in self.fitted if each.variant is variant]
        own = [each for each in of_variant if each.decoder.kind is kind]
        fitted = next(each for each in own if each.decodes(erased))
        kept = sum(each.decoder.nbytes for each in own)
        passes = fitted.decoder.passes(len(variant.networks), erased)
        seconds = fitted.seconds + self.network_seconds * passes
        columns = {
            "decoder": kind.name,
            "erased": "+".join(tasks[lost] for lost in erased),
            "decoder_seconds": seconds if passes else 0.0,
            "decoder_passes": float(passes),
            **variant.costs(kind, kept, len(erased)),
        }
        found = []
        for lost in erased:
            residual = math.nan
            if variant in self.residuals:
                residual = float(self.residuals[variant][lost].compute())
            of_task = {**columns, "task": tasks[lost], "residual": residual}
            promise = fitted.decoder.promises.get(lost)
            found.append(_measurement(variant, of_task, fitted.scores[lost], promise))
        return found

    @property
    def metrics(self) -> list[Metric]:
        """All metrics that hold totals."""
        found: list[Metric] = []
        for residuals in self.residuals.values():
            found += residuals
        scores = [scores for _, scores in self.replicas]
        for each in self.fitted:
            scores += each.scores.values()
        for own in scores:
            found += [own.accuracy, own.confusion]
        return found


def _measurement(
    variant: Variant,
    columns: dict[str, Any],
    scores: Scores,
    promise: Promise | None = None,
) -> Measurement:
    made = {
        "method": variant.method,
        "batchnorm": variant.batchnorm,
        "code_row": "+".join(map(str, range(len(variant.networks)))),
        "samples_per_task": variant.samples_per_task,
        "merge_seconds": variant.merge_seconds,
        "merge_passes": variant.merge_passes,
    }
    shares = scores.accuracy.compute()
    numbers = {name: float(share) for name, share in shares.items()}
    confusion = scores.confusion.compute().cpu()
    return Measurement({**made, **columns, **numbers}, confusion, promise)
