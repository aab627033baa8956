"""A sweep: an experiment over a grid of its options.

The file names an experiment, and what is varied in it::

    name: samples
    experiment: [configs/experiment/study/small-pair.yaml]  # one file or several, laid over one another
    grid:                                                   # dotted keys of the experiment; the last varies fastest
      calibration.samples_per_task: [25, 50, 100]
      seeds: [[0], [1], [2]]
    set:                                                    # what all points have in place of the experiment's own
      methods: [{class_path: Average}]

A list of grids has the points of each, one after another. For anything beyond a grid, ``coin run`` is the program: of a
W&B sweep, with ``command: [coin, run, -c, EXPERIMENT.yaml, "${args}"]``, or of an Optuna study.
"""

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coin.core.choices import is_list_of_names
from coin.core.processes import rank_zero_info
from coin.errors import ConfigurationError
from coin.files.atomic import is_folder_name, write_text
from coin.files.yaml import as_text, read_yaml
from coin.pipeline.experiment import Experiment
from coin.pipeline.plan import Planned, union
from coin.pipeline.pool import Launch
from coin.pipeline.run import prepared, report_seed, run_steps, summarise_experiment
from coin.reporting import write_report
from coin.reporting.results import PROMISE_CSV, read_promises, read_results, write_frame
from coin.reporting.sweeps import SWEEP_CSV, SWEEP_YAML, sweep_frame

_FORM = (
    "name: a plain folder name, experiment: a file or several, grid: dotted keys of an experiment, each with a list of "
    "values, or a list of such grids with the same keys, and set: dotted keys, each with a value"
)
_DECIDED = ("name", "output", "config", "only", "json")
_NAME_LENGTH = 60


@dataclass(frozen=True)
class SweepFile:
    """A sweep's file: values by dotted key, of its grids and common to all points; and its text."""

    name: str
    experiment: list[str]
    grids: list[Mapping[str, list[Any]]]
    fixed: Mapping[str, Any]
    text: str


@dataclass(frozen=True, eq=False)
class SweepPoint:
    """One point of a sweep: the experiment ``SWEEP-INDEX-DESCRIPTION``, made by ``coin run`` with these arguments."""

    name: str
    values: Mapping[str, Any]
    arguments: tuple[str, ...]


def read_sweep(path: Path) -> SweepFile:
    """Read a sweep's file; a FileError if it is missing or no text, a ConfigurationError if it is no sweep."""
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise ConfigurationError(f"found no keys in '{path}', expected a sweep with {_FORM}")
    options = {"name": path.stem, "experiment": None, "grid": None, "set": {}, **document}
    name = options["name"]
    fixed = options["set"]
    files = (
        [options["experiment"]] if isinstance(options["experiment"], str) else options["experiment"]
    )
    grid = options["grid"]
    grids: list[Any] = grid if isinstance(grid, list) else [grid]
    is_named = isinstance(name, str) and is_folder_name(name) and is_list_of_names(files)
    has_grids = bool(grids) and all(map(_is_grid, grids))
    if not is_named or not has_grids or not isinstance(fixed, dict) or len(options) > 4:
        raise ConfigurationError(
            f"found {str(document)[:200]} in '{path}', expected a sweep with {_FORM}"
        )
    if any(each.keys() != grids[0].keys() for each in grids):
        raise ConfigurationError(
            f"found grids of other keys in '{path}', expected a list of grids with the same keys"
        )
    for key in (*fixed, *grids[0]):
        if not isinstance(key, str) or key in _DECIDED:
            expected = f"an experiment's dotted key, none of {', '.join(_DECIDED)}"
            raise ConfigurationError(
                f"found key {key!r} in '{path}', expected {expected}; leave it out"
            )
    text = path.read_text(encoding="utf-8")
    if "name" not in document:
        text = f"name: {name}\n{text}"
    return SweepFile(name, files, grids, fixed, text)


def _is_grid(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(values, list) and len(values) > 0 for values in value.values())


def sweep_points(sweep: SweepFile, folder: Path) -> list[SweepPoint]:
    """Return the points of the grids in order, the last key varying fastest."""
    points: list[SweepPoint] = []
    for grid in sweep.grids:
        numbered = [list(enumerate(values)) for values in grid.values()]
        for chosen in itertools.product(*numbered):  # of each key a value and its place
            values: dict[str, Any] = {}
            words = []
            for key, (place, value) in zip(grid, chosen, strict=True):
                values[key] = value
                last = key.rsplit(".")[-1]
                words.append(f"{last}-{_short(place, value)}")
            plain = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words))
            description = plain[:_NAME_LENGTH].strip("._-")
            name = f"{sweep.name}-{len(points):03d}-{description}"
            arguments = _arguments(sweep, values, name, folder)
            points.append(SweepPoint(name, values, arguments))
    return points


def _short(place: int, value: Any) -> str:
    """Return a value as a short string; for a nested value, its index in the grid."""
    entries = value if isinstance(value, list) else [value]
    if not entries or any(isinstance(entry, list | dict) for entry in entries):
        return str(place)
    return "_".join(map(as_text, entries))


def _arguments(
    sweep: SweepFile, values: Mapping[str, Any], name: str, folder: Path
) -> tuple[str, ...]:
    """Return the arguments of ``coin run`` for a point."""
    arguments = []
    for file in sweep.experiment:
        arguments += ["-c", file]
    options = {**sweep.fixed, **values}
    # A section replaces what is set inside it.
    for key in sorted(options, key=lambda key: key.count(".")):
        arguments.append(f"--{key}={as_text(options[key])}")
    return (*arguments, f"--name={name}", f"--output={folder}")


def run_sweep(
    sweep: SweepFile, points: Sequence[tuple[SweepPoint, Experiment]], folder: Path, launch: Launch
) -> Path:
    """Run all points as one plan, and return the page of their report.

    Raises CommandFailedError if some steps have failed; all points that do not need them have finished.
    """
    given_tags = os.environ.get("WANDB_TAGS")
    tag = f"sweep-{sweep.name}"
    os.environ["WANDB_TAGS"] = f"{given_tags},{tag}" if given_tags else tag
    steps = union([prepared(experiment, launch) for _, experiment in points])
    write_text(folder / SWEEP_YAML, sweep.text)
    rank_zero_info(f"sweep {sweep.name}: {len(points)} points, {len(steps)} steps")
    every_point = []
    for point, experiment in points:
        seed_folders = [experiment.folder / f"seed-{seed}" for seed in experiment.seeds]
        every_point.append((point.values, seed_folders))
    measured: set[Path] = set()

    def on_done(planned: Planned, changed: bool) -> None:
        report_seed(planned, changed)
        if planned.seed_folder is not None:
            measured.add(planned.seed_folder)
            finished = [
                (values, seeds) for values, seeds in every_point if measured.issuperset(seeds)
            ]
            _write_tables(folder, finished)

    run_steps(steps, launch, on_done, keep_going=True)
    for _, experiment in points:
        summarise_experiment(experiment, steps)
    return write_report(folder)


def _write_tables(folder: Path, points: Sequence[tuple[Mapping[str, Any], Sequence[Path]]]) -> None:
    """Write the tables of points whose seeds are all measured."""
    for name, read in ((PROMISE_CSV, read_promises), (SWEEP_CSV, read_results)):
        frame = sweep_frame(points, read)
        if frame is not None:
            write_frame(folder / name, frame)
