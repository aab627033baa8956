"""The steps from experts to what stands in for them: statistics, coded models, compressed copies."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.loggers import Logger

import coin.distillation  # noqa: F401 (its methods, which files name by their classes)
from coin.coding import Code, convex
from coin.coding.decoder_config import REPLICA
from coin.core.devices import has_float64
from coin.core.processes import is_rank_zero
from coin.data import TaskData
from coin.data.tasks import Tasks
from coin.errors import ConfigurationError
from coin.files.atomic import hashes
from coin.files.tensors import fingerprint
from coin.merging import Experts, Method
from coin.merging.expert_sources import ExpertFiles
from coin.networks import Compression, compress, load_network, save_network
from coin.networks.batchnorm import batchnorms
from coin.networks.files import int8_path, kept_base, save_compressed
from coin.pipeline.config import CalibrationConfig
from coin.pipeline.options import config_dict, result_options, training_tasks
from coin.pipeline.step import Step, keyed_by, unkeyed
from coin.pipeline.steps.train import ExpertStep, WriteInitial
from coin.statistics.fisher import DEFAULT_MEMORY_MIB
from coin.statistics.statistic import Statistic
from coin.tracking.runs import RunLog
from coin.trainer import estimate_over_tasks, make_trainer


def datamodule(tasks: Mapping[str, TaskData], calibration: CalibrationConfig) -> Tasks:
    """Return tasks as a datamodule with the experiment's calibration options."""
    sizes = calibration.samples_per_task, calibration.batch_size
    return Tasks(tasks, *sizes, promise_samples=calibration.promise_samples)


def samples_key(calibration: CalibrationConfig) -> dict[str, Any]:
    """Return what decides which calibration samples are drawn."""
    return {name: getattr(calibration, name) for name in ("samples_per_task", "batch_size")}


