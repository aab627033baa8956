"""The plan of an experiment: its steps in ``runs/.steps``, and where in ``runs/NAME`` a person sees what they make."""

import filecmp
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from coin.data import TaskData
from coin.data.tasks import task_with
from coin.errors import ConfigurationError, FileError
from coin.files.atomic import atomic_path
from coin.files.downloads import hub_weights
from coin.networks.hub import PREFIX, local_place
from coin.pipeline.experiment import Experiment
from coin.pipeline.step import STORE, Step
from coin.pipeline.steps.evaluation import Evaluate, shown_files
from coin.pipeline.steps.merge import CompressExperts, EstimateStatistic, Merge
from coin.pipeline.steps.train import ExpertStep, ImportExpert, TrainNetwork, WriteInitial
from coin.statistics.statistic import DataChoice, Statistic
from coin.tracking.runs import RunLog

S = TypeVar("S", bound=Step)


@dataclass(frozen=True, eq=False)
class Planned:
    """A step, what it makes in words, an experiment that has it, and where a person sees its files.

    `links` are places with the file or folder that they link to, `copies` the folders that an evaluation is copied to,
    each with the places of all links that its experiment has there now.
    """

    step: Step
    what: str
    experiment: Experiment
    links: Mapping[Path, Path] = field(default_factory=dict)
    copies: Mapping[Path, frozenset[Path]] = field(default_factory=dict)

    def publish(self) -> bool:
        """Show the finished step's files at its places, and return whether anything has changed there.

        What an evaluation has not is removed from its folders: results, and links to what it has not measured.
        """
        changed = [_link(place, target) for place, target in self.links.items() if target.exists()]
        for folder, links in self.copies.items():
            shown = {folder / path.relative_to(self.step.folder): path for path in shown_files(self.step.folder)}
            changed += [_copy(path, place) for place, path in shown.items()]
            changed += [_remove(place) for place in shown_files(folder) if place not in shown]
            changed += [_remove(place) for place in _links_in(folder) if place not in links]
        return any(changed)


def union(plans: Iterable[Iterable[Planned]]) -> list[Planned]:
    """Return the steps of several plans, those of one key once, in an order in which they can run."""
    found: dict[str, Planned] = {}
    for planned in (each for plan in plans for each in plan):
        if (known := found.get(planned.step.key)) is not None:
            planned = replace(known, links={**known.links, **planned.links}, copies={**known.copies, **planned.copies})
        found[planned.step.key] = planned
    return list(found.values())


def plan(experiment: Experiment) -> list[Planned]:
    """Return the steps of an experiment in an order in which they can run."""
    made = _Plan(experiment)
    for seed in experiment.seeds:
        made.add_seed(seed)
    return union([made.steps])


