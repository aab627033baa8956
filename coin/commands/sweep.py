"""``coin sweep``: every point of a grid as a ``coin run`` in a process of its own, resumable.

Each point has a folder, ``runs/SWEEP/SWEEP-INDEX-DESCRIPTION``, with what it printed in ``sweep.log``. Points share
steps (`coin.pipeline.records`); a sweep that is started again skips finished points. ``runs/SWEEP/sweep.csv`` holds the
rows of all finished points, behind a column per swept key; ``risk.csv`` and ``promise.csv`` are written at the end.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from coin.commands.parser import command_parser, parsed
from coin.commands.shipped import SWEEPS, shipped
from coin.core.choices import check_integer
from coin.core.processes import cores
from coin.errors import ConfigurationError
from coin.files.yaml import as_text
from coin.pipeline.launch import Launch
from coin.pipeline.sweep import SweepPoint, read_sweep, sweep_points


def main(arguments: Sequence[str]) -> None:
    """Run a sweep's file, or print its points; nothing is run if the file or a point's experiment is not valid."""
    parser = command_parser("sweep")
    parser.add_argument("file", type=str, help="The sweep's YAML, or the name of one in configs/study.")
    parser.add_argument("--output", type=str, default="runs", help="Where the sweep's folder goes.")
    parser.add_argument(
        "--jobs",
        type=int | None,
        default=None,
        help="Points at a time; one per two cores by default. Each gets an even share of the cores' threads, unless "
        "OMP_NUM_THREADS is set.",
    )
    parser.add_class_arguments(Launch, "launch")
    parser.add_argument("--dry-run", action="store_true", help="Print the points and whether they have results.")
    options = parsed(parser, arguments)
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigurationError(
            f"found WORLD_SIZE={processes}, expected one: every point is a process of its own; start coin sweep "
            "without torchrun or srun"
        )
    launch, jobs = options["launch"], options["jobs"]
    if jobs is None:
        jobs = max(1, cores() // 2) if not launch.side_by_side else launch.workers
    check_integer("jobs", jobs, 1)
    plan = read_sweep(Path(shipped(SWEEPS, options["file"])))
    plan = replace(plan, experiment=tuple(shipped("run", file) for file in plan.experiment))
    folder = Path(options["output"]) / plan.name
    points = sweep_points(plan, folder)
    if options["dry_run"]:
        _print_plan(points, folder)
        return
    from coin.commands.sweep_run import run_sweep  # imports PyTorch

    run_sweep(plan, points, folder, replace(launch, workers=jobs))


def _print_plan(points: Sequence[SweepPoint], folder: Path) -> None:
    """Print the points, the values of their options, and which have results: whether these are current, a run says."""
    for point in points:
        results = any((folder / point.name).glob("seed-*/results.csv"))
        values = ", ".join(f"{key}={as_text(value)}" for key, value in point.values.items())
        print(f"{point.name}: {values}: {'has results' if results else 'no results yet'}")
    print(f"{len(points)} points in '{folder}'")