@dataclass(frozen=True, eq=False, kw_only=True)
class EstimateStatistic(Step):
    """Computes a statistic of a task's expert over calibration samples of its own task, or of all `tasks`."""

    file: ClassVar[str] = "statistic.safetensors"
    collective: ClassVar[bool] = True

    which: Statistic
    task_name: str
    expert: ExpertStep
    tasks: dict[str, TaskData] = keyed_by(training_tasks)
    calibration: CalibrationConfig = unkeyed()
    trainer: dict[str, Any] = unkeyed()
    pass_options: dict[str, Any] = field(init=False)
    doing: str = unkeyed(default="computing")

    def __post_init__(self) -> None:
        options = self.calibration.options_of(self.which)
        own: dict[str, Any] = {} if options is None else {"mc_samples": options.mc_samples}
        if options is not None and options.memory_mib != DEFAULT_MEMORY_MIB:
            own["memory_mib"] = options.memory_mib  # the order of a sum: its last bits
        object.__setattr__(self, "pass_options", samples_key(self.calibration) | own)

    def run(self) -> None:
        """Compute it, and write its file; every process takes part."""
        estimate_over_tasks(
            make_trainer(self.folder, self.trainer),
            load_network(self.expert.output).network,
            datamodule(self.tasks, self.calibration),
            self.calibration.options_of(self.which),
            self.output,
            task=self.task_name,
            data=str(self.which.data),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Merge(Step):
    """Makes a method's coded models, one a row of the code, and their compressed variants."""

    method: Method
    code: Code = keyed_by(lambda code: code.matrix.tolist())
    experts: dict[str, ExpertStep]
    statistics: dict[Statistic, dict[str, EstimateStatistic]]
    initial: WriteInitial | None  # given, as the trainer, to methods that read it only
    tasks: dict[str, TaskData] = keyed_by(training_tasks)
    seed: int
    calibration: CalibrationConfig = keyed_by(samples_key)
    trainer: dict[str, Any] | None = keyed_by(lambda trainer: trainer and result_options(trainer, training=True))
    hardware: dict[str, Any] = unkeyed()  # the ``trainer`` section, which says on which device it runs
    log: RunLog = unkeyed()
    doing: str = unkeyed(default="merging")

    @property
    def collective(self) -> bool:  # type: ignore[override]
        """Whether all processes run it."""
        return self.method.is_trained

    @property
    def alone(self) -> bool:  # type: ignore[override]
        """Whether any one process runs it."""
        return not self.method.is_trained

    @property
    def outputs(self) -> list[Path]:
        """The files of the coded models, followed by those of the compressed variants."""
        return coded_paths(self.method, self.code.num_coded, self.folder)

    def run(self) -> None:
        """Make the coded models."""
        initial = None if self.initial is None else self.initial.output
        device = merging_device(self.folder, self.hardware)
        files = ExpertFiles({task: step.output for task, step in self.experts.items()}, initial, device)
        read = {which: {task: each.output for task, each in own.items()} for which, own in self.statistics.items()}
        data = datamodule(self.tasks, self.calibration)
        data.setup()
        samples, train = list(data.calibrations().values()), None
        with ExitStack() as stack:
            if self.trainer is not None:
                loggers = stack.enter_context(self.log.open(self.folder))
                train = Training(data, self.folder, self.seed, self.trainer, loggers)
            experts = Experts(files, statistics=read, calibration=samples, train=train)
            make_coded_models(self.method, self.code, experts, self.folder, self.calibration.samples_per_task)


def merging_device(folder: Path, trainer: Mapping[str, Any]) -> torch.device:
    """Return the device of a ``trainer`` section, on which merges run too; the CPU where that has no float64."""
    device = make_trainer(folder, trainer).strategy.root_device
    return device if has_float64(device) else torch.device("cpu")


@dataclass
class Training:
    """Trains coded models, in place of `coin.distillation.method.fit_in_memory`."""

    tasks: Tasks
    folder: Path
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)  # the experiment's ``trainer`` section
    loggers: Sequence[Logger] = ()  # of the final run

    def run_options(self, experts: Experts, method: Any) -> dict[str, Any]:
        """Return the experts' files, and the experiment's number of samples and seed unless the method sets them."""
        assert isinstance(experts.source, ExpertFiles)
        return {
            "experts": list(map(str, experts.source.paths.values())),
            "samples_per_task": method.samples_per_task or self.tasks.samples_per_task,
            "seed": self.seed if method.seed is None else method.seed,
        }

    def fit(self, module: LightningModule, experts: Experts, held_out: float, options: dict[str, Any]) -> None:
        """Run the experiment's Trainer."""
        samples, batch_size, seed = (module.hparams[name] for name in ("samples_per_task", "batch_size", "seed"))
        data = Tasks(self.tasks.tasks, samples, batch_size, held_out, seed)
        loggers = False if held_out else list(self.loggers) or False
        trainer = make_trainer(self.folder, self.options, logger=loggers, **options)
        seed_everything(seed, workers=True, verbose=False)
        trainer.fit(module, datamodule=data)


