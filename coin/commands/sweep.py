"""``coin sweep``: every point of a grid as a ``coin run`` in a process of its own, resumable.

Each point has a folder, ``runs/SWEEP/SWEEP-INDEX-DESCRIPTION``, with what it printed in ``sweep.log``. Points share the
base, the experts and the statistics that are the same for them; see `coin.pipeline.records`. An interrupted sweep can
be restarted: finished points are skipped, the others resume. ``runs/SWEEP/sweep.csv`` holds the rows of all finished
points, behind one column per swept key, ``risk.csv`` and ``promise.csv`` those at the end of the sweep; ``sweep.yaml``
is a copy of the sweep's file.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from coin.commands.parser import command_parser, parsed
from coin.commands.run import experiment_of
from coin.core.choices import check_integer
from coin.core.processes import cores, rank_zero_info
from coin.errors import ConfigurationError
from coin.files.atomic import write_text
from coin.pipeline.executors import Command, Executor, Launch, raise_for, run_commands
from coin.pipeline.records import folder_lock, record_step, status_of
from coin.pipeline.step import Step
from coin.pipeline.sweep import SweepPoint, read_sweep, sweep_points
from coin.reporting import write_report
from coin.reporting.extras import PROMISE_CSV, RISK_CSV, read_promises, read_risk
from coin.reporting.results import read_results, write_frame
from coin.reporting.sweeps import SWEEP_CSV, SWEEP_YAML, sweep_frame, sweep_table
from coin.reporting.tables import results_console
from coin.reporting.wandb_settings import check_connection, user_tags


class PointRun(Command):
    """A point's ``coin run``, and the record of its completion; the constructor validates the experiment."""

    def __init__(self, point: SweepPoint, variables: Mapping[str, str]) -> None:
        experiment = experiment_of(point.arguments)
        super().__init__(point.name, ("run", *point.arguments), experiment.folder / "sweep.log", variables)
        self.values = point.values
        self.seeds = [experiment.layout.seed(seed) for seed in experiment.seeds]
        parts = ("network", "base", "tasks", "expert", "calibration", "methods", "decoders", "seeds", "trainer")
        brought = [*experiment.expert.checkpoints.values(), experiment.base and experiment.base.checkpoint]
        files = [Path(path) for path in brought if path and Path(path).is_file()]
        code = experiment.code and experiment.code.matrix
        self.step = Step(
            "sweep",
            experiment.folder,
            point.name,
            "running",
            lambda _: None,  # the process does it
            options={"code": code, **{part: getattr(experiment, part) for part in parts}},
            inputs=files,
            outputs=[seed.results for seed in self.seeds],
        )


def main(arguments: Sequence[str]) -> None:
    """Run every unfinished point of a sweep, collect their results in one table, and print and report it.

    Raises:
        CommandFailedError: Some points have failed; all others have finished.
        CoinError: The file, or the experiment of one of its points, is not valid; nothing has been run.
    """
    parser = command_parser("sweep")
    parser.add_argument("file", type=str, help="The sweep's YAML: an experiment and a grid; see configs/study.")
    parser.add_argument("--output", type=str, default="runs", help="Where the sweep's folder goes.")
    parser.add_argument(
        "--jobs",
        type=int | None,
        default=None,
        help="Points at a time; one per two cores by default. Each gets an even share of the cores' threads, unless "
        "OMP_NUM_THREADS is set.",
    )
    parser.add_class_arguments(Launch, "launch")
    options = parsed(parser, arguments)
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigurationError(
            f"found WORLD_SIZE={processes}, expected one: every point is a process of its own; start coin sweep "
            "without torchrun or srun"
        )
    launch = _launch(options["launch"], options["jobs"])
    check_connection()
    plan = read_sweep(Path(options["file"]))
    folder = Path(options["output"]) / plan.name
    tags = ",".join([*user_tags(), f"sweep-{plan.name}"])
    runs = [PointRun(point, {"WANDB_TAGS": tags}) for point in sweep_points(plan, folder)]
    with folder_lock(folder):
        write_text(folder / SWEEP_YAML, plan.text)
        done = [run for run in runs if status_of(run.step).is_current]
        at_once = f"{launch.workers} at a time"
        rank_zero_info(f"sweep {plan.name}: {len(runs)} points, {len(done)} finished already, {at_once}")

        def finish(run: PointRun) -> None:
            record_step(run.step)
            done.append(run)
            _collect([each for each in runs if each in done], folder / SWEEP_CSV, read_results)

        _collect(done, folder / SWEEP_CSV, read_results)
        waiting = [run for run in runs if run not in done]
        failed = run_commands(waiting, launch, folder / "submitit", finish)
        done = [run for run in runs if run in done]
        frame = _collect(done, folder / SWEEP_CSV, read_results)
        _collect(done, folder / RISK_CSV, read_risk)
        _collect(done, folder / PROMISE_CSV, read_promises)
    if frame is not None:
        results_console().print(sweep_table(frame, list(plan.grids[0]), f"{plan.name}: NDA in %, mean over tasks"))
        print(f"table: {folder / SWEEP_CSV}")
        print(f"report: {write_report([folder])}")
    raise_for(failed, len(runs), "points")


def _launch(given: Launch, jobs: int | None) -> Launch:
    """Return how points are run: `jobs` at a time, or as many as the launch section says."""
    if jobs is None:
        jobs = max(1, cores() // 2) if given.executor is Executor.local and given.workers == 1 else given.workers
    check_integer("jobs", jobs, 1)
    return replace(given, workers=jobs)


def _collect(done: Sequence[PointRun], table: Path, read: Callable[[Path], pd.DataFrame | None]) -> pd.DataFrame | None:
    """Write and return the rows of finished points."""
    frame = sweep_frame([(run.values, [seed.folder for seed in run.seeds]) for run in done], read)
    if frame is None:
        table.unlink(missing_ok=True)
    else:
        write_frame(table, frame)
    return frame