class _Plan:
    """The steps of an experiment, as they are added; first those that all seeds share: base and initialisations.

    What a network's constructor draws depends on the number of classes, below the head too: all have the widest's body.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.of, self.store = experiment, experiment.folder.parent / STORE
        self.steps: list[Planned] = []
        self.base = self._base()
        widest, *others = sorted({task.num_classes for task in experiment.tasks.values()}, reverse=True)
        self.widest = self._initial(widest, None)
        self.initial = {widest: self.widest} | {count: self._initial(count, self.widest) for count in others}

    def add_seed(self, seed: int) -> None:
        """Add the steps of a seed."""
        of, folder, said = self.of, f"seed-{seed}", f"seed {seed}: "
        tasks = {name: task_with(task, seed=seed) for name, task in of.tasks.items()}
        experts = {
            name: self._add(self._expert(seed, name, task), f"{said}expert {name}", {f"{folder}/experts/{name}": ""})
            for name, task in tasks.items()
        }
        statistics: dict[Statistic, dict[str, EstimateStatistic]] = {}
        for which in dict.fromkeys(which for method in of.methods for which in method.statistics()):
            for task, expert in experts.items():
                step = EstimateStatistic(
                    name=f"{which.name}-{task}",
                    store=self.store,
                    which=which,
                    task_name=task,
                    expert=expert,
                    tasks=tasks if which.data is DataChoice.pooled else {task: tasks[task]},
                    calibration=of.calibration,
                    trainer=of.trainer,
                )
                place = f"{folder}/statistics/{task}.{self._called(which)}.safetensors"
                statistics.setdefault(which, {})[task] = self._add(step, f"{said}{which} of {task}", {place: step.file})
        shared: dict[str, Any] = {"store": self.store, "code": of.code, "experts": experts, "tasks": tasks}
        shared["calibration"] = of.calibration
        merges = []
        for method in of.methods:
            name = method.label
            merge = Merge(
                **shared,
                name=f"coded-{name}",
                method=method,
                statistics={which: statistics[which] for which in method.statistics()},
                initial=self.widest if method.reads_initial else None,
                seed=seed,
                trainer=of.trainer if method.is_trained else None,
                hardware=of.trainer,
                doing="training" if method.is_trained else "merging",
                log=self._log(seed, "method", name, name),
            )
            links = {f"{folder}/coded/{path.name}": path.name for path in merge.outputs}
            links |= {f"{folder}/logs/{name}": "logs"} if method.is_trained else {}
            merges.append(self._add(merge, said + name, links))
        replicas = []
        for how in of.replicas:
            named: Any = {"name": f"replicas-{how.name}", "store": self.store}
            copies = CompressExperts(**named, compression=how, experts=experts, initial=self.widest)
            links = {f"{folder}/replicas/{path.name}": path.name for path in copies.outputs.values()}
            replicas.append(self._add(copies, f"{said}replicas of {how.name}", links))
        evaluation = Evaluate(
            **shared,
            name="evaluate",
            experiment=of.name,
            merges=merges,
            replicas=replicas,
            decoders=None if of.takes_all_decoders else of.decoders,
            trainer=of.trainer,
            configuration=of.recorded(seed),
            yaml=of.as_yaml([seed]),
            log=self._log(seed, "evaluate", "evaluate"),
        )
        links_now = frozenset(place for each in self.steps for place in each.links)
        shown = {of.folder / folder: links_now}
        self.steps.append(Planned(evaluation, f"{said}evaluation", of, copies=shown))

    def _add(self, step: S, what: str, links: Mapping[str, str]) -> S:
        """Add a step; `links` are places in the experiment's folder, with what in the step's they link to."""
        shown = {self.of.folder / place: step.folder / target for place, target in links.items()}
        self.steps.append(Planned(step, what, self.of, shown))
        return step

    def _log(self, seed: int | None, kind: str, name: str, *tags: str) -> RunLog:
        """Return where a training or an evaluation logs to; without a seed, that of the base."""
        of = self.of
        called = [of.name, *([] if seed is None else [f"seed-{seed}"])]
        called += ["expert"] if kind == "expert" and seed is not None else []
        config = {
            "experiment": of.recorded(seed),
            "network": of.network.name,
            "seed": seed,
            kind if kind == "method" else "task": name,
            "samples_per_task": of.calibration.samples_per_task,
            "num_experts": len(of.tasks),
            "num_coded": of.code.num_coded,
        }
        folder = of.folder / ("base" if seed is None else f"seed-{seed}")
        every = (*tags, of.network.name, *of.wandb.tags)
        return RunLog(folder, of.name, kind, "-".join([*called, name]), every, config)

    def _base(self) -> TrainNetwork | None:
        of, base = self.of, self.of.base
        if base is None or base.task is None:
            return None
        step = TrainNetwork(
            name="base",
            store=self.store,
            network=of.network,
            config=base,
            task=base.task,
            seed=base.seed,
            trainer=of.trainer,
            log=self._log(None, "expert", "base", "base"),
            doing=f"pretraining {of.network.name} on {type(base.task).__name__}",
        )
        return self._add(step, "base", {"base/base.safetensors": step.file, "base/training": ""})

    def _initial(self, count: int, wider: WriteInitial | None) -> WriteInitial:
        base = self.of.base
        step = WriteInitial(
            name=f"initial-{count}",
            store=self.store,
            network=self.of.network,
            classes=count,
            base=self.base,
            checkpoint=None if base is None or base.checkpoint is None else Path(base.checkpoint),
            wider=wider,
        )
        links = {f"base/initial-{count}.safetensors": step.file}
        return self._add(step, f"initialisation for {count} classes", links)

    def _expert(self, seed: int, name: str, task: TaskData) -> ExpertStep:
        of, initial = self.of, self.initial[task.num_classes]
        called: dict[str, Any] = {"name": f"expert-{name}", "store": self.store, "network": of.network}
        called |= {"task_name": name, "task": task, "initial": initial}
        if (place := of.expert.checkpoints.get(name)) is None:
            config = of.expert.of(name)
            called |= {"doing": f"fine-tuning for {config.epochs} epochs", "log": self._log(seed, "expert", name, name)}
            return TrainNetwork(**called, config=config, seed=seed, trainer=of.trainer)
        files = hub_weights(local_place(place)) if place.startswith(PREFIX) else [Path(place)]
        if not place.startswith(PREFIX) and not files[0].is_file():
            told = f"found no file '{place}', expected an expert's weights"
            if (Path(place) / "config.json").is_file():
                raise ConfigurationError(f"{told}; for that folder of Hugging Face's write hf/{place}")
            raise ConfigurationError(f"{told}; check expert.checkpoints")
        called["doing"] = f"importing '{place}'"
        return ImportExpert(**called, classes=list(task.classes), place=place, files=files, head=task.head)

    def _called(self, which: Statistic) -> str:
        """Return a statistic's name in files, with kind and data if they are not the experiment's."""
        calibration = self.of.calibration
        data = DataChoice.pooled if calibration.fisher_data is DataChoice.pooled else DataChoice.own
        plain = Statistic(which.name, data, which.kind and calibration.fisher_kind)
        return which.name + ("" if which == plain else "".join(f"-{part}" for part in (which.kind, which.data) if part))


def _link(place: Path, target: Path) -> bool:
    """Make a place a relative link to a file or folder, and return whether it was another."""
    wanted = os.path.relpath(target, place.parent)
    if place.is_symlink() and str(place.readlink()) == wanted:
        return False
    if place.is_dir() and not place.is_symlink():
        raise FileError(f"found the folder '{place}', expected coin's own link or nothing; give another name or output")
    made = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        made.symlink_to(wanted)
        made.replace(place)
    except OSError as error:
        told = f"cannot link '{place}' to '{wanted}' ({error.strerror or error})"
        raise FileError(f"{told}; choose an output on a file system that has symbolic links") from error
    return True


def _links_in(folder: Path) -> list[Path]:
    """Return the links to steps' files in the rooms of a seed's folder."""
    rooms = ("coded", "experts", "logs", "replicas", "statistics")
    return [path for room in rooms for path in (folder / room).glob("*") if path.is_symlink()]


def _remove(place: Path) -> bool:
    """Remove a file or link."""
    place.unlink()
    return True


def _copy(path: Path, place: Path) -> bool:
    """Copy a file, and return whether there was another."""
    with suppress(OSError):
        if filecmp.cmp(path, place, shallow=False):
            return False
    with atomic_path(place) as temporary:
        shutil.copyfile(path, temporary)
    return True
