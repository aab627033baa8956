"""The decoding evaluator: every network once per batch, for all methods, decoders and erasures."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from coin.coding import Answers, Code, Decoder, DecoderConfig, DecoderKind, distinct_decoders, make_decoder
from coin.data.tasks import Tasks
from coin.errors import ConfigurationError
from coin.metrics import DecodingAccuracy, Residual
from coin.modules.examples import ExampleSamples, KeptSamples, shown_pair
from coin.modules.outcome import Outcome
from coin.modules.variants import NONE, ORACLE, Variant, read_coded
from coin.networks import common_widths, load_network, run_network, widen_network
from coin.progress import tracked
from coin.state import fingerprint
from coin.statistics.guard import full_products


@dataclass(frozen=True)
class _Case:
    """One decoder of one variant for one erasure; ``cost`` is what fitting it took, in seconds and passes."""

    variant: int
    decoder: Decoder
    cost: tuple[float, float]


class DecodingEvaluator(LightningModule):
    """Measures how well lost experts are decoded, on every task's test set. Its data is a `coin.data.Tasks`.

    Every expert and coded model runs once per batch. Decoders are fitted on the pooled calibration samples of the
    datamodule before the first test batch. After ``trainer.test`` the results are in `outcomes`, and in `kept` some
    test images of every task with the answers of its expert and of one decoder in its place (`coin.modules.examples`).

    Beside the methods stand two references: ``none``, decoding from the surviving experts alone, and ``oracle``,
    Σβ_if_i itself in place of a coded model's output (NDA 1 by construction: a check of the evaluator).

    Args:
        experts: The experts' safetensors files by task, in the order of the datamodule's tasks.
        coded: The coded models' safetensors files.
        decoders: The decoders to try: kinds, or sections of a kind and its options; none takes all kinds.
        code: The code of the references, R×N; none takes the first coded model's.

    Raises:
        ConfigurationError: There is nothing to evaluate, or a decoder does not exist or comes twice.
        FileError: A file is missing or damaged, or a coded model was made of other experts.
    """

    def __init__(
        self,
        experts: dict[str, str],
        coded: list[str] | None = None,
        decoders: list[str | dict[str, Any] | DecoderConfig] | None = None,
        code: list[list[float]] | None = None,
    ) -> None:
        super().__init__()
        self.decoders = distinct_decoders(list(DecoderKind) if decoders is None else decoders)
        if not experts:
            raise ConfigurationError("found no experts, expected at least one")
        self.tasks = tuple(experts)
        files = [load_network(Path(path)) for path in experts.values()]
        self.class_counts = [file.num_classes for file in files]
        self.config = files[0].config
        width = max(self.class_counts)
        self.experts = nn.ModuleList([widen_network(file, width) for file in files])
        marks = [fingerprint(file.network.state_dict()) for file in files]
        networks, self.variants = read_coded([Path(path) for path in coded or []], marks)
        self.coded = nn.ModuleList(networks)
        self.variants += self._references(code)
        self.outcomes: list[Outcome] = []
        self.kept: dict[str, KeptSamples] = {}
        self.cases: list[_Case] = []
        self.eval().requires_grad_(False)

    def forward(self, inputs: Tensor) -> Answers:
        """Return what all experts and all coded models answer to inputs ``[B, ...]``, each network run once."""
        features = any(decoder.reads_features for decoder in self.decoders)
        stages = any(decoder.reads_stages for decoder in self.decoders)
        experts = [run_network(network, inputs, features, stages) for network in self.experts]
        coded = [run_network(network, inputs, features, stages) for network in self.coded]
        logits = torch.stack([run.logits for run in experts])
        return Answers(
            experts=logits,
            coded=torch.stack([run.logits for run in coded]) if coded else logits[:0],
            expert_features=[run.features for run in experts] if features else None,
            coded_features=[run.features for run in coded] if features else None,
            feature_widths=common_widths([*experts, *coded]),
        )

    def on_test_start(self) -> None:
        """Check the data and fit every decoder on the calibration samples."""
        data = self._data()
        counts = [task.num_classes for task in data.tasks.values()]
        if tuple(data.tasks) != self.tasks or counts != self.class_counts:
            raise ConfigurationError(
                f"found data of tasks {dict(zip(data.tasks, counts, strict=True))}, the experts are for "
                f"{dict(zip(self.tasks, self.class_counts, strict=True))}; name the same tasks in the same order"
            )
        for task in data.tasks.values():
            self.config.check_content(task.content)
        started = time.perf_counter()
        calibration = data.calibration()
        with self.trainer.precision_plugin.forward_context():  # the decoders meet in the test what they were fitted on
            parts = [_to_cpu(self(batch.to(self.device))) for batch in calibration]
        answers = replace(Answers.concatenate(parts), tasks=calibration.part)
        # The networks run together here; each one's share of the time is what a decoder that needs it is charged.
        share = (time.perf_counter() - started) / (len(self.experts) + len(self.coded))
        self.cases = self._fitted(answers, share)
        lost = [expert for case in self.cases for expert in case.decoder.erased]
        self.accuracies = [DecodingAccuracy(self.class_counts[expert]) for expert in lost]
        self.confusions = [MulticlassConfusionMatrix(self.class_counts[expert]) for expert in lost]
        coded = [index for index, variant in enumerate(self.variants) if variant.networks]
        self.residuals = {(index, task): Residual() for index in coded for task in range(len(self.tasks))}
        self.examples = self._examples(data)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Decode one batch of task `dataloader_idx` for every erasure that its expert is part of, on the CPU."""
        inputs, labels = batch
        answers = _to_cpu(self(inputs))  # where the decoders were fitted; not every device has float64
        with torch.autocast("cpu", enabled=False), full_products():
            self._decode(answers, (inputs, labels.cpu()), batch_idx, dataloader_idx)

    def _decode(self, answers: Answers, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int) -> None:
        inputs, labels = batch
        for (index, task), residual in self.residuals.items():
            variant = self.variants[index]
            if task == dataloader_idx and variant.code is not None:
                coded = answers.coded[list(variant.networks)]
                residual.update(coded.flatten(0, 1), variant.code.encode(answers.experts).flatten(0, 1))
        own = answers.experts[dataloader_idx]
        seen = [variant.seen(answers) for variant in self.variants]
        classes = self.class_counts[dataloader_idx]
        expert = own[:, :classes].argmax(1)
        place = 0
        for index, case in enumerate(self.cases):
            lost = case.decoder.erased
            if dataloader_idx in lost:
                where = lost.index(dataloader_idx)
                decoded = case.decoder.decode(seen[case.variant])[where]
                self.accuracies[place + where].update(decoded, own, labels)
                answer = decoded[:, :classes].argmax(1)
                self.confusions[place + where].update(answer, expert)
                if index in self.examples:
                    positions = self._positions(batch_idx, dataloader_idx, len(labels))
                    self.examples[index].update(inputs, positions, expert, answer, labels)
            place += len(lost)

    def on_test_epoch_end(self) -> None:
        """Collect the totals of all processes into `outcomes`."""
        if self.trainer.world_size > 1:  # processes add up where their device is: NCCL reduces no tensors of the CPU
            for metric in self._metrics:
                metric.to(self.device)
        self.kept = {
            self.tasks[self.cases[case].decoder.erased[0]]: each.kept() for case, each in self.examples.items()
        }
        residuals = {place: float(residual.compute()) for place, residual in self.residuals.items()}
        self.outcomes = []
        place = 0
        for case in self.cases:
            variant = self.variants[case.variant]
            for expert in case.decoder.erased:
                totals = {name: float(value) for name, value in self.accuracies[place].compute().items()}
                confusion = self.confusions[place].compute().cpu().numpy().astype(np.int64)
                place += 1
                self.outcomes.append(
                    Outcome(
                        variant=variant,
                        decoder=case.decoder.name,
                        erased=tuple(self.tasks[lost] for lost in case.decoder.erased),
                        task=self.tasks[expert],
                        residual=residuals.get((case.variant, expert), 0.0 if variant.is_oracle else float("nan")),
                        calibration_seconds=variant.seconds + case.cost[0],
                        sample_passes=variant.passes + case.cost[1],
                        confusion=confusion,
                        **totals,
                    )
                )

    def _references(self, matrix: list[list[float]] | None) -> list[Variant]:
        if matrix is not None:
            code = Code(matrix)
        elif self.variants:
            first = self.variants[0].code
            assert first is not None
            code = first
        else:
            count = len(self.experts)
            code = Code([[1 / count] * count])
        if code.num_experts != len(self.experts):
            raise ConfigurationError(f"found a code for {code.num_experts} experts, expected {len(self.experts)}")
        self.code = code
        none = Variant(NONE, "", None, (), None, 0.0, 0.0)
        oracle = Variant(ORACLE, "", code, (), None, 0.0, 0.0)
        return [none, oracle]

    def _fitted(self, answers: Answers, share: float) -> list[_Case]:
        """Return every case with its decoder fitted; `share` is the seconds one network took over the samples."""
        wanted = [
            (index, erased, config)
            for index, variant in enumerate(self.variants)
            for erased in variant.erasures(variant.code or self.code)
            for config in self.decoders
            if variant.applies(config.kind)
        ]
        cases = []
        for index, erased, config in tracked(wanted, "fitting decoders"):
            variant = self.variants[index]
            seen = variant.seen(answers)
            started = time.perf_counter()
            decoder = make_decoder(config, variant.code or self.code, erased).fit(seen)
            cost = (0.0, 0.0)
            if decoder.needs_fit:
                networks = len(self.experts) + len(variant.networks)
                samples = decoder.samples_read(seen)
                running = share * networks * samples / answers.num_samples
                cost = (time.perf_counter() - started + running, float(networks * samples))
            cases.append(_Case(index, decoder, cost))
        return cases

    @property
    def _metrics(self) -> list[Metric]:
        """All metrics. As no submodules they stay on the CPU when the networks move."""
        return [*self.accuracies, *self.confusions, *self.residuals.values(), *self.examples.values()]

    @property
    def shown(self) -> tuple[Variant, str] | None:
        """The variant and the decoder whose answers are in `kept`; none without coded models."""
        pair = shown_pair(self.variants, self.decoders)
        return None if pair is None else (self.variants[pair[0]], pair[1])

    def _examples(self, data: Tasks) -> dict[int, ExampleSamples]:
        """Return what keeps examples, by case: every task of images lost alone, with one variant and decoder."""
        pair = shown_pair(self.variants, self.decoders)
        tasks = list(data.tasks.values())
        return {
            place: ExampleSamples(len(tasks[case.decoder.erased[0]].splits.test), self.config.image_size)
            for place, case in enumerate(self.cases)
            if (case.variant, case.decoder.name) == pair
            and len(case.decoder.erased) == 1
            and tasks[case.decoder.erased[0]].content == "images"
        }

    def _positions(self, batch: int, task: int, count: int) -> Tensor:
        """Return where in the test set the samples of this process's batch are; see `EvaluationBatches`."""
        before = batch * list(self._data().tasks.values())[task].eval_batch_size
        return self.global_rank + self.trainer.world_size * torch.arange(before, before + count)

    def _data(self) -> Tasks:
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, Tasks):
            raise ConfigurationError(f"found data of {type(data).__name__}, expected Tasks; set data.class_path: Tasks")
        return data


def _to_cpu(answers: Answers) -> Answers:
    def moved(features: Sequence[Tensor] | None) -> list[Tensor] | None:
        return None if features is None else [feature.cpu() for feature in features]

    return replace(
        answers,
        experts=answers.experts.cpu(),
        coded=answers.coded.cpu(),
        expert_features=moved(answers.expert_features),
        coded_features=moved(answers.coded_features),
    )
