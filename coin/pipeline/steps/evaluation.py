"""The step that measures every method with every decoder, on one seed."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from coin.coding import Code, DecoderKind
from coin.core.processes import is_rank_zero, rank_zero_info
from coin.data import TaskData
from coin.files.atomic import write_text
from coin.merging import Experts
from coin.merging.expert_sources import FAR, ExpertFiles, spread
from coin.modules import DecodingEvaluator
from coin.networks import head_name
from coin.pipeline.config import CalibrationConfig
from coin.pipeline.options import result_options, tasks_key
from coin.pipeline.step import Step, in_order, keyed_by, unkeyed
from coin.pipeline.steps.merge import (
    CompressExperts,
    ExpertStep,
    Merge,
    code_key,
    datamodule,
    samples_key,
)
from coin.tracking.runs import RunLog
from coin.trainer import make_trainer


def tell_how_far_apart(files: ExpertFiles) -> None:
    """Say how far experts' bodies are apart, relative to their weights."""
    states = Experts(files).parameters
    equal_weights = [1 / len(states)] * len(states)
    apart = spread(states, equal_weights, (f"{head_name(files.skeleton)}.",))
    where = "near one another" if apart <= FAR else "far from one another"
    rank_zero_info(
        f"experts: {apart:.1%} of their weights apart, {where} (near is up to {FAR:.2%})"
    )


def _key(calibration: CalibrationConfig) -> dict[str, Any]:
    """Return what an evaluation depends on."""
    key = samples_key(calibration)
    if calibration.promise_samples:
        key |= {
            name: value for name, value in vars(calibration).items() if name.startswith("promise_")
        }
    return key


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluate(Step):
    """Measures how well lost experts are decoded, and writes the results, and every coded system with its decoders."""

    version = 2  # heads without their padding
    collective: ClassVar[bool] = True

    experiment: str
    experts: dict[str, ExpertStep] = keyed_by(in_order)
    merges: list[Merge]
    replicas: list[CompressExperts]
    code: Code = keyed_by(code_key)
    decoders: list[DecoderKind] | None
    tasks: dict[str, TaskData] = keyed_by(partial(tasks_key, with_tests=True))
    calibration: CalibrationConfig = keyed_by(_key)
    trainer: dict[str, Any] = keyed_by(partial(result_options, training=False))
    configuration: dict[str, Any] = unkeyed()  # what ``results.json`` says of the experiment
    yaml: str = unkeyed()  # what ``coin run`` repeats the seed with
    log: RunLog = unkeyed()
    doing: str = unkeyed(default="every method with every decoder")

    def run(self) -> None:
        """Measure, and write; every process takes part."""
        paths = {task: step.output for task, step in self.experts.items()}
        if is_rank_zero():
            tell_how_far_apart(ExpertFiles(paths))
        model = DecodingEvaluator(
            experts={task: str(path) for task, path in paths.items()},
            coded=[str(path) for merge in self.merges for path in merge.outputs],
            decoders=None if self.decoders is None else list(self.decoders),
            code=self.code.matrix.tolist(),
            replicas=[str(path) for step in self.replicas for path in step.outputs.values()],
            alpha=self.calibration.promise_alpha,
            confidence=self.calibration.promise_confidence,
        )
        configuration = {
            **self.configuration,
            "experts": {task: step.key for task, step in self.experts.items()},
        }
        if is_rank_zero():
            write_text(self.folder / "config.yaml", self.yaml)
        with self.log.open(self.folder) as loggers:
            trainer = make_trainer(self.folder, self.trainer, logger=loggers)
            data = datamodule(self.tasks, self.calibration)
            trainer.evaluate(model, data, self.experiment, configuration)
        for task in self.tasks.values():
            task.release()
