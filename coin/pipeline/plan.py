"""The plan of an experiment: its steps, and where a person sees what they make.

Steps live in ``runs/.steps``; ``runs/NAME/seed-K/experts/TASK`` and the like are links to them, and the results of an
evaluation are copied. Several seeds, experiments and points of a sweep have one step where they have one key.
"""

import filecmp
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coin.data import TaskData
from coin.data.tasks import task_with
from coin.errors import ConfigurationError, FileError
from coin.files.atomic import atomic_path
from coin.files.downloads import hub_weights
from coin.merging import Method
from coin.networks import Compression
from coin.networks.hub import PREFIX, local_place
from coin.pipeline.experiment import Experiment
from coin.pipeline.step import STORE, Step
from coin.pipeline.steps.compress import CompressExperts
from coin.pipeline.steps.evaluation import Evaluate
from coin.pipeline.steps.merge import Merge, coded_name
from coin.pipeline.steps.statistics import EstimateStatistic
from coin.pipeline.steps.train import ExpertStep, ImportExpert, TrainNetwork, WriteInitial
from coin.statistics.statistic import DataChoice, Statistic
from coin.tracking.runs import RunLog


@dataclass(frozen=True, eq=False)
class Planned:
    """A step, what it makes in words, and where a person sees its files.

    `links` are places with the file or folder that they link to, `copies` the folders that an evaluation is copied to;
    `experiment` is one that has the step.
    """

    step: Step
    what: str
    experiment: Experiment
    links: Mapping[Path, Path] = field(default_factory=dict)
    copies: tuple[Path, ...] = ()

    def publish(self) -> bool:
        """Show the finished step's files at its places, and return whether anything has changed there."""
        changed = [_link(place, target) for place, target in self.links.items() if target.exists()]
        files = self.step.files if isinstance(self.step, Evaluate) else []
        for folder in self.copies:
            changed += [_copy(path, folder / path.relative_to(self.step.folder)) for path in files]
        return any(changed)


def union(plans: Iterable[Iterable[Planned]]) -> list[Planned]:
    """Return the steps of several plans, those of one key once, in an order in which they can run."""
    found: dict[str, Planned] = {}
    for planned in (each for plan in plans for each in plan):
        if (known := found.get(planned.step.key)) is not None:
            planned = replace(known, links={**known.links, **planned.links}, copies=known.copies + planned.copies)
        found[planned.step.key] = planned
    return list(found.values())


def plan(experiment: Experiment) -> list[Planned]:
    """Return the steps of an experiment in an order in which they can run."""
    shared = _Shared(experiment)
    return union([shared.planned(), *(_Seed(shared, seed).planned() for seed in experiment.seeds)])


