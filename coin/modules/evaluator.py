"""The evaluator: measures how well lost experts are decoded (NDA), for all methods in one pass of each network."""

import math
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from tqdm import tqdm

from coin.coding import Answers, Code, DecoderKind, distinct_decoders, uniform
from coin.data import Calibration
from coin.data.tasks import Tasks, tasks_of
from coin.errors import ConfigurationError
from coin.evaluation.held import HeldNetworks
from coin.evaluation.scores import Evaluation, Measurement, server_answers, with_heads
from coin.evaluation.variants import NONE, ORACLE, Variant, read_coded, read_replicas
from coin.files.tensors import fingerprint
from coin.modules.coded_file import SystemFile
from coin.networks import load_network, run_network
from coin.networks.calling import as_input
from coin.networks.files import open_network
from coin.reporting.results import requested_policy


class DecodingEvaluator(LightningModule):
    """Measures how well lost experts are decoded, on every task's test set. The data is a `coin.data.Tasks`.

    A network runs once a batch, where its answers are read: with ``expert_head`` alone an expert does on its own task's
    test set only. Promises are made of what all networks answer. Decoders are fitted on the pooled calibration samples
    first. After ``trainer.test`` the results are in `measurements`. Beside the methods stand ``none``, the surviving
    experts alone, and ``oracle``, Σβ_if_i as the coded output (NDA 1), where a decoder that is asked for reads these.

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
        alpha: α of the promises (`coin.promised_threshold`), if the datamodule has samples for these.
        confidence: The probability that a promise holds.
        memory_mib: Bound on the experts and copies that are held, in MiB; where not all fit, those alone are held whose
            answers are read next. By default 8192, on a GPU half of what is free.

    Raises ConfigurationError where there is nothing to evaluate, FileError where a coded model is of other experts.
    """

    progress: "tqdm[Any]" = tqdm(disable=True)  # what counts the samples, from outside

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
        self.tasks = tuple(experts)
        self.decoders = distinct_decoders(decoders)
        self.takes_all_decoders = decoders is None
        self.alpha = alpha
        self.confidence = confidence
        self.measurements: list[Measurement] = []

        self.expert_files = [Path(path) for path in experts.values()]
        described = [open_network(path) for path in self.expert_files]
        self.config = described[0].config
        self.class_counts = [file.num_classes for file in described]
        width = max(self.class_counts)
        self.networks = HeldNetworks(width, memory_mib)
        self.fingerprints = []
        sizes = []
        for path in self.expert_files:
            self.networks.make_room()
            network = load_network(path).network
            self.fingerprints.append(fingerprint(network.state_dict()))
            padded = self.networks.add(path, network)
            sizes.append(sum(tensor.nbytes for tensor in padded.state_dict().values()))
        self.network_nbytes = sizes[0]

        self.coded_files = [Path(path) for path in coded or []]
        coded_networks, self.variants = read_coded(self.coded_files, self.fingerprints)
        self.coded = nn.ModuleList(coded_networks)
        expert_head = DecoderKind.expert_head
        has_bodies = any(each.adapted for each in self.variants)
        if has_bodies and expert_head not in self.decoders:
            self.decoders.append(expert_head)  # the only one that reads bodies with adapters

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
        copies = [Path(path) for path in replicas or []]
        self.replicas = read_replicas(copies, self.fingerprints, self.code)
        self.eval().requires_grad_(False)

    def forward(
        self,
        inputs: Tensor,
        tasks: int | Tensor | None = None,
        read: Collection[int] | None = None,
    ) -> Answers:
        """Return the experts' and coded models' answers to inputs ``[B, ...]``, with adapters those for the tasks.

        Only the servers at the places in `read` run, by default all of them.
        """
        features = any(each.reads_features for each in self.decoders)
        count = len(self.expert_files)
        running = set(range(count + len(self.coded)) if read is None else read)
        self._need(running)
        experts = [
            self.networks[path] if place in running else None
            for place, path in enumerate(self.expert_files)
        ]
        coded = [
            network if count + row in running else None for row, network in enumerate(self.coded)
        ]
        return server_answers([*experts, *coded], count, inputs, features, tasks)

    def _need(self, read: Collection[int], copies: Collection[Path] = ()) -> None:
        """Read the experts among these places, and copies, that are not held."""
        experts = [path for place, path in enumerate(self.expert_files) if place in read]
        self.networks.need([*experts, *copies])

    def _each_expert(self) -> Iterator[nn.Module]:
        """Yield the experts, one after another."""
        for path in self.expert_files:
            self.networks.need([path])
            yield self.networks[path]

    def on_test_start(self) -> None:
        """Check the data and fit every decoder on the calibration samples."""
        data = tasks_of(self)
        self._check(data)
        calibration = data.calibration()
        promise = data.promise_samples()
        self.networks.place(self.device, self.trainer.precision_plugin.convert_module)
        needed = not self.takes_all_decoders
        first = as_input(next(iter(calibration)), next(self._each_expert()))
        self.decoders, heads = with_heads(self.decoders, self._each_expert(), first, needed=needed)
        self.evaluation = Evaluation(
            self.variants, self.decoders, self.class_counts, heads, self.replicas
        )
        if not self.evaluation.fitted and not self.replicas:
            names = ", ".join(each.name for each in self.decoders)
            raise ConfigurationError(
                f"found nothing that the decoders {names} can measure, expected coded models, replicas, or a decoder "
                "that reads survivors"
            )
        read = self.evaluation.read_by_fit()
        samples = calibration.num_samples if read else 0
        if not self.evaluation.fitted:
            promise = None
        if promise is not None:
            samples += promise.num_samples
        for task in data.tasks.values():
            samples += math.ceil(len(task.splits.test) / self.trainer.world_size)
        self.progress.total = samples
        if read:
            self._need(read)
            started = time.perf_counter()
            answers = self._answers(calibration, read)
            seconds = time.perf_counter() - started
            # Networks run together; a decoder is charged with those that it needs.
            self.evaluation.fit(answers, seconds / len(read) / answers.num_samples)
        if promise is not None:
            self.evaluation.promise(self._answers(promise), self.alpha, self.confidence)

    def _check(self, data: Tasks) -> None:
        """Raise ConfigurationError unless the data is of the experts' tasks, and of the kind that networks read."""
        found = [(name, task.num_classes) for name, task in data.tasks.items()]
        expected = list(zip(self.tasks, self.class_counts, strict=True))
        if found != expected:
            raise ConfigurationError(
                f"found data of tasks {dict(found)}, expected those of the experts, {dict(expected)}; "
                "name the same in the same order"
            )
        for task in data.tasks.values():
            self.config.check_content(task.content, task.vocabulary)

    def _answers(self, calibration: Calibration, read: Collection[int] | None = None) -> Answers:
        parts: list[Answers] = []
        done = 0
        with self.trainer.precision_plugin.forward_context():  # as in the test
            for batch in calibration.on(self.device):
                tasks = calibration.part[done : done + len(batch)]
                parts.append(self(batch, tasks, read).cpu())
                done += len(batch)
                self.progress.update(len(batch))
        return replace(Answers.concatenate(parts), tasks=calibration.part)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Read what the task's decoders read, and the copies of its expert, before its first batch."""
        if batch_idx == 0:
            task = dataloader_idx
            copies = [replica.path for replica in self.replicas if replica.task == task]
            self._need(self.evaluation.read_of_task(task), copies)

    def test_step(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Decode one batch of task `dataloader_idx` for every erasure that its expert is part of, on the CPU."""
        task = dataloader_idx
        inputs = batch[0]
        labels = batch[1].cpu()
        # Where the decoders were fitted; not every device has float64.
        answers = self(inputs, task, self.evaluation.read_of_task(task)).cpu()
        self.evaluation.update(task, answers, labels)
        for replica, scores in self.evaluation.replicas:
            if replica.task == task:
                run = run_network(self.networks[replica.path], inputs, features=False)
                scores.update(run.logits.cpu(), answers.experts[task], labels)
        self.progress.update(len(labels))

    def on_test_epoch_end(self) -> None:
        """Collect the totals of all processes into `measurements`."""
        # Processes add up where their device is: NCCL reduces no tensors of the CPU.
        if self.trainer.world_size > 1:
            for metric in self.evaluation.metrics:
                metric.to(self.device)
        self.measurements = self.evaluation.measurements(self.tasks)

    def teardown(self, stage: str) -> None:
        """Take what is held from the device, as Lightning takes the module."""
        self.networks.place(torch.device("cpu"))

    def save_systems(self, folder: Path) -> None:
        """Write every variant with its fitted decoders and promises to a file called as its coded models' are."""
        for variant in self.variants:
            paths = [self.coded_files[network] for network in variant.networks]
            if not paths:
                continue
            name = paths[0].name.removesuffix(".safetensors").removesuffix(".row-0")
            system = SystemFile(
                variant.code,
                self.tasks,
                self.class_counts,
                [each.decoder for each in self.evaluation.fitted if each.variant is variant],
                self.fingerprints,
                coded_files=paths,
                expert_files=self.expert_files,
                told={"method": variant.method, "batchnorm": requested_policy(variant.batchnorm)},
            )
            system.save(folder / f"{name}.safetensors")
