"""The steps from experts to what stands in for them: statistics, coded models, compressed copies."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.loggers import Logger

import coin.distillation  # noqa: F401 (its methods, which files name by their classes)
from coin.coding import Code, convex
from coin.coding.decoder_config import REPLICA
from coin.core.devices import has_float64
from coin.core.processes import is_rank_zero
from coin.data import Augmentation, Calibration
from coin.data.tasks import Tasks
from coin.errors import ConfigurationError
from coin.files.atomic import hashes, link
from coin.files.tensors import fingerprint
from coin.merging import Experts, Method
from coin.merging.expert_sources import ExpertFiles
from coin.merging.provenance import Provenance
from coin.networks import Compression, compress, load_network, save_network
from coin.networks.batchnorm import batchnorms
from coin.networks.files import save_compressed
from coin.pipeline.step import Step
from coin.pipeline.steps.imported import ImportExpert
from coin.pipeline.steps.train import TrainNetwork, WriteInitial
from coin.reporting.results import as_json
from coin.statistics import FisherOptions
from coin.statistics.statistic import Statistic
from coin.tracking.runs import RunLog
from coin.trainer import Trainer, estimate_over_tasks, make_trainer

ExpertStep = TrainNetwork | ImportExpert


@dataclass(frozen=True, eq=False, kw_only=True)
class EstimateStatistic(Step):
    """Computes a statistic of a task's expert over calibration samples of its own task, or of all `tasks`."""

    file: ClassVar[str] = "statistic.safetensors"
    doing: ClassVar[str] = "computing"
    collective: ClassVar[bool] = True

    expert: ExpertStep
    fisher: FisherOptions | None  # none for Gram matrices
    trainer: dict[str, Any]

    def run(self) -> None:
        """Compute it, and write its file; every process takes part."""
        (task,) = self.expert.tasks
        estimate_over_tasks(
            make_trainer(self.folder, self.trainer),
            load_network(self.expert.output).network,
            Tasks(self.tasks, self.config["samples_per_task"], self.config["batch_size"]),
            self.fisher,
            self.output,
            task=task,
            data=self.config["data"],
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Merge(Step):
    """Makes a method's coded models, one a row of the code, and their compressed variants."""

    doing: ClassVar[str] = "merging"

    method: Method
    experts: dict[str, ExpertStep]
    statistics: dict[Statistic, dict[str, EstimateStatistic]]
    initial: WriteInitial | None  # for methods that read it
    trainer: dict[str, Any]
    log: RunLog

    @property
    def collective(self) -> bool:  # type: ignore[override]
        """Whether all processes run it."""
        return self.method.is_trained

    @property
    def outputs(self) -> list[Path]:
        """The files of the coded models, followed by those of the compressed variants."""
        return coded_paths(self.method, len(self.config["code"]), self.folder)

    def run(self) -> None:
        """Make the coded models."""
        paths = {task: step.output for task, step in self.experts.items()}
        initial = None if self.initial is None else self.initial.output
        files = ExpertFiles(paths, initial, merging_device(self.folder, self.trainer))
        statistics = {
            which: {task: step.output for task, step in steps.items()}
            for which, steps in self.statistics.items()
        }
        samples = self.config["samples_per_task"]
        data = Tasks(self.tasks, samples, self.config["batch_size"])
        data.setup()
        calibration = list(data.calibrations().values())
        with ExitStack() as stack:
            train = None
            if self.method.is_trained:
                loggers = stack.enter_context(self.log.open(self.folder))
                seed = self.config["seed"]
                train = Training(data, self.folder, seed, self.trainer, loggers)
            experts = Experts(files, statistics=statistics, calibration=calibration, train=train)
            code = Code(self.config["code"])
            make_coded_models(self.method, code, experts, self.folder, samples)


def merging_device(folder: Path, trainer: Mapping[str, Any]) -> torch.device:
    """Return the device of a ``trainer`` section, on which merges run too; the CPU where that has no float64."""
    device = make_trainer(folder, trainer).strategy.root_device
    return device if has_float64(device) else torch.device("cpu")


@dataclass
class Training:
    """What methods that train get of an experiment: their calibration samples and their Trainer."""

    tasks: Tasks
    folder: Path
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)  # the experiment's ``trainer`` section
    loggers: Sequence[Logger] = ()  # of the final run

    def calibration(self, method: Any) -> list[Calibration]:
        """Return each task's samples, as many as the method or else the experiment says; the same for the seed."""
        samples = method.samples_per_task or self.tasks.samples_per_task
        seed = self.seed if method.seed is None else method.seed
        for task in self.tasks.tasks.values():
            task.check_augmentation(Augmentation(method.augmentation))
        tasks = Tasks(self.tasks.tasks, samples, method.batch_size, seed=seed)
        return list(tasks.calibrations().values())

    def trainer(self, *, is_final: bool, **options: Any) -> Trainer:
        """Return the experiment's Trainer with some options; it logs the final run."""
        loggers = list(self.loggers) if is_final else []
        return make_trainer(self.folder, self.options, logger=loggers or False, **options)


