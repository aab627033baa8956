"""One seed of an experiment: experts, statistics, coded models, evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger
from rich.console import Console

from coin.data import Calibration, TaskData
from coin.data.tasks import Tasks, task_with
from coin.errors import ConfigurationError
from coin.experiment.codes import AUTO, SeedCode, read_choice, write_choice
from coin.experiment.config import ExpertConfig
from coin.experiment.experts import Experts
from coin.experiment.jobs import job, log_files
from coin.experiment.merge import Ingredients, coded_paths, merge_experts
from coin.experiment.statistic_steps import estimate, wanted_by
from coin.experiment.steps import Steps, described, step_key
from coin.experiment.training import distill_rows, make_trainer, train_network
from coin.merging import MergeMethod, Requirement
from coin.modules import DecodingEvaluator, Distillation
from coin.networks import BatchNormPolicy, initial_network, save_network
from coin.processes import from_first
from coin.reporting.results import CONFUSION_NPZ, RESULTS_CSV, RESULTS_JSON

if TYPE_CHECKING:
    from coin.experiment.experiment import Experiment


class SeedRun:
    """The steps of one seed, each skipped when its inputs have not changed.

    Args:
        experiment: The experiment.
        seed: The seed.
        folder: ``runs/NAME/seed-K``.
        initial: The shared initialisation's file.
        console: Where progress goes.
    """

    def __init__(self, experiment: Experiment, seed: int, folder: Path, initial: Path, console: Console) -> None:
        self.experiment = experiment
        self.seed = seed
        self.folder = folder
        self.initial = initial
        self.console = console
        self.steps = Steps(folder)
        self.tasks: dict[str, TaskData] = {name: task_with(task, seed=seed) for name, task in experiment.tasks.items()}

    def run(self) -> None:
        """Run all steps."""
        for name, task in self.tasks.items():
            self.make_expert(name, task)
        self.choose_code()
        calibration = self.experiment.calibration
        for wanted in dict.fromkeys(w for method in self.experiment.methods for w in wanted_by(method, calibration)):
            estimate(self, wanted)
        self.merge()
        self.experts.release()
        self.evaluate()

    def expert_path(self, task: str) -> Path:
        """Return the file of a task's expert."""
        return self.folder / "experts" / task / "expert.safetensors"

    @cached_property
    def experts(self) -> Experts:
        """The experts, once they are made."""
        return Experts({task: self.expert_path(task) for task in self.tasks})

    def make_expert(self, name: str, task: TaskData) -> None:
        """Train a task's expert, or take over one that was brought along."""
        experiment, output = self.experiment, self.expert_path(name)
        initial = experiment.initial_path(task.num_classes)
        config = experiment.expert
        given = config.checkpoints.get(name)
        if given is not None:
            key = step_key({"network": experiment.network, "classes": task.num_classes}, [_existing(given)])
            if not self.steps.finished(f"expert-{name}", key, [output]):
                from_first(lambda: self._take_over(name, task, Path(given)))
                self.steps.finish(f"expert-{name}", key, [output])
            return
        training = expert_options(config, name)
        key = self._training_key(name, task)
        if self.steps.finished(f"expert-{name}", key, [output]):
            self.say(f"expert {name}: up to date")
            return
        self.say(f"expert {name}: fine-tuning for {training.epochs} epochs")
        with self.job("expert", name) as loggers:
            train_network(
                training,
                experiment.network,
                task,
                output.parent,
                output,
                key=key,
                seed=self.seed,
                initial=initial,
                trainer_options=experiment.trainer,
                loggers=loggers,
                weights=training.weights,
            )
            log_files(loggers, {name: output}, "expert", experiment, self.seed)
        self.steps.finish(f"expert-{name}", key, [output])

    def lacks_expert(self, name: str) -> bool:
        """Return whether a task's expert is still to be trained."""
        if name in self.experiment.expert.checkpoints:
            return False
        key = self._training_key(name, self.tasks[name])
        return not self.steps.finished(f"expert-{name}", key, [self.expert_path(name)])

    def _training_key(self, name: str, task: TaskData) -> str:
        experiment = self.experiment
        options = {
            "training": expert_options(experiment.expert, name),
            "task": task,
            "trainer": experiment.trainer,
            "seed": self.seed,
            "network": experiment.network,
        }
        return step_key(options, [experiment.initial_path(task.num_classes)])

    def _take_over(self, name: str, task: TaskData, given: Path) -> None:
        network = initial_network(self.experiment.network, task.num_classes, given)
        provenance = {"made_by": "coin run", "source": str(given), "task": name, "classes": list(task.classes)}
        save_network(self.expert_path(name), network, self.experiment.network, task.num_classes, provenance)

    def choose_code(self) -> None:
        """Choose the code from calibration data, where the experiment does not give it."""
        if self.experiment.code is not None:
            return
        path = self.folder / _CODE_JSON
        options = {"tasks": self.tasks, "calibration": self.experiment.calibration}
        key = step_key(options, list(self.experts.paths.values()), self.experts.sha256)
        if not self.steps.finished("code", key, [path]):
            from_first(lambda: write_choice(path, self.experts.networks, list(self._calibrations().values())))
            self.steps.finish("code", key, [path])
        weights = ", ".join(f"{weight:.3g}" for weight in self.code.code.matrix[0].tolist())
        self.say(f"code: chosen weights {weights}")

    @cached_property
    def code(self) -> SeedCode:
        """The experiment's code, or the one that this seed has chosen."""
        given = self.experiment.code
        return read_choice(self.folder / _CODE_JSON) if given is None else SeedCode(given)

    def coded_paths(self, method: MergeMethod | Distillation) -> list[Path]:
        """Return the files of a method's coded models."""
        return coded_paths(method, self.code.code, self.folder / "coded")

    def merge(self) -> None:
        """Make every method's coded models."""
        for method in self.experiment.methods:
            paths = self.coded_paths(method)
            name = paths[0].name.split(".")[0]
            statistics = self._statistics(method)
            key = self._merge_key(method, statistics)
            if self.steps.finished(f"coded-{name}", key, paths):
                self.say(f"{name}: up to date")
                continue
            self.say(f"{name}: {'training' if isinstance(method, Distillation) else 'merging'}")
            with self.job("distill" if isinstance(method, Distillation) else "merge", name) as loggers:
                ingredients = Ingredients(self.experts, statistics, self._calibrations(), self.initial)
                if isinstance(method, Distillation):
                    distill_rows(
                        method,
                        ingredients,
                        self.code,
                        self.data(self.tasks),
                        paths,
                        self.folder / "logs",
                        seed=self.seed,
                        trainer_options=self.experiment.trainer,
                        loggers=loggers,
                    )
                else:
                    samples = self.experiment.calibration.samples_per_task
                    merge = partial(merge_experts, method, self.code, ingredients, self.folder / "coded", samples)
                    from_first(merge)
                log_files(loggers, {path.stem: path for path in paths}, "coded-model", self.experiment, self.seed)
            self.steps.finish(f"coded-{name}", key, paths)

    def _merge_key(self, method: MergeMethod | Distillation, statistics: dict[str, dict[str, Path]]) -> str:
        options: dict[str, Any] = {
            "method": method,
            "code": self.code.code.matrix,
            "calibration": self.experiment.calibration,
            "tasks": self.tasks,
            "seed": self.seed,
        }
        if self.experiment.code is None:
            options["code_passes"] = self.code.passes  # they are part of what the coded models cost
        if isinstance(method, Distillation):
            options["trainer"] = self.experiment.trainer
        sources = [*self.experts.paths.values(), *(path for files in statistics.values() for path in files.values())]
        keeps = isinstance(method, MergeMethod) and method.batchnorm == BatchNormPolicy.keep
        if keeps or Requirement.INITIAL in getattr(method, "requires", ()):
            sources.append(self.initial)
        return step_key(options, sources, self.experts.sha256)

    def evaluate(self) -> None:
        """Measure every method with every decoder."""
        experiment = self.experiment
        coded = [path for method in experiment.methods for path in self.coded_paths(method)]
        outputs = [self.folder / name for name in (RESULTS_CSV, RESULTS_JSON, CONFUSION_NPZ)]
        options = {
            "name": experiment.name,
            "decoders": [decoder.name for decoder in experiment.decoders],
            "calibration": experiment.calibration,
            "tasks": self.tasks,
            "code": self.code.code.matrix,
            "seed": self.seed,
        }
        key = step_key(options, [*self.experts.paths.values(), *coded], self.experts.sha256)
        if self.steps.finished("evaluate", key, outputs):
            self.say("evaluation: up to date")
            return
        self.say("evaluating every method with every decoder")
        model = DecodingEvaluator(
            experts={name: str(path) for name, path in self.experts.paths.items()},
            coded=[str(path) for path in coded],
            decoders=list(experiment.decoders),
            code=self.code.code.matrix.tolist(),
        )
        with self.job("evaluate", "evaluate") as loggers:
            trainer = make_trainer(self.folder, experiment.trainer, logger=loggers or False)
            trainer.evaluate(
                model,
                self.data(self.tasks),
                output=str(self.folder),
                name=experiment.name,
                configuration=self._configuration(),
            )
        self.steps.finish("evaluate", key, outputs)

    def data(self, tasks: Mapping[str, TaskData]) -> Tasks:
        """Return tasks with the experiment's calibration samples."""
        calibration = self.experiment.calibration
        return Tasks(tasks, calibration.samples_per_task, calibration.batch_size)

    def _statistics(self, method: MergeMethod | Distillation) -> dict[str, dict[str, Path]]:
        """Return the statistics' files that a method asks for."""
        calibration = self.experiment.calibration
        return {
            str(wanted.statistic): {task: wanted.path(self.folder, task, calibration) for task in self.tasks}
            for wanted in wanted_by(method, calibration)
        }

    def _calibrations(self) -> dict[str, Calibration]:
        tasks = self.data(self.tasks)
        tasks.setup()
        return tasks.calibrations()

    def _configuration(self) -> dict[str, Any]:
        experiment = self.experiment
        names = ("network", "base", "expert", "calibration", "methods", "trainer")
        chosen = {"code_choice": AUTO} if experiment.code is None else {}
        return {name: described(getattr(experiment, name)) for name in names} | {
            **chosen,
            "name": experiment.name,
            "decoders": [decoder.name for decoder in experiment.decoders],
            "tasks": described(self.tasks),
            "seed": self.seed,
        }

    def job(self, job_type: str, name: str) -> AbstractContextManager[list[Logger]]:
        """Return a context with the loggers of one of this seed's jobs; see `coin.experiment.jobs.job`."""
        folder = self.folder / "experts" / name if job_type == "expert" else self.folder / "logs" / name
        return job(self.experiment, folder, job_type, name, self.seed)

    def say(self, text: str) -> None:
        """Tell about the progress."""
        self.console.print(f"seed {self.seed}: {text}", highlight=False)


def expert_options(config: ExpertConfig, task: str) -> ExpertConfig:
    """Return the training options with a task's own in place."""
    try:
        own = replace(config, **config.overrides.get(task, {}))
    except TypeError as error:
        raise ConfigurationError(f"expert.overrides.{task} has an option that an expert has not: {error}") from error
    return replace(own, overrides={}, checkpoints={})


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise ConfigurationError(f"found no file '{path}', expected an expert's weights; check expert.checkpoints")
    return Path(path)


_CODE_JSON = "code.json"
