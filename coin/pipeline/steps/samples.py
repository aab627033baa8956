"""The samples of an experiment's tasks as its steps read them, and what of their options is in a step's key."""

from collections.abc import Mapping
from typing import Any

from coin.data import Calibration, TaskData
from coin.data.tasks import Tasks
from coin.pipeline.config import CalibrationConfig
from coin.statistics.statistic import Statistic


def datamodule(tasks: Mapping[str, TaskData], calibration: CalibrationConfig) -> Tasks:
    """Return tasks as a datamodule with the experiment's calibration options."""
    sizes = calibration.samples_per_task, calibration.batch_size
    return Tasks(tasks, *sizes, promise_samples=calibration.promise_samples)


def calibrations(tasks: Mapping[str, TaskData], calibration: CalibrationConfig) -> list[Calibration]:
    """Return every task's calibration samples."""
    data = datamodule(tasks, calibration)
    data.setup()
    return list(data.calibrations().values())


def samples_key(calibration: CalibrationConfig) -> dict[str, Any]:
    """Return what decides which calibration samples are drawn."""
    return {name: getattr(calibration, name) for name in ("samples_per_task", "batch_size")}


def statistic_key(calibration: CalibrationConfig, which: Statistic) -> dict[str, Any]:
    """Return what a statistic depends on."""
    options = calibration.options_of(which)
    own = {} if options is None else {"mc_samples": options.mc_samples, "precision": options.precision}
    return samples_key(calibration) | own


def evaluation_key(calibration: CalibrationConfig) -> dict[str, Any]:
    """Return what an evaluation depends on."""
    promise = {name: value for name, value in vars(calibration).items() if name.startswith("promise_")}
    return samples_key(calibration) | (promise if calibration.promise_samples else {})
