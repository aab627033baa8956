"""The paths of one seed's files, and the experts, code and calibration samples read from them."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from coin.data import Calibration, TaskData
from coin.data.tasks import Tasks
from coin.merging import Method
from coin.networks import Compression, int8_path
from coin.networks.experts import ExpertFiles
from coin.pipeline.experiment import Experiment
from coin.pipeline.step import Artifacts
from coin.pipeline.steps.code import SeedCode, read_choice
from coin.pipeline.steps.merge import coded_paths
from coin.statistics.statistic import DataChoice, Statistic


class SeedFiles:
    """The files of one seed."""

    def __init__(self, experiment: Experiment, seed: int) -> None:
        self.experiment = experiment
        self.seed = seed
        self.layout = experiment.layout.seed(seed)
        self.folder = self.layout.folder
        self.tasks = experiment.tasks_of(seed)
        self.initial = experiment.layout.initial(max(task.num_classes for task in self.tasks.values()))
        """The shared initialisation with the most classes."""

    @cached_property
    def experts(self) -> ExpertFiles:
        """The experts; available once they are trained."""
        return ExpertFiles({task: self.layout.expert(task) for task in self.tasks}, self.initial)

    @property
    def expert_paths(self) -> list[Path]:
        """The experts' files."""
        return [self.layout.expert(task) for task in self.tasks]

    @property
    def expert_artifacts(self) -> Artifacts:
        """The same, by task, as W&B knows them."""
        return Artifacts("expert", dict(zip(self.tasks, self.expert_paths, strict=True)))

    @cached_property
    def code(self) -> SeedCode:
        """The experiment's code, or the one that this seed has chosen."""
        given = self.experiment.code
        return read_choice(self.layout.code) if given is None else SeedCode(given)

    @property
    def code_files(self) -> list[Path]:
        """The file of a code that the seed chooses."""
        return [self.layout.code] if self.experiment.code is None else []

    def coded_paths(self, method: Method, *, compressed: bool = True) -> list[Path]:
        """Return the files of a method's coded models, followed by its compressed variants."""
        rows = 1 if self.experiment.code is None else self.experiment.code.num_coded
        return coded_paths(method, rows, self.layout.coded, compressed=compressed)

    def coded_outputs(self, method: Method) -> list[Path]:
        """Return the same files, and the 8-bit base of compressed variants."""
        return self._with_int8_base(self.coded_paths(method), method.compress)

    def replica_paths(self, compression: Compression) -> list[Path]:
        """Return the files of the experts' compressed copies, and of their 8-bit base if they have one."""
        paths = [self.layout.replicas / f"{task}.{compression.name}.safetensors" for task in self.tasks]
        return self._with_int8_base(paths, [compression])

    def _with_int8_base(self, paths: list[Path], compressions: Sequence[Compression]) -> list[Path]:
        """Return files and that of their 8-bit base, whose name has the initialisation's hash, once that is there."""
        has_base = any(each.base_bits == 8 for each in compressions) and self.initial.is_file()
        return [*paths, int8_path(paths[0], self.initial)] if has_base else paths

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
