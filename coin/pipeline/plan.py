"""The plan of an experiment: its steps in ``runs/.steps``, and where in ``runs/NAME`` a person sees what they make."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from coin.data.tasks import task_with
from coin.files.atomic import link
from coin.files.downloads import hub_weights
from coin.merging import Method
from coin.networks import Compression
from coin.networks.hub import PREFIX, local_place
from coin.pipeline.experiment import Experiment
from coin.pipeline.options import method_config, network_config, result_options, task_config
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


@dataclass(frozen=True, eq=False)
class Planned:
    """A step, what it makes in words, an experiment that has it, and where a person sees its files.

    `place` is a link to `target`, a file or folder of the step's; without one it is a folder of links to all its files.
    """

    step: Step
    what: str
    experiment: Experiment
    place: Path
    target: Path | None = None

    def publish(self) -> None:
        """Link the finished step's files."""
        if self.target is not None:
            link(self.place, self.target)
            return
        for path in self.step.shown:
            link(self.place / path.name, path)


def plan(experiment: Experiment) -> list[Planned]:
    """Return the steps of an experiment in an order in which they can run; seeds may share some, which come twice."""
    shared = _Shared(experiment)
    evaluations = {}
    for seed in experiment.seeds:
        evaluations[seed] = _Seed(shared, seed).evaluate()
    shared.report("report", experiment.folder, evaluations)
    return shared.steps


def remove_old_links(experiment: Experiment, steps: Sequence[Planned]) -> None:
    """Remove the links in seeds' folders to files that are not of the experiment's plan any more."""
    planned = {each.step.folder.name for each in steps}
    for seed in experiment.seeds:
        folder = experiment.folder / f"seed-{seed}"
        for path in (*folder.glob("*"), *folder.glob("*/*")):
            parts = path.readlink().parts if path.is_symlink() else ()
            if STORE in parts and (not path.exists() or planned.isdisjoint(parts)):
                path.unlink()


