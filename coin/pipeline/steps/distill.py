"""Distillation within an experiment: on its tasks' calibration samples, by its Trainer and with its loggers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.loggers import Logger

from coin.data.tasks import Tasks
from coin.merging import Experts
from coin.networks.experts import ExpertFiles
from coin.pipeline.steps.trainer import make_trainer


@dataclass
class Training:
    """Trains coded models, in place of `coin.distillation.training.MemoryTraining`.

    `options` is the experiment's ``trainer`` section; the loggers are those of the final run.
    """

    tasks: Tasks
    folder: Path
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    loggers: Sequence[Logger] = ()

    def num_samples(self, experts: Experts, samples_per_task: int | None) -> int:
        """Return the number of pooled calibration samples."""
        return (samples_per_task or self.tasks.samples_per_task) * len(self.tasks.tasks)

    def run_options(self, experts: Experts, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the experts' files, and the experiment's number of samples and seed unless the method sets them."""
        assert isinstance(experts.source, ExpertFiles)
        return {
            "experts": list(map(str, experts.source.paths.values())),
            "samples_per_task": given["samples_per_task"] or self.tasks.samples_per_task,
            "seed": self.seed if given["seed"] is None else given["seed"],
        }

    def fit(self, module: LightningModule, experts: Experts, held_out: float, options: dict[str, Any]) -> None:
        """Run the experiment's Trainer."""
        samples, batch_size, seed = (module.hparams[name] for name in ("samples_per_task", "batch_size", "seed"))
        data = Tasks(self.tasks.tasks, samples, batch_size, held_out, seed)
        loggers = False if held_out else list(self.loggers) or False
        trainer = make_trainer(self.folder, self.options, logger=loggers, **options)
        seed_everything(seed, workers=True, verbose=False)
        trainer.fit(module, datamodule=data)