def make_coded_models(
    method: Method, code: Code, experts: Experts, folder: Path, samples_per_task: int | None
) -> list[Path]:
    """Make the coded models of one method, one per row of the code, write them, and return their files.

    P, `samples_per_task`, is recorded in the files. Raises ConfigurationError if an input of the method is missing.
    """
    files = experts.source
    assert isinstance(files, ExpertFiles)
    paths = coded_paths(method, code.num_coded, folder)
    read = [*files.paths.values(), *(path for own in experts.statistic_paths.values() for path in own.values())]
    read += [files.initial] if method.reads_initial and files.initial is not None else []
    for index, row in enumerate(code.matrix.tolist()):
        started, passes, elsewhere = time.perf_counter(), experts.passes, experts.seconds
        made = method.coded_model(experts, row)
        seconds = time.perf_counter() - started + experts.seconds - elsewhere
        took = experts.passes - passes
        if not is_rank_zero():
            continue
        provenance = {
            "made_by": "coin merge",
            "label": method.label,
            "method": {"name": method.name, "options": config_dict(method)},
            "batchnorm": str(method.batchnorm) if batchnorms(files.skeleton) else "",
            "code": code.matrix.tolist(),
            "row": index,
            "tasks": list(files.paths),
            "class_counts": [file.num_classes for file in files.opened.values()],
            "experts": list(files.fingerprints.values()),
            "samples_per_task": method.samples_per_task or samples_per_task,
            "sha256": hashes(read),
            "seconds": seconds,
            "passes": took,
            "chosen": made.chosen,
        }
        path, *smaller = paths[index :: code.num_coded]
        save_network(path, made.network, files.config, files.width, provenance, made.adapters)
        for small, how in zip(smaller, method.compress, strict=True):
            began, spent = time.perf_counter(), experts.passes - took
            base, beside = kept_base(small, files.initial, how)
            packed = method.pack(experts, row, made, beside, how)
            metadata = {**provenance, "label": f"{method.label}-{how.name}", "passes": experts.passes - spent}
            metadata["seconds"] = seconds + time.perf_counter() - began
            save_compressed(small, packed, files.config, files.width, base, how, metadata)
    return paths


def read_code(option: list[list[float]] | int | None, num_experts: int) -> Code:
    """Return the code for the option `code` and N experts; a CoinError where it is none, or not for so many."""
    code = Code(option) if isinstance(option, list) else convex(num_experts, 1 if option is None else option)
    if code.num_experts != num_experts:
        raise ConfigurationError(f"found a code for {code.num_experts} experts, expected {num_experts}")
    return code


def variant_files(method: Method) -> list[str]:
    """Return the names of a method's coded models and of every compression of them, which results have too."""
    return [method.label, *(f"{method.label}-{each.name}" for each in method.compress)]


def coded_paths(method: Method, num_coded: int, folder: Path) -> list[Path]:
    """Return the files of a method's coded models, one a row of the code, followed by those of every compression."""
    names = variant_files(method)
    rows = [""] if num_coded == 1 else [f".row-{row}" for row in range(num_coded)]
    return [folder / f"{name}{row}.safetensors" for name in names for row in rows]


@dataclass(frozen=True, eq=False, kw_only=True)
class CompressExperts(Step):
    """Writes a compressed copy of every expert."""

    alone: ClassVar[bool] = True

    compression: Compression
    experts: dict[str, ExpertStep]
    initial: WriteInitial
    doing: str = unkeyed(default="compressing")

    @property
    def outputs(self) -> dict[str, Path]:
        """The copies by task."""
        return {task: self.folder / f"{task}.{self.compression.name}.safetensors" for task in self.experts}

    def run(self) -> None:
        """Write the copies, and the 8-bit base of some beside them."""
        for task, output in self.outputs.items():
            compress_file(self.experts[task].output, output, self.initial.output, self.compression)


def compress_file(network: Path, output: Path, base: Path | None, compression: Compression) -> None:
    """Compress a network's file to another one; a compressed coded model keeps its metadata, with its own label."""
    read = [network, *([base, int8_path(output, base)] if base else [])]
    if output.resolve() in [path.resolve() for path in read]:
        raise ConfigurationError(f"found the output '{output}', which is read; expected another file, give --output")
    file = load_network(network)
    made = file.provenance
    if "code" in made:
        metadata = {**made, "label": f"{made['label']}-{compression.name}"}
    else:
        metadata = {"label": f"{REPLICA}-{compression.name}", "task": made.get("task")}
    inputs = hashes(each for each in (network, base) if each)
    metadata |= {"made_by": "coin compress", "of": fingerprint(file.network.state_dict()), "sha256": inputs}
    started = time.perf_counter()
    base, beside = kept_base(output, base, compression)
    packed = compress(file.network, beside, bits=compression.bits, base_bits=compression.base_bits)
    metadata["seconds"] = made.get("seconds", 0.0) + time.perf_counter() - started
    save_compressed(output, packed, file.config, file.num_classes, base, compression, metadata)
