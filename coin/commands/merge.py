"""``coin merge``: experts and statistics from files in, coded models as files out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coin.data import TaskData
from coin.data.tasks import Tasks
from coin.errors import ConfigurationError, FileError
from coin.files.safetensors import load_provenance
from coin.merging import Experts, Method
from coin.merging.expert_sources import ExpertFiles
from coin.pipeline.steps.merge import Training, make_coded_models, merging_device, read_code
from coin.statistics import FisherKind
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind


def merge(
    experts: dict[str, Path],
    method: Method,
    output: Path,
    code: list[list[float]] | int | None = None,
    fisher: dict[str, Path] | None = None,
    gram: dict[str, Path] | None = None,
    initial: Path | None = None,
    tasks: dict[str, TaskData] | None = None,
    samples_per_task: int = 200,
    batch_size: int = 64,
    seed: int = 0,
    trainer: dict[str, Any] | None = None,
) -> list[Path]:
    """Merge experts into coded models, as files.

    Args:
        experts: The experts' safetensors files by task.
        method: The merge method.
        output: The folder for the coded models: ``METHOD.safetensors``, or ``METHOD.row-r.safetensors``.
        code: R rows of N coding weights, or a number R for the predefined code of R coded models
            (`coin.coding.convex`); by default one coded model with equal weights.
        fisher: The experts' Fisher files by task, for the methods that need them.
        gram: The experts' Gram files by task, for the methods that need them.
        initial: The shared initialisation's file, for the methods that need it.
        tasks: The tasks by name, for methods and BatchNorm policies that use calibration data.
        samples_per_task: P, the calibration samples of each task.
        batch_size: Calibration samples per batch.
        seed: The seed of the calibration samples and their order.
        trainer: Options of the Trainer, for distillation; its ``accelerator`` and ``devices`` say where merges run, by
            default on the CPU, where the experts' files are.
    """
    statistics: dict[Statistic, dict[str, Path]] = {}
    samples: int | None = None  # P, as the statistics' files say
    for kind, files in ((StatisticKind.fisher, fisher), (StatisticKind.gram, gram)):
        for task, path in (files or {}).items():
            made = load_provenance(path)
            samples = samples or made.get("samples_per_task")
            which = _statistic(kind, made, path)
            statistics.setdefault(which, {})[task] = path
    device = merging_device(output, trainer or {"accelerator": "cpu"})
    opened = ExpertFiles(experts, initial, device)
    calibration = None
    train = None
    if tasks is not None:
        if list(tasks) != list(experts):
            raise ConfigurationError(
                f"found tasks {list(tasks)} for experts {list(experts)}, expected the same order"
            )
        data = Tasks(tasks, samples_per_task, batch_size, seed=seed)
        data.resize(opened.config.image_size)
        for each in data.tasks.values():
            opened.config.check_content(each.content, each.vocabulary)
        data.prepare_data()
        data.setup()
        calibration = list(data.calibrations().values())
        samples = samples_per_task
        train = Training(data, output, seed, trainer or {})
    elif method.is_trained:
        raise ConfigurationError(
            "found no tasks, expected them: distillation trains on their calibration samples"
        )
    for needed in method.statistics():
        for which in statistics:
            if which.name is needed.name:
                method = method.with_defaults(which.kind or FisherKind.exact, which.data)
    stored = Experts(opened, statistics=statistics, calibration=calibration, train=train)
    return make_coded_models(method, read_code(code, len(experts)), stored, output, samples)


def _statistic(name: StatisticKind, made: Mapping[str, Any], path: Path) -> Statistic:
    """Return the statistic that a file holds, by its metadata."""
    try:
        kind = FisherKind(made["kind"]) if name is StatisticKind.fisher else None
        return Statistic(name, DataChoice(made["data"]), kind)
    except KeyError as error:
        raise FileError(
            f"'{path}' does not say what {name} it holds of what; make it with coin fisher"
        ) from error
