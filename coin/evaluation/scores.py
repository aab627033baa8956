"""The evaluation of coded systems: networks run, decoders are fitted to their answers, what they decode is scored."""

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
    distinct_decoders,
)
from coin.coding.decoder import Head
from coin.coding.decoder_config import REPLICA
from coin.coding.metrics import DecodingAccuracy, Residual
from coin.core.batches import Batch
from coin.core.devices import disable_tf32
from coin.core.progress import progress_bar
from coin.errors import CoinWarning, ConfigurationError, HeadError
from coin.evaluation.variants import NONE, ORACLE, Variant
from coin.networks import linear_heads, run_network

Networks = Callable[[Collection[int]], Mapping[int, nn.Module]]
"""Returns the networks at some places: first the experts, then the coded models and the copies."""


class FittedDecoder:
    """A decoder in a variant, the erasures that it is measured for, and its scores by lost expert."""

    def __init__(
        self,
        variant: Variant,
        decoder: Decoder,
        erasures: Sequence[tuple[int, ...]],
        class_counts: Sequence[int],
    ) -> None:
        self.variant = variant
        self.decoder = decoder
        self.erasures = erasures
        self.seconds = 0.0  # that its fit took
        self.scores: dict[int, DecodingAccuracy] = {}
        self.confusions: dict[int, MulticlassConfusionMatrix] = {}
        for lost in decoder.erased:
            count = class_counts[lost]
            self.scores[lost] = DecodingAccuracy(count)
            self.confusions[lost] = MulticlassConfusionMatrix(count, validate_args=False)

    def reads(self) -> set[int]:
        """Return the places of the networks whose answers it decodes."""
        num_experts = self.variant.code.num_experts
        if self.variant.method == ORACLE:
            return set(range(num_experts))
        networks = {num_experts + network for network in self.variant.networks}
        return networks | set(self.decoder.survivors)

    def update(self, task: int, seen: Answers, labels: Tensor, width: int) -> None:
        """Score what is decoded of one lost expert from the answers in the variant's system to its own test inputs."""
        decoded = self.decoder.decode(seen)[self.decoder.erased.index(task)][:, :width]
        expert = seen.experts[task, :, :width]
        accepted = None
        if task in self.decoder.promises:
            accepted = self.decoder.accepted(task, answer_score(decoded))
        self.scores[task].update(decoded, expert, labels, accepted)
        is_finite = torch.isfinite(decoded).all(1)  # NaN is counted for no class
        self.confusions[task].update(decoded[is_finite].argmax(1), expert[is_finite].argmax(1))


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
    """Measures how well lost experts are decoded in several variants, by every decoder that applies to them.

    Without survivors one decoder is for all experts at once; else there is one for every erasure. A network runs once a
    batch, where its answers are read.

    Args:
        networks: What returns the networks that run.
        variants: The variants.
        decoders: The decoders' kinds; by default all, but expert_head only if head and features give the experts'
            logits. Bodies with adapters add it, the only one that reads them.
        class_counts: The experts' numbers of classes.
        inputs: Inputs that show whether they do.

    Raises ConfigurationError where no decoder applies to any variant, HeadError where expert_head is asked for.
    """

    def __init__(
        self,
        networks: Networks,
        variants: Sequence[Variant],
        decoders: Sequence[DecoderKind | str] | None,
        class_counts: Sequence[int],
        inputs: Batch,
    ) -> None:
        self._networks = networks
        self.variants = variants
        self.class_counts = class_counts
        kinds = distinct_decoders(decoders)
        expert_head = DecoderKind.expert_head
        if expert_head not in kinds and any(each.adapted for each in variants):
            kinds.append(expert_head)
        heads = None
        if expert_head in kinds:
            heads = self._heads(inputs, is_asked=decoders is not None)
            kinds = [kind for kind in kinds if heads or kind is not expert_head]
        self.kinds = kinds
        everyone = tuple(range(len(class_counts)))
        self.fitted: list[FittedDecoder] = []
        self.residuals: dict[Variant, list[Residual]] = {}
        for variant in variants:
            erasures = variant.erasures()
            applying = variant.decoders(kinds)
            for kind in applying:
                groups = {everyone: erasures}
                if kind.reads_survivors:
                    groups = {erased: [erased] for erased in erasures}
                for erased, measured in groups.items():
                    decoder = variant.decoder(kind, erased, heads)
                    fitted = FittedDecoder(variant, decoder, measured, class_counts)
                    self.fitted.append(fitted)
            # A body with adapters has no one output for all experts, and the survivors alone have no coded model.
            of_sum = [kind for kind in applying if kind is not expert_head]
            if of_sum and variant.method != NONE:  # the sum takes every expert's answers
                self.residuals[variant] = [Residual() for _ in class_counts]
        if not self.fitted:
            names = ", ".join(kind.name for kind in kinds)
            raise ConfigurationError(
                f"found nothing that the decoders {names} can measure, expected coded models, replicas, or a decoder "
                "that reads survivors"
            )
        self.network_seconds = 0.0  # of one network for one calibration sample

    def _heads(self, inputs: Batch, is_asked: bool) -> list[Head] | None:
        """Return the experts' heads; none, with a warning, where one is not linear and they are not asked for."""
        experts = (self._networks([place])[place] for place in range(len(self.class_counts)))
        try:
            heads = linear_heads(experts, inputs)
        except HeadError as error:
            if is_asked:
                raise
            warnings.warn(f"expert_head is left out: {error}", CoinWarning, stacklevel=4)
            return None
        return [
            (weight[:count].cpu(), bias[:count].cpu())
            for count, (weight, bias) in zip(self.class_counts, heads, strict=True)
        ]

    @property
    def to_fit(self) -> list[FittedDecoder]:
        """The decoders that need a fit."""
        return [each for each in self.fitted if each.decoder.kind.needs_fit]

    @property
    def to_promise(self) -> list[FittedDecoder]:
        """The decoders of whose answers something can be promised: not copies."""
        return [each for each in self.fitted if not each.variant.is_copy]

    def reads(self, task: int) -> set[int]:
        """Return the places of the networks whose answers to a task's test set are read."""
        places = {task}
        for each in self.fitted:
            if task in each.scores:
                places |= each.reads()
        if self.residuals:  # of Σ_i β_i f_i
            places |= set(range(len(self.class_counts)))
        return places

    def answers(self, inputs: Batch, tasks: int | Tensor, places: Collection[int]) -> Answers:
        """Return the answers of the networks at these places to inputs ``[B, …]``, bodies' as the tasks' experts.

        They are on the CPU: not every device has float64, in which decoders are fitted.
        """
        features = any(kind.reads_features for kind in self.kinds)
        count = len(self.class_counts)
        others = [network for variant in self.variants for network in variant.networks]
        networks = self._networks(places)
        outputs = [
            run_network(networks[place], inputs, features, tasks) if place in networks else None
            for place in range(count + max(others, default=-1) + 1)
        ]
        return Answers.of_servers(outputs, count).cpu()

    def _answers_to(
        self, batches: Iterable[tuple[Batch, Tensor]], fitted: Sequence[FittedDecoder]
    ) -> tuple[Answers, int]:
        """Return what these decoders read and the lost experts' own answers, and how many networks have given them."""
        places: set[int] = set()
        for each in fitted:
            places |= each.reads() | set(each.scores)
        parts = []
        for inputs, tasks in batches:
            answers = self.answers(inputs, tasks, places)
            parts.append(replace(answers, tasks=tasks))
        if not parts:
            raise ConfigurationError(
                f"found no calibration samples to fit the decoder {fitted[0].decoder.kind.name} on; give them"
            )
        return Answers.concatenate(parts), len(places)

    def fit(self, batches: Iterable[tuple[Batch, Tensor]]) -> None:
        """Fit the decoders that need it on calibration inputs ``[B, …]``, each with its task ``[B]``, if there are any.

        Raises ConfigurationError where they need some and there are none.
        """
        to_fit = self.to_fit
        if not to_fit:
            return
        started = time.perf_counter()
        answers, num_networks = self._answers_to(batches, to_fit)
        seconds = time.perf_counter() - started
        # Networks run together; a decoder is charged with those that it needs.
        self.network_seconds = seconds / num_networks / answers.num_samples
        with _full_precision():
            for each in progress_bar("fitting decoders", items=to_fit):
                seen = each.variant.seen(answers)
                started = time.perf_counter()
                each.decoder.fit(seen)
                each.seconds = time.perf_counter() - started

    def promise(
        self, batches: Iterable[tuple[Batch, Tensor]], alpha: float, confidence: float
    ) -> None:
        """Set up to which score decoded answers are accepted, by new inputs of known tasks; see `Decoder.accept`."""
        answers, _ = self._answers_to(batches, self.to_promise)
        with _full_precision():
            for each in self.to_promise:
                seen = each.variant.seen(answers)
                each.decoder.accept(seen, alpha, confidence, self.class_counts)

    def update(self, task: int, inputs: Batch, labels: Tensor) -> None:
        """Score what is decoded of a batch of one task's test set, labels ``[B]``."""
        answers = self.answers(inputs, task, self.reads(task))
        labels = labels.cpu()
        width = self.class_counts[task]
        with _full_precision():
            seen = {variant: variant.seen(answers) for variant in self.variants}
            for variant, residuals in self.residuals.items():
                target = variant.code.encode(answers.experts)  # [R, B, C]
                coded = seen[variant].coded
                residuals[task].update(coded.flatten(0, 1), target.flatten(0, 1))
            for each in self.fitted:
                if task in each.scores:
                    each.update(task, seen[each.variant], labels, width)

    def measurements(self, tasks: Sequence[str]) -> list[Measurement]:
        """Return the results of every variant, erasure by erasure, given the tasks' names."""
        found: list[Measurement] = []
        for variant in self.variants:
            own = [each for each in self.fitted if each.variant is variant]
            for erased in variant.erasures():
                for each in own:
                    if erased in each.erasures:
                        decoders = [other.decoder for other in own]
                        kind = each.decoder.kind
                        kept = sum(every.nbytes for every in decoders if every.kind is kind)
                        found += self._measured(each, erased, kept, tasks)
        return found

    def _measured(
        self, fitted: FittedDecoder, erased: tuple[int, ...], kept: int, tasks: Sequence[str]
    ) -> Iterator[Measurement]:
        """Yield the results of a decoder for the loss of these experts, one for each of them."""
        variant = fitted.variant
        decoder = fitted.decoder
        passes = decoder.passes(len(variant.networks))
        seconds = fitted.seconds + self.network_seconds * passes
        rows = [] if variant.is_copy else range(len(variant.networks))
        columns = {
            "method": variant.method,
            "batchnorm": variant.batchnorm,
            "decoder": REPLICA if variant.is_copy else decoder.kind.name,
            "code_row": "+".join(map(str, rows)),
            "erased": "+".join(tasks[lost] for lost in erased),
            "samples_per_task": variant.samples_per_task,
            "merge_seconds": variant.merge_seconds,
            "merge_passes": variant.merge_passes,
            "decoder_seconds": seconds if passes else 0.0,
            "decoder_passes": float(passes),
            **variant.costs(decoder.kind, kept, len(erased)),
        }
        for lost in erased:
            residual = math.nan
            if variant in self.residuals:
                residual = float(self.residuals[variant][lost].compute())
            of_task = {**columns, "task": tasks[lost], "residual": residual}
            for name, number in fitted.scores[lost].compute().items():
                of_task[name] = float(number)
            confusion = fitted.confusions[lost].compute().cpu()
            yield Measurement(of_task, confusion, decoder.promises.get(lost))

    @property
    def metrics(self) -> list[Metric]:
        """All metrics that hold totals."""
        found: list[Metric] = []
        for residuals in self.residuals.values():
            found += residuals
        for each in self.fitted:
            found += [*each.scores.values(), *each.confusions.values()]
        return found


@contextmanager
def _full_precision() -> Iterator[None]:
    """Run a block on the CPU in full precision, whatever the networks' is."""
    with torch.autocast("cpu", enabled=False), disable_tf32():
        yield