def make_coded_models(
    method: Method, code: Code, experts: Experts, folder: Path, samples_per_task: int | None
) -> list[Path]:
    """Make the coded models of one method, one per row of the code, write them, and return their files.

    P, `samples_per_task`, is recorded in the files. Raises ConfigurationError if an input of the method is missing.
    """
    files = experts.source
    assert isinstance(files, ExpertFiles)
    read = list(files.paths.values())
    for statistic in experts.statistic_paths.values():
        read += statistic.values()
    if method.reads_initial and files.initial_path is not None:
        read.append(files.initial_path)
    every_path = coded_paths(method, code.num_coded, folder)
    for each in method.coded_models(experts, code, whole_only=not is_rank_zero()):
        if not is_rank_zero():
            continue
        made_by = Provenance(
            label=each.label,
            method={"name": method.name, "options": json.loads(as_json(vars(method)))},
            batchnorm=str(method.batchnorm) if batchnorms(files.skeleton) else "",
            code=code.matrix.tolist(),
            row=each.row,
            tasks=list(files.paths),
            class_counts=files.class_counts,
            experts=list(files.fingerprints.values()),
            samples_per_task=method.samples_per_task or samples_per_task,
            chosen=each.made.chosen,
            seconds=each.seconds,
            passes=each.passes,
            sha256=hashes(read),
        ).as_dict()
        place = variant_files(method).index(each.label) * code.num_coded + each.row
        path = every_path[place]
        made = each.made
        if each.packed is None or each.compression is None:
            save_network(path, made.network, files.config, files.width, made_by, made.adapters)
        else:
            save_compressed(
                path, each.packed, files.config, files.width, None, each.compression, made_by
            )
    return every_path


def read_code(option: list[list[float]] | int | None, num_experts: int) -> Code:
    """Return the code for the option `code` and N experts; a CoinError where it is none, or not for so many."""
    code = (
        Code(option)
        if isinstance(option, list)
        else convex(num_experts, 1 if option is None else option)
    )
    if code.num_experts != num_experts:
        raise ConfigurationError(
            f"found a code for {code.num_experts} experts, expected {num_experts}"
        )
    return code


def variant_files(method: Method) -> list[str]:
    """Return the names of a method's coded models and of every compression of them, which results have too."""
    return [method.label, *method.compressed_labels]


def coded_paths(method: Method, num_coded: int, folder: Path) -> list[Path]:
    """Return the files of a method's coded models, one a row of the code, followed by those of every compression."""
    names = variant_files(method)
    rows = [""] if num_coded == 1 else [f".row-{row}" for row in range(num_coded)]
    return [folder / f"{name}{row}.safetensors" for name in names for row in rows]


@dataclass(frozen=True, eq=False, kw_only=True)
class CompressExperts(Step):
    """Writes a compressed copy of every expert."""

    doing: ClassVar[str] = "compressing"

    compression: Compression
    experts: dict[str, ExpertStep]
    initial: WriteInitial

    @property
    def outputs(self) -> dict[str, Path]:
        """The copies by task."""
        return {
            task: self.folder / f"{task}.{self.compression.name}.safetensors"
            for task in self.experts
        }

    def run(self) -> None:
        """Write the copies, and the 8-bit base of some beside them."""
        base = self.initial.output
        if self.compression.base_bits == 32:  # the base as it is
            base = self.folder / base.name  # which copies of the folder have too
            link(base, self.initial.output)
        for task, output in self.outputs.items():
            compress_file(self.experts[task].output, output, base, self.compression)


def compress_file(network: Path, output: Path, base: Path | None, compression: Compression) -> None:
    """Compress a network's file to another one; a compressed coded model keeps its metadata, with its own label."""
    read = [network] if base is None else [network, base]
    if output.resolve() in [path.resolve() for path in read]:
        raise ConfigurationError(
            f"found the output '{output}', which is read; expected another file, give --output"
        )
    file = load_network(network)
    is_coded = "code" in file.provenance
    if compression.base_bits and is_coded:
        raise ConfigurationError(
            f"found '{network}', a coded model, which has no base, expected an expert; give --base_bits=0"
        )
    started = time.perf_counter()
    kept = None
    if compression.base_bits and base is not None:
        kept = load_network(base).network
    packed = compress(file.network, kept, bits=compression.bits, base_bits=compression.base_bits)
    packed.adapters = file.adapters
    seconds = time.perf_counter() - started
    if is_coded:
        made = Provenance.of(file)
        metadata = replace(
            made,
            label=f"{made.label}-{compression.name}",
            seconds=made.seconds + seconds,
            sha256=hashes(read),
            made_by="coin compress",
        ).as_dict()
    else:
        metadata = {
            "label": f"{REPLICA}-{compression.name}",
            "task": file.provenance.get("task"),
            "of": fingerprint(file.network.state_dict()),
            "seconds": seconds,
            "sha256": hashes(read),
            "made_by": "coin compress",
        }
    save_compressed(output, packed, file.config, file.num_classes, base, compression, metadata)
