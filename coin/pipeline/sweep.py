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
from coin.pipeline.steps.evaluation import Evaluate
from coin.reporting import write_report
from coin.reporting.results import PROMISE_CSV, read_promises, read_results, write_frame
from coin.reporting.sweeps import SWEEP_CSV, SWEEP_YAML, sweep_frame

_KEYS = ("name", "experiment", "grid", "set")
_DECIDED = ("name", "output", "config", "only", "json")
_NAME_LENGTH = 60


@dataclass(frozen=True)
class SweepFile:
    """A sweep's file: values by dotted key, of its grids and common to all points; and its text."""

    name: str
    experiment: tuple[str, ...]
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

    def check(fits: object, found: str, expected: str) -> None:
        if not fits:
            raise ConfigurationError(f"found {found} in '{path}', expected {expected}")

    document: Any = read_yaml(path)
    check(isinstance(document, dict), "no keys", f"a sweep with {', '.join(_KEYS)}")
    for key in document:
        check(key in _KEYS, f"key {key!r}", f"{', '.join(_KEYS)}; a sweep of W&B's is started by `wandb sweep`")
    name, fixed, grid = document.get("name", path.stem), document.get("set", {}), document.get("grid")
    files, grids = document.get("experiment"), grid if isinstance(grid, list) else [grid]
    files = [files] if isinstance(files, str) else files
    check(isinstance(name, str) and is_folder_name(name), f"name '{name}'", "a plain folder name without slashes")
    check(is_list_of_names(files), f"experiment {files}", "one experiment's file or several")
    check(isinstance(fixed, dict), f"set {fixed}", "dotted keys of an experiment, each with a value")
    fits = grids and all(isinstance(each, dict) and each and each.keys() == grids[0].keys() for each in grids)
    fits = fits and all(isinstance(values, list) and values for each in grids for values in each.values())
    expected = "dotted keys of an experiment, each with a list of values, or a list of such grids with the same keys"
    check(fits, f"grid {grid}", expected)
    for key in (*fixed, *grids[0]):
        own = isinstance(key, str) and key not in _DECIDED
        check(own, f"key {key!r}", f"an experiment's dotted key, none of {', '.join(_DECIDED)}; leave it out")
        check(key not in grids[0] or key not in fixed, f"'{key}' in grid and in set", "it in one of them")
    text = path.read_text(encoding="utf-8")
    return SweepFile(name, tuple(files), grids, fixed, text if "name" in document else f"name: {name}\n{text}")


def sweep_points(sweep: SweepFile, folder: Path) -> list[SweepPoint]:
    """Return the points of the grids in order, the last key varying fastest; a ConfigurationError for one twice."""
    files = [argument for file in sweep.experiment for argument in ("-c", file)]
    points: list[SweepPoint] = []
    axes = [[[(key, *pair) for pair in enumerate(values)] for key, values in grid.items()] for grid in sweep.grids]
    for chosen in (point for each in axes for point in itertools.product(*each)):
        values = {key: value for key, _, value in chosen}
        if any(values == point.values for point in points):
            raise ConfigurationError(f"found the point {as_text(values)} twice in the grid, expected every point once")
        shorts = [f"{key.rsplit('.')[-1]}-{_short(place, value)}" for key, place, value in chosen]
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(shorts))[:_NAME_LENGTH].strip("._-")
        name = f"{sweep.name}-{len(points):03d}-{plain}"
        options = {**sweep.fixed, **values}
        sections_first = sorted(options, key=lambda key: key.count("."))  # a section replaces what is set inside it
        own = [f"--{key}={as_text(options[key])}" for key in sections_first]
        points.append(SweepPoint(name, values, (*files, *own, f"--name={name}", f"--output={folder}")))
    return points


def _short(place: int, value: Any) -> str:
    """Return a value as a short string; for a nested value, its index in the grid."""
    entries = value if isinstance(value, list) else [value]
    plain = entries and all(isinstance(entry, str | int | float | None) for entry in entries)
    return "_".join(map(as_text, entries)) if plain else str(place)


def run_sweep(sweep: SweepFile, points: Sequence[tuple[SweepPoint, Experiment]], folder: Path, launch: Launch) -> Path:
    """Run all points as one plan, and return the page of their report.

    Raises CommandFailedError if some steps have failed; all points that do not need them have finished.
    """
    os.environ["WANDB_TAGS"] = ",".join(filter(None, [os.environ.get("WANDB_TAGS"), f"sweep-{sweep.name}"]))
    steps = union([prepared(experiment, launch) for _, experiment in points])
    write_text(folder / SWEEP_YAML, sweep.text)
    rank_zero_info(f"sweep {sweep.name}: {len(points)} points, {len(steps)} steps")
    seeds = {point: [experiment.folder / f"seed-{k}" for k in experiment.seeds] for point, experiment in points}
    done: set[Path] = set()  # the seeds' folders

    def on_done(planned: Planned, changed: bool) -> None:
        report_seed(planned, changed)
        if isinstance(planned.step, Evaluate):
            done.update(planned.copies)
            finished = [(point.values, own) for point, own in seeds.items() if done.issuperset(own)]
            for name, read in ((PROMISE_CSV, read_promises), (SWEEP_CSV, read_results)):
                if (frame := sweep_frame(finished, read)) is not None:
                    write_frame(folder / name, frame)

    run_steps(steps, launch, on_done, keep_going=True)
    for _, experiment in points:
        summarise_experiment(experiment)
    return write_report(folder)
