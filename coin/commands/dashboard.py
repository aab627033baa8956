"""``coin dashboard``: a W&B workspace of a project's experiments."""

from collections.abc import Sequence

from coin.commands.parser import command_parser, parsed
from coin.tracking.dashboard import dashboard


def main(arguments: Sequence[str]) -> None:
    """Make a workspace, and print its address."""
    parser = command_parser("dashboard")
    parser.add_argument("project", type=str, help="ENTITY/PROJECT, or PROJECT of your default entity.")
    parser.add_argument("--group", type=str | None, default=None, help="The one experiment to show.")
    parser.add_argument("--name", type=str | None, default=None, help="What to call the workspace.")
    print(dashboard(**parsed(parser, arguments)))
