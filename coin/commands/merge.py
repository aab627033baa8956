"""``coin merge``: experts and their statistics in, coded models out."""

from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from coin.commands.command import Call, Command
from coin.data import TaskData
from coin.data.tasks import Tasks, task_with
from coin.errors import ConfigurationError, FileError
from coin.experiment.codes import SeedCode, read_code
from coin.experiment.distillation import distill_rows
from coin.experiment.experts import Experts
from coin.experiment.merge import Ingredients, coded_paths, merge_experts
from coin.merging import MergeMethod
from coin.modules import Distillation
from coin.state import load_provenance


def merge(
    experts: dict[str, str],
    method: MergeMethod | Distillation,
    output: str,
    code: list[list[float]] | int | None = None,
    fisher: dict[str, str] | None = None,
    gram: dict[str, str] | None = None,
    initial: str | None = None,
    tasks: dict[str, TaskData] | None = None,
    samples_per_task: int = 200,
    batch_size: int = 64,
    seed: int = 0,
    trainer: dict[str, Any] | None = None,
) -> list[Path]:
    """Merge experts into coded models.

    Args:
        experts: The experts' safetensors files by task.
        method: The merge method.
        output: The folder for the coded models: ``METHOD.safetensors``, or ``METHOD.row-r.safetensors``.
        code: R rows of N coding weights, or a number R for the ready code of R coded models (`coin.coding.convex`);
            none weighs all experts alike, with one coded model.
        fisher: The experts' Fisher files by task, for the methods that need them.
        gram: The experts' Gram files by task, for the methods that need them.
        initial: The shared initialisation's file, for the methods that need it.
        tasks: The tasks by name, for methods and BatchNorm policies that look at calibration data.
        samples_per_task: P, the calibration samples of each task.
        batch_size: Calibration samples a batch.
        seed: Draws the calibration samples and their order.
        trainer: Options of the Trainer, for distillation.

    Returns:
        The files that were written.
    """
    paths = {task: Path(path) for task, path in experts.items()}
    matrix = read_code(code, len(paths))
    assert matrix is not None  # only an experiment chooses its code
    choice = SeedCode(matrix)
    statistics = {
        kind: {task: Path(path) for task, path in files.items()}
        for kind, files in (("fisher", fisher), ("gram", gram))
        if files
    }
    ingredients = Ingredients(Experts(paths), statistics, None, None if initial is None else Path(initial))
    data = None
    if tasks is not None:
        if list(tasks) != list(experts):
            raise ConfigurationError(
                f"found tasks {list(tasks)} for experts {list(experts)}; name the same, in one order"
            )
        size = ingredients.experts.config.image_size
        sized = {name: task_with(task, image_size=size) for name, task in tasks.items()}
        data = Tasks(sized, samples_per_task, batch_size, seed=seed)
        data.prepare_data()
        data.setup()
        ingredients.calibrations = data.calibrations()
    if isinstance(method, Distillation):
        if data is None:
            raise ConfigurationError("found no tasks, expected them: distillation trains on their calibration samples")
        written = coded_paths(method, matrix, Path(output))
        distill_rows(method, ingredients, choice, data, written, Path(output), seed=seed, trainer_options=trainer or {})
        return written
    # Without data to draw from, P is what the statistics say.
    samples = samples_per_task if data is not None else _samples(statistics)
    return merge_experts(method, choice, ingredients, Path(output), samples)


def _samples(statistics: dict[str, dict[str, Path]]) -> int | None:
    files = [path for paths in statistics.values() for path in paths.values()]
    found = load_provenance(files[0]).get("samples_per_task") if files else None
    if not isinstance(found, int | None):
        raise FileError(f"'{files[0]}' says {found!r:.40} for its samples_per_task, expected a number; make it again")
    return found or None


def _add_arguments(parser: LightningArgumentParser) -> None:
    parser.add_function_arguments(merge)


def _execute(call: Call) -> None:
    for path in merge(**call.options):
        print(path)


MERGE = Command("Merge experts into coded models.", _add_arguments, _execute)
