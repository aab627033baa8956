"""The plan of an experiment: its steps in ``runs/.steps``, and where in ``runs/NAME`` a person sees what they make."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from coin.data.tasks import task_with
from coin.merging import Method
from coin.networks import Compression
from coin.pipeline.experiment import Experiment
from coin.pipeline.options import (
    Config,
    method_config,
    network_config,
    result_options,
    task_config,
)
from coin.pipeline.step import STORE, Step
from coin.pipeline.steps.evaluation import Evaluate
from coin.pipeline.steps.imported import ImportExpert, place_config
from coin.pipeline.steps.merge import CompressExperts, EstimateStatistic, ExpertStep, Merge
from coin.pipeline.steps.report import Report
from coin.pipeline.steps.train import TrainNetwork, WriteInitial
from coin.statistics.statistic import DataChoice, Statistic
from coin.tracking.runs import RunLog

S = TypeVar("S", bound=Step)

_ELSEWHERE = ("task", "checkpoint", "seed", "overrides", "checkpoints")
"""Options of the sections ``base`` and ``expert`` that are no part of a training's recipe."""


def plan(experiment: Experiment) -> list[Step]:
    """Return the steps of an experiment in an order in which they can run; seeds may share some, which come twice."""
    shared = _Shared(experiment)
    evaluations = {}
    for seed in experiment.seeds:
        evaluations[seed] = _Seed(shared, seed).evaluate()
    place = experiment.folder
    shared.add(Report, name="report", what="report", place=place, evaluations=evaluations)
    return shared.steps


def publish(experiment: Experiment, steps: Iterable[Step], planned: Iterable[Step]) -> None:
    """Show the files of steps that have been run, and in seeds' folders none of what is not of the plan any more.

    All at once when everything is done: what a person sees is of one plan, whenever a run with other options is killed.
    """
    for step in steps:
        step.publish()
    current = {step.folder.name for step in planned}
    for seed in experiment.seeds:
        folder = experiment.folder / f"seed-{seed}"
        for path in (*folder.glob("*"), *folder.glob("*/*")):
            with suppress(OSError):  # it is no link, or another process has removed it
                parts = path.readlink().parts
                if STORE in parts and (not path.exists() or current.isdisjoint(parts)):
                    path.unlink()


class _Shared:
    """The steps of an experiment as they are added, and those that all seeds share: base and initialisations.

    What a network's constructor draws depends on the number of classes, below the head too: all have the widest's body.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.steps: list[Step] = []
        self.network = network_config(experiment.config["network"], experiment.network)
        self.base = self._base()
        counts = sorted({task.num_classes for task in experiment.tasks.values()}, reverse=True)
        self.widest = self._initial(counts[0], None)
        self.initial = {counts[0]: self.widest}
        for count in counts[1:]:
            self.initial[count] = self._initial(count, self.widest)

    def add(self, kind: type[S], **fields: Any) -> S:
        """Add a step."""
        step = kind(store=self.experiment.folder.parent / STORE, **fields)
        self.steps.append(step)
        return step

    def train(self, section: Config, config: Config, **fields: Any) -> TrainNetwork:
        """Add a training by the options of a section, ``base`` or ``expert``; `config` is what else decides it."""
        recipe = {name: value for name, value in section.items() if name not in _ELSEWHERE}
        trainer = result_options(self.experiment.trainer, training=True)
        return self.add(
            TrainNetwork,
            config={"network": self.network, "recipe": recipe, "trainer": trainer, **config},
            network=self.experiment.network,
            trainer=self.experiment.trainer,
            **fields,
        )

    def log(self, seed: int | None, kind: str, name: str, subject: str) -> RunLog:
        """Return where a training or an evaluation logs to; the base's has no seed."""
        experiment = self.experiment
        place = "base" if seed is None else f"seed-{seed}"
        called = name if seed is None else f"{place}-{name}"
        config = {
            "experiment": experiment.of_seeds(experiment.seeds if seed is None else [seed]),
            "network": experiment.network.name,
            "seed": seed,
            "method" if kind == "method" else "task": subject,
            "samples_per_task": experiment.calibration.samples_per_task,
            "num_experts": len(experiment.tasks),
            "num_coded": experiment.code.num_coded,
        }
        return RunLog(
            experiment.folder / place,
            group=experiment.name,
            type=kind,
            name=f"{experiment.name}-{called}",
            tags=(subject, experiment.network.name, *experiment.wandb.tags),
            config=config,
        )

    def _base(self) -> TrainNetwork | None:
        base = self.experiment.base
        if base is None or base.task is None:
            return None
        section = self.experiment.config["base"]
        task = task_config(section["task"], base.task, with_tests=False)
        return self.train(
            section,
            {"task": task, "seed": base.seed},
            name="base",
            what="base",
            place=self.experiment.folder / "base/base.safetensors",
            linked=TrainNetwork.file,
            recipe=base,
            tasks={"base": base.task},
            log=self.log(None, "expert", "base", "base"),
        )

    def _initial(self, count: int, wider: WriteInitial | None) -> WriteInitial:
        experiment = self.experiment
        checkpoint = None if experiment.base is None else experiment.base.checkpoint
        own = None if checkpoint is None else Path(checkpoint)
        return self.add(
            WriteInitial,
            name=f"initial-{count}",
            what=f"initialisation for {count} classes",
            place=experiment.folder / f"base/initial-{count}.safetensors",
            linked=WriteInitial.file,
            config={"network": self.network, "classes": count, "checkpoint": own},
            network=experiment.network,
            base=self.base,
            wider=wider,
        )


