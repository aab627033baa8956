"""``coin sweep``: an experiment over a grid of its options."""

from lightning.pytorch.cli import LightningArgumentParser

from coin.commands.command import Call, Command, console
from coin.sweep import sweep


def _add_arguments(parser: LightningArgumentParser) -> None:
    parser.add_argument("file", type=str, help="The sweep's YAML: an experiment and a grid; see configs/sweep.")
    parser.add_argument("--output", type=str, default="runs", help="Where the sweep's folder goes.")
    parser.add_argument("--jobs", type=int | None, default=None, help="Points at a time; one per two cores by default.")


def _execute(call: Call) -> None:
    sweep(build=call.experiment, console=console(), **call.options)


SWEEP = Command("Run an experiment over a grid of its options.", _add_arguments, _execute)
