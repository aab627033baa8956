"""``coin sweep``: an experiment over a grid or random draws of its options."""

from lightning.pytorch.cli import LightningArgumentParser

from coin.commands.command import Call, Command, console
from coin.reporting import write_report
from coin.reporting.sweeps import SWEEP_CSV
from coin.sweeps import sweep


def _add_arguments(parser: LightningArgumentParser) -> None:
    parser.add_argument("file", type=str, help="The sweep's YAML, as for `wandb sweep`; see configs/sweep.")
    parser.add_argument("--output", type=str, default="runs", help="Where the sweep's folder goes.")
    parser.add_argument("--jobs", type=int | None, default=None, help="Points at a time; one per two cores by default.")
    parser.add_argument(
        "--count", type=int | None, default=None, help="At most so many points; a random sweep needs it."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of a random sweep's draws.")


def _execute(call: Call) -> None:
    outcome = sweep(build=call.experiment, **call.options)
    if outcome.table is not None:
        console().print(outcome.table)
        print(f"table: {outcome.folder / SWEEP_CSV}")
        print(f"report: {write_report([outcome.folder])}")
    outcome.check()


SWEEP = Command("Run an experiment over a grid or random draws of its options.", _add_arguments, _execute)
