"""The evaluator: measures how well lost experts are decoded (NDA), for all methods in one pass of each network."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from tqdm import tqdm

from coin.coding import Code, distinct_decoders, uniform
from coin.core.batches import Batch, size_of
from coin.data import Calibration
from coin.data.tasks import Tasks, tasks_of
from coin.errors import ConfigurationError
from coin.evaluation.cache import NetworkCache
from coin.evaluation.scores import Evaluation, Measurement
from coin.evaluation.variants import NONE, ORACLE, Variant, read_coded, read_copies
from coin.merging.expert_sources import ExpertFiles
from coin.modules.coded_file import SystemFile
from coin.networks.calling import as_input
from coin.networks.files import load_network, open_network


class DecodingEvaluator(LightningModule):
    """Measures how well lost experts are decoded, on every task's test set. The data is a `coin.data.Tasks`.

    A network runs once a batch, where its answers are read: with ``expert_head`` alone an expert does on its own task's
    test set only. Decoders are fitted on the pooled calibration samples first, and promises are made of what is decoded
    of other samples, if the datamodule has some. After ``trainer.test`` the results are in `measurements`. Beside the
    methods stand ``none``, the surviving experts alone, and ``oracle``, Σβ_if_i as the coded output (NDA 1), where a
    decoder that is asked for reads these. ``trainer.evaluate`` gives the data the experts' image size.

    NDA is not logged through ``self.log``: it is one number per method and decoder, known when all is measured, and no
    curve. ``trainer.evaluate`` hands the results to `coin.trainer.record`, which writes ``results.csv`` and puts
    ``nda/METHOD/DECODER`` into the summary of the W&B run (`coin.tracking.evaluation`).

    Args:
        experts: The experts' safetensors files by task, in the order of the datamodule's tasks.
        coded: The coded models' safetensors files.
        decoders: Their kinds; by default all, but expert_head only if head and
            features give the experts' logits.
        code: The code of the references, R×N; by default the first coded model's.
        replicas: The files of compressed experts, each of which replaces its own expert.
        alpha: α of the promises (`coin.promised_threshold`).
        confidence: The probability that a promise holds.
        memory_mib: Up to so many MiB networks stay in memory whose answers are not read next; those that are read
            together may take more. By default 8192, on a GPU half of what is free.

    Raises ConfigurationError where there is nothing to evaluate, FileError where a coded model is of other experts.
    """

    progress: "tqdm[Any]" = tqdm(
        disable=True
    )  # counts the samples; set by `coin.trainer.Trainer.evaluate`

    def __init__(
        self,
        experts: dict[str, str],
        coded: list[str] | None = None,
        decoders: list[str] | None = None,
        code: list[list[float]] | None = None,
        replicas: list[str] | None = None,
        alpha: float = 0.02,
        confidence: float = 0.95,
        memory_mib: int | None = None,
    ) -> None:
        super().__init__()
        if not experts:
            raise ConfigurationError("found no experts, expected at least one")
        distinct_decoders(decoders)
        self.decoders = decoders
        self.alpha = alpha
        self.confidence = confidence
        self.measurements: list[Measurement] = []

        self.experts = ExpertFiles({task: Path(path) for task, path in experts.items()})
        self.coded_files = [Path(path) for path in coded or []]
        copies = [Path(path) for path in replicas or []]
        loads = [partial(self.experts.network, place) for place in range(len(experts))]
        loads += [partial(_load_coded, path) for path in self.coded_files]
        loads += [partial(_load_copy, path) for path in copies]
        self.networks = NetworkCache(loads, memory_mib)

        fingerprints = list(self.experts.fingerprints.values())
        modules, self.variants = read_coded(self.coded_files, fingerprints)
        for place, module in enumerate(modules, start=len(experts)):
            self.networks.hold(place, module)
        if code is not None:
            self.code = Code(code)
        elif self.variants:
            self.code = self.variants[0].code
        else:
            self.code = uniform(len(experts))
        if self.code.num_experts != len(experts):
            raise ConfigurationError(
                f"found a code for {self.code.num_experts} experts, expected {len(experts)}"
            )
        self.variants.append(Variant(NONE, self.code))
        self.variants.append(Variant(ORACLE, self.code))
        self.variants += read_copies(copies, fingerprints, self.code, len(modules))

    def on_test_start(self) -> None:
        """Check the data, fit every decoder on the calibration samples, and make promises, all on every process."""
        data = tasks_of(self)
        self._check(data)
        calibration = data.calibration()
        promise = data.promise_samples()
        self.networks.move(self.device, self.trainer.precision_plugin.convert_module)
        inputs = as_input(next(iter(calibration)), self.networks.networks([0])[0])
        self.evaluation = Evaluation(
            self.networks.networks,
            self.variants,
            self.decoders,
            self.experts.class_counts,
            inputs,
        )
        samples = calibration.num_samples if self.evaluation.to_fit else 0
        if not self.evaluation.to_promise:
            promise = None
        if promise is not None:
            samples += promise.num_samples
        for task in data.tasks.values():
            samples += math.ceil(len(task.splits.test) / self.trainer.world_size)
        self.progress.total = samples
        with self.trainer.precision_plugin.forward_context():  # as in the test
            self.evaluation.fit(self._batches(calibration))
            if promise is not None:
                self.evaluation.promise(self._batches(promise), self.alpha, self.confidence)

    def _check(self, data: Tasks) -> None:
        """Raise ConfigurationError unless the data is of the experts' tasks, and of the kind that networks read."""
        found = [(name, task.num_classes) for name, task in data.tasks.items()]
        expected = list(zip(self.experts.paths, self.experts.class_counts, strict=True))
        if found != expected:
            raise ConfigurationError(
                f"found data of tasks {dict(found)}, expected those of the experts, {dict(expected)}; "
                "name the same in the same order"
            )
        for task in data.tasks.values():
            self.experts.config.check_content(task.content, task.vocabulary)

    def _batches(self, calibration: Calibration) -> Iterator[tuple[Batch, Tensor]]:
        """Yield the batches of samples on the device, with the task of each sample."""
        done = 0
        for batch in calibration.on(self.device):
            size = size_of(batch)
            yield batch, calibration.part[done : done + size]
            done += size
            self.progress.update(size)

    def test_step(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Run the networks on one batch of task `dataloader_idx`, and decode and score their answers on the CPU."""
        inputs, labels = batch
        self.evaluation.update(dataloader_idx, inputs, labels)
        self.progress.update(len(labels))

    def on_test_epoch_end(self) -> None:
        """Collect the totals of all processes into `measurements`."""
        # Processes add up where their device is: NCCL reduces no tensors of the CPU.
        if self.trainer.world_size > 1:
            for metric in self.evaluation.metrics:
                metric.to(self.device)
        self.measurements = self.evaluation.measurements(list(self.experts.paths))

    def teardown(self, stage: str) -> None:
        """Take what is held from the device, as Lightning takes the module."""
        self.networks.move(torch.device("cpu"))

    def save_systems(self, folder: Path) -> None:
        """Write every variant, once it is tested, with its decoders and promises to a file called by its label."""
        for variant in self.variants:
            if variant.is_copy or not variant.networks:
                continue
            fitted = [each.decoder for each in self.evaluation.fitted if each.variant is variant]
            system = SystemFile(
                code=variant.code,
                names=list(self.experts.paths),
                classes=self.experts.class_counts,
                decoders=fitted,
                experts=list(self.experts.fingerprints.values()),
                coded_files=[self.coded_files[network] for network in variant.networks],
                expert_files=list(self.experts.paths.values()),
            )
            system.save(folder / f"{variant.method}.safetensors")


def _load_coded(path: Path) -> nn.Module:
    """Return a coded model as it answers, packed where it is stored so."""
    return open_network(path).module()


def _load_copy(path: Path) -> nn.Module:
    """Return the whole network of a compressed copy."""
    return load_network(path).network
