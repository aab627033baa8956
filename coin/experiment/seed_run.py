"""One seed of an experiment: experts, statistics, coded models, evaluation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger
from rich.console import Console

from coin.data import Calibration, TaskData
from coin.data.tasks import Tasks, task_with
from coin.errors import ConfigurationError
from coin.experiment.config import ExpertConfig
from coin.experiment.jobs import job, log_files
from coin.experiment.merge import Ingredients, coded_paths, merge_experts
from coin.experiment.steps import Steps, described, step_key
from coin.experiment.training import distill_rows, make_trainer, train_network
from coin.merging import MergeMethod, Requirement
from coin.modules import DecodingEvaluator, Distillation, StatisticKind
from coin.networks import BatchNormPolicy, initial_network, load_network, save_network
from coin.reporting.results import CONFUSION_NPZ, RESULTS_CSV, RESULTS_JSON
from coin.state import fingerprint
from coin.statistics import FisherKind
from coin.statistics.files import save_statistic

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
        for kind, data in self._fisher_variants():
            self.estimate_fisher(kind, data)
        for data in self._gram_variants():
            self.estimate_gram(data)
        self.merge()
        self.evaluate()

    def expert_path(self, task: str) -> Path:
        """Return the file of a task's expert."""
        return self.folder / "experts" / task / "expert.safetensors"

    @cached_property
    def expert_paths(self) -> dict[str, Path]:
        """The experts' files by task."""
        return {task: self.expert_path(task) for task in self.tasks}

    def make_expert(self, name: str, task: TaskData) -> None:
        """Train a task's expert, or take over one that was brought along."""
        experiment, output = self.experiment, self.expert_path(name)
        initial = experiment.initial_path(task.num_classes)
        config = experiment.expert
        given = config.checkpoints.get(name)
        if given is not None:
            key = step_key({"network": experiment.network, "classes": task.num_classes}, [_existing(given)])
            if not self.steps.finished(f"expert-{name}", key, [output]):
                network = initial_network(experiment.network, task.num_classes, Path(given))
                provenance = {"made_by": "coin run", "source": given, "task": name, "classes": list(task.classes)}
                save_network(output, network, experiment.network, task.num_classes, provenance)
                self.steps.finish(f"expert-{name}", key, [output])
            return
        training = expert_options(config, name)
        options = {"training": training, "task": task, "trainer": experiment.trainer, "seed": self.seed}
        key = step_key({**options, "network": experiment.network}, [initial])
        if self.steps.finished(f"expert-{name}", key, [output]):
            self._say(f"expert {name}: up to date")
            return
        self._say(f"expert {name}: fine-tuning for {training.epochs} epochs")
        with self._job("expert", name) as loggers:
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

    def fisher_path(self, task: str, kind: str, data: str) -> Path:
        """Return the file of an expert's Fisher; the experiment's own kind and data have the plain name."""
        calibration = self.experiment.calibration
        plain = (kind, data) == (str(calibration.fisher_kind), calibration.fisher_data)
        return self.folder / "statistics" / f"{task}.fisher{'' if plain else f'-{kind}-{data}'}.safetensors"

    def gram_path(self, task: str, data: str) -> Path:
        """Return the file of an expert's Gram matrices."""
        plain = data == self.experiment.calibration.fisher_data
        return self.folder / "statistics" / f"{task}.gram{'' if plain else f'-{data}'}.safetensors"

    def estimate_fisher(self, kind: str, data: str) -> None:
        """Compute every expert's Fisher of one kind on one choice of data."""
        calibration = self.experiment.calibration
        wanted = {}
        for name in self.tasks:
            path = self.fisher_path(name, kind, data)
            options = self._statistic_options(name, data) | {"kind": kind, "k": calibration.fisher_cotangents}
            key = step_key(options, [self.expert_path(name)])
            if not self.steps.finished(path.stem, key, [path]):
                wanted[name] = (path, key)
        if not wanted:
            return
        self._say(f"Fisher ({kind}, {data}) of {', '.join(wanted)}")
        with self._job("fisher", f"fisher-{kind}-{data}") as loggers:
            for name, (path, key) in wanted.items():
                network = load_network(self.expert_path(name)).network
                trainer = make_trainer(self.folder, self.experiment.trainer)
                cotangents = calibration.fisher_cotangents if kind == FisherKind.monte_carlo else None
                sums, seconds = trainer.statistic_sums(
                    network,
                    self._tasks_for(name, data),
                    kind=FisherKind(kind),
                    cotangents=cotangents,
                    memory_mib=calibration.memory_mib,
                )
                save_statistic(
                    path,
                    sums,
                    statistic="fisher",
                    weights=fingerprint(network.state_dict()),
                    seconds=seconds,
                    kind=kind,
                    cotangents=cotangents,
                    data=data,
                    task=name,
                    samples_per_task=calibration.samples_per_task,
                    seed=self.seed,
                )
                self.steps.finish(path.stem, key, [path])
                for logger in loggers:
                    logger.log_metrics({f"fisher/{name}/seconds": seconds, f"fisher/{name}/passes": sums.passes})
            files = {name: path for name, (path, _) in wanted.items()}
            log_files(loggers, files, "statistics", self.experiment, self.seed)

    def estimate_gram(self, data: str) -> None:
        """Compute every expert's Gram matrices on one choice of data."""
        for name in self.tasks:
            path = self.gram_path(name, data)
            key = step_key(self._statistic_options(name, data), [self.expert_path(name)])
            if self.steps.finished(path.stem, key, [path]):
                continue
            self._say(f"Gram matrices ({data}) of {name}")
            network = load_network(self.expert_path(name)).network
            trainer = make_trainer(self.folder, self.experiment.trainer)
            sums, seconds = trainer.statistic_sums(network, self._tasks_for(name, data), statistic=StatisticKind.gram)
            save_statistic(
                path,
                sums,
                statistic="gram",
                weights=fingerprint(network.state_dict()),
                seconds=seconds,
                data=data,
                task=name,
                samples_per_task=self.experiment.calibration.samples_per_task,
                seed=self.seed,
            )
            self.steps.finish(path.stem, key, [path])

    def coded_paths(self, method: MergeMethod | Distillation) -> list[Path]:
        """Return the files of a method's coded models."""
        return coded_paths(method, self.experiment.code, self.folder / "coded")

    def merge(self) -> None:
        """Make every method's coded models."""
        for method in self.experiment.methods:
            paths = self.coded_paths(method)
            name = paths[0].name.split(".")[0]
            statistics = self._statistics(method)
            sources = [*self.expert_paths.values(), *(p for files in statistics.values() for p in files.values())]
            needs_initial = Requirement.INITIAL in getattr(method, "requires", ()) or (
                method.batchnorm == BatchNormPolicy.keep and isinstance(method, MergeMethod)
            )
            options = {
                "method": method,
                "code": self.experiment.code.matrix,
                "calibration": self.experiment.calibration,
                "tasks": self.tasks,
                "seed": self.seed,
            }
            if isinstance(method, Distillation):
                options["trainer"] = self.experiment.trainer
            key = step_key(options, sources + ([self.initial] if needs_initial else []))
            if self.steps.finished(f"coded-{name}", key, paths):
                self._say(f"{name}: up to date")
                continue
            self._say(f"{name}: {'training' if isinstance(method, Distillation) else 'merging'}")
            with self._job("distill" if isinstance(method, Distillation) else "merge", name) as loggers:
                ingredients = Ingredients(self.expert_paths, statistics, self._calibrations(), self.initial)
                if isinstance(method, Distillation):
                    distill_rows(
                        method,
                        ingredients,
                        self.experiment.code,
                        self._all_tasks(),
                        paths,
                        self.folder / "logs",
                        seed=self.seed,
                        trainer_options=self.experiment.trainer,
                        loggers=loggers,
                    )
                else:
                    samples = self.experiment.calibration.samples_per_task
                    merge_experts(method, self.experiment.code, ingredients, self.folder / "coded", samples)
                log_files(loggers, {path.stem: path for path in paths}, "coded-model", self.experiment, self.seed)
            self.steps.finish(f"coded-{name}", key, paths)

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
            "code": experiment.code.matrix,
            "seed": self.seed,
        }
        key = step_key(options, [*self.expert_paths.values(), *coded])
        if self.steps.finished("evaluate", key, outputs):
            self._say("evaluation: up to date")
            return
        self._say("evaluating every method with every decoder")
        model = DecodingEvaluator(
            experts={name: str(path) for name, path in self.expert_paths.items()},
            coded=[str(path) for path in coded],
            decoders=list(experiment.decoders),
            code=experiment.code.matrix.tolist(),
        )
        with self._job("evaluate", "evaluate") as loggers:
            trainer = make_trainer(self.folder, experiment.trainer, logger=loggers or False)
            trainer.evaluate(
                model,
                self._all_tasks(),
                output=str(self.folder),
                name=experiment.name,
                configuration=self._configuration(),
            )
        self.steps.finish("evaluate", key, outputs)

    def _statistics(self, method: MergeMethod | Distillation) -> dict[str, dict[str, Path]]:
        """Return the statistics' files that a method asks for."""
        statistics: dict[str, dict[str, Path]] = {}
        requires: frozenset[Requirement] = getattr(method, "requires", frozenset())
        if Requirement.FISHER in requires:
            kind, data = self._fisher_of(method)
            statistics["fisher"] = {task: self.fisher_path(task, kind, data) for task in self.tasks}
        if Requirement.GRAM in requires:
            statistics["gram"] = {task: self.gram_path(task, self._gram_of(method)) for task in self.tasks}
        return statistics

    def _fisher_of(self, method: Any) -> tuple[str, str]:
        calibration = self.experiment.calibration
        kind = getattr(method, "fisher_kind", None) or calibration.fisher_kind
        return str(FisherKind(kind)), getattr(method, "fisher_data", None) or calibration.fisher_data

    def _gram_of(self, method: Any) -> str:
        return getattr(method, "gram_data", None) or self.experiment.calibration.fisher_data

    def _fisher_variants(self) -> list[tuple[str, str]]:
        methods = self.experiment.methods
        found = [self._fisher_of(m) for m in methods if Requirement.FISHER in getattr(m, "requires", ())]
        return list(dict.fromkeys(found))

    def _gram_variants(self) -> list[str]:
        methods = self.experiment.methods
        found = [self._gram_of(m) for m in methods if Requirement.GRAM in getattr(m, "requires", ())]
        return list(dict.fromkeys(found))

    def _statistic_options(self, task: str, data: str) -> dict[str, Any]:
        calibration = self.experiment.calibration
        tasks = self.tasks if data == "pooled" else {task: self.tasks[task]}
        return {"tasks": tasks, "samples": calibration.samples_per_task, "batch_size": calibration.batch_size}

    def _tasks_for(self, task: str, data: str) -> Tasks:
        calibration = self.experiment.calibration
        tasks = self.tasks if data == "pooled" else {task: self.tasks[task]}
        return Tasks(tasks, calibration.samples_per_task, calibration.batch_size)

    def _all_tasks(self) -> Tasks:
        calibration = self.experiment.calibration
        return Tasks(self.tasks, calibration.samples_per_task, calibration.batch_size)

    def _calibrations(self) -> dict[str, Calibration]:
        tasks = self._all_tasks()
        tasks.setup()
        return tasks.calibrations()

    def _configuration(self) -> dict[str, Any]:
        experiment = self.experiment
        names = ("network", "base", "expert", "calibration", "methods", "trainer")
        return {name: described(getattr(experiment, name)) for name in names} | {
            "name": experiment.name,
            "decoders": [decoder.name for decoder in experiment.decoders],
            "tasks": described(self.tasks),
            "seed": self.seed,
        }

    def _job(self, job_type: str, name: str) -> AbstractContextManager[list[Logger]]:
        folder = self.folder / "experts" / name if job_type == "expert" else self.folder / "logs" / name
        return job(self.experiment, folder, job_type, name, self.seed)

    def _say(self, text: str) -> None:
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
