"""``coin dashboard``: a W&B workspace of a project's experiments."""

from lightning.pytorch.cli import LightningArgumentParser

from coin.commands.command import Call, Command
from coin.reporting.dashboard import dashboard


def _add_arguments(parser: LightningArgumentParser) -> None:
    parser.add_argument("project", type=str, help="ENTITY/PROJECT, or PROJECT of your default entity.")
    parser.add_argument("--group", type=str | None, default=None, help="The one experiment to show.")
    parser.add_argument("--name", type=str | None, default=None, help="What to call the workspace.")


def _execute(call: Call) -> None:
    print(dashboard(**call.options))


DASHBOARD = Command("Make a W&B workspace of a project's experiments, online.", _add_arguments, _execute)
