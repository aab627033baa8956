"""One seed of an experiment: its folder, its tasks, and the results of its steps so far."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from coin.core.processes import rank_zero_info
from coin.data import Calibration, TaskData
from coin.data.tasks import Tasks
from coin.experiment.experiment import Experiment
from coin.experiment.jobs import Job
from coin.experiment.store import Steps
from coin.merging import Method
from coin.networks import Compression, int8_path
from coin.networks.experts import ExpertFiles
from coin.statistics.statistic import DataChoice, Statistic
from coin.steps.code import SeedCode, read_choice
from coin.steps.compress import spare_paths
from coin.steps.merge import coded_paths


class SeedRun:
    """The state shared by the steps of one seed; `initial` is the shared initialisation's file."""

    def __init__(self, experiment: Experiment, seed: int, initial: Path) -> None:
        self.experiment = experiment
        self.seed = seed
        self.initial = initial
        self.layout = experiment.layout.seed(seed)
        self.folder = self.layout.folder
        self.steps = Steps(self.folder)
        self.tasks = experiment.tasks_of(seed)
        self.method_jobs: dict[str, Job] = {}
        """The jobs of the methods that were made in this process, by their files' name: until they are evaluated."""

    @cached_property
    def experts(self) -> ExpertFiles:
        """The experts; available once they are trained."""
        return ExpertFiles({task: self.layout.expert(task) for task in self.tasks}, self.initial)

    @cached_property
    def code(self) -> SeedCode:
        """The experiment's code, or the one chosen by this seed."""
        given = self.experiment.code
        return read_choice(self.layout.code) if given is None else SeedCode(given)

    def coded_paths(self, method: Method, *, compressed: bool = True) -> list[Path]:
        """Return the files of a method's coded models, followed by its compressed variants."""
        return coded_paths(method, self.code.code, self.layout.coded, compressed=compressed)

    def coded_outputs(self, method: Method) -> list[Path]:
        """Return the same files, and the 8-bit base of compressed variants."""
        paths, rounded = self.coded_paths(method), any(each.base_bits == 8 for each in method.compress)
        return [*paths, *([int8_path(paths[0], self.initial)] if rounded else [])]

    def spare_paths(self, compression: Compression) -> list[Path]:
        """Return the files of the experts' compressed copies, and of their 8-bit base if they have one."""
        return spare_paths(self.tasks, self.layout.spares, compression, self.initial)

    def statistics(self, method: Method) -> dict[Statistic, dict[str, Path]]:
        """Return the files of the statistics that a method needs."""
        return {which: {task: self.statistic_path(which, task) for task in self.tasks} for which in method.statistics()}

    def statistic_path(self, which: Statistic, task: str) -> Path:
        """Return the file of an expert's statistic, named by kind and data if they are not the defaults."""
        calibration = self.experiment.calibration
        data = DataChoice.pooled if calibration.fisher_data is DataChoice.pooled else DataChoice.own
        plain = Statistic(which.name, data, which.kind and calibration.fisher_kind)
        suffix = "" if which == plain else "".join(f"-{part}" for part in which.options.values())
        return self.folder / "statistics" / f"{task}.{which.name}{suffix}.safetensors"

    def data(self, tasks: Mapping[str, TaskData]) -> Tasks:
        """Return tasks as a datamodule with the experiment's calibration options."""
        calibration = self.experiment.calibration
        samples = calibration.samples_per_task, calibration.batch_size
        return Tasks(tasks, *samples, promise_samples=calibration.promise_samples)

    def calibrations(self) -> dict[str, Calibration]:
        """Return every task's calibration samples."""
        tasks = self.data(self.tasks)
        tasks.setup()
        return tasks.calibrations()

    def rank_zero_info(self, text: str) -> None:
        """Print the seed's progress on rank zero."""
        rank_zero_info(f"seed {self.seed}: {text}")
