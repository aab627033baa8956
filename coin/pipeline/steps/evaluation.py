"""The step that measures every method with every decoder, on one seed."""

from dataclasses import dataclass
from typing import Any, ClassVar

import yaml  # type: ignore[import-untyped]

from coin.core.processes import is_rank_zero, rank_zero_info
from coin.data.tasks import Tasks
from coin.files.atomic import write_text
from coin.merging import Experts
from coin.merging.expert_sources import FAR, ExpertFiles, spread
from coin.modules import DecodingEvaluator
from coin.networks import head_name
from coin.pipeline.step import Step
from coin.pipeline.steps.merge import CompressExperts, ExpertStep, Merge
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


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluate(Step):
    """Measures how well lost experts are decoded, and writes the results, and every coded system with its decoders."""

    collective: ClassVar[bool] = True
    doing: ClassVar[str] = "every method with every decoder"

    experts: dict[str, ExpertStep]
    merges: list[Merge]
    replicas: list[CompressExperts]
    trainer: dict[str, Any]
    experiment: dict[str, Any]  # the configuration that repeats the seed
    log: RunLog

    def run(self) -> None:
        """Measure, and write; every process takes part."""
        config = self.config
        paths = {task: step.output for task, step in self.experts.items()}
        if is_rank_zero():
            tell_how_far_apart(ExpertFiles(paths))
        model = DecodingEvaluator(
            experts={task: str(path) for task, path in paths.items()},
            coded=[str(path) for merge in self.merges for path in merge.outputs],
            decoders=config["decoders"],
            code=config["code"],
            replicas=[str(path) for step in self.replicas for path in step.outputs.values()],
            alpha=config["promise_alpha"],
            confidence=config["promise_confidence"],
        )
        if is_rank_zero():
            text = yaml.safe_dump(self.experiment, sort_keys=False, allow_unicode=True)
            write_text(self.folder / "config.yaml", text)
        data = Tasks(
            self.tasks,
            config["samples_per_task"],
            config["batch_size"],
            promise_samples=config["promise_samples"],
        )
        with self.log.open(self.folder) as loggers:
            trainer = make_trainer(self.folder, self.trainer, logger=loggers)
            trainer.evaluate(model, data, config["experiment"], self.experiment)
        for task in self.tasks.values():
            task.release()
