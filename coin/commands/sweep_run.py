"""The points of a sweep as processes, and the collection of their results; ``coin sweep`` has read the file."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from coin.commands.run import experiment_of
from coin.core.processes import rank_zero_info
from coin.files.atomic import write_text
from coin.pipeline.command import Command
from coin.pipeline.executors import raise_for, run_commands
from coin.pipeline.launch import Launch
from coin.pipeline.locks import folder_lock
from coin.pipeline.records import inputs_of, record_step, status_of
from coin.pipeline.step import Step
from coin.pipeline.sweep import SweepFile, SweepPoint
from coin.reporting import write_report
from coin.reporting.extras import PROMISE_CSV, RISK_CSV, read_promises, read_risk
from coin.reporting.results import read_results, write_frame
from coin.reporting.sweeps import SWEEP_CSV, SWEEP_YAML, sweep_frame, sweep_table
from coin.reporting.tables import results_console
from coin.tracking.settings import check_connection, user_tags


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
        options = {part: getattr(experiment, part) for part in parts}
        options["code"] = experiment.code and experiment.code.matrix
        if experiment.replicas:
            options["replicas"] = experiment.replicas
        self.step = Step(
            "sweep",
            experiment.folder,
            point.name,
            "running",
            lambda _: None,  # the process does it
            options=options,
            inputs=files,
            outputs=[seed.results for seed in self.seeds],
        )
        self.inputs = inputs_of(self.step)


def run_sweep(plan: SweepFile, points: Sequence[SweepPoint], folder: Path, launch: Launch) -> None:
    """Run every unfinished point, collect their results in one table, and print and report it.

    Raises CommandFailedError if some points have failed; all others have finished.
    """
    check_connection()
    tags = ",".join([*user_tags(), f"sweep-{plan.name}"])
    runs = [PointRun(point, {"WANDB_TAGS": tags}) for point in points]
    with folder_lock(folder):
        write_text(folder / SWEEP_YAML, plan.text)
        done = [run for run in runs if status_of(run.step).is_current]
        at_once = f"{launch.workers} at a time"
        rank_zero_info(f"sweep {plan.name}: {len(runs)} points, {len(done)} finished already, {at_once}")

        def finish(run: PointRun) -> None:
            record_step(run.step, run.inputs)
            done.append(run)
            _collect([each for each in runs if each in done], folder / SWEEP_CSV, read_results)

        _collect(done, folder / SWEEP_CSV, read_results)
        waiting = [run for run in runs if run not in done]
        failed = run_commands(waiting, launch, folder / "submitit", finish, share_gpus=False) if waiting else []
        done = [run for run in runs if run in done]
        frame = _collect(done, folder / SWEEP_CSV, read_results)
        _collect(done, folder / RISK_CSV, read_risk)
        _collect(done, folder / PROMISE_CSV, read_promises)
    if frame is not None:
        results_console().print(sweep_table(frame, list(plan.grids[0]), f"{plan.name}: NDA in %, mean over tasks"))
        print(f"table: {folder / SWEEP_CSV}")
        print(f"report: {write_report([folder])}")
    raise_for(failed, len(runs), "points")


def _collect(done: Sequence[PointRun], table: Path, read: Callable[[Path], pd.DataFrame | None]) -> pd.DataFrame | None:
    """Write and return the rows of finished points."""
    frame = sweep_frame([(run.values, [seed.folder for seed in run.seeds]) for run in done], read)
    if frame is None:
        table.unlink(missing_ok=True)
    else:
        write_frame(table, frame)
    return frame
