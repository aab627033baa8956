"""``coin sweep``: every point of a sweep's grid, a process a point, resumable.

Each point is one ``coin run`` with a folder of its own, ``runs/SWEEP/SWEEP-INDEX-DESCRIPTION``, and what it printed in
``sweep.log``. Points share the base, the experts and the statistics that are the same for them; see
`coin.experiment.store`. A sweep may be killed and started again: finished points are skipped, begun ones go on where
they were. ``runs/SWEEP/sweep.csv`` holds the rows of all finished points, behind one column per swept key;
``sweep.yaml`` beside it is the file itself, and ``coin report runs/SWEEP`` makes the report.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from coin.commands.parser import command_parser, parsed
from coin.commands.run import experiment_of
from coin.errors import CoinError, ConfigurationError
from coin.experiment.locks import alone_in
from coin.experiment.process_pool import Command, child_environment, run_side_by_side
from coin.experiment.store import Steps, step_key
from coin.files.atomic import write_text
from coin.processes import cores
from coin.reporting import write_report
from coin.reporting.frames import write_frame
from coin.reporting.results import RESULTS_CSV
from coin.reporting.sweeps import SWEEP_CSV, SWEEP_YAML, sweep_frame, sweep_table
from coin.reporting.table import results_console
from coin.reporting.wandb_connection import check_connection
from coin.reporting.wandb_logging import TAG_LENGTH
from coin.reporting.wandb_settings import user_tags
from coin.steps.code import AUTO
from coin.sweep import SweepPoint, read_sweep, sweep_points

_NAMED_FAILURES = 4


class SweepFailedError(CoinError):
    """Points of a sweep have failed; the others are finished."""


class PointRun(Command):
    """A point's ``coin run``, and the record of its end.

    Args:
        point: The point.

    Raises:
        CoinError: The point is no valid experiment.
    """

    def __init__(self, point: SweepPoint) -> None:
        experiment = experiment_of(point.arguments)
        super().__init__(point.name, ("run", *point.arguments), experiment.folder / "sweep.log")
        self.values = point.values
        self.seed_folders = [experiment.seed_folder(seed) for seed in experiment.seeds]
        parts = ("network", "base", "tasks", "expert", "calibration", "methods", "decoders", "seeds", "trainer")
        code = AUTO if experiment.code is None else experiment.code.matrix
        options = {**{name: getattr(experiment, name) for name in parts}, "code": code}
        brought = [*experiment.expert.checkpoints.values(), experiment.base and experiment.base.checkpoint]
        files = [Path(path) for path in brought if path and Path(path).is_file()]
        results = [folder / RESULTS_CSV for folder in self.seed_folders]
        self._steps, self._step = Steps(experiment.folder), ("sweep", step_key(options, files), results)

    def finished(self) -> bool:
        """Return whether the point has been run to its end with these options, and its results stand."""
        return self._steps.finished(*self._step)

    def finish(self) -> None:
        """Record that the point has been run to its end."""
        self._steps.finish(*self._step)


def main(arguments: Sequence[str]) -> None:
    """Run every point, and print the table of all of them."""
    parser = command_parser("sweep")
    parser.add_argument("file", type=str, help="The sweep's YAML: an experiment and a grid; see configs/sweep.")
    parser.add_argument("--output", type=str, default="runs", help="Where the sweep's folder goes.")
    parser.add_argument("--jobs", type=int | None, default=None, help="Points at a time; one per two cores by default.")
    sweep(**parsed(parser, arguments))


def sweep(file: str, output: str = "runs", jobs: int | None = None) -> None:
    """Run every point of a sweep that is not finished yet, collect one table, and print and report it.

    Args:
        file: The sweep's YAML file.
        output: Where the sweep's folder goes.
        jobs: Points at a time; one per two cores by default. Each gets an even share of the cores' threads, unless
            ``OMP_NUM_THREADS`` is set.

    Raises:
        CoinError: The file, or the experiment of one of its points, is not valid; nothing has been run.
        SweepFailedError: Points have failed, and all others are finished.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigurationError(
            f"found WORLD_SIZE={processes}, expected one: every point is a process of its own; start coin sweep "
            "without torchrun or srun"
        )
    jobs = max(1, cores() // 2) if jobs is None else jobs
    if jobs < 1:
        raise ConfigurationError(f"found jobs {jobs}, expected at least 1")
    check_connection()
    plan = read_sweep(Path(file))
    folder = Path(output) / plan.name
    runs = [PointRun(point) for point in sweep_points(plan, folder)]
    table = folder / SWEEP_CSV
    progress = Console(stderr=True, soft_wrap=True)

    def say(text: str) -> None:
        progress.print(f"sweep {plan.name}: {text}", highlight=False, markup=False)

    def record(run: PointRun) -> None:
        run.finish()
        done.add(run)
        write_frame(table, rows())

    def rows() -> pd.DataFrame:
        return sweep_frame([(run.values, run.seed_folders) for run in runs if run in done])

    with alone_in(folder):
        write_text(folder / SWEEP_YAML, plan.text)
        done = {run for run in runs if run.finished()}
        say(f"{len(runs)} points, {len(done)} finished already, {jobs} at a time")
        table.unlink(missing_ok=True)
        if done:
            write_frame(table, rows())
        tags = ",".join([*user_tags(), f"sweep-{plan.name}"[:TAG_LENGTH]])
        environment = {**child_environment(max(1, cores() // jobs)), "WANDB_TAGS": tags}
        failed = run_side_by_side([run for run in runs if run not in done], [environment] * jobs, say, record)
    if done:
        title = f"{plan.name}: NDA in %, mean over tasks"
        results_console().print(sweep_table(rows(), list(plan.grid), title))
        print(f"table: {table}")
        print(f"report: {write_report([folder])}")
    if failed:
        more = f" and {len(failed) - _NAMED_FAILURES} more" if len(failed) > _NAMED_FAILURES else ""
        raise SweepFailedError(
            f"{len(failed)} of {len(runs)} points failed: see "
            f"{', '.join(str(run.log) for run in failed[:_NAMED_FAILURES])}{more}; "
            "mend the cause and run the same command again"
        )