class _Seed:
    """The steps of one seed: experts, statistics, coded models and copies, their evaluation and its report."""

    def __init__(self, shared: _Shared, seed: int) -> None:
        experiment = shared.experiment
        self.shared = shared
        self.experiment = experiment
        self.seed = seed
        self.folder = experiment.folder / f"seed-{seed}"
        self.tasks = {name: task_with(task, seed=seed) for name, task in experiment.tasks.items()}
        self.experts = self._experts()
        self.statistics: dict[Statistic, dict[str, EstimateStatistic]] = {}
        calibration = experiment.calibration
        self.samples = {
            "samples_per_task": calibration.samples_per_task,
            "batch_size": calibration.batch_size,
            "seed": seed,
        }

    def evaluate(self) -> Evaluate:
        """Add the seed's steps, and return the evaluation."""
        experiment = self.experiment
        calibration = experiment.calibration
        configs = experiment.config["methods"]
        merges = list(map(self._merge, experiment.methods, configs))
        replicas = [self._copies(how) for how in experiment.replicas]
        step = self.shared.add(
            Evaluate,
            name="evaluate",
            **self._shown("evaluation"),
            config={
                "experiment": experiment.name,
                "code": experiment.code.matrix.tolist(),
                "decoders": experiment.config.get("decoders"),
                "tasks": self._configs(self.tasks, with_tests=True),
                **self.samples,
                "promise_samples": calibration.promise_samples,
                "promise_alpha": calibration.promise_alpha,
                "promise_confidence": calibration.promise_confidence,
                "trainer": result_options(experiment.trainer, training=False),
            },
            experts=self.experts,
            merges=merges,
            replicas=replicas,
            tasks=self.tasks,
            trainer=experiment.trainer,
            experiment=experiment.of_seeds([self.seed]),
            log=self.shared.log(self.seed, "evaluate", "evaluate", "evaluate"),
        )
        self.shared.add(
            Report, name="report", **self._shown("report"), evaluations={self.seed: step}
        )
        return step

    def _shown(self, what: str, place: str = "", linked: str | None = None) -> dict[str, Any]:
        """Return the fields by which a person finds a step's files, in the seed's folder."""
        return {
            "what": f"seed {self.seed}: {what}",
            "place": self.folder / place,
            "linked": linked,
        }

    def _configs(self, names: Iterable[str], *, with_tests: bool) -> list[Any]:
        """Return the configuration of tasks, in their order, which decides which rows of the code are whose."""
        found = []
        for name in names:
            config = self.experiment.config["tasks"][name]
            found.append([name, task_config(config, self.tasks[name], with_tests=with_tests)])
        return found

    def _experts(self) -> dict[str, ExpertStep]:
        """Add the experts, imported ones first: a mistake in one shows before others are trained."""
        places = self.experiment.expert.checkpoints
        made: dict[str, ExpertStep] = {}
        for name, place in places.items():
            made[name] = self._imported(name, place)
        for name in self.tasks:
            if name not in places:
                made[name] = self._trained(name)
        return {name: made[name] for name in self.tasks}

    def _imported(self, name: str, source: str) -> ImportExpert:
        task = self.tasks[name]
        return self.shared.add(
            ImportExpert,
            name=f"expert-{name}",
            **self._shown(f"expert {name}", f"experts/{name}", linked=""),
            config={
                "network": self.shared.network,
                "classes": list(task.classes),
                **place_config(source),
            },
            network=self.experiment.network,
            initial=self.shared.initial[task.num_classes],
            source=source,
            tasks={name: task},
        )

    def _trained(self, name: str) -> TrainNetwork:
        section = self.experiment.config["expert"]
        own = section["overrides"].get(name, {})
        task = self.tasks[name]
        ((_, config),) = self._configs([name], with_tests=False)
        return self.shared.train(
            {**section, **own},
            {"task": config, "seed": self.seed},
            name=f"expert-{name}",
            **self._shown(f"expert {name}", f"experts/{name}", linked=""),
            recipe=self.experiment.expert.of(name),
            tasks={name: task},
            initial=self.shared.initial[task.num_classes],
            log=self.shared.log(self.seed, "expert", f"expert-{name}", name),
        )

    def _statistic(self, which: Statistic) -> dict[str, EstimateStatistic]:
        """Return the steps of a statistic of every expert, by task; they are added once."""
        if which not in self.statistics:
            self.statistics[which] = {name: self._of_expert(which, name) for name in self.experts}
        return self.statistics[which]

    def _of_expert(self, which: Statistic, name: str) -> EstimateStatistic:
        calibration = self.experiment.calibration
        fisher = calibration.options_of(which)
        tasks = self.tasks if which.data is DataChoice.pooled else {name: self.tasks[name]}
        usual_kind = which.kind and calibration.fisher_kind  # Gram matrices have no kinds
        usual = Statistic(which.name, calibration.fisher_data, usual_kind)
        parts = [which.name] if which == usual else [which.name, which.kind, which.data]
        file = "-".join(filter(None, parts))
        place = f"statistics/{name}.{file}.safetensors"
        return self.shared.add(
            EstimateStatistic,
            name=f"{which.name}-{name}",
            **self._shown(f"{which} of {name}", place, EstimateStatistic.file),
            config={
                "statistic": which.name,
                "kind": which.kind,
                "data": which.data,
                "mc_samples": None if fisher is None else fisher.mc_samples,
                "tasks": self._configs(tasks, with_tests=False),
                **self.samples,
            },
            expert=self.experts[name],
            fisher=fisher,
            tasks=tasks,
            trainer=self.experiment.trainer,
        )

    def _merge(self, method: Method, section: Config) -> Merge:
        experiment = self.experiment
        trainer = None
        if method.is_trained:
            trainer = result_options(experiment.trainer, training=True)
        statistics = {which: self._statistic(which) for which in method.statistics()}
        return self.shared.add(
            Merge,
            name=f"coded-{method.label}",
            **self._shown(method.label, "coded"),
            config={
                "method": method_config(section, method),
                "code": experiment.code.matrix.tolist(),
                "tasks": self._configs(self.tasks, with_tests=False),
                **self.samples,
                "trainer": trainer,
            },
            method=method,
            experts=self.experts,
            statistics=statistics,
            initial=self.shared.widest if method.reads_initial else None,
            tasks=self.tasks,
            trainer=experiment.trainer,
            log=self.shared.log(self.seed, "method", method.label, method.label),
        )

    def _copies(self, how: Compression) -> CompressExperts:
        return self.shared.add(
            CompressExperts,
            name=f"replicas-{how.name}",
            **self._shown(f"replicas of {how.name}", "replicas"),
            config={"compression": asdict(how), "tasks": list(self.tasks)},
            compression=how,
            experts=self.experts,
            initial=self.shared.widest,
        )
