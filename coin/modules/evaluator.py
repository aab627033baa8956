"""The decoding evaluator: every network once per batch, for all methods, decoders and erasures."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from coin.coding import Answers, Code, Decoder, DecoderConfig, DecoderKind, distinct_decoders, make_decoder
from coin.data.tasks import Tasks
from coin.errors import ConfigurationError
from coin.metrics import DecodingAccuracy, Residual
from coin.modules.coded import common_widths, run_network
from coin.modules.variants import NONE, ORACLE, Variant, read_coded
from coin.networks import load_network, widen_network
from coin.state import fingerprint


@dataclass(frozen=True)
class Outcome:
    """What was measured for one lost expert, under one erasure, with one variant and one decoder.

    Attributes:
        variant: The variant.
        decoder: The decoder.
        erased: The lost tasks.
        task: The task whose expert was decoded, on whose test set.
        expert_accuracy: Accuracy of the expert itself.
        decoded_accuracy: Accuracy of the decoded output.
        nda: Their ratio.
        agreement: Share of test inputs where both answer the same class.
        residual: ‖f_c − Σβ_if_i‖ / ‖Σβ_if_i‖ on the test set; NaN without coded models.
        calibration_seconds: What making the coded models and fitting the decoder took, wall time.
        sample_passes: The same in forward-equivalents.
        confusion: Counts ``[C_j, C_j]``: the expert's answer by the decoded one.
    """

    variant: Variant
    decoder: str
    erased: tuple[str, ...]
    task: str
    expert_accuracy: float
    decoded_accuracy: float
    nda: float
    agreement: float
    residual: float
    calibration_seconds: float
    sample_passes: float
    confusion: NDArray[np.int64]


@dataclass(frozen=True)
class _Case:
    """One decoder of one variant for one erasure; ``cost`` is what fitting it took, in seconds and passes."""

    variant: int
    decoder: Decoder
    cost: tuple[float, float]


class DecodingEvaluator(LightningModule):
    """Measures how well lost experts are decoded, on every task's test set. Its data is a `coin.data.Tasks`.

    Every expert and coded model runs once per batch. Decoders are fitted on the pooled calibration samples of the
    datamodule before the first test batch. After ``trainer.test`` the results are in `outcomes`.

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
        self.image_size = files[0].config.image_size
        width = max(self.class_counts)
        self.experts = nn.ModuleList([widen_network(file, width) for file in files])
        marks = [fingerprint(file.network.state_dict()) for file in files]
        networks, self.variants = read_coded([Path(path) for path in coded or []], marks)
        self.coded = nn.ModuleList(networks)
        self.variants += self._references(code)
        self.outcomes: list[Outcome] = []
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
        started = time.perf_counter()
        calibration = data.calibration()
        with self.trainer.precision_plugin.forward_context():  # the decoders meet in the test what they were fitted on
            parts = [_to_cpu(self(batch.to(self.device))) for batch in calibration]
        answers = replace(Answers.concatenate(parts), tasks=calibration.part)
        # The networks run together here; each one's share of the time is what a decoder that needs it is charged.
        share = (time.perf_counter() - started) / (len(self.experts) + len(self.coded))
        self.cases = list(self._fitted(answers, share))
        lost = [expert for case in self.cases for expert in case.decoder.erased]
        self.accuracies = [DecodingAccuracy(self.class_counts[expert]) for expert in lost]
        self.confusions = [MulticlassConfusionMatrix(self.class_counts[expert]) for expert in lost]
        coded = [index for index, variant in enumerate(self.variants) if variant.networks]
        self.residuals = {(index, task): Residual() for index in coded for task in range(len(self.tasks))}
        # As submodules the metrics move to the device and are summed over processes.
        self.metrics = nn.ModuleList([*self.accuracies, *self.confusions, *self.residuals.values()]).to(self.device)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Decode one batch of task `dataloader_idx` for every erasure that its expert is part of."""
        inputs, labels = batch
        answers = self(inputs)
        with torch.autocast(self.device.type, enabled=False):
            self._decode(answers, labels, dataloader_idx)

    def _decode(self, answers: Answers, labels: Tensor, dataloader_idx: int) -> None:
        for (index, task), residual in self.residuals.items():
            variant = self.variants[index]
            if task == dataloader_idx and variant.code is not None:
                coded = answers.coded[list(variant.networks)]
                residual.update(coded.flatten(0, 1), variant.code.encode(answers.experts).flatten(0, 1))
        own = answers.experts[dataloader_idx]
        seen = [variant.seen(answers) for variant in self.variants]
        place = 0
        for case in self.cases:
            lost = case.decoder.erased
            if dataloader_idx in lost:
                where = lost.index(dataloader_idx)
                decoded = case.decoder.decode(seen[case.variant])[where]
                self.accuracies[place + where].update(decoded, own, labels)
                classes = self.class_counts[dataloader_idx]
                self.confusions[place + where].update(decoded[:, :classes].argmax(1), own[:, :classes].argmax(1))
            place += len(lost)

    def on_test_epoch_end(self) -> None:
        """Collect the totals of all processes into `outcomes`."""
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

    def _fitted(self, answers: Answers, share: float) -> Iterator[_Case]:
        """Yield every case with its decoder fitted; `share` is the seconds one network took over the samples."""
        for index, variant in enumerate(self.variants):
            code = variant.code or self.code
            seen = variant.seen(answers)
            decoders = [decoder for decoder in self.decoders if variant.applies(decoder.kind)]
            for erased in variant.erasures(code):
                for config in decoders:
                    started = time.perf_counter()
                    decoder = make_decoder(config, code, erased).fit(seen)
                    cost = (0.0, 0.0)
                    if decoder.needs_fit:
                        networks = len(self.experts) + len(variant.networks)
                        samples = decoder.samples_read(seen)
                        running = share * networks * samples / answers.num_samples
                        cost = (time.perf_counter() - started + running, float(networks * samples))
                    yield _Case(index, decoder, cost)

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
