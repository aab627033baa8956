"""The decoding evaluator: each network runs once per batch, for all methods, decoders and erasures."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from tqdm import tqdm

from coin.coding import Answers, Code, DecoderConfig, distinct_decoders, uniform
from coin.data import Calibration
from coin.data.tasks import tasks_of
from coin.errors import ConfigurationError
from coin.evaluation.examples import ExampleSamples, KeptSamples
from coin.evaluation.scores import Evaluation, Outcome, server_answers, with_heads
from coin.evaluation.variants import NONE, ORACLE, Variant, read_coded, read_replicas
from coin.files.tensors import fingerprint
from coin.modules.coded_file import SystemFile
from coin.networks import load_network, pad_head
from coin.networks.calling import as_input


class DecodingEvaluator(LightningModule):
    """Measures how well lost experts are decoded, on every task's test set. The data is a `coin.data.Tasks`.

    Every network runs once per batch; decoders are fitted on the pooled calibration samples first. After
    ``trainer.test`` the results are in `outcomes`, and some test images with their answers in `kept`. Beside the
    methods stand ``none``, the surviving experts alone, and ``oracle``, Σβ_if_i as the coded output (NDA 1).

    Args:
        experts: The experts' safetensors files by task, in the order of the datamodule's tasks.
        coded: The coded models' safetensors files.
        decoders: Kinds, or sections of a kind and its options; by default all kinds, but expert_head only if head and
            features give the experts' logits.
        code: The code of the references, R×N; by default the first coded model's.
        replicas: The files of compressed experts, each of which replaces its own expert.
        alpha: α of the promises (`coin.promised_threshold`), if the datamodule has samples for these.
        confidence: The probability that a promise holds.

    Raises ConfigurationError where there is nothing to evaluate, FileError where a coded model is of other experts.
    """

    progress: "tqdm[Any]" = tqdm(disable=True)  # what counts the samples, from outside

    def __init__(
        self,
        experts: dict[str, str],
        coded: list[str] | None = None,
        decoders: list[str | dict[str, Any] | DecoderConfig] | None = None,
        code: list[list[float]] | None = None,
        replicas: list[str] | None = None,
        alpha: float = 0.02,
        confidence: float = 0.95,
    ) -> None:
        super().__init__()
        self.decoders, self._takes_all = distinct_decoders(decoders), decoders is None
        if not experts:
            raise ConfigurationError("found no experts, expected at least one")
        self.tasks = tuple(experts)
        files = [load_network(Path(path)) for path in experts.values()]
        self.class_counts, self.config = [file.num_classes for file in files], files[0].config
        width = max(self.class_counts)
        self.experts = nn.ModuleList([pad_head(file.network, width) for file in files])
        self.fingerprints = [fingerprint(file.network.state_dict()) for file in files]
        self.coded_files = [Path(path) for path in coded or []]
        networks, self.variants = read_coded(self.coded_files, self.fingerprints)
        self.coded = nn.ModuleList(networks)
        if any(each.adapted for each in self.variants):  # bodies, which it alone reads
            self.decoders = list(dict.fromkeys([*self.decoders, DecoderConfig.of("expert_head")]))
        first = self.variants[0].code if self.variants else uniform(len(experts))
        self.code = first if code is None else Code(code)
        if self.code.num_experts != len(experts):
            raise ConfigurationError(f"found a code for {self.code.num_experts} experts, expected {len(experts)}")
        self.variants += [Variant(NONE, self.code), Variant(ORACLE, self.code)]
        self.replicas = read_replicas([Path(path) for path in replicas or []], self.fingerprints, width, self.code)
        self.replica_networks = nn.ModuleList([replica.network for replica in self.replicas])
        self.alpha, self.confidence = alpha, confidence
        self.outcomes: list[Outcome] = []
        self.examples: dict[int, ExampleSamples] = {}
        self.kept: dict[str, KeptSamples] = {}
        self.eval().requires_grad_(False)

    def forward(self, inputs: Tensor, tasks: int | Tensor | None = None) -> Answers:
        """Return all experts' and coded models' answers to inputs ``[B, ...]``, with adapters those for the tasks."""
        features = any(each.reads_features for each in self.decoders)
        return server_answers(self.experts, self.coded, inputs, features, tasks=tasks)

    def on_test_start(self) -> None:
        """Check the data and fit every decoder on the calibration samples."""
        data, own = tasks_of(self), dict(zip(self.tasks, self.class_counts, strict=True))
        found = {name: task.num_classes for name, task in data.tasks.items()}
        if [*found.items()] != [*own.items()]:
            told = f"found data of tasks {found}, expected those of the experts, {own}"
            raise ConfigurationError(f"{told}; name the same in the same order")
        for task in data.tasks.values():
            self.config.check_content(task.content, task.vocabulary)
        calibration, new = data.calibration(), data.promise()
        tests = sum(-(-len(task.splits.test) // self.trainer.world_size) for task in data.tasks.values())
        self.progress.total = tests + sum(each.num_samples for each in (calibration, new) if each)
        first = as_input(next(iter(calibration)), self.experts[0])
        self.decoders, heads = with_heads(self.decoders, list(self.experts), first, needed=not self._takes_all)
        self.evaluation = Evaluation(self.variants, self.decoders, self.class_counts, heads, self.replicas)
        started = time.perf_counter()
        answers = self._answers(calibration)
        networks = len(self.experts) + len(self.coded)  # run together; a decoder is charged with those that it needs
        self.evaluation.fit(answers, (time.perf_counter() - started) / networks / answers.num_samples)
        if new is not None:
            self.evaluation.promise(self._answers(new), self.alpha, self.confidence)
        self.examples = {
            place: ExampleSamples(len(task.splits.test), self.config.image_size, len(self.evaluation.alone(place)))
            for place, task in enumerate(data.tasks.values())
            if task.content == "images" and len(self.coded)
        }

    def _answers(self, calibration: Calibration) -> Answers:
        parts: list[Answers] = []
        with self.trainer.precision_plugin.forward_context():  # as in the test
            for batch in calibration.on(self.device):
                done = sum(each.num_samples for each in parts)
                parts.append(self(batch, calibration.part[done : done + len(batch)]).cpu())
                self.progress.update(parts[-1].num_samples)
        return replace(Answers.concatenate(parts), tasks=calibration.part)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Decode one batch of task `dataloader_idx` for every erasure that its expert is part of, on the CPU."""
        inputs, labels, task = batch[0], batch[1].cpu(), dataloader_idx
        answers = self(inputs, task).cpu()  # where the decoders were fitted; not every device has float64
        decoded = self.evaluation.update(task, answers, labels)
        if task in self.examples:
            # Where in the test set the samples of this process's batch are; see `evaluation_batches`.
            before = batch_idx * list(tasks_of(self).tasks.values())[task].eval_batch_size
            positions = self.global_rank + self.trainer.world_size * torch.arange(before, before + len(labels))
            expert = answers.experts[task][:, : self.class_counts[task]].argmax(1)
            ways = torch.stack([decoded[each] for each in self.evaluation.alone(task)], 1)
            self.examples[task].update(inputs, positions, expert, labels, ways)
        for replica, scores in self.evaluation.replicas:
            if replica.task == task:
                scores.update(replica.network(inputs).cpu(), answers.experts[task], labels)
        self.progress.update(len(labels))

    def on_test_epoch_end(self) -> None:
        """Collect the totals of all processes into `outcomes`."""
        if self.trainer.world_size > 1:  # processes add up where their device is: NCCL reduces no tensors of the CPU
            for metric in [*self.evaluation.metrics, *self.examples.values()]:
                metric.to(self.device)
        self.kept = {self.tasks[task]: examples.kept() for task, examples in self.examples.items()}
        self.outcomes = self.evaluation.outcomes(self.tasks)

    def save_systems(self, folder: Path) -> None:
        """Write every variant with its fitted decoders and promises to a file called as its coded models' are."""
        for index, variant in enumerate(self.variants):
            if paths := [self.coded_files[network] for network in variant.networks]:
                path = folder / f"{paths[0].name.removesuffix('.safetensors').removesuffix('.row-0')}.safetensors"
                decoders = [each.decoder for each in self.evaluation.fitted if each.variant == index]
                told = {"method": variant.method, "batchnorm": variant.batchnorm.partition(":")[0]}
                about = variant.code, self.tasks, self.class_counts
                SystemFile(*about, decoders, self.fingerprints, coded_files=paths, told=told).save(path)