class _Shared:
    """The steps that all seeds share: the base, and the shared initialisation with each number of classes."""

    def __init__(self, experiment: Experiment) -> None:
        self.of, self.store = experiment, experiment.folder.parent / STORE
        self.folder, file = experiment.folder / "base", experiment.network.weights_file
        self.weights = file
        self.base = self._base()
        counts = sorted({task.num_classes for task in experiment.tasks.values()}, reverse=True)
        self.widest = self._initial(counts[0], None)
        # What a constructor draws depends on the class count, below the head too: hence the wider one's body.
        self.initial = {counts[0]: self.widest} | {count: self._initial(count, self.widest) for count in counts[1:]}

    def planned(self) -> list[Planned]:
        """Return the steps."""
        base, found = self.base, []
        if base is not None:
            links = {self.folder / "base.safetensors": base.output, self.folder / "training": base.folder}
            found = [Planned(base, "base", self.of, links)]
        for count, step in self.initial.items():
            links = {self.folder / f"initial-{count}.safetensors": step.output}
            found.append(Planned(step, f"initialisation for {count} classes", self.of, links))
        return found

    def log(self, seed: int | None, kind: str, name: str, tags: Sequence[str] = ()) -> RunLog:
        """Return where a training or an evaluation logs to."""
        of, code = self.of, self.of.code
        seeds, kinds = [] if seed is None else [f"seed-{seed}"], [kind] if kind == "expert" and seed is not None else []
        config = {
            "experiment": {**of.config_dict(seed), "code": code.matrix.tolist()},
            "network": of.network.name,
            "seed": seed,
            kind if kind == "method" else "task": name,
            "samples_per_task": of.calibration.samples_per_task,
            "num_experts": len(of.tasks),
            "num_coded": code.num_coded,
        }
        folder = self.folder if seed is None else of.folder / f"seed-{seed}"
        every = (*tags, of.network.name, *of.wandb.tags)
        return RunLog(folder, of.name, kind, "-".join([of.name, *seeds, *kinds, name]), every, config)

    def _base(self) -> TrainNetwork | None:
        of, base = self.of, self.of.base
        if base is None or base.task is None:
            return None
        return TrainNetwork(
            name="base",
            store=self.store,
            network=of.network,
            config=base,
            task=task_with(base.task, image_size=of.network.image_size),
            seed=base.seed,
            trainer=of.trainer,
            weights=self.weights,
            log=self.log(None, "expert", "base", ["base"]),
            doing=f"pretraining {of.network.name} on {type(base.task).__name__}",
        )

    def _initial(self, count: int, wider: WriteInitial | None) -> WriteInitial:
        base = self.of.base
        return WriteInitial(
            name=f"initial-{count}",
            store=self.store,
            network=self.of.network,
            classes=count,
            base=self.base,
            checkpoint=None if base is None or base.checkpoint is None else Path(base.checkpoint),
            weights=self.weights,
            wider=wider,
        )


