"""``coin sweep``: the experiments of a grid, whose plans are run as one: what several points need is made once.

Each point has a folder, ``runs/SWEEP/SWEEP-INDEX-DESCRIPTION``, and all share ``runs/SWEEP/.steps``.
``runs/SWEEP/sweep.csv`` holds the rows of all finished points, behind a column per swept key.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from coin.commands.parser import command_parser, parsed
from coin.commands.run import DRY_RUN, print_plan, read_experiment
from coin.commands.shipped import SWEEPS, shipped
from coin.errors import ConfigurationError
from coin.pipeline.pool import Launch
from coin.pipeline.sweep import read_sweep, run_sweep, sweep_points
from coin.reporting.sweeps import SWEEP_CSV, read_sweep_table, sweep_text
from coin.reporting.tables import results_console, rich_table


def main(arguments: Sequence[str]) -> None:
    """Run a sweep's file, or print its steps; nothing is run if the file or a point's experiment is not valid."""
    parser = command_parser("sweep")
    parser.add_argument(
        "file", type=str, help="The sweep's YAML, or the name of one in configs/study."
    )
    parser.add_argument("--output", type=str, default="runs", help="Where the sweep's folder goes.")
    parser.add_class_arguments(Launch, "launch")
    parser.add_argument("--dry-run", action="store_true", help=DRY_RUN)
    options = parsed(parser, arguments)
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        found = f"found WORLD_SIZE={processes}, expected one process, which runs a sweep's steps or launches others"
        raise ConfigurationError(f"{found}; start coin sweep without torchrun or srun")
    sweep = read_sweep(Path(shipped(SWEEPS, options["file"])))
    folder = Path(options["output"]) / sweep.name
    points = []
    for point in sweep_points(sweep, folder):
        experiment, _ = read_experiment(point.arguments)
        points.append((point, experiment))
    experiments = [experiment for _, experiment in points]
    if options["dry_run"]:
        print_plan(f"{sweep.name}, {len(points)} points", experiments, options["launch"])
        return
    page = run_sweep(sweep, points, folder, options["launch"])
    table = read_sweep_table(folder)
    assert table is not None
    text = sweep_text(table)
    texts = [*table.options.columns, "method"]
    results_console().print(rich_table(text, f"{sweep.name}: NDA in %, mean over tasks", texts))
    print(f"table: {folder / SWEEP_CSV}")
    print(f"report: {page}")
