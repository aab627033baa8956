"""``coin sweep``: an experiment over a grid of its options."""

from collections.abc import Sequence

from coin.commands.parser import command_parser, parsed
from coin.commands.run import experiment_of
from coin.reporting.report import write_report
from coin.reporting.sweeps import SWEEP_CSV
from coin.reporting.table import results_console
from coin.sweeps import sweep


def main(arguments: Sequence[str]) -> None:
    """Run every point, and print the table of all of them."""
    parser = command_parser("sweep")
    parser.add_argument("file", type=str, help="The sweep's YAML, as for `wandb sweep`; see configs/sweep.")
    parser.add_argument("--output", type=str, default="runs", help="Where the sweep's folder goes.")
    parser.add_argument("--jobs", type=int | None, default=None, help="Points at a time; one per two cores by default.")
    parser.add_argument(
        "--count", type=int | None, default=None, help="At most so many points; a random sweep needs it."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of a random sweep's draws.")
    outcome = sweep(build=experiment_of, **parsed(parser, arguments))
    if outcome.table is not None:
        results_console().print(outcome.table)
        print(f"table: {outcome.folder / SWEEP_CSV}")
        print(f"report: {write_report([outcome.folder])}")
    outcome.check()