class _Seed:
    """The steps of one seed."""

    def __init__(self, shared: _Shared, seed: int) -> None:
        self.shared, self.seed, self.of, self.store = shared, seed, shared.of, shared.store
        self.folder = self.of.folder / f"seed-{seed}"
        self.tasks = self.of.tasks_of(seed)
        self.experts = {name: self._expert(name, task) for name, task in self.tasks.items()}
        wanted = dict.fromkeys(which for method in self.of.methods for which in method.statistics())
        self.statistics = {which: {task: self._statistic(which, task) for task in self.tasks} for which in wanted}
        self.merges = [self._merge(method) for method in self.of.methods]
        self.replicas = [self._replicas(compression) for compression in self.of.replicas]
        self.evaluation = self._evaluation()

    def planned(self) -> list[Planned]:
        """Return the steps, in an order in which they can run."""
        found: list[Planned] = []

        def add(step: Step, what: str, links: Mapping[Path, Path], copies: tuple[Path, ...] = ()) -> None:
            named = {self.folder / place: target for place, target in links.items()}
            found.append(Planned(step, f"seed {self.seed}: {what}", self.of, named, copies))

        for name, expert in self.experts.items():
            add(expert, f"expert {name}", {Path("experts", name): expert.folder})
        for which, steps in self.statistics.items():
            for task, step in steps.items():
                place = Path("statistics", f"{task}.{self._called(which)}.safetensors")
                add(step, f"{which} of {task}", {place: step.output})
        for merge in self.merges:
            name = coded_name(merge.method)
            links = {Path("coded", path.name): path for path in merge.outputs}
            if merge.method.is_trained:
                links[Path("logs", name)] = merge.folder / "logs"
            add(merge, name, links)
        for copies in self.replicas:
            places = {Path("replicas", path.name): path for path in copies.outputs.values()}
            add(copies, f"replicas of {copies.compression.name}", places)
        add(self.evaluation, "evaluation", {}, (self.folder,))
        return found

    def _expert(self, name: str, task: TaskData) -> ExpertStep:
        of, initial = self.of, self.shared.initial[task.num_classes]
        called: dict[str, Any] = {"name": f"expert-{name}", "store": self.store, "network": of.network}
        called |= {"task_name": name, "task": task, "initial": initial}
        if (place := of.expert.checkpoints.get(name)) is None:
            log = self.shared.log(self.seed, "expert", name, [name])
            config = of.expert.of(name)
            called["doing"] = f"fine-tuning for {config.epochs} epochs"
            return TrainNetwork(**called, config=config, seed=self.seed, trainer=of.trainer, log=log)
        files = hub_weights(local_place(place)) if place.startswith(PREFIX) else [Path(place)]
        if not place.startswith(PREFIX) and not files[0].is_file():
            raise ConfigurationError(f"found no file '{place}', expected an expert's weights; check expert.checkpoints")
        called["doing"] = f"importing '{place}'"
        return ImportExpert(**called, classes=list(task.classes), place=place, files=files, head=task.head)

    def _statistic(self, which: Statistic, task: str) -> EstimateStatistic:
        return EstimateStatistic(
            name=f"{which.name}-{task}",
            store=self.store,
            which=which,
            task_name=task,
            expert=self.experts[task],
            tasks=self.tasks if which.data is DataChoice.pooled else {task: self.tasks[task]},
            calibration=self.of.calibration,
            trainer=self.of.trainer,
        )

    def _called(self, which: Statistic) -> str:
        """Return a statistic's name in files, with kind and data if they are not the experiment's."""
        calibration = self.of.calibration
        data = DataChoice.pooled if calibration.fisher_data is DataChoice.pooled else DataChoice.own
        plain = Statistic(which.name, data, which.kind and calibration.fisher_kind)
        return which.name + ("" if which == plain else "".join(f"-{part}" for part in which.options.values()))

    def _merge(self, method: Method) -> Merge:
        name = coded_name(method)
        return Merge(
            name=f"coded-{name}",
            store=self.store,
            method=method,
            code=self.of.code,
            experts=self.experts,
            statistics={which: self.statistics[which] for which in method.statistics()},
            initial=self.shared.widest if method.reads_initial else None,
            tasks=self.tasks,
            seed=self.seed,
            calibration=self.of.calibration,
            trainer=self.of.trainer if method.is_trained else None,
            doing="training" if method.is_trained else "merging",
            log=self.shared.log(self.seed, "method", name, [method.label]),
        )

    def _replicas(self, compression: Compression) -> CompressExperts:
        return CompressExperts(
            name=f"replicas-{compression.name}",
            store=self.store,
            compression=compression,
            experts=self.experts,
            initial=self.shared.widest,
        )

    def _evaluation(self) -> Evaluate:
        of = self.of
        return Evaluate(
            name="evaluate",
            store=self.store,
            experiment=of.name,
            experts=self.experts,
            merges=self.merges,
            replicas=self.replicas,
            code=self.of.code,
            decoders=None if of.takes_all_decoders else of.decoders,
            tasks=self.tasks,
            calibration=of.calibration,
            trainer=of.trainer,
            configuration=of.config_dict(self.seed),
            yaml=of.as_yaml([self.seed]),
            log=self.shared.log(self.seed, "evaluate", "evaluate"),
        )


def _link(place: Path, target: Path) -> bool:
    """Make a place a relative link to a file or folder, and return whether it was another."""
    wanted = os.path.relpath(target, place.parent)
    if place.is_symlink() and str(place.readlink()) == wanted:
        return False
    if place.is_dir() and not place.is_symlink():
        raise FileError(f"found the folder '{place}', expected coin's own link or nothing; give another name or output")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".", dir=place.parent)) / place.name
        try:
            made.symlink_to(wanted)
            made.replace(place)
        finally:
            shutil.rmtree(made.parent)
    except OSError as error:
        told = f"cannot link '{place}' to '{wanted}' ({error.strerror or error})"
        raise FileError(f"{told}; choose an output on a file system that has symbolic links") from error
    return True


def _copy(path: Path, place: Path) -> bool:
    """Copy a file, and return whether there was another."""
    with suppress(OSError):
        if filecmp.cmp(path, place, shallow=False):
            return False
    with atomic_path(place) as temporary:
        shutil.copyfile(path, temporary)
    return True
