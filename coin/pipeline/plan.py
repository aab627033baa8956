"""The plan of an experiment: its steps in ``runs/.steps``, and where in ``runs/NAME`` a person sees what they make."""

import filecmp
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from coin.data import TaskData
from coin.data.tasks import task_with
from coin.errors import FileError
from coin.files.atomic import atomic_path
from coin.files.downloads import hub_weights
from coin.networks.hub import PREFIX, local_place
from coin.pipeline.experiment import Experiment
from coin.pipeline.step import STORE, Step
from coin.pipeline.steps.evaluation import Evaluate, shown_names
from coin.pipeline.steps.merge import CompressExperts, EstimateStatistic, Merge
from coin.pipeline.steps.train import ExpertStep, ImportExpert, TrainNetwork, WriteInitial
from coin.reporting.report import REPORT_HTML
from coin.statistics.statistic import DataChoice, Statistic
from coin.tracking.runs import RunLog

S = TypeVar("S", bound=Step)

EVALUATION = "evaluation"
"""The link in a seed's folder to the evaluation whose files are copied there."""


@dataclass(frozen=True, eq=False)
class Planned:
    """A step, what it makes in words, an experiment that has it, and where a person sees its files.

    `links` are places with the file or folder that they link to. `seed_folder` gets copies of an evaluation's files.
    """

    step: Step
    what: str
    experiment: Experiment
    links: Mapping[Path, Path] = field(default_factory=dict)
    seed_folder: Path | None = None

    def publish(self) -> bool:
        """Show the finished step's files at its places, and return whether an evaluation's files have changed there."""
        changed = False
        if self.seed_folder is not None:
            # Until the link leads to this step it leads to the one whose files are there.
            before = self.seed_folder / EVALUATION
            changed = _copy_files(self.step.folder, self.seed_folder, shown_names(before))
        for place, target in self.links.items():
            if target.exists():
                _link(place, target)
        return changed


def plan(experiment: Experiment) -> list[Planned]:
    """Return the steps of an experiment in an order in which they can run, those of one key once."""
    made = _Plan(experiment)
    for seed in experiment.seeds:
        made.add_seed(seed)
    found: dict[str, Planned] = {}
    for planned in made.steps:
        key = planned.step.key
        known = found.get(key, planned)
        found[key] = replace(known, links={**known.links, **planned.links})
    return list(found.values())


def remove_old_links(steps: Sequence[Planned]) -> None:
    """Remove the links in seeds' folders to steps that are not in the experiments' plans any more."""
    places = {place for planned in steps for place in planned.links}
    for folder in {planned.seed_folder for planned in steps if planned.seed_folder is not None}:
        for path in folder.glob("*/*"):
            if path not in places and path.is_symlink() and STORE in path.readlink().parts:
                path.unlink()


class _Plan:
    """The steps of an experiment, as they are added; first those that all seeds share: base and initialisations.

    What a network's constructor draws depends on the number of classes, below the head too: all have the widest's body.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.store = experiment.folder.parent / STORE
        self.steps: list[Planned] = []
        self.base = self._base()
        counts = {task.num_classes for task in experiment.tasks.values()}
        self.widest = self._initial(max(counts), None)
        self.initial = {max(counts): self.widest}
        for count in sorted(counts - self.initial.keys(), reverse=True):
            self.initial[count] = self._initial(count, self.widest)

    def add_seed(self, seed: int) -> None:
        """Add the steps of a seed."""
        experiment = self.experiment
        tasks = {name: task_with(task, seed=seed) for name, task in experiment.tasks.items()}
        experts = {name: self._expert(seed, name, task) for name, task in tasks.items()}
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
            links = {f"seed-{seed}/coded/{path.name}": path.name for path in merge.outputs}
            if method.is_trained:
                links[f"seed-{seed}/logs/{method.label}"] = "logs"
            merges.append(self._add(merge, f"seed {seed}: {method.label}", links))
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
        folder = experiment.folder / f"seed-{seed}"
        shown = {folder / EVALUATION: evaluation.folder}
        self.steps.append(
            Planned(evaluation, f"seed {seed}: evaluation", experiment, shown, folder)
        )

    def _add(self, step: S, what: str, links: Mapping[str, str]) -> S:
        """Add a step; `links` are places in the experiment's folder, with what in the step's they link to."""
        shown = {
            self.experiment.folder / place: step.folder / target for place, target in links.items()
        }
        self.steps.append(Planned(step, what, self.experiment, shown))
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
        return self._add(step, "base", {"base/base.safetensors": step.file, "base/training": ""})

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
        links = {f"base/initial-{count}.safetensors": step.file}
        return self._add(step, f"initialisation for {count} classes", links)

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
        return self._add(step, f"seed {seed}: expert {name}", {f"seed-{seed}/experts/{name}": ""})

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
            place = f"seed-{seed}/statistics/{name}.{self._file_name(which)}.safetensors"
            found[name] = self._add(step, f"seed {seed}: {which} of {name}", {place: step.file})
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
            links = {
                f"seed-{seed}/replicas/{path.name}": path.name for path in step.outputs.values()
            }
            found.append(self._add(step, f"seed {seed}: replicas of {how.name}", links))
        return found


def _link(place: Path, target: Path) -> None:
    """Make a place a relative link to a file or folder."""
    wanted = os.path.relpath(target, place.parent)
    if place.is_symlink() and str(place.readlink()) == wanted:
        return
    if place.is_dir() and not place.is_symlink():
        raise FileError(
            f"found the folder '{place}', expected coin's own link or nothing; give another name or output"
        )
    made = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        made.symlink_to(wanted)
        made.replace(place)
    except OSError as error:
        problem = f"cannot link '{place}' to '{wanted}' ({error.strerror or error})"
        raise FileError(
            f"{problem}; choose an output on a file system that has symbolic links"
        ) from error


def _copy_files(step_folder: Path, seed_folder: Path, before: Sequence[Path]) -> bool:
    """Copy an evaluation's files to a seed's folder, and return whether any has changed; `before` are those there.

    A report of other files is removed first: it is drawn anew even if this process is killed.
    """
    names = shown_names(step_folder)
    removed = [seed_folder / name for name in before if name not in names]
    removed = [place for place in removed if place.is_file()]
    changed = [name for name in names if not _is_copy(seed_folder / name, step_folder / name)]
    if removed or changed:
        (seed_folder / REPORT_HTML).unlink(missing_ok=True)
    for place in removed:
        place.unlink()
    for name in changed:
        with atomic_path(seed_folder / name) as temporary:
            shutil.copyfile(step_folder / name, temporary)
    return bool(removed or changed)


def _is_copy(place: Path, source: Path) -> bool:
    return place.is_file() and filecmp.cmp(source, place, shallow=False)
