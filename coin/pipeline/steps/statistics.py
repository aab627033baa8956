"""The step that computes one statistic of one expert."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from coin.data import TaskData
from coin.networks import load_network
from coin.pipeline.config import CalibrationConfig
from coin.pipeline.step import Step, unkeyed
from coin.pipeline.steps.samples import datamodule, statistic_key
from coin.pipeline.steps.train import ExpertStep
from coin.pipeline.steps.trainer import estimate_over_tasks, make_trainer
from coin.statistics.statistic import Statistic


@dataclass(frozen=True, eq=False, kw_only=True)
class EstimateStatistic(Step):
    """Computes a statistic of a task's expert over calibration samples of its own task, or of all `tasks`."""

    file: ClassVar[str] = "statistic.safetensors"
    collective: ClassVar[bool] = True

    which: Statistic
    task_name: str
    expert: ExpertStep
    tasks: dict[str, TaskData]
    calibration: CalibrationConfig = unkeyed()
    trainer: dict[str, Any] = unkeyed()
    pass_options: dict[str, Any] = field(init=False)
    doing: str = unkeyed(default="computing")

    def __post_init__(self) -> None:
        object.__setattr__(self, "pass_options", statistic_key(self.calibration, self.which))

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
