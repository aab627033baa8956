"""``coin merge``: experts and their statistics in, coded models out."""

from collections.abc import Sequence

from coin.commands.parser import command_parser, parsed
from coin.pipeline.steps.merge import merge


def main(arguments: Sequence[str]) -> None:
    """Merge, and print the files that were written."""
    parser = command_parser("merge")
    parser.add_function_arguments(merge)
    for path in merge(**parsed(parser, arguments)):
        print(path)
