"""``coin sweep``: every point of a W&B sweep file as an experiment of its own, on this machine, without W&B's server.

The file is one that ``wandb sweep`` takes as well; its command is ``coin run`` with ``${args}``::

    name: samples
    program: coin
    command: [coin, run, -c, configs/experiment/quickstart.yaml, "${args}"]
    method: grid                       # or random, with --count points
    metric: {name: nda_mean_best, goal: maximize}
    parameters:                        # dotted keys of the experiment file
      calibration.samples_per_task: {values: [25, 50, 100]}
      seeds: {values: [[0], [1]]}

Each point runs in its own process and has its own folder ``runs/SWEEP/SWEEP-INDEX-DESCRIPTION``, with what the process
printed in ``sweep.log``. Points share the base, the experts and the statistics that are the same for them (see
`coin.sweeps.sharing`). A sweep may be killed and started again: finished points are skipped, begun ones go on
where they were. A point that fails does not stop the others. ``runs/SWEEP/sweep.csv`` holds the rows of all finished
points, behind one column per swept key; keys with a single ``value`` are constants and have none. ``sweep.yaml`` beside
it is the file itself, and ``coin report runs/SWEEP`` makes the report.

A random sweep draws ``values`` (with ``probabilities`` if given), and numbers between ``min`` and ``max`` with the
distributions ``uniform``, ``int_uniform`` and ``log_uniform_values``. ``metric`` and ``early_terminate`` are for W&B's
agents.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from coin.errors import CoinError, ConfigurationError
from coin.experiment.children import last_line, stop, terminated_as_exit
from coin.experiment.experiment import Experiment
from coin.experiment.locks import alone_in
from coin.files.atomic import write_text
from coin.processes import cores
from coin.reporting.frames import write_frame
from coin.reporting.sweeps import SWEEP_CSV, SWEEP_YAML
from coin.reporting.wandb_connection import check_connection
from coin.sweeps.point_run import PointRun
from coin.sweeps.points import SweepFile, read_sweep, sweep_points
from coin.sweeps.table import sweep_frame, sweep_table

_POLL_SECONDS = 0.1
_NAMED_FAILURES = 4


class SweepFailedError(CoinError):
    """Points of a sweep have failed; the others are finished."""


@dataclass
class SweepOutcome:
    """What a sweep has come to.

    Args:
        folder: The sweep's folder.
        frame: The contents of ``sweep.csv``; none where no point is finished.
        table: The same for the terminal: mean NDA by point, method and decoder.
        failed: The logs of the points that failed.
        points: How many points there are.
    """

    folder: Path
    frame: pd.DataFrame | None
    table: Table | None
    failed: list[Path]
    points: int

    def check(self) -> None:
        """Tell which points failed.

        Raises:
            SweepFailedError: Naming their logs.
        """
        if self.failed:
            named = ", ".join(str(log) for log in self.failed[:_NAMED_FAILURES])
            if len(self.failed) > _NAMED_FAILURES:
                named += f" and {len(self.failed) - _NAMED_FAILURES} more"
            raise SweepFailedError(
                f"{len(self.failed)} of {self.points} points failed: see {named}; "
                "mend the cause and run the same command again"
            )


def sweep(
    file: str,
    build: Callable[[Sequence[str]], Experiment],
    output: str = "runs",
    jobs: int | None = None,
    count: int | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> SweepOutcome:
    """Run every point of a sweep that is not finished yet, and collect one table.

    Args:
        file: The sweep's YAML file.
        build: Returns the experiment that ``coin run`` makes of these arguments; it checks all points before the first
            is run.
        output: Where the sweep's folder goes.
        jobs: Points at a time; one per two cores by default. Each gets an even share of the cores' threads, unless
            ``OMP_NUM_THREADS`` is set.
        count: At most so many points; a random sweep needs it.
        seed: Of a random sweep's draws.
        console: Where progress goes.

    Returns:
        The table, and which points failed.

    Raises:
        CoinError: The file, or the experiment of one of its points, is not valid.
    """
    console = console or Console(stderr=True, soft_wrap=True)
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
    points = sweep_points(plan, folder, count, seed)
    runs = [PointRun(point, folder / point.name, build(point.arguments)) for point in points]
    with alone_in(folder), terminated_as_exit():
        write_text(folder / SWEEP_YAML, plan.text)
        scheduler = _Scheduler(plan, folder, runs, max(1, cores() // jobs), jobs, console)
        return scheduler.run()


@dataclass
class _Scheduler:
    """Runs points in order, `jobs` at a time, none beside another that is doing shared work it would do as well."""

    plan: SweepFile
    folder: Path
    runs: list[PointRun]
    threads: int
    jobs: int
    console: Console
    done: list[PointRun] = field(default_factory=list)
    running: list[PointRun] = field(default_factory=list)
    failed: list[PointRun] = field(default_factory=list)

    def run(self) -> SweepOutcome:
        pending: list[PointRun] = []
        for run in self.runs:
            (self.done if run.finished else pending).append(run)
        self._say(f"{len(self.runs)} points, {len(self.done)} finished already, {self.jobs} at a time")
        frame = self._collect()
        try:
            while pending or self.running:
                for run in [run for run in self.running if run.process is not None and run.process.poll() is not None]:
                    self._ended(run)
                    frame = self._collect()
                self._start(pending)
                time.sleep(_POLL_SECONDS)
        finally:
            self._stop()
        swept = list(self.runs[0].point.values)
        table = None if frame is None else sweep_table(frame, swept, f"{self.plan.name}: NDA in %, mean over tasks")
        failed = [run.log for run in self.runs if run in self.failed]
        return SweepOutcome(self.folder, frame, table, failed, len(self.runs))

    def _start(self, pending: list[PointRun]) -> None:
        if len(self.running) >= self.jobs:
            return
        held = [run for run in pending if run.held]
        for run in [run for run in pending if run not in held]:
            if len(self.running) >= self.jobs:
                return
            if not any(run.shelf.waits_for(other.shelf) for other in (*self.running, *held)):
                if not run.start(self.threads):
                    return  # another process has come first: the next look finds it held
                pending.remove(run)
                self.running.append(run)
                self._say(f"{run.point.name}: started")

    def _ended(self, run: PointRun) -> None:
        assert run.process is not None
        self.running.remove(run)
        status, seconds = run.process.returncode, time.monotonic() - run.started
        if status == 0:
            run.finish()
            self.done.append(run)
            place = f"{len(self.done)} of {len(self.runs)}"
            self._say(f"{run.point.name}: finished in {seconds:.0f} s ({place})")
        else:
            self.failed.append(run)
            self._say(f"{run.point.name}: failed with exit status {status}: {last_line(run.log)}")

    def _collect(self) -> pd.DataFrame | None:
        """Write the table of all finished points."""
        path = self.folder / SWEEP_CSV
        finished = [(run.point.values, run.seed_folders) for run in self.runs if run in self.done]
        if not finished:
            path.unlink(missing_ok=True)
            return None
        frame = sweep_frame(finished)
        write_frame(path, frame)
        return frame

    def _stop(self) -> None:
        """End what is still running, where the sweep itself is being ended."""
        stop([run.process for run in self.running if run.process is not None])

    def _say(self, text: str) -> None:
        self.console.print(f"sweep {self.plan.name}: {text}", highlight=False, markup=False)