class _Shared:
    """The steps of an experiment as they are added, and those that all seeds share: base and initialisations.

    What a network's constructor draws depends on the number of classes, below the head too: all have the widest's body.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.steps: list[Planned] = []
        self.store = experiment.folder.parent / STORE
        self.network = network_config(experiment.config["network"], experiment.network)
        self.base = self._base()
        counts = {task.num_classes for task in experiment.tasks.values()}
        self.widest = self._initial(max(counts), None)
        self.initial = {max(counts): self.widest}
        for count in sorted(counts - self.initial.keys(), reverse=True):
            self.initial[count] = self._initial(count, self.widest)

    def add(self, step: S, what: str, place: Path, target: Path | None = None) -> S:
        """Add a step to the plan."""
        self.steps.append(Planned(step, what, self.experiment, place, target))
        return step

    def report(self, what: str, folder: Path, evaluations: dict[int, Evaluate]) -> None:
        """Add the report of one seed's evaluation, or of all seeds'."""
        self.add(Report(name="report", store=self.store, evaluations=evaluations), what, folder)

    def recipe(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a training's key has of the section ``base`` or ``expert`` and of the Trainer's options."""
        recipe = {name: value for name, value in section.items() if name not in _ELSEWHERE}
        trainer = result_options(self.experiment.trainer, training=True)
        return {"network": self.network, "recipe": recipe, "trainer": trainer}

    def log(self, seed: int | None, kind: str, name: str, *tags: str) -> RunLog:
        """Return where a training or an evaluation logs to; the base's has no seed."""
        experiment = self.experiment
        folder = experiment.folder / ("base" if seed is None else f"seed-{seed}")
        config = {
            "experiment": experiment.of_seeds(experiment.seeds if seed is None else [seed]),
            "network": experiment.network.name,
            "seed": seed,
            "method" if kind == "method" else "task": name,
            "samples_per_task": experiment.calibration.samples_per_task,
            "num_experts": len(experiment.tasks),
            "num_coded": experiment.code.num_coded,
        }
        if seed is None:
            called = name
        elif kind == "expert":
            called = f"seed-{seed}-expert-{name}"
        else:
            called = f"seed-{seed}-{name}"
        every_tag = (*tags, experiment.network.name, *experiment.wandb.tags)
        return RunLog(
            folder, experiment.name, kind, f"{experiment.name}-{called}", every_tag, config
        )

    def _base(self) -> TrainNetwork | None:
        experiment = self.experiment
        base = experiment.base
        if base is None or base.task is None:
            return None
        section = experiment.config["base"]
        config = {
            **self.recipe(section),
            "task": task_config(section["task"], base.task, with_tests=False),
            "seed": base.seed,
        }
        step = TrainNetwork(
            name="base",
            store=self.store,
            config=config,
            network=experiment.network,
            recipe=base,
            task=base.task,
            trainer=experiment.trainer,
            log=self.log(None, "expert", "base", "base"),
        )
        return self.add(step, "base", experiment.folder / "base/base.safetensors", step.output)

    def _initial(self, count: int, wider: WriteInitial | None) -> WriteInitial:
        experiment = self.experiment
        checkpoint = None if experiment.base is None else experiment.base.checkpoint
        config = {
            "network": self.network,
            "classes": count,
            "checkpoint": None if checkpoint is None else Path(checkpoint),
        }
        step = WriteInitial(
            name=f"initial-{count}",
            store=self.store,
            config=config,
            network=experiment.network,
            base=self.base,
            wider=wider,
        )
        place = experiment.folder / f"base/initial-{count}.safetensors"
        return self.add(step, f"initialisation for {count} classes", place, step.output)


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
        config = {
            "experiment": experiment.name,
            "code": experiment.code.matrix.tolist(),
            "decoders": experiment.config.get("decoders"),
            "tasks": self._tasks(self.tasks, with_tests=True),
            **self.samples,
            "promise_samples": calibration.promise_samples,
            "promise_alpha": calibration.promise_alpha,
            "promise_confidence": calibration.promise_confidence,
            "trainer": result_options(experiment.trainer, training=False),
        }
        configs = experiment.config["methods"]
        step = Evaluate(
            name="evaluate",
            store=self.shared.store,
            config=config,
            experts=self.experts,
            merges=list(map(self._merge, experiment.methods, configs)),
            replicas=[self._copies(how) for how in experiment.replicas],
            tasks=self.tasks,
            trainer=experiment.trainer,
            experiment=experiment.of_seeds([self.seed]),
            log=self.shared.log(self.seed, "evaluate", "evaluate"),
        )
        self._add(step, "evaluation", self.folder)
        self.shared.report(f"seed {self.seed}: report", self.folder, {self.seed: step})
        return step

    def _add(self, step: S, what: str, place: Path, target: Path | None = None) -> S:
        return self.shared.add(step, f"seed {self.seed}: {what}", place, target)

    def _tasks(self, names: Mapping[str, Any], *, with_tests: bool) -> list[Any]:
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
            step = self._imported(name, place)
            made[name] = self._add(step, f"expert {name}", self._place(name), step.folder)
        for name in self.tasks:
            if name not in places:
                trained = self._trained(name)
                made[name] = self._add(trained, f"expert {name}", self._place(name), trained.folder)
        return {name: made[name] for name in self.tasks}

    def _place(self, task: str) -> Path:
        return self.folder / "experts" / task

    def _imported(self, name: str, place: str) -> ImportExpert:
        task = self.tasks[name]
        files = hub_weights(local_place(place)) if place.startswith(PREFIX) else [Path(place)]
        config = {
            "network": self.shared.network,
            "task_name": name,
            "classes": list(task.classes),
            "place": place_config(place),
            "files": files,
        }
        return ImportExpert(
            name=f"expert-{name}",
            store=self.shared.store,
            config=config,
            network=self.experiment.network,
            initial=self.shared.initial[task.num_classes],
            place=place,
            task=task,
        )

    def _trained(self, name: str) -> TrainNetwork:
        experiment = self.experiment
        section = experiment.config["expert"]
        own = section["overrides"].get(name, {})
        recipe = experiment.expert.of(name)
        task = self.tasks[name]
        config = {
            **self.shared.recipe({**section, **own}),
            "task_name": name,
            "task": task_config(experiment.config["tasks"][name], task, with_tests=False),
            "seed": self.seed,
        }
        return TrainNetwork(
            name=f"expert-{name}",
            store=self.shared.store,
            config=config,
            network=experiment.network,
            recipe=recipe,
            task=task,
            trainer=experiment.trainer,
            initial=self.shared.initial[task.num_classes],
            log=self.shared.log(self.seed, "expert", name, name),
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
        config = {
            "statistic": which.name,
            "kind": which.kind,
            "data": which.data,
            "mc_samples": None if fisher is None else fisher.mc_samples,
            "task_name": name,
            "tasks": self._tasks(tasks, with_tests=False),
            **self.samples,
        }
        step = EstimateStatistic(
            name=f"{which.name}-{name}",
            store=self.shared.store,
            config=config,
            expert=self.experts[name],
            fisher=fisher,
            tasks=tasks,
            trainer=self.experiment.trainer,
        )
        file = str(which.name)
        is_usual_kind = which.kind in (None, calibration.fisher_kind)
        if which.data != calibration.fisher_data or not is_usual_kind:
            file = "-".join(str(part) for part in (which.name, which.kind, which.data) if part)
        place = self.folder / f"statistics/{name}.{file}.safetensors"
        return self._add(step, f"{which} of {name}", place, step.output)

    def _merge(self, method: Method, section: Mapping[str, Any]) -> Merge:
        experiment = self.experiment
        trainer = None
        if method.is_trained:
            trainer = result_options(experiment.trainer, training=True)
        config = {
            "method": method_config(section, method),
            "code": experiment.code.matrix.tolist(),
            "tasks": self._tasks(self.tasks, with_tests=False),
            **self.samples,
            "trainer": trainer,
        }
        step = Merge(
            name=f"coded-{method.label}",
            store=self.shared.store,
            config=config,
            method=method,
            experts=self.experts,
            statistics={which: self._statistic(which) for which in method.statistics()},
            initial=self.shared.widest if method.reads_initial else None,
            tasks=self.tasks,
            trainer=experiment.trainer,
            log=self.shared.log(self.seed, "method", method.label, method.label),
        )
        return self._add(step, method.label, self.folder / "coded")

    def _copies(self, how: Compression) -> CompressExperts:
        step = CompressExperts(
            name=f"replicas-{how.name}",
            store=self.shared.store,
            config={"compression": asdict(how), "tasks": list(self.tasks)},
            compression=how,
            experts=self.experts,
            initial=self.shared.widest,
        )
        return self._add(step, f"replicas of {how.name}", self.folder / "replicas")
