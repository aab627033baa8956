"""``coin sweep``: an experiment over a grid of its options, a process a point, resumable.

The file names an experiment, and what is varied in it::

    name: samples
    experiment: [configs/experiment/study/small-pair.yaml]  # one file or several, laid over one another
    grid:                                                   # dotted keys of the experiment; the last varies fastest
      calibration.samples_per_task: [25, 50, 100]
      seeds: [[0], [1], [2]]
    set:                                                    # what all points have in place of the experiment's own
      methods: [{class_path: Average}]

Each point is one ``coin run`` with a folder of its own, ``runs/SWEEP/SWEEP-INDEX-DESCRIPTION``, and what it printed in
``sweep.log``. Points share the base, the experts and the statistics that are the same for them; see
`coin.experiment.store`. A sweep may be killed and started again: finished points are skipped, begun ones go on where
they were. A point that fails does not stop the others. ``runs/SWEEP/sweep.csv`` holds the rows of all finished points,
behind one column per swept key; ``sweep.yaml`` beside it is the file itself, and ``coin report runs/SWEEP`` makes the
report.

For anything beyond a grid, ``coin run`` is the program: of a W&B sweep, with
``command: [coin, run, -c, EXPERIMENT.yaml, "${args}"]``, or of an Optuna study that gives it ``--KEY=VALUE``.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml  # type: ignore[import-untyped]
from rich.console import Console

from coin.errors import CoinError, ConfigurationError
from coin.experiment.children import child_environment, last_line, stop, terminated_as_exit
from coin.experiment.experiment import Experiment
from coin.experiment.locks import alone_in
from coin.experiment.store import Steps, step_key
from coin.files.atomic import is_folder_name, write_text
from coin.files.yaml import read_yaml
from coin.processes import cores
from coin.reporting import write_report
from coin.reporting.results import RESULTS_CSV, write_frame
from coin.reporting.sweeps import SWEEP_CSV, SWEEP_YAML, as_text, sweep_frame, sweep_table
from coin.reporting.wandb_connection import check_connection
from coin.reporting.wandb_logging import TAG_LENGTH
from coin.reporting.wandb_settings import user_tags
from coin.steps.code import AUTO

_KEYS = ("name", "experiment", "grid", "set")
_KEYS_OF_WANDB = ("program", "command", "method", "parameters", "metric", "run_cap", "early_terminate")
_DECIDED = ("name", "output", "config", "only", "json")
_NAME_LENGTH = 60
_POLL_SECONDS = 0.1
_NAMED_FAILURES = 4


class SweepFailedError(CoinError):
    """Points of a sweep have failed; the others are finished."""


@dataclass(frozen=True)
class SweepFile:
    """What a sweep's file says.

    Args:
        name: The sweep's name: its folder is ``output/name``.
        experiment: The experiment's files.
        grid: By dotted key, the values that it takes.
        fixed: By dotted key, the value that all points have.
        text: The file itself, its name in it.
    """

    name: str
    experiment: tuple[str, ...]
    grid: Mapping[str, list[Any]]
    fixed: Mapping[str, Any]
    text: str


@dataclass(frozen=True)
class SweepPoint:
    """One point of a sweep: one experiment.

    Args:
        name: The experiment's name, ``SWEEP-INDEX-DESCRIPTION``.
        values: The swept keys' values.
        arguments: The arguments of ``coin run``.
    """

    name: str
    values: Mapping[str, Any]
    arguments: tuple[str, ...]


def read_sweep(path: Path) -> SweepFile:
    """Read a sweep's file.

    Raises:
        FileError: The file is missing or no text.
        ConfigurationError: It is no sweep.
    """
    text = read_yaml(path)
    try:
        document = yaml.safe_load(text)
        json.dumps(document)
    except (yaml.YAMLError, ValueError, TypeError) as error:  # such as a date, which no option takes
        raise ConfigurationError(
            f"found a value in '{path}' that no option takes ({' '.join(str(error).split())}); put it in quotes"
        ) from error
    if not isinstance(document, dict):
        raise ConfigurationError(f"found no keys in '{path}', expected a sweep with {', '.join(_KEYS)}")
    if old := [key for key in document if key in _KEYS_OF_WANDB]:
        raise ConfigurationError(
            f"found '{old[0]}' in '{path}', a key of W&B's sweeps; write experiment: [FILE.yaml] for its command, "
            "grid: {KEY: [VALUE, VALUE]} for parameters with values and set: {KEY: VALUE} for those with one value, "
            "or give the file to `wandb sweep`"
        )
    if unknown := [key for key in document if key not in _KEYS]:
        raise ConfigurationError(f"found key '{unknown[0]}' in '{path}', expected {', '.join(_KEYS)}")
    name = document.get("name", path.stem)
    if not isinstance(name, str) or not is_folder_name(name):
        raise ConfigurationError(f"found name '{name}' in '{path}', expected a plain folder name without slashes")
    files, grid, fixed = document.get("experiment"), document.get("grid"), document.get("set", {})
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise ConfigurationError(f"found experiment {files} in '{path}', expected one experiment's file or several")
    if not isinstance(grid, dict) or not grid:
        raise ConfigurationError(f"found no grid in '{path}', expected dotted keys of an experiment and their values")
    if not isinstance(fixed, dict):
        raise ConfigurationError(f"found set {fixed} in '{path}', expected dotted keys of an experiment")
    for key in (*grid, *fixed):
        if not isinstance(key, str):
            raise ConfigurationError(f"found key {key!r} in '{path}', expected a dotted key of an experiment")
        if key in _DECIDED:
            raise ConfigurationError(
                f"found '{key}' in '{path}', which the sweep decides for every point; leave it out"
            )
        if key in grid and key in fixed:
            raise ConfigurationError(f"found '{key}' in grid and in set of '{path}', expected it in one of them")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigurationError(
                f"found '{key}' with {values} in the grid of '{path}', expected a list of values; options inside a "
                "section are dotted keys, such as calibration.samples_per_task"
            )
    return SweepFile(name, tuple(files), grid, fixed, text if "name" in document else f"name: {name}\n{text}")


def sweep_points(sweep: SweepFile, folder: Path) -> list[SweepPoint]:
    """Return the points of the grid in the file's order, the last key varying fastest.

    Args:
        sweep: The sweep.
        folder: The sweep's folder, in which each experiment gets its own.
    """
    combinations = itertools.product(*(range(len(values)) for values in sweep.grid.values()))
    return [_point(sweep, folder, index, places) for index, places in enumerate(combinations)]


def _point(sweep: SweepFile, folder: Path, index: int, places: Sequence[int]) -> SweepPoint:
    values = {key: sweep.grid[key][place] for key, place in zip(sweep.grid, places, strict=True)}
    shorts = (f"{key.rsplit('.')[-1]}-{_short(values[key], place)}" for key, place in zip(values, places, strict=True))
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(shorts))[:_NAME_LENGTH].strip("._-")
    name = f"{sweep.name}-{index:03d}" + (f"-{plain}" if plain else "")
    files = [argument for file in sweep.experiment for argument in ("-c", file)]
    options = {**sweep.fixed, **values}
    depth_first = sorted(options, key=lambda key: key.count("."))  # a section would replace options inside it
    own = [f"--{key}={as_text(options[key])}" for key in depth_first]
    return SweepPoint(name, values, (*files, *own, f"--name={name}", f"--output={folder}"))


def _short(value: Any, place: int) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None or isinstance(value, str | int):
        return as_text(value)
    if isinstance(value, list) and value and all(isinstance(entry, str | int | float) for entry in value):
        return "_".join(as_text(entry) for entry in value)
    # Nothing short says what a nested value is: its place in the file does.
    return str(place)


class PointRun:
    """One point's folder, and its process once it is started.

    Args:
        point: The point.
        folder: The experiment's folder.
        experiment: The experiment, as ``coin run`` makes it.
    """

    def __init__(self, point: SweepPoint, folder: Path, experiment: Experiment) -> None:
        self.point = point
        self.folder = folder
        self.log = folder / "sweep.log"
        self.seed_folders = [folder / f"seed-{seed}" for seed in experiment.seeds]
        self.results = [seed_folder / RESULTS_CSV for seed_folder in self.seed_folders]
        parts = ("network", "base", "tasks", "expert", "calibration", "methods", "decoders", "seeds", "trainer")
        options: dict[str, Any] = {name: getattr(experiment, name) for name in parts}
        brought = [*experiment.expert.checkpoints.values(), experiment.base and experiment.base.checkpoint]
        files = [Path(path) for path in brought if path and Path(path).is_file()]
        code = AUTO if experiment.code is None else experiment.code.matrix
        self.key = step_key({**options, "code": code}, files)

    @property
    def finished(self) -> bool:
        """Whether the point has been run to its end with these options, and its results stand."""
        return Steps(self.folder).finished("sweep", self.key, self.results)

    def finish(self) -> None:
        """Record that the point has been run to its end."""
        Steps(self.folder).finish("sweep", self.key, self.results)

    def start(self, threads: int) -> None:
        """Start ``coin run``; beside a process of an earlier, killed sweep, it waits for that."""
        command = [sys.executable, "-m", "coin", "run", *self.point.arguments]
        tags = ",".join([*user_tags(), f"sweep-{self.folder.parent.name}"[:TAG_LENGTH]])
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            print(f"# {' '.join(command)}", file=log, flush=True)
            self.started = time.monotonic()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**child_environment(threads), "WANDB_TAGS": tags},
            )


def sweep(
    file: str,
    build: Callable[[Sequence[str]], Experiment],
    output: str = "runs",
    jobs: int | None = None,
    console: Console | None = None,
) -> None:
    """Run every point of a sweep that is not finished yet, collect one table, and show and report it.

    Args:
        file: The sweep's YAML file.
        build: Returns the experiment that ``coin run`` makes of these arguments; it checks all points before the first
            is run.
        output: Where the sweep's folder goes.
        jobs: Points at a time; one per two cores by default. Each gets an even share of the cores' threads, unless
            ``OMP_NUM_THREADS`` is set.
        console: Where the table goes; standard output by default.

    Raises:
        CoinError: The file, or the experiment of one of its points, is not valid.
        SweepFailedError: Points have failed, and all others are finished.
    """
    jobs = max(1, cores() // 2) if jobs is None else jobs
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigurationError(
            f"found WORLD_SIZE={processes}, expected one: every point is a process of its own; start coin sweep "
            "without torchrun or srun"
        )
    if jobs < 1:
        raise ConfigurationError(f"found jobs {jobs}, expected at least 1")
    check_connection()
    plan = read_sweep(Path(file))
    folder = Path(output) / plan.name
    runs = [PointRun(point, folder / point.name, build(point.arguments)) for point in sweep_points(plan, folder)]

    progress = Console(stderr=True, soft_wrap=True)

    def say(text: str) -> None:
        progress.print(f"sweep {plan.name}: {text}", highlight=False, markup=False)

    with alone_in(folder), terminated_as_exit():
        write_text(folder / SWEEP_YAML, plan.text)
        frame, failed = _run(runs, folder / SWEEP_CSV, jobs, say)
    if frame is not None:
        (console or Console()).print(sweep_table(frame, list(plan.grid), f"{plan.name}: NDA in %, mean over tasks"))
        print(f"table: {folder / SWEEP_CSV}")
        print(f"report: {write_report([folder])}")
    if failed:
        more = f" and {len(failed) - _NAMED_FAILURES} more" if len(failed) > _NAMED_FAILURES else ""
        raise SweepFailedError(
            f"{len(failed)} of {len(runs)} points failed: see {', '.join(map(str, failed[:_NAMED_FAILURES]))}{more}; "
            "mend the cause and run the same command again"
        )


def _run(
    runs: Sequence[PointRun], table: Path, jobs: int, say: Callable[[str], None]
) -> tuple[pd.DataFrame | None, list[Path]]:
    """Run points in order, `jobs` at a time; return the rows of those that are finished, and the logs of the others."""
    done = {run for run in runs if run.finished}
    waiting = [run for run in runs if run not in done]
    running: list[PointRun] = []
    say(f"{len(runs)} points, {len(done)} finished already, {jobs} at a time")
    frame = _collect(runs, done, table)
    try:
        while waiting or running:
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                if (status := run.process.returncode) == 0:
                    run.finish()
                    done.add(run)
                    frame = _collect(runs, done, table)
                    seconds = time.monotonic() - run.started
                    say(f"{run.point.name}: finished in {seconds:.0f} s ({len(done)} of {len(runs)})")
                else:
                    say(f"{run.point.name}: failed with exit status {status}: {last_line(run.log)}")
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                run.start(max(1, cores() // jobs))
                running.append(run)
                say(f"{run.point.name}: started")
            time.sleep(_POLL_SECONDS)
    finally:
        stop([run.process for run in running])  # where the sweep itself is being ended
    return frame, [run.log for run in runs if run not in done]


def _collect(runs: Sequence[PointRun], done: Collection[PointRun], table: Path) -> pd.DataFrame | None:
    """Write the rows of all finished points."""
    if not done:
        table.unlink(missing_ok=True)
        return None
    frame = sweep_frame([(run.point.values, run.seed_folders) for run in runs if run in done])
    write_frame(table, frame)
    return frame
