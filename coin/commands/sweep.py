"""``coin sweep``: an experiment over a grid of its options."""

from collections.abc import Sequence

from coin.commands.parser import command_parser, parsed
from coin.commands.run import experiment_of
from coin.reporting.tables import results_console
from coin.sweep import sweep


def main(arguments: Sequence[str]) -> None:
    """Run every point, and print the table of all of them."""
    parser = command_parser("sweep")
    parser.add_argument("file", type=str, help="The sweep's YAML: an experiment and a grid; see configs/sweep.")
    parser.add_argument("--output", type=str, default="runs", help="Where the sweep's folder goes.")
    parser.add_argument("--jobs", type=int | None, default=None, help="Points at a time; one per two cores by default.")
    sweep(build=experiment_of, console=results_console(), **parsed(parser, arguments))
