"""One seed of an experiment: experts, statistics, coded models, evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from coin.data import Calibration, TaskData
from coin.data.tasks import Tasks, task_with
from coin.errors import ConfigurationError
from coin.experiment.codes import SeedCode, read_choice, write_choice
from coin.experiment.config import ExpertConfig
from coin.experiment.evaluation import evaluate
from coin.experiment.experts import Experts
from coin.experiment.jobs import FileKind, Job, by_stem, job, resolved, run_config
from coin.experiment.layer_step import compare_layers
from coin.experiment.locks import alone_in
from coin.experiment.merge import Ingredients, coded_paths, merge_experts
from coin.experiment.statistic_steps import estimate, wanted_by
from coin.experiment.steps import Steps, step_key
from coin.experiment.training import distill_rows, train_network
from coin.merging import MergeMethod, Requirement
from coin.modules import Distillation, StatisticKind
from coin.networks import BatchNormPolicy, brought_network, save_network
from coin.processes import from_first

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
        if any(self.lacks_expert(name) for name in self.tasks):
            self.experiment.check_parts()
        for name, task in self.tasks.items():
            self.make_expert(name, task)
        self.choose_code()
        calibration = self.experiment.calibration
        for wanted in dict.fromkeys(w for method in self.experiment.methods for w in wanted_by(method, calibration)):
            estimate(self, wanted)
        self.merge()
        compare_layers(self)
        self.experts.release()
        evaluate(self)

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
        with alone_in(output.parent), self.job("expert", name, [name], task=name) as work:
            work.reads(FileKind.initialisation, {initial.stem: initial})
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
                loggers=work.loggers,
                weights=training.weights,
            )
            work.makes(FileKind.expert, {name: output})
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
        network = brought_network(self.experiment.network, task.num_classes, given)
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
            statistics = self.statistics(method)
            key = self._merge_key(method, statistics)
            if self.steps.finished(f"coded-{name}", key, paths):
                self.say(f"{name}: up to date")
                continue
            self.say(f"{name}: {'training' if isinstance(method, Distillation) else 'merging'}")
            job_type = "distill" if isinstance(method, Distillation) else "merge"
            with self.job(job_type, name, [method.label], method=method.label, batchnorm=str(method.batchnorm)) as work:
                self._tell_inputs(work, method, statistics)
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
                        loggers=work.loggers,
                    )
                else:
                    samples = self.experiment.calibration.samples_per_task
                    merge = partial(merge_experts, method, self.code, ingredients, self.folder / "coded", samples)
                    from_first(merge)
                work.makes(FileKind.coded_model, by_stem(paths))
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
        if _reads_initial(method):
            sources.append(self.initial)
        return step_key(options, sources, self.experts.sha256)

    def _tell_inputs(
        self, work: Job, method: MergeMethod | Distillation, statistics: dict[str, dict[str, Path]]
    ) -> None:
        """Tell W&B which files a method reads."""
        work.reads(FileKind.expert, self.experts.paths)
        for statistic, files in statistics.items():
            logged = statistic == StatisticKind.fisher
            (work.reads if logged else work.reads_unlogged)(FileKind.statistics, by_stem(files.values()))
        if _reads_initial(method):
            work.reads(FileKind.initialisation, {self.initial.stem: self.initial})

    def data(self, tasks: Mapping[str, TaskData]) -> Tasks:
        """Return tasks with the experiment's calibration samples."""
        calibration = self.experiment.calibration
        return Tasks(tasks, calibration.samples_per_task, calibration.batch_size)

    def statistics(self, method: MergeMethod | Distillation) -> dict[str, dict[str, Path]]:
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

    @cached_property
    def options(self) -> dict[str, Any]:
        """The experiment's options with all defaults filled in."""
        return resolved(self.experiment, self.tasks, self.seed)

    def job(self, job_type: str, name: str, tags: Sequence[str] = (), **own: Any) -> AbstractContextManager[Job]:
        """Return a context with one of this seed's jobs; see `coin.experiment.jobs.job`.

        Args:
            job_type: The job's type.
            name: What it works on.
            tags: Short words to filter its W&B run by.
            **own: What its W&B run's configuration tells it from others of its type by.
        """
        folder = self.folder / "experts" / name if job_type == "expert" else self.folder / "logs" / name
        return job(
            self.experiment, folder, job_type, name, self.seed, run_config(self.experiment, self.options, **own), tags
        )

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


def _reads_initial(method: MergeMethod | Distillation) -> bool:
    """Return whether a method, or its BatchNorm policy, needs the shared initialisation."""
    keeps = isinstance(method, MergeMethod) and method.batchnorm == BatchNormPolicy.keep
    return keeps or Requirement.INITIAL in getattr(method, "requires", ())


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise ConfigurationError(f"found no file '{path}', expected an expert's weights; check expert.checkpoints")
    return Path(path)


_CODE_JSON = "code.json"
