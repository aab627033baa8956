"""The plan of an experiment: its steps in ``runs/.steps``, and where in ``runs/NAME`` a person sees what they make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from coin.data import TaskData
from coin.data.tasks import task_with
from coin.files.atomic import link
from coin.files.downloads import hub_weights
from coin.networks.hub import PREFIX, local_place
from coin.pipeline.experiment import Experiment
from coin.pipeline.step import STORE, Step
from coin.pipeline.steps.evaluation import Evaluate
from coin.pipeline.steps.imported import ImportExpert
from coin.pipeline.steps.merge import CompressExperts, EstimateStatistic, ExpertStep, Merge
from coin.pipeline.steps.report import Report
from coin.pipeline.steps.train import TrainNetwork, WriteInitial
from coin.statistics.statistic import DataChoice, Statistic
from coin.tracking.runs import RunLog

S = TypeVar("S", bound=Step)


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
    made = _Plan(experiment)
    for seed in experiment.seeds:
        made.add_seed(seed)
    made.add_report("report", experiment.folder, made.evaluations)
    return made.steps


def remove_old_links(experiment: Experiment, steps: Sequence[Planned]) -> None:
    """Remove the links in seeds' folders to files that are not of the experiment's plan any more."""
    planned = {each.step.folder.name for each in steps}
    for seed in experiment.seeds:
        folder = experiment.folder / f"seed-{seed}"
        for path in (*folder.glob("*"), *folder.glob("*/*")):
            parts = path.readlink().parts if path.is_symlink() else ()
            if STORE in parts and (not path.exists() or planned.isdisjoint(parts)):
                path.unlink()


class _Plan:
    """The steps of an experiment, as they are added; first those that all seeds share: base and initialisations.

    What a network's constructor draws depends on the number of classes, below the head too: all have the widest's body.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.store = experiment.folder.parent / STORE
        self.steps: list[Planned] = []
        self.evaluations: dict[int, Evaluate] = {}  # by seed
        self.base = self._base()
        counts = {task.num_classes for task in experiment.tasks.values()}
        self.widest = self._initial(max(counts), None)
        self.initial = {max(counts): self.widest}
        for count in sorted(counts - self.initial.keys(), reverse=True):
            self.initial[count] = self._initial(count, self.widest)

    def add_seed(self, seed: int) -> None:
        """Add the steps of a seed."""
        experiment = self.experiment
        folder = experiment.folder / f"seed-{seed}"
        tasks = {name: task_with(task, seed=seed) for name, task in experiment.tasks.items()}
        experts = self._experts(seed, tasks)
        statistics: dict[Statistic, dict[str, EstimateStatistic]] = {}
        for method in experiment.methods:
            for which in method.statistics():
                if which not in statistics:
                    statistics[which] = self._statistics(seed, which, experts, tasks)
        shared: dict[str, Any] = {
            "store": self.store,
            "code": experiment.code,
            "experts": experts,
            "tasks": tasks,
            "calibration": experiment.calibration,
        }
        merges = []
        for method in experiment.methods:
            merge = Merge(
                **shared,
                name=f"coded-{method.label}",
                method=method,
                statistics={which: statistics[which] for which in method.statistics()},
                initial=self.widest if method.reads_initial else None,
                seed=seed,
                trainer=experiment.trainer if method.is_trained else None,
                hardware=experiment.trainer,
                doing="training" if method.is_trained else "merging",
                log=self._log(seed, "method", method.label, method.label),
            )
            merges.append(self._add(merge, f"seed {seed}: {method.label}", folder / "coded"))
        replicas = self._replicas(seed, experts)
        evaluation = Evaluate(
            **shared,
            name="evaluate",
            experiment=experiment.name,
            merges=merges,
            replicas=replicas,
            decoders=None if experiment.takes_all_decoders else experiment.decoders,
            trainer=experiment.trainer,
            configuration=experiment.recorded(seed),
            yaml=experiment.as_yaml([seed]),
            log=self._log(seed, "evaluate", "evaluate"),
        )
        self.evaluations[seed] = self._add(evaluation, f"seed {seed}: evaluation", folder)
        self.add_report(f"seed {seed}: report", folder, {seed: evaluation})

    def add_report(self, what: str, folder: Path, evaluations: dict[int, Evaluate]) -> None:
        """Add the report of a seed's evaluation, or of all seeds'."""
        self._add(Report(name="report", store=self.store, evaluations=evaluations), what, folder)

    def _add(self, step: S, what: str, place: Path, target: Path | None = None) -> S:
        self.steps.append(Planned(step, what, self.experiment, place, target))
        return step

    def _log(self, seed: int | None, kind: str, name: str, *tags: str) -> RunLog:
        """Return where a training or an evaluation logs to; the base's has no seed."""
        experiment = self.experiment
        folder = experiment.folder / ("base" if seed is None else f"seed-{seed}")
        config = {
            "experiment": experiment.recorded(seed),
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
        step = TrainNetwork(
            name="base",
            store=self.store,
            network=experiment.network,
            config=base,
            task=base.task,
            seed=base.seed,
            trainer=experiment.trainer,
            log=self._log(None, "expert", "base", "base"),
            doing=f"pretraining {experiment.network.name} on {type(base.task).__name__}",
        )
        place = experiment.folder / "base/base.safetensors"
        return self._add(step, "base", place, step.output)

    def _initial(self, count: int, wider: WriteInitial | None) -> WriteInitial:
        base = self.experiment.base
        checkpoint = None
        if base is not None and base.checkpoint is not None:
            checkpoint = Path(base.checkpoint)
        step = WriteInitial(
            name=f"initial-{count}",
            store=self.store,
            network=self.experiment.network,
            classes=count,
            base=self.base,
            checkpoint=checkpoint,
            wider=wider,
        )
        place = self.experiment.folder / f"base/initial-{count}.safetensors"
        return self._add(step, f"initialisation for {count} classes", place, step.output)

    def _experts(self, seed: int, tasks: Mapping[str, TaskData]) -> dict[str, ExpertStep]:
        """Add the experts, imported ones first: a mistake in one shows before others are trained."""
        imported = self.experiment.expert.checkpoints
        order = sorted(tasks, key=lambda name: name not in imported)
        made = {name: self._expert(seed, name, tasks[name]) for name in order}
        return {name: made[name] for name in tasks}

    def _expert(self, seed: int, name: str, task: TaskData) -> ExpertStep:
        experiment = self.experiment
        shared: dict[str, Any] = {
            "name": f"expert-{name}",
            "store": self.store,
            "network": experiment.network,
            "task_name": name,
            "task": task,
            "initial": self.initial[task.num_classes],
        }
        place = experiment.expert.checkpoints.get(name)
        step: ExpertStep
        if place is None:
            config = experiment.expert.of(name)
            log = self._log(seed, "expert", name, name)
            doing = f"fine-tuning for {config.epochs} epochs"
            step = TrainNetwork(
                **shared, config=config, seed=seed, trainer=experiment.trainer, log=log, doing=doing
            )
        else:
            files = hub_weights(local_place(place)) if place.startswith(PREFIX) else [Path(place)]
            classes = list(task.classes)
            doing = f"importing '{place}'"
            step = ImportExpert(**shared, classes=classes, place=place, files=files, doing=doing)
        link_to_folder = experiment.folder / f"seed-{seed}/experts/{name}"
        return self._add(step, f"seed {seed}: expert {name}", link_to_folder, step.folder)

    def _statistics(
        self,
        seed: int,
        which: Statistic,
        experts: Mapping[str, ExpertStep],
        tasks: dict[str, TaskData],
    ) -> dict[str, EstimateStatistic]:
        """Add a statistic of every expert, and return its steps by task."""
        found = {}
        for name, expert in experts.items():
            step = EstimateStatistic(
                name=f"{which.name}-{name}",
                store=self.store,
                which=which,
                fisher=self.experiment.calibration.options_of(which),
                task_name=name,
                expert=expert,
                tasks=tasks if which.data is DataChoice.pooled else {name: tasks[name]},
                calibration=self.experiment.calibration,
                trainer=self.experiment.trainer,
            )
            file = f"{name}.{self._file_name(which)}.safetensors"
            shown = self.experiment.folder / f"seed-{seed}/statistics/{file}"
            what = f"seed {seed}: {which} of {name}"
            found[name] = self._add(step, what, shown, step.output)
        return found

    def _file_name(self, which: Statistic) -> str:
        """Return a statistic's name in files, with kind and data if they are not the experiment's."""
        calibration = self.experiment.calibration
        is_usual_kind = which.kind in (None, calibration.fisher_kind)
        if which.data == calibration.fisher_data and is_usual_kind:
            return str(which.name)
        return "-".join(str(part) for part in (which.name, which.kind, which.data) if part)

    def _replicas(self, seed: int, experts: dict[str, ExpertStep]) -> list[CompressExperts]:
        found = []
        for how in self.experiment.replicas:
            step = CompressExperts(
                name=f"replicas-{how.name}",
                store=self.store,
                compression=how,
                experts=experts,
                initial=self.widest,
            )
            place = self.experiment.folder / f"seed-{seed}/replicas"
            found.append(self._add(step, f"seed {seed}: replicas of {how.name}", place))
        return found
