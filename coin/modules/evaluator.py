"""The decoding evaluator: each network runs once per batch, for all methods, decoders and erasures."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

from coin.coding import Answers, Code, DecoderConfig, FeatureCache, distinct_decoders, make_decoder, uniform
from coin.coding.decoders import Head
from coin.coding.metrics import Residual
from coin.core.batches import as_input
from coin.core.choices import renamed_option
from coin.core.progress import tracked
from coin.data import Calibration
from coin.data.tasks import tasks_of
from coin.errors import ConfigurationError
from coin.evaluation.examples import ExampleSamples, KeptSamples
from coin.evaluation.scores import FittedDecoder, Scores, read_replicas
from coin.evaluation.servers import server_answers, with_heads
from coin.evaluation.variants import NONE, ORACLE, Outcome, Variant, read_coded
from coin.files.tensors import fingerprint
from coin.modules.coded_file import save_system
from coin.networks import load_network, pad_head
from coin.statistics.guard import disable_tf32


class DecodingEvaluator(LightningModule):
    """Measures how well lost experts are decoded, on every task's test set. The data is a `coin.data.Tasks`.

    Every expert and coded model runs once per batch; decoders are fitted on the pooled calibration samples first. After
    ``trainer.test`` the results are in `outcomes`, and some test images with their answers in `kept`. Beside the
    methods stand ``none``, the surviving experts alone, and ``oracle``, Σβ_if_i as the coded output (NDA 1).

    Args:
        experts: The experts' safetensors files by task, in the order of the datamodule's tasks.
        coded: The coded models' safetensors files.
        decoders: The decoders: kinds, or sections of a kind and its options; by default all kinds, but expert_head only
            if head and features give the experts' logits.
        code: The code of the references, R×N; by default the first coded model's.
        replicas: The files of compressed experts, each of which replaces its own expert.
        alpha: α, the largest probability that an accepted answer differs from the expert's (`coin.promised_risk`), if
            the datamodule has samples for a promise.
        confidence: The probability that the promise holds.
        spares: The old name of replicas, for one version.

    Raises:
        ConfigurationError: There is nothing to evaluate, or a decoder is unknown or given twice.
        FileError: A file is missing or damaged, or a coded model was made of other experts.
    """

    def __init__(
        self,
        experts: dict[str, str],
        coded: list[str] | None = None,
        decoders: list[str | dict[str, Any] | DecoderConfig] | None = None,
        code: list[list[float]] | None = None,
        replicas: list[str] | None = None,
        alpha: float = 0.02,
        confidence: float = 0.95,
        spares: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.decoders, self._takes_all = distinct_decoders(decoders), decoders is None
        if not experts:
            raise ConfigurationError("found no experts, expected at least one")
        self.tasks = tuple(experts)
        files = [load_network(Path(path)) for path in experts.values()]
        self.class_counts = [file.num_classes for file in files]
        self.config = files[0].config
        width = max(self.class_counts)
        self.experts = nn.ModuleList([pad_head(file.network, width) for file in files])
        fingerprints = [fingerprint(file.network.state_dict()) for file in files]
        self.fingerprints, self.coded_files = fingerprints, [Path(path) for path in coded or []]
        networks, self.variants = read_coded(self.coded_files, fingerprints)
        self.coded = nn.ModuleList(networks)
        first = self.variants[0].code if self.variants else uniform(len(experts))
        self.code = first if code is None else Code(code)
        if self.code.num_experts != len(experts):
            raise ConfigurationError(f"found a code for {self.code.num_experts} experts, expected {len(experts)}")
        self.variants += [Variant(NONE, self.code), Variant(ORACLE, self.code)]
        paths = [Path(path) for path in renamed_option("replicas", replicas, "spares", spares) or []]
        self.replicas = read_replicas(paths, fingerprints, self.class_counts, self.code)
        self.replica_networks = nn.ModuleList([replica.network for replica in self.replicas])
        self.alpha, self.confidence = alpha, confidence
        self.outcomes: list[Outcome] = []
        self.examples: dict[int, ExampleSamples] = {}
        self.kept: dict[str, KeptSamples] = {}
        self.fitted: list[FittedDecoder] = []
        self.heads: list[Head] | None = None
        self.eval().requires_grad_(False)

    def forward(self, inputs: Tensor) -> Answers:
        """Return the answers of all experts and coded models to inputs ``[B, ...]``; each network runs once."""
        features = any(decoder.reads_features for decoder in self.decoders)
        stages = any(decoder.reads_stages for decoder in self.decoders)
        return server_answers(self.experts, self.coded, inputs, features, stages, idle=())

    def on_test_start(self) -> None:
        """Check the data and fit every decoder on the calibration samples."""
        data = tasks_of(self)
        counts = [task.num_classes for task in data.tasks.values()]
        if tuple(data.tasks) != self.tasks or counts != self.class_counts:
            raise ConfigurationError(
                f"found data of tasks {dict(zip(data.tasks, counts, strict=True))}, expected those of the experts, "
                f"{dict(zip(self.tasks, self.class_counts, strict=True))}; name the same tasks in the same order"
            )
        for task in data.tasks.values():
            self.config.check_content(task.content)
        calibration = data.calibration()
        first = as_input(next(iter(calibration)), self.experts[0])
        self.decoders, self.heads = with_heads(self.decoders, list(self.experts), first, needed=not self._takes_all)
        started = time.perf_counter()
        answers = self._answers(calibration)
        # The networks run together here; each one's share of the time is what a decoder that needs it is charged.
        share = (time.perf_counter() - started) / (len(self.experts) + len(self.coded))
        self._test_sizes = [len(task.splits.test) for task in data.tasks.values()]
        self.fitted = self._fit_decoders(answers, share)
        if (new := data.promise()) is not None:
            answers = self._answers(new)
            with torch.autocast("cpu", enabled=False), disable_tf32():
                for fitted in tracked(self.fitted, "promising"):
                    seen = self.variants[fitted.variant].seen(answers)
                    fitted.decoder.accept(seen, self.alpha, self.confidence, self.class_counts)
        self.examples = {
            place: ExampleSamples(len(task.splits.test), self.config.image_size, len(self.single_loss_decoders(place)))
            for place, task in enumerate(data.tasks.values())
            if task.content == "images" and len(self.coded)
        }
        coded = [index for index, variant in enumerate(self.variants) if not variant.is_none]
        self.residuals = {index: [Residual() for _ in self.tasks] for index in coded}

    def _answers(self, calibration: Calibration) -> Answers:
        with self.trainer.precision_plugin.forward_context():  # the decoders meet in the test what they were fitted on
            parts = [self(batch.to(self.device)).cpu() for batch in calibration]
        return replace(Answers.concatenate(parts), tasks=calibration.part)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Decode one batch of task `dataloader_idx` for every erasure that its expert is part of, on the CPU."""
        inputs, labels = batch
        answers = self(inputs).cpu()  # where the decoders were fitted; not every device has float64
        with torch.autocast("cpu", enabled=False), disable_tf32():
            self._decode(answers, inputs, labels.cpu(), batch_idx, dataloader_idx)
        for replica in self.replicas:
            if replica.task == dataloader_idx:
                replica.scores.update(replica.network(inputs).cpu(), answers.experts[replica.task], labels.cpu())

    def _decode(self, answers: Answers, inputs: Tensor, labels: Tensor, batch_idx: int, task: int) -> None:
        seen = [variant.seen(answers) for variant in self.variants]
        for index, residuals in self.residuals.items():
            target = self.variants[index].code.encode(answers.experts)
            residuals[task].update(seen[index].coded.flatten(0, 1), target.flatten(0, 1))
        # Where in the test set the samples of this process's batch are; see `evaluation_batches`.
        before = batch_idx * list(tasks_of(self).tasks.values())[task].eval_batch_size
        positions = self.global_rank + self.trainer.world_size * torch.arange(before, before + len(labels))
        alone = []
        for fitted in self.fitted:
            if task in fitted.scores:
                answer = fitted.update(task, seen[fitted.variant], labels, positions)
                alone += [answer] if fitted.decodes((task,)) else []
        if task in self.examples:
            expert = answers.experts[task][:, : self.class_counts[task]].argmax(1)
            self.examples[task].update(inputs, positions, expert, labels, torch.stack(alone, 1))

    def single_loss_decoders(self, task: int) -> list[tuple[Variant, str]]:
        """Return the variant and decoder of each decoded answer in `kept`, in order."""
        alone = [fitted for fitted in self.fitted if fitted.decodes((task,))]
        return [(self.variants[fitted.variant], fitted.decoder.config.name) for fitted in alone]

    def on_test_epoch_end(self) -> None:
        """Collect the totals of all processes into `outcomes`."""
        if self.trainer.world_size > 1:  # processes add up where their device is: NCCL reduces no tensors of the CPU
            for metric in self._metrics:
                metric.to(self.device)
        self.kept = {self.tasks[task]: examples.kept() for task, examples in self.examples.items()}
        residuals = {index: [float(each.compute()) for each in metrics] for index, metrics in self.residuals.items()}
        self.outcomes = [
            Outcome(
                variant=variant,
                decoder=fitted.decoder.config.name,
                erased=tuple(self.tasks[lost] for lost in erased),
                task=self.tasks[expert],
                residual=residuals[index][expert] if index in residuals else math.nan,
                decoder_seconds=fitted.seconds(erased, len(variant.networks)),
                decoder_passes=fitted.passes(erased, len(variant.networks)),
                promise=fitted.decoder.promises.get(expert),
                **fitted.scores[expert].results(),
                **fitted.costs(variant, len(erased), self.fitted),
            )
            for index, variant in enumerate(self.variants)
            for erased in variant.erasures()
            for config in variant.decoders(self.decoders)
            for fitted in self.fitted
            if (fitted.variant, fitted.decoder.config) == (index, config) and fitted.decodes(erased)
            for expert in erased
        ]
        self.outcomes += [replica.outcome(self.tasks[replica.task]) for replica in self.replicas]

    def _fit_decoders(self, answers: Answers, share: float) -> list[FittedDecoder]:
        """Fit a decoder for every variant and erasure; one that reads no survivor is fitted for all losses at once.

        `share` is one network's seconds on the samples.
        """
        everyone = tuple(range(len(self.experts)))
        combinations = dict.fromkeys(
            (index, erased if config.reads_survivors else everyone, config)
            for index, variant in enumerate(self.variants)
            for erased in variant.erasures()
            for config in variant.decoders(self.decoders)
        )
        fitted, kept = [], FeatureCache()
        for index, erased, config in tracked(list(combinations), "fitting decoders"):
            variant = self.variants[index]
            seen = variant.seen(answers)
            started = time.perf_counter()
            decoder = make_decoder(config, variant.code, erased, self.heads).fit(seen, kept)
            seconds = (time.perf_counter() - started) / (1 if config.reads_survivors else len(erased))
            scores = {lost: Scores(self.class_counts[lost], self._test_sizes[lost]) for lost in erased}
            fitted.append(FittedDecoder(decoder, scores, index, seconds, share / answers.num_samples))
        return fitted

    def save_systems(self, folder: Path) -> None:
        """Write every variant's code, fitted decoders and promises to a file of `coin.modules.Coded.save`.

        The coded models are named in it, and the files called as theirs are, without the row.
        """
        for index, variant in enumerate(self.variants):
            if paths := [self.coded_files[network] for network in variant.networks]:
                decoders = [fitted.decoder for fitted in self.fitted if fitted.variant == index]
                told = {"method": variant.method, "batchnorm": variant.batchnorm.partition(":")[0]}
                path = folder / f"{paths[0].name.removesuffix('.safetensors').removesuffix('.row-0')}.safetensors"
                save_system(path, variant.code, self.tasks, self.class_counts, decoders, paths, self.fingerprints, told)

    @property
    def _metrics(self) -> list[Metric]:
        """All metrics. They are not submodules, so that they stay on the CPU."""
        residuals = [metric for metrics in self.residuals.values() for metric in metrics]
        scores = [each for fitted in self.fitted for each in fitted.scores.values()]
        scores += [replica.scores for replica in self.replicas]
        return [*residuals, *(metric for each in scores for metric in each.metrics), *self.examples.values()]
