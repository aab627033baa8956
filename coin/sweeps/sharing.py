"""What the points of a sweep share: the base, experts, statistics and chosen codes that are the same for several.

Every point's folder names the keys of its shared steps in ``sweep.json``. A point that has not done a step yet takes it
over from another with the same key: the step's outputs are linked into its folder along with the step's record. That is
sound whatever the keys here say, since ``coin run`` believes a record only if the step's own key and the contents of
all outputs agree; a wrong link costs time, never a wrong number.
"""

import glob
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coin.data.tasks import task_with
from coin.experiment.experiment import Experiment
from coin.experiment.records import step_key
from coin.files.atomic import write_text

_SWEEP_JSON = "sweep.json"


@dataclass(frozen=True)
class SharedStep:
    """A step of an experiment that other points of a sweep may do alike.

    Args:
        folder: The part of the experiment's folder that holds outputs and records: ``base`` or ``seed-K``.
        pattern: The records' file names, as a pattern.
        key: The same for points that do this step alike.
        awaited: Whether a point waits while another does this step, rather than do it a second time.
    """

    folder: str
    pattern: str
    key: str
    awaited: bool = True

    @property
    def name(self) -> str:
        """What tells this step from the others of its experiment."""
        return f"{self.folder}/{self.pattern}"

    def records(self, experiment_folder: Path) -> list[Path]:
        """Return the records of this step that an experiment's folder holds."""
        return sorted((experiment_folder / self.folder / ".steps").glob(self.pattern))


def shared_steps(experiment: Experiment) -> list[SharedStep]:
    """Return the steps that another experiment may have done alike: base, experts, statistics and chosen codes."""
    origin = {"network": experiment.network, "base": experiment.base, "trainer": experiment.trainer}
    steps = []
    if experiment.base is not None and experiment.base.task is not None:
        steps.append(SharedStep("base", "base.json", step_key(origin)))
    counts = sorted({task.num_classes for task in experiment.tasks.values()})
    steps += [SharedStep("base", f"initial-{count}.json", step_key([origin, count])) for count in counts]
    for seed in experiment.seeds:
        experts = []
        for name, task in experiment.tasks.items():
            expert = experiment.expert  # another task's overrides are not this expert's
            training = [replace(expert, overrides={}, checkpoints={}), expert.overrides.get(name)]
            own = [training, expert.checkpoints.get(name), name, task_with(task, seed=seed), task.num_classes, seed]
            key = step_key([origin, own])
            experts.append(key)
            steps.append(SharedStep(f"seed-{seed}", f"{glob.escape(f'expert-{name}')}.json", key))
        key = step_key([experts, experiment.calibration])
        steps += [SharedStep(f"seed-{seed}", f"*.{kind}*.json", key, awaited=False) for kind in ("fisher", "gram")]
        if experiment.code is None:
            steps.append(SharedStep(f"seed-{seed}", "code.json", key, awaited=False))
    return steps


class Shelf:
    """One experiment's folder within a sweep, and what it shares with its neighbours.

    Args:
        folder: The experiment's folder, beside those of the sweep's other points.
        steps: Its shared steps.
    """

    def __init__(self, folder: Path, steps: Sequence[SharedStep]) -> None:
        self.folder = folder
        self.steps = steps

    def waits_for(self, other: "Shelf") -> bool:
        """Return whether the other experiment, which is running, is about to do a step that this one lacks."""
        theirs = {step.key for step in other.steps if step.awaited and not step.records(other.folder)}
        return any(step.key in theirs for step in self.steps if step.awaited and not step.records(self.folder))

    def open(self) -> list[str]:
        """Take over what neighbours have done alike, and declare the own keys.

        Returns:
            A line for each step that was taken over.
        """
        declared = _declared(self.folder)
        for step in self.steps:
            if declared.get(step.name, step.key) != step.key:  # the sweep's file has changed: no record holds any more
                for record in step.records(self.folder):
                    record.unlink()
        write_text(self.folder / _SWEEP_JSON, json.dumps({step.name: step.key for step in self.steps}, indent=1))
        return list(self._take_over())

    def _take_over(self) -> Iterator[str]:
        neighbours = [path.parent for path in sorted(self.folder.parent.glob(f"*/{_SWEEP_JSON}"))]
        keys = {neighbour: _declared(neighbour) for neighbour in neighbours if neighbour != self.folder}
        for step in self.steps:
            for neighbour, declared in keys.items():
                if step.records(self.folder):
                    break
                if declared.get(step.name) != step.key:
                    continue
                for record in step.records(neighbour):
                    try:
                        _link_step(record, self.folder / step.folder)
                    except (OSError, ValueError, KeyError, TypeError):
                        continue  # a damaged neighbour: the step is done here
                    yield f"{step.folder}/{record.stem} taken over from {neighbour.name}"


def _declared(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / _SWEEP_JSON).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _link_step(record: Path, folder: Path) -> None:
    """Link a finished step's outputs into another folder, and copy its record last."""
    text = record.read_text(encoding="utf-8")
    for name in json.loads(text)["outputs"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"found output '{name}' in '{record}', expected one within its folder")
        source, target = record.parent.parent / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(source, target)
    write_text(folder / ".steps" / record.name, text)
